"""Recognize the encoding of a text.

An encoding is accepted only on evidence, since a wrong guess silently trains on garbage: a byte order mark,
UTF-8 valid to the last byte, UTF-16 by its NUL bytes, GB18030 by the most common Chinese characters.
"""

import codecs
from collections.abc import Iterable, Iterator

import numpy as np

from nanogpt.errors import UserError

MARKS = {  # byte order marks; UTF-32 first, as its LE mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}


class NotText(UserError):
    """Reason why a file cannot be read as text, without its name."""


class Undecodable(NotText):
    """Position where an encoding failed; another encoding may succeed."""


def code_points(text: str) -> np.ndarray:
    """Return the code points of `text`, uint32 (n,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def require_known(encoding: str) -> None:
    try:
        "a".encode(encoding or "utf-8")
        codecs.getincrementaldecoder(encoding or "utf-8")
    except (LookupError, ValueError):
        raise UserError(
            f"--encoding={encoding}: unknown encoding; "
            "known are for example utf-8, utf-16, gb18030, big5, shift_jis, euc-kr, cp1251, latin-1"
        ) from None


def candidates(head: bytes, forced: str) -> tuple[list[str], int]:
    """Return the encodings to try for a file that begins with `head`, and its byte order mark's length."""
    wanted = codecs.lookup(forced).name if forced else ""
    for mark, encoding in MARKS.items():
        if head.startswith(mark) and (encoding.startswith(wanted) or wanted.startswith(encoding)):
            return [encoding], len(mark)
        if head.startswith(mark) and forced:
            found = encoding.upper()
            raise NotText(f"begins with the mark of {found}, so it is not {forced}; omit --encoding")
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


def chinese(chunks: Iterable[str]) -> Iterator[str]:
    """Pass on text decoded as GB18030; raise Undecodable at its end if it is not Chinese.

    Nearly any bytes are valid GB18030: Latin-1 by accident, EUC-KR by design. But the most common words
    make up 10 to 20 % of Chinese, old or new, simplified or traditional, and at most 0.4 % of texts in 37
    other languages and 20 encodings that could be mistaken for it.
    """
    common = code_points("的一是不了在人有这我他来大上个之也曰为以其而")
    wide = hits = 0
    for chunk in chunks:
        points = code_points(chunk)
        wide += int((points >= 0x80).sum())
        hits += int(np.isin(points, common).sum())
        yield chunk
    if hits < 0.05 * wide:
        raise Undecodable("the text")
