"""Large shard sets: opened lazily, few at a time, validated on opening; up to 10 TB of sparse files."""

import json
import os
import pickle
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from nanogpt.data import loader, token_files
from nanogpt.data.samplers import EpochSampler
from nanogpt.errors import UserError
from nanogpt.prepare import shards
from nanogpt.tokenizer import vocabulary
from nanogpt.world import World

CPU = torch.device("cpu")


def write_shards(folder: Path, count: int, tokens: int = 64, headers: bool = True) -> np.ndarray:
    """Write llm.c shards, the last one half as long; return all their ids."""
    folder.mkdir()
    ids = np.random.default_rng(0).integers(0, 50257, count * tokens - tokens // 2).astype("<u2")
    for number in range(count):
        part = ids[number * tokens : (number + 1) * tokens]
        header = shards.header(len(part)) if headers else b""
        (folder / f"tokens_train_{number:06}.bin").write_bytes(header + part.tobytes())
    (folder / "tokens_val_000000.bin").write_bytes(shards.header(tokens) + ids[:tokens].tobytes())
    return ids


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Record the names of files that are opened for reading."""
    names: list[str] = []
    real, path_open = token_files.token_file, token_files.io.FileIO

    class Watched(path_open):
        def __init__(self, path, *rest):
            names.append(Path(path).name)
            super().__init__(path, *rest)

    def looked_at(path, dtype):
        names.append(Path(path).name)
        return real(path, dtype)

    monkeypatch.setattr(token_files, "token_file", looked_at)
    monkeypatch.setattr(token_files.io, "FileIO", Watched)
    return names


@pytest.mark.parametrize("kind", ["llm.c", "listed", "npy"])
def test_many_shards_are_opened_lazily(tmp_path, opened, kind):
    folder, count = tmp_path / "data", token_files.MANY_FILES + 44
    ids = write_shards(folder, count)
    if kind == "npy":
        for path in list(folder.glob("*.bin")):
            np.save(path.with_suffix(".npy"), np.fromfile(path, "<u2", offset=1024))
            path.unlink()
    if kind == "listed":
        listed = [
            {"name": p.name, "tokens": (p.stat().st_size - 1024) // 2}
            for p in sorted(folder.glob("*_train_*"))
        ]
        text = '{"format": "nanogpt-tokenizer-1", "type": "gpt2"}'
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        meta = {
            "format": "nanogpt-data-1",
            "dtype": "uint16",
            "tokenizer": {"sha256": vocabulary.identify(text).sha256},
            "splits": {"train": {"tokens": len(ids), "files": listed}},
        }
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    found = loader.open_split(loader.split_files(folder, "train"), np.dtype("<u2"), {})
    tokens = loader.Tokens(found, 50257)
    assert len(set(opened)) == 2 and len(tokens) == len(ids)
    assert (tokens.read(10_000, 1000) == ids[10_000:11_000]).all()
    assert len(set(opened)) <= 2 + 1000 // 64 + 2
    assert (
        loader.load(folder).train.read(0, len(ids)) == ids
    ).all()  # the initial checks, and the full content


def test_few_files_are_open_at_a_time(tmp_path):
    ids = write_shards(tmp_path / "data", 300)
    tokens = loader.load(tmp_path / "data").train
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    assert (tokens.read(0, len(ids)) == ids).all() and (tokens.read(0, len(ids)) == ids).all()
    assert len(tokens._open) == token_files.MAX_OPEN_FILES
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + token_files.MAX_OPEN_FILES


@pytest.mark.parametrize("damage", ["shorter", "longer header", "gone"])
def test_invalid_shard_is_reported_on_first_use(tmp_path, damage):
    folder = tmp_path / "data"
    write_shards(folder, 300)
    paths = loader.split_files(folder, "train")
    tokens = loader.Tokens(loader.open_split(paths, np.dtype("<u2"), {}), 50257)
    broken = folder / "tokens_train_000123.bin"
    if damage == "gone":
        broken.unlink()
    else:
        whole = broken.read_bytes()
        broken.write_bytes(whole[:-10] if damage == "shorter" else shards.header(65) + whole[1024:])
    tokens.read(122 * 64, 64)
    with pytest.raises((UserError, OSError), match=r"tokens_train_000123"):
        tokens.read(123 * 64, 64)


def test_rank_reads_only_the_files_of_its_share(tmp_path, opened):
    write_shards(tmp_path / "data", 200)
    paths = loader.split_files(tmp_path / "data", "train")
    starts = None
    for rank in range(4):
        tokens = loader.Tokens(loader.open_split(paths, np.dtype("<u2"), {}), 50257)
        batches = loader.TrainBatches(tokens, 16, 8, 1, 1, CPU, world=World(rank, 4))
        opened.clear()
        list(batches.step(3))
        starts = batches.sampler.starts(3 * 8 + rank * 2, 2)
        needed = {int(place) // 64 for start in starts for place in (start, start + 16)}
        assert {int(name[13:19]) for name in opened} == needed


def test_ten_terabytes_of_sparse_files(tmp_path):
    """400 sparse files, 5e12 tokens, more than 2^31 sequences: fast to open, random access works."""
    folder, count, size = tmp_path / "data", 400, 25_000_000_000
    folder.mkdir()
    try:
        for number in range(count):
            with (folder / f"tokens_train_{number:06}.bin").open("wb") as file:
                file.truncate(size)
    except OSError:
        pytest.skip("the file system does not support sparse files of 25 GB")
    (folder / "tokens_val_000000.bin").write_bytes(bytes(4000))
    tracemalloc.start()
    started = time.perf_counter()
    train = loader.load(folder).train
    batches = loader.TrainBatches(train, 1024, 12, 40, 1, CPU)
    batch = next(batches.step(10_000_000))
    took_s, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(train) == count * size // 2 and batches.sampler.n_sequences > 2**32
    assert batch[0].shape == (12, 1024) and took_s < 5 and peak < 80e6  # one chunk of ids is checked
    assert len(train._open) <= 1 + 12


def test_sample_order_of_five_trillion_tokens():
    """Sequences are spread evenly without repeats, also beyond index 2^32."""
    order = EpochSampler(5 * 10**12, 1024, seed=1)
    assert order.n_sequences > 2**32
    places = [0, 2**31 - 500, 2**32 - 500, order.n_sequences - 1000]
    starts = np.concatenate([order.starts(first, 1000) for first in places])
    assert len(set(starts.tolist())) == 4000
    assert starts.min() >= 0 and starts.max() + 1024 < 5 * 10**12
    counts, _ = np.histogram(starts, bins=10, range=(0, 5 * 10**12))
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
    again = order.starts(order.n_sequences - 1, 2)  # crosses into the next epoch
    assert again[0] == starts[-1] and again[1] == order.starts(order.n_sequences, 1)[0]


def test_published_files_are_never_outside_the_dataset_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for path in (tmp_path / "precious.bin", out / "train.bin"):
        path.write_bytes(b"12")
    part = {"tokens": 1, "files": [{"name": "../precious.bin", "tokens": 1}]}
    about = {"format": token_files.FORMAT, "dtype": "uint16", "tokenizer": {"sha256": ""}}
    (out / "meta.json").write_text(json.dumps({**about, "splits": {"train": part, "val": part}}))
    assert shards.token_files(out) == [out / "train.bin"]
    with pytest.raises(UserError, match=r"name is '\.\./precious\.bin', not text naming a file in the same"):
        loader.load(out)


def llmc(magic: int, version: int, ids: np.ndarray) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    return header.tobytes() + ids.tobytes()


IDS = np.random.default_rng(0).integers(0, 300, 5000)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (IDS.astype("<u4").tobytes(), "integers of 32 or 64 bits; write them as uint16"),
        (IDS.astype("<i8").tobytes(), "integers of 32 or 64 bits"),
        (IDS.astype(">u4").tobytes(), "integers of 32 or 64 bits"),
        ((IDS % 250).astype(">u2").tobytes(), "all are multiples of 256, as in big-endian integers"),
        ((IDS % 65).astype("u1").tobytes(), "no byte is above 127, as in integers of 8 bits"),
        (b"Some words of a text.\n" * 300, "text, which prepare.py reads"),
        (b"LITPKDS" + bytes(17) + IDS.astype("<u2").tobytes(), "TinyLlama's packed tokens"),
        (b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "a Git LFS pointer"),
        (b"\x93NUMPY\1\0v\0" + IDS.astype("<u2").tobytes(), "a NumPy array, whose name must end in .npy"),
        (b"PK\3\4\0\0" + IDS.astype("<u2").tobytes(), "a zip archive or a file of PyTorch"),
        (llmc(20240520, 2, IDS.astype("<u2")), "llm.c's tokens in a version that is not known"),
        (llmc(20240801, 7, IDS.astype("<u4")), "llm.c's tokens of Llama 3"),
    ],
)
@pytest.mark.parametrize("names", [("train.bin", "val.bin"), ("x_train_000001.bin", "x_val_000001.bin")])
def test_files_of_other_content_are_not_trained_on(tmp_path, content, said, names):
    for name in names:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{names[0]} does not hold token ids of 16 bits: .*{said}"):
        loader.load(tmp_path)


def test_files_beside_the_splits_are_not_joined_with_them(tmp_path):
    for name in ("train", "val", "pretrain", "eval"):
        (IDS[:1000] if name == "train" else IDS[:500]).astype("<u2").tofile(tmp_path / f"{name}.bin")
    found = loader.load(tmp_path)
    assert (len(found.train), len(found.val)) == (1000, 500)
    (tmp_path / "old_train.bin").write_bytes(b"ab" * 100)
    with pytest.raises(UserError, match=r"has train\.bin and old_train\.bin; keep the one to train on"):
        loader.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        ("x_{}.npy", -IDS, "is id -[0-9]+, outside the vocabulary"),
        ("x_{}.npy", np.asfortranarray(IDS.reshape(50, 100)), "not token ids in C order"),
        ("{}_0.npy", np.array(7), "not token ids in C order"),
        ("{}.npy", IDS / 2, "holds float64"),
        ("{}.npy", IDS > 9, "holds bool"),
    ],
)
def test_arrays_that_are_not_token_ids_are_rejected(tmp_path, name, array, said):
    for split in ("train", "val"):
        np.save(tmp_path / name.format(split), array)
    with pytest.raises(UserError, match=said):
        loader.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "dtype"), [("{}.npy", ">u2"), ("{}_1.npy", "<i8"), ("tiny_shakespeare_{}.bin", "<u2")]
)
def test_files_named_after_the_split_are_found(tmp_path, name, dtype):
    for split in ("train", "val"):
        path, ids = tmp_path / name.format(split), IDS.astype(dtype)
        np.save(path, ids) if path.suffix == ".npy" else path.write_bytes(llmc(20240520, 1, ids))
    assert (loader.load(tmp_path).val.read(0, 5000) == IDS).all()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["x_train_000001.bin", "x_train_000002.npy"],
            "files of several kinds for train, x_train_000001.bin and",
        ),
        (
            ["train.bin", "x_train_000001.bin"],
            "files of several kinds for train, x_train_000001.bin and train.bin",
        ),
        (["x_train_000001.bin", "x_train_000003.bin"], "shard 2 of train is missing"),
    ],
)
def test_parts_of_a_split_are_not_overlooked(tmp_path, names, said):
    for name in [*names, "x_val_20240131.bin", "x_val_20240202.bin"]:  # dates are not shard numbers
        (tmp_path / name).write_bytes(llmc(20240520, 1, IDS.astype("<u2")))
    with pytest.raises(UserError, match=said):
        loader.load(tmp_path)
    assert len(loader.split_files(tmp_path, "val")) == 2


def test_bare_ids_of_a_large_vocabulary_have_32_bits(tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 100_000}))
    for split in ("train", "val"):
        (IDS * 300).astype("<u4").tofile(tmp_path / f"{split}.bin")
    assert (loader.load(tmp_path).train.read(0, 5000) == IDS * 300).all()
