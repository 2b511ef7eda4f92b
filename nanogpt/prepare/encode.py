"""One piece of the input to the token ids of both splits: what worker processes do."""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanogpt.errors import UserError
from nanogpt.prepare import readers
from nanogpt.prepare.readers import BadRow, Piece
from nanogpt.prepare.text_files import Digest, Document, Pair, code_points, with_newlines
from nanogpt.tokenizer import tokenizer

PIECE = 1 << 20  # characters encoded at a time
LONGEST_WORD = 1 << 21  # characters without a place where byte pairs can be cut

# The last place where a text can be cut so that the ids of the parts are those of the whole. In GPT-2's
# pattern (bpe.PATTERN) white space never follows anything else within a token, and only white
# space looks ahead; so a token ends wherever a space or newline follows what is no white space. (Python
# counts U+001C to U+001F as white space and the pattern does not: that only makes fewer cuts.) A run of
# letters ends where punctuation follows, too; Chinese and Japanese may have no space for pages.
BOUNDARY = re.compile(r".*(?:\S(?=[ \n])|[ぁ-ん一-龥](?=[，。、]))", re.DOTALL)


@dataclass(frozen=True)
class Split:
    """Which documents, or how much of each, go to val. By content, so that a document keeps its side
    when others come or go, and its copies follow it."""

    val_fraction: float
    seed: int = 0
    few: bool = False  # each document is cut in two, for there are too few to choose among

    def train_length(self, document: Document) -> int:
        """How many of its characters, from the beginning, go to train."""
        if self.few:
            return int(document.characters * (1 - self.val_fraction))
        key = int.from_bytes(document.exact[:8], "big")
        if self.seed:
            key = int(np.random.SeedSequence([self.seed, key]).generate_state(1, np.uint64)[0])
        return 0 if key < self.val_fraction * 2**64 else sys.maxsize


@dataclass(frozen=True)
class Job:
    """What a worker has to know."""

    tokenizer: str  # the text of its file; "" if characters are only counted
    kinds: tuple[str, ...]  # of the sources
    documents: tuple[Document | None, ...]  # the sources that are one text
    split: Split
    several: bool  # documents, which are set apart from one another
    text_key: str = "text"


@dataclass
class Encoded:
    """The ids of a piece, and what was counted in it."""

    source: int = 0
    place: Any = None  # where reading goes on after it
    ids: dict[str, bytes] = field(default_factory=lambda: {"train": b"", "val": b""})
    scored: dict[str, bytes] = field(
        default_factory=lambda: {"train": b"", "val": b""}
    )  # of pairs: a byte an id
    text_bytes: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})
    documents: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})
    characters: int = 0
    empty_rows: int = 0
    bad: list[BadRow] = field(default_factory=list)
    newlines_changed: bool = False
    folded: bytes = b""  # uint64 a document: Document.folded << 1 | whether it is val's


_job: Job
_encoder: tokenizer.Tokenizer
_dtype = "<u2"


def start(job: Job) -> None:
    """Make this process ready for `encode`."""
    global _job, _encoder, _dtype
    _job, _encoder = job, tokenizer.from_text(job.tokenizer)
    _encoder.accelerate()
    _dtype = "<u2" if dtype_of(_encoder.vocab_size) == "uint16" else "<u4"


def dtype_of(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def encode(piece: Piece) -> Encoded:
    """The ids of a piece. UserError for a text that the tokenizer cannot take."""
    result = Encoded(piece.source, piece.place)
    ids: dict[str, list[bytes]] = {"train": [], "val": []}
    folded = []
    for body, offset, document in bodies(piece, result):
        result.characters += len(body)
        train_length = _job.split.train_length(document)
        cut = min(max(train_length - offset, 0), len(body))
        ends = offset + len(body) >= document.characters
        if isinstance(body, Pair):
            split = "train" if train_length else "val"
            for part, is_response in ((body.prompt, False), (body.response, True)):
                found = b"".join(_part(part, is_response, split, result))
                ids[split].append(found)
                result.scored[split] += bytes([is_response]) * (len(found) // np.dtype(_dtype).itemsize)
            result.documents[split] += 1
            folded.append(document.folded << 1 | (split == "val"))
            continue
        train_ends = offset + len(body) >= min(train_length, document.characters)
        ids["train"] += _part(body[:cut], train_ends, "train", result)
        ids["val"] += _part(body[cut:], ends, "val", result)
        if ends:
            in_val = train_length == 0
            result.documents["val" if in_val else "train"] += 1
            folded.append(document.folded << 1 | in_val)
    result.ids = {split: b"".join(parts) for split, parts in ids.items()}
    result.folded = np.array(folded, dtype="<u8").tobytes()
    return result


def bodies(piece: Piece, result: Encoded) -> Iterator[tuple[str, int, Document]]:
    """The texts in a piece, where each begins in its document, and the document. What is no text is
    noted in `result`."""
    result.source = piece.source
    document = _job.documents[piece.source]
    if document is not None:
        assert isinstance(piece.content, str)
        yield piece.content, piece.offset, document
        return
    for row in readers.rows(piece, _job.kinds[piece.source], _job.text_key):
        if isinstance(row, BadRow):
            result.bad.append(row)
        elif not row:
            result.empty_rows += 1
        else:
            if "\r" in row:
                plain = [row.prompt, row.response] if isinstance(row, Pair) else [row]
                plain = ["".join(with_newlines([part])) for part in plain]
                row, result.newlines_changed = Pair(*plain) if len(plain) == 2 else plain[0], True
            digest = Digest()
            digest.add(row)
            yield row, 0, digest.document()


def _part(text: str, ends: bool, split: str, result: Encoded) -> Iterator[bytes]:
    """The ids of what a split gets of a document, set apart from the next one if it `ends` here."""
    if not text:
        return
    apart = ends and _job.several
    if apart and _encoder.end_of_text is None and not text.endswith("\n"):
        text += "\n"
    for part in parts([text], _encoder.words) if len(text) > PIECE else [text]:
        result.text_bytes[split] += len(part.encode("utf-8"))
        yield _encoder.encode(part).astype(_dtype).tobytes()
    if apart and _encoder.end_of_text is not None:
        yield np.array([_encoder.end_of_text], _dtype).tobytes()


def parts(chunks: Iterable[str], words: bool) -> Iterator[str]:
    """The text of `chunks` in parts of about PIECE characters; with `words`, cut where the ids allow it.

    UserError if there is no such place for LONGEST_WORD characters.
    """
    pending: list[str] = []
    length = 0
    for chunk in chunks:
        for first in range(0, len(chunk), PIECE):
            pending.append(chunk[first : first + PIECE])
            length += len(pending[-1])
            if length < PIECE:
                continue
            text = "".join(pending)
            boundary = BOUNDARY.match(text) if words else None
            end = boundary.end() if boundary else 0 if words else len(text)
            if len(text) - end > LONGEST_WORD:
                raise UserError(
                    f"{LONGEST_WORD:,} characters without a space cannot be encoded by byte pairs in the "
                    f"memory allowed, from {text[end : end + 30]!r} on; use --tokenizer=char or byte"
                )
            if end:
                yield text[:end]
            pending, length = [text[end:]], len(text) - end
    yield "".join(pending)


# ----------------------------------------------------------------------------- counting


@dataclass
class Counted:
    alphabet: np.ndarray  # the code points that occur
    found: Encoded  # without ids


def count(piece: Piece) -> Counted:
    """What characters there are in a piece."""
    found = Encoded()
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    for body, _, _ in bodies(piece, found):
        seen[code_points(body).astype(np.intp)] = True
    return Counted(np.flatnonzero(seen), found)


def train_bodies(piece: Piece, found: Encoded) -> Iterator[str]:
    """The texts of a piece, as far as they are train's; what is no text is noted in `found`."""
    for body, offset, document in bodies(piece, found):
        yield body[: max(_job.split.train_length(document) - offset, 0)]


def start_counting(job: Job) -> None:
    """Make this process ready for `count` and `train_bodies`."""
    global _job
    _job = job
