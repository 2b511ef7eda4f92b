"""Generate --help from the option dataclass and the comments in its source; report unknown options."""

import difflib
import inspect
import re
import sys
import typing
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from nanogpt import command, quoted
from nanogpt.errors import UserError

RENAMED = {  # option names of earlier versions, which still work in flags, presets and saved runs
    "recompute": "activation_checkpointing",
    "loss_rows": "loss_chunk_size",
    "muon_turns": "muon_ns_steps",
    "meet_timeout_s": "rdzv_timeout_s",
    "timeout_s": "hang_timeout_s",
}
REMOVED = {  # options of earlier versions, ignored with this reason
    "prefetch": "reading batches ahead gave no speedup",
    "hold_gc": "pausing the garbage collector gave no speedup",
    "data_on_device": "tokens are read from their files for each batch",
    "background_save": "checkpoints are always written in the background if memory allows",
    "eval_tasks_interval": "tasks run at each evaluation (--eval_interval)",
    "sample_interval": "samples are generated at each evaluation (--eval_interval)",
    "sample_count": "four samples are always generated",
}


def help_text(cls: type, everything: bool = True) -> str:
    """Return the help text of `cls`: its options, then inherited ones, described by their source comments.

    Without `everything` list only options whose comment starts with `#:` (if `cls` itself has any), and only
    the summary and the commands of the program's docstring.
    """
    module = inspect.getmodule(cls)
    summary = inspect.cleandoc((module.__doc__ if module else None) or "")
    program = r"python (?:data/)?(?:(\w+)/)?(\w+)\.py"
    summary = re.sub(program, lambda path: command(f"{path[2]} {path[1] or ''}".strip()), summary)
    defaults = {field.name: field.default for field in fields(cls)}
    types = typing.get_type_hints(cls, include_extras=True)
    sources = [inspect.getsource(base) for base in cls.__mro__ if base is not object]
    source = "\n".join(sources)
    if everything or "  #: " not in sources[0]:
        shown, end = set(defaults), ""
    else:
        shown = set(re.findall(r"(?m)^    (\w+): .*?  #: ", source))
        end = f"\n\n--help=all shows all {len(defaults)} options."
        summary = "\n\n".join(summary.split("\n\n")[:2])
    lines = [summary, "", "Options (--name=value):"]
    for line in source.splitlines():
        if (heading := re.match(r"    # (.+)", line)) and not end:
            lines.append(f"\n  {heading[1]}")
        elif (option := re.match(r"    (\w+): .*?  #:? (.+)", line)) and option[1] in shown:
            shown.remove(option[1])  # a field whose default `cls` overrides appears again in the base
            default = "" if defaults[option[1]] is MISSING else f"={defaults[option[1]]!r}"
            lines.append(f"    --{option[1] + default:<38} {option[2]}")
            if get_origin(types[option[1]]) is Literal:
                lines.append(f"      {'':<38} {describe(types[option[1]])}")
    return "\n".join(lines) + end


def describe(kind: Any) -> str:
    """Describe the values that type `kind` allows."""
    if get_origin(kind) is Annotated:
        base, limits = get_args(kind)
        return f"{describe(base)} {limits}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(describe(choice).removeprefix("one of ") for choice in get_args(kind))
    if get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
        return "one of " + (" | " if any("," in choice for choice in choices) else ", ").join(choices)
    names = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text"}
    return (names | {list: "a list", dict: "an object", type(None): "null"}).get(kind, kind.__name__)


def unknown_option(key: str, origin: str, known: Iterable[str]) -> list[str]:
    """Return the error for an option not in `known`; for one in REMOVED print a note and return no error."""
    if key in REMOVED:
        print(f"note: {origin} is ignored, {key} was removed: {REMOVED[key]}", file=sys.stderr)
        return []
    near = difflib.get_close_matches(key.replace("-", "_"), list(known), n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else "see --help"
    return [f"{origin}: unknown option {key!r}; {hint}"]


def non_defaults(config: Any, origins: dict[str, str]) -> list[str]:
    """Return one line per option that differs from its default, with its source: that in `origins`, else the
    run that is resumed."""
    changed = {f.name: value for f in fields(config) if (value := getattr(config, f.name)) != f.default}
    return [f"  {name} = {value!r}  ({origins.get(name, 'saved run')})" for name, value in changed.items()]


def missing_preset(name: str, root: Path) -> UserError:
    """Return the error for a preset `name` that is neither a file nor in config/ of `root`."""
    names = sorted(path.stem for path in (root / "config").glob("*.py"))
    short = {name.removeprefix("train_"): name for name in names}
    near = difflib.get_close_matches(Path(name).stem.removeprefix("train_"), short)
    hint = f"did you mean {' or '.join(short[name] for name in near)}? " if near else ""
    return UserError(f"no preset {name!r}: {hint}there are {', '.join(names)} (options are --key=value)")


def missing_dataset(name: str, root: Path) -> UserError:
    """Return the error for a dataset `name` that is neither a dataset folder nor in data/ of `root`."""
    path = quoted(name) if Path(name).is_file() else "PATH"
    own = f"for your own text {command('prepare')} {path} --out=data/mine, then --dataset=data/mine"
    for folder in (Path(name), Path("data") / name, root / "data" / name):
        if (folder / "prepare.py").is_file():
            return UserError(f"dataset {name!r} is not prepared: {command(f'prepare {folder.name}')}; {own}")
    ready = sorted({p.parent.name for p in (root / "data").glob("*/train*") if p.suffix in (".bin", ".npy")})
    known = f"prepared here: {', '.join(ready)}; " if ready else ""
    return UserError(
        f"no dataset at {name!r}: {known}{own}; without a download {command('prepare python_stdlib')}"
    )
