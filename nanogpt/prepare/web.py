"""Datasets of web pages in the tokens of GPT-2, from the hub or from files of the same rows."""

from dataclasses import dataclass
from pathlib import Path

from nanogpt.config import NonNegativeInt
from nanogpt.prepare import corpus


@dataclass
class WebOptions:
    source: str = ""  # a folder, file or pattern on this machine, instead of the hub
    hub: str = ""  # NAME[:CONFIG[:SPLIT]][@REVISION] of the dataset
    out: str = ""  # the dataset folder to write, if not the one of this program
    text_key: str = "text"  # the column of the text
    gpt2_bpe: str = ""  # OpenAI's vocab.bpe or its folder, instead of the download
    val_fraction: float = 0.0005  # of the pages, for validation
    seed: NonNegativeInt = 0  # of the choice of pages for validation
    workers: NonNegativeInt = 0  # processes that encode; 0: one a core
    shard_tokens: NonNegativeInt = 0  # write shards of so many tokens, as llm.c does; 0: one file a split


def prepare(config: WebOptions, own: Path) -> list[str]:
    """Write the dataset to `own`, the folder of the program, or --out; returns what to print.

    Raises UserError for sources and options that cannot be used, as corpus.prepare.
    """
    summary = corpus.prepare(
        [Path(config.source)] if config.source else [],
        Path(config.out or own),
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
    dataset = summary.option if config.out else f"--dataset={own.name}"
    return [*summary.lines(), f"python train.py config/train_gpt2.py {dataset}"]
