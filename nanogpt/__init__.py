"""The library behind train.py, sample.py and the other programs; see docs/design.md for its layers.

In Python, `from nanogpt import load` gives a trained model (docs/generation.md).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent  # the checkout: presets, datasets and programs lie in it

if TYPE_CHECKING:
    from nanogpt.inference.api import load as load


def __getattr__(name: str) -> Any:
    """`load`, imported when it is asked for: the programs import this package, and few need all of it."""
    if name == "load":
        from nanogpt.inference.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
