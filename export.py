"""Write a model in the layout of another program: Hugging Face's transformers, or nanoGPT.

    python export.py --out_dir=out-shakespeare-char --to=exported
    python export.py --out_dir=out-shakespeare-char --to=exported --format=nanogpt
    python export.py --init_from=gpt2 --to=gpt2-half --dtype=bfloat16

The folder of --format=hf loads with AutoModelForCausalLM and AutoTokenizer. A model that no class of
transformers computes exactly is refused with the reason, unless its own code may lie beside it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanogpt import ROOT, files
from nanogpt.config import load
from nanogpt.convert import ckpt, hf_export, weights
from nanogpt.errors import UserError, run_program


@dataclass(frozen=True)
class Config:
    # what to write where
    to: str  # a folder that does not exist yet
    format: Literal["hf", "nanogpt"] = "hf"  # hf: for transformers; nanogpt: ckpt.pt, and meta.pkl
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights, for hf
    custom_code: bool = False  # put the model's code beside the weights: any model, but trust_remote_code
    # which model
    init_from: str = "resume"  # the run folder out_dir; or what sample.py's --init_from takes
    out_dir: str = "out"  # a run folder of train.py
    which: str = "best"  # its checkpoint: best (lowest validation loss), last, or a step number


def main(config: Config, origins: dict[str, str] | None = None) -> None:
    """Write the folder `config.to`. Raises UserError for a model that cannot be what is asked, before
    its weights are read."""
    target = Path(config.to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to={target} exists; give the name of a new folder, or delete it first")
    if config.format == "nanogpt" and (config.dtype, config.custom_code) != ("float32", False):
        raise UserError("--dtype and --custom_code are for --format=hf; nanoGPT's ckpt.pt has neither")
    found = weights.open_weights(config.init_from, ROOT, Path(config.out_dir), config.which)
    print("".join(f"{line}\n" for line in found.notices), end="", file=sys.stderr)
    if config.format == "hf":
        hf_export.choose(found.config, config.custom_code)
    else:
        ckpt.require(found.config, found.tokenizer)
    model = found.load(found.fitted())
    with files.staged(target) as draft:
        draft.mkdir(parents=True)
        if config.format == "hf":
            said = hf_export.write_folder(draft, model, found.tokenizer, config.dtype, config.custom_code)
        else:
            said = ckpt.write_folder(draft, model, found)
        if target.is_dir():
            target.rmdir()
    print("\n".join([f"{found.origin} is now {target}", *said]))


if __name__ == "__main__":
    run_program(lambda: main(*load(Config, sys.argv[1:])))
