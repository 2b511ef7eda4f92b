"""Sample from a trained model: a prompt in, text out.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3
    python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=gpt2-xl --start="The meaning of life is"

Of a run it needs the folder only. Samples are separated by a line of 15 dashes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from nanogpt import runtime, tokenizer, weights
from nanogpt.config import ROOT, Count, Positive, Range, load
from nanogpt.errors import UserError, run_program
from nanogpt.generate import Decoder, Text
from nanogpt.sampling import SamplingOptions


@dataclass(frozen=True)
class Config:
    # which model
    init_from: str = "resume"  # the run folder out_dir; or gpt2 .. gpt2-xl, a folder, nanoGPT's ckpt.pt
    out_dir: str = "out"  # a run folder of train.py
    which: str = "best"  # its checkpoint: best (lowest validation loss), last, or a step number
    # what to write
    start: str = "\n"  # the prompt; FILE:prompt.txt reads it from a file
    num_samples: Positive = 10  # how many
    max_new_tokens: Count = 500  # tokens in each
    # how tokens are drawn
    temperature: Annotated[float, Range(0)] = 0.8  # 1: as the model says; lower: bolder; 0: the most likely
    top_k: Count = 200  # draw among this many likeliest tokens; 0: all
    seed: Count = 1337  # the same seed gives the same text
    # machine
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products


def main(config: Config, origins: dict[str, str] | None = None) -> None:
    """Print the samples. Raises UserError for a missing run or a prompt the model cannot read."""
    found = weights.open_weights(config.init_from, ROOT, Path(config.out_dir), config.which)
    print("".join(f"{line}\n" for line in found.notices), end="", file=sys.stderr)
    if not found.tokenizer:
        raise UserError(
            f"nothing beside {found.origin} tells its tokenizer: put meta.pkl (nanoGPT) or merges.txt there"
        )
    tokens = tokenizer.from_text(found.tokenizer, found.origin)
    prompt = encode(config.start, tokens)
    machine = runtime.setup(config.device, config.dtype, found.config.n_embd)
    model = found.load(found.fitted(), machine.device)
    model.to(runtime.DTYPES[machine.dtype])
    print(f"{found.origin}; {machine.reason}", file=sys.stderr)
    sampling = SamplingOptions(temperature=config.temperature, top_k=config.top_k)
    texts = [Text(prompt, sampling, config.seed + i) for i in range(config.num_samples)]
    decoder = Decoder(model, len(texts), len(prompt) + config.max_new_tokens)
    decoder.add(texts)
    for _ in range(config.max_new_tokens):
        decoder.step()
    for text in texts:
        print(tokenizer.decode(tokens, text.ids))
        print("-" * 15)


def encode(start: str, tokens: tokenizer.Tokenizer) -> list[int]:
    """The prompt's ids; an empty prompt is the end of a text, or a new line, which it usually stands for."""
    if start.startswith("FILE:"):
        try:
            start = Path(start[5:]).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--start={start}: {error}; give a UTF-8 text file") from None
    if start:
        try:
            return tokens.encode_prompt(start)
        except UserError as error:
            raise UserError(f"the prompt has characters that the model cannot read: {error}") from None
    return [tokens.end_of_text] if tokens.end_of_text is not None else tokens.encode_prompt("\n")


if __name__ == "__main__":
    run_program(lambda: main(*load(Config, sys.argv[1:])))
