"""The loss whose logits are made some rows at a time is the plain one, in value, gradients, less memory."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from nanogpt import data, steps
from nanogpt.loss import in_rows, project
from nanogpt.model import GPT, IGNORE, GPTConfig
from nanogpt.runtime import Machine

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
def test_equals_the_plain_loss(rows, cap, monkeypatch):
    for whole in (False, True):  # a GPU multiplies the padding too
        monkeypatch.setattr("nanogpt.loss.multiplies_padding", lambda device, whole=whole: whole)
        x, table, targets = inputs()
        expected = plain(x, table, targets, cap)
        gradients = torch.autograd.grad(3 * expected, (x, table))
        found = in_rows(x, table, targets, rows, V, cap, IGNORE)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        for a, b in zip(torch.autograd.grad(3 * found, (x, table)), gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.cpu
def test_in_bfloat16_it_is_as_near_to_the_truth_as_the_plain_one():
    x, table, targets = inputs()
    expected = plain(x, table, targets, 3.0)
    exact = torch.autograd.grad(expected, (x, table))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = plain(x, table, targets, 3.0)
        found = in_rows(x, table, targets, 8, V, 3.0, IGNORE)
    assert float(found) == pytest.approx(float(rough), abs=1e-3)
    theirs, ours = torch.autograd.grad(rough, (x, table)), torch.autograd.grad(found, (x, table))
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - truth).norm() <= 1.2 * (b - truth).norm()


def test_the_padding_may_be_multiplied_and_then_cut_off():
    x, table, _ = inputs()
    whole, cut = project(x, table, V, whole=True), project(x, table, V, whole=False)
    torch.testing.assert_close(whole, cut, rtol=1e-6, atol=1e-6)
    seed = torch.randn(N, V)
    for a, b in zip(
        torch.autograd.grad(whole, (x, table), seed), torch.autograd.grad(cut, (x, table), seed), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.autograd.grad(project(x, table, V, whole=True).sum(), table)[0][V:].any()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_trains_on_it_as_on_the_other(tied, dtype, device):
    shape = GPTConfig(vocab_size=V, block_size=8, n_layer=1, n_head=2, n_embd=C, vocab_multiple=64, tied=tied)
    torch.manual_seed(0)
    model = GPT(shape)
    machine = Machine(device, dtype, "test")
    idx, targets = torch.randint(V, (2, 3, 8))
    gradients, losses = [], []
    for rows in (0, 5):
        model.loss_rows = rows
        loss = machine.in_dtype(model)(idx, targets)[1]
        losses.append(float(loss))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert losses[1] == pytest.approx(losses[0], abs=1e-6 if dtype == "float32" else 1e-3)
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 0.05, "atol": 2e-3}
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **near)


def test_evaluation_is_the_same_in_parts(dataset, device):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=10, block_size=16, n_layer=1, n_head=2, n_embd=C))
    machine, tokens = Machine(device, "float32", "test"), data.load(dataset).val
    found = []
    for rows in (0, 1, 40):
        model.loss_rows = rows
        batches = data.eval_batches(tokens, 16, 7, 10**9, machine.device)
        found.append(steps.evaluate(model, batches, machine))
    assert found[0].tokens == found[1].tokens == found[2].tokens
    assert found[1].loss == pytest.approx(found[0].loss, abs=1e-6) == found[2].loss


MEMORY = """
import sys, torch
from nanogpt.model import GPT, GPTConfig
torch.set_num_threads(1)
model = GPT(GPTConfig(vocab_size=20000, block_size=256, n_layer=1, n_head=2, n_embd=32))
model.loss_rows = int(sys.argv[1])
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
def test_it_takes_a_fraction_of_the_memory():
    """2,048 tokens x 20,000 ids: 164 MB of float32 logits, which the plain loss holds three times.

    In pieces it takes 35 to 52 MB, by how the allocator lays them."""
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", MEMORY, rows], capture_output=True, text=True, check=True
            ).stdout
        )
        for rows in ("0", "128")
    ]
    assert peaks[0] > 300_000 and peaks[1] < peaks[0] / 4
