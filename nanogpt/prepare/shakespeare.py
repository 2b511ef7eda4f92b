"""Tiny Shakespeare, which data/shakespeare and data/shakespeare_char prepare with nanoGPT's very bytes."""

from dataclasses import dataclass
from pathlib import Path

from nanogpt.prepare import corpus
from nanogpt.tokenizer import download


@dataclass
class ShakespeareOptions:
    out: str = ""  # the dataset folder to write, if not the one of this program
    input: str = ""  # a text on this machine, instead of the download
    url: str = download.SHAKESPEARE_URL  # where to download it


def prepare(options: ShakespeareOptions, folder: Path, command: str, kind: str, gpt2_bpe: str = "") -> None:
    """Write the dataset in tokens of `kind` to `options.out` or `folder`, and print what it holds and the
    `command` that trains on it."""
    text = Path(options.input) if options.input else download.tiny_shakespeare(options.url)
    summary = corpus.prepare([text], Path(options.out or folder), kind=kind, gpt2_bpe=gpt2_bpe)
    if kind == "char":
        print("all the unique characters:", summary.alphabet)
    print("\n".join(summary.lines()))
    if summary.texts.sources[0].sha256 != download.SHAKESPEARE_SHA256:
        print(f"note: {text} is not the usual tinyshakespeare.txt")
    print(command, summary.option if options.out else f"--dataset={folder.name}")
