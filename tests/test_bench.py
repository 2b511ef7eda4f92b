"""Tests of bench.py: timing of the actual training step, and its report."""

import json
import re
from dataclasses import fields, replace

import pytest
import torch

import bench
import train
from nanogpt.config import pick_fields, read
from nanogpt.distributed.world import Processes
from nanogpt.errors import UserError
from nanogpt.model import GPTConfig
from nanogpt.planning import comm_bench, estimate
from tests import hf_folders, launch

TINY = bench.Config(
    steps=3,
    warmup_steps=1,
    n_layer=1,
    n_head=2,
    n_embd=16,
    block_size=8,
    batch_size=2,
    gradient_accumulation_steps=2,
    vocab_size=50,
    device="cpu",
)


@pytest.fixture(autouse=True)
def quick_matmul(monkeypatch):
    monkeypatch.setattr(bench, "matmul_speed", lambda machine: (2048, 1e11))


def test_prints_the_results(dataset, capsys):
    bench.main(replace(TINY, dataset=str(dataset)))
    out = capsys.readouterr().out
    assert "machine: 1 CPU thread, float32" in out
    assert f"data: {dataset}, vocabulary 10" in out
    assert "step: 2 x 2 x 8 = 32 tokens" in out
    assert re.search(r"time: [\d.]+ ms/step \(3 steps, 10th to 90th percentile: [\d.]+ to [\d.]+\)", out)
    assert re.search(r"speed: [\d,]+ tokens/s\nwaiting for data: [\d.]+% of the time", out)
    assert re.search(r"TFLOP/s, [\d.]+% of a 2048 x 2048 matmul in float32 here \(0.1 TFLOP/s\)", out)
    assert "MFU" not in out  # CPUs are not in the data sheet table


def test_times_the_step_of_train_py(dataset, monkeypatch, capsys):
    taken, real = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *given: taken.append(given[5]) or real(*given))
    bench.main(replace(TINY, dataset=str(dataset), grad_clip=0.5))
    assert taken == [0.5] * 4


def test_losses_equal_those_of_train_py(dataset, tmp_path, monkeypatch):
    """With the seed, data and options of a run, the losses are bit-identical to the run's."""
    results, real = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *given: results.append(real(*given)) or results[-1])
    config = replace(TINY, dataset=str(dataset))
    shared = {f.name: getattr(config, f.name) for f in fields(train.Config)}
    shared |= {"out_dir": str(tmp_path / "out"), "max_iters": 3, "decay_lr": False, "eval_iters": 1}
    train.main(train.Config(**shared))
    trial = bench.Bench(config, tmp_path)
    for _ in range(3):
        trial.step()
    losses = [float(loss) for loss, _ in results]
    assert losses[:3] == losses[3:] and len(set(losses)) == 3


def test_the_shape_of_weights_is_timed(dataset, tmp_path, capsys):
    folder = str(hf_folders.write(tmp_path / "hf", n_layer=3, vocab_size=60))
    config = bench.Config(steps=1, warmup_steps=0, batch_size=2, device="cpu", dataset=str(dataset))
    config = replace(config, init_from=folder, real_data=False, gradient_accumulation_steps=1)
    chosen = bench.Bench(config, tmp_path).config
    assert (chosen.n_layer, chosen.n_head, chosen.n_embd, chosen.block_size) == (3, 2, 16, 32)
    assert bench.with_shape(replace(config, init_from="gpt2-medium"), {}).n_embd == 1024
    assert bench.with_shape(replace(config, n_layer=1), {"n_layer": "--n_layer"}).n_layer == 1


def test_missing_data_is_reported_and_replaced_by_random_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.resolve, "ROOT", tmp_path)  # a folder without datasets
    bench.main(replace(TINY, steps=1))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("data:"))
    assert (
        "random tokens, --vocab_size=50, because no dataset at 'openwebtext'" in line and "prepare.py" in line
    )
    with pytest.raises(UserError, match="no dataset at 'none-such'"):
        bench.main(replace(TINY, dataset="none-such"))


def test_random_tokens_on_request(dataset, tmp_path, capsys):
    for vocab_size, width in ((50, 2), (100_000, 4)):
        config = replace(TINY, dataset=str(dataset), real_data=False, vocab_size=vocab_size)
        tokens = train.resolve.open_data(bench.with_data(config, tmp_path)).train
        assert "(--real_data=False)" in capsys.readouterr().out
        assert tokens.parts[0].dtype.itemsize == width
        assert int(tokens.read(0, 1000).max()) < vocab_size


def test_waiting_time_is_measured(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(now))
    waits = []
    assert list(bench.watched(["a", "b"], waits)) == ["a", "b"]
    assert waits == [1, 1, 1]


def test_profile_writes_a_trace_and_prints_top_ten_ops(dataset, tmp_path, capsys):
    trace = tmp_path / "trace.json"
    bench.main(replace(TINY, dataset=str(dataset), profile=True, trace=str(trace)))
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    table = capsys.readouterr().out.partition(f"profile of 3 steps in {trace}:\n")[2].splitlines()
    listed = table[3 : table.index(table[0], 3)]
    assert len(listed) == 10
    shares = [
        float(re.search(r" ([\d.]+)%", line)[1]) for line in listed
    ]  # of the time within the operation itself
    assert shares == sorted(shares, reverse=True) and shares[0] > 0


def test_bad_input_is_a_one_line_error(dataset, tmp_path, monkeypatch):
    for wrong, reason in (
        (dict(n_embd=15), "n_embd=15 is not divisible by n_head=2"),
        (dict(block_size=100_000), "fewer than one sequence"),
        (dict(profile=True, trace=str(tmp_path / "nowhere" / "x.json")), "its folder does not exist"),
        (dict(device="none"), "--device=none"),
    ):
        with pytest.raises(UserError, match=reason):
            bench.main(replace(TINY, dataset=str(dataset), **wrong))

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nlong story")

    monkeypatch.setattr(train, "train_step", full)
    with pytest.raises(UserError, match="out of memory; try half the --batch_size"):
        bench.main(replace(TINY, dataset=str(dataset)))


def test_accepts_presets_of_train_py(tmp_path):
    preset = tmp_path / "preset.py"
    preset.write_text("n_layer = 3\nmax_iters = 7\nout_dir = 'x'\n", encoding="utf-8")
    options = read(bench.Config, [str(preset), "--steps=5"])
    assert options.values == {"n_layer": 3, "max_iters": 7, "out_dir": "x", "steps": 5}


def test_shared_options_match_train_py():
    ours = {f.name: f.default for f in fields(bench.Config)}
    theirs = {f.name: f.default for f in fields(train.Config)}
    differing = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert differing == {"gradient_accumulation_steps"}


COMM = ["bench.py", "--comm", "--device=cpu", "--n_layer=1", "--n_head=2", "--n_embd=64", "--vocab_size=500"]
COMM += ["--block_size=32", "--batch_size=4", "--comm_bytes=1_000_000"]


def test_comm_benchmark_of_two_processes(tmp_path):
    done = launch.run(COMM, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "network: 2 ranks on 1 nodes, gloo, cpu" in done.stdout
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| 2 all")]
    assert [row[1] for row in rows] == ["all_reduce"] * 4 + ["all_gather"] * 4
    for row in rows:
        size, median = int(row[2].replace(",", "")), float(row[3].split()[0].replace(",", ""))
        low, high = (float(x.replace(",", "").replace(" µs", "")) for x in row[4].split(" to "))
        assert size in (4096, 16384, 65536, 262144) and low <= median <= high
        rate, bus = float(row[5]), float(row[6])
        assert rate == pytest.approx(size / median / 1e3, rel=0.1, abs=2e-3)
        assert bus == pytest.approx(rate * (1 if row[1] == "all_reduce" else 0.5), abs=2e-3)
    assert "measured on all ranks at once" in done.stdout and "GB sent per rank and step" in done.stdout
    assert re.search(r"this network can(not)? keep up with this model at 1 x 128 tokens", done.stdout)


def test_comm_benchmark_requires_a_batch_size(tmp_path):
    with pytest.raises(UserError, match="give --batch_size a number"):
        bench.communicate(replace(TINY, batch_size="auto"), Processes(0, 2), tmp_path)


def test_required_accumulation_for_a_slow_network(capsys):
    config = bench.Config(batch_size=12, vocab_size=50257)
    size = 4 * estimate.parameters(pick_fields(GPTConfig, config)).total

    def judged(bus, **changed):
        bench.judge(replace(config, **changed), 8, 0.05, "as given", bus)
        return capsys.readouterr().out

    quick = judged(360e9)
    assert f"{1.75 * size / 1e9:.3f} GB sent" in quick and "can keep up" in quick and "use" not in quick
    slow = judged(1e9)
    waited = float(re.search(r"([\d,.]+) ms of exposed", slow)[1].replace(",", "")) / 1e3
    assert waited == pytest.approx(1.75 * size / 1e9 - 0.03, rel=0.1)
    enough = int(re.search(r"use (\d+) micro-batches", slow)[1])
    assert f"--gradient_accumulation_steps={8 * enough}" in slow
    assert "cannot keep up" in judged(1e9, gradient_accumulation_steps=enough - 1)
    assert "can keep up" in judged(1e9, gradient_accumulation_steps=enough)


def test_comm_benchmark_rejects_a_single_process():
    with pytest.raises(UserError, match=r"torchrun --standalone --nproc_per_node=2 bench\.py --comm"):
        bench.main(replace(TINY, comm=True))


def test_missing_infiniband_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(comm_bench, "INFINIBAND", tmp_path / "none")
    monkeypatch.delenv("NCCL_IB_DISABLE", raising=False)
    assert comm_bench.advice("nccl", 1) == comm_bench.advice("gloo", 2) == []
    assert "set NCCL_IB_DISABLE=1" in comm_bench.advice("nccl", 2)[0]
    (tmp_path / "some" / "mlx5_0").mkdir(parents=True)
    monkeypatch.setattr(comm_bench, "INFINIBAND", tmp_path / "some")
    assert "adapters here: mlx5_0" in comm_bench.advice("nccl", 2)[0]
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    assert "plain sockets" in comm_bench.advice("nccl", 2)[0]


def test_default_on_a_cpu_ends_in_a_minute(monkeypatch, capsys):
    """Single sequences, and no more steps once the time is over."""
    small = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "device": "cpu", "real_data": False}
    monkeypatch.setattr(bench, "CPU_S", 0.0)
    bench.main(bench.Config(**small, vocab_size=100), {})
    out = capsys.readouterr().out
    assert "on a CPU: --batch_size=1" in out and "step: 1 x 1 x 16" in out and "ms/step (2 steps" in out
    bench.main(bench.Config(**small, vocab_size=100, steps=3, batch_size=2), {"steps": "", "batch_size": ""})
    assert "ms/step (3 steps" in capsys.readouterr().out
