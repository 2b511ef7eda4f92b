"""OpenAI's completions API: request validation and response serialization (JSON).

Independent of HTTP and of the model. Log-probabilities are those of the model at temperature 1.
"""

import json
import math
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from nanogpt import files
from nanogpt.errors import UserError
from nanogpt.inference.detokenizer import decoder, text_of
from nanogpt.inference.engine import Token
from nanogpt.inference.sampling import Controls, SamplingOptions
from nanogpt.server.api_errors import Refusal
from nanogpt.tokenizer import tokenizer
from nanogpt.tokenizer.tokenizer import Tokenizer

IGNORED = {"user", "metadata", "store"}  # accepted, without effect on the response
UNSUPPORTED = {"suffix": "", "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0}


@dataclass(frozen=True)
class Limits:
    """Limits per request."""

    context: int  # prompt tokens
    max_tokens: int  # completion tokens
    batch: int  # number of prompts times n


@dataclass(frozen=True)
class Prompt:
    text: str
    ids: list[int]


# ----------------------------------------------------------------------------- requests


class StreamOptions(BaseModel, extra="forbid", strict=True):
    include_usage: bool = False
    include_obfuscation: bool = False


class Fields(BaseModel, extra="forbid", strict=True, allow_inf_nan=False):
    """Fields of a request; null is equivalent to omitting a field."""

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
    # seed of each prompt's first choice; choice i uses seed + i
    seed: int = Field(default_factory=lambda: secrets.randbits(48), ge=-(1 << 62), le=1 << 62)
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field([], max_length=16)
    logprobs: int | None = Field(None, ge=0, le=20)  # alternatives per token; None: no log-probabilities
    echo: bool = False
    slide: bool = False  # not in OpenAI's API: use the end of a prompt longer than the context, as sample.py
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


@dataclass(frozen=True)
class CompletionRequest:
    """A validated request."""

    fields: Fields
    prompts: list[Prompt]
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def options(self) -> SamplingOptions:
        return SamplingOptions(**self.fields.model_dump(include=set(Controls.__annotations__)))


def parse(body: bytes, known: Tokenizer, model: str, limits: Limits) -> CompletionRequest:
    """Parse and validate `body`. Raise Refusal (4xx) with the field, its value and what was expected."""
    try:
        values = files.parse_json(body, "the body", dict)
    except UserError as error:
        raise Refusal(400, f'{error}; expected an object such as {{"prompt": "To be"}}') from None
    values = {key: value for key, value in values.items() if value is not None}
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    if values.get("logprobs") is False:
        del values["logprobs"]
    for name, neutral in UNSUPPORTED.items():
        if values.pop(name, neutral) != neutral:
            raise Refusal(400, f"{name} is not supported by this server; omit it", name)
    try:
        given = Fields.model_validate({key: values[key] for key in values.keys() - IGNORED})
    except ValidationError as error:
        raise _refusal(error) from None
    if given.model not in ("", model):
        named = f"model {given.model[:80]!r} not found; available: {model!r}"
        raise Refusal(404, named, "model", "model_not_found")
    if given.best_of not in (None, given.n):
        raise Refusal(400, "best_of is not supported unless it equals n; omit it", "best_of")
    for name, limit in (("n", limits.batch), ("max_tokens", limits.max_tokens)):
        if getattr(given, name) > limit:
            raise Refusal(400, f"{name}={_shown(values[name])}: expected at most {limit}", name)
    if given.prompt is None:
        raise Refusal(400, "prompt is missing: give a string, a list of strings, or token ids", "prompt")
    context = sys.maxsize if given.slide else limits.context
    prompts = _prompts(given.prompt, known, replace(limits, context=context))
    if len(prompts) * given.n > limits.batch:
        raise Refusal(
            400, f"{len(prompts)} prompts times n={given.n}: at most {limits.batch} per request", "prompt"
        )
    return CompletionRequest(given, prompts)


def _refusal(error: ValidationError) -> Refusal:
    """Return a Refusal with the first invalid field, its value and what was expected."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])[:80]
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        return Refusal(400, f"unknown field {name!r}; see docs/serving.md for the supported fields", name)
    return Refusal(400, f"{name}={_shown(first['input'])}: {first['msg']}", name)


def _prompts(value: Any, known: Tokenizer, limits: Limits) -> list[Prompt]:
    """Return the prompts in `value`: one prompt (a string or token ids) or a list of prompts."""
    several = isinstance(value, list) and bool(value) and isinstance(value[0], str | list)
    given = value if several else [value]
    if len(given) > limits.batch:
        raise Refusal(400, f"{len(given)} prompts: at most {limits.batch} per request", "prompt")
    return [_prompt(one, known, limits) for one in given]


def _prompt(value: Any, known: Tokenizer, limits: Limits) -> Prompt:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
            prompt = Prompt(value, known.encode_prompt(value))
        except UnicodeEncodeError:
            raise Refusal(
                400, "the prompt contains a lone surrogate, which is not valid Unicode", "prompt"
            ) from None
        except UserError as error:
            raise Refusal(400, f"the prompt cannot be tokenized: {error}", "prompt") from None
    elif isinstance(value, list) and all(type(i) is int and 0 <= i < known.vocab_size for i in value):
        prompt = Prompt(tokenizer.decode(known, value), value)
    else:
        ids = f"token ids from 0 to {known.vocab_size - 1}"
        raise Refusal(
            400, f"prompt={_shown(value)}: expected a string, a list of {ids}, or a list of either", "prompt"
        )
    if not prompt.ids:
        raise Refusal(400, "the prompt is empty; give at least one token", "prompt")
    if len(prompt.ids) > limits.context:
        raise Refusal(
            400,
            f"the prompt has {len(prompt.ids)} tokens, the context length is {limits.context}; shorten it",
            "prompt",
            "context_length_exceeded",
        )
    return prompt


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


# ----------------------------------------------------------------------------- responses


class LogProbs:
    """Builds OpenAI's log-probability lists for one choice; pass the tokens after `prompt` in order."""

    def __init__(self, known: Tokenizer, prompt: Sequence[int], offset: int, alternatives: int):
        self._known, self._offset, self._alternatives = known, offset, alternatives
        self._before, self._decode = [None, *prompt][-1], decoder(known, prompt)

    def of(self, tokens: Sequence[Token]) -> dict[str, list[Any]]:
        """Return the lists for the next `tokens`. text_offset: characters from the start of the prompt."""
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        lists: dict[str, list[Any]] = {name: [] for name in names}
        for token in tokens:
            lists["tokens"].append(token_text(self._known, token.id, self._before))
            lists["token_logprobs"].append(_finite(token.logprob))
            lists["top_logprobs"].append(self._top(token))
            lists["text_offset"].append(self._offset)
            self._offset += len(self._decode(token.id))
            self._before = token.id
        return lists

    def _top(self, token: Token) -> dict[str, float | None] | None:
        """Return {text: logprob} of the alternatives and the token; the likeliest of duplicate texts."""
        if token.logprob is None or not self._alternatives:
            return None
        alternatives: dict[str, float | None] = {}
        for id, logprob in [*token.top, (token.id, token.logprob)]:
            alternatives.setdefault(token_text(self._known, id, self._before), _finite(logprob))
        return alternatives


def token_text(known: Tokenizer, id: int, before: int | None) -> str:
    """Return the text of a token after the token `before`, or its bytes in OpenAI's notation if they are not
    valid UTF-8."""
    if not known.bytewise:
        return text_of(known, id, before)
    content = known.decode_bytes([id])
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _finite(logprob: float | None) -> float | None:
    """Return -9999.0 for -inf, as OpenAI does: JSON has no infinity."""
    return -9999.0 if logprob == -math.inf else logprob


def answer(
    request: CompletionRequest, model: str, choices: list[dict[str, Any]], usage: int | None = None
) -> bytes:
    """Serialize a complete response or a stream chunk. `usage`: completion tokens; None: not reported."""
    value: dict[str, Any] = {"id": request.id, "object": "text_completion", "created": request.created}
    value |= {"model": model, "choices": choices}
    if usage is not None:
        read = sum(len(prompt.ids) for prompt in request.prompts)
        value["usage"] = {"prompt_tokens": read, "completion_tokens": usage, "total_tokens": read + usage}
    return json.dumps(value, separators=(",", ":")).encode("ascii")
