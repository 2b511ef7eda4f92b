"""Generate text from a trained model.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3
    python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0
    python sample.py --out_dir=out-shakespeare-char --interactive
    python sample.py --out_dir=out-shakespeare-char --overlap     # is it copying?
    python sample.py --init_from=gpt2-xl --start="The meaning of life is" --dtype=int8 --stream
    python sample.py --init_from=gpt2 --prompts=FILE.jsonl --json > samples.jsonl

A run folder is self-contained. Samples are separated by a line of 15 dashes. Each line of FILE.jsonl is
{"prompt": "..."} or a JSON string. With --json each output line is one sample: prompt, text, finish_reason,
and the tokens with their log-probabilities and the most likely alternatives.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from nanogpt import files
from nanogpt.config import FilePath, NonNegativeInt, PositiveInt, Range, Seed, UnitInterval, load, pick_fields
from nanogpt.errors import UserError, run_program
from nanogpt.inference import api
from nanogpt.inference.detokenizer import text_of
from nanogpt.inference.engine import Completion, Token
from nanogpt.inference.sampling import SamplingOptions


@dataclass(frozen=True)
class Config:
    # model
    init_from: FilePath = "resume"  # resume: the run in out_dir; gpt2 .. gpt2-xl, a folder, a ckpt.pt
    out_dir: FilePath = "out"  # run folder written by train.py
    which: str = "best"  # checkpoint to load: best (lowest validation loss), last, or a step number
    # prompts and stopping
    start: str = "\n"  # prompt; FILE:prompt.txt reads it from a file
    prompts: FilePath = ""  # JSONL file of prompts instead of start: a string or {"prompt": "..."} per line
    num_samples: Annotated[int, Range(1, 100_000)] = 10  # samples per prompt; temperature 0: by default one
    max_new_tokens: NonNegativeInt = 500  # maximum number of new tokens per sample
    stop: str = ""  # stop string, excluded from the output; '["a", "b"]': any of several
    stop_at_end: bool = False  # stop at the end-of-text token, if the vocabulary has one
    # sampling; applied in this order
    repetition_penalty: Annotated[float, Range(0)] = 1.0  # above 1: penalizes tokens already in the text
    temperature: Annotated[float, Range(0)] = 0.8  # softmax temperature; 0: greedy decoding
    top_k: NonNegativeInt = 200  # sample from the k most likely tokens; 0: all
    top_p: UnitInterval = 1.0  # nucleus sampling: smallest set of tokens with this total probability; 1: all
    min_p: UnitInterval = 0.0  # minimum token probability, relative to the most likely token; 0: off
    seed: Seed = 1337  # random seed; sample i of a prompt uses seed + i
    # output
    stream: bool = False  # print text as it is generated, one sample at a time
    interactive: bool = False  # read prompts from the terminal; Ctrl-C stops a sample, Ctrl-D exits
    json: bool = False  # print one JSON object per sample, with log-probabilities
    logprobs: NonNegativeInt = 0  # with --json: number of top alternatives per token
    overlap: bool = False  # report the longest passage of each sample that is in the training text
    # device
    batch_size: PositiveInt = 16  # maximum number of samples generated in parallel
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best available
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"  # weight dtype; int8: CPU only
    compile: Literal[False] = False  # accepted for compatibility with nanoGPT; has no effect
    cuda_graph: bool = False  # replay decoding steps as CUDA graphs (experimental; see docs/gpu.md)


def main(config: Config, origins: dict[str, str] | None = None) -> None:
    """Load the model and print samples. Raise UserError for a missing run or unencodable prompt."""
    shown = [name for name in ("stream", "interactive", "json") if getattr(config, name)]
    if len(shown) > 1:
        raise UserError(f"{' and '.join(f'--{name}' for name in shown)} are mutually exclusive; give one")
    if config.logprobs and not config.json:
        print(f"note: --logprobs={config.logprobs} has no effect without --json", file=sys.stderr)
    for name, instead in (("start", "prompts"), ("start", "interactive"), ("prompts", "interactive")):
        if name in (origins or {}) and getattr(config, instead):
            print(f"note: --{name} has no effect with --{instead}", file=sys.stderr)
    controls = vars(pick_fields(SamplingOptions, config))  # validated before the model is loaded
    stops = stop_strings(config.stop)
    if any(r"\n" in text for text in [*stops, config.start] if not text.startswith("FILE:")):
        print(r"note: \n is two characters here; type $'\n' for a line break", file=sys.stderr)
    prompts = [""] if config.interactive else read_prompts(config)
    by_default = origins is not None and "num_samples" not in origins
    if by_default and not (config.temperature or config.interactive):
        config = replace(config, num_samples=1)
        print("--temperature=0: one sample per prompt, since all would be the same", file=sys.stderr)
    model = api.load(
        config.init_from,
        run=Path(config.out_dir),
        which=config.which,
        device=config.device,
        dtype=config.dtype,
        notice=lambda line: print(line, file=sys.stderr),
    )
    print(f"{model.origin}; {model.machine.reason}", file=sys.stderr)
    if config.cuda_graph:
        from nanogpt.gpu.cuda_graphs import require_cuda
        from nanogpt.inference.graph_decode import GraphEngine

        require_cuda(model.machine.device)
        model = replace(model, decoder=GraphEngine)

    def completions(prompts: list[str]) -> list[Completion]:
        return model.completions(
            prompts,
            num_samples=1 if config.interactive else config.num_samples,
            max_new_tokens=config.max_new_tokens,
            stop=stops,
            stop_at_end=config.stop_at_end,
            seed=config.seed,
            logprobs=config.logprobs if config.json else None,
            **controls,
        )

    if config.interactive:
        converse(model, completions)
        return
    asked = completions(prompts)
    for completion in asked if config.stream else []:
        show(model, completion)
    for number, completion in enumerate([] if config.stream else in_order(model, asked, config.batch_size)):
        if config.json:
            row = as_json(model, prompts, number, config.num_samples, completion)
            print(json.dumps(row, ensure_ascii=False))
        else:
            print(model.decode(completion.text.ids[: completion.text.prompt_length]) + completion.string)
            print("-" * 15)
    if config.overlap:
        from nanogpt.diagnostics import overlap

        ids = [[token.id for token in completion.tokens] for completion in asked]
        print(*overlap.report(Path(model.origin).parent, ids, model.decode), sep="\n", file=sys.stderr)


def in_order(model: api.LanguageModel, asked: list[Completion], batch_size: int) -> Iterator[Completion]:
    """Yield finished completions in the order of `asked`; show a progress bar on a terminal."""
    from tqdm import tqdm

    total, given = sum(c.max_new_tokens for c in asked), 0
    # disable=None disables the bar if stderr is not a TTY
    with tqdm(total=total, unit=" tokens", delay=5, disable=None, leave=False, file=sys.stderr) as bar:
        for completion, _, _ in model.write(asked, batch_size):
            bar.update()
            if completion.finish_reason:
                bar.total -= completion.max_new_tokens - len(completion.tokens)
            while given < len(asked) and asked[given].finish_reason:
                yield asked[given]
                given += 1
    yield from asked[given:]  # completions with max_new_tokens=0


def show(model: api.LanguageModel, completion: Completion, prompt: bool = True) -> None:
    """Print a completion as it is generated, after its prompt if `prompt`."""
    if prompt:
        print(model.decode(completion.text.ids[: completion.text.prompt_length]), end="", flush=True)
    for _, _, piece in model.write([completion]):
        print(piece, end="", flush=True)
    print("\n" + "-" * 15 if prompt else "")


def converse(model: api.LanguageModel, completions: Any) -> None:
    """Generate a continuation of each line read from stdin; report prompts that cannot be encoded."""
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        try:
            show(model, completions([prompt])[0], prompt=False)
        except UserError as error:
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            print(" (stopped)")


def as_json(
    model: api.LanguageModel, prompts: list[str], number: int, num_samples: int, completion: Completion
) -> dict[str, Any]:
    def token(drawn: Token, before: int) -> dict[str, Any]:
        every = [(drawn.id, drawn.logprob), *drawn.top]
        own, *top = ({"id": i, "text": text_of(model.tokenizer, i, before), "logprob": p} for i, p in every)
        return own | ({"top": top} if top else {})

    ids = completion.text.ids[completion.text.prompt_length - 1 :]
    return {
        "prompt": prompts[number // num_samples],
        "prompt_number": number // num_samples,
        "sample": number % num_samples,
        "text": completion.string,
        "finish_reason": completion.finish_reason or "length",
        "tokens": [token(drawn, before) for drawn, before in zip(completion.tokens, ids, strict=False)],
    }


def stop_strings(stop: str) -> list[str]:
    """Parse --stop: one string, or a JSON list of strings. Raise UserError for an invalid list."""
    if not stop.startswith("["):
        return [stop] if stop else []
    stops = files.parse_json(stop, f"--stop={stop}", [str])
    if not all(stops):
        raise UserError(f'--stop={stop} holds an empty string; write it like --stop=\'["a", "b"]\'')
    return stops


def read_prompts(config: Config) -> list[str]:
    """Return the prompts of --prompts, else --start. Raise UserError if a file or a line cannot be read."""
    if not config.prompts and not config.start.startswith("FILE:"):
        return [config.start]
    from nanogpt.inference.prompts import read_file

    return read_file(config.prompts, config.start)


if __name__ == "__main__":
    run_program(lambda: main(*load(Config, sys.argv[1:])))
