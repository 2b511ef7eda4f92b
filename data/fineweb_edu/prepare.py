"""FineWeb-Edu, the sample of 10 billion tokens, encoded with GPT-2's BPE: 9.7 million web pages, 20 GB.

    python data/fineweb_edu/prepare.py
    python data/fineweb_edu/prepare.py --source=PATH

The dataset is streamed from the Hugging Face hub, or read from a folder with its .parquet, .arrow or
.jsonl files (`--source`), and written as shards of 100 million tokens. One percent of the pages, chosen by
a hash of their text, is kept for validation. If interrupted, run the same command again to resume.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # Python adds only the folder of this file

from nanogpt.config import Amount, Seed, load
from nanogpt.errors import run_program
from nanogpt.prepare import web
from nanogpt.prepare.corpus import own_folder
from nanogpt.prepare.web import WebOptions

HUB = "HuggingFaceFW/fineweb-edu:sample-10BT:train"


@dataclass
class Config(WebOptions):
    hub: str = HUB  # NAME[:CONFIG[:SPLIT]][@REVISION] of the dataset
    val_fraction: float = 0.01  # fraction of the pages for validation
    seed: Seed = 1337  # seed of the choice of validation pages
    shard_tokens: Amount = 100_000_000  # tokens per shard, as in llm.c; 0: one file per split


def main(config: Config) -> None:
    print("\n".join(web.prepare(config, own_folder(__file__))))


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
