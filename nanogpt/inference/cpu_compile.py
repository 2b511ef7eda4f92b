"""Compile cpu_kernels.cpp for the local processor: about a second, once.

Requires Linux and a C++ compiler (g++, or the one named by CXX).
"""

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from nanogpt import files
from nanogpt.errors import UserError

FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fopenmp", "-shared", "-fPIC"]


@contextmanager
def compiled(source: Path, folder: Path, name: str) -> Iterator[Path]:
    """Compile `source`; yield the path of the library, NAME-SHA256.so, which is valid inside the block.

    It is also copied to `folder` if that can be written. Raise UserError without a compiler, or if it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch) / name
        command = [*_command(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
            raise UserError(f"{command[0]} could not compile {source.name}: {error.strip()}")
        library.chmod(0o600)
        library = library.rename(f"{library}-{files.sha256(library)}.so")
        with suppress(OSError), files.staged(folder / library.name) as draft:  # full or read-only
            shutil.copy(library, draft)
        yield library


def _command(source: Path) -> list[str]:
    asked = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    compiler = [word for word in asked if not word.startswith("-")]  # such as "ccache g++"
    options = [word for word in asked if word.startswith("-")]
    if missing := [word for word in compiler if shutil.which(word) is None]:
        raise UserError(f"C++ compiler {missing[0]} not found (apt install g++, or set CXX)")
    # link torch's bundled OpenMP, if any: two thread pools would compete for the cores
    theirs = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return [*compiler, *FLAGS, *options, str(source), *map(str, theirs[:1])]
