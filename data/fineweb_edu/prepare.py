"""FineWeb-Edu, the sample of 10 billion tokens, in the tokens of GPT-2: 9.7 million web pages, 20 GB.

    python data/fineweb_edu/prepare.py
    python data/fineweb_edu/prepare.py --source=PATH

It is streamed from the Hugging Face hub, or read from a folder with its .parquet, .arrow or .jsonl
files (`--source`), and written as shards of 100 million tokens. One page in a hundred, by a hash of its
text, is kept for validation. Interrupted, the same command goes on.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # Python puts only this folder there

from nanogpt.config import Count, load
from nanogpt.errors import run_program
from nanogpt.prepare import corpus

HUB = "HuggingFaceFW/fineweb-edu:sample-10BT:train"
HERE = Path(__file__).resolve().parent


@dataclass
class Config:
    source: str = ""  # a folder, file or pattern on this machine, instead of the hub
    hub: str = HUB  # NAME[:CONFIG[:SPLIT]][@REVISION] of the dataset
    out: str = ""  # the dataset folder to write, if not the one of this program
    text_key: str = "text"  # the column of the text
    gpt2_bpe: str = ""  # OpenAI's vocab.bpe or its folder, instead of the download
    val_fraction: float = 0.01  # of the pages, for validation
    seed: Count = 1337  # of the choice of pages for validation
    workers: Count = 0  # processes that encode; 0: one a core
    shard_tokens: Count = 100_000_000  # write shards of so many tokens, as llm.c does; 0: one file a split


def main(config: Config) -> None:
    summary = corpus.prepare(
        [Path(config.source)] if config.source else [],
        Path(config.out or HERE),
        kind="gpt2",
        hub="" if config.source else config.hub,
        instead="without the net, put its parquet files into a folder and give --source=FOLDER",
        text_key=config.text_key,
        gpt2_bpe=config.gpt2_bpe,
        val_fraction=config.val_fraction,
        seed=config.seed,
        workers=config.workers,
        shard_tokens=config.shard_tokens,
    )
    print("\n".join(summary.lines()))
    print("python train.py config/train_gpt2.py", summary.option if config.out else "--dataset=fineweb_edu")


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
