"""Scaling predictions for many GPUs: bytes and shards match real runs, times match calculations by hand."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

import plan
import train
from nanogpt import ROOT
from nanogpt.config import read
from nanogpt.errors import UserError
from nanogpt.gpu import chips
from nanogpt.model import GPT2_SIZES
from nanogpt.planning import estimate, scaling
from nanogpt.planning.scaling import Call, ClusterOptions
from tests import launch
from tests.scaling_worker import MICRO_BATCHES, SHAPE

OPTIONS = frozenset(train.Config.__dataclass_fields__)

H100 = ClusterOptions(gpu="H100", batch_size=16, batch_tokens=512 * 1024)


@pytest.fixture(scope="module", params=[2, 4])
def counted(request, tmp_path_factory):
    """Measure a step of each parallel mode on 2 and 4 ranks (bytes by the kernel, memory by torch)."""
    if not Path("/proc/self/io").exists():
        pytest.skip("the bytes written by a process are not available on this system")
    out = tmp_path_factory.mktemp("scaling") / "found"
    done = launch.run(["-m", "tests.scaling_worker", str(out)], ranks=request.param)
    paths = [out.with_suffix(f".{rank}") for rank in range(request.param)]
    assert all(path.is_file() for path in paths), done.stderr[-3000:]
    return request.param, [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def test_predicted_traffic_matches_real_runs(counted):
    """Within 2% on each rank; the difference is gloo's headers."""
    size, found = counted
    for mode in found[0]["torch"]:
        options = ClusterOptions(shard_optimizer=False, gpus_per_node=2 if mode == "hsdp" else size)
        foretold = scaling.collectives(SHAPE, options, mode, size, number_bytes=4)
        as_gloo = [replace(c, kind="all_reduce") if c.kind == "reduce_scatter" else c for c in foretold]
        sent = scaling.bytes_sent(as_gloo, MICRO_BATCHES)
        assert [one["torch"][mode]["sent"] for one in found] == pytest.approx([sent] * size, rel=0.02), mode


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_predicted_update_traffic_matches_real_runs(counted, rule):
    """Bytes sent per rank after the gradient all-reduce, within 2% for the project's optimizers; within 10%
    for Muon under FSDP, as each rank is assumed to hold an equal part of every matrix."""
    size, found = counted
    for mode in found[0][rule]:
        options = ClusterOptions(optimizer=rule, gpus_per_node=2 if mode == "hsdp" else size)
        sent = max(one[rule][mode] for one in found)
        foretold = scaling.collectives(SHAPE, options, mode, size, number_bytes=4)
        after = [call for call in foretold if call.when == "update"]
        within = 0.02 if rule == "adamw" or mode == "ddp" else 0.1
        assert sent == pytest.approx(scaling.bytes_sent(after, 1), rel=within), mode
    assert set(found[0][rule]) == {"ddp", "fsdp"} | ({"hsdp"} if size == 4 else set())


def test_predicted_sharded_memory_matches_real_runs(counted):
    """Within 5% for the rank with the most memory."""
    size, found = counted
    for mode in found[0]["torch"]:
        options = ClusterOptions(shard_optimizer=False, gpus_per_node=2 if mode == "hsdp" else size)
        need = scaling.memory(SHAPE, options, mode, size, [2] * MICRO_BATCHES, number_bytes=4)
        for kind in ("weights", "gradients", "optimizer"):
            most = max(one["torch"][mode][kind] for one in found)
            assert most == pytest.approx(getattr(need, kind), rel=0.05), (mode, kind)


# ----------------------------------------------------------------------------- time


def test_bus_factors_equal_nccl_tests():
    assert scaling.bus_factor("all_reduce", 8) == 1.75
    assert scaling.bus_factor("all_gather", 8) == scaling.bus_factor("reduce_scatter", 8) == 0.875
    assert Call("all_reduce", 1000, 4, 1, "last").sent == 1500


def test_transfer_time_is_that_of_the_slowest_link():
    options = ClusterOptions(gpu="H100", node_gbytes=300, network_gbits=200 / 0.9)

    def took(kind, payload, gpus, nodes):
        return scaling.call_s(Call(kind, payload, gpus, nodes, "last"), options)

    big = 4_000_000_000
    assert took("all_reduce", big, 8, 1) == pytest.approx(1.75 * big / 300e9, rel=0.001)
    # eight ports per node send at once
    assert took("all_reduce", big, 16, 2) == pytest.approx(2 * 15 / 16 * big / 200e9, rel=0.002)
    # one rank per node: one port
    assert took("all_reduce", big, 2, 2) == pytest.approx(big / 25e9, rel=0.001)
    small = [took("all_gather", 8, n, -(-n // 8)) for n in (8, 64, 1024)]
    assert small[0] < small[1] < small[2] and small[2] == pytest.approx(10e-6 + 896 * 1.9e-6 + 127 * 4e-6)


def test_ddp_step_time_matches_hand_calculation():
    """DDP on 8 GPUs: all communication overlaps except the last bucket and the all-gather of weights."""
    shape = GPT2_SIZES["gpt2"]
    step = scaling.predict(shape, H100, "ddp", 8)
    assert step
    P = estimate.parameters(shape).total
    per_token = estimate.flops_per_token(shape)
    assert step.tokens == 64 * 1024
    assert step.compute_s == pytest.approx(64 * 1024 * per_token / (989e12 * 0.4))
    assert step.sent == pytest.approx(1.75 * 4 * P + 0.875 * 4 * P)
    buckets = -(-4 * P // (25 << 20))
    turns = -(-P // (1 << 26))  # number of all-gather chunks, each over seven hops
    last, gather = 1.75 * 4 * P / buckets / 360e9, 0.875 * 4 * P / 360e9 + turns * (10 + 7 * 1.9) * 1e-6
    assert step.exposed_s == pytest.approx(last + gather, rel=0.05)
    assert step.update_s == pytest.approx(4 * (3 * P + 7 * P / 8) / (0.8 * 3.35e12), rel=0.01)


@pytest.mark.parametrize("mode", scaling.MODES)
@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl"])
def test_more_gpus_are_faster_but_not_more_efficient(mode, name):
    shape = GPT2_SIZES[name]
    steps = [scaling.predict(shape, H100, mode, 2**power) for power in range(10)]
    assert all(steps)
    assert steps[0].exposed_s == steps[0].sent == 0
    efficiencies = [steps[0].seconds / (step.seconds * 2**power) for power, step in enumerate(steps)]
    # sharding the optimizer may make 2 or 4 GPUs slightly more efficient than 1
    assert all(b <= a * 1.02 for a, b in pairwise(efficiencies))
    assert scaling.predict(shape, H100, mode, 1024) is None  # half a sequence per GPU
    assert scaling.predict(shape, replace(H100, network_gbits=9), mode, 64).seconds > steps[6].seconds


def test_fsdp_memory_savings_and_traffic_cost():
    shape = GPT2_SIZES["gpt2-xl"]
    ddp, fsdp, hsdp = (scaling.predict(shape, H100, mode, 64) for mode in scaling.MODES)
    assert ddp and fsdp and hsdp
    assert fsdp.memory.weights < hsdp.memory.weights < ddp.memory.weights
    assert fsdp.memory.weights == pytest.approx(ddp.memory.weights / 64, rel=0.02)
    assert fsdp.memory.optimizer == pytest.approx(ddp.memory.optimizer, rel=0.02)  # ZeRO-1
    assert hsdp.memory.optimizer == pytest.approx(8 * ddp.memory.optimizer, rel=0.02)
    plain = scaling.predict(shape, replace(H100, shard_optimizer=False), "ddp", 64)
    assert plain and plain.memory.optimizer == 64 * ddp.memory.optimizer and plain.sent < ddp.sent
    one_node = [scaling.predict(shape, H100, mode, 8) for mode in ("fsdp", "hsdp")]
    assert one_node[0].seconds == one_node[1].seconds


def test_muon_traffic_under_fsdp():
    """Gradients go to the owner of each matrix and updates back, at 4 and 2 bytes per element, except for
    elements that stay local; the load is balanced over GPUs."""
    shape, muon = GPT2_SIZES["gpt2"], replace(H100, optimizer="muon")
    matrices = estimate.parameters(shape).matrices
    for parts in (2, 8):
        step, plain = (scaling.predict(shape, options, "fsdp", parts) for options in (muon, H100))
        assert step and plain
        assert step.sent - plain.sent == pytest.approx(6 * matrices * (parts - 1) / parts**2, rel=0.1)
        assert step.exposed_s > plain.exposed_s


def test_link_data_of_every_gpu_is_complete():
    assert all(bool(chip.memory_bytes_s) == bool(chip.link_bytes_s) for chip in chips.CHIPS.values())


# ----------------------------------------------------------------------------- plan.py


def planned(words: list[str], capsys) -> str:
    options = read(plan.Config, words, other_keys=OPTIONS)
    plan.main(plan.Config(**options.values), options.origins)
    return capsys.readouterr().out


def test_plan_prints_a_table_and_its_assumptions(capsys):
    said = planned(["config/train_gpt2_xl.py", "--gpu=H100", "--scaling=True", "--network_gbits=100"], capsys)
    rows = [line for line in said.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 11 and rows[0].startswith("| 1 | ") and rows[-1].startswith("| 1,024 | ")
    assert rows[3].count(" / ") == 5 * 2 and "fewer than one sequence per GPU" in rows[-1]
    assert "360 GB/s within its node of 8 and 11.2 GB/s between nodes" in said and "ZeRO-1" in said
    with pytest.raises(UserError, match="--network_gbits=0 connects no nodes"):
        plan.main(plan.Config(gpu="H100", scaling=True, network_gbits=0))


def test_documented_figures_match_plan_py(capsys):
    """The tables of docs/scaling-arithmetic.md equal those that plan.py prints."""
    page = (ROOT / "docs" / "scaling-arithmetic.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python plan.py (.*--scaling=True.*)$", page, re.M)
    assert len(commands) >= 4
    tables = page.split("python plan.py ")
    for command in commands:
        said = planned(command.split("  #")[0].split(), capsys)
        part = next(text for text in tables if text.startswith(command))
        rows = [line for line in part.splitlines() if re.match(r"\| [\d,]+ \| ", line)]
        assert rows, command
        for row in rows:
            assert row in said, command
