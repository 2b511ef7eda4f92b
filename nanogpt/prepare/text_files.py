"""Find text files and their encodings: any common encoding, newline style and size, in constant memory.

Files are read a megabyte at a time, so that their size does not matter. A text whose encoding cannot be
recognized (encodings.py) is refused, with the position and the options that set the encoding or allow some
bytes that cannot be decoded.
"""

import codecs
import contextlib
import glob
import hashlib
import io
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from nanogpt.errors import UserError
from nanogpt.prepare import encodings, formats, rows, tables
from nanogpt.prepare.encodings import NotText, Undecodable
from nanogpt.prepare.formats import Advance

UNDECODABLE = {"refuse": None, "replace": "\ufffd", "drop": ""}  # --on_undecodable: bytes become this
FEW = 0.01  # share of bytes of a text that may be undecodable; with more, the encoding is wrong
C1 = re.compile("[\x80-\x84\x86-\x9f]")  # control characters, which no text has
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

    def add(self, text: str) -> None:
        """Add a chunk."""
        data = text.encode("utf-8")
        self._characters += len(text)
        self._exact.update(data)
        self._folded.update(data.translate(_LOWER, _LEFT_OUT))

    def document(self) -> Document:
        folded = int.from_bytes(self._folded.digest(), "little") >> 1
        return Document(self._characters, self._exact.digest(), folded)


@dataclass(frozen=True)
class Source:
    """A readable file or hub dataset."""

    path: Path
    name: str  # shown and recorded: relative to the given path
    kind: str  # text (one document), marked (several), jsonl, json, csv, table (Parquet, Arrow), hub
    bytes: int
    sha256: str
    modified_ns: int
    encoding: str = "utf-8"
    mark: int = 0  # length of the byte order mark in bytes
    undecodable: str = "refuse"  # what becomes of bytes that are invalid in the encoding, as in UNDECODABLE
    document: Document | None = None  # kind text only
    newlines_changed: bool = False  # kind text only: had CRLF or CR
    note: str = ""  # what to report about its text
    instead: str = ""  # kind hub only: hint if the hub cannot be reached

    @property
    def row_name(self) -> str:
        """Name of a document in messages."""
        return "line" if self.kind == "jsonl" else "row"


@dataclass
class Texts:
    """Sources found, and files skipped."""

    sources: list[Source] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (file name, reason)


@dataclass
class Undecoded:
    """Bytes of a file that are invalid in its encoding."""

    count: int = 0
    first: int = 0  # offset in the file, after decompression


def find(
    paths: Iterable[Path],
    encoding: str = "",
    keep: Callable[[Path], bool] = lambda file: True,
    advance: Advance = lambda count: None,
    text_key: str = "text",
    on_undecodable: str = "refuse",
) -> Texts:
    """Read every text file once, completely, and return the readable sources; files of rows are only hashed.

    A path may be a glob pattern such as `data/*.parquet`. Folders are searched in order of names, without
    hidden files and those that `keep` rejects; links to folders are followed, each folder once. Files in
    folders that are not text are skipped and listed. Raise UserError if such a file was named itself; it may
    contain up to 10 % NUL characters. `encoding` overrides detection. `advance` is called with the number of
    bytes read.
    """
    encodings.require_known(encoding)
    texts = Texts()
    seen: set[str] = set()
    for path in paths:
        matches = [path] if path.exists() else [Path(name) for name in sorted(_matching(str(path)))]
        if not matches:
            raise UserError(f"{path}: no such file or folder")
        for match in matches:
            folder = match.is_dir()
            inspect = partial(_inspect, encoding, text_key, on_undecodable, advance, 0.01 if folder else 0.1)
            _search(match, keep, inspect, texts, seen)
    return texts


def _matching(pattern: str) -> list[str]:
    return glob.glob(pattern, recursive=True) if glob.has_magic(pattern) else []


def _search(
    path: Path,
    keep: Callable[[Path], bool],
    inspect: Callable[[Path, str], Source],
    texts: Texts,
    seen: set[str],
) -> None:
    """Add the file `path`, or the files of the folder `path`, to `texts` in place."""
    folder = path.is_dir()
    kept = list(filter(keep, listed(path))) if folder else [path]
    # Files beside tables in a dataset's folder (README, lists) are not documents; nor a README beside rows.
    beside: dict[str, set[Path]] = {}
    for file in kept if folder else ():
        beside.setdefault(formats.rows_kind(file.name), set()).update(file.parents)
    with_tables, of_rows = beside.get("table", ()), [*beside.get("jsonl", ()), *beside.get("csv", ())]
    saved = {folder: tables.saved(folder) for folder in with_tables}
    for file in kept:
        relative = os.path.basename(os.path.abspath(path)) / file.relative_to(path)
        name = relative.as_posix().encode("utf-8", "backslashreplace").decode("utf-8")
        real = os.path.realpath(file)
        if real in seen:
            texts.skipped.append((name, "given twice"))
            continue
        seen.add(real)
        kind = formats.rows_kind(file.name)
        apart = kind in ("", "json") or file.name.startswith("cache-")
        is_notice = kind == "" and file.stem.upper() in ("README", "LICENSE")
        if (apart and file.parent in with_tables) or (is_notice and file.parent in of_rows):
            texts.skipped.append((name, "not a table, unlike others in its folder"))
            continue
        if kind == "table" and saved.get(file.parent) and file.name not in saved[file.parent]:
            texts.skipped.append((name, "not listed in state.json, as if of an earlier save_to_disk"))
            continue
        try:
            texts.sources.append(inspect(file, name))
        except NotText as problem:
            if not folder:
                raise UserError(f"{file}: {problem}") from None
            texts.skipped.append((name, str(problem)))


# ----------------------------------------------------------------------------- one file


def listed(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder in order of names, without hidden ones. Links to folders are followed, each
    folder once."""

    def fail(error: OSError) -> None:  # by default, os.walk ignores folders that it cannot open
        raise error

    seen = set()
    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in sorted(names) if not name.startswith("."))


def _inspect(
    forced: str, text_key: str, on_undecodable: str, advance: Advance, nul_share: float, path: Path, name: str
) -> Source:
    """Recognize a file, and detect the encoding of a text by decoding all of it.

    Raise NotText with the reason if it cannot be read.
    """
    if not path.is_file():
        raise NotText("not a regular file")
    status, head = path.stat(), formats.head_of(path)
    if not head:
        raise NotText("empty")
    if reason := formats.refused(head):
        raise NotText(reason)
    kind = _kind(path, head, text_key)
    tried, mark = encodings.candidates(head, forced)
    source = Source(
        path, name, kind, status.st_size, _sha256(path, advance), status.st_mtime_ns, tried[0], mark
    )
    if kind == "table":
        return source
    if forced and not mark and codecs.lookup(forced).name != "utf-8" and _is_utf8(source):
        forced, tried, note = "", ["utf-8"], f"valid UTF-8, and read as that instead of {forced}"
        source = replace(source, encoding="utf-8", note=note)
    if kind == "jsonl":
        return source
    if forced and b"\0" not in "a".encode(forced) and formats.is_binary(head):
        raise NotText("binary data, not text")
    problems = []
    for encoding in tried:
        source = replace(source, encoding=encoding, undecodable=on_undecodable)
        digest, newlines, bad, controls, nul = Digest(), set[Any](), Undecoded(), 0, 0
        chunks = decoded(source, advance, bad)
        chunks = encodings.chinese(chunks) if encoding == "gb18030" != forced else chunks
        try:
            for chunk in with_newlines(_checked(chunks, nul_share), newlines):
                digest.add(chunk)
                controls += len(C1.findall(chunk)) if forced else 0
                nul += chunk.count("\0")
        except Undecodable as problem:
            problems.append(problem)
            continue
        notes = [source.note] if source.note else []
        if bad.count:
            action = "dropped" if on_undecodable == "drop" else "replaced by U+FFFD"
            notes.append(f"{bad.count:,} undecodable bytes {action}, the first at offset {bad.first:,}")
        if nul:
            notes.append(f"{nul:,} NUL characters, as if a part had another encoding")
        if controls:
            notes.append(
                f"{controls:,} control characters, as if its encoding were not {forced} (but cp1252?)"
            )
        source = replace(source, newlines_changed=bool(newlines - {None, "\n"}), note="; ".join(notes))
        return replace(source, document=digest.document()) if kind == "text" else _with_rows(source, text_key)
    if len(tried) > 1 and formats.is_binary(head):
        raise NotText("binary data, not text")
    expected = "neither UTF-8 nor UTF-16 nor GB18030" if len(tried) > 1 else f"not {tried[0]}"
    where = problems[0]
    with contextlib.suppress(Undecodable):  # if it begins as Chinese: where GB18030 failed
        list(encodings.chinese([head.decode("gb18030", "ignore")]))
        where = problems[-1]
    raise NotText(
        f"{where} is {expected}; convert it, or set --encoding=NAME (cp1252, big5, gb18030, ...), or, "
        "if such bytes are few, pass --on_undecodable=replace"
    )


def _is_utf8(source: Source) -> bool:
    """Return whether a file is valid UTF-8 with more than ASCII, which no text in another encoding is."""
    source = replace(source, encoding="utf-8", undecodable="refuse")
    try:
        return any([not chunk.isascii() for chunk in decoded(source, lambda count: None)])  # all chunks
    except UserError:
        return False


def _sha256(path: Path, advance: Advance) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(formats.BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def _kind(path: Path, head: bytes, text_key: str) -> str:
    """Return the kind of a Source."""
    if head.startswith(formats.TABLES):
        if formats.packing(path):
            raise NotText("a compressed table: decompress it first (Parquet and Arrow compress themselves)")
        return "table"
    if head.startswith(tuple(formats.PACKED)):
        raise NotText("compressed twice: decompress it first")
    kind, start = formats.rows_kind(path.name), head.lstrip(codecs.BOM_UTF8 + b" \t\r\n")
    if kind == "table":
        raise NotText("neither a Parquet nor an Arrow file, in spite of its name; download it again")
    if kind != "csv" and (kind or re.match(rb"\[?\s*\{", start)):
        found = _json_kind(head, text_key)
        if not found and len(head) == formats.HEAD:  # the first row may be longer
            found = _json_kind(formats.head_of(path, rows.LONGEST), text_key)
        return found or kind or "text"
    return kind or "text"


def _json_kind(head: bytes, text_key: str) -> str:
    """Return the kind of a file that begins with rows of JSON; "" if the first has no text."""
    start = head.lstrip(codecs.BOM_UTF8 + b" \t\r\n")
    line = start.partition(b"\n")[0] if b"\n" in start else b""
    if isinstance(rows.document(line, 1, text_key), str):
        return "jsonl"
    with contextlib.suppress(UserError, UnicodeDecodeError):  # rows that are not one per line
        row = next(rows.of_json([codecs.getincrementaldecoder("utf-8")().decode(start)]), b"")
        if isinstance(rows.document(row, 1, text_key), str):
            return "json"
    return ""


def _with_rows(source: Source, text_key: str) -> Source:
    """Return `source`; raise NotText if its first rows have no text."""
    try:
        start = next(lines_of(source, text_key), b"").splitlines()[:100]
    except UserError as error:
        raise NotText(str(error)) from None
    documents = [rows.document(line, number, text_key) for number, line in enumerate(start, 1) if line]
    if documents and all(isinstance(row, rows.BadRow) for row in documents):
        raise NotText(f"row 1 {documents[0].reason}")  # type: ignore[union-attr]
    return source


def lines_of(
    source: Source, text_key: str, skip: int = 0, advance: Advance = lambda count: None
) -> Iterator[bytes]:
    """Yield the rows of a JSONL, JSON or CSV file as lines of JSON in UTF-8, after the first `skip` bytes.

    Raise UserError if it is damaged.
    """
    if source.kind == "jsonl" and source.encoding == "utf-8":
        yield from formats.unpacked(source.path, advance, source.mark + skip)
        return
    chunks = decoded(source, advance)
    lines: Iterable[bytes] = (chunk.encode("utf-8", "surrogatepass") for chunk in chunks)
    if source.kind == "json":
        lines = rows.of_json(chunks)
    elif source.kind == "csv":
        lines = rows.of_csv(with_newlines(chunks), text_key, ".tsv" in source.path.name.lower())
    pending, size = [], 0
    for data in itertools.chain(lines, [b""]):
        pending.append(data[skip:])
        skip, size = max(0, skip - len(data)), size + len(pending[-1])
        if size >= formats.BLOCK or not data:
            yield b"".join(pending)
            pending, size = [], 0


def named(path: Path, error: UserError) -> UserError:
    """Return `error` with a message that begins with the path of the file."""
    where, message = str(path), str(error)
    between = ", " if message.startswith(("line ", "row ")) else ": "
    return error if message.startswith(where) else UserError(f"{where}{between}{message}")


def decoded(source: Source, advance: Advance, bad: Undecoded | None = None) -> Iterator[str]:
    """Yield the text after the byte order mark in chunks.

    Bytes that are invalid in the encoding are counted in `bad` and become what `source.undecodable` says.
    Raise UserError at the first such byte if that is "refuse", or if they are more than FEW.
    """
    instead, bad, end = UNDECODABLE[source.undecodable], bad or Undecoded(), source.mark

    def handle(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeDecodeError):
            raise error
        # error.object is the rest of the last block, and this block
        offset = end - len(error.object) + error.start
        if instead is None:
            raise Undecodable(f"byte 0x{error.object[error.start]:02x} at offset {offset}")
        bad.first = bad.first if bad.count else offset
        bad.count += error.end - error.start
        return instead, error.end

    decoder = codecs.getincrementaldecoder(source.encoding)("nanogpt")
    for block in itertools.chain(formats.unpacked(source.path, advance, source.mark), [None]):
        end += len(block or b"")
        codecs.register_error("nanogpt", handle)
        try:
            text = decoder.decode(block or b"", final=block is None)
        except Undecodable:
            raise
        except UnicodeError as error:  # no position: --encoding=utf-16 for a file without a mark
            raise NotText(f"not {source.encoding}: {error}") from None
        if bad.count > max(FEW * end, 1):
            raise Undecodable(f"{bad.count:,} of the first {end:,} bytes")
        yield text


def with_newlines(chunks: Iterable[str], newlines: set[Any] | None = None) -> Iterator[str]:
    """Convert CRLF and CR to LF, as Python's text mode does; U+2028, U+0085 and the like stay.

    The kinds of newlines seen are added to `newlines` (`io.TextIOBase.newlines`).
    """
    decoder = io.IncrementalNewlineDecoder(None, translate=True)
    for chunk in chunks:
        yield decoder.decode(chunk)
    yield decoder.decode("", final=True)
    if newlines is not None:
        newlines.add(decoder.newlines)


def _checked(chunks: Iterable[str], nul_share: float) -> Iterator[str]:
    """Pass on `chunks`; raise NotText if there is no text, or if more than `nul_share` of it is NUL."""
    length = nul = 0
    for chunk in chunks:
        length += len(chunk)
        nul += chunk.count("\0")
        if "\x1b$" in chunk:
            raise NotText("contains codes of ISO-2022; set --encoding=iso2022_jp or iso2022_kr")
        if surrogate := rows.lone_surrogate(chunk):  # UTF-7, for example, can produce them
            raise NotText(f"contains {surrogate}, which is not text")
        yield chunk
    if not length:
        raise NotText("empty")
    if nul > nul_share * length:
        raise NotText(f"binary: {nul:,} of {length:,} characters are NUL")
