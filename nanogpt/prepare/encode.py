"""Encode one piece of the input to token ids of both splits; runs in worker processes."""

import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanogpt.errors import UserError
from nanogpt.prepare import readers, text_files
from nanogpt.prepare.encodings import code_points
from nanogpt.prepare.readers import Piece
from nanogpt.prepare.rows import BadRow, Pair
from nanogpt.prepare.text_files import Digest, Document, Source, with_newlines
from nanogpt.tokenizer import isolated, tokenizer

PIECE = 1 << 20  # characters encoded at a time
PIECE_S, PIECE_BYTES = 600, 1 << 32  # CPU time in seconds, and memory, for a piece with a foreign tokenizer
LONGEST_WORD = 1 << 21  # characters without a position where byte pairs can be cut

# Last position where a text can be cut without changing the ids of its parts. In GPT-2's pattern
# (bpe.PATTERN), white space within a token never follows other characters, and only white space looks
# ahead; so a token ends wherever a space or newline follows a character that is not white space. (Python
# counts U+001C to U+001F as white space and the pattern does not: this only reduces the number of cuts.)
# Letters also end before punctuation: Chinese and Japanese may have no spaces for pages.
BOUNDARY = re.compile(r".*(?:\S(?=[ \n])|[ぁ-ん一-龥](?=[，。、]))", re.DOTALL)


@dataclass(frozen=True)
class Split:
    """Assignment of documents, or of a part of each, to val.

    By content hash, so that a document stays in its split when others are added or removed, and its
    copies are in the same split.
    """

    val_fraction: float
    seed: int = 0
    few: bool = False  # too few documents to choose from: cut each in two
    val_from: int = -1  # index of the first source of val, if the splits were given; -1: they were not

    def train_length(self, document: Document, source: int = 0) -> int:
        """Return how many characters of a document of `source`, from its start, go to train."""
        if self.val_from >= 0:
            return 0 if source >= self.val_from else sys.maxsize
        if self.few:
            return int(document.characters * (1 - self.val_fraction))
        key = int.from_bytes(document.exact[:8], "big")
        if self.seed:
            key = int(np.random.SeedSequence([self.seed, key]).generate_state(1, np.uint64)[0])
        return 0 if key < self.val_fraction * 2**64 else sys.maxsize


@dataclass(frozen=True)
class Job:
    """Settings of a worker process."""

    tokenizer: str  # contents of tokenizer.json; "" to count characters only
    sources: tuple[Source, ...]
    split: Split
    several: bool  # several documents: separate them in the ids
    text_key: str = "text"


def none_yet() -> dict[str, int]:
    return {"train": 0, "val": 0}


def nothing_yet() -> dict[str, bytes]:
    return {"train": b"", "val": b""}


@dataclass
class Counts:
    """Statistics of a piece, or of all."""

    characters: int = 0
    documents: dict[str, int] = field(default_factory=none_yet)
    text_bytes: dict[str, int] = field(default_factory=none_yet)
    empty_rows: int = 0
    bad_rows: int = 0
    bad_shown: list[str] = field(default_factory=list)
    newlines_changed: bool = False
    tried: int = 0  # characters decoded again to find those that the tokenizer loses
    lost: dict[str, int] = field(default_factory=dict)

    def add(self, other: "Counts") -> None:
        self.characters += other.characters
        self.empty_rows += other.empty_rows
        self.newlines_changed |= other.newlines_changed
        self.tried += other.tried
        self.lost = dict(Counter(self.lost) + Counter(other.lost))
        for split in self.documents:
            self.documents[split] += other.documents[split]
            self.text_bytes[split] += other.text_bytes[split]


@dataclass
class Encoded(Counts):
    """Ids and statistics of a piece."""

    source: int = 0
    place: Any = None  # where to resume reading after it
    ids: dict[str, bytes] = field(default_factory=nothing_yet)
    scored: dict[str, bytes] = field(default_factory=nothing_yet)  # pairs only: bytes, 1 for a target
    bad: list[BadRow] = field(default_factory=list)
    row: int = 0  # number of the row that is read now
    folded: bytes = b""  # one uint64 per document: Document.folded << 1 | (in val)


_job: Job
_encoder: tokenizer.Tokenizer
_dtype = "<u2"


def start(job: Job) -> None:
    """Initialize this process for `encode`."""
    global _job, _encoder, _dtype
    _job, _encoder = job, tokenizer.from_text(job.tokenizer)
    _encoder.accelerate()
    _dtype = "<u2" if dtype_of(_encoder.vocab_size) == "uint16" else "<u4"


def dtype_of(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def encode(piece: Piece) -> Encoded:
    """Return the ids of a piece. Raise UserError for text that the tokenizer cannot encode."""
    if _encoder.kind == "hf" and multiprocessing.parent_process():
        isolated.limit(PIECE_S, PIECE_BYTES)
    result = Encoded(source=piece.source, place=piece.place)
    try:
        _encode(piece, result)
    except UserError as error:
        row = f"{_job.sources[piece.source].row_name} {result.row}: " if result.row else ""
        raise text_files.named(_job.sources[piece.source].path, UserError(f"{row}{error}")) from None
    return result


def _encode(piece: Piece, result: Encoded) -> None:
    ids: dict[str, list[bytes]] = {"train": [], "val": []}
    folded = []
    for body, offset, document in bodies(piece, result):
        result.characters += len(body)
        train_length = _job.split.train_length(document, piece.source)
        cut = min(max(train_length - offset, 0), len(body))
        ends = offset + len(body) >= document.characters
        if isinstance(body, Pair):
            split = "train" if train_length else "val"
            for part, is_response in ((body.prompt, False), (body.response, True)):
                encoded = b"".join(_part(part, is_response, split, result))
                ids[split].append(encoded)
                result.scored[split] += bytes([is_response]) * (len(encoded) // np.dtype(_dtype).itemsize)
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


def bodies(piece: Piece, result: Encoded) -> Iterator[tuple[str, int, Document]]:
    """Yield (text, offset in its document, document) for each text in a piece. Empty and unreadable rows are
    recorded in `result`.
    """
    result.source = piece.source
    document = _job.sources[piece.source].document
    if document is not None:
        assert isinstance(piece.content, str)
        yield piece.content, piece.offset, document
        return
    for result.row, row in readers.documents(piece, _job.text_key):
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
    """Yield the ids of one split's part of a document, followed by a separator if it `ends` here."""
    if not text:
        return
    apart = ends and _job.several
    if apart and _encoder.end_of_text is None and not text.endswith("\n"):
        text += "\n"
    for part in parts([text], _encoder.words) if len(text) > PIECE else [text]:
        result.text_bytes[split] += len(part.encode("utf-8"))
        ids = _encoder.encode(part)
        if not getattr(_encoder, "lossless", True):
            result.tried += len(part)
            result.lost = dict(Counter(result.lost) + _encoder.lost(part, ids))  # type: ignore[attr-defined]
        yield ids.astype(_dtype).tobytes()
    if apart and _encoder.end_of_text is not None:
        yield np.array([_encoder.end_of_text], _dtype).tobytes()


def parts(chunks: Iterable[str], words: bool) -> Iterator[str]:
    """Split the text of `chunks` into parts of about PIECE characters; with `words`, only where this does not
    change the ids.

    Raise UserError if LONGEST_WORD characters contain no such position.
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
                    f"{LONGEST_WORD:,} characters without a space are too long to encode by byte pairs, "
                    f"starting at {text[end : end + 30]!r}; use --tokenizer=char or byte"
                )
            if end:
                yield text[:end]
            pending, length = [text[end:]], len(text) - end
    yield "".join(pending)


# ----------------------------------------------------------------------------- counting


@dataclass
class Counted:
    alphabet: np.ndarray  # code points that occur
    result: Encoded  # statistics, no ids


def count(piece: Piece) -> Counted:
    """Return the set of characters in a piece."""
    result = Encoded()
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    for body, _, _ in bodies(piece, result):
        seen[code_points(body).astype(np.intp)] = True
    return Counted(np.flatnonzero(seen), result)


def train_bodies(piece: Piece, result: Encoded) -> Iterator[str]:
    """Yield the train part of each text in a piece; unreadable rows are recorded in `result`."""
    for body, offset, document in bodies(piece, result):
        yield body[: max(_job.split.train_length(document, piece.source) - offset, 0)]


def start_counting(job: Job) -> None:
    """Initialize this process for `count` and `train_bodies`."""
    global _job
    _job = job
