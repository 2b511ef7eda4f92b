"""Where documents begin and end in a split: windows that start at one, and masks between them.

`<|endoftext|>` opens a document here: it is what sampling begins with. (Prepared data has it behind each
document, which is in front of the next one.)
"""

from typing import Literal

import numpy as np

from nanogpt.data.loader import Dataset, Tokens, sampler_of
from nanogpt.data.mixture_sampler import MixtureSampler
from nanogpt.data.samplers import DocumentSampler, EpochSampler
from nanogpt.errors import UserError
from nanogpt.tokenizer import tokenizer, vocabulary

Mode = Literal["stream", "rows", "masked"]
CHUNK = 1 << 22  # tokens looked through at a time


def separator(dataset: Dataset, mode: Mode) -> int:
    """The id between documents; UserError where the tokenizer has none, or the text."""
    if vocabulary.identify(dataset.tokenizer).kind == "gpt2":  # known without its merges
        found: int | None = vocabulary.GPT2_VOCAB_SIZE - 1
    else:
        found = tokenizer.from_text(dataset.tokenizer).end_of_text
    if found is None:
        raise UserError(
            f"--documents={mode} needs a token between documents, which characters and bytes have not: "
            f"prepare {dataset.folder} with --tokenizer=gpt2 or bpe:8192, or train on the stream"
        )
    train = dataset.train
    for first in range(0, len(train), CHUNK):
        if bool((train.read(first, min(CHUNK, len(train) - first)) == found).any()):
            return found
    raise UserError(
        f"--documents={mode}: there is no {vocabulary.END_OF_TEXT} (id {found}) in the training text of "
        f"{dataset.folder}, which is one document; train on the stream"
    )


def rows(tokens: Tokens, separator: int, block_size: int) -> np.ndarray:
    """Where windows of `block_size` tokens begin, int64 (n,), each at a document: from the first one, always
    at the next document that begins behind the window before. The text between is left out. UserError if no
    document is followed by so many tokens."""
    starts: list[int] = []
    free = 0  # where the next window may begin
    last = len(tokens) - block_size - 1
    for first in range(0, len(tokens), CHUNK):
        chunk = tokens.read(first, min(CHUNK, len(tokens) - first))
        begins = np.flatnonzero(chunk == separator) + first
        if first == 0 and (not len(begins) or begins[0]):
            begins = np.concatenate([[0], begins])
        at = np.searchsorted(begins, free)
        while at < len(begins) and begins[at] <= last:
            starts.append(int(begins[at]))
            free = starts[-1] + block_size
            at = np.searchsorted(begins, free)
    if not starts:
        raise UserError(f"no document begins {block_size} tokens before the end of {tokens.parts[0].path}")
    return np.array(starts, dtype=np.int64)


def document_sampler(
    tokens: Tokens, separator: int, block_size: int, seed: int
) -> EpochSampler | MixtureSampler:
    """The order of windows that begin at documents, as `rows` finds them."""
    return sampler_of(tokens, lambda text: DocumentSampler(rows(text, separator, block_size), seed))
