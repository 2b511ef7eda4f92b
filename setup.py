"""Put programs, presets, prepare scripts and the page into the wheel, under nanogpt/programs/.

An editable install runs those of the checkout.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PROGRAMS = ("*.py", "config/*.py", "data/prepare.py", "data/*/prepare.py", "web/*", "benchmarks/reference/*")


class BuildWithPrograms(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for path in (path for pattern in PROGRAMS for path in ROOT.glob(pattern) if path.name != "setup.py"):
            target = Path(self.build_lib, "nanogpt", "programs", path.relative_to(ROOT))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


setup(cmdclass={"build_py": BuildWithPrograms})
