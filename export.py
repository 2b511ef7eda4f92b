"""Export a model to the format of another program: Hugging Face transformers or nanoGPT.

    python export.py --out_dir=out --to=exported                                        # GPT-2's architecture
    python export.py --out_dir=out-shakespeare-char --to=exported --custom_code=True    # the fast recipe
    python export.py --out_dir=out-shakespeare-char-nanogpt --to=exported --format=nanogpt
    python export.py --init_from=gpt2 --to=gpt2-half --dtype=bfloat16

A folder written with --format=hf loads with AutoModelForCausalLM and AutoTokenizer. A model that no
transformers class computes exactly is refused with the reason, unless --custom_code exports its code too.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanogpt import ROOT, files
from nanogpt.config import FilePath, load
from nanogpt.convert import ckpt, hf_export, weights
from nanogpt.errors import UserError, run_program


@dataclass(frozen=True)
class Config:
    # output
    to: FilePath  # folder to write; must be new or empty
    format: Literal["hf", "nanogpt"] = "hf"  # hf: for transformers; nanogpt: ckpt.pt, meta.pkl
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # dtype of the weights (hf only)
    custom_code: bool = False  # also export the model's code: any architecture; needs trust_remote_code
    # model
    init_from: FilePath = "resume"  # resume: the run in out_dir; else as --init_from of sample.py
    out_dir: FilePath = "out"  # run folder of train.py
    which: str = "best"  # checkpoint: best (lowest validation loss), last, or an iteration number


def main(config: Config, origins: dict[str, str] | None = None) -> None:
    """Write the folder `config.to`. Raise UserError, before reading weights, if the model cannot be exported
    in this format.
    """
    target = Path(config.to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to={target} exists; give the name of a new folder, or delete it first")
    if config.format == "nanogpt" and (config.dtype, config.custom_code) != ("float32", False):
        raise UserError("--dtype and --custom_code require --format=hf; omit them for nanoGPT's ckpt.pt")
    source = weights.open_weights(config.init_from, ROOT, Path(config.out_dir), config.which)
    print("".join(f"{line}\n" for line in source.notices), end="", file=sys.stderr)
    if config.format == "hf":
        hf_export.choose(source.config, config.custom_code)
    else:
        ckpt.require(source.config, source.tokenizer)
    model = source.load(source.fitted())
    with files.staged(target) as draft:
        draft.mkdir(parents=True)
        if config.format == "hf":
            notes = hf_export.write_folder(draft, model, source.tokenizer, config.dtype, config.custom_code)
            hf_export.write_card(draft, target.name, source, notes[0].split(",")[0], config.custom_code)
        else:
            notes = ckpt.write_folder(draft, model, source)
        if target.is_dir():
            target.rmdir()
    print("\n".join([f"exported {source.origin} to {target}", *notes]))


if __name__ == "__main__":
    run_program(lambda: main(*load(Config, sys.argv[1:])))
