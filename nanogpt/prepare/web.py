"""Datasets of web pages encoded with GPT-2's BPE, from the hub or from local files with the same rows."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nanogpt import command
from nanogpt.config import Amount, NonNegativeInt, Seed
from nanogpt.prepare import corpus


@dataclass
class WebOptions:
    source: str = ""  # local folder, file or glob pattern to read instead of the hub
    hub: str = ""  # NAME[:CONFIG[:SPLIT]][@REVISION] of the dataset
    out: str = ""  # dataset folder to write; default: the folder of this program
    text_key: str = "text"  # column that contains the text
    gpt2_bpe: str = ""  # OpenAI's vocab.bpe, or its folder, to use instead of the download
    val_fraction: float = 0.0005  # fraction of the pages for validation
    seed: Seed = 0  # seed of the choice of validation pages
    workers: NonNegativeInt = 0  # encoding processes; 0: one per core
    shard_tokens: Amount = 0  # tokens per shard, as in llm.c; 0: one file per split


def prepare(config: WebOptions, folder: Path) -> list[str]:
    """Write the dataset to --out or to `folder`, that of the program; return the lines to print.

    Raise UserError for unusable sources and options, as corpus.prepare does.
    """
    options = asdict(replace(config, hub="") if config.source else config)
    source, out = options.pop("source"), Path(options.pop("out") or folder)
    instead = "offline or without all of it, put its parquet files into a folder and pass --source=FOLDER"
    paths = [Path(source)] if source else []
    summary = corpus.prepare(paths, out, kind="gpt2", instead=instead, **options)
    dataset = summary.option if config.out else f"--dataset={folder.name}"
    return [*summary.lines(), f"{command('train')} config/train_gpt2.py {dataset}"]
