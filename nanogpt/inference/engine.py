"""Batched generation with a KV cache and continuous batching.

An `Engine` has a fixed number of slots and a KV cache for them. Sequences (`Text`) can be added and removed
between any two steps; each step generates one token for every sequence:

    engine = Engine(model, slots=16)
    text = Text(prompt_ids, SamplingOptions(temperature=0.8), seed=1, logprobs=5)
    completion = Completion(text, tokenizer, max_new_tokens=100, stop=["\n\n"])
    engine.add([text])                       # at most engine.free; prefills all but the last prompt token
    while engine.texts:
        for text, token in engine.step():    # token.id, token.logprob, token.top; appends to text.ids
            piece = completion.take(token)   # new text, or "" while it is incomplete
            if completion.finish_reason:     # "stop" or "length"
                engine.remove(text)          # frees the slot immediately

`complete` runs this loop for any number of completions.

A step computes slots 0 to len(engine.texts) - 1: `remove` moves the last sequence into the freed slot, so no
empty slot is computed. A prefix shared with another sequence, or with a removed one whose cache entries still
exist, is copied instead of recomputed (several samples per prompt, a common system prompt). Sequences do not
interact, and each has its own random generator, so a result does not depend on the rest of the batch, up to
the rounding of the matrix products: see docs/generation.md.

**Beyond the context length.** With n tokens so far (prompt included), the model sees those from
`window_start(n, block_size)` on: all of them up to block_size; beyond that, half a context is dropped at a
time and the rest is prefilled again, an amortized cost of two tokens per token instead of block_size. The
visible tokens depend on n alone, not on the prompt length.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from nanogpt.inference.cpu_decode import DecodeStep, kept_in
from nanogpt.inference.detokenizer import TextStream
from nanogpt.inference.kv_cache import ChunkedPrefill, KVCache, Prefill, Step
from nanogpt.inference.sampling import SamplingOptions, apply_repetition_penalty, draw_each
from nanogpt.model import GPT
from nanogpt.tokenizer.tokenizer import Tokenizer

PREFILL_TOKENS = 4096  # maximum per forward pass, which bounds its memory
SHARED = 32  # minimum shared prefix (tokens) for which a separate pass over the remainder pays off


class Token(NamedTuple):
    id: int
    logprob: float | None  # natural log, of the unmodified model distribution
    top: list[tuple[int, float]]  # most likely tokens and their log-probabilities, in descending order


@dataclass(eq=False)
class Text:
    """A sequence being generated: a non-empty prompt and its continuation."""

    ids: list[int]  # prompt and generated tokens
    options: SamplingOptions = field(default_factory=SamplingOptions)
    seed: int = 0
    logprobs: int | None = None  # alternatives to report per token; 0: sampled token only; None: no logprobs
    prompt_length: int = field(init=False)
    start: int = field(init=False, default=0)  # index of the first token that the model sees
    generator: torch.Generator = field(init=False, repr=False)
    seen: Tensor | None = field(init=False, default=None, repr=False)  # bool (V,), for the repetition penalty

    def __post_init__(self) -> None:
        assert self.ids, "the prompt must have at least one token"
        self.ids = list(self.ids)
        self.prompt_length = len(self.ids)
        self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def new(self) -> list[int]:
        return self.ids[self.prompt_length :]


def window_start(length: int, block_size: int) -> int:
    """Return the index of the first token that the model sees of a sequence of `length` tokens."""
    half = max(1, block_size // 2)
    return half * -(-max(0, length - block_size) // half)


class Engine:
    """Continuous-batching decoder; see the module docstring.

    `length` is the maximum sequence length in tokens; 0: unlimited, caching block_size tokens per slot.
    """

    def __init__(self, model: GPT, slots: int, length: int = 0):
        self.model, self.slots = model, slots
        self.block_size = model.config.block_size
        self.length = min(length or self.block_size, self.block_size)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it takes 0.4 s to plan for each new length
        table = model.wte.weight
        self.device = table.device
        dtype = kept_in(model) if self.device.type == "cpu" else table.dtype
        self.cache = KVCache(model, slots, self.length, dtype)
        self.texts: list[Text] = []  # text i is in slot i
        self._left: list[list[int]] = [[] for _ in range(slots)]  # tokens still cached in each free slot
        self.flat = DecodeStep(model, self.cache) if self.device.type == "cpu" else None

    @property
    def free(self) -> int:
        """Number of free slots."""
        return self.slots - len(self.texts)

    def add(self, texts: Sequence[Text]) -> None:
        """Add sequences and prefill their prompts, except the last token, which the next step processes."""
        assert len(texts) <= self.free, f"{len(texts)} sequences for {self.free} free slots"
        first = len(self.texts)
        self.texts += texts
        self._read(range(first, len(self.texts)))

    def read(self, ids: Sequence[int]) -> None:
        """Prefill a common prompt prefix into a free slot, for reuse by a later `add`."""
        text = Text([*ids, ids[-1]])  # the last token is never prefilled
        self.add([text])
        self.remove(text)

    def remove(self, text: Text) -> None:
        """Remove `text` and free its slot."""
        slot, last = self.texts.index(text), len(self.texts) - 1
        moved = self.texts.pop()
        self._left[last] = moved.ids[moved.start : -1]
        if slot < last:
            self.cache.copy(last, [slot], len(self._left[last]))
            self.texts[slot] = moved

    def warm(self, prompt: int) -> None:
        """Warm up: touch the memory of all slots and run every batch size and a prompt of `prompt` tokens, so
        that later requests neither grow memory nor pay one-time library initialization."""
        assert not self.texts
        self.cache.both.zero_()
        self.add([Text([0] * min(prompt, self.length))])
        while self.free:
            self.step()
            self.add([Text([0])])
        self.step()
        for text in list(self.texts):
            self.remove(text)

    @torch.inference_mode()
    def step(self) -> list[tuple[Text, Token]]:
        """Generate one token for each sequence; return (text, token) pairs in the order of `texts`."""
        if not self.texts:
            return []
        slid = [i for i, t in enumerate(self.texts) if window_start(len(t.ids), self.block_size) != t.start]
        if slid:
            self._read(slid)
        logits = self.logits()
        tokens = self._draw(logits)
        rows = zip(logits, self.texts, tokens, strict=True)
        drawn = [(text, report(row, token, text.logprobs)) for row, text, token in rows]
        for text, token in drawn:
            text.ids.append(token.id)
            if text.seen is not None:
                text.seen[token.id] = True
        return drawn

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Process the last token of each sequence and return next-token logits (B, V), float32."""
        texts = self.texts
        positions = [len(text.ids) - 1 - text.start for text in texts]
        assert max(positions) < self.length, f"a sequence is longer than length={self.length}"
        if self.flat is not None:
            return self.model.head(self.flat(torch.tensor([text.ids[-1] for text in texts]), positions))
        at = torch.tensor(positions, device=self.device)[:, None]
        bias = self.model.position.bias_at(at, max(positions) + 1)
        idx = torch.tensor([text.ids[-1:] for text in texts], device=self.device)
        x = self.model.hidden(idx, Step(self.cache, positions, bias))
        return self.model.head(x[:, 0])

    def _draw(self, logits: Tensor) -> list[int]:
        options = [text.options for text in self.texts]
        if any(kind.repetition_penalty != 1 for kind in options):
            logits = logits.clone()
            for row, text in enumerate(self.texts):
                if text.options.repetition_penalty != 1:
                    if text.seen is None:
                        text.seen = torch.zeros(logits.shape[1], dtype=torch.bool, device=self.device)
                        text.seen[text.ids] = True
                    logits[row] = apply_repetition_penalty(
                        logits[row], text.seen, text.options.repetition_penalty
                    )
        return draw_each(logits, options, self._uniform(1)[:, 0]).tolist()

    def _uniform(self, count: int) -> Tensor:
        """Return the next `count` random numbers of each sequence, float64 (B, count)."""
        rows = (torch.rand(count, generator=text.generator, dtype=torch.float64) for text in self.texts)
        return torch.stack(list(rows))

    @torch.inference_mode()
    def _read(self, slots: Sequence[int]) -> None:
        """Prefill these slots with the visible tokens of their sequences, except the last."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for slot in slots:
            text = self.texts[slot]
            text.start = window_start(len(text.ids), self.block_size)
            alike.setdefault(tuple(text.ids[text.start : -1]), []).append(slot)
        for slot in alike.pop((), []):
            self.cache.embeddings[slot] = 0
        held = {i: t.ids[t.start : -1] for i, t in enumerate(self.texts) if i not in slots}
        held |= {i: self._left[i] for i in range(len(self.texts), self.slots)}
        fresh, partly = [], []
        for ids in sorted(alike, key=len):
            slot = alike[ids][0]
            source, shared = longest_prefix_match(ids, {**held, slot: self._left[slot]})
            if shared < SHARED:
                fresh.append(ids)
            else:
                partly.append((ids, source, shared))
            held[slot] = list(ids)
        for group in packed(fresh):
            self._read_whole(group, [alike[ids][0] for ids in group])
        for ids, source, shared in partly:  # sorted by length: later ones may copy from earlier ones
            self._read_rest(ids, alike[ids][0], source, shared)
        for ids, (first, *others) in alike.items():
            self.cache.copy(first, others, len(ids))
        for slot in slots:
            self._left[slot] = []

    def _read_whole(self, group: Sequence[tuple[int, ...]], slots: Sequence[int]) -> None:
        lengths = [len(ids) for ids in group]
        idx = torch.zeros(len(group), max(lengths), dtype=torch.int64)
        for row, ids in enumerate(group):
            idx[row, : len(ids)] = torch.tensor(ids)
        self.model.hidden(idx.to(self.device), Prefill(self.cache, slots, lengths))

    def _read_rest(self, ids: Sequence[int], slot: int, source: int, shared: int) -> None:
        """Prefill `ids` into `slot`, copying the first `shared` tokens from slot `source`."""
        if source != slot:
            self.cache.copy(source, [slot], shared)
        idx = torch.tensor([ids[shared - 1 :]], device=self.device)
        last = self.model.wte(idx[0, 0])
        self.cache.embeddings[slot] = last
        if len(ids) > shared:
            at = torch.arange(shared, len(ids), device=self.device)[None]
            bias = self.model.position.bias_at(at, len(ids))
            self.model.hidden(idx[:, 1:], ChunkedPrefill(self.cache, slot, shared, at.shape[1], last, bias))


class Completion:
    """Generated tokens and decoded text of a `Text`, and the conditions under which it ends.

    Ends at the token `end_of_text` (excluded), before the first occurrence of a string of `stop`, or after
    `max_new_tokens` tokens. Raise UserError if a stop string is empty.
    """

    def __init__(
        self,
        text: Text,
        tokenizer: Tokenizer,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        end_of_text: int | None = None,
    ):
        self.text, self.max_new_tokens, self.end_of_text = text, max_new_tokens, end_of_text
        self.tokens: list[Token] = []  # excludes end_of_text, includes the tokens of a stop string
        self.string = ""  # generated text, without the prompt
        self.finish_reason = ""  # "" while running; "stop": stop string or end of text; "length"
        self._stream = TextStream(tokenizer, stop, text.ids)

    def take(self, token: Token) -> str:
        """Append a generated token; return the text that can be emitted after it, possibly ""."""
        assert not self.finish_reason
        if token.id == self.end_of_text:
            return self._finish("stop", "")
        self.tokens.append(token)
        piece = self._stream.push(token.id)
        if self._stream.stopped:
            return self._finish("stop", piece)
        if len(self.tokens) >= self.max_new_tokens:
            return self._finish("length", piece)
        self.string += piece
        return piece

    def _finish(self, reason: str, piece: str) -> str:
        piece += self._stream.end()
        if self._stream.stopped:
            reason = "stop"
        self.finish_reason = reason
        self.string += piece
        return piece


def complete(decoder: Engine, completions: Sequence[Completion]) -> Iterator[tuple[Completion, Token, str]]:
    """Run all `completions`, as many in parallel as there are slots; yield each new token with the text to
    emit. All slots are freed on exit, including when the iterator is closed early."""
    waiting = deque(c for c in completions if c.max_new_tokens > 0)
    by_text = {c.text: c for c in completions}
    try:
        while waiting or any(text in by_text for text in decoder.texts):
            decoder.add([waiting.popleft().text for _ in range(min(decoder.free, len(waiting)))])
            for text, token in decoder.step():
                if text in by_text:
                    piece = by_text[text].take(token)
                    if by_text[text].finish_reason:
                        decoder.remove(text)
                    yield by_text[text], token, piece
    finally:
        for text in [text for text in decoder.texts if text in by_text]:
            decoder.remove(text)


def longest_prefix_match(ids: Sequence[int], held: Mapping[int, Sequence[int]]) -> tuple[int, int]:
    """Return the slot of `held` with the longest prefix in common with `ids`, and its length; or (-1, 0)."""
    best = (-1, 0)
    wanted = list(ids)
    for slot, tokens in held.items():
        low, high = best[1], min(len(wanted), len(tokens))
        if tokens[: low + 1] != wanted[: low + 1]:
            continue
        while low < high:  # binary search; tokens[:low] match
            middle = (low + high + 1) // 2
            if tokens[low:middle] == wanted[low:middle]:
                low = middle
            else:
                high = middle - 1
        if low > best[1]:
            best = (slot, low)
    return best


def packed(texts: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Group sequences, sorted by length, into prefill batches with at most one third padding."""
    group: list[tuple[int, ...]] = []
    total = 0
    for ids in texts:
        padded = len(ids) * (len(group) + 1)
        if group and (padded > 1.5 * (total + len(ids)) or padded > PREFILL_TOKENS):
            yield group
            group, total = [], 0
        group.append(ids)
        total += len(ids)
    if group:
        yield group


def report(logits: Tensor, token: int, alternatives: int | None) -> Token:
    """Return `token` with its log-probability under logits (V,) and the top `alternatives`; None: neither."""
    if alternatives is None:
        return Token(token, None, [])
    logprobs = logits.log_softmax(dim=-1)
    values, ids = logprobs.topk(min(alternatives, len(logprobs)))
    return Token(token, logprobs[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))


@torch.inference_mode()
def score(model: GPT, ids: Sequence[int], alternatives: int = 0) -> list[Token]:
    """Return the tokens of `ids` after the first with their log-probabilities, each given the context that
    `Engine` would use."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in Engine
    device, block_size = model.wte.weight.device, model.config.block_size
    tokens: list[Token] = []
    while len(tokens) < len(ids) - 1:
        start = window_start(len(tokens) + 1, block_size)
        idx = torch.tensor([ids[start : start + block_size]], device=device)
        hidden = model.hidden(idx)[0, len(tokens) - start :]
        for row, token in zip(hidden, ids[len(tokens) + 1 :], strict=False):
            tokens.append(report(model.head(row), token, alternatives))
    return tokens
