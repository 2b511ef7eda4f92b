"""Tests of token files and of the order of batches."""

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from nanogpt.data import loader
from nanogpt.errors import UserError
from tests.conftest import small_run, write_dataset

CPU = torch.device("cpu")


def tokens_of(values, tmp_path: Path, vocab_size=65536) -> loader.Tokens:
    path = tmp_path / "tokens.bin"
    np.asarray(values, dtype="<u2").tofile(path)
    return loader.Tokens([loader.TokenFile(path, np.dtype("<u2"), 0, len(values))], vocab_size)


@pytest.mark.parametrize("split", [(12, 1), (6, 2), (4, 3), (1, 12)])
def test_samples_of_a_step_are_independent_of_micro_batch_size(tmp_path, split):
    tokens = tokens_of(np.arange(4000) % 5000, tmp_path)
    batch_size, micro_steps = split
    batches = loader.TrainBatches(tokens, 8, batch_size, micro_steps, 1, CPU)
    got = [torch.cat([idx for idx, _ in batches.step(step)]) for step in (0, 1, 77)]
    whole = loader.TrainBatches(tokens, 8, 12, 1, 1, CPU)
    for rows, step in zip(got, (0, 1, 77), strict=True):
        assert torch.equal(rows, next(whole.step(step))[0])


def test_batch_ramp_up_reads_every_sample_once_in_order(tmp_path):
    """For any sizes of the first batches: no sequence is skipped or read twice."""
    tokens = tokens_of(np.arange(4000) % 5000, tmp_path)
    ramp = loader.TrainBatches(tokens, 8, 5, 3, 1, CPU, ramp=[2, 5, 7, 13])
    plain = loader.TrainBatches(tokens, 8, 1, 1, 1, CPU)
    got = [[idx for idx, _ in ramp.step(step)] for step in range(7)]
    assert [[len(idx) for idx in micro] for micro in got[:4]] == [[2], [5], [5, 2], [5, 5, 3]]
    assert [sum(map(len, micro)) for micro in got] == [ramp.sequences(i) for i in range(7)]
    rows = torch.cat([idx for micro in got for idx in micro])
    assert len(rows) == 2 + 5 + 7 + 13 + 3 * 15 == ramp.sequences_before(7)
    assert torch.equal(rows, torch.cat([next(plain.step(i))[0] for i in range(len(rows))]))
    assert ramp.tokens_before(4) == 27 * 8 and ramp.tokens_before(0) == 0


def test_sequences_weigh_the_same_in_a_smaller_last_micro_batch(tmp_path):
    """Steps of 12 and 7 sequences in micro-batches of 5: 5, 5, 2 and 5, 2."""
    tokens = tokens_of(np.arange(4000) % 60, tmp_path)
    batches = loader.TrainBatches(tokens, 8, 5, 3, 1, CPU, ramp=[12, 7])
    for step, rows in ((0, [5, 5, 2]), (1, [5, 2]), (2, [5, 5, 5])):
        weighted = list(batches.weighted(step))
        assert [len(idx) for _, (idx, _) in weighted] == rows
        assert [weight for weight, _ in weighted] == [count / sum(rows) for count in rows]


def test_targets_are_the_next_tokens(tmp_path):
    tokens = tokens_of(np.arange(1000), tmp_path)
    idx, targets = next(loader.TrainBatches(tokens, 16, 5, 1, 1, CPU).step(3))
    assert idx.shape == targets.shape == (5, 16) and idx.dtype == torch.int64
    assert torch.equal(targets, idx + 1)
    assert torch.equal(idx, idx[:, :1] + torch.arange(16))


def test_evaluation_scores_every_token_once(tmp_path):
    tokens = tokens_of(np.arange(1003), tmp_path)
    for batch_size in (1, 7, 64):
        scored = []
        for idx, targets in loader.eval_batches(tokens, 16, batch_size, 10**6, CPU):
            assert torch.equal(targets[targets >= 0], idx[targets >= 0] + 1)
            scored += targets[targets >= 0].tolist()
        assert scored == list(range(1, 1003))


def test_partial_evaluation_is_evenly_spread(tmp_path):
    tokens = tokens_of(np.arange(1003), tmp_path)
    first = [idx[:, 0] for idx, _ in loader.eval_batches(tokens, 16, 4, 10, CPU)]
    starts = torch.cat(first).tolist()
    assert len(starts) == 10 and starts[0] == 0 and starts[-1] == 61 * 16
    assert max(np.diff(starts)) - min(np.diff(starts)) <= 16


# ----------------------------------------------------------------------------- files


def test_reads_a_prepared_folder(dataset):
    found = loader.load(dataset)
    assert found.vocab_size == 10 and found.bytes_per_token == 1.0
    assert found.train.read(0, 5).tolist() == np.fromfile(dataset / "train.bin", "<u2")[:5].tolist()


def test_bytes_per_token_of_the_validation_text(tmp_path):
    text = "ab" * 900 + "é" * 150 + "a" * 50  # the last tenth: 200 characters, 350 bytes
    assert loader.load(write_dataset(tmp_path / "data", text)).bytes_per_token == 350 / 200


def test_reads_bare_files_as_gpt2_tokens(bare_tokens):
    found = loader.load(bare_tokens)
    assert found.vocab_size == 50257 and found.bytes_per_token is None and len(found.train) == 2500


def test_a_run_says_that_bare_files_are_taken_for_gpt2_tokens(bare_tokens, tmp_path, capsys):
    train.main(small_run(bare_tokens, tmp_path / "out", max_iters=1, eval_iters=1, batch_size=1))
    assert "vocabulary 50,257 (of GPT-2, without a meta.pkl)" in capsys.readouterr().out


def test_reads_nanogpts_meta_pkl(bare_tokens):
    np.zeros(50, "<u2").tofile(bare_tokens / "train.bin")
    np.ones(50, "<u2").tofile(bare_tokens / "val.bin")
    meta = {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}
    (bare_tokens / "meta.pkl").write_bytes(pickle.dumps(meta))
    found = loader.load(bare_tokens)
    assert found.vocab_size == 2 and '"a", "b"' in found.tokenizer


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: {"itos": {0: p}}, lambda p: [[p]]])
def test_pickle_with_code_is_rejected_and_not_executed(bare_tokens, tmp_path, wrap):
    marker = tmp_path / "HACKED"
    (bare_tokens / "meta.pkl").write_bytes(pickle.dumps(wrap(Payload(marker))))
    with pytest.raises(UserError, match=r"meta\.pkl is not nanoGPT's table"):
        loader.load(bare_tokens)
    assert not marker.exists()


@pytest.mark.parametrize("itos", [{0: 1, 1: 2}, {0: "ab", 2: "c"}, {0: "a", 1: "a"}, {0: b"a", 1: "b"}])
def test_pickle_without_a_character_table_is_reported(bare_tokens, itos):
    (bare_tokens / "meta.pkl").write_bytes(pickle.dumps({"itos": itos}))
    with pytest.raises(UserError, match=r"meta\.pkl is not nanoGPT's table of characters: "):
        loader.load(bare_tokens)


@pytest.mark.parametrize("size", [0, -3, 1 << 40, 2.5, "300", None, [300]])
def test_vocabulary_sizes_that_cannot_be_are_reported(bare_tokens, size):
    (bare_tokens / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": size}))
    with pytest.raises(UserError, match=r"meta\.pkl is not nanoGPT's table of characters: "):
        loader.load(bare_tokens)


NOTES = [f"note{i}" for i in range(300)]
TABLES = {
    "size": {"vocab_size": 300},
    "words": {"vocab_size": 300, "itos": dict(enumerate(NOTES)), "stoi": {n: i for i, n in enumerate(NOTES)}},
}


@pytest.mark.parametrize("table", TABLES)
def test_own_token_ids_train_and_sample(tmp_path, table, capsys):
    """nanoGPT's way for a vocabulary that is not text: MIDI, chess moves, word lists."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "meta.pkl").write_bytes(pickle.dumps(TABLES[table]))
    draw = np.random.default_rng(0)
    for split, count in (("train", 3000), ("val", 500)):
        draw.integers(0, 300, count).astype("<u2").tofile(folder / f"{split}.bin")
    train.main(small_run(folder, tmp_path / "out", max_iters=2, eval_iters=1, batch_size=4))
    names = ["note3", "note17"] if table == "words" else ["3", "17"]
    capsys.readouterr()
    given = {"out_dir": str(tmp_path / "out"), "num_samples": 1, "max_new_tokens": 5, "device": "cpu"}
    sample.main(sample.Config(**given, start=" ".join(names)))
    shown = capsys.readouterr().out.split("---")[0].split()
    known = set(NOTES) if table == "words" else {str(i) for i in range(300)}
    assert shown[:2] == names and len(shown) == 7 and set(shown) <= known
    sample.main(sample.Config(**given))  # the default prompt is a newline
    assert set(capsys.readouterr().out.split("---")[0].split()) <= known
    with pytest.raises(UserError, match="'x' is not a token; there are 300: "):
        sample.main(sample.Config(**given, start="x"))


@pytest.mark.parametrize("name", ["eval", "getattr", "print", "__import__", "bytearray"])
def test_pickle_that_names_a_builtin_is_rejected(bare_tokens, name):
    (bare_tokens / "meta.pkl").write_bytes(b"\x80\x04cbuiltins\n" + name.encode() + b"\n.")
    with pytest.raises(
        UserError, match=rf"meta\.pkl is not nanoGPT's table .* it refers to builtins\.{name}"
    ):
        loader.load(bare_tokens)


def test_reads_shards_as_one_token_sequence(bare_tokens):
    ids = np.fromfile(bare_tokens / "train.bin", "<u2")
    (bare_tokens / "train.bin").unlink()
    for i, part in enumerate(np.split(ids, [700, 1500])):
        part.tofile(bare_tokens / f"train_{i:06d}.bin")
    found = loader.load(bare_tokens)
    assert len(found.train) == 2500
    assert (found.train.read(650, 1000) == ids[650:1650]).all()


def test_reads_llmc_and_numpy_shards(bare_tokens, tmp_path):
    ids = np.fromfile(bare_tokens / "train.bin", "<u2")
    llmc, arrays = tmp_path / "llmc", tmp_path / "arrays"
    llmc.mkdir()
    arrays.mkdir()
    for split in ("train", "val"):
        header = struct.pack("<3i", 20240520, 1, len(ids)).ljust(1024, b"\0")
        (llmc / f"fineweb_{split}_000001.bin").write_bytes(header + ids.tobytes())
        np.save(arrays / f"edufineweb_{split}_000001.npy", ids)
    for folder in (llmc, arrays):
        found = loader.load(folder)
        assert len(found.train) == 2500 and (found.train.read(0, 2500) == ids).all()


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def set_meta(folder: Path, **changes) -> None:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps(meta | changes), encoding="utf-8")


FAULTS = {
    "odd length": (lambda f: cut(f / "train.bin", 1001), "train.bin is truncated"),
    "cut": (lambda f: cut(f / "train.bin", 1000), "train holds 500 tokens, meta.json lists"),
    "empty": (lambda f: cut(f / "val.bin", 0), "val holds 0 tokens"),
    "missing": (lambda f: (f / "val.bin").unlink(), "has no val.bin"),
    "id outside": (
        lambda f: np.full(len(np.fromfile(f / "val.bin", "<u2")), 10, "<u2").tofile(f / "val.bin"),
        r"token 0 of .*val\.bin is id 10, outside the vocabulary of 10",
    ),
    "other format": (lambda f: set_meta(f, format="x"), "does not have format"),
    "broken meta": (lambda f: cut(f / "meta.json", 20), "not valid JSON"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "other tokenizer": (
        lambda f: (f / "tokenizer.json").write_text(
            '{"format": "nanogpt-tokenizer-1", "type": "byte"}', encoding="utf-8"
        ),
        "is not the tokenizer that made this data",
    ),
    "no tokenizer at all": (lambda f: cut(f / "tokenizer.json", 9), "is not a tokenizer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_detected_before_training(dataset, fault):
    damage, said = FAULTS[fault]
    damage(dataset)
    with pytest.raises(UserError, match=said):
        loader.load(dataset)


def test_file_that_shrinks_while_open_is_reported(dataset):
    tokens = loader.load(dataset).train
    cut(dataset / "train.bin", 100)
    with pytest.raises(UserError, match="became shorter"):
        tokens.read(0, 1000)


def test_missing_dataset_error_lists_available_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data" / "mine", "abcdefgh" * 100)
    assert loader.find("mine", tmp_path) == loader.find("data/mine", tmp_path) == Path("data/mine")
    with pytest.raises(UserError, match="no dataset at 'other': prepared here: mine"):
        loader.find("other", tmp_path)
    (tmp_path / "data" / "known").mkdir()
    (tmp_path / "data" / "known" / "prepare.py").touch()
    (tmp_path / "a b.txt").write_text("a text", encoding="utf-8")
    own = r'prepare\.py "a b\.txt" --out=data/mine, then --dataset=data/mine'
    with pytest.raises(UserError, match=own):
        loader.find("a b.txt", tmp_path)
    own = r"; for your own text .* PATH --out=data/mine, then --dataset=data/mine"
    with pytest.raises(UserError, match=rf"not prepared: python data/known/prepare\.py{own}"):
        loader.find("known", tmp_path)


def test_memory_does_not_grow_with_tokens_read(tmp_path):
    """Reading 20,000 sequences spread over a 64 MB file leaves at most 8 MB resident."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        pytest.skip("resident memory is not available on this system")
    path = tmp_path / "tokens.bin"
    np.zeros(32 << 20, dtype="<u2").tofile(path)
    tokens = loader.Tokens([loader.TokenFile(path, np.dtype("<u2"), 0, 32 << 20)], 1)
    batches = loader.TrainBatches(tokens, 256, 20, 1, 1, CPU)
    for step in range(20):
        list(batches.step(step))
    before = int(pages.read_text().split()[1])
    for step in range(20, 1000):
        list(batches.step(step))
    assert (int(pages.read_text().split()[1]) - before) * 4096 < 8 << 20


def test_split_shorter_than_a_sequence_is_rejected(tmp_path):
    loader.require_sequence(tokens_of(range(17), tmp_path), 16, "training")
    with pytest.raises(UserError, match="training text has 16 tokens, fewer than one sequence"):
        loader.require_sequence(tokens_of(range(16), tmp_path), 16, "training")
