"""GPUs: peak FLOP/s, for MFU, memory and links."""

import re
from typing import NamedTuple


class Chip(NamedTuple):
    """From data sheets. Bandwidths are in bytes/s, 0: not listed here."""

    peak: float  # dense bf16 (fp16 where there is no bf16) in FLOP/s, with float32 accumulation
    gigabytes: float  # memory
    memory_bytes_s: float = 0.0
    link_bytes_s: float = 0.0  # NVLink or PCIe x16 in one direction (data sheets give the sum of both)


# MFU is not reported for unknown chips. The first matching name counts.
CHIPS = {
    "B200": Chip(2250e12, 180, 8e12, 900e9),
    "H200": Chip(989e12, 141, 4.8e12, 450e9),
    "H100 PCIe": Chip(756e12, 80, 2.0e12, 64e9),
    "H100 NVL": Chip(835e12, 94, 3.9e12, 64e9),
    "H100": Chip(989e12, 80, 3.35e12, 450e9),
    "A100 40GB": Chip(312e12, 40),
    "A100": Chip(312e12, 80, 2.04e12, 300e9),
    "L40S": Chip(362e12, 48),
    "A10G": Chip(70e12, 24),
    "A10": Chip(125e12, 24),
    "L4": Chip(121e12, 24),
    "V100": Chip(125e12, 16),
    "T4": Chip(65e12, 16),
    "RTX 6000 Ada": Chip(364e12, 48),
    "RTX A6000": Chip(155e12, 48),
    "RTX 5090": Chip(210e12, 32),
    "RTX 5080": Chip(113e12, 16),
    "RTX 5070 Ti": Chip(88e12, 16),
    "RTX 5070": Chip(62e12, 12),
    "RTX 4090 Laptop": Chip(81e12, 16, 0.576e12, 32e9),
    "RTX 4090": Chip(165e12, 24, 1.008e12, 32e9),
    "RTX 4080": Chip(97e12, 16),
    "RTX 4070 Ti": Chip(80e12, 12),
    "RTX 4070": Chip(58e12, 12),
    "RTX 4060 Ti": Chip(44e12, 16),
    "RTX 4060": Chip(30e12, 8),
    "RTX 3090": Chip(71e12, 24, 0.936e12, 32e9),
    "RTX 3080": Chip(59e12, 10),
    "RTX 3070": Chip(41e12, 8),
    "RTX 3060": Chip(25e12, 12),
}


def find(name: str) -> str | None:
    """Return the key of CHIPS that `name` means ("RTX4090", "nvidia geforce rtx 4090"), or None."""
    plain = re.sub(r"[\s_-]", "", name).lower()
    return next((chip for chip in CHIPS if all(word in plain for word in chip.lower().split())), None)


def peak_flops(name: str) -> float | None:
    """Return the data-sheet peak of the chip `name` in FLOP/s, or None if it is unknown."""
    chip = find(name)
    return CHIPS[chip].peak if chip else None
