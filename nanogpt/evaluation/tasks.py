"""Load multiple-choice and cloze tasks from JSONL files or the Hugging Face Hub.

    hellaswag            from the Hub, or a file in the cache folder
    hellaswag:FILE       from a file: .jsonl, plain or compressed (.gz, .bz2, .xz, .zst)
    choice:FILE          any multiple-choice file; cloze:FILE any file of texts to continue
    FILE                 either, detected from its fields
    choice:hub:OWNER/NAME/SPLIT, or OWNER/NAME/CONFIG/SPLIT

Prompts follow lm-eval, so scores are comparable: HellaSwag's activity label precedes the context, the
markup of its WikiHow half is removed, and LAMBADA's target is the last word.
"""

import contextlib
import difflib
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt import cache, files
from nanogpt.errors import UserError, imported
from nanogpt.prepare import formats
from nanogpt.prepare.rows import LONGEST

Row = dict[str, Any]
PASSAGE = ("ctx", "context", "article", "passage", "story", "dialogue", "text")
QUESTION = ("question", "query", "prompt")
CONTEXT = (*PASSAGE, *QUESTION)  # a row with a passage and a question has both as its context
ENDINGS = ("endings", "choices", "options")
LETTERS = [*"ABCDEFGHIJ"]  # names of the endings in some datasets
LABEL = ("label", "gold", "answer", "answerKey")
TARGET = ("target", "completion", "response", "answer")


@dataclass(frozen=True)
class Item:
    """A context and its candidate endings; a cloze item has only the correct ending."""

    context: str
    endings: tuple[str, ...]
    label: int = 0  # index of the correct ending
    joint: str = " "  # separator between context and ending


@dataclass(frozen=True)
class Task:
    name: str
    kind: str  # "choice" or "cloze"
    items: list[Item]
    note: str = ""  # a line about fields of text that were not used


class _Fields(Row):
    """A row that records which of its fields are read."""

    def __init__(self, row: Row):
        super().__init__(row)
        self.unread = {name for name, value in row.items() if isinstance(value, str) and " " in value.strip()}

    def __getitem__(self, name: str) -> Any:
        self.unread.discard(name)
        return super().__getitem__(name)


class _Misfit(ValueError):
    """A row does not have the expected fields; the message does not include its location."""


# ----------------------------------------------------------------------------- rows to items


def hellaswag(row: Row) -> Item:
    """Convert a HellaSwag row (Zellers et al. 2019) with `ctx_a` and `ctx_b`, or `ctx`, their join."""
    if "ctx_a" in row and "ctx_b" in row:
        context = _text(row, ("ctx_a",)) + " " + _text(row, ("ctx_b",), empty=True).capitalize()
    else:
        context = _text(row, ("ctx",))
    labelled = f"{_text(row, ('activity_label',))}: {context}"
    endings = [_unmarked(ending) for ending in _endings(row)]
    return _choice(_unmarked(labelled), endings, _label(row, endings), " ")


def _unmarked(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def lambada(row: Row) -> Item:
    """Convert a LAMBADA row (Paperno et al. 2016, OpenAI's variant); the target is `text`'s last word."""
    context, blank, word = _text(row, ("text",)).rstrip().rpartition(" ")
    if not context.strip() or not blank or not word:
        raise _Misfit("`text` must be at least two words separated by spaces; the last one is the target")
    return Item(context, (word,))


def choice(row: Row) -> Item:
    """Convert a multiple-choice row; also ARC's format, in which `choices` holds `text` and `label`."""
    endings = _endings(row)
    context = _context(row)
    return _choice(context, endings, _label(row, endings), _joint(context, endings))


def cloze(row: Row) -> Item:
    """Convert a row with a context and its continuation, or a `text` whose last word is the target."""
    if "text" in row and not {*CONTEXT, *TARGET} - {"text"} & {*row}:
        if named := [name for name in LABEL if name in row]:
            raise _Misfit(f"`{named[0]}` without `endings` is a class of the text, which is not scored")
        return lambada(row)
    if named := [name for name in ENDINGS if name in row]:
        raise _Misfit(f"it has `{named[0]}`, unlike the rows before it; keep one kind of row in a file")
    context, target = _context(row), _text(row, TARGET)
    return Item(context, (target,), joint=_joint(context, [target]))


def _choice(context: str, endings: list[str], label: int, joint: str) -> Item:
    for number, ending in enumerate(endings):
        if not ending.strip():
            raise _Misfit(f"ending {number} is empty")
    return Item(context, tuple(endings), label, joint)


def _joint(context: str, endings: list[str]) -> str:
    """Return a space, or "" if the context or all endings already have whitespace at the boundary."""
    spaced = {ending[:1].isspace() for ending in endings}
    if len(spaced) > 1:
        raise _Misfit("some endings begin with a space and others do not")
    return "" if context[-1:].isspace() or spaced == {True} else " "


def _context(row: Row) -> str:
    """Return the passage, the question, or both in two paragraphs."""
    if not {*PASSAGE} & {*row} or not {*QUESTION} & {*row}:
        return _text(row, CONTEXT, empty=True)
    return f"{_text(row, PASSAGE, empty=True)}\n{_text(row, QUESTION, empty=True)}"


def _text(row: Row, names: tuple[str, ...], empty: bool = False) -> str:
    value = _first(row, names)
    if not isinstance(value, str) or not (value.strip() or empty):
        wrong = "is empty" if isinstance(value, str) else f"is {value!r:.40}, not text"
        raise _Misfit(f"`{next(name for name in names if name in row)}` {wrong}")
    return value


def _endings(row: Row) -> list[str]:
    value = _first(row, ENDINGS)
    if isinstance(value, dict):
        value = value.get("text")
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(text, str) for text in value):
        raise _Misfit(f"`{'` or `'.join(ENDINGS)}` must be a list of at least two texts")
    return value


def _label(row: Row, endings: list[str]) -> int:
    """Return the index of the correct ending. Raise _Misfit if several fields name different ones."""
    label, labels = _index(_first(row, LABEL), row, endings), {}
    for name in (name for name in LABEL if name in row):
        with contextlib.suppress(_Misfit):  # a text, such as an explanation
            labels[name] = _index(row[name], row, endings)
    if {*labels.values()} != {label}:
        raise _Misfit(f"its fields `{'`, `'.join(labels)}` name different endings")
    return label


def _index(value: Any, row: Row, endings: list[str]) -> int:
    choices = _first(row, ENDINGS)
    if isinstance(choices, dict) and isinstance(choices.get("label"), list):
        labels = [str(label) for label in choices["label"]]
        if str(value) in labels:
            return labels.index(str(value))
    try:
        label = LETTERS.index(value) if value in LETTERS else int(value)
    except (TypeError, ValueError, OverflowError):
        label = -1
    if isinstance(value, bool | float) or not 0 <= label < len(endings):
        raise _Misfit(f"the label is {value!r:.40}, expected an ending's index, 0 to {len(endings) - 1}")
    if value in endings and endings[label] != value:
        raise _Misfit(f"the label {value!r:.40} is an ending, and the index of another")
    return label


def _first(row: Row, names: tuple[str, ...]) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise _Misfit(f"missing `{'` or `'.join(names)}`")


# ----------------------------------------------------------------------------- known tasks


@dataclass(frozen=True)
class Known:
    kind: str
    item: Callable[[Row], Item]
    fields: str  # required fields, for error messages
    hub: str = ""  # OWNER/NAME/CONFIG/SPLIT
    file: str = ""  # file name in the cache folder, for offline use


OF_HELLASWAG = "`activity_label`, `ctx` (or `ctx_a` and `ctx_b`), `endings`, `label`"
OF_LAMBADA = ("`text`", "EleutherAI/lambada_openai/default/test", "lambada_test.jsonl")
OF_ANY = f"a context (`{'`, `'.join(CONTEXT)}`)"
KNOWN = {
    "hellaswag": Known(
        "choice", hellaswag, OF_HELLASWAG, "Rowan/hellaswag/validation", "hellaswag_val.jsonl"
    ),
    "lambada": Known("cloze", lambada, *OF_LAMBADA),
    "choice": Known(
        "choice", choice, f"{OF_ANY}, `endings` or `choices`, and `label` (from 0) or `answerKey`"
    ),
    "cloze": Known("cloze", cloze, f"{OF_ANY} and `target`, or `text` with the last word"),
}


def load(spec: str, limit: int = 0) -> Task:
    """Load the items of `spec` (see the module docstring), only the first `limit` if that is not 0.

    Raise UserError for an unknown task, an invalid row (with file, line, given and expected fields), or if
    the Hub cannot be reached (with the path to place a local file at).
    """
    name, colon, place = spec.partition(":")
    if not colon and name not in KNOWN:
        if not Path(spec).is_file():
            raise UserError(f"unknown task {spec!r}{_nearest(spec)}")
        name, place = "", spec
    elif name not in KNOWN:
        raise UserError(f"unknown task {name!r} in {spec!r}{_nearest(name)}")
    elif not place:
        place = _place(name)
    rows = hub_rows(place[4:], name) if place.startswith("hub:") else file_rows(Path(place))
    kind, items, unread = "", [], set[str]()
    for where, row in itertools.islice(rows, limit or None):
        name = name or _recognised(row)
        kind, fields = KNOWN[name].kind, _Fields(row)
        try:
            items.append(KNOWN[name].item(fields))
        except _Misfit as problem:
            there = ", ".join(row) or "none"
            raise UserError(
                f"{where} is not a valid {name} item: {problem}. Its fields are {there}; "
                f"expected: {KNOWN[name].fields}"
            ) from None
        unread |= fields.unread
    if not items:
        raise UserError(f"{place} has no items; give a file with one JSON object per line")
    shown = name if name not in ("choice", "cloze") else Path(place).name.split(".")[0]
    told = unread and not KNOWN[name].hub  # the other fields of known tasks are not part of them
    note = f"{shown}: fields not used: {', '.join(sorted(unread))}\n" if told else ""
    return Task(shown, kind, items, note)


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, KNOWN, n=1)
    hint = f"; did you mean {near[0]!r}" if near else ""
    return f"{hint}; give {', '.join(KNOWN)} (NAME or NAME:FILE), a JSONL file, or lm_eval:NAME"


def _recognised(row: Row) -> str:
    if "activity_label" in row:
        return "hellaswag"
    return "choice" if any(name in row for name in ENDINGS) else "cloze"


def _place(name: str) -> str:
    """Return the location of a task given without a file: in the cache folder, else on the Hub."""
    known = KNOWN[name]
    if not known.hub:
        raise UserError(f"--tasks={name} needs a file: --tasks={name}:FILE.jsonl")
    for ending in ("", *formats.PACKED_SUFFIXES):
        if (file := _cached(known.file + ending)).is_file():
            return str(file)
    return f"hub:{known.hub}"


def _cached(file: str) -> Path:
    return cache.cache_folder() / "tasks" / file


# ----------------------------------------------------------------------------- sources of rows


def file_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (location, object) for each line of a JSONL file. Raise UserError naming an invalid line."""
    if not path.is_file():
        raise UserError(f"no task file at {path}")
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, files.parse_json(line, where, dict)


def _lines(path: Path) -> Iterator[bytes]:
    rest = b""
    for block in itertools.chain(formats.unpacked(path), [b"\n"]):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
        if len(rest) > LONGEST:
            raise UserError(f"{path} has a line of more than {LONGEST:,} bytes, too long for an item")


def hub_rows(place: str, name: str) -> Iterator[tuple[str, Row]]:
    """Yield (location, row) for a Hugging Face Hub dataset OWNER/NAME/SPLIT or OWNER/NAME/CONFIG/SPLIT."""
    datasets = imported("datasets", f"{_elsewhere(place, name)}; to use the Hub")
    parts = place.split("/")
    if len(parts) not in (3, 4):
        raise UserError(f"hub:{place}: expected hub:OWNER/NAME/SPLIT or hub:OWNER/NAME/CONFIG/SPLIT")
    datasets.disable_progress_bars()
    quiet_hub()
    try:
        dataset = datasets.load_dataset("/".join(parts[:2]), *parts[2:-1], split=parts[-1])
    except Exception as error:  # any error of the network or the Hub, or a missing split
        reason = (str(error).splitlines() or [""])[0][:160]
        raise UserError(
            f"cannot load {place} from the Hub ({type(error).__name__}: {reason}); {_elsewhere(place, name)}"
        ) from None
    for number, row in enumerate(dataset, 1):
        yield f"{place}, row {number}", row


def quiet_hub() -> None:
    """Silence the Hub client's log line per retry; the final exception has the same message."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _elsewhere(place: str, name: str) -> str:
    known = KNOWN.get(name)
    if known and known.hub == place:
        put = f"put {known.file} at {_cached(known.file)}"
        return f"offline, {put}, or name a file: --tasks={name}:FILE.jsonl"
    return f"offline, name a file with these rows: --tasks={name}:FILE.jsonl"
