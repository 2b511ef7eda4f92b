"""Splits with hundreds of shards: all but the first and the last are opened on first use, because opening all
at start takes minutes on a network disk."""

from pathlib import Path

import numpy as np

from nanogpt.data import token_files
from nanogpt.data.token_files import TokenFile


def open_most_later(paths: list[Path], dtype: np.dtype, listed: dict[str, int]) -> list[TokenFile]:
    """Open the first and the last file. The others are assumed to have the layout of the first; their numbers
    of tokens are those in `listed`, by name, or follow from their sizes."""
    first, last = (token_files.token_file(path, dtype) for path in (paths[0], paths[-1]))
    files = [first]
    for path in paths[1:-1]:
        tokens = listed.get(path.name)
        if tokens is None:
            tokens, rest = divmod(path.stat().st_size - first.offset, first.dtype.itemsize)
            if rest or tokens < 0:
                raise token_files.truncated(path)
        files.append(TokenFile(path, first.dtype, first.offset, tokens, opened=False))
    return [*files, last]
