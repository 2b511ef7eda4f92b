"""Tests of checkpoints: atomic writes, verification and retention."""

import json
import multiprocessing
import random
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

import train
from benchmarks import fuzz_cases
from nanogpt import files
from nanogpt.checkpoint import reader, resume, writer
from nanogpt.convert import weights
from nanogpt.errors import Diverged, UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import Optimizer, build
from nanogpt.options import OptimizerOptions
from tests.power_cut import Disk

CONFIG = GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(CONFIG)


def build_adamw(model) -> Optimizer:
    return build(OptimizerOptions(), model.named_parameters())


def save_checkpoint(run_dir, model, iter_num, val_loss=None):
    with torch.no_grad():
        model.position.wpe.weight.fill_(iter_num)
    state = {"iter_num": iter_num, "val_loss": val_loss}
    return writer.Snapshot.of(model, build_adamw(model).state(), state).write(run_dir)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path, model):
    optimizer = build_adamw(model)
    for tensor in optimizer.state().values():
        tensor.normal_()
    before = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    writer.Snapshot.of(model, before, {"iter_num": 250, "val_loss": 1.5, "extra": [1, "ü"]}).write(tmp_path)
    checkpoint, errors = reader.find(tmp_path)
    assert names(tmp_path) == ["step-000250"] and not errors
    assert (
        checkpoint.iter_num == 250
        and checkpoint.state["extra"] == [1, "ü"]
        and checkpoint.model_config == CONFIG
    )
    loaded = checkpoint.load_model()
    assert not loaded.training
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b) and b.requires_grad, name
    for tensor in optimizer.state().values():
        tensor.zero_()
    resume.load_optimizer(checkpoint, optimizer.state())
    assert all(torch.equal(before[name], tensor) for name, tensor in optimizer.state().items())


def test_position_tables_are_rebuilt_on_load(tmp_path):
    for position in ("rope", "alibi"):
        torch.manual_seed(0)
        shape = {"vocab_size": 11, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 8}
        model = GPT(GPTConfig(**shape, position=position)).eval()
        put_at = tmp_path / position
        writer.Snapshot.of(model, {"steps": torch.zeros(())}, {"iter_num": 1, "val_loss": None}).write(put_at)
        loaded = reader.find(put_at)[0].load_model()
        assert {b.device.type for b in loaded.buffers()} == {"cpu"} and list(loaded.buffers())
        idx = torch.randint(11, (2, 8))
        assert torch.equal(loaded(idx)[0], model(idx)[0])


def test_keeps_the_best_and_the_two_newest(tmp_path, model):
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 2.5}
    kept = {10: [10], 20: [10, 20], 30: [20, 30], 40: [20, 30, 40], 50: [20, 40, 50]}
    for step, loss in losses.items():
        save_checkpoint(tmp_path, model, step, loss)
        assert names(tmp_path) == [f"step-{n:06d}" for n in kept[step]]
    assert reader.find(tmp_path, "best")[0].iter_num == 20
    assert reader.find(tmp_path, "last")[0].iter_num == 50
    assert reader.find(tmp_path, "40")[0].iter_num == 40
    with pytest.raises(UserError, match="no checkpoint '30'; use last, best or one of 20, 40, 50"):
        reader.find(tmp_path, "30")


def test_random_save_sequences_keep_the_best_and_the_newest(tmp_path, model):
    draw = random.Random(1)
    for trial in range(6):
        run, best, step = tmp_path / str(trial), (9.9, 0), 0
        for _ in range(12):
            step += draw.randint(1, 9)
            loss = draw.choice([None, draw.uniform(1, 3)])
            save_checkpoint(run, model, step, loss)
            best = min(best, (loss, step)) if loss else best
            assert reader.find(run)[0].iter_num == step
            assert not best[1] or reader.find(run, "best")[0].iter_num == best[1]
            assert len(names(run)) <= 3


def damage_in(path, kind, draw):
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    if kind == "flip":
        content[at] ^= 1 << draw.randrange(8)
    elif kind == "invert":
        content[at : at + 16] = bytes(b ^ 0xFF for b in content[at : at + 16])
    elif kind == "cut":
        del content[at:]
    elif kind == "grow":
        content += b"\0"
    path.unlink() if kind == "delete" else path.write_bytes(content)


def test_damage_is_detected_and_the_older_checkpoint_used(tmp_path, model):
    """300 random corruptions of all files: never loaded, never fatal."""
    save_checkpoint(tmp_path / "whole", model, 1, 2.0)
    save_checkpoint(tmp_path / "whole", model, 2, 1.0)
    draw = random.Random(0)
    files_there = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
    for trial in range(300):
        run = tmp_path / "damaged"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", run)
        name = files_there[trial % 4]
        damage_in(run / "step-000002" / name, draw.choice(["flip", "invert", "cut", "grow", "delete"]), draw)
        try:
            checkpoint, errors = reader.find(run)
        except UserError:
            pytest.fail(f"trial {trial}: gave up although step 1 is whole")
        if checkpoint.iter_num == 2:  # only whitespace in the manifest was changed
            assert name == "manifest.json" and not errors
            assert json.loads((run / "step-000002" / name).read_text("utf-8")) == json.loads(
                (tmp_path / "whole" / "step-000002" / name).read_text("utf-8")
            )
        else:
            assert checkpoint.iter_num == 1 and len(errors) == 1 and "step-000002" in errors[0]


def test_no_valid_checkpoint_is_an_error(tmp_path, model):
    assert reader.find(tmp_path) == (None, [])
    path = save_checkpoint(tmp_path, model, 1)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is valid"):
        reader.find(tmp_path)


def test_non_finite_weights_are_never_saved(tmp_path, model):
    save_checkpoint(tmp_path, model, 1)
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight[3, 3] = float("nan")
    with pytest.raises(Diverged, match=r"h\.0\.mlp\.c_fc\.weight holds non-finite weights at iteration 2"):
        save_checkpoint(tmp_path, model, 2)
    assert names(tmp_path) == ["step-000001"]


OPERATIONS = ("sync", "rename", "remove")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_disk_failure_at_any_point_keeps_the_old_checkpoint(tmp_path, model, monkeypatch, operation):
    """Fail the n-th call of each file operation, for every n that occurs in a save."""
    real = getattr(files, operation)
    for n in range(1, 40):
        run = tmp_path / f"{operation}{n}"
        save_checkpoint(run, model, 1, 2.0)
        save_checkpoint(run, model, 2, 1.0)
        calls = 0

        def failing(*arguments, n=n):
            nonlocal calls
            calls += 1
            if calls == n:
                raise OSError(28, "No space left on device")
            real(*arguments)

        monkeypatch.setattr(files, operation, failing)
        try:
            save_checkpoint(run, model, 3)
            failed = False
        except OSError:
            failed = True
        monkeypatch.setattr(files, operation, real)
        newest = reader.find(run)[0]
        assert newest.iter_num == 3 or (failed and newest.iter_num == 2)
        assert reader.find(run, "best")[0].iter_num == 2
        save_checkpoint(run, model, 4)
        assert names(run) == ["step-000002", "step-000003", "step-000004"] or newest.iter_num == 2
        if not failed:
            return
    pytest.fail("every save failed")


@pytest.mark.skipif(sys.platform != "linux", reason="maps file descriptors to paths through /proc")
def test_power_cut_leaves_the_old_or_the_new_checkpoint(tmp_path, model, monkeypatch):
    run = tmp_path / "run"
    save_checkpoint(run, model, 1, 2.0)
    disk = Disk(tmp_path / "run", monkeypatch, tmp_path / "left")
    save_checkpoint(run, model, 2, 1.0)
    newest = []
    for left in disk.moments:
        checkpoint, errors = reader.find(left)
        assert not errors and "optimizer.safetensors" in names(checkpoint.path)
        assert (checkpoint.load_model().position.wpe.weight == checkpoint.iter_num).all()
        newest.append(checkpoint.iter_num)
    assert newest == sorted(newest) and newest[0] == 1 and newest[-1] == 2
    assert reader.find(disk.survivors(tmp_path / "end"))[0].iter_num == 2


@pytest.mark.skipif(sys.platform != "linux", reason="maps file descriptors to paths through /proc")
def test_power_cut_leaves_the_old_or_the_new_text_file(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"old": 1}', encoding="utf-8")
    disk = Disk(folder, monkeypatch, tmp_path / "left")
    files.write_json(folder / "config.json", {"new": 2})
    left = [files.read_json(moment / "config.json") for moment in disk.moments]
    assert left[0] == {"old": 1} and left[-1] == {"new": 2} and len(left) >= 3


def test_json_is_never_written_in_place(tmp_path):
    """An open reader still sees the old content: the file is replaced, not overwritten."""
    path = tmp_path / "config.json"
    files.write_json(path, {"old": 1})
    with path.open(encoding="utf-8") as reader:
        files.write_json(path, {"new": 2})
        assert json.load(reader) == {"old": 1}
    assert files.read_json(path) == {"new": 2}


def test_full_disk_is_an_oserror_with_the_file_name(tmp_path, model, monkeypatch):
    save_checkpoint(tmp_path, model, 1)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise writer.SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors could not be written: .*No space left"):
        save_checkpoint(tmp_path, model, 2)
    assert names(tmp_path) == ["step-000001"]


def test_previous_run_is_moved_aside(tmp_path, model):
    run = tmp_path / "out"
    save_checkpoint(run, model, 5)
    lock, notice = writer.prepare_folder(run, files.lock(run), None, train.Config())
    lock.release()
    assert "out.1" in notice and names(tmp_path) == ["out", "out.1"]
    assert reader.find(tmp_path / "out.1")[0].iter_num == 5 and reader.find(run)[0] is None
    save_checkpoint(run, model, 6)
    lock, notice = writer.prepare_folder(run, files.lock(run), None, train.Config())
    lock.release()
    assert names(tmp_path) == ["out", "out.1", "out.2"]
    with pytest.raises(UserError, match=r"no checkpoint in .*out, but in out\.1 and out\.2: train first"):
        resume.resume(train.Config(out_dir=str(run), init_from="resume"), {}, set(), [])
    with pytest.raises(UserError, match=r"but in out\.1 and out\.2: give the --out_dir of a run"):
        weights.open_weights("resume", tmp_path, run)
    save_checkpoint(run, model, 7)
    # in the second iteration the run that is replaced has not saved a checkpoint
    for said in ("; it is kept in", "saved no checkpoint"):
        lock, notice = writer.prepare_folder(run, files.lock(run), None, train.Config(overwrite=True))
        (run / "config.json").write_text("{}", encoding="utf-8")
        lock.release()
        assert names(tmp_path) == ["out", "out.1", "out.2", "out.replaced"] and reader.find(run)[0] is None
        assert reader.find(tmp_path / "out.replaced")[0].iter_num == 7 and said in notice
    save_checkpoint(run, model, 8)
    assert names(tmp_path) == ["out", "out.1", "out.2"]


def test_previous_nanogpt_run_is_moved_aside(tmp_path):
    run = tmp_path / "out"
    run.mkdir()
    (run / "ckpt.pt").write_bytes(b"x")
    writer.prepare_folder(run, files.lock(run), None, train.Config())[0].release()
    assert (tmp_path / "out.1" / "ckpt.pt").exists()


def hold(folder, ready, done):
    with files.lock(folder):
        ready.set()
        done.wait(30)


def test_run_folder_is_locked_against_a_second_process(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "out", ready, done))
    process.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match="another process is writing to"):
        files.lock(tmp_path / "out")
    done.set()
    process.join()
    files.lock(tmp_path / "out").release()


def test_saved_tensors_load_with_safetensors_alone(tmp_path, model):
    path = save_checkpoint(tmp_path, model, 1)
    tensors = load_file(path / "model.safetensors")
    assert set(tensors) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"n_layer": "1"}}, "state.json: model: n_layer is '1', not a whole number"),
        ({"model": {"n_layer": 10**9}}, "does not describe a valid model"),
        ({"model": {"vocab_size": 0}}, "does not describe a valid model"),
        ({"model": {"block_size": -1}}, "does not describe a valid model"),
        ({"model": {"norm": "batch"}}, "does not describe a valid model"),
        ({"model": {"unknown": 1}}, "state.json: model options of a newer version: unknown"),
        ({"val_loss": "low"}, "state.json: val_loss is 'low', not "),
        ({"iter_num": -1}, "state.json: iter_num is -1, not a whole number"),
        ({"options": [1]}, r"state.json: options is \[1\], not an object"),
        ({"lora": {"rank": 2}}, "state.json: lora: alpha is None, not a finite number"),
    ],
)
def test_invalid_state_with_a_matching_manifest_is_an_error_of_one_line(tmp_path, model, change, message):
    path = save_checkpoint(tmp_path, model, 3)
    state = files.read_json(path / "state.json")
    changed = state | {k: {**state[k], **v} if k == "model" else v for k, v in change.items()}
    files.write_json(path / "state.json", changed)
    fuzz_cases.sign(path)
    with pytest.raises(UserError, match=message):
        reader.verify(path).load_model()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_damaged_tensors_with_a_matching_manifest_are_an_error_of_one_line(tmp_path, model, name):
    path = save_checkpoint(tmp_path, model, 3)
    (path / name).write_bytes((path / name).read_bytes()[:100])
    fuzz_cases.sign(path)
    checkpoint = reader.verify(path)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        checkpoint.load_model()
        resume.load_optimizer(checkpoint, build_adamw(model).state())
