"""Atomic, durable file writes that survive a kill or a power failure.

A file or folder appears under its final name only when it is complete: it is written under a temporary
name, flushed to disk with fsync and renamed; the rename is flushed too. A reader sees either the old or
the new state. Tests replace `sync` and `rename` to fail at any point.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nanogpt.config import fitted
from nanogpt.errors import UserError

LARGEST = 1 << 26  # characters; tokenizers of 256,000 tokens have half of that
TEMPORARY = ".tmp-"  # part of the name of every incomplete file


def sync(path: Path) -> None:
    """Flush a file or a folder to disk (`fsync`)."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder, and need not flush it
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(source: Path, target: Path) -> None:
    """Rename `source` to `target`, replacing it, and flush the rename to disk."""
    os.replace(source, target)
    sync(target.parent)


def temporary(path: Path) -> Path:
    """Return the temporary name under which `path` is written, unique to this process."""
    return path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Write the file or folder `path` under a temporary name; rename it if the block succeeds.

    >>> with staged(folder / "meta.json") as draft:
    ...     draft.write_text("{}")
    """
    draft = temporary(path)
    remove(draft)
    try:
        yield draft
        for file in sorted(draft.iterdir()) if draft.is_dir() else []:
            sync(file)
        sync(draft)
        rename(draft, path)
    except BaseException:
        remove(draft)
        raise


def write_text(path: Path, text: str) -> None:
    with staged(path) as draft:
        draft.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def text_of(path: Path) -> str:
    """Read a UTF-8 file. Raise UserError if it is missing, not UTF-8 or longer than LARGEST characters."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST)
            if file.read(1):
                raise UserError(f"{path} is too large: at most {LARGEST:,} characters are read")
            return text
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: not UTF-8 text ({error.reason}, byte {error.start})") from None


def read_json(path: Path, schema: Any = Any) -> Any:
    """Parse a JSON file. Raise UserError naming the file if it is missing, invalid or not of `schema`."""
    return parse_json(text_of(path), str(path), schema)


def parse_json(text: str | bytes, where: str, schema: Any = Any) -> Any:
    """Parse JSON and check it with config.fitted. Raise UserError naming `where` it is from."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error})") from None
    return fitted(schema, value, where)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Delete a file or a whole folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def lock(folder: Path) -> FileLock:
    """Lock `folder` for this process. Raise UserError if another process holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / ".lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is writing to {folder}; wait for it, or choose another") from None
    return held
