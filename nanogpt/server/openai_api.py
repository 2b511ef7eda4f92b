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
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from nanogpt.errors import UserError
from nanogpt.inference.engine import Token
from nanogpt.inference.sampling import Controls, SamplingOptions
from nanogpt.server.api_errors import Refusal
from nanogpt.tokenizer import tokenizer
from nanogpt.tokenizer.tokenizer import Tokenizer

IGNORED = {"user", "metadata", "store"}  # what changes no answer
UNSUPPORTED: dict[str, Any] = {
    "suffix": "",
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0,
}


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


class StreamOptions(BaseModel, extra="forbid", strict=True):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Body(BaseModel, extra="forbid", strict=True, allow_inf_nan=False):
    """The fields of a request; null means: as if left out."""

    model: str = ""
    prompt: Any = None  # checked by _prompts
    n: int = Field(1, ge=1)
    best_of: int | None = None
    max_tokens: int = Field(16, ge=0)
    temperature: float = Field(1.0, ge=0, le=100)
    top_k: int = Field(0, ge=0, le=1 << 31)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    seed: int = Field(default_factory=lambda: secrets.randbits(48), ge=-(1 << 62), le=1 << 62)
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field([], max_length=16)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


def parse(body: bytes, known: Tokenizer, model: str, limits: Limits) -> CompletionRequest:
    """The request in `body`. Refusal (4xx) names the field, what it was and what it can be."""
    values = {key: value for key, value in _json_object(body).items() if value is not None}
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    if values.get("logprobs") is False:
        del values["logprobs"]
    for name, neutral in UNSUPPORTED.items():
        if values.pop(name, neutral) != neutral:
            raise Refusal(400, f"{name} is not supported by this server; leave it out", name)
    try:
        given = _Body.model_validate({key: values[key] for key in values.keys() - IGNORED})
    except ValidationError as error:
        raise _refusal(error) from None
    if given.model not in ("", model):
        named = f"no model {given.model[:80]!r} here; there is {model!r}"
        raise Refusal(404, named, "model", "model_not_found")
    if given.best_of not in (None, given.n):
        raise Refusal(400, "best_of is not supported unless it equals n; leave it out", "best_of")
    for name, most in (("n", limits.batch), ("max_tokens", limits.max_tokens)):
        if getattr(given, name) > most:
            raise Refusal(400, f"{name}={_shown(values[name])}: expected at most {most}", name)
    if given.prompt is None:
        raise Refusal(400, "prompt is missing: give a string, a list of strings, or token ids", "prompt")
    prompts = _prompts(given.prompt, known, limits)
    if len(prompts) * given.n > limits.batch:
        raise Refusal(
            400, f"{len(prompts)} prompts times n={given.n}: at most {limits.batch} at once", "prompt"
        )
    return CompletionRequest(
        prompts=prompts,
        options=SamplingOptions(**given.model_dump(include=set(Controls.__annotations__))),
        seed=given.seed,
        max_tokens=given.max_tokens,
        n=given.n,
        stop=tuple(given.stop),
        logprobs=given.logprobs,
        echo=given.echo,
        stream=given.stream,
        usage_in_stream=given.stream_options.include_usage,
    )


def _refusal(error: ValidationError) -> Refusal:
    """Name the first field that is wrong, its value, and what was expected."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])[:80]
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        return Refusal(400, f"unknown field {name!r}; see docs/serving.md for those there are", name)
    return Refusal(400, f"{name}={_shown(first['input'])}: {first['msg']}", name)


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise Refusal(400, "the body is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise Refusal(400, 'the body must be a JSON object, such as {"prompt": "To be"}')
    return value


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
