"""Weights in fewer bytes: what they are worth, and what becomes of the model."""

import pytest
import torch
from torch.nn import functional as F

from nanogpt import quantize
from nanogpt.generate import Decoder, Text
from nanogpt.model import GPT, GPTConfig
from nanogpt.quantize import FEW, FEWEST, Int8Linear, Int8Portable, PackedLinear, cast, has_int8, rounded
from nanogpt.runtime import DTYPES

KINDS = [Int8Portable, *([Int8Linear] if has_int8(torch.device("cpu")) else [])]
SHAPES = [(96, 64), (50, 32), (7, 24), (33, 200)]


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_rounded_by_rows(shape):
    weight = torch.randn(shape) * torch.logspace(-3, 2, shape[0])[:, None]
    whole, step = rounded(weight)
    assert whole.dtype == torch.int8 and whole.abs().amax(dim=1).tolist() == [127] * len(weight)
    assert ((whole.double() * step.double()[:, None] - weight).abs() <= 0.501 * step.double()[:, None]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, FEW, FEW + 1, 40])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_that_of_the_rounded_weights(kind, rows, shape):
    torch.manual_seed(0)
    weight, bias = torch.randn(shape) * torch.logspace(-3, 2, shape[0])[:, None], torch.randn(shape[0])
    whole, step = rounded(weight)
    restored = whole.double() * step.double()[:, None]
    # 15 bits of each activation, or bfloat16 in all places
    dtype, bits = (torch.bfloat16, 7) if kind is Int8Portable else (torch.float32, 14)
    x = (torch.randn(1, rows, shape[1]) * torch.logspace(-4, 3, rows)[:, None]).to(dtype)
    x[0, 0, 3] = 30 * x[0, 0].abs().max()  # one large activation, as trained models have them
    expected = x.double() @ restored.T + bias.double()
    largest = x.double().abs().amax(dim=-1, keepdim=True).expand_as(x)
    scale = (largest if bits == 14 else x.double().abs()) @ restored.abs().T + bias.abs()
    found = kind(weight, bias)(x)
    assert found.dtype == dtype and ((found.double() - expected).abs() <= 2**-bits * scale).all()
    assert kind(weight)(x).shape == found.shape


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_stay_zeros(kind):
    dtype = torch.bfloat16 if kind is Int8Portable else torch.float32
    assert not kind(torch.zeros(8, 32))(torch.randn(1, 32).to(dtype)).any()
    assert not kind(torch.randn(8, 32))(torch.zeros(1, 32).to(dtype)).any()


@pytest.mark.skipif(Int8Linear not in KINDS, reason="this CPU has no instructions for products of int8")
def test_int8_products_do_not_depend_on_their_company():
    product = Int8Linear(torch.randn(300, 200), torch.randn(300))
    x = torch.randn(40, 200)
    together = product(x)
    assert all(torch.equal(product(x[i : i + 1])[0], together[i]) for i in range(40))


@pytest.mark.parametrize("rows", [1, 3, 4, 40])
@pytest.mark.parametrize("dtype", FEWEST)
def test_a_packed_product_is_the_product(dtype, rows):
    weight, bias, x = (
        torch.randn(96, 64).to(dtype),
        torch.randn(96).to(dtype),
        torch.randn(2, rows, 64).to(dtype),
    )
    expected = F.linear(x.double(), weight.double(), bias.double())
    bound = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(PackedLinear(weight, bias)(x).double(), expected, atol=bound, rtol=bound)
    assert PackedLinear(weight)(x[0]).shape == (rows, 96)


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
    assert not {name for name, p in model.named_parameters() if p.dim() > 1} - {
        "wte.weight",
        "position.wpe.weight",
    }
    decoder = Decoder(model, 2)
    texts = [Text([1, 2, 3]), Text([4])]
    decoder.add(texts)
    for _ in range(40):
        decoder.step()
    assert all(len(text.new) == 40 and max(text.new) < 61 for text in texts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("least", [0, 3000, 1 << 30])
def test_other_formats_are_cast_and_packed(dtype, least, monkeypatch):
    monkeypatch.setattr(quantize, "PACKED_FROM", dict.fromkeys(("float32", "bfloat16"), least))
    idx = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(1))
    exact = model_of(position="rope", tied=False)(idx)[0]
    model = cast(model_of(position="rope", tied=False), dtype)
    assert {p.dtype for p in model.parameters()} == {DTYPES[dtype]}
    error = (model(idx)[0] - exact).abs().max() / exact.std()
    assert error < {"float32": 1e-5, "bfloat16": 0.2, "float16": 0.02}[dtype]
    decoder = Decoder(model, 1)
    decoder.add([Text([1] * 40)])
    assert len(decoder.step()) == 1


def test_a_packed_model_writes_what_the_plain_one_does(monkeypatch):
    monkeypatch.setattr(quantize, "PACKED_FROM", {"float32": 0})
    texts = [[Text(list(range(1 + 3 * i)), seed=i) for i in range(9)] for _ in range(2)]
    for model, written in zip((model_of(), cast(model_of(), "float32")), texts, strict=True):
        decoder = Decoder(model, 9)
        decoder.add(written)
        for _ in range(30):
            decoder.step()
    assert [text.ids for text in texts[0]] == [text.ids for text in texts[1]]
