"""What has to be known of a text before it is encoded: how to split it, and its vocabulary."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from nanogpt.errors import UserError
from nanogpt.prepare import encode, pool, readers
from nanogpt.prepare.encode import Encoded, Job, Split
from nanogpt.prepare.text_files import Document, Texts
from nanogpt.tokenizer import bpe, tokenizer

FEW = 100  # documents: fewer are each cut in two, as many or more go whole to train or to val
LEARNT_FROM = 1 << 28  # characters from which a BPE is learnt, at the beginning of the text


@dataclass(frozen=True)
class Options:
    kind: str = "auto"  # char, byte, gpt2, bpe:SIZE, a tokenizer.json, or auto: char for small alphabets
    val_fraction: float = 0.1  # of documents, or of each where there are few
    seed: int = 0  # of the choice of documents for val
    encoding: str = ""  # of text files
    gpt2_bpe: str = ""  # where GPT-2's vocab.bpe is
    hub: str = ""  # NAME[:CONFIG[:SPLIT]][@REVISION] of a Hugging Face dataset
    instead: str = "give files of it on this machine"  # what helps where the hub cannot be reached
    text_key: str = "text"  # the field or column of documents
    skip_bad: bool = False  # leave out rows that cannot be read, and count them
    workers: int = 0  # processes; 0: one a core if the text is large
    shard_tokens: int = 0  # a file; 0: one file a split

    @property
    def pairs(self) -> bool:
        """Whether rows hold a prompt and a response, of which only the response is learnt."""
        return "+" in self.text_key


def look(texts: Texts, wanted: Options) -> tuple[Split, bool]:
    """How to split, and whether there are several documents; UserError if a split would be empty.

    Reads rows until it is known whether there are few documents.
    """
    found: list[Document] = [source.document for source in texts.sources if source.document]
    rows = Texts([source for source in texts.sources if not source.document])
    if len(found) < FEW:
        job = Job("", tuple(s.kind for s in rows.sources), (None,) * len(rows.sources), Split(0.5), False)
        encode.start_counting(replace(job, text_key=wanted.text_key))
        for piece in readers.pieces(rows.sources, reading(wanted)):
            result = Encoded()
            found += (document for _, _, document in encode.bodies(piece, result))
            refuse_bad(result, rows, wanted)
            if len(found) >= FEW:
                break
    split = Split(wanted.val_fraction, wanted.seed, few=len(found) < FEW and not wanted.pairs)
    if split.few:
        characters = sum(document.characters for document in found)
        if characters < 2:
            raise UserError(f"the text has {counted(characters, 'character')}; there is nothing to learn")
        train = sum(split.train_length(document) for document in found)
        if train in (0, characters):
            raise empty_split("train" if train == 0 else "val", wanted, len(found), characters)
    return split, len(found) > 1


def empty_split(name: str, wanted: Options, documents: int, characters: int) -> UserError:
    return UserError(
        f"--val_fraction={wanted.val_fraction} leaves {name} without any text "
        f"({counted(documents, 'document')}, {counted(characters, 'character')}); "
        "give another fraction or more text"
    )


def refuse_bad(result: Encoded, texts: Texts, wanted: Options) -> list[str]:
    """The broken rows of a piece, in words; UserError names the first unless they may be skipped."""
    path = texts.sources[result.source].path
    named = [f"{path}, line {row.number} {row.reason}" for row in result.bad]
    if named and not wanted.skip_bad:
        raise UserError(f"{named[0]}; --skip_bad leaves such rows out and counts them")
    return named


def alphabet(texts: Texts, job: Job, wanted: Options, workers: int) -> str:
    """Every character that occurs, in the order of code points."""
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    with progress("counting", texts) as bar:
        pieces = readers.pieces(texts.sources, reading(wanted), advance=bar.update)
        for part in pool.ordered(encode.count, pieces, workers, encode.start_counting, (job,)):
            refuse_bad(part.found, texts, wanted)
            seen[part.alphabet] = True
    found = "".join(map(chr, np.flatnonzero(seen)))
    if len(found) == 1:
        raise UserError(f"the text is {found!r} over and over; there is nothing to learn")
    return found


def learnt(size: int, texts: Texts, job: Job, wanted: Options) -> tokenizer.Tokenizer:
    """A BPE of the text that train gets."""
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

    with progress("learning words", texts) as bar:
        return tokenizer.from_text(bpe.train(bodies(), size))


def reading(wanted: Options) -> readers.Reading:
    words = wanted.kind not in ("auto", "char", "byte")
    return readers.Reading(wanted.text_key, lambda chunks: encode.parts(chunks, words))


# ----------------------------------------------------------------------------- words


def progress(what: str, texts: Texts | None = None, done: int = 0) -> "tqdm[Any]":
    """A bar over the bytes read, with their rate and the time left, on stderr; where that is no terminal,
    a line a minute."""
    total = readers.progress_total(texts.sources) if texts else None
    quiet = {} if sys.stderr.isatty() else {"delay": 60.0, "mininterval": 60.0, "maxinterval": 60.0}
    return tqdm(desc=what, total=total, initial=done, unit="B", unit_scale=True, leave=False, **quiet)


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
