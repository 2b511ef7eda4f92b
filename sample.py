"""Sample from a trained model: a prompt in, text out.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3
    python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0
    python sample.py --out_dir=out-shakespeare-char --interactive
    python sample.py --init_from=gpt2-xl --start="The meaning of life is" --dtype=int8 --stream
    python sample.py --init_from=gpt2 --prompts=FILE.jsonl --json > samples.jsonl

Of a run it needs the folder only. Samples are separated by a line of 15 dashes. A line of FILE.jsonl is
{"prompt": "..."} or a string. With --json a line is a sample: its prompt, text, why it ended
(finish_reason), and its tokens with their log-probabilities and the likeliest alternatives.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from nanogpt.config import NonNegativeInt, PositiveInt, Range, UnitInterval, load, pick_fields
from nanogpt.errors import UserError, run_program
from nanogpt.inference import api
from nanogpt.inference.engine import Completion, Token
from nanogpt.inference.sampling import SamplingOptions


@dataclass(frozen=True)
class Config:
    # which model
    init_from: str = "resume"  # the run folder out_dir; or gpt2 .. gpt2-xl, a folder, nanoGPT's ckpt.pt
    out_dir: str = "out"  # a run folder of train.py
    which: str = "best"  # its checkpoint: best (lowest validation loss), last, or a step number
    # what to write
    start: str = "\n"  # the prompt; FILE:prompt.txt reads it from a file
    prompts: str = ""  # a file of many instead: a JSON string, or an object with "prompt", on each line
    num_samples: PositiveInt = 10  # how many of each prompt
    max_new_tokens: NonNegativeInt = 500  # tokens in each
    stop: str = ""  # end before this text; '["a", "b"]': before any of these
    stop_at_end: bool = False  # end with the token that ends a text, where the vocabulary has one
    # how tokens are drawn; filters apply in this order
    repetition_penalty: Annotated[float, Range(0)] = 1.0  # above 1: what was said becomes less likely
    temperature: Annotated[float, Range(0)] = 0.8  # 1: as the model says; lower: bolder; 0: the most likely
    top_k: NonNegativeInt = 200  # draw among this many likeliest tokens; 0: all
    top_p: UnitInterval = 1.0  # draw among the likeliest that together have this probability
    min_p: UnitInterval = 0.0  # draw among those at least this share as likely as the likeliest
    seed: NonNegativeInt = 1337  # the same seed gives the same text; sample i has seed + i
    # how it is shown
    stream: bool = False  # show the text while it is written, one sample after another
    interactive: bool = False  # ask for prompts and continue each; Ctrl-C ends a text, Ctrl-D the program
    json: bool = False  # one JSON object a sample, with log-probabilities
    logprobs: NonNegativeInt = 0  # with --json: so many of the likeliest alternatives to each token
    # machine
    batch_size: PositiveInt = 16  # texts written at once, at most
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"  # of weights; int8 on CPUs only
    compile: Literal[False] = False  # nanoGPT's option: here there is nothing to compile
    cuda_graph: bool = False  # record a step and replay it; it has not run on a GPU yet (docs/gpu.md)


def main(config: Config, origins: dict[str, str] | None = None) -> None:
    """Print the samples. Raises UserError for a missing run or a prompt the model cannot read."""
    shown = [name for name in ("stream", "interactive", "json") if getattr(config, name)]
    if len(shown) > 1:
        raise UserError(f"{' and '.join(f'--{name}' for name in shown)} cannot be had together; give one")
    controls = vars(pick_fields(SamplingOptions, config))  # checked before the model is read
    stops = stop_strings(config.stop)
    prompts = [""] if config.interactive else read_prompts(config)
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
    if config.stream:
        for completion in asked:
            show(model, [completion])
        return
    for number, completion in enumerate(in_order(model, asked, config.batch_size)):
        prompt = prompts[number // config.num_samples]
        if config.json:
            print(
                json.dumps(as_json(model, prompt, number, config.num_samples, completion), ensure_ascii=False)
            )
        else:
            print(model.decode(completion.text.ids[: completion.text.prompt_length]) + completion.string)
            print("-" * 15)


def in_order(model: api.LanguageModel, asked: list[Completion], batch_size: int) -> Iterator[Completion]:
    """Each completion once it and those before it are finished; on a terminal, how far a long job is."""
    from tqdm import tqdm

    total = sum(c.max_new_tokens for c in asked)
    given = 0
    # disable=None: shown on a terminal only
    with tqdm(total=total, unit=" tokens", delay=5, disable=None, leave=False, file=sys.stderr) as bar:
        for completion, _, _ in model.write(asked, batch_size):
            bar.update()
            if completion.finish_reason:
                bar.total -= completion.max_new_tokens - len(completion.tokens)
            while given < len(asked) and asked[given].finish_reason:
                yield asked[given]
                given += 1
    yield from asked[given:]  # of no tokens


def show(model: api.LanguageModel, asked: list[Completion], prompt: bool = True) -> None:
    """Print a completion while it is written."""
    text = asked[0].text
    if prompt:
        print(model.decode(text.ids[: text.prompt_length]), end="", flush=True)
    for _, _, piece in model.write(asked):
        print(piece, end="", flush=True)
    print()
    if prompt:
        print("-" * 15)


def converse(model: api.LanguageModel, completions: Any) -> None:
    """Continue each line that is typed. What the model cannot read is said, and asked anew."""
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        try:
            show(model, completions([prompt]), prompt=False)
        except UserError as error:
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            print(" (stopped)")


def as_json(
    model: api.LanguageModel, prompt: str, number: int, num_samples: int, completion: Completion
) -> dict[str, Any]:
    def token(found: Token) -> dict[str, Any]:
        top = [{"id": i, "text": model.decode([i]), "logprob": value} for i, value in found.top]
        alternatives = {"top": top} if top else {}
        return {"id": found.id, "text": model.decode([found.id]), "logprob": found.logprob} | alternatives

    return {
        "prompt": prompt,
        "prompt_number": number // num_samples,
        "sample": number % num_samples,
        "text": completion.string,
        "finish_reason": completion.finish_reason or "length",
        "tokens": [token(found) for found in completion.tokens],
    }


def stop_strings(stop: str) -> list[str]:
    """--stop: a text, or a JSON list of texts."""
    if not stop.startswith("["):
        return [stop] if stop else []
    try:
        found = json.loads(stop)
        if not all(isinstance(one, str) and one for one in found):
            raise ValueError("it holds something else than texts of at least one character")
    except ValueError as error:
        raise UserError(
            f'--stop={stop} is no JSON list of texts: {error}; write --stop=\'["a", "b"]\''
        ) from None
    return found


def read_prompts(config: Config) -> list[str]:
    """--start, or the lines of --prompts. UserError says what cannot be read."""
    option = f"--prompts={config.prompts}" if config.prompts else f"--start={config.start}"
    name = config.prompts or config.start.removeprefix("FILE:")
    if not config.prompts and not config.start.startswith("FILE:"):
        return [config.start]
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {error}; give a UTF-8 text file") from None
    if not config.prompts:
        return [text]
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            prompts.append(_prompt(line, f"{option}, line {number}"))
    if not prompts:
        raise UserError(f'{option} holds no prompt; write one on each line: {{"prompt": "..."}}')
    return prompts


def _prompt(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is no JSON: {error}") from None
    value = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise UserError(f'{where}: expected {{"prompt": "..."}} or a string, found {line.strip()[:60]}')
    return value


if __name__ == "__main__":
    run_program(lambda: main(*load(Config, sys.argv[1:])))
