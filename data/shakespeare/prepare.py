"""Tiny Shakespeare encoded with GPT-2's BPE, for finetuning.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --input=tinyshakespeare.txt

As in nanoGPT, the first 90 % of the characters are train; the ids are the same as nanoGPT's.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # Python adds only the folder of this file

from nanogpt.config import FilePath, load
from nanogpt.errors import run_program
from nanogpt.prepare.corpus import own_folder
from nanogpt.prepare.shakespeare import ShakespeareOptions, prepare


@dataclass
class Config(ShakespeareOptions):
    gpt2_bpe: FilePath = ""  # OpenAI's vocab.bpe, or its folder, to use instead of the download


def main(config: Config) -> None:
    prepare(config, own_folder(__file__), "gpt2", {}, config.gpt2_bpe)


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
