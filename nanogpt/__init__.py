"""The library behind train.py, sample.py and the other programs; see docs/design.md for its layers.

From Python, `from nanogpt import load` loads a trained model (docs/generation.md).
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if "OMP_WAIT_POLICY" not in os.environ:
    # Idle threads of GNU OpenMP spin for 300,000 turns by default, on cores that other programs want. 10,000
    # turns cost nothing alone; at 1,000 a step takes 1.5 times as long (benchmarks/busy.py). torch reads this
    # when it is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
_PACKAGE = Path(__file__).resolve().parent
INSTALLED = (_PACKAGE / "programs").is_dir()  # from a wheel, which holds programs, presets and the page
_BY_COMMAND = Path(sys.argv[0]).stem == "nanogpt"  # started by the command that an install provides
ROOT = _PACKAGE / "programs" if INSTALLED else _PACKAGE.parent

if TYPE_CHECKING:
    from nanogpt.inference.api import load as load


def __getattr__(name: str) -> Any:
    """Import `load` lazily: every program imports this package, and few need the inference code."""
    if name == "load":
        from nanogpt.inference.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def command(name: str) -> str:
    """Return what starts a program here: "train" is `python train.py`, "prepare shakespeare_char" is
    `python data/shakespeare_char/prepare.py`; with the installed command `nanogpt train` and so on."""
    if INSTALLED or _BY_COMMAND:
        return f"nanogpt {name}"
    program, _, dataset = name.partition(" ")
    folder = Path("data", dataset) if program == "prepare" else Path()
    return f"python {(folder / program).as_posix()}.py"


def quoted(option: str) -> str:
    """Return an option as it must be typed: in quotes if it has a space."""
    return f'"{option}"' if " " in option else option
