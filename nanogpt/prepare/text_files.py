"""Find text files and their encodings: any common encoding, newline style and size, in constant memory.

Files are read a megabyte at a time, so that their size does not matter. An encoding is accepted only on
evidence, since a wrong guess silently trains on garbage: a byte order mark, UTF-8 valid to the last byte,
UTF-16 by its NUL bytes, GB18030 by the most common Chinese characters. Anything else is refused, with the
position and the option that sets the encoding. Files with one document per row (JSONL, Parquet, Arrow)
are only located here; the module `readers` reads both kinds.
"""

import codecs
import glob
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt import files
from nanogpt.errors import UserError

Advance = Callable[[int], object]  # called with the number of bytes read

BLOCK = 1 << 20  # bytes read at a time
MARKS = {  # byte order marks; UTF-32 first, as its LE mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}
ROWS = {  # files with one document per row, by suffix
    **dict.fromkeys((".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".ndjson"), "jsonl"),
    ".parquet": "parquet",
    ".arrow": "arrow",
}
FORMATS = {  # first bytes of files that are not text, whatever encoding they are read in
    b"%PDF-": "a PDF file: convert it to text first",
    b"PK\x03\x04": "a zip archive, such as a .docx or .zip file: extract its text first",
    b"\xd0\xcf\x11\xe0": "an old Office document: convert it to text first",
    b"\x1f\x8b": "compressed (gzip): decompress it, or name it .jsonl.gz if each line is a JSON object",
    b"BZh": "compressed (bzip2): decompress it first",
    b"\xfd7zXZ": "compressed (xz): decompress it, or name it .jsonl.xz if each line is a JSON object",
    b"\x28\xb5\x2f\xfd": "compressed (zstd): decompress it, or name it .jsonl.zst if its lines are JSON",
    b"\x89PNG": "an image (PNG)",
    b"\xff\xd8\xff": "an image (JPEG)",
    b"PAR1": "a Parquet file: name it .parquet",
    b"\x93NUMPY": "a NumPy array: token files are trained on directly, without prepare.py",
    b"SQLite format 3": "an SQLite database: export its text first",
}
_LOWER = bytes(range(256)).lower()
_LEFT_OUT = bytes(byte for byte in range(128) if not chr(byte).isalnum())


@dataclass(frozen=True)
class Document:
    """Length and fingerprints of a text."""

    characters: int
    exact: bytes  # SHA-256 of its UTF-8; decides its split
    folded: int  # 63-bit hash that ignores case, blanks and ASCII punctuation


class Digest:
    """Incremental computation of the `Document` of a text given in chunks."""

    def __init__(self) -> None:
        self._characters = 0
        self._exact, self._folded = hashlib.sha256(), hashlib.blake2b(digest_size=8)

    def add(self, text: str) -> bytes:
        """Add a chunk; return it as UTF-8."""
        data = text.encode("utf-8")
        self._characters += len(text)
        self._exact.update(data)
        self._folded.update(data.translate(_LOWER, _LEFT_OUT))
        return data

    def document(self) -> Document:
        folded = int.from_bytes(self._folded.digest(), "little") >> 1
        return Document(self._characters, self._exact.digest(), folded)


@dataclass(frozen=True)
class Source:
    """A readable file or hub dataset."""

    path: Path
    name: str  # shown and recorded: relative to the given path
    kind: str  # text (one document), jsonl, parquet, arrow, hub
    bytes: int
    sha256: str
    modified_ns: int
    encoding: str = "utf-8"
    mark: int = 0  # length of the byte order mark in bytes
    document: Document | None = None  # kind text only
    newlines_changed: bool = False  # kind text only: had CRLF or CR
    instead: str = ""  # kind hub only: hint if the hub cannot be reached


@dataclass
class Texts:
    """Sources found, and files skipped."""

    sources: list[Source] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (file name, reason)


class _NotText(UserError):
    """Reason why a file cannot be read as text, without its name."""


class _Undecodable(_NotText):
    """Position where an encoding failed; another encoding may succeed."""


def find(
    paths: Iterable[Path],
    encoding: str = "",
    keep: Callable[[Path], bool] = lambda file: True,
    advance: Advance = lambda count: None,
) -> Texts:
    """Read every text file once, completely, and return the readable sources; files of rows are only hashed.

    A path may be a glob pattern such as `data/*.parquet`. Folders are searched in order of names, without
    hidden files and those that `keep` rejects. Files in folders that are not text are skipped and listed.
    Raise UserError if such a file was named itself; it may contain up to 10 % NUL characters. `encoding`
    overrides detection. `advance` is called with the number of bytes read.
    """
    _check_name(encoding)
    found = Texts()
    seen: set[str] = set()
    for path in paths:
        matches = [path] if path.exists() else [Path(name) for name in sorted(_matching(str(path)))]
        if not matches:
            raise UserError(f"{path}: no such file or folder")
        for match in matches:
            _search(match, encoding, keep, advance, found, seen)
    return found


def _matching(pattern: str) -> list[str]:
    return glob.glob(pattern, recursive=True) if glob.has_magic(pattern) else []


def _search(
    path: Path, encoding: str, keep: Callable[[Path], bool], advance: Advance, found: Texts, seen: set[str]
) -> None:
    """Add the file `path`, or the files of the folder `path`, to `found` in place."""
    folder = path.is_dir()
    listed = list(filter(keep, _files(path))) if folder else [path]
    # Files beside the tables in a dataset's folder (README, lists) are not documents.
    tables = folder and any(rows_kind(file) in ("parquet", "arrow") for file in listed)
    for file in listed:
        relative = os.path.basename(os.path.abspath(path)) / file.relative_to(path)
        name = relative.as_posix().encode("utf-8", "backslashreplace").decode("utf-8")
        real = os.path.realpath(file)
        if real in seen:
            found.skipped.append((name, "given twice"))
            continue
        seen.add(real)
        if tables and not rows_kind(file):
            found.skipped.append((name, "not a table, unlike others in its folder"))
            continue
        try:
            found.sources.append(_inspect(file, name, encoding, advance, 0.0 if folder else 0.1))
        except _NotText as problem:
            if not folder:
                raise UserError(f"{file}: {problem}") from None
            found.skipped.append((name, str(problem)))


def rows_kind(path: Path) -> str:
    """Return how to read a file with one document per row, or "" for any other file."""
    name = path.name.lower()
    return next((kind for end, kind in ROWS.items() if name.endswith(end)), "")


def code_points(text: str) -> np.ndarray:
    """Return the code points of `text`, uint32 (n,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


# ----------------------------------------------------------------------------- one file


def _files(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:  # by default, os.walk ignores folders that it cannot open
        raise error

    for here, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in sorted(names) if not name.startswith("."))


def _inspect(path: Path, name: str, forced: str, advance: Advance, nul_share: float) -> Source:
    """Detect the encoding of a file by decoding all of it; raise _NotText with the reason if none fits."""
    if not path.is_file():
        raise _NotText("not a regular file")
    status = path.stat()
    with path.open("rb") as file:
        head = file.read(1 << 16)
    encodings, mark = _candidates(head, forced)
    if kind := rows_kind(path):
        if not head:
            raise _NotText("empty")
        encoding, mark = (
            (encodings[0], mark) if path.suffix.lower() in (".jsonl", ".ndjson") else (forced or "utf-8", 0)
        )
        sha256 = files.sha256(path)
        return Source(path, name, kind, status.st_size, sha256, status.st_mtime_ns, encoding, mark)
    if what := next((what for start, what in FORMATS.items() if head.startswith(start)), ""):
        raise _NotText(what)
    problems = []
    for encoding in encodings:
        raw, digest, newlines = hashlib.sha256(head[:mark]), Digest(), set[Any]()
        chunks = decoded(path, encoding, mark, advance, raw.update)
        chunks = _chinese(chunks) if encoding == "gb18030" != forced else chunks
        try:
            for chunk in with_newlines(_checked(chunks, nul_share), newlines):
                digest.add(chunk)
        except _Undecodable as problem:
            problems.append(problem)
            continue
        about = (status.st_size, raw.hexdigest(), status.st_mtime_ns, encoding, mark, digest.document())
        return Source(path, name, "text", *about, bool(newlines - {None, "\n"}))
    expected = "neither UTF-8 nor UTF-16 nor GB18030" if len(encodings) > 1 else f"not {encodings[0]}"
    raise _NotText(f"{problems[0]} is {expected}; convert it or set its encoding, such as --encoding=latin-1")


def decoded(
    path: Path,
    encoding: str,
    mark: int,
    advance: Advance,
    see: Callable[[bytes], object] = lambda block: None,
) -> Iterator[str]:
    """Yield the text after the byte order mark in chunks; `see` is called with each block of bytes.

    Raise UserError at the first byte that is invalid in the encoding.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    end = mark
    with path.open("rb") as file:
        file.seek(mark)
        block = b"at the start"
        while block:
            block = file.read(BLOCK)
            end += len(block)
            advance(len(block))
            see(block)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:  # error.object is the rest of the last block, and this block
                offset = end - len(error.object) + error.start
                raise _Undecodable(f"byte 0x{error.object[error.start]:02x} at offset {offset}") from None
            except UnicodeError as error:  # no position: --encoding=utf-16 for a file without a mark
                raise _NotText(f"not {encoding}: {error}") from None
            yield text


def with_newlines(chunks: Iterable[str], found: set[Any] | None = None) -> Iterator[str]:
    """Convert CRLF and CR to LF, as Python's text mode does; U+2028, U+0085 and the like stay.

    The kinds of newlines seen are added to `found` (`io.TextIOBase.newlines`).
    """
    decoder = io.IncrementalNewlineDecoder(None, translate=True)
    for chunk in chunks:
        yield decoder.decode(chunk)
    yield decoder.decode("", final=True)
    if found is not None:
        found.add(decoder.newlines)


def _checked(chunks: Iterable[str], nul_share: float) -> Iterator[str]:
    """Pass on `chunks`; raise _NotText if there is no text, or if more than `nul_share` of it is NUL."""
    length = nul = 0
    for chunk in chunks:
        length += len(chunk)
        nul += chunk.count("\0")
        if surrogate := lone_surrogate(chunk):  # UTF-7, for example, can produce them
            raise _NotText(f"contains {surrogate}, which is not text")
        yield chunk
    if not length:
        raise _NotText("empty")
    if nul > nul_share * length:
        raise _NotText(f"binary: {nul:,} of {length:,} characters are NUL")


def lone_surrogate(text: str) -> str:
    try:
        text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"a lone surrogate, U+{ord(text[error.start]):04X}"
    return ""


# ----------------------------------------------------------------------------- encodings


def _check_name(encoding: str) -> None:
    try:
        "a".encode(encoding or "utf-8")
        codecs.getincrementaldecoder(encoding or "utf-8")
    except (LookupError, ValueError):
        raise UserError(
            f"--encoding={encoding}: unknown encoding; "
            "known are for example utf-8, utf-16, gb18030, big5, shift_jis, euc-kr, cp1251, latin-1"
        ) from None


def _candidates(head: bytes, forced: str) -> tuple[list[str], int]:
    """Return the encodings to try for a file that begins with `head`, and its byte order mark's length."""
    wanted = codecs.lookup(forced).name if forced else ""
    for mark, encoding in MARKS.items():
        if head.startswith(mark) and (encoding.startswith(wanted) or wanted.startswith(encoding)):
            return [encoding], len(mark)
    if forced:
        return [forced], 0
    utf16 = _unmarked_utf16(head)
    return ([utf16] if utf16 else ["utf-8", "gb18030"]), 0


def _unmarked_utf16(head: bytes) -> str:
    """Return which UTF-16 `head` is without a byte order mark, or "".

    Spaces and newlines show the byte order, and nearly all code units must lie in the blocks of living
    scripts. Bytes that are also valid UTF-8 must be alphabetic: two ASCII letters read as one unit look
    Chinese.
    """
    if 0 not in head[:-1]:
        return ""
    pairs = head[: len(head) // 2 * 2]
    readings = {"utf-16-le": np.frombuffer(pairs, "<u2"), "utf-16-be": np.frombuffer(pairs, ">u2")}
    blanks = {name: np.count_nonzero((units == 0x0A) | (units == 0x20)) for name, units in readings.items()}
    name = max(blanks, key=lambda name: blanks[name])
    units = readings[name]
    blocks = [(0x09, 0x0D), (0x20, 0x206F)]
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        blocks += [(0x3000, 0x9FFF), (0xAC00, 0xDFFF), (0xFF00, 0xFFEF)]
    inside = sum(np.count_nonzero((units >= low) & (units <= high)) for low, high in blocks)
    control = np.count_nonzero((units < 0x09) | (units > 0x0D) & (units < 0x20))
    return name if blanks[name] and not control and inside >= 0.95 * len(units) else ""


def _chinese(chunks: Iterable[str]) -> Iterator[str]:
    """Pass on text decoded as GB18030; raise _Undecodable at its end if it is not Chinese.

    Nearly any bytes are valid GB18030: Latin-1 by accident, EUC-KR by design. But the most common words
    make up 10 to 20 % of Chinese, old or new, simplified or traditional, and at most 0.4 % of texts in 37
    other languages and 20 encodings that could be mistaken for it.
    """
    common = code_points("的一是不了在人有这我他来大上个之也曰为以其而")
    wide = found = 0
    for chunk in chunks:
        points = code_points(chunk)
        wide += int((points >= 0x80).sum())
        found += int(np.isin(points, common).sum())
        yield chunk
    if found < 0.05 * wide:
        raise _Undecodable("the text")


# ----------------------------------------------------------------------------- prompts and responses


class Pair(str):
    """A prompt and a response, as one text; only the response is trained on."""

    prompt: str
    response: str

    def __new__(cls, prompt: str, response: str) -> "Pair":
        pair = super().__new__(cls, prompt + response)
        pair.prompt, pair.response = prompt, response
        return pair


def pair(row: Any, prompt: str, response: str) -> Pair | None:
    """Return the texts of a JSON `row` under these keys; None if one is missing or the response is empty."""
    if not isinstance(row, dict):
        return None
    asked, answer = row.get(prompt), row.get(response)
    return Pair(asked, answer) if isinstance(asked, str) and isinstance(answer, str) and answer else None
