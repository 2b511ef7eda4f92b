"""Compilation counted, with a compiler that only traces (no kernels), on a CPU."""

import collections
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import bench
import train
from nanogpt import ROOT, validation
from nanogpt.config import load
from nanogpt.data import documents
from nanogpt.distributed import parallelize
from nanogpt.ngrams.embedding import NGramEmbedding
from nanogpt.options import ModelOptions
from tests import processes
from tests.conftest import small_run
from tests.processes import Job
from tests.test_train import logged

pytestmark = pytest.mark.cpu


@pytest.fixture
def counts(monkeypatch) -> collections.Counter:
    """Trace instead of compiling; count compilations, graph breaks and recompilations beyond the limit."""
    counts: collections.Counter = collections.Counter()

    def fixed(module, inputs):
        return module.forward

    def any_size(module, inputs):
        return module.forward

    real = torch.compile
    backends = {False: fixed, True: any_size}  # torch keeps graphs apart by backend
    monkeypatch.setattr(
        torch, "compile", lambda f, dynamic: real(f, backend=backends[dynamic], dynamic=dynamic)
    )
    from torch import _dynamo
    from torch._dynamo import callback

    def count(*unused):
        counts["compilations"] += 1

    _dynamo.reset()
    _dynamo.utils.counters.clear()
    callback.on_compile_start(count)
    yield counts
    callback.callback_handler.remove_start_callback(count)
    _dynamo.reset()


def breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


@pytest.fixture
def config(dataset, tmp_path):
    sizes = {"max_iters": 5, "eval_interval": 2, "eval_iters": 5, "batch_size": 6, "compile": True}
    return small_run(
        dataset, tmp_path / "out", gradient_accumulation_steps=2, **{**sizes, "dtype": "float32"}
    )


FAST = {"position": "rope", "activation": "relu2", "tied": False, "softcap": 15.0, "smear": True}
WAYS = {
    "default": ({}, 2),  # the step and the evaluation
    "fast": ({**FAST, "optimizer": "muon", "dropout": 0.1}, 2),
    "weights": ({"dtype": "bfloat16", "casting": "weights"}, 2),
    "autocast": ({"dtype": "bfloat16", "casting": "autocast"}, 2),
    "recompute": ({"activation_checkpointing": True}, 2),
    "blocks": ({"compile": "blocks"}, 2),  # one for all blocks
    "documents": ({"documents": "masked"}, 2),
    "ramp": ({"batch_ramp_tokens": 900, "gradient_accumulation_steps": 1, "max_iters": 12}, 3),
}


@pytest.mark.parametrize(("changes", "most"), WAYS.values(), ids=WAYS)
def test_a_run_compiles_the_step_and_the_evaluation_once(config, changes, most, counts, monkeypatch):
    monkeypatch.setattr(documents, "separator", lambda *unused: 0)
    config = replace(config, **changes)
    train.main(replace(config, compile=False))
    plain = logged(config.out_dir), logged(config.out_dir, "eval")
    counts.clear()
    train.main(replace(config, overwrite=True))
    assert counts["compilations"] == most and not breaks()
    for expected, event in zip(plain, ("step", "eval"), strict=True):
        found = logged(config.out_dir, event)
        assert found.keys() == expected.keys()
        for number, row in found.items():
            assert row == pytest.approx(expected[number], rel=0.02 if "dtype" in changes else 1e-4)


def test_failed_compilation_leaves_no_gradients(config, monkeypatch, capsys):
    """The forward pass compiles, the backward pass does not: the run is as without compilation."""
    train.main(replace(config, compile=False))
    plain = logged(config.out_dir)

    def broken(function, **unused):
        def call(*inputs):
            for p in trained:
                p.grad = torch.ones_like(p)  # as after a part of the backward pass
            raise RuntimeError("no compiler found")

        return call

    trained = []
    monkeypatch.setattr(torch, "compile", broken)
    build = train.make_optimizer
    monkeypatch.setattr(
        train, "make_optimizer", lambda *given: (made := build(*given), trained.extend(made.parameters))[0]
    )
    train.main(replace(config, overwrite=True))
    assert "torch.compile failed (no compiler found); running without it" in capsys.readouterr().out
    assert logged(config.out_dir) == plain


# ----------------------------------------------------------------------------- several processes


def trace_in_small_buckets() -> None:
    """Trace instead of compiling, print a line per graph; let DDP send gradients in parts of 10 kB."""
    graphs, real = [], torch.compile

    def fixed(module, inputs):
        print("graph", len(graphs), flush=True)
        graphs.append(module)
        return module.forward

    def any_size(module, inputs):
        return module.forward

    backends = {False: fixed, True: any_size}
    torch.compile = lambda f, dynamic: real(f, backend=backends[dynamic], dynamic=dynamic)
    small = partial(DistributedDataParallel, bucket_cap_mb=0.01)
    parallelize.DistributedDataParallel = small
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 1000


def test_ddp_sends_gradients_during_the_compiled_backward_pass(dataset, tmp_path):
    """Only a graph that is compiled inside DDP's forward pass is split, one part per bucket of gradients."""
    given = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--device=cpu", "--max_iters=3"]
    given += ["--batch_size=4", "--gradient_accumulation_steps=4", "--eval_iters=1", "--dtype=float32"]
    given += [f"--dataset={dataset}", "--parallel=ddp"]
    ways = {"plain": ["--compile=False"], "compiled": ["--compile=True"]}
    ways["recompute"] = ["--compile=True", "--activation_checkpointing=True"]
    prepare = "tests.test_compile:trace_in_small_buckets"
    processes.run(tmp_path, [Job(n, 2, [*given, *options], prepare=prepare) for n, options in ways.items()])
    graphs = {name: processes.said(tmp_path, name).count("graph ") for name in ways}
    assert graphs["plain"] == 0 and min(graphs["compiled"], graphs["recompute"]) > 3  # two if not split
    expected = logged(tmp_path / "plain")
    for name in ("compiled", "recompute"):
        assert "torch.compile failed" not in processes.said(tmp_path, name)
        losses = logged(tmp_path / name)
        assert losses.keys() == expected.keys()
        assert all(losses[i] == pytest.approx(expected[i], rel=1e-4) for i in expected)


# ----------------------------------------------------------------------------- presets


SMALL = "--n_layer=2 --n_embd=64 --n_head=2 --block_size=32 --batch_size=2 --device=cpu --dtype=bfloat16 "
SMALL += "--gradient_accumulation_steps=2 --compile=True --real_data=False --vocab_size=50"


def alike() -> dict[str, Path]:
    """Return the presets of training, shrunk, by the names of those that compute the same."""
    names: dict[Any, list[Path]] = {}
    for path in sorted((ROOT / "config").glob("[!e]*.py")):
        config, _ = load(bench.Config, [str(path), *SMALL.split()])
        key = [getattr(config, field.name) for field in fields(ModelOptions)]
        key += [config.activation_checkpointing, config.casting, config.documents, config.loss_chunk_size]
        names.setdefault(tuple(key), []).append(path)
    return {" ".join(path.stem for path in paths): paths[0] for paths in names.values()}


@pytest.mark.parametrize("preset", alike().values(), ids=alike())
def test_every_preset_compiles_once_without_graph_breaks(preset, counts, tmp_path, monkeypatch):
    """With 2 layers of 64 channels; the second graph is that of evaluations."""
    monkeypatch.setattr(NGramEmbedding, "sparse", False)  # as on a GPU
    config, origins = load(bench.Config, [str(preset), *SMALL.split()])
    steps = bench.Bench(config, tmp_path, origins)
    for _ in range(2):
        steps.step()
    run = steps.run
    validation.evaluate_splits(run.model, run.dataset, (2, 32), 3, run.machine, lambda: False)
    assert counts["compilations"] == 2 and not breaks()
