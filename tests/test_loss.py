"""Chunked cross-entropy equals the plain loss in value and gradients, in less memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nanogpt import validation
from nanogpt.chunked_loss import chunked_cross_entropy
from nanogpt.data import loader
from nanogpt.loss import LOGITS_AT_ONCE, compute_logits, default_loss_chunk_size
from nanogpt.model import GPT, IGNORE, GPTConfig
from nanogpt.runtime import Machine
from tests import launch

ROOT = Path(__file__).resolve().parent.parent
N, C, V, P = 37, 16, 50, 64


def plain(x, table, targets, cap):
    logits = F.linear(x, table[:V]).float()
    logits = cap * torch.tanh(logits / cap) if cap else logits
    return F.cross_entropy(logits, targets, ignore_index=IGNORE)


def inputs(dtype=torch.float32, ignored=5):
    torch.manual_seed(0)
    x = torch.randn(N, C).to(dtype).requires_grad_()
    table = torch.randn(P, C).requires_grad_()
    targets = torch.randint(V, (N,))
    targets[:ignored] = IGNORE
    return x, table, targets


@pytest.mark.parametrize("rows", [1, 8, 36, 37, 1000])
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_chunked_loss_equals_the_plain_loss(rows, cap, monkeypatch):
    for whole in (False, True):  # True: as on GPUs, padding included in the matmul
        monkeypatch.setattr("nanogpt.loss.computes_padding_logits", lambda device, whole=whole: whole)
        x, table, targets = inputs()
        expected = plain(x, table, targets, cap)
        gradients = torch.autograd.grad(3 * expected, (x, table))
        found = chunked_cross_entropy(x, table, targets, rows, V, cap)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        for a, b in zip(torch.autograd.grad(3 * found, (x, table)), gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.cpu
def test_bfloat16_error_is_at_most_that_of_the_plain_loss():
    x, table, targets = inputs()
    expected = plain(x, table, targets, 3.0)
    exact = torch.autograd.grad(expected, (x, table))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = plain(x, table, targets, 3.0)
        found = chunked_cross_entropy(x, table, targets, 8, V, 3.0)
    assert found.item() == pytest.approx(rough.item(), abs=1e-3)
    theirs, ours = torch.autograd.grad(rough, (x, table)), torch.autograd.grad(found, (x, table))
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - truth).norm() <= 1.2 * (b - truth).norm()


def test_padding_may_be_multiplied_and_cropped():
    x, table, _ = inputs()
    whole, cut = compute_logits(x, table, V, whole=True), compute_logits(x, table, V, whole=False)
    torch.testing.assert_close(whole, cut, rtol=1e-6, atol=1e-6)
    seed = torch.randn(N, V)
    for a, b in zip(
        torch.autograd.grad(whole, (x, table), seed), torch.autograd.grad(cut, (x, table), seed), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.autograd.grad(compute_logits(x, table, V, whole=True).sum(), table)[0][V:].any()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_trains_equally_with_chunked_and_plain_loss(tied, dtype, device):
    shape = GPTConfig(vocab_size=V, block_size=8, n_layer=1, n_head=2, n_embd=C, vocab_multiple=64, tied=tied)
    torch.manual_seed(0)
    model = GPT(shape)
    machine = Machine(device, dtype, "test")
    idx, targets = torch.randint(V, (2, 3, 8))
    gradients, losses = [], []
    for rows in (0, 5):
        model.loss_chunk_size = rows
        loss = machine.in_dtype(model)(idx, targets)[1]
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert losses[1] == pytest.approx(losses[0], abs=1e-6 if dtype == "float32" else 1e-3)
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 0.05, "atol": 2e-3}
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **near)


def test_chunked_evaluation_equals_plain_evaluation(dataset, device, monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=10, block_size=16, n_layer=1, n_head=2, n_embd=C))
    machine, tokens = Machine(device, "float32", "test"), loader.load(dataset).val
    found = []
    for rows in (10**6, 1, 40):
        monkeypatch.setitem(LOGITS_AT_ONCE, device.type, 10 * rows)
        batches = loader.eval_batches(tokens, 16, 7, 10**9, machine.device)
        found.append(validation.evaluate(model, batches, machine))
    assert found[0].tokens == found[1].tokens == found[2].tokens
    assert found[1].loss == pytest.approx(found[0].loss, abs=1e-6) == found[2].loss


@pytest.mark.cpu
def test_compiler_does_not_merge_the_chunks():
    """Traced into one graph, all chunks would have their logits in memory at once."""
    model = GPT(GPTConfig(vocab_size=V, block_size=8, n_layer=1, n_head=2, n_embd=C))
    model.loss_chunk_size = 5
    seen = []

    def backend(graph, inputs):
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        seen.extend(node.target for part in parts for node in part.graph.nodes)
        return graph

    idx = torch.randint(V, (3, 8))
    found = torch.compile(model, backend=backend)(idx, idx)[1]
    assert float(found.detach()) == float(model(idx, idx)[1].detach())
    assert seen and not any("softmax" in str(target) for target in seen)


MEMORY = """
import sys, torch
from nanogpt.model import GPT, GPTConfig
torch.set_num_threads(1)
model = GPT(GPTConfig(vocab_size=20000, block_size=256, n_layer=1, n_head=2, n_embd=32))
model.loss_chunk_size = int(sys.argv[1])
idx = torch.randint(20000, (8, 256))
def peak():  # in kilobytes; not ru_maxrss, which begins with that of the program that started this one
    lines = open("/proc/self/status", encoding="ascii").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
model(idx[:1, :8], idx[:1, :8])[1].backward()  # first, so that the libraries' own pages are not counted
before = peak()
model(idx, idx)[1].backward()
print(peak() - before)
"""


@pytest.mark.cpu
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_chunked_loss_takes_a_fraction_of_the_memory():
    """2,048 tokens x 20,000 ids: 164 MB of float32 logits, of which the plain loss holds three copies.

    In chunks it takes 35 to 52 MB, depending on the allocator."""
    peaks = [int(launch.run(["-c", MEMORY, rows]).stdout) for rows in ("0", "128")]
    assert peaks[0] > 300_000 and peaks[1] < peaks[0] / 4


def test_cpu_chunk_size_is_chosen_for_large_logits():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (
        default_loss_chunk_size(cpu, 20 * 64, 65) == default_loss_chunk_size(cpu, 16 * 256, 65) == 0
    )  # the character-level presets
    assert default_loss_chunk_size(gpu, 8 * 256, 50257) == 0
    assert 4 * 50257 * default_loss_chunk_size(cpu, 8 * 256, 50257) == pytest.approx(256e6, rel=0.1)


# On Linux peak memory includes the parent's at fork, so a small process starts the program.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)  # kilobytes
"""


@pytest.mark.cpu
@pytest.mark.skipif(sys.platform != "linux", reason="memory accounting of Linux")
def test_large_vocabulary_takes_little_memory(bare_tokens, tmp_path):
    """Three evaluations and two updates with GPT-2's vocabulary: 0.41 GB of logits per micro-batch, which
    took 2.8 GB without chunks, and more with the larger batches of evaluation."""
    np.random.default_rng(0).integers(0, 50257, 20000).astype("<u2").tofile(bare_tokens / "train.bin")
    np.random.default_rng(1).integers(0, 50257, 20000).astype("<u2").tofile(bare_tokens / "val.bin")
    options = {"n_layer": 1, "n_head": 1, "n_embd": 32, "block_size": 256, "batch_size": 8}
    options |= {"gradient_accumulation_steps": 1, "eval_iters": 3, "eval_interval": 1, "max_iters": 2}
    options |= {"warmup_iters": 1, "device": "cpu", "dataset": bare_tokens, "out_dir": tmp_path / "out"}
    command = [sys.executable, "train.py", *(f"--{key}={value}" for key, value in options.items())]
    result = subprocess.run([sys.executable, "-c", PEAK, *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 1_300_000  # typically 0.8 GB
