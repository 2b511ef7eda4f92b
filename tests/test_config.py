"""Option parsing: accepted values, rejected values and error messages."""

import re
import typing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

import bench
import eval as evaluation
import export
import plan
import plot
import sample
import serve
import train
from nanogpt.checkpoint.resume import inherit
from nanogpt.config import (
    FileName,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    UnitInterval,
    fitted,
    load,
    read,
)
from nanogpt.errors import UserError
from nanogpt.presets import assignments
from nanogpt.usage import help_text

PROGRAMS = [train, sample, evaluation, serve, export, plan, bench, plot]


@dataclass(frozen=True)
class Config:
    # sizes
    batch_size: PositiveInt = 12  # sequences per micro-batch
    max_iters: NonNegativeInt = 10  # iterations
    learning_rate: NonNegativeFloat = 6e-4  # peak
    dropout: UnitInterval = 0.0  # of activations
    # words
    start: str = "\n"  # the prompt
    out_dir: str = "out"  # where
    bias: bool = False  # biases
    compile: Literal["auto", True, False] = "auto"  # torch.compile


@pytest.fixture
def preset_file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "preset.py"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("--learning_rate=1", "learning_rate", 1.0),
        ("--learning_rate=1e-3", "learning_rate", 1e-3),
        ("--dropout=0", "dropout", 0.0),
        ("--max_iters=1e6", "max_iters", 1_000_000),
        ("--max_iters=10_000", "max_iters", 10_000),
        ("--start=a=b", "start", "a=b"),
        ("--start=123", "start", "123"),
        ("--start=True", "start", "True"),
        ("--start=", "start", ""),
        ("--start=--x y", "start", "--x y"),
        ("--bias=true", "bias", True),
        ("--bias=False", "bias", False),
        ("--bias", "bias", True),
        ("--compile=False", "compile", False),
        ("--compile=auto", "compile", "auto"),
    ],
)
def test_valid_values_are_accepted(word, name, value):
    config, origins = load(Config, [word])
    got = getattr(config, name)
    assert got == value and type(got) is type(value)
    assert origins == {name: word}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--batch_siz=3", "did you mean 'batch_size'?"),
        ("--batch-size=3", "did you mean 'batch_size'?"),
        ("--xyzzy=3", "see --help"),
        ("--batch_size=0", "not a whole number from 1 to 1,000,000,000"),
        ("--batch_size=1.5", "not a whole number from 1 to 1,000,000,000"),
        ("--batch_size=True", "not a whole number from 1 to 1,000,000,000"),
        ("--learning_rate=1e999", "not a finite number >= 0"),
        ("--learning_rate=nan", "not a finite number >= 0"),
        ("--learning_rate=-1", "not a finite number >= 0"),
        ("--dropout=1.5", "not a finite number from 0 to 1"),
        ("--bias=maybe", "not True or False"),
        ("--compile=1", "not one of auto, True, False"),
        ("--batch_size", "write --batch_size=VALUE"),
        ("no_such_preset", "no preset 'no_such_preset'"),
    ],
)
def test_invalid_values_are_rejected(word, said):
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        load(Config, [word])


def test_all_problems_are_reported_at_once(preset_file):
    path = preset_file("learning_rte = 1e-3\nbatch_size = 'ten'\n")
    with pytest.raises(UserError) as error:
        load(Config, [path, "--dropot=0.1", "--bias=perhaps"])
    message = str(error.value)
    for part in ("learning_rte", "'learning_rate'", "'ten'", "'dropout'", "perhaps"):
        assert part in message


def test_later_arguments_override_earlier_ones(preset_file):
    path = preset_file("batch_size = 3\n")
    assert load(Config, [path, "--batch_size=4"])[0].batch_size == 4
    assert load(Config, ["--batch_size=4", path])[0].batch_size == 3
    assert load(Config, ["--batch_size=4", "--batch_size=5"])[0].batch_size == 5


def test_preset_expressions_use_earlier_names(preset_file):
    path = preset_file(
        '"""A preset."""\n_tokens = 2**19  # scratch\nbatch_size = _tokens // 1024 // 8\n'
        "learning_rate = 3 * 1e-4\nout_dir = 'out' + '-x'\nbias = True\nmax_iters = -(-7 // 2)\n"
    )
    config, _ = load(Config, [path])
    assert config == Config(batch_size=64, learning_rate=3 * 1e-4, out_dir="out-x", bias=True, max_iters=4)


@pytest.mark.parametrize(
    "code",
    [
        "import os",
        "batch_size = __import__('os').system('touch HACKED')",
        "batch_size = open('x')",
        "batch_size = (lambda: 3)()",
        "batch_size = [1][0]",
        "batch_size = 9**9**9",
        "batch_size = 10**65",
        "start = 'a' * 10**9",
        "batch_size = 1 / 0",
        "batch_size = other",
        "batch_size += 1",
        "batch_size, max_iters = 1, 2",
        "for i in range(3): batch_size = i",
        "batch_size = (",
        "batch_size = " + "-" * 5000 + "1",
    ],
)
def test_preset_executes_no_code(preset_file, tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"preset\.py"):
        load(Config, [preset_file(code + "\n")])
    assert not (tmp_path / "HACKED").exists()


def test_project_preset_is_found_by_bare_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # found from any working directory
    with pytest.raises(UserError) as error:
        load(Config, ["shakespear"])
    assert "did you mean train_shakespeare_char or " in str(error.value)
    options = read(Config, ["train_shakespeare_char"], other_keys=frozenset(assignments_of("char")))
    assert options.values["batch_size"] == 16


def assignments_of(suffix: str) -> set[str]:
    root = Path(__file__).resolve().parent.parent
    return set(assignments(root / "config" / f"train_shakespeare_{suffix}.py"))


def test_positional_arguments_are_kept_if_accepted():
    options = read(Config, ["a.txt", "--batch_size=3", "b"], arguments=True)
    assert options.arguments == ["a.txt", "b"] and options.values == {"batch_size": 3}


def test_inherit_prefers_given_options():
    saved = {"batch_size": 3, "max_iters": 100, "start": "x", "gone": 1}
    config, origins = load(Config, ["--batch_size=5", "--max_iters=100", "--out_dir=new"])
    merged, differing = inherit(config, origins, saved, not_inherited={"out_dir"})
    assert merged == Config(batch_size=5, max_iters=100, start="x", out_dir="new")
    assert differing == {"batch_size": (3, 5)}


def test_help_shows_every_option_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as leave:
        load(Config, ["--help"])
    assert leave.value.code == 0
    shown = capsys.readouterr().out
    assert "--batch_size=12" in shown and "sequences per micro-batch" in shown
    assert "one of auto, True, False" in shown and "sizes" in shown
    assert help_text(Config).count("--") >= 8


def test_train_help_fits_on_one_screen(capsys):
    shown = []
    for word in ("--help", "--help=all"):
        with pytest.raises(SystemExit):
            load(train.Config, [word])
        shown.append(capsys.readouterr().out)
    short, long = (set(re.findall(r"(?m)^    (--\w+)=", text)) for text in shown)
    assert len(short) == 25 and len(shown[0].splitlines()) <= 40 and short < long
    assert len(long) == len(fields(train.Config)) <= 86
    assert f"--help=all shows all {len(long)} options" in shown[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--n_embd=100"], "n_embd=100 is not divisible by n_head=12"),
        (["--n_kv_head=5"], "n_head=12 is not divisible by n_kv_head=5"),
        (["--position=rope", "--head_dim=5"], "position=rope rotates pairs of channels, but a head has 5"),
        (["--min_lr=1"], "min_lr=1.0 is above learning_rate=0.0006; lower --min_lr"),
        (["--beta1=1"], "beta1=1.0 and beta2=0.95 must be below 1"),
        (["--lora_rank=4", "--freeze=wte*"], "--lora_rank freezes all weights; remove --freeze and"),
        (["--batch_tokens=1000"], r"12 \* 1024 = 12288 tokens; give 12_288, or another --batch_size"),
        (
            ["--max_iters=10", "--max_tokens=10000"],
            "--max_tokens=10000 and --max_iters=10 set the same quantity",
        ),
    ],
)
def test_contradictory_options_are_rejected_at_parse_time(given, message):
    with pytest.raises(UserError, match=message):
        load(train.Config, given)
    load(train.Config, [*given, "--init_from=resume"])  # the saved run may set other values


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_every_option_has_help(program, capsys):
    with pytest.raises(SystemExit):
        load(program.Config, ["--help=all"])
    helped = set(re.findall(r"(?m)^    --(\w+)\S* +\S", capsys.readouterr().out))
    assert helped == {field.name for field in fields(program.Config)}


def test_removed_option_is_reported_and_ignored(preset_file, capsys):
    config, origins = load(Config, ["--prefetch=True", preset_file("hold_gc = True\nbatch_size = 3\n")])
    assert config == Config(batch_size=3) and set(origins) == {"batch_size"}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith("note: --prefetch=True is ignored, prefetch was removed: ")
    assert "preset.py is ignored, hold_gc was removed: " in said[1]


SHAPE = {
    "name": FileName,
    "sizes": [PositiveInt],
    "loss?": float | None,
    "parts": {str: {"n": NonNegativeInt}},
}
GOOD = {
    "name": "a.bin",
    "sizes": [1, 2],
    "parts": {"x": {"n": 0}, "y": {"n": 3, "more": "kept"}},
    "own": None,
}


def test_value_of_the_shape_is_returned_with_its_other_keys():
    assert fitted(SHAPE, GOOD, "x.json") == GOOD
    assert fitted(SHAPE, GOOD | {"loss": 1}, "x.json")["loss"] == 1.0
    assert fitted(SHAPE, GOOD | {"loss": None}, "x.json")["loss"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../a.bin"}, r"x\.json: name is '\.\./a\.bin', not text naming a file in the same folder"),
        ({"name": "/etc/passwd"}, "x.json: name is '/etc/passwd'"),
        ({"name": "a\0"}, "x.json: name is"),
        ({"name": 3}, "x.json: name is 3, not text"),
        ({"sizes": [1, 0]}, r"x.json: sizes\[1\] is 0, not a whole number from 1 to 1,000,000,000"),
        ({"sizes": "12"}, "x.json: sizes is '12', not a list"),
        ({"sizes": [True]}, r"x.json: sizes\[0\] is True, not a whole number"),
        ({"loss": "low"}, "x.json: loss is 'low', not a finite number or null"),
        ({"loss": float("nan")}, "x.json: loss is nan, not a finite number"),
        ({"loss": 10**400}, "x.json: loss is 1000"),
        ({"parts": []}, r"x.json: parts is \[\], not an object"),
        ({"parts": {"z": {}}}, "x.json: parts: z: n is None, not a whole number"),
    ],
)
def test_value_of_another_shape_is_rejected_with_its_place(change, message):
    with pytest.raises(UserError, match=message):
        fitted(SHAPE, GOOD | change, "x.json")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_no_whole_number_above_a_billion_is_accepted_where_it_counts_something(program):
    amounts = {"max_tokens", "batch_tokens", "batch_ramp_tokens", "shard_tokens", "comm_bytes", "seed"}
    kinds = typing.get_type_hints(program.Config, include_extras=True)
    for name, kind in kinds.items():
        if "int" in str(kind) and name not in amounts:
            with pytest.raises(UserError, match=f"{name} is '1e10', not "):
                load(program.Config, [f"--{name}=1e10"])
