"""Read Parquet and Arrow files with pyarrow; but for `saved`, called in another process by `readers`."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nanogpt import files
from nanogpt.errors import UserError, imported
from nanogpt.prepare import rows
from nanogpt.prepare.formats import BLOCK

ROWS = 256  # rows read at a time
STRINGS = ("string", "large_string", "string_view", "null")

Batch = tuple[int, list[Any], int]  # number of the first row from 0, documents, position in the file

_next: tuple[Any, Iterator[Batch]] = (None, iter(()))  # arguments of the next `batch`, batches left


def saved(folder: Path) -> set[str]:
    """Return the names of the tables that a dataset of save_to_disk consists of; empty for other folders."""
    with contextlib.suppress(OSError, UserError):
        state = files.read_json(folder / "state.json", {"_data_files": [{"filename": str}]})
        return {row["filename"] for row in state["_data_files"]}
    return set()


def choose(where: str, columns: dict[str, str], text_key: str) -> list[str]:
    """Return the columns of `text_key` among {name: type}. Raise UserError if they are not text."""
    keys = rows.keys_of(text_key)
    for key in keys:
        if columns.get(key, "") not in STRINGS:
            problem = f"is of type {columns[key]}" if key in columns else "does not exist"
            there = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
            raise UserError(
                f"{where}: column {key!r} {problem}; existing columns: {there or 'none'}; "
                "choose one with --text_key=NAME"
            )
    return keys


def check(path: Path, text_key: str) -> None:
    """Raise UserError if the file has no columns of text `text_key`."""
    for _ in _batches(path, text_key, 0, check=True):
        pass


def batch(path: Path, text_key: str, row: int) -> Batch | None:
    """Return the documents of the file from `row` on, about a megabyte; None at the end.

    A document is a text or None, or a list of two for prompt and response. Raise UserError if the file is
    damaged.
    """
    global _next
    known, batches = _next
    if known != (path, text_key, row):
        batches = _batches(path, text_key, row)
    result = next(batches, None)
    _next = ((path, text_key, result[0] + len(result[1])), batches) if result else (None, iter(()))
    return result


def _batches(path: Path, text_key: str, skip: int, check: bool = False) -> Iterator[Batch]:
    """Yield all batches from row `skip` on; with `check`, only check the columns."""
    pyarrow = imported("pyarrow", f"{path} needs a package")
    try:
        with path.open("rb") as file:
            schema, read = _open(file)
            keys = choose(str(path), dict(_columns("", schema)), text_key)
            for row, batch in () if check else read(keys, skip):
                columns = [_column(batch, key) for key in keys]
                for first in range(max(0, skip - row), batch.num_rows, ROWS):
                    part = [column[first : first + ROWS] for column in columns]
                    for number, documents in _documents(row + first, part):
                        yield number, documents, file.tell()
    except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or incomplete ({reason}); download it again") from None


def _open(file: BinaryIO) -> tuple[Any, Callable[[list[str], int], Iterator[tuple[int, Any]]]]:
    """Return the schema of a file and the function that reads batches and the numbers of their first rows,
    without batches that end before a given row."""
    import pyarrow.ipc
    import pyarrow.parquet

    start = file.read(6)
    file.seek(0)
    if start.startswith(b"PAR1"):
        # pre_buffer, the default, would hold whole columns in memory, not only buffer_size of them.
        table = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)

        def groups(keys: list[str], skip: int) -> Iterator[tuple[int, Any]]:
            row = 0
            for group in range(table.num_row_groups):
                size = table.metadata.row_group(group).num_rows
                if row + size > skip:
                    first = row
                    for batch in table.iter_batches(ROWS, [group], keys, use_threads=False):
                        yield first, batch
                        first += batch.num_rows
                row += size

        return table.schema_arrow, groups
    whole = start == b"ARROW1"
    reader = (pyarrow.ipc.open_file if whole else pyarrow.ipc.open_stream)(file)

    def batches(keys: list[str], skip: int) -> Iterator[tuple[int, Any]]:
        row = 0
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if whole else reader:
            yield row, batch
            row += batch.num_rows

    return reader.schema, batches


def _columns(prefix: str, fields: Any) -> Iterator[tuple[str, str]]:
    """Yield (name, type) of all columns, and of the fields of nested ones as OUTER.INNER."""
    for field in fields:
        kind = field.type.value_type if hasattr(field.type, "index_type") else field.type  # categorical
        yield prefix + field.name, str(kind)
        if str(kind).startswith("struct<"):
            yield from _columns(f"{prefix}{field.name}.", kind)


def _column(batch: Any, key: str) -> Any:
    """Return a column of text, or of fields of a nested column."""
    import pyarrow.compute

    if key in batch.schema.names:
        column = batch.column(key)
    else:
        outer = max((name for name in batch.schema.names if key.startswith(f"{name}.")), key=len)
        column = pyarrow.compute.struct_field(batch.column(outer), key[len(outer) + 1 :].split("."))
    return column.cast("large_string") if hasattr(column.type, "index_type") else column


def _documents(row: int, columns: list[Any]) -> Iterator[tuple[int, list[Any]]]:
    """Yield the values of the columns, from `row` on, in halves while they are too large."""
    size = len(columns[0])
    if size > 1 and sum(column.nbytes for column in columns) > 2 * BLOCK:
        yield from _documents(row, [column[: size // 2] for column in columns])
        yield from _documents(row + size // 2, [column[size // 2 :] for column in columns])
    else:
        values = [_values(column) for column in columns]
        yield row, values[0] if len(values) == 1 else [list(pair) for pair in zip(*values, strict=True)]


def _values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(value) for value in column]


def _value(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return rows.BadRow(0, "is not valid UTF-8")
