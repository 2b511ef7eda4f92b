"""Document boundaries: sequences that start at a document (--documents=rows) and document masks (masked).

`<|endoftext|>` counts as the first token of a document, because sampling starts from it. (Prepared data has
it after each document, and thus before the next one.)
"""

from typing import Literal

import numpy as np

from nanogpt.data.loader import Dataset, Tokens, sampler_of
from nanogpt.data.mixture_sampler import MixtureSampler
from nanogpt.data.samplers import DocumentSampler, EpochSampler
from nanogpt.errors import UserError
from nanogpt.tokenizer import tokenizer, vocabulary

Mode = Literal["stream", "rows", "masked"]
CHUNK = 1 << 22  # number of tokens that are scanned at a time


def separator(dataset: Dataset, mode: Mode) -> int:
    """Return the separator id. Raise UserError if the tokenizer or the training text has none."""
    if vocabulary.identify(dataset.tokenizer).kind == "gpt2":  # needs no merges file
        token: int | None = vocabulary.GPT2_VOCAB_SIZE - 1
    else:
        token = tokenizer.from_text(dataset.tokenizer).end_of_text
    if token is None:
        raise UserError(
            f"--documents={mode} needs a separator token, which character and byte tokenizers lack: "
            f"prepare {dataset.folder} with --tokenizer=gpt2 or bpe:8192, or use --documents=stream"
        )
    train = dataset.train
    for first in range(0, len(train), CHUNK):
        if bool((train.read(first, min(CHUNK, len(train) - first)) == token).any()):
            return token
    raise UserError(
        f"--documents={mode}: there is no {vocabulary.END_OF_TEXT} (id {token}) in the training text of "
        f"{dataset.folder}, so it is a single document; use --documents=stream"
    )


def rows(tokens: Tokens, separator: int, block_size: int) -> np.ndarray:
    """Return start positions, int64 (n,), of sequences of `block_size` tokens that each start at a document.

    Each sequence starts at the first document after the end of the previous sequence; the tokens between
    are dropped. Raise UserError if no document is followed by `block_size` tokens.
    """
    starts: list[int] = []
    free = 0  # earliest start of the next sequence
    last = len(tokens) - block_size - 1
    for first in range(0, len(tokens), CHUNK):
        chunk = tokens.read(first, min(CHUNK, len(tokens) - first))
        begins = np.flatnonzero(chunk == separator) + first
        if first == 0 and (not len(begins) or begins[0]):
            begins = np.concatenate([[0], begins])
        while (at := np.searchsorted(begins, free)) < len(begins) and begins[at] <= last:
            starts.append(int(begins[at]))
            free = starts[-1] + block_size
    if not starts:
        raise UserError(f"no document starts {block_size} tokens before the end of {tokens.parts[0].path}")
    return np.array(starts, dtype=np.int64)


def document_sampler(
    tokens: Tokens, separator: int, block_size: int, seed: int
) -> EpochSampler | MixtureSampler:
    """Build the sampler of sequences that start at documents (see `rows`)."""
    return sampler_of(tokens, lambda text: DocumentSampler(rows(text, separator, block_size), seed))
