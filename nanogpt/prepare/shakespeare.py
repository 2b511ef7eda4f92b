"""Tiny Shakespeare for data/shakespeare and data/shakespeare_char, byte-identical to nanoGPT's."""

from dataclasses import dataclass
from pathlib import Path

from nanogpt.prepare import corpus, own_text
from nanogpt.tokenizer import download


@dataclass
class ShakespeareOptions:
    out: str = ""  # dataset folder to write; default: the folder of this program
    input: str = ""  # local text file to use instead of the download
    url: str = download.SHAKESPEARE_URL  # download URL


def prepare(
    options: ShakespeareOptions, folder: Path, kind: str, presets: dict[str, str], gpt2_bpe: str = ""
) -> None:
    """Write the dataset with a tokenizer of `kind` to `options.out` or `folder`; print a summary and the
    command that trains on it, with one of `presets` (see own_text.training_command).
    """
    text = Path(options.input) if options.input else download.tiny_shakespeare(options.url)
    summary = corpus.prepare([text], Path(options.out or folder), kind=kind, gpt2_bpe=gpt2_bpe)
    if kind == "char":
        print("all the unique characters:", summary.alphabet)
    print("\n".join(summary.lines()))
    if summary.texts.sources[0].sha256 != download.SHAKESPEARE_SHA256:
        print(f"note: {text} is not the usual tinyshakespeare.txt")
    dataset = "" if options.out else folder.name
    print(own_text.training_command(summary, dataset=dataset, **presets))
