"""Batch size ramp-up (Brown et al. 2020, GPT-3, appendix B), as a pure function of the options."""


def batch_ramp(full: int, start: float, length: int, unit: int) -> list[int]:
    """Return the batch sizes, in sequences, of the iterations of the ramp.

    The size grows linearly with the number of sequences consumed, from start * full to `full` after about
    `length` sequences. Sizes are multiples of `unit`, at least `unit`; the list ends before the first full
    batch.
    """
    sizes: list[int] = []
    read = 0
    while read < length:
        size = full * (start + (1 - start) * read / length)
        sizes.append(min(full, max(unit, round(size / unit) * unit)))
        read += sizes[-1]
    return sizes
