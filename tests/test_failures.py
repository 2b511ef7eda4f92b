"""Inconsistent ranks fail with a one-line error. Each rank is started separately, as with srun, forked from
a process that has already imported train.py."""

import contextlib
import json
import multiprocessing
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

import train
from nanogpt import exits
from nanogpt.errors import run_program
from tests.conftest import words, write_dataset

pytestmark = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork"
)


@pytest.fixture(scope="module")
def context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    return context


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    dataset = write_dataset(tmp_path_factory.mktemp("data") / "words", words(1000))
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4}
    sizes |= {"gradient_accumulation_steps": 2, "max_iters": 3, "eval_iters": 2, "warmup_iters": 1}
    return train.Config(dataset=str(dataset), device="cpu", rdzv_timeout_s=30.0, **sizes)


def run(config, log, cwd, environment):
    os.environ.update(environment)
    os.chdir(cwd)
    with log.open("w", buffering=1) as file, contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 1)
        run_program(lambda: train.main(config))


@pytest.fixture
def start(context, tmp_path):
    """Start one process per config (None: missing rank) as one run; return (exit code, stderr) of each, and
    the seconds between the first and the last exit."""
    started = []

    def start(configs, folders=None):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        for rank, config in enumerate(configs):
            if config is None:
                continue
            about = {"RANK": rank, "WORLD_SIZE": len(configs), "LOCAL_RANK": rank}
            about |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            log, folder = tmp_path / f"{rank}.log", (folders or {}).get(rank, tmp_path)
            args = (config, log, folder, {key: str(value) for key, value in about.items()})
            started.append((context.Process(target=run, args=args), log))
            started[-1][0].start()
        left = {}
        deadline = time.monotonic() + 60
        while len(left) < len(started) and time.monotonic() < deadline:
            for process, _ in started:
                if process.exitcode is not None:
                    left.setdefault(process, time.monotonic())
            time.sleep(0.02)
        found = [(process.exitcode, log.read_text()) for process, log in started]
        return found, max(left.values()) - min(left.values()), f"127.0.0.1:{port}"

    yield start
    for process, _ in started:
        process.kill()


def lines(told):
    return [line for line in told.splitlines() if line and not line.startswith("[W")]


def test_rank_with_different_options_is_named(start, config, tmp_path):
    found, seconds, _ = start([config, config, replace(config, batch_size=8)])
    assert [code for code, _ in found] == [2, 2, 2] and seconds < 10
    said = "error: rank 2 has --batch_size=8, rank 0 has --batch_size=4; "
    assert lines(found[0][1]) == [f"{said}start all ranks with the same options"]
    assert lines(found[1][1]) == lines(found[2][1]) == []
    assert not (tmp_path / config.out_dir).exists()


def test_run_folder_invisible_to_one_rank_is_reported(start, config, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    found, seconds, _ = start([config, config], {1: tmp_path / "elsewhere"})
    assert [code for code, _ in found] == [2, 2] and seconds < 10
    (told,) = lines(found[0][1])
    assert told.startswith(f"error: rank 1: {tmp_path / 'elsewhere'} on ")
    assert "set --out_dir to a folder shared by all nodes" in told
    assert not [path for path in tmp_path.rglob("*") if path.is_dir() and path.name != "elsewhere"]
    assert not list(tmp_path.glob(".nanogpt-*"))


@pytest.mark.parametrize("missing", [0, 1])
def test_missing_ranks_are_reported_with_the_address(start, config, missing):
    waiting = replace(config, rdzv_timeout_s=1.0)
    found, _, address = start([None if rank == missing else waiting for rank in range(2)])
    ((code, told),) = found
    assert code == 2 and len(lines(told)) == 1
    assert address in told and "--rdzv_timeout_s" in told and f"rank {1 - missing}" in told


def test_manually_started_processes_train(start, config, tmp_path):
    found, _, _ = start([config, config])
    assert [code for code, _ in found] == [0, 0], found
    assert (tmp_path / config.out_dir / "step-000003" / "manifest.json").is_file()


def test_permanent_errors_are_not_retried(tmp_path):
    """Uses log folders in the layout of torchrun."""
    about = {"TORCHELASTIC_RESTART_COUNT": "0"}
    for attempt in range(3):
        for rank in (0, 1):
            (tmp_path / f"attempt_{attempt}" / str(rank)).mkdir(parents=True)

    def file(attempt, rank):
        return str(tmp_path / f"attempt_{attempt}" / str(rank) / "error.json")

    assert exits.final_code_of_last_attempt({}) == 0
    assert exits.final_code_of_last_attempt(about | {exits.ENV_ERROR_FILE: file(0, 0)}) == 0
    second = {"TORCHELASTIC_RESTART_COUNT": "1", exits.ENV_ERROR_FILE: file(1, 0)}
    assert exits.final_code_of_last_attempt(second) == 0  # killed: no error file
    for code, expected in ((76, 0), (74, 0), (1, 0), (2, 2), (70, 70), (75, 75)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(exits.ENV_ERROR_FILE, file(0, 1))
            exits.report(code, "why")
        assert exits.final_code_of_last_attempt(second) == expected
    about = json.loads(Path(file(0, 1)).read_text())["message"]
    assert about["message"] == about["extraInfo"]["py_callstack"] == "why" and about["errorCode"] == 75
