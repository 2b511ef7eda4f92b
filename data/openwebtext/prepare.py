"""OpenWebText encoded with GPT-2's BPE: 8 million web pages, about 9 billion tokens, 17 GB.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --source=PATH

The dataset is streamed from the Hugging Face hub (13.5 GB), or read from a folder with its .parquet,
.arrow or .jsonl files (`--source`). As in nanoGPT, 0.05 % of the pages are kept for validation, but chosen
by a hash of their text, so they are not nanoGPT's. If interrupted, run the same command again to resume.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # Python adds only the folder of this file

from nanogpt.config import Seed, load
from nanogpt.errors import run_program
from nanogpt.prepare import web
from nanogpt.prepare.corpus import own_folder
from nanogpt.prepare.web import WebOptions

# The main branch, else the hub's own conversion if it is complete (otherwise it is in partial-train).
HUB = (
    "Skylion007/openwebtext/plain_text/train-*-of-00080.parquet@main"
    "|Skylion007/openwebtext/plain_text/train/*.parquet@refs/convert/parquet"
)


@dataclass
class Config(WebOptions):
    hub: str = HUB  # NAME[:CONFIG[:SPLIT]][@REVISION], or NAME/FILES@REVISION; "|": else
    seed: Seed = 2357  # seed of the choice of validation pages


def main(config: Config) -> None:
    print("\n".join(web.prepare(config, own_folder(__file__))))


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
