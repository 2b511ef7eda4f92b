"""Analyze a text before it is encoded: how to split it, and its vocabulary."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from nanogpt.errors import UserError
from nanogpt.prepare import encode, pool, readers
from nanogpt.prepare.encode import Encoded, Job, Split
from nanogpt.prepare.text_files import Document, Texts
from nanogpt.tokenizer import bpe, tokenizer

FEW = 100  # documents; fewer are each split into train and val, more are each assigned whole to one
LEARNT_FROM = 1 << 28  # characters of train, from its start, on which a BPE is trained


@dataclass(frozen=True)
class Options:
    kind: str = "auto"  # char, byte, gpt2, bpe:SIZE, a tokenizer.json, or auto: char for small alphabets
    val_fraction: float = 0.1  # fraction of the documents, or of each if there are few, for validation
    seed: int = 0  # seed of the choice of validation documents
    val: str = ""  # text files for validation, instead of a fraction
    split_at: str = ""  # mark between the documents of a text file; line, blank_line
    encoding: str = ""  # encoding of text files; empty: detect
    gpt2_bpe: str = ""  # path of GPT-2's vocab.bpe
    hub: str = ""  # NAME[:CONFIG[:SPLIT]][@REVISION] of a Hugging Face dataset
    instead: str = "pass local copies of its files"  # hint if the hub cannot be reached
    text_key: str = "text"  # field or column that contains the text
    skip_bad: bool = False  # skip and count unreadable rows
    on_undecodable: str = "refuse"  # bytes of text files that are not text: refuse, replace, drop
    lossy: bool = False  # accept a tokenizer that loses characters
    workers: int = 0  # worker processes; 0: one per core if the text is large
    shard_tokens: int = 0  # tokens per file; 0: one file per split

    @property
    def pairs(self) -> bool:
        """True if rows have a prompt and a response, with the loss on the response only."""
        return "+" in self.text_key


def look(texts: Texts, wanted: Options, val_from: int = -1) -> tuple[Split, bool]:
    """Return the split, and whether there are several documents. Raise UserError if a split would be empty.

    `val_from`: index of the first source of val, if the splits are given.

    Rows are read only until it is known whether there are few documents.
    """
    documents: list[Document] = [source.document for source in texts.sources if source.document]
    rows = Texts([source for source in texts.sources if not source.document])
    if len(documents) < FEW:
        encode.start_counting(Job("", tuple(rows.sources), Split(0.5), False, wanted.text_key))
        for piece in readers.pieces(rows.sources, reading(wanted)):
            result = Encoded()
            documents += (document for _, _, document in encode.bodies(piece, result))
            refuse_bad(result, rows, wanted)
            if len(documents) >= FEW:
                break
        else:
            if wanted.split_at and len(documents) <= len(texts.sources):
                raise UserError(f"--split_at={wanted.split_at}: these texts do not contain it; omit it")
    if val_from >= 0:
        return Split(wanted.val_fraction, wanted.seed, val_from=val_from), len(documents) > 2  # one per split
    split = Split(wanted.val_fraction, wanted.seed, few=len(documents) < FEW and not wanted.pairs)
    if split.few:
        characters = sum(document.characters for document in documents)
        if characters < 2:
            raise UserError(f"the text has {counted(characters, 'character')}; at least 2 are needed")
        train = sum(split.train_length(document) for document in documents)
        if train in (0, characters):
            raise empty_split("train" if train == 0 else "val", wanted, len(documents), characters)
    return split, len(documents) > 1


def empty_split(name: str, wanted: Options, documents: int, characters: int) -> UserError:
    return UserError(
        f"--val_fraction={wanted.val_fraction} leaves {name} empty "
        f"({counted(documents, 'document')}, {counted(characters, 'character')}); "
        "give another fraction or more text"
    )


def refuse_bad(result: Encoded, texts: Texts, wanted: Options) -> list[str]:
    """Return messages about the broken rows of a piece; raise UserError for the first unless skip_bad."""
    source = texts.sources[result.source]
    named = [f"{source.path}, {source.row_name} {row.number} {row.reason}" for row in result.bad]
    if named and not wanted.skip_bad:
        raise UserError(f"{named[0]}; --skip_bad=True skips and counts such rows")
    return named


def alphabet(texts: Texts, job: Job, wanted: Options, workers: int) -> str:
    """Return every character that occurs, sorted by code point."""
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    with progress("counting", texts) as bar:
        pieces = readers.pieces(texts.sources, reading(wanted), advance=bar.update)
        for part in pool.ordered(encode.count, pieces, workers, encode.start_counting, (job,)):
            refuse_bad(part.result, texts, wanted)
            seen[part.alphabet] = True
    distinct = "".join(map(chr, np.flatnonzero(seen)))
    if len(distinct) == 1:
        raise UserError(f"the text consists of {distinct!r} only; at least 2 distinct characters are needed")
    return distinct


def learnt(size: int, texts: Texts, job: Job, wanted: Options) -> tokenizer.Tokenizer:
    """Train a BPE on the text of the train split."""
    encode.start_counting(job)

    def bodies() -> Iterator[str]:
        left = LEARNT_FROM
        for piece in readers.pieces(texts.sources, reading(wanted), advance=bar.update):
            result = Encoded()
            for body in encode.train_bodies(piece, result):
                left -= len(body)
                yield body
            refuse_bad(result, texts, wanted)
            if left <= 0:
                return

    with progress("training BPE", texts) as bar:
        return tokenizer.from_text(bpe.train(bodies(), size))


def reading(wanted: Options) -> readers.Reading:
    words = wanted.kind not in ("auto", "char", "byte")
    return readers.Reading(wanted.text_key, lambda chunks: encode.parts(chunks, words), wanted.split_at)


# ----------------------------------------------------------------------------- progress and messages


def progress(label: str, texts: Texts | None = None, done: int = 0) -> "tqdm[Any]":
    """Return a progress bar over the bytes read, with rate and time left, on stderr. If stderr is not a
    terminal, it prints a line after 8 seconds and then one per minute.
    """
    sizes = [source.bytes for source in texts.sources] if texts else [0]  # 0: unknown
    total = sum(sizes) if all(sizes) else None
    quiet = (
        {}
        if sys.stderr.isatty()
        else {"delay": 8.0, "mininterval": 60.0, "maxinterval": 60.0, "smoothing": 0.0}
    )
    bar = tqdm(desc=label, total=total, initial=done, unit="B", unit_scale=True, leave=False, **quiet)
    if quiet:
        bar.last_print_t -= 52.0  # prints after 8 s; would distort a rate of the last minute
    return bar


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
