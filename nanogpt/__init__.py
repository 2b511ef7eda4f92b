"""The library behind train.py, sample.py and the other programs; see docs/design.md for its layers.

From Python, `from nanogpt import load` loads a trained model (docs/generation.md).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent  # repository root: presets, datasets and programs

if TYPE_CHECKING:
    from nanogpt.inference.api import load as load


def __getattr__(name: str) -> Any:
    """Import `load` lazily: every program imports this package, and few need the inference code."""
    if name == "load":
        from nanogpt.inference.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
