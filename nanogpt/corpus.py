"""Text to a dataset folder, `train.bin`, `val.bin`, `tokenizer.json` and `meta.json`, in constant memory.

The text is read three times, a megabyte at a time: to recognise and hash the files (`text.find`), to
count (`survey`), and to encode. What is wrong with it is found in the first two, before anything is
written (but what GPT-2's encoding cannot take, in the third). The files get their names at the end, in
an order that never shows a part of a dataset.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from nanogpt import files, tokenizer
from nanogpt.errors import UserError
from nanogpt.text import Texts, code_points, find

FORMAT = "nanogpt-data-1"
NAMES = ("train.bin", "val.bin", "meta.json", "tokenizer.json")  # the first is the last to appear
FEW = 100  # documents: fewer are each cut in two, as many or more go whole to train or to val
LARGE_ALPHABET = 20_000  # distinct characters from which bytes are the default
PIECE = 1 << 20  # characters encoded at a time
LONGEST_WORD = 1 << 21  # characters without a place where GPT-2's encoding can be cut

# The last place where a text can be cut so that the ids of the parts are those of the whole. In GPT-2's
# pattern (tokenizer.GPT2_PATTERN) white space never follows anything else within a token, and only white
# space looks ahead; so a token ends wherever a space or newline follows what is no white space. (Python
# counts U+001C to U+001F as white space and the pattern does not: that only makes fewer cuts.) A run of
# letters ends where punctuation follows, too; Chinese and Japanese may have no space for pages.
BOUNDARY = re.compile(r".*(?:\S(?=[ \n])|[ぁ-ん一-龥](?=[，。、]))", re.DOTALL)


@dataclass
class Survey:
    """What there is to split and to encode."""

    val_fraction: float
    alphabet: str = ""  # every character of the text once, in the order of code points
    characters: int = 0
    lengths: list[int] = field(default_factory=list)  # characters, of the first FEW documents
    in_val: bytearray = field(default_factory=bytearray)  # by document: 1 if, whole, it would go to val

    @property
    def documents(self) -> int:
        return len(self.in_val)

    def train_length(self, index: int) -> int:
        """How many characters of document `index`, from its beginning, go to train; the rest is val's."""
        if self.documents < FEW:
            return int(self.lengths[index] * (1 - self.val_fraction))
        return 0 if self.in_val[index] else sys.maxsize


@dataclass(frozen=True)
class Summary:
    """What was prepared. `lines` says it in words."""

    out: Path
    texts: Texts
    survey: Survey
    tokenizer: tokenizer.Tokenizer
    meta: dict[str, Any]
    bytes_by_default: bool  # the alphabet was too large for the tokenizer that was not chosen

    @property
    def option(self) -> str:
        """What has to be given to train.py."""
        quote = '"' if " " in str(self.out) else ""
        return f"{quote}--dataset={self.out}{quote}"

    def lines(self) -> list[str]:
        train, val = self.meta["splits"]["train"], self.meta["splits"]["val"]
        tokens = train["tokens"] + val["tokens"]
        documents = self.survey.documents
        lines = [
            f"{_count(len(self.texts.sources), 'file')}, {_count(documents, 'document')}",
            f"length of dataset in characters: {self.survey.characters:,}",
            f"tokenizer: {self.tokenizer.kind}, vocab size: {self.tokenizer.vocab_size:,}",
            f"train has {train['tokens']:,} tokens",
            f"val has {val['tokens']:,} tokens",
            f"split: {self._split()}",
            f"bytes per token: {(train['text_bytes'] + val['text_bytes']) / tokens:.2f}",
        ]
        if self.bytes_by_default:
            lines.append(
                f"{len(self.survey.alphabet):,} distinct characters, so bytes are the tokens "
                "(--tokenizer=char would take the characters)"
            )
        others = sorted({source.encoding for source in self.texts.sources} - {"utf-8"})
        if others:
            lines.append(f"encodings besides utf-8: {', '.join(others)}")
        if self.texts.newlines_changed:
            lines.append("newlines normalised to \\n")
        if self.texts.empty_rows:
            lines.append(f"skipped {_count(self.texts.empty_rows, 'row')} without a character")
        return lines + _skipped(self.texts)

    def _split(self) -> str:
        if self.survey.documents < FEW:
            return f"the first {1 - self.survey.val_fraction:.4g} of each document is train, the rest val"
        in_val = sum(self.survey.in_val)
        return f"{self.survey.documents - in_val:,} documents train, {in_val:,} val, by a hash of the content"


def prepare(
    paths: Sequence[Path],
    out: Path,
    *,
    kind: str = "auto",
    val_fraction: float = 0.1,
    encoding: str = "",
    gpt2_bpe: str = "",
    keep: Callable[[Path], bool] = lambda file: True,
) -> Summary:
    """Write the dataset folder `out` from text files, folders and JSONL files.

    `kind` is char, byte, gpt2, or auto: char unless the alphabet is large. `keep` chooses among the
    files of folders. UserError says what is wrong with the text or the options, OSError that the disk
    failed; either way nothing is left that could be taken for a dataset.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"--val_fraction={val_fraction} must lie between 0 and 1; 0.1 is usual")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file; name a folder, new or not")
    bpe = tokenizer.gpt2(gpt2_bpe) if kind == "gpt2" else None
    own = os.path.realpath(out)

    def wanted(file: Path) -> bool:  # not what an earlier run has written
        name = file.name.split(files.TEMPORARY)[0]
        return keep(file) and not (name in NAMES and os.path.realpath(file.parent) == own)

    with _progress("checking") as bar:
        texts = find(paths, encoding, wanted, bar.update)
    if not texts.sources:
        raise UserError(
            "; ".join([f"there is no text in {', '.join(map(str, paths))}", *_skipped(texts)[:1]])
        )
    found = survey(texts, val_fraction)
    _refuse(found)
    by_default = kind == "auto" and len(found.alphabet) >= LARGE_ALPHABET
    encoder = bpe or _characters_or_bytes("byte" if by_default else kind, found)
    return Summary(out, texts, found, encoder, _write(texts, found, encoder, out), by_default)


def _characters_or_bytes(kind: str, found: Survey) -> tokenizer.Tokenizer:
    if kind == "byte":
        return tokenizer.ByteTokenizer()
    separator = "\n" if found.documents > 1 else ""
    return tokenizer.CharTokenizer(sorted({*found.alphabet, *separator}))


# ----------------------------------------------------------------------------- counting


def survey(texts: Texts, val_fraction: float) -> Survey:
    """Count what is in `texts`; UserError names a broken row."""
    found = Survey(val_fraction)
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    with _progress("counting", texts) as bar:
        for document in texts.documents(bar.update):
            length, digest = 0, hashlib.sha256()
            for chunk in document:
                length += len(chunk)
                digest.update(chunk.encode("utf-8"))
                seen[code_points(chunk).astype(np.intp)] = True
            found.characters += length
            if len(found.lengths) < FEW:
                found.lengths.append(length)
            # By content: a document keeps its side when others come or go, and its copies follow it.
            found.in_val.append(int.from_bytes(digest.digest()[:8], "big") < val_fraction * 2**64)
    found.alphabet = "".join(map(chr, np.flatnonzero(seen)))
    return found


def _refuse(found: Survey) -> None:
    """UserError if nothing can be learnt from the text, or if a split would be empty."""
    if found.characters < 2:
        raise UserError(f"the text has {_count(found.characters, 'character')}; there is nothing to learn")
    if len(found.alphabet) == 1:
        raise UserError(f"the text is {found.alphabet!r} over and over; there is nothing to learn")
    if found.documents < FEW:
        whole = found.characters
        val = whole - sum(found.train_length(index) for index in range(found.documents))
    else:
        whole, val = found.documents, sum(found.in_val)
    if val in (0, whole):
        raise UserError(
            f"--val_fraction={found.val_fraction} leaves {'val' if val == 0 else 'train'} without any text "
            f"({_count(found.documents, 'document')}, {_count(found.characters, 'character')}); "
            "give another fraction or more text"
        )


# ----------------------------------------------------------------------------- encoding and writing


class _Split:
    """One split on its way to its file: text goes in, token ids come out."""

    def __init__(self, file: BinaryIO, encoder: tokenizer.Tokenizer, several: bool):
        self.tokens = self.text_bytes = 0
        self.sha256 = hashlib.sha256()
        self._file = file
        self._encoder = encoder
        self._several = several
        self._dtype = f"<u{np.dtype(_dtype(encoder)).itemsize}"
        self._pending: list[str] = []
        self._length = 0  # characters in `_pending`
        self._last = ""  # the last character of the document

    def add(self, text: str) -> None:
        if text:
            self._last = text[-1]
            self._pending.append(text)
            self._length += len(text)
            if self._length >= PIECE:
                self._encode(final=False)

    def end_document(self) -> None:
        """Set apart what this split has of a document from the next one, if there are several."""
        if self._several and self._last:
            if self._encoder.end_of_text is not None:
                self._encode(final=True)
                self._put(np.array([self._encoder.end_of_text]))
            elif self._last != "\n":
                self.add("\n")
        self._last = ""

    def end(self) -> None:
        self._encode(final=True)

    def _encode(self, final: bool) -> None:
        text = "".join(self._pending)
        end = len(text)
        if self._encoder.kind == "gpt2" and not final:
            boundary = BOUNDARY.match(text)
            end = boundary.end() if boundary else 0
            if len(text) - end > LONGEST_WORD:
                raise UserError(
                    f"{LONGEST_WORD:,} characters without a space cannot be encoded by gpt2 in the memory "
                    f"allowed, from {text[end : end + 30]!r} on; use --tokenizer=char or byte"
                )
        self._put(self._encoder.encode(text[:end]))
        self.text_bytes += len(text[:end].encode("utf-8"))
        self._pending = [text[end:]]
        self._length = len(text) - end

    def _put(self, ids: np.ndarray) -> None:
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self.sha256.update(data)
        self.tokens += len(ids)

    def meta(self, name: str) -> dict[str, Any]:
        file = {"name": name, "tokens": self.tokens, "sha256": self.sha256.hexdigest()}
        return {"tokens": self.tokens, "text_bytes": self.text_bytes, "files": [file]}


def _write(texts: Texts, found: Survey, encoder: tokenizer.Tokenizer, out: Path) -> dict[str, Any]:
    """Write the four files of `out`; returns what is in meta.json."""
    created = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    for name in NAMES:  # what a run that was killed has left
        for leftover in out.glob(f"{name}{files.TEMPORARY}*"):
            files.remove(leftover)
    try:
        with contextlib.ExitStack() as stack:
            drafts = {name: stack.enter_context(files.staged(out / name)) for name in NAMES}
            splits = _encode(texts, found, encoder, drafts)
            meta = _meta(texts, found, encoder, splits)
            drafts["meta.json"].write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8", newline="\n")
            drafts["tokenizer.json"].write_text(tokenizer.to_text(encoder), encoding="utf-8", newline="\n")
            for draft in drafts.values():  # a full disk shows here at the latest; the old data is whole yet
                files.sync(draft)
            for name in ("train.bin", "val.bin"):  # old tokens must not meet the new tokenizer
                files.remove(out / name)
            files.sync(out)  # and the stack renames, from tokenizer.json back to train.bin
    except BaseException:
        if created:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise
    return meta


def _encode(
    texts: Texts, found: Survey, encoder: tokenizer.Tokenizer, drafts: dict[str, Path]
) -> dict[str, dict[str, Any]]:
    several = found.documents > 1
    with (
        drafts["train.bin"].open("wb") as train_file,
        drafts["val.bin"].open("wb") as val_file,
        _progress("encoding", texts) as bar,
    ):
        train, val = _Split(train_file, encoder, several), _Split(val_file, encoder, several)
        for index, document in enumerate(texts.documents(bar.update)):
            left = found.train_length(index)
            for chunk in document:
                head = chunk[: max(left, 0)]
                left -= len(chunk)
                train.add(head)
                val.add(chunk[len(head) :])
            train.end_document()
            val.end_document()
        train.end()
        val.end()
    return {"train": train.meta("train.bin"), "val": val.meta("val.bin")}


def _meta(
    texts: Texts, found: Survey, encoder: tokenizer.Tokenizer, splits: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    hashes = "".join(source.sha256 + "\n" for source in texts.sources)
    return {
        "format": FORMAT,
        "dtype": _dtype(encoder),
        "vocab_size": encoder.vocab_size,
        "tokenizer": {"type": encoder.kind, "sha256": tokenizer.fingerprint(encoder)},
        "splits": splits,
        "documents": found.documents,
        "source": [
            {"name": source.name, "bytes": source.bytes, "sha256": source.sha256}
            for source in texts.sources[:100]
        ],
        "source_files": len(texts.sources),
        "source_sha256": hashlib.sha256(hashes.encode()).hexdigest(),  # of all, one hash a line
    }


def _dtype(encoder: tokenizer.Tokenizer) -> str:
    return "uint16" if encoder.vocab_size <= 1 << 16 else "uint32"


# ----------------------------------------------------------------------------- words


def _progress(what: str, texts: Texts | None = None) -> "tqdm[Any]":
    """A bar over the bytes read, on stderr, where that is a terminal."""
    total = sum(source.bytes for source in texts.sources) if texts else None
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=None, leave=False)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _skipped(texts: Texts) -> list[str]:
    lines = [f"skipped {name}: {reason}" for name, reason in texts.skipped[:10]]
    if len(texts.skipped) > 10:
        lines.append(f"skipped {_count(len(texts.skipped) - 10, 'more file')}")
    return lines
