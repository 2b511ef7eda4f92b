"""Tiny Shakespeare with a token for each character.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --input=tinyshakespeare.txt

The first 90 % of the characters are train, as nanoGPT has it; the ids are its ids.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # Python puts only this folder there

from nanogpt.config import load
from nanogpt.errors import run_program
from nanogpt.prepare.shakespeare import ShakespeareOptions, prepare


@dataclass
class Config(ShakespeareOptions):
    pass


def main(config: Config) -> None:
    command = "python train.py config/train_shakespeare_char.py"
    prepare(config, Path(__file__).resolve().parent, command, "char")


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
