"""Character-level dataset of the source code of Python's standard library; needs no download.

    python data/python_stdlib/prepare.py

Every Python installation includes it (8.6 MB in 3.11), and the output is deterministic. Tests, installed
packages, demos, tables and non-ASCII files are excluded.
"""

import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # Python adds only the folder of this file

from nanogpt.config import FilePath, load
from nanogpt.errors import UserError, run_program
from nanogpt.prepare import corpus, own_text

STDLIB = Path(sysconfig.get_paths()["stdlib"])  # of the base installation, even in a virtual environment
LEFT_OUT = {
    *("site-packages", "dist-packages", "sitecustomize.py", "usercustomize.py"),  # installed locally
    *("test", "tests", "idle_test", "__phello__"),
    *("idlelib", "turtledemo"),
    *("encodings", "pydoc_data", "entities.py", "stringprep.py"),  # data tables
}
OF_THE_BUILD = ("_sysconfigdata", "config-")  # name prefixes of build-specific files


@dataclass
class Config:
    out: FilePath = ""  # dataset folder to write; default: the folder of this program


def wanted(file: Path) -> bool:
    names = file.relative_to(STDLIB).parts
    if file.suffix != ".py" or any(name in LEFT_OUT or name.startswith(OF_THE_BUILD) for name in names):
        return False
    content = file.read_bytes()
    return content.isascii() and bool(content)


def main(config: Config) -> None:
    if not (STDLIB / "os.py").is_file():
        raise UserError(f"no Python sources found in {STDLIB}; prepare another text with data/prepare.py")
    out = Path(config.out or corpus.own_folder(__file__))
    summary = corpus.prepare([STDLIB], out, kind="char", keep=wanted)
    print("\n".join(summary.lines()))
    dataset = "" if config.out else "python_stdlib"
    print(own_text.training_command(summary, on_gpu="quickstart.py", dataset=dataset))


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
