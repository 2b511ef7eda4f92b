"""GPU-only tests: CUDA graph capture, kernels, real out-of-memory errors, and absence of synchronization.

    python -m pytest --device=cuda

runs these tests on a GPU, and those of model, loss, optimizer, step, generation and training (conftest.py).
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import sample
import train
from nanogpt import checkpoint, compile, optim, runtime
from nanogpt.checkpoint import reader
from nanogpt.checkpoint.writer import AsyncCheckpointer
from nanogpt.config import pick_fields
from nanogpt.data import loader
from nanogpt.errors import Stopped, UserError
from nanogpt.gpu import attention_kernels, auto_batch_size, cuda_graphs
from nanogpt.inference import graph_decode
from nanogpt.inference.engine import Engine, Text
from nanogpt.inference.sampling import SamplingOptions
from nanogpt.model import GPT, GPTConfig
from nanogpt.options import OptimizerOptions
from tests.conftest import update
from tests.test_train import bits, logged

pytestmark = pytest.mark.cuda
SHAPE = GPTConfig(vocab_size=50, block_size=64, n_layer=2, n_head=2, n_embd=64, vocab_multiple=64)
FAST = {"position": "rope", "activation": "relu2", "tied": False, "softcap": 15.0, "smear": True}


def parts(device, dtype="bfloat16", rules="muon", casting="auto", **changes):
    torch.manual_seed(0)
    model = GPT(replace(SHAPE, **changes)).to(device)
    machine = replace(runtime.setup(str(device), dtype, 64), casting=casting)
    config = OptimizerOptions(rules, learning_rate=1e-2, muon_weight_decay=0.1)
    optimizer = optim.build(config, model.named_parameters(), model.part_heights(), machine.half)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == "float16")
    return model, optimizer, machine, scaler


def updates(everything, count, take=None, lr=1e-2):
    model, optimizer, machine, scaler = everything
    found = []
    function = compile.without_logits(machine.in_dtype(model))
    for i in range(count):
        draw = torch.Generator().manual_seed(i % 3)
        idx = torch.randint(50, (8, 65), generator=draw)
        batches = [loader.to_device((idx[k::2, :-1], idx[k::2, 1:]), machine.device) for k in (0, 1)]
        how = {"function": function, "iter_num": i, "lr": lr, "take": take}
        loss, norm = update(model, optimizer, machine, scaler, batches, **how)
        found.append((loss.clone(), norm.clone()))
    return [(float(loss), float(norm)) for loss, norm in found]


# ----------------------------------------------------------------------------- a training step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rules", ["adamw", "muon"])
def test_training_in_every_dtype_matches_the_cpu(device, dtype, rules):
    losses = [loss for loss, _ in updates(parts(device, dtype, rules, **FAST), 30)]
    assert losses[-1] < losses[0] - 0.3
    count = 1 if dtype == "float16" else 3  # the gradient scaler may skip the first updates
    slow = [loss for loss, _ in updates(parts(torch.device("cpu"), "float32", rules, **FAST), count)]
    assert losses[:count] == pytest.approx(slow, abs=1e-3 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("rules", ["adamw", "muon"])
@pytest.mark.parametrize("casting", ["autocast", "weights"])
@pytest.mark.parametrize("rows", [0, 100])
def test_step_never_synchronizes(device, rules, casting, rows):
    everything = parts(device, rules=rules, casting=casting, dropout=0.1, **FAST)
    everything[0].loss_chunk_size = rows
    updates(everything, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model, optimizer, machine, scaler = everything
        idx = torch.zeros(8, 64, dtype=torch.int64, device=device)
        update(model, optimizer, machine, scaler, [(idx, idx)], iter_num=3, lr=1e-2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_batches_are_copied_without_synchronization(device, dataset):
    tokens = loader.load(dataset).train
    expected = [*loader.TrainBatches(tokens, 16, 4, 2, 1, torch.device("cpu")).step(5)]
    batches = loader.TrainBatches(tokens, 16, 4, 2, 1, device)
    list(batches.step(4))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = list(batches.step(5))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(expected, found, strict=True):
        assert all(torch.equal(x, y.cpu()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("rules", ["adamw", "muon"])
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.2, **FAST}], ids=["gpt2", "fast"])
def test_captured_step_equals_the_eager_one(device, rules, changes):
    plain = updates(parts(device, rules=rules, **changes), 12)
    everything = parts(device, rules=rules, **changes)
    graph = cuda_graphs.StepGraph(train.train_step, 8, everything[2])
    found = updates(everything, 12, graph)
    assert graph.replay
    torch.testing.assert_close(torch.tensor(found), torch.tensor(plain), rtol=0.02, atol=0.02)
    still = updates(everything, 12, graph, lr=0.0)  # the learning rate is not baked into the graph
    again = updates(everything, 12, graph, lr=0.0)
    torch.testing.assert_close(torch.tensor(still), torch.tensor(again), rtol=0.01, atol=0.01)


# ----------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
def test_attention_kernels_match_float32(device, name):
    """Compare forward and backward with the plain formula in float32."""
    torch.manual_seed(0)
    exact = [torch.randn(2, 4, 128, 64, device=device).bfloat16().float().requires_grad_() for _ in range(3)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    with attention_kernels.chosen("math"):
        expected = F.scaled_dot_product_attention(*exact, is_causal=True)
    machine = runtime.Machine(device, "bfloat16", "test")
    try:
        attention_kernels.require_attention(
            name, replace(SHAPE, n_head=4, n_embd=256, block_size=128), machine
        )
    except UserError as error:
        pytest.skip(str(error))
    with attention_kernels.chosen(name):
        found = F.scaled_dot_product_attention(*rounded, is_causal=True)
    torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.03)
    seed = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, rounded, seed.bfloat16()),
        torch.autograd.grad(expected, exact, seed),
        strict=True,
    ):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.1)


# ----------------------------------------------------------------------------- decoding


OPTIONS = [SamplingOptions(temperature=0.0), SamplingOptions(temperature=0.8, top_k=20)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_captured_decoding_writes_the_same_texts(device, options, batch):
    torch.manual_seed(0)
    model = GPT(replace(SHAPE, **FAST)).to(device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    found = []
    for kind in (Engine, graph_decode.GraphEngine):
        texts = [Text([1, 2, 3 + i], options, seed=i) for i in range(batch)]
        decoder = kind(model, batch)
        decoder.add(texts)
        for _ in range(100):  # beyond the context
            decoder.step()
        found.append([text.ids for text in texts])
    assert found[0] == found[1]
    texts = [Text([1, 2, 3 + i], options, seed=i) for i in range(batch)]
    decoder = graph_decode.GraphEngine(model, batch)
    decoder.add(texts)
    decoder.run(50)
    assert [text.ids for text in texts] == [ids[:53] for ids in found[0]]


# ----------------------------------------------------------------------------- complete runs


@pytest.fixture
def config(dataset, tmp_path, device):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "batch_size": 4, "max_iters": 20}
    sizes |= {"gradient_accumulation_steps": 2, "eval_interval": 5, "eval_iters": 2, "warmup_iters": 2}
    return train.Config(out_dir=str(tmp_path / "out"), dataset=str(dataset), device=str(device), **sizes)


WAYS = {
    "as it is": {},
    "graph": {"cuda_graph": True},
    "weights": {"casting": "weights"},
    "float16": {"dtype": "float16"},
    "compiled": {"compile": True},
    "by blocks": {"compile": "blocks"},
}


@pytest.mark.parametrize("changes", WAYS.values(), ids=WAYS)
def test_complete_run_with_each_option(config, changes, capsys):
    train.main(replace(config, compile=False, dtype="float32"))
    expected = logged(config.out_dir, "eval")
    train.main(replace(config, overwrite=True, **changes))
    said = capsys.readouterr().out
    assert "attention: " in said and "torch.compile failed" not in said
    for iteration, losses in logged(config.out_dir, "eval").items():
        assert losses == pytest.approx(expected[iteration], abs=0.05)
    sample.main(
        sample.Config(out_dir=config.out_dir, num_samples=2, max_new_tokens=40, start="a", cuda_graph=True)
    )


@pytest.mark.parametrize("changes", [{}, {"cuda_graph": True}, {"dtype": "float16"}], ids=str)
def test_deterministic_resume_is_bit_identical(config, tmp_path, changes, monkeypatch):
    config = replace(config, deterministic=True, dropout=0.1, optimizer="muon", compile=False, **changes)
    train.main(replace(config, out_dir=str(tmp_path / "straight")))
    monkeypatch.setattr(train.time, "perf_counter", iter(range(10**6)).__next__)  # 1 s per call
    stopped = 0
    for _ in range(30):
        try:
            train.main(replace(config, init_from="auto", max_minutes=11 / 60))
            break
        except Stopped:
            stopped += 1
    assert stopped
    assert bits(config.out_dir, 20) == bits(str(tmp_path / "straight"), 20)


@pytest.mark.parametrize("changes", [{}, {"cuda_graph": True}], ids=str)
def test_background_checkpoint_is_a_consistent_snapshot(config, tmp_path, changes, monkeypatch):
    """Training continues during the copy: the files equal those of a blocking save."""
    config = replace(config, deterministic=True, save_interval=1, compile=False, **changes)
    for background in (True, False):
        if not background:
            monkeypatch.setattr(AsyncCheckpointer, "_fits", lambda writer, content: False)
        train.main(replace(config, out_dir=str(tmp_path / f"{background}")))
    for step in {int(path.name[5:]) for path in checkpoint.step_folders(tmp_path / "True")} - {0}:
        assert bits(str(tmp_path / "True"), step) == bits(str(tmp_path / "False"), step)


@contextmanager
def room_for(size):
    """Limit GPU memory to `size` bytes."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_out_of_memory_is_a_one_line_error(config):
    """4,096 sequences of 32 tokens through layers of 256 channels need twice the available memory."""
    room = torch.cuda.memory_allocated() + (1 << 30)  # failed tests keep theirs
    with room_for(room), pytest.raises(UserError, match="out of memory; try half the --batch_size"):
        train.main(replace(config, batch_size=4096, n_embd=256, compile=False))


def test_auto_batch_size_finds_a_fit_and_gives_the_same_run(config, capsys):
    """Memory is limited so that some sizes do not fit; tokens per update stay equal. Reserved memory (blocks
    of 2 and 20 MB) is what counts: room for 256 of 2,048 sequences and half as much again."""
    sequences = 2048
    config = replace(config, batch_tokens=sequences * 32, n_embd=256, max_iters=2, dtype="float32")
    config = replace(config, compile=False, eval_interval=2)
    train.main(replace(config, batch_size=128))
    expected = logged(config.out_dir)
    machine = runtime.setup(config.device, "float32", 256)
    trial = partial(train.try_batch_size, config, machine, pick_fields(GPTConfig, config, vocab_size=10))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert auto_batch_size.fits(256, trial)
    with room_for(torch.cuda.max_memory_reserved() * 1.5):
        chosen = auto_batch_size.largest(sequences, partial(auto_batch_size.fits, trial=trial), bool)
        assert 64 <= chosen < sequences
        train.main(replace(config, batch_size="auto", overwrite=True))
    assert "batch_size = " in capsys.readouterr().out
    found = reader.find(Path(config.out_dir))[0].state["options"]
    assert found["batch_size"] * found["gradient_accumulation_steps"] == sequences
    assert found["batch_size"] < sequences
    for iteration, row in logged(config.out_dir).items():
        assert row == pytest.approx(expected[iteration], rel=1e-3)
