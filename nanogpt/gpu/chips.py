"""What chips can do at best."""

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


def peak_flops(name: str) -> float | None:
    """The data-sheet peak of the chip named so, or None where it is not known."""
    return next((peak for chip, peak in PEAK_FLOPS.items() if chip in name), None)
