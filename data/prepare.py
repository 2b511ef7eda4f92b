"""Any text to a dataset: files, folders, patterns and datasets of Hugging Face, of any size.

    python data/prepare.py novel.txt --out=data/novel
    python data/prepare.py essays/ letters.jsonl --out=data/mine --tokenizer=gpt2
    python data/prepare.py 'crawl/*.jsonl.zst' more.parquet --out=data/crawl --tokenizer=bpe:8192
    python data/prepare.py questions.jsonl --text_key=prompt+response --out=data/questions --tokenizer=gpt2
    python data/prepare.py --hub=NAME:CONFIG:SPLIT --out=data/web --tokenizer=gpt2 --shard_tokens=100000000

Read are text in any usual encoding, .jsonl (also .gz, .xz, .zst), .parquet and .arrow; a folder is
searched at any depth. Fewer than 100 documents (files or rows) are each cut into train and val; more go
to one of them whole. Interrupted, the same command goes on where it stopped.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python puts only this folder there

from nanogpt.config import NonNegativeInt, read
from nanogpt.errors import UserError, run_program
from nanogpt.prepare import corpus


@dataclass
class Config:
    # what to read
    out: str  # the dataset folder to write, such as data/mine
    hub: str = ""  # NAME[:CONFIG[:SPLIT]][@REVISION] of a Hugging Face dataset, streamed
    text_key: str = "text"  # field of JSONL or column that holds the text; prompt+response: learn the latter
    encoding: str = ""  # of text files, where it is none of UTF-8, UTF-16 and GB18030
    skip_bad: bool = False  # leave out rows that cannot be read, and count them
    # tokens
    tokenizer: str = "auto"  # char, byte, gpt2, bpe:SIZE (trained here), PATH/tokenizer.json; auto: char
    gpt2_bpe: str = ""  # OpenAI's vocab.bpe or its folder, instead of the download
    # the split
    val_fraction: float = 0.1  # how much of the text is kept for validation
    seed: NonNegativeInt = 0  # of the choice of documents for validation
    # how
    workers: NonNegativeInt = 0  # processes that encode; 0: one a core where the text is large
    shard_tokens: NonNegativeInt = 0  # write shards of so many tokens, as llm.c does; 0: one file a split


def main(config: Config, paths: list[str]) -> None:
    if not (paths or config.hub) or not config.out:
        raise UserError(
            "name a text to prepare and a folder for it: python data/prepare.py novel.txt --out=data/novel"
        )
    if config.gpt2_bpe and config.tokenizer != "gpt2":
        raise UserError(f"--gpt2_bpe={config.gpt2_bpe} needs --tokenizer=gpt2")
    options = asdict(config)
    summary = corpus.prepare(
        [Path(path) for path in paths], Path(options.pop("out")), kind=options.pop("tokenizer"), **options
    )
    print("\n".join(summary.lines()))
    print("python train.py config/quickstart.py", summary.option)


def program() -> None:
    options = read(Config, sys.argv[1:], arguments=True)
    main(Config(**options.values), options.arguments)


if __name__ == "__main__":
    run_program(program)
