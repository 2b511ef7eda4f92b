"""Devices that this machine does not have: what would run on them, by tensors without values."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchgen
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanogpt import optim, runtime, validation
from nanogpt.distributed import world
from nanogpt.errors import TOLD, UserError
from nanogpt.gpu import availability
from nanogpt.inference import sampling
from nanogpt.inference.sampling import SamplingOptions
from nanogpt.model import GPT, GPTConfig
from nanogpt.options import OptimizerOptions
from nanogpt.runtime import Machine
from tests.conftest import update

GPU = torch.device("meta")  # computes nothing, and stands for Apple's


class AppleGpu(TorchDispatchMode):
    """Raise where float64 or an operator without a kernel for Apple GPUs reaches the GPU."""

    def __init__(self, missing: set[str]):
        super().__init__()
        self.missing, self.called = missing, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == GPU.type:
                assert leaf.dtype != torch.float64, f"{func} uses float64 on the device"
                name = str(func).removeprefix("aten.").removesuffix(".default")
                self.called.add(name)
                assert name not in self.missing, f"{func} has no kernel for Apple GPUs"
        return result


@pytest.fixture(scope="module")
def missing() -> set[str]:
    """The operators without a kernel for Apple GPUs, by torch's own list."""
    listing = Path(torchgen.__file__).with_name("packaged") / "ATen" / "native" / "native_functions.yaml"
    operators = yaml.load(listing.read_text(encoding="utf-8"), yaml.CSafeLoader)
    kernels = {op["func"].partition("(")[0]: op for op in operators}

    def runs(op):
        op = kernels[op["structured_delegate"]] if "structured_delegate" in op else op
        keys = ",".join(op.get("dispatch", {"CompositeImplicitAutograd": ""}))
        return "MPS" in keys or "Composite" in keys

    return {name for name, op in kernels.items() if not runs(op)}


@pytest.fixture
def gpu(missing):
    with AppleGpu(missing) as mode:
        yield Machine(GPU, "float32", "fake", casting="weights")
    assert len(mode.called) > 1


def test_the_check_knows_torchs_operators(missing):
    assert {"_linalg_eigh", "_linalg_svd", "geqrf"} <= missing
    assert not missing & {"mm", "bmm", "add.Tensor", "_softmax", "_fused_adamw_", "native_layer_norm"}


def test_the_check_finds_float64(gpu):
    with pytest.raises(AssertionError, match="float64 on the device"):
        torch.zeros(3, device=GPU).double()


def test_the_check_finds_operators_without_a_kernel(gpu):
    torch.zeros(3, 3, device=GPU) + 1
    with pytest.raises(AssertionError, match=r"_linalg_eigh.* has no kernel for Apple GPUs"):
        torch.linalg.eigh(torch.zeros(3, 3, device=GPU))


FAST = {"position": "rope", "activation": "relu2", "tied": False, "softcap": 15.0, "smear": True}
SHAPES = {
    "gpt2": {"bias": True},
    "fast": {**FAST, "norm": "rms", "qk_norm": True, "dropout": 0.1},
    "alibi": {"position": "alibi", "activation": "swiglu", "n_kv_head": 1},
    "tables": {"ngram_orders": "2,3", "ngram_rows": 100},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("rules", "dtype"), [("adamw", "float32"), ("muon", "float32"), ("muon", "bfloat16")]
)
def test_a_step_runs_on_apple_gpus(gpu, shape, rules, dtype, monkeypatch):
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *lists, **rates: None)  # has none for this device
    machine = replace(gpu, dtype=dtype)
    model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=32, **shape)).to(GPU)
    config = OptimizerOptions(rules, muon_weight_decay=0.1)
    optimizer = optim.build(config, model.named_parameters(), model.part_heights(), machine.half)
    idx = torch.zeros(2, 16, dtype=torch.long, device=GPU)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss, norm = update(model, optimizer, machine, scaler, [(idx, idx)] * 2)
    assert loss.device == norm.device == GPU


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
