"""Python API for text generation with a trained model.

from nanogpt import load

model = load("out-shakespeare-char")
print(model.generate("To be", max_new_tokens=100))
for piece in model.stream("To be", temperature=0.8, top_k=200):
    print(piece, end="", flush=True)
model.score("To be, or not to be").perplexity
"""

import itertools
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Unpack

from nanogpt import ROOT, runtime
from nanogpt.convert import weights
from nanogpt.errors import UserError
from nanogpt.inference import cpu_kernels, quantize
from nanogpt.inference.detokenizer import text_of
from nanogpt.inference.engine import Completion, Engine, Text, Token, complete, score
from nanogpt.inference.sampling import Controls, SamplingOptions
from nanogpt.model import GPT
from nanogpt.tokenizer import tokenizer
from nanogpt.tokenizer.tokenizer import Tokenizer

SEEDS = 1 << 63  # exclusive upper bound of seeds of torch.Generator


@dataclass(frozen=True)
class Score:
    """Tokens of a text after the first, and their log-probabilities (natural log)."""

    tokens: list[str]
    logprobs: list[float]

    @property
    def total(self) -> float:
        return sum(self.logprobs)

    @property
    def perplexity(self) -> float:
        return math.exp(-self.total / len(self.logprobs)) if self.logprobs else math.nan


class CompletionOptions(Controls, total=False):
    """Keyword arguments of LanguageModel.completions for each sample, for type checking."""

    max_new_tokens: int
    stop: str | Sequence[str]
    stop_at_end: bool
    seed: int


@dataclass(frozen=True)
class LanguageModel:
    model: GPT  # in evaluation mode, weights in the dtype given to `load`
    open_tokenizer: Callable[[], Tokenizer]  # called when the first text is to be encoded or decoded
    machine: runtime.Machine
    origin: str  # source of the weights, for messages
    decoder: type[Engine] = Engine  # or graph_decode.GraphEngine on a GPU

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raise UserError if it is unknown or cannot be downloaded."""
        return self.open_tokenizer()

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt; an empty one becomes the end-of-text token or, without one, a
        newline, and a newline, if the vocabulary of characters lacks it, the first character. Raise UserError
        if a character is not in the vocabulary or the text is not valid UTF-8."""
        tokens = self.tokenizer
        if prompt:
            try:
                return tokens.encode_prompt(prompt)
            except UserError as error:
                if prompt == "\n" and tokens.kind == "char":  # sample.py's default, and no line breaks
                    return [0]
                raise UserError(f"the prompt cannot be encoded: {error}") from None
            except UnicodeEncodeError as error:
                position = f"{prompt[error.start]!r} at character {error.start}"
                raise UserError(f"the prompt is not valid UTF-8: {position}; give valid UTF-8 text") from None
        return self.encode("\n") if tokens.end_of_text is None else [tokens.end_of_text]

    def decode(self, ids: Sequence[int]) -> str:
        return tokenizer.decode(self.tokenizer, ids)

    def completions(
        self,
        prompts: Sequence[str],
        *,
        num_samples: int = 1,
        max_new_tokens: int = 500,
        stop: str | Sequence[str] = (),
        stop_at_end: bool = False,
        seed: int = 1337,
        logprobs: int | None = None,
        **controls: Unpack[Controls],
    ) -> list[Completion]:
        """Return the completions to pass to `write`: `num_samples` per prompt, grouped by prompt. Sample i of
        each prompt uses the seed `seed` + i, independent of the batch. Raise UserError for invalid values."""
        options = SamplingOptions(**controls)
        if max_new_tokens < 0 or num_samples < 1:
            raise UserError(
                f"max_new_tokens={max_new_tokens}, num_samples={num_samples} given; at least 0 and 1 required"
            )
        if not -SEEDS <= seed < SEEDS - num_samples:
            raise UserError(f"seed={seed} given; a seed has at most 63 bits")
        if logprobs is not None and logprobs < 0:
            raise UserError(f"logprobs={logprobs} given; it must be 0 (sampled tokens only) or more")
        stops = [stop] if isinstance(stop, str) else list(stop)
        end = self.tokenizer.end_of_text if stop_at_end else None
        return [
            Completion(Text(ids, options, seed + i, logprobs), self.tokenizer, max_new_tokens, stops, end)
            for ids in map(self.encode, prompts)
            for i in range(num_samples)
        ]

    def write(
        self, completions: Sequence[Completion], batch_size: int = 16
    ) -> Iterator[tuple[Completion, Token, str]]:
        """Generate, `batch_size` sequences at a time; yield each new token with the text to emit."""
        longest = max((len(c.text.ids) + c.max_new_tokens for c in completions), default=1)
        slots = max(1, min(batch_size, len(completions)))
        with self.machine.memory_errors("a smaller --batch_size"):
            decoder = self.decoder(self.model, slots, longest)
        yield from complete(decoder, completions)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        num_samples: int = 1,
        batch_size: int = 16,
        **options: Unpack[CompletionOptions],
    ) -> str | list[str] | list[list[str]]:
        """Return the continuation of `prompt`, without the prompt: a string; a list of `num_samples` strings
        if that is above 1; for a list of prompts, a list of these. `options`: as in `completions`."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        done = self.completions(prompts, num_samples=num_samples, **options)
        for _ in self.write(done, batch_size):
            pass
        texts = [c.string for c in done]
        groups = [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]
        rows: list[str] | list[list[str]] = texts if num_samples == 1 else groups
        return rows[0] if isinstance(prompt, str) else rows

    def stream(self, prompt: str, **options: Unpack[CompletionOptions]) -> Iterator[str]:
        """Yield the text of `generate` in pieces: complete characters only, never part of a stop string."""
        done = self.completions([prompt], num_samples=1, **options)
        yield from (piece for _, _, piece in self.write(done) if piece)

    def score(self, text: str) -> Score:
        """Return the log-probability of each token of `text`, given the context that `generate` would use."""
        ids = self.encode(text)
        tokens = score(self.model, ids)
        logprobs = [token.logprob for token in tokens if token.logprob is not None]
        pairs = itertools.pairwise(ids)
        return Score([text_of(self.tokenizer, one, before) for before, one in pairs], logprobs)


def load(
    name: str | Path,
    *,
    run: Path = Path("out"),
    which: str = "best",
    device: str = "auto",
    dtype: str = "auto",
    notice: Callable[[str], object] = lambda line: None,
) -> LanguageModel:
    """Load the model `name`: a run folder (checkpoint `which`: best, last or a step), a Hugging Face folder,
    gpt2 to gpt2-xl, or a nanoGPT ckpt.pt; "resume" is the run folder `run`.

    `dtype` of the weights: float32, bfloat16, float16, int8 (symmetric per-row quantization, CPU only), or
    auto, the fastest on the device. `notice` is called with each message for the user. Raise UserError if
    the model cannot be loaded or an option is invalid.
    """
    if dtype not in ("auto", "int8", *runtime.DTYPES):
        raise UserError(f"dtype={dtype} given; it must be one of auto, int8, {', '.join(runtime.DTYPES)}")
    pretrained = weights.open_weights(str(name), ROOT, run, which)
    for line in pretrained.notices:
        notice(line)
    machine = runtime.setup(device, "bfloat16" if dtype == "int8" else dtype, pretrained.config.n_embd)
    if machine.device.type == "cuda" or dtype == "bfloat16" or shutil.which("nvidia-smi"):
        from nanogpt.gpu import availability

        for line in availability.prepare(machine, str(device), several=False):
            notice(line)
    if dtype == "int8":
        if machine.device.type != "cpu":
            raise UserError(
                f"int8 weights require a CPU, but the device is {machine.name()}; "
                f"use dtype bfloat16 or device cpu"
            )
        machine = replace(machine, reason=machine.reason.replace("bfloat16", "int8"))
    model = pretrained.load(pretrained.fitted(), machine.device)
    quantize.cast(model, "int8" if dtype == "int8" else machine.dtype)
    if machine.device.type == "cpu" and cpu_kernels.why_not():
        notice(f"generation may take up to twice as long: {cpu_kernels.why_not()}")
    return LanguageModel(model, pretrained.open_tokenizer, machine, pretrained.origin)
