"""Peak FLOP/s of GPUs, for MFU."""

# Dense bf16 peak in FLOP/s, from data sheets. MFU is not reported for unknown chips.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,  # the first matching name counts
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "RTX 3090": 71e12,
    "RTX 4090 Laptop": 81e12,
    "RTX 4090": 165e12,
}


def peak_flops(name: str) -> float | None:
    """Return the data-sheet peak of the chip `name` in FLOP/s, or None if it is unknown."""
    return next((peak for chip, peak in PEAK_FLOPS.items() if chip in name), None)
