"""Recognize a file by its first bytes: compressed, rows, text, or a format that is not text."""

import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nanogpt.errors import UserError, imported

Advance = Callable[[int], object]  # called with the number of bytes read

BLOCK = 1 << 20  # bytes read at a time
HEAD = 1 << 16  # bytes by which a file is recognized
TABLES = (b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff")  # Parquet; Arrow: file, stream
ROWS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv"}  # by suffix
ROWS |= dict.fromkeys((".parquet", ".arrow", ".feather"), "table")
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zstd")
IN_ZIP = {  # by a mark in the first entries of a zip archive
    b"word/": "a Word document (.docx): save it as plain text first",
    b"xl/": "an Excel workbook (.xlsx): save the sheet as .csv first",
    b"ppt/": "a PowerPoint file (.pptx): save it as plain text first",
    b"application/epub": "an EPUB book: convert it to text first",
    b"opendocument": "an OpenDocument file: save it as plain text first",
    b".npy": "a NumPy archive (.npz): not text",
    b"data.pkl": "a PyTorch file: not text",
}
REFUSED = {  # formats that are not text, by their first bytes, which no text begins with
    (b"%PDF-",): "a PDF file: convert it to text first",
    (b"{\\rtf",): "an RTF document: save it as plain text first",
    (b"%!PS",): "a PostScript file: convert it to text first",
    (b"\xd0\xcf\x11\xe0",): "an old Office document: convert it to text first",
    (b"\x89PNG", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"): "an image: not text",
    (b"ID3\2", b"ID3\3", b"ID3\4", b"OggS\0", b"fLaC\0", b"\x1aE\xdf\xa3"): "sound or video: not text",
    (b"7z\xbc\xaf", b"Rar!\x1a", b"LZIP\1", b"\4\x22M\x18"): "an archive: extract its text first",
    (b"\x7fELF", b"MZ\x90", b"\xca\xfe\xba\xbe", b"\xcf\xfa\xed\xfe"): "a program: not text",
    tuple(b"\x80\4\x95 \x80\5\x95 \x80\2} \x80\3} \x80\2]".split()): "a Python pickle: export its text first",
    (b"WARC/1.",): "a WARC archive of web pages: extract their text first",
    (b"SQLite format 3\0",): "an SQLite database: export its text first",
    (b"\x89HDF", b"Obj\1"): "an HDF5 or Avro file: export its text as .parquet or .csv first",
    (b"GGUF\2\0", b"GGUF\3\0"): "the weights of a model (GGUF): not text",
    (b"\x93NUMPY",): "a NumPy array: token files are trained on directly, without prepare.py",
    (b"LITPKDS",): "TinyLlama's packed tokens: not text",
    (b"FEA1",): "a Feather file of version 1: write it anew as version 2",
    (b"version https://git-lfs",): "a Git LFS pointer: fetch the file with git lfs pull",
}


def refused(head: bytes) -> str:
    """Return what a file that begins with `head` is and what to do, if it is not text; else ""."""
    if head.startswith(b"PK\3\4"):
        return next(
            (hint for mark, hint in IN_ZIP.items() if mark in head), "a zip archive: extract its text first"
        )
    if head[4:8] == b"ftyp" or (head.startswith(b"RIFF") and head[8:12] in (b"WAVE", b"WEBP", b"AVI ")):
        return "an image, sound or video: not text"
    if head[257:262] == b"ustar" or _is_old_tar(head):
        return "a tar archive: extract its text first"
    return next((hint for marks, hint in REFUSED.items() if head.startswith(marks)), "")


def _is_old_tar(head: bytes) -> bool:
    """Return whether `head` begins with a tar header of 1979: its only sign is the sum of its bytes."""
    stored = re.fullmatch(rb" *([0-7]+)[\0 ]+", head[148:156])
    return bool(stored) and int(stored[1], 8) == sum(head[:148]) + 8 * 32 + sum(head[156:512])  # type: ignore[index]


def rows_kind(name: str) -> str:
    """Return the format of rows that a file name promises, whatever its compression; "" for other files."""
    suffixes = [suffix for suffix in Path(name.lower()).suffixes if suffix not in PACKED_SUFFIXES]
    return ROWS.get(suffixes[-1], "") if suffixes else ""


def is_binary(head: bytes) -> bool:
    """Return whether more than 5 % of `head` are control characters, unlike any text in an 8-bit encoding."""
    return len(head.translate(None, bytes([*range(9), *range(16, 27), *range(28, 32)]))) < 0.95 * len(head)


# ----------------------------------------------------------------------------- compression


def unpacked(path: Path, advance: Advance = lambda count: None, skip: int = 0) -> Iterator[bytes]:
    """Yield the bytes of a file after its first `skip`, decompressed if it is gzip, bzip2, xz or zstd.

    `advance` is called with the number of bytes read from disk. Raise UserError if the file is damaged.
    """
    with path.open("rb") as raw:
        opener = PACKED.get(packing(path), _plain)
        seen = 0
        if opener is _plain:
            seen, skip = raw.seek(skip), 0
        try:
            for block in opener(raw):
                before, seen = seen, raw.tell()
                advance(seen - before)
                yield block[skip:]
                skip = max(0, skip - len(block))
        except Exception as error:  # each library has its own
            if isinstance(error, UserError) or getattr(error, "errno", None):
                raise
            raise UserError(
                f"{path} is damaged or partially downloaded ({error}); download it again"
            ) from None


def packing(path: Path) -> bytes:
    """Return the first bytes of a compressed file, as in PACKED; empty for other files."""
    with path.open("rb") as file:
        start = file.read(10)
    return next((mark for mark in PACKED if start.startswith(mark)), b"")


def head_of(path: Path, size: int = HEAD) -> bytes:
    """Return the first `size` bytes of a file, after decompression."""
    blocks: list[bytes] = []
    for block in unpacked(path):
        blocks.append(block)
        if sum(map(len, blocks)) >= size:
            break
    return b"".join(blocks)[:size]


def _plain(file: Any) -> Iterator[bytes]:
    return iter(lambda: file.read(BLOCK), b"")


def _streams(library: str, decompressor: str) -> Callable[[BinaryIO], Iterator[bytes]]:
    """Return a reader of bzip2 or xz. It raises an error for anything but a stream after a stream, which the
    `open` of these modules ignores; zeros are padding."""

    def read(raw: BinaryIO) -> Iterator[bytes]:
        make = getattr(importlib.import_module(library), decompressor)
        stream = make()
        while True:
            if stream.eof:
                packed = stream.unused_data.lstrip(b"\0")
                while not packed and (more := raw.read(BLOCK)):
                    packed = more.lstrip(b"\0")
                if not packed:
                    return
                stream = make()
            else:
                packed = raw.read(BLOCK) if stream.needs_input else b""
                if stream.needs_input and not packed:
                    raise EOFError("truncated")
            yield stream.decompress(packed, BLOCK)

    return read


def _zstandard(raw: BinaryIO) -> Iterator[bytes]:
    """Decompress all frames; raise EOFError if the file ends within one (the package's reader does not)."""
    zstandard = imported("zstandard", f"{raw.name} needs a package")
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # of zstd --long=31
    frame = decompressor.decompressobj()
    whole, blocks, size = True, [b""], 0
    while packed := raw.read(1 << 9):  # 16 MB at most decompressed: a block of 128 kB takes 4 bytes or more
        while packed:
            if frame.eof:
                frame = decompressor.decompressobj()
            blocks.append(frame.decompress(packed))
            size += len(blocks[-1])
            whole, packed = frame.eof, frame.unused_data
        if size >= BLOCK:
            yield b"".join(blocks)
            blocks, size = [], 0
    yield b"".join(blocks)
    if not whole:
        raise EOFError("truncated frame")


PACKED: dict[bytes, Callable[[BinaryIO], Iterator[bytes]]] = {  # by first bytes
    b"\x1f\x8b\x08": lambda raw: _plain(importlib.import_module("gzip").open(raw)),
    **{b"BZh%d1AY&SY" % size: _streams("bz2", "BZ2Decompressor") for size in range(1, 10)},
    b"\xfd7zXZ\0": _streams("lzma", "LZMADecompressor"),
    b"\x5d\0\0": _streams("lzma", "LZMADecompressor"),  # .lzma
    b"\x28\xb5\x2f\xfd": _zstandard,
    **{bytes([0x50 + i]) + b"\x2a\x4d\x18": _zstandard for i in range(16)},  # skippable frames
}
