"""Helpers of the benchmarks: Markdown tables with machine and date for docs/results.md, and the exact loss
of a checkpoint on a whole split, used to compare runs."""

import datetime
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from nanogpt import runtime, validation
from nanogpt.checkpoint import reader
from nanogpt.data import loader
from nanogpt.model import GPT, GPTConfig


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title} ({machine()}):\n\n{markdown(header, rows)}")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def machine() -> str:
    return (
        f"{processor()}, {os.cpu_count()} cores; {platform.system()}; torch {torch.__version__}, "
        f"Python {platform.python_version()}; {datetime.date.today()}"
    )


def processor() -> str:
    """Return the CPU model name, if the system provides it."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def exact_loss(saved: Path, val: loader.Tokens, device: str = "cpu") -> float:
    """Return the mean loss over all of `val` in float32, in sequences of the model's block_size. `saved` is
    one of our checkpoint folders, or nanoGPT's ckpt.pt."""
    model = reader.verify(saved).load_model() if saved.is_dir() else load_nanogpt(saved)
    model = model.to(device)
    sequences = (len(val) - 1) // model.config.block_size
    machine = runtime.setup(device, "float32", model.config.n_embd)
    batches = loader.eval_batches(val, model.config.block_size, 64, sequences, machine.device)
    result = validation.evaluate(model, batches, machine)
    assert result
    return result.loss


def load_nanogpt(path: Path) -> GPT:
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"], activation="gelu"))
    plain = {name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()}  # compiled
    weights = {
        name.replace("transformer.", "").replace("wpe.", "position.wpe."): tensor
        for name, tensor in plain.items()
        if name != "lm_head.weight"  # tied
    }
    model.load_state_dict(weights)
    return model
