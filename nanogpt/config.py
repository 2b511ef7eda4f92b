"""Program options: a dataclass filled from preset files and `--key=value` flags, and validated.

    python train.py config/train_shakespeare_char.py --batch_size=32

Files (presets.py) and flags are applied from left to right. All errors are reported together.
"""

import math
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from nanogpt.errors import SHARED, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Valid range of a numeric option, inclusive."""

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        return f">= {self.low}" if self.high == math.inf else f"from {self.low} to {self.high}"

    def check(self, value: Any) -> Any:
        if not self.low <= value <= self.high:
            raise ValueError(self)
        return value


@dataclass(frozen=True)
class Local:
    """A path of this file system; ~ is the user's home folder. Several are separated by commas."""

    def __str__(self) -> str:
        return "naming a path of this file system; mount remote storage and give its folder"

    def check(self, text: str) -> str:
        if "://" in text:
            raise ValueError(f"{text} is not {self}")
        return ",".join(os.path.expanduser(path) for path in text.split(","))


FilePath = Annotated[str, Local()]
PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
NonNegativeFloat = Annotated[float, Range(0)]
Seconds = Annotated[float, Range(1)]  # timeout
UnitInterval = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class Options:
    """Result of `read`: the values given and the source of each."""

    values: dict[str, Any]
    origins: dict[str, str]
    arguments: list[str]  # positional arguments, if the program takes its own
    ignored: dict[str, str]  # key in `other_keys`: the preset file that sets it


def load(cls: type[T], argv: Sequence[str]) -> tuple[T, dict[str, str]]:
    """Read `argv` into an instance of the dataclass `cls`.

    Return the instance and, for each option given, its source ("--lr=1" or "config/x.py"). Raise UserError
    listing all problems. `--help` prints the most common options, `--help=all` all of them; both exit with 0.
    Options in `usage.REMOVED` are ignored with a note on stderr.
    """
    options = read(cls, argv)
    return cls(**options.values), options.origins


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
    found = Options({}, {}, [], {})
    problems: list[str] = []

    def give(key: str, value: Any, origin: str, is_text: bool) -> None:
        if key not in types:
            from nanogpt.usage import RENAMED

            key = RENAMED.get(key, key)
        if key not in types:
            if key in other_keys and not is_text:
                found.ignored[key] = origin
                return
            from nanogpt.usage import unknown_option

            problems.extend(unknown_option(key, origin, types))
            return
        try:
            found.values[key] = _from_text(types[key], value) if is_text else _check(types[key], value)
            found.origins[key] = origin
        except ValueError:
            from nanogpt.usage import describe

            problems.append(f"{origin}: {key} = {value!r} is not {describe(types[key])}")

    for word in argv:
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            if not equals and key in types and types[key] is not bool:
                problems.append(f"{word}: write --{key}=VALUE, without a space")
            else:
                give(key, text if equals else "True", word, is_text=True)
        else:
            try:
                if arguments:
                    found.arguments.append(Local().check(word))
                    continue
                from nanogpt import presets

                path = presets.find(word)
                for key, value in presets.assignments(path).items():
                    give(key, value, presets.shown(path), is_text=False)
            except ValueError as error:
                problems.append(str(error))
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    problems += [f"--{key}=... is required" for key in required if key not in found.origins]
    if problems:
        raise UserError("\n       ".join(problems))
    # A run that resumes or starts from weights takes some options from there; checked afterwards.
    if found.values.get("init_from", "scratch") == "scratch":
        require_consistent(cls(**found.values), found.origins)
    return found


# ----------------------------------------------------------------------------- parsing one value


def _from_text(kind: Any, text: str) -> Any:
    """Parse `text` from the command line as type `kind`. Raise ValueError if it is not one."""
    candidates: list[Any] = [text]
    if text.lower() in ("true", "false"):
        candidates.append(text.lower() == "true")
    if text == "None":
        candidates.append(None)
    for number in (int, float):
        try:
            candidates.append(number(text))
        except ValueError:
            continue
    for candidate in candidates:
        try:
            return _check(kind, candidate)
        except ValueError:
            continue
    raise ValueError(kind)


def _check(kind: Any, value: Any) -> Any:
    """Return `value` converted to type `kind`. Raise ValueError if it is not one."""
    if get_origin(kind) in (Union, UnionType):
        for choice in get_args(kind):
            try:
                return _check(choice, value)
            except ValueError:
                continue
        raise ValueError(kind)
    if get_origin(kind) is Annotated:
        base, limits = get_args(kind)
        return limits.check(_check(base, value))
    if get_origin(kind) is Literal:
        if any(value == choice and type(value) is type(choice) for choice in get_args(kind)):
            return value
    elif kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif kind is int and type(value) is float and value.is_integer():
        return int(value)  # 1e6
    elif kind in (bool, int, str) and type(value) is kind:
        return value
    raise ValueError(kind)


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
