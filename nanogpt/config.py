"""Program options: a dataclass filled from preset files and `--key=value` flags, and validated.

    python train.py config/train_shakespeare_char.py --batch_size=32

Files (presets.py) and flags are applied from left to right. All errors are reported together. The types of
options also describe values in JSON files (`fitted`, used by files.read_json).
"""

import math
import os
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from nanogpt.errors import SHARED, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Valid range of a number, inclusive."""

    low: float
    high: float = 10**9

    def __str__(self) -> str:
        return f">= {self.low}" if self.high == math.inf else f"from {self.low:,} to {self.high:,}"

    def check(self, value: Any) -> Any:
        if not self.low <= value <= self.high:
            raise ValueError(self)
        return value


@dataclass(frozen=True)
class Local:
    """One or more paths of this file system, separated by commas; ~ is the user's home folder."""

    def __str__(self) -> str:
        return "naming a path of this file system; mount remote storage and give its folder"

    def check(self, text: str) -> str:
        if "://" in text or b"\0" in text.encode("utf-8"):  # ValueError if not Unicode
            raise ValueError(f"{text} is not {self}")
        return ",".join(os.path.expanduser(path) for path in text.split(","))


class Beside:
    """Name of a file in the same folder as the file that holds this value; not a path to another folder."""

    def __str__(self) -> str:
        return "naming a file in the same folder"

    def check(self, text: str) -> str:
        if text in ("", "..") or set(text) & set("/\\:\0"):
            raise ValueError(self)
        return text


FilePath = Annotated[str, Local()]
FileName = Annotated[str, Beside()]
PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
Amount = Annotated[int, Range(0, 10**15)]  # number of tokens or bytes
Seed = Annotated[int, Range(0, 10**12)]
NonNegativeFloat = Annotated[float, Range(0, math.inf)]
Seconds = Annotated[float, Range(1)]  # timeout
UnitInterval = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class Options:
    """Result of `read`: the values that are set and their sources."""

    values: dict[str, Any]
    origins: dict[str, str]
    arguments: list[str]  # positional arguments, if the program takes its own


def load(cls: type[T], argv: Sequence[str]) -> tuple[T, dict[str, str]]:
    """Parse `argv` into an instance of the dataclass `cls`.

    Return the instance and the source of each option that is set ("--lr=1" or "config/x.py"). Raise UserError
    listing all problems. `--help` prints the most common options, `--help=all` all of them; both exit with 0.
    Options in `usage.REMOVED` are ignored with a note on stderr.
    """
    options = read(cls, argv)
    return cls(**options.values), options.origins


def load_with_arguments(cls: type[T], argv: Sequence[str]) -> tuple[T, list[str]]:
    """Parse `argv` like `load`, of a program with positional arguments; return the instance and these."""
    options = read(cls, argv, arguments=True)
    return cls(**options.values), options.arguments


def read(
    cls: type, argv: Sequence[str], *, arguments: bool = False, other_keys: frozenset[str] = frozenset()
) -> Options:
    """Parse `argv` like `load`, without building the instance.

    `arguments`: positional arguments are not presets but the program's own. `other_keys`: keys of another
    program that preset files may also set.
    """
    if asked := {"--help", "-h", "--help=all"} & set(argv):
        from nanogpt.usage import help_text

        print(help_text(cls, everything="--help=all" in asked))
        raise SystemExit(0)
    types = typing.get_type_hints(cls, include_extras=True)
    parsed = Options({}, {}, [])
    problems: list[str] = []

    def assign(key: str, value: Any, origin: str, is_text: bool) -> None:
        if key not in types:
            from nanogpt import usage

            key = usage.RENAMED.get(key, key)
            if key not in types:
                known = key in other_keys and not is_text
                problems.extend([] if known else usage.unknown_option(key, origin, types))
                return
        try:
            given = _from_text(types[key], value) if is_text else value
            parsed.values[key] = fitted(types[key], given, f"{origin}: {key}")
            parsed.origins[key] = origin
        except UserError as error:
            problems.append(str(error))

    for word in argv:
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            if not equals and key in types and types[key] is not bool:
                problems.append(f"{word}: write --{key}=VALUE, without a space")
            else:
                assign(key, text if equals else "True", word, is_text=True)
        else:
            try:
                if arguments:
                    parsed.arguments.append(Local().check(word))
                    continue
                from nanogpt import presets

                path = presets.find(word)
                for key, value in presets.assignments(path).items():
                    assign(key, value, presets.shown(path), is_text=False)
            except ValueError as error:
                problems.append(str(error))
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    problems += [f"--{key}=... is required" for key in required if key not in parsed.origins]
    if problems:
        raise UserError("\n       ".join(problems))
    # A run that resumes or starts from weights takes some options from there; checked afterwards.
    if parsed.values.get("init_from", "scratch") == "scratch":
        require_consistent(cls(**parsed.values), parsed.origins)
    return parsed


# ----------------------------------------------------------------------------- parsing one value


def _from_text(kind: Any, text: str) -> Any:
    """Return `text` from the command line converted to type `kind`, or `text` itself if that fails."""
    words = {"true": True, "false": False, "None": None}
    candidates: list[Any] = [text, *(words[word] for word in {text, text.lower()} & words.keys())]
    for number in (int, float):
        with suppress(ValueError):
            candidates.append(number(text))
    for candidate in candidates:
        with suppress(ValueError):
            return check(kind, candidate)
    return text


def check(kind: Any, value: Any) -> Any:
    """Return `value` converted to type `kind`. Raise ValueError if it is not of that type."""
    if kind is Any or (type(value) is kind and kind is not float):
        return value
    if get_origin(kind) in (Union, UnionType):
        for choice in get_args(kind):
            with suppress(ValueError):
                return check(choice, value)
    if get_origin(kind) is Annotated:
        base, limits = get_args(kind)
        return limits.check(check(base, value))
    if get_origin(kind) is Literal:
        if any(value == choice and type(value) is type(choice) for choice in get_args(kind)):
            return value
    elif kind is float and type(value) in (int, float) and abs(value) <= 1e300:  # False for NaN
        return float(value)
    elif kind is int and type(value) is float and value.is_integer():
        return int(value)  # 1e6
    raise ValueError(kind)


def fitted(schema: Any, value: Any, where: str) -> Any:
    """Return a value read from JSON, checked against `schema`: the type of an option, [schema], {str: schema}
    or {"key": schema, "key?": schema}, where ? marks a key that may be absent; other keys are not checked.

    Raise UserError naming `where` and the place of the wrong value in it.
    """
    if isinstance(schema, list) and isinstance(value, list):
        return [fitted(schema[0], item, f"{where}[{number}]") for number, item in enumerate(value)]
    if isinstance(schema, dict) and isinstance(value, dict):
        checked = {}
        for key, kind in (dict.fromkeys(value, schema[str]) if str in schema else schema).items():
            name = key.removesuffix("?")
            if name in value or name == key:
                checked[name] = fitted(kind, value.get(name), f"{where}: {name}")
        return value | checked
    kind = type(schema) if isinstance(schema, list | dict) else schema
    try:
        return check(kind, value)
    except ValueError:
        from nanogpt.usage import describe

        raise UserError(f"{where} is {value!r:.60}, not {describe(kind)}") from None


# ----------------------------------------------------------------------------- whole configurations


def pick_fields(cls: type[T], config: object, **others: Any) -> T:
    """Build the dataclass `cls` from the fields of `config` with the same names, and `others`."""
    names = typing.get_type_hints(cls)
    return cls(**{name: getattr(config, name) for name in names if hasattr(config, name)} | others)


def require_consistent(config: object, origins: Mapping[str, str]) -> None:
    """Raise UserError listing all inconsistencies that the `problems` methods of `config`'s bases return."""
    checks = [vars(part)["problems"] for part in type(config).__mro__ if "problems" in vars(part)]
    if wrong := [line for check in checks for line in check(config, origins)]:
        error = UserError("\n       ".join(wrong))
        error.add_note(SHARED)
        raise error
