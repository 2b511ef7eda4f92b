"""Multi-process runs (torchrun, gloo) on one machine train as a single process does."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanogpt import ROOT, metrics
from nanogpt.checkpoint import reader
from nanogpt.world import World
from tests import launch
from tests.conftest import words, write_dataset

SHAPE = (
    "--n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --dropout=0 --device=cpu --compile=False "
    "--dtype=float32 "
    "--learning_rate=1e-3 --warmup_iters=5 --max_iters=50 --eval_interval=25 --eval_iters=1000"
    " --log_interval=1"
)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
# two-node commands of nanoGPT's README
MACHINES = [
    "torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=123.456.123.456 "
    "--master_port=1234 train.py",
    "torchrun --nproc_per_node=8 --nnodes=2 --node_rank=1 --master_addr=123.456.123.456 "
    "--master_port=1234 train.py",
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "words", words(3000))


def words_of(out: Path, *options: str) -> list[str]:
    return ["train.py", *SHAPE.split(), *options, f"--out_dir={out}"]


def start(processes: int, out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, *TORCHRUN, f"--nproc_per_node={processes}", *words_of(out, *options)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def train(processes: int, out: Path, *options: str) -> tuple[int, str, str]:
    done = launch.run([*TORCHRUN, f"--nproc_per_node={processes}", *words_of(out, *options)])
    return done.returncode, done.stdout, done.stderr


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in metrics.read(out) if row["event"] == "step"]


def val_losses(out: Path) -> list[float]:
    return [row["val_loss"] for row in metrics.read(out) if row["event"] == "eval"]


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory) -> Path:
    """A run without torchrun, with one micro-batch of 12 sequences."""
    out = tmp_path_factory.mktemp("alone") / "run"
    options = [f"--dataset={dataset}", "--batch_size=12", "--gradient_accumulation_steps=1"]
    done = launch.run(words_of(out, *options))
    assert done.returncode == 0, done.stderr
    return out


def test_an_uneven_split_of_the_batch_gives_the_same_run(dataset, alone, tmp_path):
    """12 sequences in micro-batches of 4 are 4 + 2 on each of two ranks; see also test_parallelize.py."""
    options = ["--batch_size=4", "--gradient_accumulation_steps=3"]
    code, said, error = train(2, tmp_path / "run", f"--dataset={dataset}", *options)
    assert code == 0, error
    assert "machine: 2 processes" in said and said.count("step 50:") == 1
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)
    assert losses(tmp_path / "run")[:10] == pytest.approx(losses(alone)[:10], rel=1e-6)
    assert val_losses(tmp_path / "run") == pytest.approx(val_losses(alone), rel=1e-5)


def test_two_nodes_give_the_same_run(dataset, alone, tmp_path):
    """Two nodes simulated on one: 1 process per node instead of 8, and its own address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [*SHAPE.split(), f"--dataset={dataset}", "--batch_size=3", "--gradient_accumulation_steps=4"]
    started = []
    for command in MACHINES:
        here = command.replace("123.456.123.456", "127.0.0.1").replace("=1234", f"={port}")
        launcher, *rest = here.replace("node=8", "node=1").split()
        assert launcher == "torchrun"
        words_given = [sys.executable, "-m", "torch.distributed.run", *rest, *options]
        started.append(
            subprocess.Popen(
                [*words_given, f"--out_dir={tmp_path / 'run'}"],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert [process.returncode for process in started] == [0, 0], errors
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)


def test_signal_to_one_rank_saves_and_stops_all(dataset, tmp_path):
    options = [f"--dataset={dataset}", "--batch_size=6", "--max_iters=100000", "--save_interval=1000000"]
    process = start(2, tmp_path / "run", *options)
    try:
        while not (tmp_path / "run" / metrics.NAME).is_file() or len(losses(tmp_path / "run")) < 5:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "checkpoint saved, resume with python train.py --out_dir=" in error
    saved, damage = reader.find(tmp_path / "run")
    assert saved and saved.iter_num >= 5 and not damage


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n_embd=30", "--n_head=4"], "error: n_embd=30 is not divisible by n_head=4"),
        (["--batch_size=1", "--gradient_accumulation_steps=1"], "2 ranks for a batch of 1 sequences"),
    ],
)
def test_error_is_printed_once(dataset, tmp_path, options, message):
    code, _, error = train(2, tmp_path / "run", f"--dataset={dataset}", *options)
    assert code != 0
    told = [line for line in error.splitlines() if message in line and not line.startswith("  traceback :")]
    assert len(told) == 1  # torchrun's own report repeats it below
    assert not (tmp_path / "run").exists()


def test_shares_partition_the_range():
    for size in (1, 2, 3, 7):
        for count in (0, 1, 6, 7, 20):
            shares = [World(rank, size).share(count) for rank in range(size)]
            assert [first for first, _ in shares] == [sum(n for _, n in shares[:i]) for i in range(size)]
            assert sum(n for _, n in shares) == count
            assert max(n for _, n in shares) - min(n for _, n in shares) <= 1


def test_single_process_owns_everything():
    world = World()
    assert world.share(5) == (0, 5) and world.any_rank(True) and not world.any_rank(False)
    assert world.raise_on_all_ranks(lambda: 3) == world.rank_zero_only(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        world.rank_zero_only(lambda: 1 // 0)
