"""Compare decoding speed in tokens/s with nanoGPT's generate and transformers' generate.

    python benchmarks/decode.py                                  # without nanoGPT
    python benchmarks/decode.py --nanogpt=NANOGPT --rounds=5     # NANOGPT: a clone of karpathy/nanoGPT
    python benchmarks/decode.py --only=char --nanogpt=NANOGPT

GPT-2 (124M, random weights) continues prompts of 16 and 500 tokens at batch 1, and the character model
(6 layers, 384 channels, context 256) generates ten samples of 500 tokens. The sides alternate; each result
is the best of its rounds, because other load on the machine can only slow it down. "decode" excludes the
prefill. The percentage is relative to the measured memory bandwidth, if every weight is read once per token.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nanogpt.config import PositiveInt, load
from nanogpt.errors import UserError, run_program
from nanogpt.inference.engine import Engine, Text
from nanogpt.inference.quantize import cast
from nanogpt.inference.sampling import SamplingOptions
from nanogpt.model import GPT, GPT2_SIZES, GPTConfig

SAMPLING = SamplingOptions(temperature=0.8, top_k=200)
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
CHARACTERS = GPTConfig(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384, bias=False)


@dataclass(frozen=True)
class Config:
    nanogpt: str = ""  # path of a nanoGPT clone; empty: skip it
    transformers: bool = True  # include transformers' generate, if installed
    only: Literal["", "16", "500", "char"] = ""  # run only this comparison: prompt length, or char
    rounds: PositiveInt = 3  # rounds per side, alternating


@dataclass
class Taken:
    whole_s: float  # prefill and decoding
    decode_s: float  # decoding alone; 0: unknown
    cpu_s: float  # CPU time of both


def bandwidth() -> float:
    """Measure the memory read bandwidth of all threads in bytes/s."""
    block = torch.ones(64 << 20)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - start)
    return block.numel() * 4 / min(times)


def ours(model: GPT, context: int, count: int, texts: int = 1) -> Taken:
    cpu, start = time.process_time(), time.perf_counter()
    prompt = [(7 * i) % model.config.vocab_size for i in range(context)]
    decoder = Engine(model, texts, context + count)
    decoder.add([Text(prompt, SAMPLING, seed=i) for i in range(texts)])
    read = time.perf_counter()
    for _ in range(count):
        decoder.step()
    end = time.perf_counter()
    return Taken(end - start, end - read, time.process_time() - cpu)


def timed(run: Callable[[], object]) -> Taken:
    cpu, start = time.process_time(), time.perf_counter()
    with torch.inference_mode():
        run()
    return Taken(time.perf_counter() - start, 0.0, time.process_time() - cpu)


def theirs(folder: str, config: GPTConfig) -> Any:
    """Build nanoGPT's model with the shape of `config` and random weights."""
    sys.path.insert(0, folder)
    try:
        import model as nanogpt_model
    except ImportError:
        raise UserError(f"--nanogpt={folder} has no model.py; give a clone of karpathy/nanoGPT") from None
    names = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    return nanogpt_model.GPT(nanogpt_model.GPTConfig(**{n: getattr(config, n) for n in names})).eval()


def hugging_face(dtype: torch.dtype) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None)).to(dtype).eval()


def gpt2_sides(config: Config, context: int, count: int) -> dict[str, Callable[[], Taken]]:
    sides: dict[str, Callable[[], Taken]] = {}
    for dtype in BYTES:
        model = cast(GPT(GPT2_SIZES["gpt2"]).eval(), dtype)
        sides[f"ours {dtype}"] = lambda model=model: ours(model, context, count)
    idx = torch.arange(context)[None]
    mask = torch.ones_like(idx)
    if config.nanogpt:
        model = theirs(config.nanogpt, GPT2_SIZES["gpt2"])
        sides["nanoGPT float32"] = lambda model=model: timed(
            lambda: model.generate(idx, count, temperature=0.8, top_k=200)
        )
    if config.transformers:
        try:
            models = {dtype: hugging_face(dtype) for dtype in (torch.float32, torch.bfloat16)}
        except ImportError:
            print("transformers is not installed: skipped (pip install transformers)")
            models = {}
        for dtype, model in models.items():
            options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": True, "top_k": 200}
            sides[f"transformers {str(dtype)[6:]}"] = lambda model=model, options=options: timed(
                lambda: model.generate(idx, attention_mask=mask, temperature=0.8, **options)
            )
    return sides


def character_sides(config: Config) -> dict[str, Callable[[], Taken]]:
    """Return the sides that generate ten samples of 500 tokens after a newline, without process start-up."""
    sides: dict[str, Callable[[], Taken]] = {}
    for dtype in ("float32", "bfloat16", "int8"):
        model = cast(GPT(CHARACTERS).eval(), dtype)
        sides[f"ours {dtype}"] = lambda model=model: ours(model, 1, 500, texts=10)
    if config.nanogpt:
        model = theirs(config.nanogpt, CHARACTERS)
        idx = torch.zeros((1, 1), dtype=torch.int64)
        sides["nanoGPT float32"] = lambda: timed(
            lambda: [model.generate(idx, 500, temperature=0.8, top_k=200) for _ in range(10)]
        )
    return sides


def compare(
    sides: dict[str, Callable[[], Taken]], tokens: int, rounds: int, speed: float, matrices: int
) -> None:
    taken: dict[str, list[Taken]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            taken[name].append(run())
    theirs_s = min((run.whole_s for run in taken.get("nanoGPT float32", [])), default=0.0)
    for name, runs in taken.items():
        whole = min(run.whole_s for run in runs)
        decode = min(run.decode_s for run in runs)
        line = f"{name:24} {tokens / whole:8.1f} tok/s"
        if decode:
            line += f"   decode {tokens / decode:7.1f}"
        if decode and matrices:
            share = matrices * BYTES[name.split()[1]] * tokens / decode / speed
            line += f" ({share:4.0%} of memory bandwidth)"
        if theirs_s:
            line += f"   {theirs_s / whole:5.1f}x nanoGPT"
        print(f"{line}   CPU time {min(run.cpu_s for run in runs) / tokens * 1e3:6.1f} ms/token", flush=True)


def main(config: Config, origins: dict[str, str] | None = None) -> None:
    torch.manual_seed(0)
    speed = bandwidth()
    print(f"{torch.get_num_threads()} threads read {speed / 1e9:.1f} GB/s; torch {torch.__version__}")
    matrices = GPT(GPT2_SIZES["gpt2"]).n_params(lookup_tables=False)
    for name, context, count in (("16", 16, 100), ("500", 500, 50)):
        if config.only in ("", name):
            print(f"\nGPT-2 (124M), batch 1, {context} + {count} tokens")
            compare(gpt2_sides(config, context, count), count, config.rounds, speed, matrices)
    if config.only in ("", "char"):
        print("\nCharacter model (6 x 384), ten samples of 500 tokens")
        compare(character_sides(config), 5000, config.rounds, speed, 0)


if __name__ == "__main__":
    run_program(lambda: main(*load(Config, sys.argv[1:])))
