"""GPUs: peak FLOP/s, for MFU, and memory."""

import re

# Dense bf16 peak (fp16 where there is no bf16) in FLOP/s with float32 accumulation, and memory in GB, from
# data sheets. MFU is not reported for unknown chips. The first matching name counts.
CHIPS = {
    "B200": (2250e12, 180),
    "H200": (989e12, 141),
    "H100 PCIe": (756e12, 80),
    "H100 NVL": (835e12, 94),
    "H100": (989e12, 80),
    "A100 40GB": (312e12, 40),
    "A100": (312e12, 80),
    "L40S": (362e12, 48),
    "A10G": (70e12, 24),
    "A10": (125e12, 24),
    "L4": (121e12, 24),
    "V100": (125e12, 16),
    "T4": (65e12, 16),
    "RTX 6000 Ada": (364e12, 48),
    "RTX A6000": (155e12, 48),
    "RTX 5090": (210e12, 32),
    "RTX 5080": (113e12, 16),
    "RTX 5070 Ti": (88e12, 16),
    "RTX 5070": (62e12, 12),
    "RTX 4090 Laptop": (81e12, 16),
    "RTX 4090": (165e12, 24),
    "RTX 4080": (97e12, 16),
    "RTX 4070 Ti": (80e12, 12),
    "RTX 4070": (58e12, 12),
    "RTX 4060 Ti": (44e12, 16),
    "RTX 4060": (30e12, 8),
    "RTX 3090": (71e12, 24),
    "RTX 3080": (59e12, 10),
    "RTX 3070": (41e12, 8),
    "RTX 3060": (25e12, 12),
}


def find(name: str) -> str | None:
    """Return the key of CHIPS that `name` means ("RTX4090", "nvidia geforce rtx 4090"), or None."""
    plain = re.sub(r"[\s_-]", "", name).lower()
    return next((chip for chip in CHIPS if all(word in plain for word in chip.lower().split())), None)


def peak_flops(name: str) -> float | None:
    """Return the data-sheet peak of the chip `name` in FLOP/s, or None if it is unknown."""
    chip = find(name)
    return CHIPS[chip][0] if chip else None
