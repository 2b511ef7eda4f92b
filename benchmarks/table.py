"""What the benchmarks print: a Markdown table for docs/results.md, and where and when it was measured."""

import datetime
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title} ({machine()}):\n\n{markdown(header, rows)}")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def machine() -> str:
    return (
        f"{processor()}, {os.cpu_count()} cores; {platform.system()}; torch {torch.__version__}, "
        f"Python {platform.python_version()}; {datetime.date.today()}"
    )


def processor() -> str:
    """The name that the processor gives itself, where the system tells."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
