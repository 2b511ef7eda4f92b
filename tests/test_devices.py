"""Devices that this machine does not have: what would run on them, by tensors without values."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from nanogpt import optim, runtime, validation
from nanogpt.distributed import world
from nanogpt.errors import TOLD, UserError
from nanogpt.gpu import availability
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


# ----------------------------------------------------------------------------- GPUs that stay unused


@pytest.fixture
def cuda(monkeypatch):
    """Pretend that two GPUs are there; return a function that sets what torch says of them."""

    def claim(capability=(8, 0), architectures=("sm_80", "sm_90", "compute_120"), count=2):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(architectures))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", lambda setting: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
        return Machine(torch.device("cuda"), "float32", "")

    return claim


@pytest.mark.parametrize(
    ("capability", "supported"),
    [((7, 0), False), ((7, 5), False), ((8, 0), True), ((8, 6), True), ((9, 0), True), ((10, 0), False)],
)
def test_gpu_without_kernels_in_this_build_is_an_error_that_names_one(cuda, capability, supported):
    machine = cuda(capability, ("sm_80", "sm_90a"))
    if supported:
        assert availability.prepare(machine, "cuda") == []
        return
    with pytest.raises(UserError, match=r"Tesla V100 \(compute capability .* install one for an older CUDA"):
        availability.prepare(machine, "cuda")


@pytest.mark.parametrize("given", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_segments_grow_unless_the_user_has_configured_them(cuda, given, monkeypatch):
    machine, settings = cuda(), []
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", settings.append)
    for name in availability.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(given, "max_split_size_mb:64")
    availability.prepare(machine, "cuda")
    assert settings == ["expandable_segments:True"] * (given is None)


def test_ptx_runs_on_later_gpus(cuda):
    cuda((12, 0))
    assert availability.supports(0) and not availability.supports(0, ["sm_90", "compute_121"])


def test_idle_gpus_are_mentioned(cuda):
    (note,) = availability.prepare(cuda(), "auto")
    assert "1 of 2 GPUs is used; for all: torchrun --standalone --nproc_per_node=2" in note
    assert not availability.prepare(cuda(), "cuda:1") and not availability.prepare(
        cuda(), "auto", several=False
    )
    assert not availability.prepare(cuda(count=1), "auto")


def test_gpu_that_torch_cannot_use_is_explained(monkeypatch):
    monkeypatch.setattr(availability.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    cpu = Machine(torch.device("cpu"), "float32", "")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "PyTorch is a CPU-only build" in availability.prepare(cpu, "auto")[0]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver is probably too old for CUDA 13.0" in availability.prepare(cpu, "auto")[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides it" in availability.prepare(cpu, "auto")[0]
    assert availability.prepare(cpu, "cpu") == []


def test_emulated_bfloat16_is_reported_with_a_measured_factor(monkeypatch):
    monkeypatch.setattr(availability, "has_bfloat16", lambda device: False)
    (note,) = availability.prepare(Machine(torch.device("cpu"), "bfloat16", ""), "auto")
    assert re.search(r"emulates bfloat16: a matmul takes \d+\.\d times as long", note)


@pytest.mark.parametrize(
    ("visible", "count", "local", "asked", "chosen"),
    [
        (None, 4, 1, "cuda", 1),
        ("3", 1, 1, "cuda", 0),  # as Slurm does with --gpus-per-task=1
        (None, 4, 1, "cuda:0", 0),
        (None, 1, 1, "cuda", None),
        (None, 1, 2, "cuda", None),
    ],
)
def test_each_rank_uses_its_own_gpu(monkeypatch, visible, count, local, asked, chosen):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if chosen is None:
        with pytest.raises(UserError, match=r"3 processes on .*, which has 1 GPUs; start one per") as caught:
            world.use_own_gpu(torch.device(asked))
        assert (TOLD in getattr(caught.value, "__notes__", ())) is (local > count)  # only one rank prints it
        return
    assert world.use_own_gpu(torch.device(asked)) == torch.device("cuda", chosen)
    assert current == [chosen]
