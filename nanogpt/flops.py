"""Arithmetic of a training step on paper: what it costs, and what this chip could do at best."""

from typing import Any

# Dense bf16 peak of a chip in FLOP/s, from the makers' data sheets. Unknown chips get no percentage.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,  # the first name that fits counts
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "RTX 3090": 71e12,
    "RTX 4090 Laptop": 81e12,
    "RTX 4090": 165e12,
}


def flops_per_token(n_params: int, n_layer: int, n_embd: int, block_size: int) -> int:
    """Forward and backward FLOPs a token: 6 N + 12 L C T (Chowdhery et al. 2022, PaLM, appendix B).

    `n_params` counts the weights that multiply something, the (tied) head included and position
    embeddings left out; attention is counted in full although half of it is masked, so figures compare
    with those published elsewhere.
    """
    return 6 * n_params + 12 * n_layer * n_embd * block_size


def of_model(model: Any) -> int:
    """`flops_per_token` of a GPT."""
    shape = model.config
    return flops_per_token(model.n_params(positions=False), shape.n_layer, shape.n_embd, shape.block_size)


def peak_flops(device_name: str) -> float | None:
    """The data-sheet peak of the chip named so, or None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)
