"""Tiny Shakespeare in the tokens of GPT-2, to finetune it.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --input=tinyshakespeare.txt

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
    gpt2_bpe: str = ""  # OpenAI's vocab.bpe or its folder, instead of the download


def main(config: Config) -> None:
    command = "python train.py config/quickstart.py --out_dir=out-shakespeare"
    prepare(config, Path(__file__).resolve().parent, command, "gpt2", config.gpt2_bpe)


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
