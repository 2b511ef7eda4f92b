"""Shared fixtures: external test data, and a dataset small enough to train on."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import train
from nanogpt.errors import UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.prepare import encode, readers
from nanogpt.prepare.text_files import Texts
from nanogpt.tokenizer import bpe, tokenizer, vocabulary
from nanogpt.tokenizer.gpt2 import GPT2Tokenizer
from tests.texts import python_sources

# The models are so small that a second thread costs more in synchronization than it saves.
ALL_THREADS = torch.get_num_threads()
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for programs started by tests


# ----------------------------------------------------------------------------- pytest --device=cuda

# Tests of computation: with --device other than cpu, only these files run.
ON_DEVICE = {"test_model", "test_loss", "test_optim", "test_steps", "test_attention_kernels", "test_generate"}
ON_DEVICE |= {"test_cuda_graphs", "test_train", "test_checkpoint_writer", "test_gpu"}


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device for the tests of computation: cpu, cuda, cuda:1")


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu: CPU-specific; deselected with --device=cuda")
    config.addinivalue_line("markers", "cuda: needs a GPU; skipped without --device=cuda")
    device = torch.device(config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device={device}: PyTorch finds no CUDA GPU")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for deterministic cuBLAS


# Files that take longest run first (with --no-loadscope-reorder), so that none runs alone at the end.
SLOW = {"test_parallelize", "test_commands", "test_world", "test_kill", "test_compile", "test_train"}
SLOW |= {"test_model", "test_fuzz", "test_health", "test_cpu_kernels", "test_prepare_web", "test_race"}


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cpu":
        items.sort(key=lambda item: item.path.stem not in SLOW)
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU: pytest --device=cuda"))
        return
    kept = [i for i in items if i.path.stem in ON_DEVICE and "cpu" not in i.keywords]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


class OnDevice(TorchFunctionMode):
    """Create tensors on `device` by default. As torch.set_default_device, except for random tensors with a
    `generator` (a CPU one) and for torch.asarray (safetensors sets its device)."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        makes = func in _device_constructors() and func is not torch.asarray
        if makes and kwargs.get("device") is None and not kwargs.get("generator"):
            kwargs["device"] = self.device
        return func(*args, **kwargs)


@pytest.fixture
def device(pytestconfig) -> torch.device:
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(autouse=True)
def everything_on_the_device(pytestconfig, monkeypatch):
    """Run tests that name no device on --device, in full float32 precision (no TF32)."""
    device = torch.device(pytestconfig.getoption("--device"))
    if device.type == "cpu":
        yield
        return
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)  # keeps TF32 off
    init = GPT.__init__

    def init_there(self: GPT, config: GPTConfig) -> None:
        init(self, config)
        if not self.wte.weight.is_meta:
            self.position.to(device)  # tables are always computed on the CPU

    monkeypatch.setattr(GPT, "__init__", init_there)
    with OnDevice(device):
        yield


@pytest.fixture
def all_threads():
    """Use the default thread count, for tests that summation order must not depend on it."""
    torch.set_num_threads(ALL_THREADS)
    yield
    torch.set_num_threads(1)


def found(name: str) -> Path | None:
    """Return the path of `name` in the folder NANOGPT_TEST_DATA, or None if it does not exist."""
    folder = os.environ.get("NANOGPT_TEST_DATA", "")
    path = Path(folder, name).resolve()
    return path if folder and path.exists() else None


@pytest.fixture(scope="session")
def real() -> Callable[[str], Path]:
    """`found`, but skip the test if the file does not exist."""

    def find(name: str) -> Path:
        path = found(name)
        if path is None:
            pytest.skip(f"needs {name}: set NANOGPT_TEST_DATA (see CONTRIBUTING.md)")
        return path

    return find


@pytest.fixture(scope="session")
def trained_bpe() -> str:
    """The tokenizer.json of a byte-level BPE of 1,000 tokens, trained on Python's standard library."""
    text = python_sources(300_000)
    return bpe.train((text[i : i + 2000] for i in range(0, len(text), 2000)), 1000)


@pytest.fixture(scope="session")
def own_merges(trained_bpe: str) -> str:
    """The merges of `trained_bpe` in the format of vocab.bpe."""
    pairs = json.loads(trained_bpe)["model"]["merges"]
    return "\n".join(["#version: 0.2", *(" ".join(pair) for pair in pairs), ""])


@pytest.fixture(params=["own merges", "gpt2"])
def merges(request, own_merges, real, tmp_path, monkeypatch) -> Path:
    """A vocab.bpe: one patched to be accepted as GPT-2's in this process, and GPT-2's own."""
    if request.param == "gpt2":
        return real("gpt2/vocab.bpe")
    monkeypatch.setattr(vocabulary, "GPT2_SHA256", hashlib.sha256(own_merges.encode()).hexdigest())
    monkeypatch.setattr(vocabulary, "GPT2_VOCAB_SIZE", GPT2Tokenizer(own_merges).vocab_size)
    path = tmp_path / "own.bpe"
    path.write_bytes(own_merges.encode())
    return path


@pytest.fixture
def of_kind(real: Callable[[str], Path]) -> Callable[[str], dict[str, Any]]:
    """Return the options of corpus.prepare for a kind of tokens, including GPT-2's."""
    return lambda kind: {"kind": kind, "gpt2_bpe": str(real("gpt2/vocab.bpe")) if kind == "gpt2" else ""}


def write_dataset(folder: Path, text: str, val_fraction: float = 0.1) -> Path:
    """Write a character-level dataset folder as data/prepare.py does."""
    folder.mkdir(parents=True, exist_ok=True)
    chars = tokenizer.CharTokenizer(sorted(set(text)))
    cut = int(len(text) * (1 - val_fraction))
    splits = {}
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        ids = chars.encode(part).astype("<u2")
        ids.tofile(folder / f"{split}.bin")
        digest = hashlib.sha256(ids.tobytes()).hexdigest()
        splits[split] = {
            "tokens": len(ids),
            "text_bytes": len(part.encode()),
            "files": [{"name": f"{split}.bin", "tokens": len(ids), "sha256": digest}],
        }
    meta = {
        "format": "nanogpt-data-1",
        "dtype": "uint16",
        "vocab_size": chars.vocab_size,
        "tokenizer": {"type": "char", "sha256": tokenizer.fingerprint(chars)},
        "splits": splits,
    }
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer.to_text(chars), encoding="utf-8")
    return folder


def documents(texts: Texts, text_key: str = "text") -> list[str]:
    """Return the complete documents of `texts`. Raise UserError for an invalid row."""
    found = texts.sources
    encode.start_counting(encode.Job("", tuple(found), encode.Split(0.1), several=True, text_key=text_key))
    whole: list[str] = []
    for piece in readers.pieces(found, readers.Reading(text_key)):
        result = encode.Encoded()
        for body, offset, _ in encode.bodies(piece, result):
            if offset:
                whole[-1] += body
            else:
                whole.append(body)
        for row in result.bad:
            raise UserError(f"{found[piece.source].path}, line {row.number} {row.reason}")
    return whole


def words(count: int, seed: int = 0) -> str:
    """Return learnable text: `count` words of a small artificial language, six per line."""
    draw = random.Random(seed)
    known = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 5))) for _ in range(12)]
    pick_fields = draw.choices(known, weights=range(1, 13), k=count)
    return "\n".join(" ".join(pick_fields[i : i + 6]) for i in range(0, count, 6)) + "\n"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset of about 8,000 characters with an alphabet of 10."""
    return write_dataset(tmp_path / "dataset", words(1800))


def update(
    model,
    optimizer,
    machine,
    scaler,
    batches,
    *,
    function=None,
    iter_num=0,
    lr=1e-3,
    grad_clip=1.0,
    take=None,
):
    """Run one step of train.py on `batches` (idx, targets, ...), weighted by their rows; return the loss and
    the gradient norm. `function`: forward function; default: the model in its compute dtype."""
    batches = list(batches)
    rows = sum(len(batch[0]) for batch in batches)
    machine.seed(1, iter_num)
    weighted = [(len(batch[0]) / rows, batch) for batch in batches]
    function = function or machine.in_dtype(model)
    return (take or train.train_step)(function, optimizer, scaler, weighted, lr, grad_clip)


def small_run(dataset: Path, out: Path, **options: Any) -> train.Config:
    """Return a config that trains in seconds: 2 layers, 32 channels, context of 16 characters."""
    small: dict[str, Any] = {
        "device": "cpu",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 16,
        "gradient_accumulation_steps": 1,
        "warmup_iters": 5,
        "learning_rate": 1e-3,
        "min_lr": 1e-4,
    }
    return train.Config(out_dir=str(out), dataset=str(dataset), **small | options)


def train_until_it_knows(folder: Path, max_iters: int) -> train.Config:
    """Train on a new dataset in `folder` until samples are its words; saves at least two checkpoints."""
    dataset = write_dataset(folder / "dataset", words(1800))
    rates = {"learning_rate": 1e-2, "min_lr": 1e-3}
    config = small_run(dataset, folder / "out", max_iters=max_iters, eval_interval=100, **rates)
    train.main(config)
    return config


@pytest.fixture
def bare_tokens(tmp_path: Path) -> Path:
    """A GPT-2 dataset folder as nanoGPT writes it: train.bin and val.bin only."""
    folder = tmp_path / "bare"
    folder.mkdir()
    ids = np.random.default_rng(0).integers(0, 50257, 3000).astype("<u2")
    ids[:2500].tofile(folder / "train.bin")
    ids[2500:].tofile(folder / "val.bin")
    return folder
