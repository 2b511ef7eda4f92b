"""Devices that this machine does not have: what would run on them, by tensors without values."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from nanogpt import optim, runtime, validation
from nanogpt.inference import sampling
from nanogpt.inference.sampling import SamplingOptions
from nanogpt.model import GPT, GPTConfig
from nanogpt.options import OptimizerOptions
from nanogpt.runtime import Machine

GPU = torch.device("meta")  # computes nothing, and stands for Apple's


class NoFloat64(TorchDispatchMode):
    """Raise where float64 reaches the GPU: Apple's have none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, result)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == GPU.type:
                assert leaf.dtype != torch.float64, f"{func} uses float64 on the device"
        return result


@pytest.fixture
def gpu():
    with NoFloat64():
        yield Machine(GPU, "float32", "fake")


def test_the_check_finds_float64(gpu):
    with pytest.raises(AssertionError, match="float64 on the device"):
        torch.zeros(3, device=GPU).double()


@pytest.mark.parametrize("rules", ["adamw", "muon"])
def test_an_update_uses_no_float64(gpu, rules):
    model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=1, n_head=2, n_embd=32, position="rope"))
    model, idx = model.to(GPU), torch.zeros(2, 16, dtype=torch.long, device=GPU)
    optimizer = optim.build(OptimizerOptions(rules), model.named_parameters(), model.fused_rows())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss, norm = train.train_step(model, optimizer, scaler, [(1.0, (idx, idx))], 1e-3, 1.0)
    assert loss.device.type == norm.device.type == GPU.type


def test_an_evaluation_uses_no_float64(gpu):
    model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=1, n_head=2, n_embd=32))
    model, idx = model.to(GPU), torch.zeros(2, 16, dtype=torch.long, device=GPU)
    with pytest.raises(NotImplementedError, match="out of meta tensor"):  # where its sums come to the CPU
        validation.evaluate(model, [(idx, idx)] * 2, gpu)


def test_tokens_are_drawn_on_the_cpu_for_apple_gpus(gpu, monkeypatch):
    uniform = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="float64 on the device"):  # other GPUs draw where logits are
        sampling.draw_each(torch.zeros(2, 50, device=GPU), [SamplingOptions()] * 2, uniform)
    apple = SimpleNamespace(device=torch.device("mps"), cpu=lambda: torch.zeros(2, 50))
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device: x if device.type == "cpu" else (x, device))
    drawn, device = sampling.sample_inverse_cdf(apple, uniform)
    assert drawn.tolist() == [0, 0] and device.type == "mps"


def test_auto_takes_the_cpu_of_a_mac_and_says_how_to_get_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends, "mps", SimpleNamespace(is_available=lambda: True))
    machine = runtime.setup("auto", "auto", 16)
    assert machine.device.type == "cpu" and "--device=mps" in machine.reason
    assert runtime.find_device("mps").type == "mps"
