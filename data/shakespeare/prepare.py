"""Tiny Shakespeare in the tokens of GPT-2, to finetune it.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --input=tinyshakespeare.txt

The first 90 % of the characters are train, as nanoGPT has it; the ids are its ids.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # Python puts only this folder there

from nanogpt import download
from nanogpt.config import load
from nanogpt.errors import run_program
from nanogpt.prepare import corpus


@dataclass
class Config:
    out: str = ""  # the dataset folder to write, if not the one of this program
    input: str = ""  # a text on this machine, instead of the download
    url: str = download.SHAKESPEARE_URL  # where to download it
    gpt2_bpe: str = ""  # OpenAI's vocab.bpe or its folder, instead of the download


def main(config: Config) -> None:
    text = Path(config.input) if config.input else download.tiny_shakespeare(config.url)
    out = Path(config.out or Path(__file__).parent)
    summary = corpus.prepare([text], out, kind="gpt2", gpt2_bpe=config.gpt2_bpe)
    print("\n".join(summary.lines()))
    if summary.texts.sources[0].sha256 != download.SHAKESPEARE_SHA256:
        print(f"note: {text} is not the usual tinyshakespeare.txt")
    dataset = summary.option if config.out else "--dataset=shakespeare"
    print("python train.py config/quickstart.py --out_dir=out-shakespeare", dataset)


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
