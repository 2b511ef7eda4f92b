"""Tests of train.py: resuming, stopping, input validation and checkpoint retention."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import train
from nanogpt import checkpoint, files, metrics, runtime
from nanogpt.checkpoint import reader, resume
from nanogpt.errors import CODES, Diverged, Stopped, UserError
from tests import launch
from tests.conftest import small_run, words, write_dataset

ROOT = Path(__file__).resolve().parent.parent
MODERN = {"position": "rope", "norm": "rms", "activation": "relu2", "qk_norm": True, "tied": False}
MODERN |= {"softcap": 15.0, "init": "zero", "smear": True}


@pytest.fixture
def config(dataset, tmp_path, device):
    often = {"max_iters": 40, "eval_interval": 10, "eval_iters": 2}
    batch = {"batch_size": 4, "gradient_accumulation_steps": 4}
    on = {"device": str(device), "deterministic": device.type == "cuda"}
    return small_run(dataset, tmp_path / "out", dropout=0.1, **on, **batch, **often)


def bits(run: str, step: int) -> dict[str, bytes]:
    """Return the files of a checkpoint (weights, optimizer state) by name, as bytes."""
    folder = Path(run) / f"step-{step:06d}"
    tensors = {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def logged(run: str, event: str = "step") -> dict[int, tuple]:
    """Return the reproducible fields of the logged rows of a run, by iteration."""
    keys = ("loss", "lr", "grad_norm") if event == "step" else ("train_loss", "val_loss")
    rows = [row for row in metrics.read(Path(run)) if row["event"] == event]
    found = {row["iter"]: tuple(row[key] for key in keys) for row in rows}
    assert len(found) == len(rows), "an iteration was logged twice"
    return found


class StopAt:
    """Simulate a crash: `is_time_to_save` raises KeyboardInterrupt at `iteration`."""

    def __init__(self, monkeypatch, iteration):
        real, calls = train.is_time_to_save, 0

        def save_or_kill(run, *how):
            nonlocal calls
            calls += 1
            if run.progress.iter_num == iteration:
                raise KeyboardInterrupt  # same files on disk as after SIGKILL
            return real(run, *how)

        monkeypatch.setattr(train, "is_time_to_save", save_or_kill)


def test_resume_is_bit_identical(config, tmp_path, monkeypatch, all_threads):
    """40 iterations equal 20, a crash and 20 more, with dropout and gradient accumulation."""
    straight = replace(config, out_dir=str(tmp_path / "straight"))
    train.main(straight)
    looked_at = [
        {},
        {"eval_interval": 7, "log_interval": 3, "save_interval": 5},
        {"eval_interval": 1, "eval_iters": 1, "save_interval": 20},
        {"eval_interval": 1000, "save_interval": 4},
    ]
    for i, changes in enumerate(looked_at):
        broken = replace(config, out_dir=str(tmp_path / f"broken{i}"), **changes)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            StopAt(patch, 23)
            train.main(broken)
        resumed_at = reader.find(Path(broken.out_dir))[0].iter_num
        assert resumed_at in (20, 21, 22)
        train.main(replace(broken, init_from="resume"))
        assert bits(broken.out_dir, 40) == bits(straight.out_dir, 40)
        rows, expected = logged(broken.out_dir), logged(straight.out_dir)
        assert rows == {i: expected[i] for i in rows} and len(rows) == -(-40 // broken.log_interval)
        evaluations = logged(broken.out_dir, "eval")
        if broken.eval_iters == config.eval_iters:
            theirs = logged(straight.out_dir, "eval")
            assert all(evaluations[i] == theirs[i] for i in evaluations.keys() & theirs.keys())
        assert sorted(evaluations) == [*range(0, 40, broken.eval_interval), 40]


def test_modern_recipe_resume_is_bit_identical(config, tmp_path, monkeypatch, all_threads):
    modern = MODERN | {"optimizer": "muon", "muon_weight_decay": 0.1, "batch_ramp_tokens": 2000}
    modern |= {"dtype": "bfloat16"}
    straight = replace(config, out_dir=str(tmp_path / "straight"), **modern)
    train.main(straight)
    broken = replace(straight, out_dir=str(tmp_path / "broken"), save_interval=5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        StopAt(patch, 23)
        train.main(broken)
    train.main(replace(broken, init_from="resume"))
    assert bits(broken.out_dir, 40) == bits(straight.out_dir, 40)
    assert logged(broken.out_dir) == logged(straight.out_dir)


def test_stopping_and_resuming_at_every_iteration(config, tmp_path, monkeypatch):
    """Stopping after each update and resuming each time gives the uninterrupted run."""
    config = replace(config, max_iters=12, eval_interval=5)
    train.main(replace(config, out_dir=str(tmp_path / "straight")))
    stopped = 0
    monkeypatch.setattr(train.time, "perf_counter", iter(range(10**6)).__next__)  # 1 s per call
    for _ in range(30):
        try:
            train.main(replace(config, init_from="auto", max_minutes=3 / 60))
            break
        except Stopped as error:
            assert "--init_from=resume" in str(error)
            stopped += 1
    assert stopped >= 6
    assert bits(config.out_dir, 12) == bits(str(tmp_path / "straight"), 12)
    assert logged(config.out_dir) == logged(str(tmp_path / "straight"))


def test_resume_restores_saved_options(config, tmp_path, capsys):
    train.main(replace(config, max_iters=10))
    bare = train.Config(init_from="resume", out_dir=config.out_dir, max_iters=15)
    train.main(bare, {"init_from": "--init_from=resume", "out_dir": "...", "max_iters": "--max_iters=15"})
    assert "max_iters = 15 from now on; it was 10" in capsys.readouterr().out
    assert reader.find(Path(config.out_dir))[0].iter_num == 15


def test_training_reduces_loss(config, tmp_path):
    train.main(replace(config, max_iters=300, dropout=0.0, gradient_accumulation_steps=1, learning_rate=1e-2))
    rows = logged(config.out_dir, "eval")
    assert rows[300][1] < rows[0][1] - 1.0
    found = reader.find(Path(config.out_dir), "best")[0]
    assert found.state["val_loss"] == min(val for _, val in rows.values())


def test_run_folder_contents(config):
    train.main(replace(config, max_iters=3))
    out = Path(config.out_dir)
    assert {path.name for path in out.iterdir()} == {
        ".lock",
        "config.json",
        "tokenizer.json",
        "metrics.jsonl",
        "step-000003",
    }
    about = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert about["options"]["n_layer"] == 2 and about["torch"] == torch.__version__
    assert about["model"]["vocab_size"] == 10 and about["model"]["vocab_multiple"] == 64
    assert (out / "tokenizer.json").read_bytes() == (Path(config.dataset) / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("always", [True, False])
def test_checkpoint_policy(config, always):
    """The best and the final state are always saved, others only with always_save_checkpoint."""
    train.main(replace(config, always_save_checkpoint=always, max_iters=25, eval_interval=5))
    steps_there = {int(path.name[5:]) for path in checkpoint.step_folders(Path(config.out_dir))}
    best = min(logged(config.out_dir, "eval").items(), key=lambda item: item[1][1])[0]
    assert {25, best} <= steps_there and len(steps_there) <= 3


def test_rerunning_a_command_keeps_the_previous_run(config, capsys):
    train.main(replace(config, max_iters=3))
    train.main(replace(config, max_iters=4))
    assert "moved the existing run" in capsys.readouterr().out
    assert reader.find(Path(config.out_dir + ".1"))[0].iter_num == 3
    train.main(replace(config, max_iters=5, overwrite=True))
    assert not Path(config.out_dir + ".2").exists()
    assert reader.find(Path(config.out_dir))[0].iter_num == 5


def test_stopped_run_releases_its_folder_lock(config):
    """Also while a caller (e.g. a notebook) keeps the exception and thus all local variables alive."""
    with pytest.raises(Stopped) as kept:
        train.main(replace(config, max_minutes=1e-9))
    files.lock(Path(config.out_dir)).release()
    assert kept.value


def test_init_from_auto_starts_and_resumes(config, capsys):
    config = replace(config, init_from="auto", max_iters=3)
    train.main(config)
    train.main(config)
    assert "all 3 iterations" in capsys.readouterr().out
    train.main(replace(config, max_iters=5))
    assert sorted(logged(config.out_dir)) == [0, 1, 2, 3, 4]


def test_dropout_may_change_on_resume(config, capsys):
    train.main(replace(config, max_iters=5, dropout=0.2))
    train.main(
        replace(config, max_iters=10, dropout=0.0, init_from="resume"),
        {"dropout": "--dropout=0", "max_iters": ""},
    )
    assert "dropout = 0.0 from now on; it was 0.2" in capsys.readouterr().out
    assert reader.find(Path(config.out_dir))[0].model_config.dropout == 0.0


def test_shape_of_the_checkpoint_is_kept_on_resume_with_a_line_for_each_option(config, capsys):
    train.main(replace(config, max_iters=5))
    train.main(replace(config, max_iters=8, init_from="resume", n_layer=3, block_size=config.block_size // 2))
    said = capsys.readouterr().out.splitlines()
    assert f"note: n_layer = {config.n_layer} as in the checkpoint; given (3) has no effect" in said
    assert any(
        line.startswith(f"note: block_size = {config.block_size} as in the checkpoint") for line in said
    )
    found = reader.find(Path(config.out_dir))[0]
    assert (found.iter_num, found.model_config.n_layer) == (8, config.n_layer)
    with pytest.raises(UserError, match="has other trainable weights: lora_rank=2 given, lora_rank=0 saved"):
        train.main(replace(config, max_iters=9, init_from="resume", lora_rank=2))


def test_damaged_newest_checkpoint_is_skipped(config, capsys):
    train.main(replace(config, max_iters=20))
    weights = Path(config.out_dir) / "step-000020" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    train.main(replace(config, max_iters=21, init_from="resume"))
    assert "skipped a damaged checkpoint" in capsys.readouterr().out
    assert (Path(config.out_dir) / "step-000020.damaged").exists()
    assert reader.find(Path(config.out_dir))[0].iter_num == 21


def test_eval_only_writes_nothing(config, capsys):
    train.main(replace(config, eval_only=True))
    assert not Path(config.out_dir).exists()
    assert "step 0: train loss 2.3" in capsys.readouterr().out


def test_divergence_is_detected_and_not_saved(config):
    with pytest.raises(Diverged, match="learning rate"):
        train.main(
            replace(config, learning_rate=1e30, min_lr=0.0, log_interval=7, eval_interval=3, save_interval=1)
        )
    for path in checkpoint.step_folders(Path(config.out_dir)):
        tensors = load_file(path / "model.safetensors")
        assert all(bool(t.isfinite().all()) for t in tensors.values())


def test_full_disk_keeps_the_previous_checkpoint(config, monkeypatch):
    train.main(replace(config, max_iters=5))

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        train.main(replace(config, max_iters=10, init_from="resume"))
    monkeypatch.undo()
    assert reader.find(Path(config.out_dir))[0].iter_num == 5


@pytest.mark.parametrize(
    ("machine", "saved", "now"),
    [("cpu, 2 threads", False, "auto"), ("cpu, 2 threads", True, True), ("NVIDIA T4", False, False)],
)
def test_run_moved_from_a_cpu_to_a_gpu_decides_again_whether_to_compile(config, machine, saved, now):
    train.main(replace(config, max_iters=1, eval_interval=1))
    path = Path(config.out_dir, "step-000001", "state.json")
    state = json.loads(path.read_text(encoding="utf-8"))
    state["options"]["compile"], state["environment"]["device"] = saved, machine
    path.write_text(json.dumps(state), encoding="utf-8")
    manifest = path.with_name("manifest.json")
    listing = json.loads(manifest.read_text(encoding="utf-8"))
    listing["files"]["state.json"] = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
    manifest.write_text(json.dumps(listing), encoding="utf-8")
    assert resume.resume(replace(config, init_from="resume"), {}, set(), [])[0].compile == now


@pytest.mark.parametrize(("before", "now"), [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_run_resumes_in_the_other_half_precision(config, before, now):
    """As on a T4 after an A100; only float16 has the state of a gradient scaler."""
    train.main(replace(config, max_iters=5, eval_interval=5, dtype=before))
    again = {"init_from": "resume", "out_dir": config.out_dir, "dtype": now, "max_iters": 10}
    train.main(replace(config, **again), dict.fromkeys(again, "--given"))
    assert set(logged(config.out_dir)) == set(range(10))


@pytest.mark.cpu
@pytest.mark.parametrize("rules", ["adamw", "muon"])
def test_the_host_reads_no_value_between_log_lines(config, rules, monkeypatch):
    """Reading one would wait for a GPU, which then waits for the host."""
    reads, at_start, seed = [], [], runtime.Machine.seed

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero"):
                reads.append(func)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(runtime.Machine, "seed", lambda *given: at_start.append(len(reads)) or seed(*given))
    config = replace(config, optimizer=rules, max_iters=12, eval_interval=12, log_interval=4)
    with Reads():
        train.main(config)
    found = [after - before for before, after in itertools.pairwise(at_start)]
    assert len(found) == 11 and [i for i, count in enumerate(found) if count] == [0, 4, 8]


@pytest.mark.parametrize("what", ["gradient", "loss"])
@pytest.mark.parametrize("often", [{"log_interval": 6}, {"log_interval": 1000, "save_interval": 6}], ids=str)
def test_divergence_between_log_lines_ends_the_run_before_a_save(config, what, often, monkeypatch):
    """Nothing is read before the next log line or checkpoint, which is not written."""
    real, calls = train.train_step, []

    def step(model, optimizer, scaler, micro_batches, *rates):
        calls.append(None)
        if len(calls) == 4:
            poison = optimizer.parameters[-1].register_hook(lambda gradient: gradient * math.nan)
            if what == "loss":
                micro_batches = [(math.inf * weight, batch) for weight, batch in micro_batches]
        found = real(model, optimizer, scaler, micro_batches, *rates)
        if len(calls) == 4:
            poison.remove()
        return found

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(Diverged, match=r"at iteration [56] with learning rate"):
        train.main(replace(config, eval_interval=1000, **often))
    assert CODES[Diverged][0] == 70 and checkpoint.step_folders(Path(config.out_dir)) == []


@pytest.mark.parametrize(("compile", "recipe"), [(True, MODERN), ("blocks", {})])
def test_compile_does_not_change_training(config, compile, recipe):
    """With a C++ compiler losses agree up to rounding; without one the run falls back to eager mode."""
    config = replace(config, dtype="float32", dropout=0.0, n_layer=1, **recipe)  # one layer: less to compile
    config = replace(config, max_iters=3, gradient_accumulation_steps=1)
    train.main(replace(config, compile=False))
    plain = logged(config.out_dir)
    train.main(replace(config, compile=compile))
    for iteration, (loss, _, norm) in logged(config.out_dir).items():
        assert loss == pytest.approx(plain[iteration][0], abs=1e-4)
        assert norm == pytest.approx(plain[iteration][2], rel=1e-3)


REFUSED = {
    "wide": ({"n_embd": 30, "n_head": 4}, "n_embd=30 is not divisible by n_head=4"),
    "rates": ({"min_lr": 1.0}, "min_lr=1.0 is above learning_rate=0.001"),
    "schedule": ({"lr_decay_iters": 2}, "lr_decay_iters=2 is below warmup_iters=5"),
    "muon without a rate": (
        {"optimizer": "muon", "learning_rate": 0.0, "min_lr": 0.0},
        "muon needs learning_rate > 0",
    ),
    "odd heads": ({"position": "rope", "n_embd": 30, "n_head": 2}, "a head has 15"),
    "betas": ({"beta2": 1.0}, "must be below 1"),
    "no data": ({"dataset": "nowhere"}, "no dataset at 'nowhere'"),
    "short": ({"block_size": 1000}, "validation text has .* fewer than one sequence"),
    "nothing to resume": ({"init_from": "resume"}, "no checkpoint in .* train first"),
    "no gpu": ({"device": "cuda:77"}, "--device=cuda:77"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_configs_are_rejected_before_anything_is_written(config, case):
    changes, said = REFUSED[case]
    with pytest.raises(UserError, match=said):
        train.main(replace(config, **changes))
    assert not Path(config.out_dir).exists()


def test_dataset_with_another_tokenizer_is_rejected(config, tmp_path):
    train.main(replace(config, max_iters=2))
    other = write_dataset(tmp_path / "other", words(900).upper())
    with pytest.raises(UserError, match="a different tokenizer"):
        train.main(replace(config, init_from="resume", dataset=str(other), max_iters=5))


def test_resuming_on_another_machine_is_reported(config, capsys, monkeypatch):
    train.main(replace(config, max_iters=2))
    monkeypatch.setattr(runtime.numpy, "__version__", "9.9")
    train.main(replace(config, max_iters=3, init_from="resume"))
    assert "-> 9.9: resuming, but results will not be bitwise identical" in capsys.readouterr().out


# ----------------------------------------------------------------------------- as a subprocess


def command(config, **changes):
    changed = {k: v for k, v in vars(replace(config, **changes)).items() if v != getattr(train.Config, k)}
    return [sys.executable, str(ROOT / "train.py"), *(f"--{k}={v}" for k, v in changed.items())]


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send these signals to one process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_exits_with_75(config, number):
    arguments = command(config, max_iters=10**6, eval_interval=10**6)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("iter 3:"):
                process.send_signal(number)
                break
        _, err = process.communicate(timeout=20)
    assert process.returncode == 75
    assert err.strip().splitlines()[-1].startswith(f"stopped by {number.name} at iteration ")
    found = reader.find(Path(config.out_dir))[0]
    assert found.iter_num >= 4 and found.iter_num == len(logged(config.out_dir))


def test_exit_codes_and_one_line_errors(config, tmp_path):
    cases = [
        (["--eval_itres=3"], 2, "unknown option 'eval_itres'; did you mean 'eval_iters'?"),
        (["--device=cpu", "--dataset=nowhere"], 2, "no dataset at 'nowhere'"),
        (["--learning_rate=1e30", "--min_lr=0"], 70, "diverged: loss"),
    ]
    for arguments, code, said in cases:
        done = launch.run([*command(config)[1:], *arguments], ROOT)
        assert done.returncode == code
        assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1
        assert "Traceback" not in done.stderr


def test_options_are_parsed_without_torch(tmp_path):
    """--help, a typo and an unknown preset work where importing torch fails; that failure is one line."""
    (tmp_path / "torch.py").write_text(
        "raise ModuleNotFoundError('no torch', name='torch')", encoding="utf-8"
    )
    cases = [
        (["--help"], 0, ""),
        (["--max_itres=3"], 2, "error: --max_itres=3: unknown option 'max_itres'; did you mean 'max_iters'?"),
        (["config/none.py"], 2, "error: no preset 'config/none.py'"),
        ([], 2, "error: the package torch is not installed: pip install torch"),
    ]
    for arguments, code, said in cases:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "train.py", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


def test_out_of_memory_is_a_one_line_error(config, monkeypatch):
    def full(*arguments, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: ...")

    monkeypatch.setattr(train, "train_step", full)
    with pytest.raises(UserError, match="out of memory; try half the --batch_size"):
        train.main(config)


@pytest.mark.parametrize(
    "given",
    [
        {"n_layer": 4096, "n_embd": 65536, "n_head": 1},
        {"n_embd": 1024, "n_head": 8192, "head_dim": 8192, "n_layer": 512},
        {"batch_size": 10**9},
        {"vocab_multiple": 65536, "n_embd": 10**9, "n_head": 1},
    ],
)
def test_run_beyond_the_memory_of_the_device_is_rejected_before_anything_is_written(config, given):
    config = replace(config, out_dir=config.out_dir + "-large", **given)
    with pytest.raises(UserError, match=r"needs more than [\d,.]+ GB of memory, but [\d,.]+ GB are .* \(cpu"):
        train.main(config)
    assert not Path(config.out_dir).exists()


def test_lack_of_memory_outside_the_loop_is_one_line():
    code = "import sys\nfrom nanogpt.errors import run_program\nrun_program(lambda: bytearray(1 << 60))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: out of memory: choose smaller numbers\n")
