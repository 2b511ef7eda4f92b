"""The library behind train.py, sample.py and the other programs; see docs/design.md for its layers.

From Python, `from nanogpt import load` loads a trained model (docs/generation.md).
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if "OMP_WAIT_POLICY" not in os.environ:
    # Idle threads of GNU OpenMP spin for 300,000 turns by default, on cores that other programs want. 10,000
    # turns cost nothing alone; at 1,000 a step takes 1.5 times as long (benchmarks/busy.py). torch reads this
    # when it is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
_PACKAGE = Path(__file__).resolve().parent
INSTALLED = (_PACKAGE / "programs").is_dir()  # from a wheel, which holds programs, presets and the page
ROOT = _PACKAGE / "programs" if INSTALLED else _PACKAGE.parent

if TYPE_CHECKING:
    from nanogpt.inference.api import load as load


def __getattr__(name: str) -> Any:
    """Import `load` lazily: every program imports this package, and few need the inference code."""
    if name == "load":
        from nanogpt.inference.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
