"""OpenAI's completions: a request of JSON checked, and the answer in the shape that its clients read.

Nothing here knows HTTP or the model. Log-probabilities are the model's own, whatever the temperature.
"""

import codecs
import json
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nanogpt import tokenizer
from nanogpt.errors import UserError
from nanogpt.generate import Token
from nanogpt.sampling import SamplingOptions
from nanogpt.serving.refusal import Refusal
from nanogpt.tokenizer import Tokenizer

IGNORED = {"user", "metadata", "store"}  # what changes no answer
UNSUPPORTED: dict[str, Any] = {
    "suffix": None,
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_ALTERNATIVES = 20


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    context: int  # tokens of a prompt
    max_tokens: int  # tokens of an answer
    batch: int  # prompts times n


@dataclass(frozen=True)
class Prompt:
    text: str
    ids: list[int]


@dataclass(frozen=True)
class CompletionRequest:
    """A checked request."""

    prompts: list[Prompt]
    options: SamplingOptions
    seed: int  # of the first choice of each prompt; choice i takes seed + i
    max_tokens: int
    n: int
    stop: tuple[str, ...]
    logprobs: int | None  # alternatives to report for each token; None: nothing
    echo: bool
    stream: bool
    usage_in_stream: bool
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)


# ----------------------------------------------------------------------------- reading a request


def parse(body: bytes, known: Tokenizer, model: str, limits: Limits) -> CompletionRequest:
    """The request in `body`. Refusal (4xx) names the field, what it was and what it can be."""
    given = _Fields(_json_object(body))
    asked = given.text("model", model)
    if asked != model:
        raise Refusal(404, f"no model {asked[:80]!r} here; there is {model!r}", "model", "model_not_found")
    for name, neutral in UNSUPPORTED.items():
        if given.take(name, None) not in (None, neutral):
            raise Refusal(400, f"{name} is not supported by this server; leave it out", name)
    n = given.whole("n", 1, 1, limits.batch)
    if given.whole("best_of", n, 1, limits.batch) != n:
        raise Refusal(400, "best_of is not supported unless it equals n; leave it out", "best_of")
    if given.take("prompt", None, keep=True) is None:
        raise Refusal(400, "prompt is missing: give a string, a list of strings, or token ids", "prompt")
    prompts = _prompts(given.take("prompt", None), known, limits)
    if len(prompts) * n > limits.batch:
        raise Refusal(400, f"{len(prompts)} prompts times n={n}: at most {limits.batch} at once", "prompt")
    options = SamplingOptions(
        temperature=given.number("temperature", 1.0, 0, 100),
        top_k=given.whole("top_k", 0, 0, 1 << 31),
        top_p=given.number("top_p", 1.0, 0, 1, open_below=True),
        min_p=given.number("min_p", 0.0, 0, 1),
        repetition_penalty=given.number("repetition_penalty", 1.0, 0, 100, open_below=True),
    )
    stream = given.flag("stream")
    extra = given.take("stream_options", None) or {}
    if not isinstance(extra, dict) or set(extra) - {"include_usage", "include_obfuscation"}:
        raise Refusal(400, "stream_options can hold include_usage: true or false", "stream_options")
    logprobs = given.take("logprobs", None, keep=True)
    found = CompletionRequest(
        prompts=prompts,
        options=options,
        seed=given.whole("seed", secrets.randbits(48), -(1 << 62), 1 << 62),
        max_tokens=given.whole("max_tokens", 16, 0, limits.max_tokens),
        n=n,
        stop=_stops(given.take("stop", None)),
        logprobs=None if logprobs in (None, False) else given.whole("logprobs", 0, 0, MAX_ALTERNATIVES),
        echo=given.flag("echo"),
        stream=stream,
        usage_in_stream=extra.get("include_usage") is True,
    )
    given.take("logprobs", None)
    given.require_nothing_left()
    return found


def _json_object(body: bytes) -> dict[str, Any]:
    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=no_constant)
    except UnicodeDecodeError:
        raise Refusal(400, "the body is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise Refusal(400, 'the body must be a JSON object, such as {"prompt": "To be"}')
    return value


class _Fields:
    """The fields of a request that are not yet read; null means: as if left out."""

    def __init__(self, values: dict[str, Any]):
        self._left = {key: value for key, value in values.items() if key not in IGNORED}

    def take(self, name: str, default: Any, keep: bool = False) -> Any:
        value = self._left.get(name) if keep else self._left.pop(name, None)
        return default if value is None else value

    def number(self, name: str, default: float, low: float, high: float, open_below: bool = False) -> float:
        value = self.take(name, default)
        good = isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300
        if not good or not math.isfinite(value) or not low <= value <= high or (open_below and value == low):
            least = f"above {low}" if open_below else f"{low} or more"
            raise Refusal(400, f"{name}={_shown(value)}: expected a number, {least}, at most {high}", name)
        return float(value)

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        value = self.take(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise Refusal(400, f"{name}={_shown(value)}: expected a whole number from {low} to {high}", name)
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise Refusal(400, f"{name}={_shown(value)}: expected true or false", name)
        return value

    def text(self, name: str, default: str) -> str:
        value = self.take(name, default)
        if not isinstance(value, str):
            raise Refusal(400, f"{name}={_shown(value)}: expected a string", name)
        return value

    def require_nothing_left(self) -> None:
        if self._left:
            name = next(iter(self._left))
            raise Refusal(
                400, f"unknown field {_shown(name)}; see docs/serving.md for those there are", name[:80]
            )


def _prompts(value: Any, known: Tokenizer, limits: Limits) -> list[Prompt]:
    """One prompt (a string, or ids), or a list of prompts."""
    several = isinstance(value, list) and bool(value) and isinstance(value[0], str | list)
    given = value if several else [value]
    if len(given) > limits.batch:
        raise Refusal(400, f"{len(given)} prompts: at most {limits.batch} at once", "prompt")
    return [_prompt(one, known, limits) for one in given]


def _prompt(value: Any, known: Tokenizer, limits: Limits) -> Prompt:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
            prompt = Prompt(value, known.encode_prompt(value))
        except UnicodeEncodeError:
            raise Refusal(
                400, "the prompt holds half of a surrogate pair, which is no character", "prompt"
            ) from None
        except UserError as error:
            raise Refusal(400, f"the model cannot read this prompt: {error}", "prompt") from None
    elif isinstance(value, list) and all(type(i) is int and 0 <= i < known.vocab_size for i in value):
        prompt = Prompt(tokenizer.decode(known, value), value)
    else:
        ids = f"token ids from 0 to {known.vocab_size - 1}"
        raise Refusal(
            400, f"prompt={_shown(value)}: expected a string, a list of {ids}, or a list of these", "prompt"
        )
    if not prompt.ids:
        raise Refusal(400, "the prompt is empty; give at least one token", "prompt")
    if len(prompt.ids) > limits.context:
        raise Refusal(
            400,
            f"the prompt has {len(prompt.ids)} tokens, the model's context {limits.context}; shorten it",
            "prompt",
            "context_length_exceeded",
        )
    return prompt


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else ([] if value is None else value)
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise Refusal(400, f"stop={_shown(value)}: expected a string or a list of strings", "stop")
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        limits = f"at most {MAX_STOPS} strings of at most {MAX_STOP_CHARACTERS} characters"
        raise Refusal(400, f"stop: expected {limits}", "stop")
    if "" in stops:
        raise Refusal(400, "stop holds an empty string, which would stop before the first token", "stop")
    return tuple(stops)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


# ----------------------------------------------------------------------------- writing an answer


class LogProbs:
    """What the tokens of one choice were, in OpenAI's four lists; `push` them in their order."""

    def __init__(self, known: Tokenizer, offset: int, alternatives: int):
        self._known, self._offset, self._alternatives = known, offset, alternatives
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, tokens: Sequence[Token]) -> dict[str, list[Any]]:
        """text_offset counts characters from the beginning of the prompt."""
        found: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token in tokens:
            found["tokens"].append(token_text(self._known, token.id))
            found["token_logprobs"].append(_finite(token.logprob))
            found["top_logprobs"].append(self._top(token))
            found["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(self._known.decode_bytes([token.id])))
        return found

    def _top(self, token: Token) -> dict[str, float | None] | None:
        """Of two tokens with one text the likelier; the token itself is always there."""
        if token.logprob is None or not self._alternatives:
            return None
        found: dict[str, float | None] = {}
        for id, logprob in [*token.top, (token.id, token.logprob)]:
            found.setdefault(token_text(self._known, id), _finite(logprob))
        return found


def token_text(known: Tokenizer, id: int) -> str:
    """The text of a token; of one that is only a part of a character its bytes, as OpenAI writes them."""
    content = known.decode_bytes([id])
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity; this is what OpenAI writes for a probability of zero."""
    return -9999.0 if logprob == -math.inf else logprob


def choice(
    index: int, text: str, logprobs: dict[str, list[Any]] | None, finish: str | None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def answer(
    request: CompletionRequest, model: str, choices: list[dict[str, Any]], usage: int | None = None
) -> bytes:
    """A whole answer or one part of a stream; `usage`: the tokens written, where they are reported."""
    value: dict[str, Any] = {
        "id": request.id,
        "object": "text_completion",
        "created": request.created,
        "model": model,
        "choices": choices,
    }
    if usage is not None:
        read = request.prompt_tokens()
        value["usage"] = {"prompt_tokens": read, "completion_tokens": usage, "total_tokens": read + usage}
    return json.dumps(value, separators=(",", ":")).encode("ascii")
