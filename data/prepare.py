"""Any text to a dataset: files, folders and JSONL files (field `text`), of any size and encoding.

    python data/prepare.py novel.txt --out=data/novel
    python data/prepare.py essays/ letters.jsonl --out=data/mine --tokenizer=gpt2

A folder is searched for text at any depth. Fewer than 100 documents (files or rows) are each cut into
train and val; more go to one of them whole.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python puts only this folder there

from nanogpt import corpus
from nanogpt.config import read
from nanogpt.errors import UserError, run_program


@dataclass
class Config:
    out: str  # the dataset folder to write, such as data/mine
    tokenizer: Literal["auto", "char", "byte", "gpt2"] = "auto"  # auto: char, for huge alphabets byte
    val_fraction: float = 0.1  # how much of the text is kept for validation
    encoding: str = ""  # of the files, where it is none of UTF-8, UTF-16 and GB18030
    gpt2_bpe: str = ""  # OpenAI's vocab.bpe or its folder, instead of the download


def main(config: Config, paths: list[str]) -> None:
    if not paths or not config.out:
        raise UserError(
            "name a text to prepare and a folder for it: python data/prepare.py novel.txt --out=data/novel"
        )
    if config.gpt2_bpe and config.tokenizer != "gpt2":
        raise UserError(f"--gpt2_bpe={config.gpt2_bpe} needs --tokenizer=gpt2")
    summary = corpus.prepare(
        [Path(path) for path in paths],
        Path(config.out),
        kind=config.tokenizer,
        val_fraction=config.val_fraction,
        encoding=config.encoding,
        gpt2_bpe=config.gpt2_bpe,
    )
    print("\n".join(summary.lines()))
    print("python train.py config/quickstart.py", summary.option)


def program() -> None:
    options = read(Config, sys.argv[1:], arguments=True)
    main(Config(**options.values), options.arguments)


if __name__ == "__main__":
    run_program(program)
