"""Prepare a dataset from any text: files, folders, patterns and Hugging Face datasets, of any size.

    python data/prepare.py novel.txt --out=data/novel
    python data/prepare.py essays/ letters.jsonl --out=data/mine --tokenizer=gpt2
    python data/prepare.py 'crawl/*.jsonl.zst' more.parquet --out=data/crawl --tokenizer=bpe:8192
    python data/prepare.py questions.jsonl --text_key=prompt+response --out=data/questions --tokenizer=gpt2
    python data/prepare.py --hub=NAME:CONFIG:SPLIT --out=data/web --tokenizer=gpt2 --shard_tokens=100000000

Inputs are text in any common encoding, JSON (lines or arrays) and CSV, also compressed (.gz, .bz2, .xz,
.zst), Parquet and Arrow, recognized by content; folders are searched recursively. Fewer than 100 documents
(files or rows) are each cut into train and val; otherwise each goes to one of them whole. If interrupted, run
the same command again to resume.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python adds only the folder of this file

from nanogpt import command
from nanogpt.config import Amount, FilePath, NonNegativeInt, Seed, load_with_arguments
from nanogpt.errors import UserError, run_program
from nanogpt.prepare import corpus, own_text


@dataclass
class Config:
    # input and output
    out: FilePath  # dataset folder to write, such as data/mine
    hub: str = ""  # NAME[:CONFIG[:SPLIT]][@REVISION] of a Hugging Face dataset, streamed
    text_key: str = "text"  # text field of JSONL or column; prompt+response: loss on the response only
    encoding: str = ""  # encoding of text files, if not UTF-8, UTF-16 or GB18030
    on_undecodable: Literal["refuse", "replace", "drop"] = "refuse"  # bytes of a text invalid in its encoding
    split_at: str = ""  # mark between documents of a text: '<|endoftext|>', line, blank_line; empty: none
    skip_bad: bool = False  # skip and count unreadable rows
    # tokenizer
    tokenizer: FilePath = "auto"  # char, byte, gpt2, bpe:SIZE (trained here), PATH/tokenizer.json; auto: char
    lossy: bool = False  # accept a tokenizer.json that loses characters of the text
    gpt2_bpe: FilePath = ""  # OpenAI's vocab.bpe, or its folder, to use instead of the download
    # split
    val: FilePath = ""  # validation texts: a file, folder or pattern; empty: a fraction of the texts
    val_fraction: float = 0.1  # fraction of the text for validation, without --val
    seed: Seed = 0  # seed of the choice of validation documents
    # execution and file layout
    workers: NonNegativeInt = 0  # encoding processes; 0: one per core if the text is large
    shard_tokens: Amount = 0  # tokens per shard, as in llm.c; 0: one file per split


def main(config: Config, paths: list[str]) -> None:
    if not (paths or config.hub) or not config.out:
        raise UserError(f"give a text and a dataset folder: {command('prepare')} novel.txt --out=data/novel")
    if config.gpt2_bpe and config.tokenizer != "gpt2":
        raise UserError(f"--gpt2_bpe={config.gpt2_bpe} needs --tokenizer=gpt2")
    options = asdict(config)
    out, kind = Path(options.pop("out")), options.pop("tokenizer")
    summary = corpus.prepare([Path(path) for path in paths], out, kind=kind, **options)
    print("\n".join(summary.lines()))
    print(own_text.training_command(summary))


if __name__ == "__main__":
    run_program(lambda: main(*load_with_arguments(Config, sys.argv[1:])))
