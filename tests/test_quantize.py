"""Weights in fewer bytes: what they are worth, and what becomes of the model."""

import pytest
import torch

from nanogpt.generate import Decoder, Text
from nanogpt.model import GPT, GPTConfig
from nanogpt.quantize import FEW, Int8Linear, cast


@pytest.mark.parametrize("rows", [1, 3, FEW, FEW + 1, 40])
@pytest.mark.parametrize("shape", [(96, 64), (50, 32), (7, 24)])
def test_a_product_is_that_of_the_rounded_weights(rows, shape):
    torch.manual_seed(0)
    weight, bias = torch.randn(shape) * torch.logspace(-3, 2, shape[0])[:, None], torch.randn(shape[0])
    packed = Int8Linear(weight, bias)
    restored = packed.weight.double() * packed.step.double()[:, None]
    assert ((restored - weight).abs() <= 0.51 * packed.step.double()[:, None]).all()
    x = torch.randn(2, rows, shape[1]).bfloat16()[:1]
    expected = x.double() @ restored.T + bias.bfloat16().double()
    scale = x.double().abs() @ restored.abs().T + bias.abs()
    assert ((packed(x).double() - expected).abs() <= 2**-7 * scale).all()


def test_rows_of_zeros_stay_zeros():
    packed = Int8Linear(torch.zeros(8, 32))
    assert not packed(torch.randn(1, 32).bfloat16()).any()


def model_of(**changes) -> GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "vocab_multiple": 64, "block_size": 16, "n_layer": 2, "n_head": 2}
    model = GPT(GPTConfig(**{**sizes, "n_embd": 32, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    return model


@pytest.mark.parametrize("switches", [{}, {"tied": False, "position": "rope", "smear": True, "softcap": 9.0}])
def test_a_model_of_int8_is_nearly_the_same(switches):
    idx = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(1))
    exact = model_of(**switches)(idx)[0]
    model = cast(model_of(**switches), "int8")
    found = model(idx)[0]
    assert found.shape == (4, 16, 61) and found.dtype == torch.float32
    assert (found - exact).std() < 0.03 * exact.std()
    held = {name: buffer.dtype for name, buffer in model.named_buffers()}
    assert held["packed_head.weight"] == held["h.0.attn.c_attn.weight"] == torch.int8
    assert "lm_head.weight" not in dict(model.named_parameters())
    decoder = Decoder(model, 2)
    texts = [Text([1, 2, 3]), Text([4])]
    decoder.add(texts)
    for _ in range(40):
        decoder.step()
    assert all(len(text.new) == 40 and max(text.new) < 61 for text in texts)


def test_half_precision_casts_all_of_it():
    model = cast(model_of(position="rope"), "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    decoder = Decoder(model, 1)
    decoder.add([Text([1] * 40)])
    assert len(decoder.step()) == 1
