"""Quantized and packed weights: accuracy of products, and effect on the model."""

import pytest
import torch
from torch.nn import functional as F

from nanogpt.inference import cpu_kernels
from nanogpt.inference.engine import Engine, Text
from nanogpt.inference.quantize import FEW, Int8Portable, Packed, PackedInt8, cast, rounded
from nanogpt.model import GPT, GPTConfig
from nanogpt.runtime import DTYPES

KINDS = [Int8Portable, *([PackedInt8] if cpu_kernels.library() else [])]
compiled = pytest.mark.skipif(
    cpu_kernels.library() is None, reason=f"cpu_kernels.cpp: {cpu_kernels.why_not()}"
)
SHAPES = [(96, 64), (50, 32), (7, 24), (33, 200)]  # row counts divisible by the group size, and not


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_rounded_per_row(shape):
    weight = torch.randn(shape) * torch.logspace(-3, 2, shape[0])[:, None]
    whole, step = rounded(weight)
    assert whole.dtype == torch.int8 and whole.abs().amax(dim=1).tolist() == [127] * len(weight)
    assert ((whole.double() * step.double()[:, None] - weight).abs() <= 0.501 * step.double()[:, None]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, FEW, FEW + 1, 40])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_equals_that_of_the_rounded_weights(kind, rows, shape):
    torch.manual_seed(0)
    weight, bias = torch.randn(shape) * torch.logspace(-3, 2, shape[0])[:, None], torch.randn(shape[0])
    whole, step = rounded(weight)
    restored = whole.double() * step.double()[:, None]
    # two 7-bit digits per activation, or bfloat16 throughout
    dtype, bits = (torch.bfloat16, 7) if kind is Int8Portable else (torch.float32, 14)
    x = (torch.randn(1, rows, shape[1]) * torch.logspace(-4, 3, rows)[:, None]).to(dtype)
    x[0, 0, 3] = 30 * x[0, 0].abs().max()  # an activation outlier, as in trained models
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


@compiled
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_finite_are_not_hidden(value):
    x = torch.randn(3, 32)
    x[1, 5] = value
    found = PackedInt8(torch.randn(40, 32))(x)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


@compiled
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 384)])
def test_packed_product_equals_linear(dtype, rows, shape):
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(*size).to(dtype) for size in (shape, shape[:1], (2, rows, shape[1])))
    for given in (bias, None):
        exact = F.linear(x.double(), weight.double(), None if given is None else bias.double())
        bound = 2e-6 * shape[1] ** 0.5 if dtype == torch.float32 else 2**-8
        found = Packed(weight, given)(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, atol=bound, rtol=bound)
    assert Packed(weight)(x[0]).shape == (rows, shape[0])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_row_result_is_independent_of_batch_and_thread_count(dtype):
    torch.manual_seed(0)
    kind, type_ = (PackedInt8, torch.float32) if dtype == torch.int8 else (Packed, dtype)
    product = kind(torch.randn(300, 512).to(type_), torch.randn(300).to(type_))
    x = torch.randn(40, 512).to(type_)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = product(x)
        torch.set_num_threads(1)
        assert torch.equal(product(x), together)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(product(x[i:j]), together[i:j]) for i in range(40) for j in (i + 1, i + 3, i + 20))


@compiled
def test_non_contiguous_and_empty_inputs():
    product, x = Packed(torch.randn(64, 32)), torch.randn(5, 7, 64)[:, ::2, ::2]
    assert torch.equal(product(x), product(x.clone(memory_format=torch.contiguous_format)))
    assert product(x[:0]).shape == (0, 4, 64)


def model_of(**changes) -> GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "vocab_multiple": 64, "block_size": 16, "n_layer": 2, "n_head": 2}
    model = GPT(GPTConfig(**{**sizes, "n_embd": 32, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    return model


@pytest.mark.parametrize("switches", [{}, {"tied": False, "position": "rope", "smear": True, "softcap": 9.0}])
def test_int8_model_is_close_to_float32(switches):
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
    decoder = Engine(model, 2)
    texts = [Text([1, 2, 3]), Text([4])]
    decoder.add(texts)
    for _ in range(40):
        decoder.step()
    assert all(len(text.new) == 40 and max(text.new) < 61 for text in texts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compiler", [True, False])
def test_other_formats_are_cast_and_packed(dtype, compiler, monkeypatch):
    if not compiler:
        monkeypatch.setattr(cpu_kernels, "library", lambda: None)
    idx = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(1))
    exact = model_of(position="rope", tied=False)(idx)[0]
    model = cast(model_of(position="rope", tied=False), dtype)
    packed = compiler and dtype != "float16" and cpu_kernels.library()
    assert any(isinstance(module, Packed) for module in model.modules()) == bool(packed)
    assert {p.dtype for p in model.parameters()} == {DTYPES[dtype]}
    error = (model(idx)[0] - exact).abs().max() / exact.std()
    assert error < {"float32": 1e-5, "bfloat16": 0.2, "float16": 0.02}[dtype]
    decoder = Engine(model, 1)
    decoder.add([Text([1] * 40)])
    assert len(decoder.step()) == 1


def test_model_with_odd_widths_is_not_packed():
    for dtype in ("float32", "int8"):
        model = cast(model_of(n_embd=34), dtype)
        assert not any(isinstance(module, Packed) for module in model.modules())
        assert model(torch.tensor([[1, 2]]))[0].isfinite().all()


def test_packed_model_generates_the_same_text():
    texts = [[Text(list(range(1 + 3 * i)), seed=i) for i in range(9)] for _ in range(2)]
    for model, written in zip((model_of(), cast(model_of(), "float32")), texts, strict=True):
        decoder = Engine(model, 9)
        decoder.add(written)
        for _ in range(30):
            decoder.step()
    assert [text.ids for text in texts[0]] == [text.ids for text in texts[1]]


def test_packed_weights_refuse_inputs_on_another_device():
    """After model.to("cuda"), packed weights, which are not buffers, stay on the CPU."""
    layer = Packed(torch.randn(8, 16))
    with pytest.raises(AssertionError, match=r"on a CPU, got torch.float32, meta"):
        layer(torch.zeros(1, 16, device="meta"))
