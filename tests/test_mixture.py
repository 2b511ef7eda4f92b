"""Dataset mixtures: exact proportions, per-dataset order, and runs that resume and shard as usual."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from nanogpt import metrics
from nanogpt.checkpoint import reader
from nanogpt.data import loader, mixture
from nanogpt.data.mixture_sampler import CYCLE, MixtureSampler, slots
from nanogpt.data.samplers import EpochSampler
from nanogpt.errors import UserError
from nanogpt.tokenizer import vocabulary
from nanogpt.world import World
from tests.conftest import words, write_dataset

CPU = torch.device("cpu")
SIZES = (1001, 4001, 500)


def mixed(weights: list[str], seed: int = 5) -> MixtureSampler:
    offsets = [0, *np.cumsum(SIZES).tolist()]
    orders = [EpochSampler(size, 16, seed) for size in SIZES[: len(weights)]]
    return MixtureSampler(orders, [Fraction(w) for w in weights], offsets[: len(weights)])


def text_of(starts: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(SIZES), starts, side="right")


@pytest.mark.parametrize("weights", [["0.7", "0.3"], ["1", "1", "1"], ["0.5", "0.49", "0.01"], ["3", "1/7"]])
def test_every_sample_range_has_exact_proportions(weights):
    order, shares = mixed(weights), np.array([float(Fraction(w)) for w in weights])
    shares /= shares.sum()
    drawn = text_of(order.starts(0, 30_000))
    for first, count in ((0, 12), (17, 480), (1234, 100), (0, 30_000), (29_000, 7)):
        got = np.bincount(drawn[first : first + count], minlength=len(weights))
        assert np.abs(got - shares * count).max() <= 2
    cycle = len(order.datasets)
    assert (np.bincount(drawn[:cycle], minlength=len(weights)) == shares * cycle).all()


def test_each_dataset_is_read_in_its_own_order():
    """No sequence repeats before its dataset has been read completely."""
    order = mixed(["0.6", "0.3", "0.1"])
    starts = order.starts(0, 10_000)
    drawn = text_of(starts)
    for which, (offset, one) in enumerate(zip(order.offsets, order.samplers, strict=True)):
        own = starts[drawn == which] - offset
        assert (own == one.starts(0, len(own))).all()
        assert order.epochs(10_000)[which] == len(own) / one.n_sequences
        first = own[: one.n_sequences]
        assert len(set(first.tolist())) == one.n_sequences
        assert (own >= 0).all() and (own + 16 < SIZES[which]).all()  # never across a dataset boundary


def test_samples_are_independent_of_request_size():
    order, rng = mixed(["0.7", "0.2", "0.1"]), np.random.default_rng(0)
    whole = order.starts(0, 3000)
    for _ in range(200):
        first, count = int(rng.integers(0, 2800)), int(rng.integers(1, 200))
        assert (order.starts(first, count) == whole[first : first + count]).all()
    far = 10**12
    assert (order.starts(far, 50)[20:] == mixed(["0.7", "0.2", "0.1"]).starts(far + 20, 30)).all()
    assert (mixed(["0.7", "0.2", "0.1"], seed=6).starts(0, 3000) != whole).any()


def test_slots_are_exact_or_nearest():
    assert slots([Fraction("0.7"), Fraction("0.3")]) == [7, 3]
    assert slots([Fraction(2), Fraction(2)]) == [1, 1]
    found = slots([Fraction(987_654_321), Fraction(123_456_789), Fraction(1)])
    assert sum(found) == pytest.approx(CYCLE, abs=2) and found[2] == 1
    assert found[0] / found[1] == pytest.approx(8.0, rel=1e-3)


# ----------------------------------------------------------------------------- datasets


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    text = words(3000)
    cut = len(text) // 2
    letters = "".join(sorted(set(text)))  # both have the full alphabet, so the same tokenizer
    one = write_dataset(tmp_path / "one", text[:cut] + letters)
    return one, write_dataset(tmp_path / "two", text[cut : cut + 3000] + letters, val_fraction=0.3)


def test_names_and_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mixture.parse("a") == [("a", None)]
    assert mixture.parse("a:0.7, b:.3") == [("a", Fraction(7, 10)), ("b", Fraction(3, 10))]
    assert mixture.parse("data/a,c:/b") == [("data/a", None), ("c:/b", None)]
    assert mixture.parse("c:/b:2,d:1/3") == [("c:/b", 2), ("d", Fraction(1, 3))]
    (tmp_path / "odd,name:1").mkdir()
    assert mixture.parse("odd,name:1") == [("odd,name:1", None)]
    for wrong, said in (
        ("a:0.5,b", "gives weights to some"),
        ("a:0,b:1", "'a:0' is not NAME or NAME:WEIGHT with a weight above 0"),
        ("a:-1,b:1", "weight above 0"),
        ("a,,b", "'' is not NAME"),
    ):
        with pytest.raises(UserError, match=said):
            mixture.parse(wrong)


def test_batches_follow_the_weights_at_any_world_size(folders):
    one, two = folders
    found = mixture.load(f"{one}:0.75,{two}:0.25", Path())
    assert len(found.train) == sum(len(loader.load(folder).train) for folder in folders)
    whole = loader.TrainBatches(found.train, 16, 12, 1, 3, CPU)
    for step in (0, 5):
        rows = next(whole.step(step))[0]
        of_one = whole.sampler.starts(12 * step, 12) < len(loader.load(one).train)
        assert of_one.sum() == 9
        parts = []
        for rank in range(5):  # not divisible
            batches = loader.TrainBatches(found.train, 16, 2, 6, 3, CPU, world=World(rank, 5))
            parts += [idx for idx, _ in batches.step(step)]
        assert torch.equal(torch.cat(parts), rows)


def test_losses_by_other_weights_are_of_other_data(folders):
    a, b = folders[:2]
    hashes = [mixture.load(name, Path()).hashes for name in (f"{a}:1,{b}:3", f"{a}:1,{b}:3", f"{a}:3,{b}:1")]
    assert hashes[0] == hashes[1] and hashes[0]["val"] != hashes[2]["val"]


def test_default_weights_are_token_counts(folders):
    found = mixture.load(",".join(map(str, folders)), Path()).train
    sizes = [len(member) for member in found.texts]
    assert [float(text.weight) for text in found.texts] == pytest.approx(np.array(sizes) / sum(sizes))


def test_incompatible_datasets_are_rejected(folders, tmp_path, bare_tokens):
    one, two = folders
    with pytest.raises(
        UserError, match=r"bare \(50257 ids\) has a different tokenizer from .*one \(10 ids\)"
    ):
        mixture.load(f"{one}:1,{bare_tokens}:1", Path())
    with pytest.raises(UserError, match="twice; give it once, with a larger weight"):
        mixture.load(f"{one}:1,{one}/:1", Path())
    with pytest.raises(UserError, match="no dataset at 'none'"):
        mixture.load(f"{one}:1,none:1", tmp_path)
    meta = json.loads((two / "meta.json").read_text(encoding="utf-8"))
    for split, about in meta["splits"].items():
        (two / f"{split}.mask.bin").write_bytes(b"\1" * about["tokens"])
        about["mask"] = {"name": f"{split}.mask.bin"}
    (two / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(UserError, match=r"only one of .* holds prompts and responses"):
        mixture.load(f"{one}:1,{two}:1", Path())
    short = write_dataset(tmp_path / "short", "ab" * 30)
    other = write_dataset(tmp_path / "other", "ab" * 300)
    with pytest.raises(UserError, match="validation text of short has 6 tokens, fewer than one sequence"):
        loader.require_sequence(mixture.load(f"{other}:1,{short}:1", Path()).val, 16, "validation")


def test_masks_of_both_datasets_are_used(folders):
    for number, folder in enumerate(folders):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        for split, about in meta["splits"].items():
            mask = np.arange(about["tokens"]) % 7 < 3 + number
            (folder / f"{split}.mask.bin").write_bytes(mask.astype("u1").tobytes())
            about["mask"] = {"name": f"{split}.mask.bin"}
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    found = mixture.load(f"{folders[0]}:1,{folders[1]}:1", Path())
    batches = loader.TrainBatches(found.train, 16, 4, 1, 1, CPU)
    starts = batches.sampler.starts(0, 4)
    _, targets = next(batches.step(0))
    first = len(found.train.texts[0])
    for start, row in zip(starts, targets, strict=True):
        own, most = (start, 3) if start < first else (start - first, 4)
        assert ((row != loader.IGNORE).numpy() == ((own + 1 + np.arange(16)) % 7 < most)).all()


def test_llmc_shards_and_bare_files_mix(bare_tokens, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    header = np.zeros(256, "<i4")
    for split in ("train", "val"):
        ids = np.arange(1000, dtype="<u2")
        header[:3] = 20240520, 1, len(ids)
        (shards / f"x_{split}_000001.bin").write_bytes(header.tobytes() + ids.tobytes())
    found = mixture.load(f"{shards}:1,{bare_tokens}:3", Path())
    assert vocabulary.identify(found.tokenizer).kind == "gpt2" and found.bytes_per_token is None
    assert found.train.read(995, 10)[:5].tolist() == [995, 996, 997, 998, 999]
    drawn = loader.TrainBatches(found.train, 16, 40, 1, 1, CPU).sampler.starts(0, 40)
    assert (drawn < 1000).sum() == 10


# ----------------------------------------------------------------------------- runs


@pytest.fixture
def config(folders, tmp_path) -> train.Config:
    return train.Config(
        dataset=f"{folders[0]}:0.7,{folders[1]}:0.3",
        out_dir=str(tmp_path / "out"),
        device="cpu",
        dtype="float32",
        n_layer=1,
        n_head=2,
        n_embd=16,
        block_size=16,
        batch_size=5,
        gradient_accumulation_steps=2,
        max_iters=12,
        warmup_iters=1,
        lr_decay_iters=12,
        eval_interval=6,
        eval_iters=1000,
        dropout=0.1,
        batch_ramp_tokens=640,
    )


def test_run_reports_each_dataset_and_resume_is_bit_identical(config, tmp_path, folders, capsys):
    train.main(config)
    said = capsys.readouterr().out
    assert "one (70.0%)" in said and "two (30.0%)" in said and ", one " in said and ", two " in said
    rows = [row for row in metrics.read(tmp_path / "out") if row["event"] == "eval"]
    assert len(rows) == 3
    for row in rows:
        losses = row["val_losses"]
        assert row["val_loss"] == pytest.approx(0.7 * losses["one"] + 0.3 * losses["two"])
    train.main(replace(config, out_dir=str(tmp_path / "half"), max_iters=6))
    train.main(replace(config, out_dir=str(tmp_path / "half"), init_from="resume"))
    whole, halves = (reader.find(tmp_path / name)[0].path for name in ("out", "half"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (whole / name).read_bytes() == (halves / name).read_bytes()
    capsys.readouterr()
    evaluation.main(evaluation.Config(out_dir=str(tmp_path / "out"), which="last", device="cpu"))
    said = capsys.readouterr().out  # default: the dataset of the run
    for name, loss in rows[-1]["val_losses"].items():
        assert f"{name}/val: loss {loss:.4f}" in said
