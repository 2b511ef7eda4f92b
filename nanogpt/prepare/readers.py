"""Read files and datasets of any size as pieces of about a megabyte, and pieces as documents.

Reading is divided by cost: one process decompresses and cuts (`pieces`); the expensive part, parsing rows
and encoding, is done per piece in any process (`documents`). A piece records where reading resumes after it,
so an interrupted preparation need not start over.
"""

import copy
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanogpt.errors import UserError, imported
from nanogpt.prepare import formats, rows, tables, text_files
from nanogpt.prepare.formats import Advance
from nanogpt.prepare.rows import BadRow
from nanogpt.prepare.text_files import Source
from nanogpt.tokenizer import isolated

MARKS = {"line": "\n", "blank_line": "\n\n"}  # names of --split_at


@dataclass(frozen=True)
class Reading:
    """Reading options."""

    text_key: str = "text"  # field or column that contains the text
    # Splits a long text where this does not change the ids.
    parts: Callable[[Iterable[str]], Iterator[str]] = iter
    split_at: str = ""  # mark between the documents of a text, or a name in MARKS


@dataclass(frozen=True)
class Piece:
    source: int  # index of the source
    place: Any  # where to resume reading after it; JSON-serializable
    content: str | bytes | list[Any]  # a part of a text, lines of JSON, or values of a column
    first: int = 1  # rows: number of the first, from 1
    offset: int = 0  # text: number of characters before the piece


def pieces(
    sources: list[Source],
    reading: Reading,
    start: tuple[int, Any] = (0, None),
    advance: Advance = lambda count: None,
) -> Iterator[Piece]:
    """Yield all pieces from `start` on: (index of a source, place in it).

    The documents of given sources do not depend on interruptions. `advance` is called with the number of
    bytes read. Raise UserError, naming the file, if one has changed or cannot be read.
    """
    for index in range(start[0], len(sources)):
        source = sources[index]
        if source.kind != "hub":
            status = source.path.stat()
            if (status.st_size, status.st_mtime_ns) != (source.bytes, source.modified_ns):
                raise UserError(f"{source.path} changed while it was being read; run this again")
        reader = READERS.get(source.kind, _lines)
        try:
            yield from reader(index, source, reading, start[1] if index == start[0] else None, advance)
        except UserError as error:
            raise text_files.named(source.path, error) from None


def documents(piece: Piece, text_key: str) -> Iterator[tuple[int, str | BadRow]]:
    """Yield (number, document) for a piece of rows: "" for empty rows, BadRow for unreadable ones."""
    content = piece.content.split(b"\n") if isinstance(piece.content, bytes) else piece.content
    for number, value in enumerate(content, piece.first):
        if isinstance(value, BadRow):
            yield number, replace(value, number=number)
        elif isinstance(value, list):
            yield number, rows.checked(value, number, rows.keys_of(text_key))
        elif not isinstance(value, bytes):
            yield number, rows.checked([value or ""], number, [text_key])
        elif value and not value.isspace():
            yield number, rows.document(value, number, text_key)


# ----------------------------------------------------------------------------- files


def _text(index: int, source: Source, reading: Reading, place: Any, advance: Advance) -> Iterator[Piece]:
    offset = 0
    for part in reading.parts(text_files.with_newlines(text_files.decoded(source, advance))):
        after = offset + len(part)
        if part and offset >= (place or 0):
            yield Piece(index, after, part, offset=offset)
        offset = after


def _marked(index: int, source: Source, reading: Reading, place: Any, advance: Advance) -> Iterator[Piece]:
    """Yield the documents between the marks of a text, without the line breaks around them."""
    mark, number, rest = MARKS.get(reading.split_at, reading.split_at), 1, ""
    chunks = text_files.with_newlines(text_files.decoded(source, advance))
    for chunk in itertools.chain(chunks, [None]):  # None: the end
        rest += chunk or ""
        if chunk is not None and len(rest) < formats.BLOCK:
            continue
        if reading.split_at == "blank_line":
            rest = re.sub(r"\n[ \t]+(?=\n)", "\n", rest)
        *whole, rest = [*rest.split(mark), ""] if chunk is None else rest.split(mark)
        if len(rest) > rows.LONGEST:
            raise UserError(
                f"document {number + len(whole)} has more than {rows.LONGEST:,} characters "
                f"before the next {mark!r}; put such a text in a file of its own"
            )
        if whole and number > (place or 0):
            yield Piece(index, number + len(whole) - 1, [document.strip("\n") for document in whole], number)
        number += len(whole)


def _lines(index: int, source: Source, reading: Reading, place: Any, advance: Advance) -> Iterator[Piece]:
    """Yield the rows of JSON or CSV as lines of JSON."""
    done, lines = place or (0, 0)  # bytes and lines read
    rest = b""
    for block in text_files.lines_of(source, reading.text_key, done, advance):
        rest += block
        if len(rest) < formats.BLOCK:
            continue
        end = rest.rfind(b"\n") + 1
        if end:
            content, rest = rest[:end], rest[end:]
            done, first, lines = done + end, lines + 1, lines + content.count(b"\n")
            yield Piece(index, (done, lines), content, first)
        if len(rest) > rows.LONGEST:
            raise UserError(
                f"line {lines + 1} is longer than {rows.LONGEST:,} bytes; "
                "put such a text in a file of its own"
            )
    if rest:
        yield Piece(index, (done + len(rest), lines + rest.count(b"\n")), rest, lines + 1)


def check_columns(sources: Iterable[Source], text_key: str) -> None:
    """Raise UserError for the first Parquet or Arrow file without text columns `text_key`."""
    for source in sources:
        if source.kind == "table":
            isolated.call(str(source.path), source.bytes, tables.check, source.path, text_key)


def _table(index: int, source: Source, reading: Reading, place: Any, advance: Advance) -> Iterator[Piece]:
    seen, row = 0, place or 0
    name, key = str(source.path), reading.text_key
    while batch := isolated.call(name, source.bytes, tables.batch, source.path, key, row):
        row, values, position = batch
        row += len(values)
        yield Piece(index, row, values, row - len(values) + 1)
        position = min(source.bytes, position)
        advance(max(0, position - seen))
        seen = max(seen, position)
    advance(source.bytes - seen)


# ----------------------------------------------------------------------------- Hugging Face datasets


def hub(name: str, text_key: str, instead: str) -> Source:
    """Return the hub dataset NAME[:CONFIG[:SPLIT]][@REVISION], or a folder in its format, as a source; of
    several, separated by "|", the first that exists. NAME/PATTERN selects files of the repository.

    Raise UserError if it is unusable; `instead` is the hint if the hub cannot be reached.
    """
    name, _, others = name.partition("|")
    try:
        dataset = _open_hub(name, text_key, instead)
    except UserError:
        if others:
            return hub(others, text_key, instead)
        raise
    info = dataset.info
    split = (info.splits or {}).get(str(dataset.split))
    size = (split.num_bytes if split else 0) or 0
    return Source(Path(name), name, "hub", size, "", 0, instead=instead)


def _open_hub(name: str, text_key: str, instead: str) -> Any:
    datasets = _datasets()
    rest, _, revision = name.partition("@")
    path, config, split = [*rest.split(":"), "", ""][:3]
    chosen = None
    if path.count("/") > 1 and not Path(path).exists():
        owner, repository, chosen = path.split("/", 2)
        path = f"{owner}/{repository}"
    args = {"split": split or "train", "revision": revision or None, "data_files": chosen, "streaming": True}
    try:
        dataset = datasets.load_dataset(path, config or None, **args)
        if dataset.num_shards < int((re.findall(r"-of-0*(\d+)", name) or [0])[0]):
            raise ValueError(f"only {dataset.num_shards} of these files are there")
        columns = dataset.column_names or list(next(iter(dataset)))
    except (OSError, RuntimeError, ValueError, StopIteration) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"--hub={name}: {reason[:300] or type(error).__name__}; {instead}") from None
    kinds = {
        column: str(feature.dtype) if hasattr(feature, "dtype") else type(feature).__name__
        for column, feature in (dataset.features or dict.fromkeys(columns)).items()
        if feature is not None
    } or dict.fromkeys(columns, "string")
    return dataset.select_columns(tables.choose(f"--hub={name}", kinds, text_key))


def _datasets() -> Any:
    """Import the datasets package without torch, which it does not need here; saves 200 MB."""
    heavy = "torch" in sys.modules or "USE_TORCH" in os.environ
    if not heavy:
        os.environ["USE_TORCH"] = "0"
    try:
        datasets = imported("datasets", "hub datasets need a package")
    finally:
        if not heavy:
            del os.environ["USE_TORCH"]
    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)  # keep library warnings off stderr
    return datasets


def _hub(index: int, source: Source, reading: Reading, place: Any, advance: Advance) -> Iterator[Piece]:
    dataset = _open_hub(source.name, reading.text_key, source.instead)
    row, state = place or (0, None)
    if state:
        dataset.load_state_dict(state)
    for batch in dataset.iter(batch_size=64):
        columns = [batch[key] for key in rows.keys_of(reading.text_key)]
        values = columns[0] if len(columns) == 1 else [list(pair) for pair in zip(*columns, strict=True)]
        advance(sum(len(value or "") for column in columns for value in column))
        yield Piece(index, (row + len(values), copy.deepcopy(dataset.state_dict())), values, row + 1)
        row += len(values)


READERS = {"text": _text, "marked": _marked, "table": _table, "hub": _hub}
