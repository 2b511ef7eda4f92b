"""Files of benchmarks/fuzz.py: one or more of every kind that the programs read, and ways to damage them."""

import bz2
import contextlib
import functools
import gzip
import hashlib
import importlib
import io
import json
import lzma
import math
import os
import pickle
import random
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import zstandard

from nanogpt import checkpoint, files
from nanogpt.config import load, load_with_arguments
from nanogpt.errors import run_program

MODEL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2", "--device=cpu"]
SHORT = ["--gradient_accumulation_steps=1", "--eval_iters=1", "--eval_interval=2", "--warmup_iters=1"]
TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 20


# ----------------------------------------------------------------------------- programs


def program(name: str) -> Callable[[list[str]], None]:
    """Return a function that runs the program `name` with a command line, as from the shell."""
    path = "data.prepare" if name == "prepare" else name
    module = importlib.import_module(path)

    def run(argv: list[str]) -> None:
        sys.argv = [f"{name}.py", *argv]
        if name in ("eval", "doctor"):
            run_program(module.program)
            return
        if name in ("plot", "race"):
            reference = importlib.import_module("nanogpt.diagnostics.reference")
            reference.FOLDER = Path("references")  # the corpus has its own
        if name in ("plot", "race", "prepare"):
            run_program(lambda: module.main(*load_with_arguments(module.Config, argv)))
        else:
            run_program(lambda: module.main(*load(module.Config, argv)))

    return run


# ----------------------------------------------------------------------------- intact files


@dataclass(frozen=True)
class Kind:
    """Files of one kind: `folder` in the corpus, the `names` in it to damage, and commands that read them."""

    folder: str
    names: tuple[str, ...]
    commands: tuple[str, ...]
    intact: str = "exit 0"  # outcome with intact files


RUN = ("train --out_dir=run --init_from=resume --max_iters=3", "sample --out_dir=run --max_new_tokens=3")
TRAIN = " ".join(["train", *MODEL, *SHORT, "--max_iters=1"])
SAMPLE = "sample --out_dir=run --max_new_tokens=3 --num_samples=1"
PREPARE = "prepare texts/{name} --out=out"
RACE = "race presets/small.py --max_iters=2 --seeds=1 --out=race"
KINDS = [
    Kind("data", ("meta.json", "tokenizer.json", "train.bin", "val.bin", "baseline.json"),
         (TRAIN, "doctor data")),
    Kind("bpe", ("tokenizer.json", "meta.json"), (f"{TRAIN} --sample_prompt=Speak --dataset=bpe",)),
    Kind("pairs", ("meta.json", "train.mask.bin"), (f"{TRAIN} --dataset=pairs",)),
    Kind("theirs", ("meta.pkl", "train.bin"), (f"{TRAIN} --dataset=theirs --sample_prompt=A",)),
    Kind("arrays", ("x_train_000.npy", "x_val_000.bin"), (f"{TRAIN} --dataset=arrays",)),
    Kind("cut", ("meta.json", "tokens_train_000002.bin"), (f"{TRAIN} --dataset=cut", "doctor cut")),
    Kind("run", ("{step}/state.json", "{step}/manifest.json", "{step}/model.safetensors"), RUN),
    Kind("run", ("{step}/optimizer.safetensors", "tokenizer.json", "config.json"), RUN),
    Kind("run", ("config.json", "{step}/state.json"), ("eval run --baseline",)),
    Kind("run", ("baseline.json", "{step}/state.json"), ("serve --out_dir=run --port=0",), "running"),
    Kind("lora", ("{step}/state.json", "{step}/model.safetensors"),
         ("sample --out_dir=lora --num_samples=1",)),
    Kind("run", ("metrics.jsonl", "baseline.json", "config.json"),
         ("plot run --healthy", "doctor run", *RUN[:1])),
    Kind("references", ("data-2.json",), ("plot run --healthy",)),
    Kind("race", ("race.json",), (RACE,)),
    Kind("hf", ("config.json", "model.safetensors", "tokenizer.json", "tokenizer.nanogpt.json"),
         ("sample --init_from=hf --max_new_tokens=3", "export --init_from=hf --to=out")),
    Kind("peft", ("adapter_config.json",), ("sample --init_from=peft",), "exit 2"),
    Kind("shards", ("model.safetensors.index.json", "config.json"),
         ("sample --init_from=shards --num_samples=1",)),
    Kind("nanogpt", ("ckpt.pt", "meta.pkl"),
         ("sample --init_from=nanogpt --max_new_tokens=3", f"{TRAIN} --init_from=nanogpt/ckpt.pt")),
    Kind("presets", ("preset.py",), (f"{TRAIN} presets/preset.py",)),
    Kind("texts", ("plain.txt", "rows.jsonl", "rows.jsonl.gz", "rows.parquet", "rows.csv"),
         (PREPARE, f"{PREPARE} --tokenizer=bpe:300")),
    Kind("texts", ("rows.json", "rows.tsv", "rows.ndjson.zst", "rows.arrow"), (PREPARE,)),
    Kind("texts", ("plain.txt.bz2", "plain.txt.xz"), (f"{PREPARE} --split_at=line --tokenizer=bpe:300",)),
    Kind("half", (".unfinished/state.json", ".unfinished/train-000000"),
         ("prepare texts/plain.txt --out=half",)),
    Kind("folder", ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json"),
         ("prepare texts/plain.txt --out=out --tokenizer=folder",)),
    Kind("bert", ("vocab.txt", "tokenizer_config.json"),
         ("prepare texts/plain.txt --out=out --lossy --tokenizer=bert",)),
    Kind("foreign", ("tokenizer.json",), ("prepare texts/plain.txt --out=out --lossy --tokenizer=foreign",)),
    Kind("foreign", ("spiece.model", "vocab.bpe"),
         ("prepare texts/plain.txt --out=out --tokenizer=foreign/spiece.model",
          "prepare texts/plain.txt --out=out --tokenizer=gpt2 --gpt2_bpe=foreign/vocab.bpe"), "exit 2"),
    Kind("texts", ("prompts.jsonl",), (f"{SAMPLE} --prompts=texts/{{name}}",)),
    Kind("texts", ("plain.txt",), (f"{SAMPLE} --start=FILE:texts/{{name}}",)),
    Kind("texts", ("tasks.jsonl",), ("eval run --tasks=texts/{name}", "eval run --text=texts/{name}")),
    Kind("texts", ("tasks.jsonl.gz", "tasks.jsonl.xz", "tasks.jsonl.zst"),
         ("eval run --tasks=texts/{name}",)),
]  # fmt: skip


def build(corpus: Path) -> None:
    """Write intact files of all kinds to the folder `corpus`, by the programs themselves."""
    import numpy as np
    import pyarrow.parquet

    texts = corpus / "texts"
    texts.mkdir(parents=True)
    parts = [f"{n} {part}" for n, part in enumerate(TEXT.split("\n\n") * 3)]
    rows = [{"text": part, "prompt": part[:9], "response": part[9:] or "x"} for part in parts]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (texts / "plain.txt").write_text(TEXT)
    (texts / "rows.jsonl").write_text(lines)
    (texts / "rows.csv").write_text("text,n\n" + "".join(f'"{row["text"]}",1\n' for row in rows))
    (texts / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, texts / "rows.parquet")
    (texts / "prompts.jsonl").write_text('{"prompt": "All"}\n"Speak"\n')
    item = {"text": "All speak", "ctx": "All", "endings": ["Speak", "speak"], "label": 1}
    (texts / "tasks.jsonl").write_text(tasks := f"{json.dumps(item)}\n" * 3)
    for suffix, pack in PACK.items():
        (texts / f"tasks.jsonl.{suffix}").write_bytes(pack(tasks.encode()))
        (texts / f"plain.txt.{suffix}").write_bytes(pack(TEXT.encode()))
        (texts / f"rows.ndjson.{suffix}").write_bytes(pack(lines.encode()))
    (texts / "rows.json").write_text(json.dumps(rows, indent=1))
    (texts / "rows.tsv").write_text(
        "n\ttext\n" + "".join(f"1\t{' '.join(row['text'].split()[:2])}\n" for row in rows)
    )
    with pyarrow.ipc.new_file(texts / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    (corpus / "presets").mkdir()
    (corpus / "presets" / "preset.py").write_text(
        '"""A preset."""\nimport time\n_n = 2**3\nbatch_size = _n // 4\nlearning_rate = 3 * 1e-3\n'
        "wandb_run_name = 'ft-' + str(time.time())\nbias = True\ndataset = 'data'\n"
    )
    small = (word[2:].split("=") for word in [*MODEL, *SHORT, "--dataset=data"])
    (corpus / "presets" / "small.py").write_text(
        "".join(f"{key} = {value if value.isdigit() else repr(value)}\n" for key, value in small)
    )
    with contextlib.chdir(corpus):
        program("prepare")(["texts/plain.txt", "--out=data"])
        program("prepare")(["texts/plain.txt", "--out=bpe", "--tokenizer=bpe:280"])
        program("prepare")(["texts/rows.jsonl", "--text_key=prompt+response", "--out=pairs"])
        common = [*MODEL, *SHORT, "--dataset=data", "--bias=True", "--optimizer=adamw"]
        program("train")([*common, "--out_dir=run", "--max_iters=2"])
        program("train")([*common, "--out_dir=lora", "--max_iters=2", "--init_from=run", "--lora_rank=2"])
        program("export")(["--out_dir=run", "--to=hf"])
        program("export")(["--out_dir=run", "--to=nanogpt", "--format=nanogpt"])
        program("prepare")(["texts/plain.txt", "--out=cut", "--tokenizer=byte", "--shard_tokens=500"])
        program("eval")(["run", "--baseline"])
        program("race")(RACE.split()[1:])
        interrupted(["texts/plain.txt", "--out=half"])
    tokenizers(corpus)
    band = [[2 * n, 5.0, 5.1] for n in range(3)]
    options = {"batch_size": 2}
    reference = {"preset": "preset.py", "seeds": [1, 2], "options": options, "loss": band, "val_loss": band}
    (corpus / "references").mkdir()
    files.write_json(corpus / "references" / "data-2.json", reference)
    (corpus / "peft").mkdir()
    files.write_json(corpus / "peft" / "adapter_config.json", {"peft_type": "LORA", "r": 2})
    shutil.copytree(corpus / "data", corpus / "theirs", ignore=shutil.ignore_patterns("*.json"))
    shutil.copy(corpus / "nanogpt" / "meta.pkl", corpus / "theirs")
    (corpus / "arrays").mkdir()
    ids = np.fromfile(corpus / "data" / "train.bin", "<u2")
    np.save(corpus / "arrays" / "x_train_000.npy", ids)
    head = np.zeros(256, "<i4")
    head[:3] = 20240520, 1, len(ids)
    (corpus / "arrays" / "x_val_000.bin").write_bytes(head.tobytes() + ids.tobytes())
    shutil.copytree(corpus / "hf", corpus / "shards")
    part = corpus / "shards" / "model-1.safetensors"
    (corpus / "shards" / "model.safetensors").rename(part)
    names = {name: part.name for name in header_of(part.read_bytes())[0] if name != "__metadata__"}
    files.write_json(corpus / "shards" / "model.safetensors.index.json", {"weight_map": names})


def interrupted(argv: list[str]) -> None:
    """Prepare a dataset, interrupted after its progress is recorded for the first time."""
    from nanogpt.prepare import corpus, shards

    record = shards.Writer.record

    def stop(writer: Any, progress: dict[str, Any]) -> None:
        record(writer, progress)
        raise KeyboardInterrupt

    patched = mock.patch.object(corpus, "RECORD_S", 0), mock.patch.object(shards.Writer, "record", stop)
    with patched[0], patched[1], contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        program("prepare")(argv)


def tokenizers(corpus: Path) -> None:
    """Write the tokenizer files of other programs."""
    for name in ("folder", "bert", "foreign"):
        (corpus / name).mkdir()
    model = json.loads((corpus / "bpe" / "tokenizer.json").read_text())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    files.write_json(corpus / "folder" / "vocab.json", model["vocab"])
    (corpus / "folder" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    files.write_json(corpus / "folder" / "added_tokens.json", {"<|user|>": len(model["vocab"])})
    decoder = {str(len(model["vocab"]) + 1): {"content": "<|end|>", "special": True}}
    files.write_json(corpus / "folder" / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    words = ["[UNK]", "[PAD]", *sorted({*TEXT.lower(), *(f"##{letter}" for letter in TEXT.lower())})]
    (corpus / "bert" / "vocab.txt").write_text("\n".join(word for word in words if word.strip()) + "\n")
    files.write_json(corpus / "bert" / "tokenizer_config.json", {"do_lower_case": True})
    unigram = {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [["<unk>", 0.0], *([a, -1.5] for a in sorted({*TEXT}))],
    }
    foreign = {
        "version": "1.0",
        "truncation": {"max_length": 9, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": None,
        "added_tokens": [{"id": 0, "content": "<unk>", "special": True, **dict.fromkeys(FLAGS, False)}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "post_processor": None,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": unigram,
    }
    files.write_json(corpus / "foreign" / "tokenizer.json", foreign)
    (corpus / "foreign" / "spiece.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\2" * 20)
    (corpus / "foreign" / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges, ""]))


# ----------------------------------------------------------------------------- damage


class Payload:
    """Unpickled without care, it creates a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch EXECUTED",)


HOSTILE: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 255, 2**31, 2**63, 10**30, 1.5, -0.0, math.nan, math.inf, 1e308),
    *("", "x", "0", "../../../etc/hostname", "/etc/hostname", "\ud800", "\0", "a" * 100_000, "é"),
    *([], {}, [1], ["a"], [None], {"a": 1}, [[]] * 5, list(range(1000)), {str(i): i for i in range(1000)}),
]  # fmt: skip


FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
PACK: dict[str, Any] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.compress,
}
UNPACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.decompress,
    "bz2": bz2.decompress,
    "xz": lzma.decompress,
    "zst": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
}


@functools.cache
def bomb(suffix: str, head: bytes) -> bytes:
    """Return a small file that unpacks to 200 MB: `head`, and its first byte again and again."""
    return PACK[suffix](head + head[:1] * (200 << 20))


def deep(levels: int = 100_000) -> bytes:
    return b"[" * levels + b"]" * levels


def header_of(data: bytes) -> tuple[Any, bytes]:
    """Return the JSON header of a safetensors file, and its tensors."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def decoded(name: str, data: bytes) -> tuple[Any, Callable[[Any], bytes]] | None:
    """Return the value in a file, and what writes such a value; None for a format without values."""
    stem, _, suffix = name.rpartition(".")
    if suffix in PACK:
        if inner := decoded(stem, UNPACK[suffix](data)):
            return inner[0], lambda value: PACK[suffix](inner[1](value))
        return None
    if suffix == "json":
        return json.loads(data), lambda value: json.dumps(value).encode()
    if suffix == "parquet":
        import pyarrow.parquet  # starts a thread, and is therefore imported in forked processes only

        table = pyarrow.parquet.ParquetFile(io.BytesIO(data)).read(use_threads=False)
        return table.to_pylist(), lambda value: tabulated(as_list(value))
    if suffix in ("jsonl", "ndjson"):
        rows = [json.loads(line) for line in data.splitlines()]
        return rows, lambda value: b"".join(json.dumps(row).encode() + b"\n" for row in as_list(value))
    if name.endswith(".safetensors"):
        header, tensors = header_of(data)

        def write(value: Any) -> bytes:
            text = json.dumps(value).encode()
            return len(text).to_bytes(8, "little") + text + tensors

        return header, write
    if name.endswith(".pkl"):
        return pickle.Unpickler(io.BytesIO(data)).load(), pickle.dumps
    if name.endswith(".pt"):
        return torch.load(io.BytesIO(data), weights_only=True), saved
    return None


def tabulated(rows: list[Any]) -> bytes:
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def changed(value: Any, chance: random.Random) -> Any:
    """Return `value` with one part, at any depth, replaced, removed or renamed."""
    if isinstance(value, dict | list) and value and chance.random() < 0.85:
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        key = chance.choice(list(copy)) if isinstance(copy, dict) else chance.randrange(len(copy))
        way = chance.random()
        if way < 0.1:
            del copy[key]
        elif way < 0.15 and isinstance(copy, dict):
            copy["unknown" if chance.random() < 0.5 else chance.choice(["../x", ""])] = copy.pop(key)
        else:
            copy[key] = changed(copy[key], chance)
        return copy
    if isinstance(value, int | float) and chance.random() < 0.3:
        return value * chance.choice([-1, 2, 0.5, 1000, 10**6, 10**12])
    return chance.choice(HOSTILE)


def damaged(name: str, data: bytes, chance: random.Random) -> bytes:
    """Return the content of a file, damaged in one of many ways."""
    if chance.random() < 0.6 and (known := decoded(name, data)):
        value, write = known
        if name.endswith((".pkl", ".pt")) and chance.random() < 0.15:
            return write(chance.choice([Payload(), {**value, "itos": Payload()}]))
        with contextlib.suppress(ValueError, TypeError, AttributeError, OverflowError, NotImplementedError):
            return write(changed(value, chance))
    stem, _, suffix = name.rpartition(".")
    if suffix in PACK and (way := chance.random()) < 0.5:
        if way < 0.05:
            return bomb(suffix, chance.choice([b" ", b"[", b'{"text": "', b'aa{"text": 1}\n']))
        return PACK[suffix](damaged(stem, UNPACK[suffix](data), chance))
    place, length = chance.randrange(len(data) + 1), chance.choice([1, 2, 8, 100, 5000])
    ways: list[Callable[[], bytes]] = [
        lambda: data[:place],
        lambda: b"",
        lambda: data[:place] + data[place + length :],
        lambda: data[:place] + data[place : place + length] * 3 + data[place + length :],
        lambda: data[:place] + bytes(length) + data[place + length :],
        lambda: data[:place] + b"\xff" * length + data[place + length :],
        lambda: data[:place] + chance.randbytes(length) + data[place + length :],
        lambda: data[:place] + chance.randbytes(length) + data[place:],
        lambda: bytes(byte ^ (chance.random() < 0.01) for byte in data),
        lambda: flipped(data, place),
        lambda: flipped(flipped(data, place), chance.randrange(len(data) + 1)),
        lambda: re.sub(rb"\d+", b"9" * chance.choice([3, 10, 20, 5000]), data, count=chance.choice([1, 0])),
        lambda: deep(),
        lambda: chance.choice([10**6, 10**8, 2**31, 2**63]).to_bytes(8, "little") + data[8:],
        lambda: data[: place // 2] + deep(),
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        lambda: b"\x89PNG\r\n\x1a\n" + data,
        lambda: data.decode("latin-1").encode("utf-16"),
        lambda: data.replace(b"\n", b""),
        lambda: pickle.dumps(Payload()),
        lambda: b"__import__('os').system('touch EXECUTED')\n" + data,
    ]
    return chance.choice(ways)()


def flipped(data: bytes, place: int) -> bytes:
    return (
        data[:place] + bytes(byte ^ (1 << place % 8) for byte in data[place : place + 1]) + data[place + 1 :]
    )


def sign(step: Path) -> None:
    """Make the manifest of a checkpoint fit its files."""
    about = {
        name: {
            "bytes": (step / name).stat().st_size,
            "sha256": hashlib.sha256((step / name).read_bytes()).hexdigest(),
        }
        for name in checkpoint.FILES
    }
    files.write_json(step / "manifest.json", {"format": checkpoint.FORMAT, "files": about})
