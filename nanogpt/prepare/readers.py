"""Read files and datasets of any size as pieces of about a megabyte, and pieces as documents.

Reading is divided by cost: one process decompresses and cuts (`pieces`); the expensive part, parsing rows
and encoding, is done per piece in any process (`rows`). A piece records where reading resumes after it,
so an interrupted preparation need not start over.
"""

import contextlib
import copy
import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nanogpt.errors import UserError
from nanogpt.prepare import text_files
from nanogpt.prepare.text_files import Advance, Source

MARKS = {"line": "\n", "blank_line": "\n\n"}  # names of --split_at
LONGEST_ROW = 1 << 24  # maximum bytes per line of JSONL, which is parsed whole
ROWS = 256  # table rows read at a time


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
    content: str | bytes | list[Any]  # a part of a text, lines of JSONL, or values of a column
    first: int = 1  # rows: number of the first, from 1
    offset: int = 0  # text: number of characters before the piece


@dataclass(frozen=True)
class BadRow:
    number: int  # line or row number, from 1
    reason: str


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
        reader = {"text": _text, "marked": _marked, "jsonl": _jsonl, "hub": _hub}.get(source.kind, _table)
        yield from reader(index, source, reading, start[1] if index == start[0] else None, advance)


def rows(piece: Piece, kind: str, text_key: str) -> Iterator[str | BadRow]:
    """Yield the documents of a piece of rows: "" for empty rows, BadRow for unreadable ones."""
    if kind != "jsonl":
        for number, value in enumerate(piece.content, piece.first):
            surrogate = text_files.lone_surrogate(value or "")
            yield BadRow(number, f"contains {surrogate}, which is not text") if surrogate else value or ""
        return
    assert isinstance(piece.content, bytes)
    for number, line in enumerate(piece.content.split(b"\n"), piece.first):
        if line and not line.isspace():
            yield _row(line, number, text_key)


def _row(line: bytes, number: int, text_key: str) -> str | BadRow:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return BadRow(number, f"is not valid JSON: {error}")
    body = row.get(text_key) if isinstance(row, dict) else None
    prompt, plus, response = text_key.partition("+")
    if plus and body is None:
        body = text_files.pair(row, prompt, response)
    if plus and body is None and isinstance(row, dict) and row.get(response) == "":
        return BadRow(number, f"has an empty `{response}`; remove the row, or skip all such with --skip_bad")
    if not isinstance(body, str):
        keys = f'"{prompt}": "...", "{response}": "..."' if plus else f'"{text_key}": "..."'
        return BadRow(number, f"has no string `{text_key}`; each line must be like {{{keys}}}{_others(row)}")
    if surrogate := text_files.lone_surrogate(body):
        return BadRow(number, f"contains {surrogate}, which is not text")
    return body


def _others(row: Any) -> str:
    names = [name for name, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
    if {"prompt", "response"} <= set(names):
        return " (or train on responses to prompts with --text_key=prompt+response)"
    return f" (or set --text_key to one of {', '.join(names[:20])})" if names else ""


# ----------------------------------------------------------------------------- text


def _text(index: int, source: Source, reading: Reading, place: Any, advance: Advance) -> Iterator[Piece]:
    offset = 0
    chunks = text_files.with_newlines(text_files.decoded(source.path, source.encoding, source.mark, advance))
    for part in reading.parts(chunks):
        after = offset + len(part)
        if part and offset >= (place or 0):
            yield Piece(index, after, part, offset=offset)
        offset = after


def _marked(index: int, source: Source, reading: Reading, place: Any, advance: Advance) -> Iterator[Piece]:
    """Yield the documents between the marks of a text, without the line breaks around them."""
    mark, number, rest = MARKS.get(reading.split_at, reading.split_at), 1, ""
    chunks = text_files.with_newlines(text_files.decoded(source.path, source.encoding, source.mark, advance))
    for chunk in itertools.chain(chunks, [None]):  # None: the end
        rest += chunk or ""
        if chunk is not None and len(rest) < text_files.BLOCK:
            continue
        *whole, rest = [*rest.split(mark), ""] if chunk is None else rest.split(mark)
        if len(rest) > LONGEST_ROW:
            raise UserError(
                f"{source.path}: document {number + len(whole)} has more than {LONGEST_ROW:,} characters "
                f"before the next {mark!r}; put such a text in a file of its own"
            )
        if whole and number > (place or 0):
            yield Piece(index, number + len(whole) - 1, [document.strip("\n") for document in whole], number)
        number += len(whole)


# ----------------------------------------------------------------------------- JSONL


def _jsonl(index: int, source: Source, reading: Reading, place: Any, advance: Advance) -> Iterator[Piece]:
    done, lines = place or (0, 0)  # UTF-8 bytes and lines read
    rest = b""
    for block in _blocks(source, done, advance):
        rest += block
        if len(rest) < text_files.BLOCK:
            continue
        end = rest.rfind(b"\n") + 1
        if end:
            content, rest = rest[:end], rest[end:]
            done, first, lines = done + end, lines + 1, lines + content.count(b"\n")
            yield Piece(index, (done, lines), content, first)
        if len(rest) > LONGEST_ROW:
            raise UserError(
                f"{source.path}, line {lines + 1} is longer than {LONGEST_ROW:,} bytes; "
                "put such a text in a file of its own"
            )
    if rest:
        yield Piece(index, (done + len(rest), lines + rest.count(b"\n")), rest, lines + 1)


def _blocks(source: Source, skip: int, advance: Advance) -> Iterator[bytes]:
    """Yield the UTF-8 of a JSONL file after its first `skip` bytes; raise UserError if it is damaged."""
    if source.encoding != "utf-8":
        for chunk in text_files.decoded(source.path, source.encoding, source.mark, advance):
            data = chunk.encode("utf-8", "surrogatepass")
            yield data[skip:]
            skip = max(0, skip - len(data))
        return
    skip += source.mark
    with source.path.open("rb") as raw:
        seen = 0
        if source.path.suffix.lower() == ".jsonl":
            skip = skip - raw.seek(skip)
        try:
            for data in _unpacked(raw, source.path):
                seen, before = raw.tell(), seen
                advance(seen - before)
                yield data[skip:]
                skip = max(0, skip - len(data))
        except _errors_of_compression() as error:
            raise UserError(
                f"{source.path} is damaged or partially downloaded ({error}); download it again"
            ) from None


def _unpacked(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        return _zstandard(raw, path)
    file: Any = raw
    if suffix == ".gz":
        import gzip

        file = gzip.GzipFile(fileobj=raw)
    elif suffix == ".xz":
        import lzma

        file = lzma.LZMAFile(raw)  # noqa: SIM115
    return iter(lambda: file.read(text_files.BLOCK), b"")


def _zstandard(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    """Decompress all frames; raise EOFError if the file ends within one (the package's reader does not)."""
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path} needs a package: pip install zstandard") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # of zstd --long=31
    frame = decompressor.decompressobj()
    whole = True
    while packed := raw.read(1 << 14):
        while packed:
            if frame.eof:
                frame = decompressor.decompressobj()
            yield frame.decompress(packed)
            whole, packed = frame.eof, frame.unused_data
    if not whole:
        raise EOFError("truncated frame")


def _errors_of_compression() -> tuple[type[Exception], ...]:
    import gzip
    import lzma
    import zlib

    errors = [EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile]
    with contextlib.suppress(ImportError):
        import zstandard

        errors.append(zstandard.ZstdError)
    return tuple(errors)


# ----------------------------------------------------------------------------- tables


def check_columns(sources: Iterable[Source], text_key: str) -> None:
    """Raise UserError for the first Parquet or Arrow file without a text column `text_key`."""
    for source in sources:
        if source.kind in ("parquet", "arrow"):
            with _Table(source) as table:
                _check_column(str(source.path), table.columns, text_key)


def _check_column(where: str, columns: dict[str, str], text_key: str) -> None:
    if columns.get(text_key, "") not in ("string", "large_string", "string_view"):
        what = f"is of type {columns[text_key]}" if text_key in columns else "does not exist"
        there = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
        raise UserError(
            f"{where}: column {text_key!r} {what}; existing columns: {there or 'none'}; "
            "choose one with --text_key=NAME"
        )


class _Table:
    """A Parquet or Arrow file, read in batches."""

    def __init__(self, source: Source):
        try:
            import pyarrow
            import pyarrow.ipc
            import pyarrow.parquet
        except ImportError:
            raise UserError(f"{source.path} needs a package: pip install pyarrow") from None
        self._path = source.path
        try:
            self._file = source.path.open("rb")
            if source.kind == "parquet":
                self._parquet = pyarrow.parquet.ParquetFile(self._file, buffer_size=1 << 20)
                schema = self._parquet.schema_arrow
            else:
                self._arrow = pyarrow.ipc.open_stream(self._file)
                schema = self._arrow.schema
        except pyarrow.ArrowInvalid as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{source.path} is not a complete {source.kind} file ({reason}); download it again"
            ) from None
        self._is_parquet = source.kind == "parquet"
        self.columns = {column.name: str(column.type) for column in schema}

    def __enter__(self) -> "_Table":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _whole(self, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except (OSError, ValueError) as error:  # Arrow's errors for unreadable data
            reason = str(error).splitlines()[0]
            raise UserError(f"{self._path} is damaged ({reason}); download it again") from None

    def batches(self, text_key: str, skip: int) -> Iterator[tuple[int, Any]]:
        """Yield (row number from 0, Arrow array) from row `skip` on."""
        row = 0
        if self._is_parquet:
            sizes = [
                self._parquet.metadata.row_group(i).num_rows for i in range(self._parquet.num_row_groups)
            ]
            first = 0
            while first < len(sizes) and row + sizes[first] <= skip:
                row, first = row + sizes[first], first + 1
            groups = list(range(first, len(sizes)))
            batches = self._parquet.iter_batches(ROWS, groups, [text_key], use_threads=False)
        else:
            batches = iter(self._arrow)
        for batch in self._whole(batches):
            for start in range(0, batch.num_rows, ROWS):
                array = batch.column(text_key)[start : start + ROWS]
                if row + len(array) > skip:
                    drop = max(0, skip - row)
                    yield row + drop, array[drop:]
                row += len(array)


def _table(index: int, source: Source, reading: Reading, place: Any, advance: Advance) -> Iterator[Piece]:
    with _Table(source) as table:
        total = 0
        for row, array in table.batches(reading.text_key, place or 0):
            yield from _values(index, row, array)
            position = min(source.bytes, table._file.tell())
            advance(max(0, position - total))
            total = max(total, position)
        advance(source.bytes - total)


def _values(index: int, row: int, array: Any) -> Iterator[Piece]:
    """Yield the values of an array as pieces, halving it while it is too large."""
    if len(array) > 1 and array.nbytes > 2 * text_files.BLOCK:
        half = len(array) // 2
        yield from _values(index, row, array[:half])
        yield from _values(index, row + half, array[half:])
    else:
        yield Piece(index, row + len(array), array.to_pylist(), row + 1)


# ----------------------------------------------------------------------------- Hugging Face datasets


def hub(name: str, text_key: str, instead: str) -> Source:
    """Return the hub dataset NAME[:CONFIG[:SPLIT]][@REVISION], or a folder in its format, as a source; of
    several, separated by "|", the first that is there. NAME/PATTERN selects files of the repository.

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
    how = {"split": split or "train", "revision": revision or None, "data_files": chosen, "streaming": True}
    try:
        dataset = datasets.load_dataset(path, config or None, **how)
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
    _check_column(f"--hub={name}", kinds, text_key)
    return dataset.select_columns([text_key])


def _datasets() -> Any:
    """Import the datasets package without torch, which it does not need here; saves 200 MB."""
    heavy = "torch" in sys.modules or "USE_TORCH" in os.environ
    if not heavy:
        os.environ["USE_TORCH"] = "0"
    try:
        import datasets
    except ImportError:
        raise UserError("hub datasets need a package: pip install datasets") from None
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
        values = batch[reading.text_key]
        advance(sum(len(value or "") for value in values))
        yield Piece(index, (row + len(values), copy.deepcopy(dataset.state_dict())), values, row + 1)
        row += len(values)


def progress_total(sources: Iterable[Source]) -> int | None:
    """Return the number of bytes to read in all sources, or None if unknown."""
    total = sum(source.bytes for source in sources)
    return total if all(source.bytes for source in sources) else None
