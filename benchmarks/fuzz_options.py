"""Wrong options of benchmarks/fuzz.py, for each program."""

import importlib
import random
import typing
from dataclasses import fields
from typing import Annotated, Any, Literal, get_args, get_origin

from benchmarks.fuzz_cases import MODEL, SHORT

VALUES: dict[Any, list[str]] = {  # by type: none of these is right
    int: ["-1", "1.5", "x", "", "nan", "inf", "1e999", "1000000001", "1e12", f"{2**63}", "9" * 400, "None"],
    float: ["-1", "x", "", "nan", "inf", "1e999", "1e12", "9" * 400, "None", "0x10", "True"],
    bool: ["x", "", "2", "-1", "None", "0"],
    str: ["/proc/no/such/folder", "\0", "x" * 5000, "\udcff", "s3://bucket/x", "no/such\nline"],
}  # fmt: skip
LARGE = ["1000000", "100000000", "1e9"]  # within bounds, but too large for what needs memory
NEEDS_MEMORY = {
    *("n_layer", "n_head", "n_embd", "head_dim", "block_size", "batch_size", "vocab_multiple", "vocab_size"),
    *("lora_rank", "slots", "num_samples", "batch_tokens", "comm_bytes"),
}
BASE = {
    "train": [*MODEL, *SHORT, "--dataset=data", "--max_iters=1"],
    "sample": ["--out_dir=run", "--max_new_tokens=3", "--num_samples=1"],
    "eval": ["--out_dir=run"],
    "serve": ["--out_dir=run", "--port=0"],
    "export": ["--out_dir=run", "--to=out"],
    "plan": [*MODEL[:-1], "--dataset=data"],
    "bench": [*MODEL, "--steps=1"],
    "plot": ["run"],
    "prepare": ["texts/plain.txt", "--out=out"],
}


def values(kind: Any) -> list[str]:
    """Return wrong values for an option of type `kind`."""
    if get_origin(kind) is Annotated:
        return values(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return ["x", "", "None", "0.5", "-1"]
    if get_args(kind):  # a union
        return values(get_args(kind)[0])
    return VALUES[kind]


def wrong_options(chance: random.Random) -> tuple[str, list[str]]:
    """Return a program and a command line with one wrong value, or several options at random."""
    name = chance.choice(list(BASE))
    config = importlib.import_module("data.prepare" if name == "prepare" else name).Config
    types = typing.get_type_hints(config, include_extras=True)
    option = chance.choice(list(types))
    way = chance.random()
    if way < 0.45:
        return name, [*BASE[name], f"--{option}={chance.choice(values(types[option]))}"]
    if way < 0.6 and (large := sorted(NEEDS_MEMORY & set(types))):
        return name, [*BASE[name], f"--{chance.choice(large)}={chance.choice(LARGE)}"]
    if way < 0.7:
        typo = "".join(chance.sample(option, len(option)))
        return name, [*BASE[name], f"--{typo}=1", option, f"--{option}"][: chance.choice([-1, -2, None])]
    several = []
    for one in chance.sample(list(types), min(len(types), chance.choice([2, 3, 5]))):
        default = {field.name: field.default for field in fields(config)}[one]
        several.append(f"--{one}={chance.choice(right(types[one], default))}")
    return name, [*BASE[name], *several]


def right(kind: Any, default: Any) -> list[Any]:
    """Return values that an option of type `kind` accepts by itself."""
    if get_origin(kind) is Annotated:
        return right(get_args(kind)[0], default)
    if get_origin(kind) is Literal:
        return [value for value in get_args(kind) if value is not True]  # torch.compile takes a minute
    if kind is bool:
        return [True, False]
    if kind is int or get_args(kind):
        return [0, 1, 2, 3, 7, 100]
    return [0, 0.1, 1, 5.5] if kind is float else [default, "run", "data", "x", "run,data", "a:1"]
