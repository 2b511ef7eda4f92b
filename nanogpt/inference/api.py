"""A trained model in Python: text in, text out.

from nanogpt import load

model = load("out-shakespeare-char")
print(model.generate("To be", max_new_tokens=100))
for piece in model.stream("To be", temperature=0.8, top_k=200):
    print(piece, end="", flush=True)
model.score("To be, or not to be").perplexity
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from nanogpt import ROOT, runtime
from nanogpt.convert import weights
from nanogpt.errors import UserError
from nanogpt.inference import cpu_kernels, quantize
from nanogpt.inference.engine import Completion, Engine, Text, Token, complete, score
from nanogpt.inference.sampling import Controls, SamplingOptions
from nanogpt.model import GPT
from nanogpt.tokenizer import tokenizer
from nanogpt.tokenizer.tokenizer import Tokenizer

SEEDS = 1 << 63  # of torch's generators


@dataclass(frozen=True)
class Score:
    """How likely a text is: its tokens but the first, and the natural logarithms of their probabilities."""

    tokens: list[str]
    logprobs: list[float]

    @property
    def total(self) -> float:
        return sum(self.logprobs)

    @property
    def perplexity(self) -> float:
        return math.exp(-self.total / len(self.logprobs)) if self.logprobs else math.nan


@dataclass(frozen=True)
class LanguageModel:
    model: GPT  # in evaluation mode, its weights as `load` was told
    tokenizer: Tokenizer
    machine: runtime.Machine
    origin: str  # where it lies
    decoder: type[Engine] = Engine  # or graph_decode.GraphDecoder, on a GPU

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt; an empty one is the end of a text, or a new line, which it usually stands
        for. UserError shows characters that the model cannot read."""
        if prompt:
            try:
                return self.tokenizer.encode_prompt(prompt)
            except UserError as error:
                raise UserError(f"the prompt has characters that the model cannot read: {error}") from None
            except UnicodeEncodeError as error:
                found = f"{prompt[error.start]!r} at character {error.start}"
                raise UserError(f"the prompt is no text in UTF-8: {found}; give one that is") from None
        end = self.tokenizer.end_of_text
        return [end] if end is not None else self.encode("\n")

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
        """What `write` turns into text: `num_samples` for each prompt, one prompt after another. Sample i
        of a prompt has the seed `seed` + i, whatever is written beside it."""
        options = SamplingOptions(**controls)
        if max_new_tokens < 0 or num_samples < 1:
            raise UserError(
                f"max_new_tokens={max_new_tokens}, num_samples={num_samples} given; at least 0 and 1"
            )
        if not -SEEDS <= seed < SEEDS - num_samples:
            raise UserError(f"seed={seed} given; a seed has 63 bits at most")
        if logprobs is not None and logprobs < 0:
            raise UserError(f"logprobs={logprobs} given; it must be 0 (of the tokens written) or more")
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
        """Write them, `batch_size` at once: each token as it comes, with the text that is certain with it."""
        longest = max((len(c.text.ids) + c.max_new_tokens for c in completions), default=1)
        slots = max(1, min(batch_size, len(completions)))
        yield from complete(self.decoder(self.model, slots, longest), completions)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        num_samples: int = 1,
        max_new_tokens: int = 500,
        stop: str | Sequence[str] = (),
        stop_at_end: bool = False,
        seed: int = 1337,
        batch_size: int = 16,
        **controls: Unpack[Controls],
    ) -> str | list[str] | list[list[str]]:
        """What the model writes after `prompt`, without the prompt: a string; a list of `num_samples` if
        that is above 1; for a list of prompts, a list of these. `controls`: see SamplingOptions."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        done = self.completions(
            prompts,
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            stop=stop,
            stop_at_end=stop_at_end,
            seed=seed,
            **controls,
        )
        for _ in self.write(done, batch_size):
            pass
        texts = [c.string for c in done]
        if num_samples == 1:
            return texts[0] if isinstance(prompt, str) else texts
        rows = [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]
        return rows[0] if isinstance(prompt, str) else rows

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 500,
        stop: str | Sequence[str] = (),
        stop_at_end: bool = False,
        seed: int = 1337,
        **controls: Unpack[Controls],
    ) -> Iterator[str]:
        """The text of `generate`, piece by piece: whole characters, nothing of a stop string."""
        done = self.completions(
            [prompt],
            max_new_tokens=max_new_tokens,
            stop=stop,
            stop_at_end=stop_at_end,
            seed=seed,
            **controls,
        )
        yield from (piece for _, _, piece in self.write(done) if piece)

    def score(self, text: str) -> Score:
        """How likely `text` is, token by token; the context of each is what `generate` would see."""
        ids = self.encode(text)
        found = score(self.model, ids)
        logprobs = [token.logprob for token in found if token.logprob is not None]
        return Score([self.decode([token.id]) for token in found], logprobs)


def load(
    name: str | Path,
    *,
    run: Path = Path("out"),
    which: str = "best",
    device: str = "auto",
    dtype: str = "auto",
    notice: Callable[[str], object] = lambda line: None,
) -> LanguageModel:
    """The model that `name` stands for: a run folder (its checkpoint `which`: best, last or a step), a
    Hugging Face folder, gpt2 to gpt2-xl, nanoGPT's ckpt.pt; "resume" is the folder `run`.

    `dtype`: of the weights: float32, bfloat16, float16, int8 (each row of a matrix rounded to 255 steps; on
    CPUs only), or auto, what is fast here. `notice` is called with lines that the user should see. UserError
    says what is wrong, and what can be given.
    """
    if dtype not in ("auto", "int8", *runtime.DTYPES):
        raise UserError(f"dtype={dtype} given; it can be auto, int8, {', '.join(runtime.DTYPES)}")
    found = weights.open_weights(str(name), ROOT, run, which)
    for line in found.notices:
        notice(line)
    tokens = found.open_tokenizer()
    machine = runtime.setup(device, "bfloat16" if dtype == "int8" else dtype, found.config.n_embd)
    if dtype == "int8":
        if machine.device.type != "cpu":
            raise UserError(
                f"int8 weights are for CPUs, and this is {machine.name()}, where they are no faster; "
                f"use dtype bfloat16, or device cpu"
            )
        machine = replace(machine, reason=machine.reason.replace("bfloat16", "int8"))
    model = found.load(found.fitted(), machine.device)
    quantize.cast(model, "int8" if dtype == "int8" else machine.dtype)
    if machine.device.type == "cpu" and cpu_kernels.why_not():
        notice(f"tokens take up to twice as long as they could: {cpu_kernels.why_not()}")
    return LanguageModel(model, tokens, machine, found.origin)
