"""OpenWebText in the tokens of GPT-2: 8 million web pages, some 9 billion tokens, 17 GB.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --source=PATH

It is streamed from the Hugging Face hub (13.5 GB), or read from a folder with its .parquet, .arrow or
.jsonl files (`--source`). As in nanoGPT, 0.05 % of the pages are kept for validation; which ones is
decided by a hash of their text, so they are not nanoGPT's. Interrupted, the same command goes on.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # Python puts only this folder there

from nanogpt.config import Count, load
from nanogpt.errors import run_program
from nanogpt.prepare import corpus

HUB = "Skylion007/openwebtext:plain_text:train@refs/convert/parquet"  # the repository itself is a script
HERE = Path(__file__).resolve().parent


@dataclass
class Config:
    source: str = ""  # a folder, file or pattern on this machine, instead of the hub
    hub: str = HUB  # NAME[:CONFIG[:SPLIT]][@REVISION] of the dataset
    out: str = ""  # the dataset folder to write, if not the one of this program
    text_key: str = "text"  # the column of the text
    gpt2_bpe: str = ""  # OpenAI's vocab.bpe or its folder, instead of the download
    val_fraction: float = 0.0005  # of the pages, for validation
    seed: Count = 2357  # of the choice of pages for validation
    workers: Count = 0  # processes that encode; 0: one a core
    shard_tokens: Count = 0  # write shards of so many tokens, as llm.c does; 0: one file a split


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
    print("python train.py config/train_gpt2.py", summary.option if config.out else "--dataset=openwebtext")


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
