"""Tiny Shakespeare at character level.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --input=tinyshakespeare.txt

As in nanoGPT, the first 90 % of the characters are train; the ids are the same as nanoGPT's.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # Python adds only the folder of this file

from nanogpt.config import load
from nanogpt.errors import run_program
from nanogpt.prepare.corpus import own_folder
from nanogpt.prepare.shakespeare import ShakespeareOptions, prepare


@dataclass
class Config(ShakespeareOptions):
    pass


def main(config: Config) -> None:
    presets = {"on_cpu": "train_shakespeare_char_cpu.py", "on_gpu": "train_shakespeare_char.py"}
    prepare(config, own_folder(__file__), "char", presets)


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
