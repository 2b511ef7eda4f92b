"""Finetuning: early stopping, frozen weights, and adapters that resume and merge."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import export
import sample
import train
from nanogpt import metrics
from nanogpt.checkpoint import reader
from nanogpt.convert import weights
from nanogpt.errors import Stopped, UserError
from nanogpt.finetune import lora
from tests.conftest import small_run, words, write_dataset


@pytest.fixture
def config(dataset, tmp_path):
    return small_run(
        dataset, tmp_path / "out", batch_size=4, max_iters=12, warmup_iters=2, eval_interval=4, eval_iters=2
    )


def tensors(out: str, step: int, kind: str = "model") -> dict[str, torch.Tensor]:
    return load_file(Path(out) / f"step-{step:06d}" / f"{kind}.safetensors")


# ----------------------------------------------------------------------------- early stopping


@pytest.fixture
def overfitting(config, tmp_path):
    """A config that memorizes 300 training characters and is validated on different text."""
    data = write_dataset(tmp_path / "short", words(200), val_fraction=0.7)
    return replace(
        config, dataset=str(data), max_iters=400, learning_rate=5e-3, decay_lr=False, eval_interval=5
    )


def test_early_stopping_keeps_the_best_and_is_reported(overfitting, capsys):
    train.main(replace(overfitting, patience=3, always_save_checkpoint=False))
    said = capsys.readouterr().out
    last, best = (reader.find(Path(overfitting.out_dir), which)[0] for which in ("last", "best"))
    assert last.iter_num == best.iter_num + 3 * 5 < 400
    assert last.state["stale"] == 3 and best.state["stale"] == 0
    assert "early stopping: no improvement in 3 evaluations" in said
    assert f"best validation loss {best.state['val_loss']:.4f} at iteration {best.iter_num}: train" in said
    assert f"at the end, iteration {last.iter_num}" in said and "overfitting" in said
    opened = weights.open_weights("resume", Path(), Path(overfitting.out_dir))
    assert opened.iter_num == best.iter_num  # the checkpoint that sample.py, eval.py and export.py open


def test_resume_keeps_the_patience_counter(overfitting, tmp_path, monkeypatch, capsys):
    straight = replace(overfitting, patience=3, out_dir=str(tmp_path / "straight"))
    train.main(straight)
    expected = reader.find(Path(straight.out_dir))[0].iter_num
    with monkeypatch.context() as patch:
        patch.setattr(train.time, "perf_counter", iter(range(10**6)).__next__)  # 1 s per call
        for _ in range(200):
            try:
                train.main(replace(overfitting, patience=3, init_from="auto", max_minutes=30 / 60))
                break
            except Stopped:
                continue
    assert reader.find(Path(overfitting.out_dir))[0].iter_num == expected
    capsys.readouterr()
    again = {"init_from": "", "out_dir": ""}
    train.main(replace(overfitting, init_from="resume"), again)
    assert "raise it to resume" in capsys.readouterr().out
    train.main(replace(overfitting, init_from="resume", patience=4), again | {"patience": "--patience=4"})
    assert reader.find(Path(overfitting.out_dir))[0].iter_num > expected


def test_final_line_of_a_run():
    rows = [{"event": "step", "iter": 0}]
    assert metrics.gap(rows) == ""
    rows += [
        {"event": "eval", "iter": i, "train_loss": t, "val_loss": v} for i, t, v in [(0, 4, 4), (5, 2, 3)]
    ]
    assert metrics.gap(rows) == (
        "best validation loss 3.0000 at iteration 5: train 2.0000, val 3.0000, gap +1.0000"
    )


# ----------------------------------------------------------------------------- freezing


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({"freeze": "wte*,h.0.*"}, {"position.wpe.weight", "h.1.", "ln_f."}),
        ({"train_only": "*ln_*"}, {"ln_f.", "h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2"}),
        ({"train_only": "h.*", "freeze": "h.0.*", "optimizer": "muon"}, {"h.1."}),
        ({"train_only": "h.1.mlp.c_fc.weight", "optimizer": "muon"}, {"h.1.mlp.c_fc.weight"}),
    ],
)
def test_frozen_weights_are_bit_identical(config, tmp_path, options, moved):
    train.main(replace(config, max_iters=1))
    tuned = replace(config, init_from=config.out_dir, out_dir=str(tmp_path / "tuned"), **options)
    train.main(tuned, {"init_from": "", **dict.fromkeys(options, "")})
    before, after = tensors(config.out_dir, 1), tensors(tuned.out_dir, 12)
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    assert differ == {name for name in before if name.startswith(tuple(moved))}
    state = tensors(tuned.out_dir, 12, "optimizer")
    assert not any(name.startswith(tuple(before.keys() - differ)) for name in state)  # no state


def test_patterns_without_a_match_are_rejected(config):
    with pytest.raises(UserError, match=r"--freeze: no parameter matches 'transformer.wte'; there are wte"):
        train.main(replace(config, freeze="h.0.*,transformer.wte"))
    with pytest.raises(UserError, match=r"leaves nothing to train.*there are wte.weight, position"):
        train.main(replace(config, freeze="*"))
    assert not Path(config.out_dir).exists()


def test_muon_without_matrices_falls_back_to_adamw(config, capsys):
    train.main(replace(config, optimizer="muon", train_only="wte*,*ln_*"))
    said = capsys.readouterr().out
    assert "no trainable matrices for Muon" in said and "trainable parameters" in said
    assert "muon.steps" not in tensors(config.out_dir, 12, "optimizer")


# ----------------------------------------------------------------------------- adapters


@pytest.fixture
def base(config):
    train.main(config)
    return config


def test_only_adapters_are_trained_and_resume_is_bit_identical(base, tmp_path):
    tuned = replace(base, init_from=base.out_dir, lora_rank=4, optimizer="muon", dropout=0.1)
    origins = {"init_from": "", "lora_rank": ""}
    straight, broken = (replace(tuned, out_dir=str(tmp_path / name)) for name in ("straight", "broken"))
    train.main(straight, dict(origins))
    train.main(replace(broken, max_iters=5, lr_decay_iters=12), dict(origins))
    train.main(
        replace(broken, init_from="resume"), {"init_from": "", "out_dir": "", "max_iters": "--max_iters=12"}
    )
    for kind in ("model", "optimizer"):
        one, two = (tensors(run.out_dir, 12, kind) for run in (straight, broken))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    before, after = tensors(base.out_dir, 12), tensors(straight.out_dir, 12)
    assert all(torch.equal(before[name], after[name]) for name in before)
    added = after.keys() - before.keys()
    assert len(added) == 2 * 3 * 2 and all(lora.is_adapter(name) for name in added)
    assert all(after[name].abs().max() > 0 for name in added)  # B is initialized to 0
    with pytest.raises(UserError, match="lora_rank=8 given, lora_rank=4 saved"):
        train.main(
            replace(broken, init_from="resume", lora_rank=8),
            {"init_from": "", "out_dir": "", "lora_rank": ""},
        )


def test_exported_model_is_merged(base, tmp_path, capsys):
    tuned = replace(base, init_from=base.out_dir, out_dir=str(tmp_path / "tuned"), lora_rank=4, max_iters=40)
    tuned = replace(tuned, learning_rate=1e-2)
    train.main(tuned, {"init_from": "", "lora_rank": ""})
    inside = reader.find(Path(tuned.out_dir), "best")[0].load_model()
    found = weights.open_weights("resume", Path(), Path(tuned.out_dir))
    outside = found.load(found.fitted())
    assert not any(lora.is_adapter(name) for name, _ in outside.named_parameters())
    idx = torch.arange(10)[None]
    with torch.no_grad():
        assert (inside(idx)[0] - outside(idx)[0]).abs().max() < 1e-5
    capsys.readouterr()
    sample.main(sample.Config(out_dir=tuned.out_dir, num_samples=1, max_new_tokens=5, device="cpu"))
    assert capsys.readouterr().out.count("-" * 15) == 1
    export.main(export.Config(to=str(tmp_path / "nanogpt"), format="nanogpt", out_dir=tuned.out_dir))
    back = weights.open_weights(str(tmp_path / "nanogpt"), Path(), Path())
    with torch.no_grad():
        assert torch.equal(back.load(back.fitted())(idx)[0], outside(idx)[0])


def test_adapters_and_freezing_are_mutually_exclusive(config):
    with pytest.raises(UserError, match="--lora_rank freezes all weights"):
        train.main(replace(config, lora_rank=2, freeze="wte*"))
