"""The sources of Python's own standard library, with a token for each character: no download.

    python data/python_stdlib/prepare.py

Every Python has them (8.6 MB in 3.11), the same in every run. Left out are tests, installed packages,
demonstrations, tables, and what is not ASCII.
"""

import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # Python puts only this folder there

from nanogpt.config import load
from nanogpt.errors import UserError, run_program
from nanogpt.prepare import corpus

STDLIB = Path(sysconfig.get_paths()["stdlib"])  # that of the Python behind a virtual environment, too
LEFT_OUT = {
    *("site-packages", "dist-packages", "sitecustomize.py", "usercustomize.py"),  # of this machine
    *("test", "tests", "idle_test", "__phello__"),
    *("idlelib", "turtledemo"),
    *("encodings", "pydoc_data", "entities.py", "stringprep.py"),  # tables
}
OF_THE_BUILD = ("_sysconfigdata", "config-")  # beginnings of names


@dataclass
class Config:
    out: str = ""  # the dataset folder to write, if not the one of this program


def wanted(file: Path) -> bool:
    names = file.relative_to(STDLIB).parts
    if file.suffix != ".py" or any(name in LEFT_OUT or name.startswith(OF_THE_BUILD) for name in names):
        return False
    content = file.read_bytes()
    return content.isascii() and bool(content)


def main(config: Config) -> None:
    if not (STDLIB / "os.py").is_file():
        raise UserError(
            f"this Python has no sources at {STDLIB}; use a text of your own with data/prepare.py"
        )
    summary = corpus.prepare([STDLIB], Path(config.out or Path(__file__).parent), kind="char", keep=wanted)
    print("\n".join(summary.lines()))
    print("python train.py config/quickstart.py", summary.option if config.out else "--dataset=python_stdlib")


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
