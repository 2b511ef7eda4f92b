"""Texts written by a model, many at once, each at its own pace.

A `Engine` has a fixed number of slots and the cache for them. Texts come and go at any time (continuous
batching); each step gives every text one more token:

    decoder = Decoder(model, slots=16)
    text = Text(prompt_ids, SamplingOptions(temperature=0.8), seed=1, logprobs=5)
    completion = Completion(text, tokenizer, max_new_tokens=100, stop=["\n\n"])
    decoder.add([text])                      # at most decoder.free of them; reads all but the last token
    while decoder.texts:
        for text, token in decoder.step():   # token.id, token.logprob, token.top; text.ids has grown
            piece = completion.take(token)   # the text that is certain now, perhaps ""
            if completion.finish_reason:     # "stop" or "length"
                decoder.remove(text)         # its slot is free at once

`complete` is that loop for any number of completions.

A step runs slots 0 to len(decoder.texts) - 1: `remove` moves the last text into the hole, so that it never
computes more texts than there are. What a text has in common with the beginning of another one, or of one
that was in a slot before, is not read again (samples of one prompt, a preamble of many). As a text
has nothing to do with its neighbours and its random numbers come from its own seed, it is the same alone and
in company: to the bit of what the matrix products give, see docs/generation.md.

**Beyond the context.** The model sees the tokens from `window_start(n, block_size)` on, n being the
tokens of prompt and text together: all of them up to block_size; then half of a context is dropped at
a time, and the rest read anew, so that a token costs two instead of block_size. What is seen is a
function of n alone, not of where the prompt ended.
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

PREFILL_TOKENS = 4096  # read at once, at most: what a pass needs in memory
SHARED = 32  # tokens in common from which copying is worth a pass of its own over what differs


class Token(NamedTuple):
    id: int
    logprob: float | None  # natural logarithm, by the model: before penalty, temperature and filters
    top: list[tuple[int, float]]  # the likeliest alternatives and their logarithms, likeliest first


@dataclass(eq=False)
class Text:
    """A prompt (not empty) that is continued."""

    ids: list[int]  # prompt and what came after
    options: SamplingOptions = field(default_factory=SamplingOptions)
    seed: int = 0
    logprobs: int | None = None  # alternatives to report for each token; 0: its own; None: nothing
    prompt_length: int = field(init=False)
    start: int = field(init=False, default=0)  # the first token that is seen
    generator: torch.Generator = field(init=False, repr=False)
    seen: Tensor | None = field(init=False, default=None, repr=False)  # bool (V,), where it is penalised

    def __post_init__(self) -> None:
        assert self.ids, "a prompt has one token at least"
        self.ids = list(self.ids)
        self.prompt_length = len(self.ids)
        self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def new(self) -> list[int]:
        return self.ids[self.prompt_length :]


def window_start(length: int, block_size: int) -> int:
    """Where a text of `length` tokens is cut before a model with a context of `block_size` reads it."""
    half = max(1, block_size // 2)
    return half * -(-max(0, length - block_size) // half)


class Engine:
    """See the top of this file. `length`: the most tokens that a text will have; 0: any number."""

    def __init__(self, model: GPT, slots: int, length: int = 0):
        config = model.config
        self.model, self.slots = model, slots
        self.block_size = config.block_size
        self.length = min(length or config.block_size, config.block_size)
        table = model.wte.weight
        self.device = table.device
        self.cache = KVCache(
            slots,
            self.length,
            n_layer=config.n_layer,
            n_kv_head=config.n_kv_head or config.n_head,
            head_size=config.head_size,
            n_embd=config.n_embd,
            dtype=kept_in(model) if table.device.type == "cpu" else table.dtype,
            device=table.device,
        )
        self.texts: list[Text] = []  # text i is in slot i
        self._left: list[list[int]] = [[] for _ in range(slots)]  # what each free slot still holds
        self.flat = DecodeStep(model, self.cache) if self.device.type == "cpu" else None

    @property
    def free(self) -> int:
        """How many texts can be added."""
        return self.slots - len(self.texts)

    def add(self, texts: Sequence[Text]) -> None:
        """Take in texts and read their prompts, but for the last token, which the next step reads."""
        assert len(texts) <= self.free, f"{len(texts)} texts for {self.free} free slots"
        first = len(self.texts)
        self.texts += texts
        self._read(range(first, len(self.texts)))

    def read(self, ids: Sequence[int]) -> None:
        """Read what a text will begin with, ahead of `add`, which then finds it in a free slot."""
        text = Text([*ids, ids[-1]])  # the last token is never read
        self.add([text])
        self.remove(text)

    def remove(self, text: Text) -> None:
        """Free the slot of `text`."""
        slot, last = self.texts.index(text), len(self.texts) - 1
        moved = self.texts.pop()
        self._left[last] = moved.ids[moved.start : -1]
        if slot < last:
            self.cache.copy(last, [slot], len(self._left[last]))
            self.texts[slot] = moved

    def warm(self, prompt: int) -> None:
        """Take the memory of all slots, and let the libraries plan for every number of texts and a prompt of
        `prompt` tokens: what is served later makes nothing grow, and the first client waits no longer."""
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
        """One more token for each text, in the order of `texts`."""
        if not self.texts:
            return []
        slid = [i for i, t in enumerate(self.texts) if window_start(len(t.ids), self.block_size) != t.start]
        if slid:
            self._read(slid)
        logits = self.logits()
        tokens = self._draw(logits)
        found = list(zip(self.texts, self._report(logits, tokens), strict=True))
        for text, token in found:
            text.ids.append(token.id)
            if text.seen is not None:
                text.seen[token.id] = True
        return found

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Of the token after each text, (B, V), in float32; the last token of each is read."""
        texts = self.texts
        positions = [len(text.ids) - 1 - text.start for text in texts]
        assert max(positions) < self.length, f"a text is longer than length={self.length}"
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
        uniform = torch.cat([torch.rand(1, generator=t.generator, dtype=torch.float64) for t in self.texts])
        return draw_each(logits, options, uniform.to(self.device)).tolist()

    def _report(self, logits: Tensor, tokens: list[int]) -> Iterator[Token]:
        for row, (text, token) in enumerate(zip(self.texts, tokens, strict=True)):
            yield report(logits[row], token, text.logprobs)

    @torch.inference_mode()
    def _read(self, slots: Sequence[int]) -> None:
        """Fill these slots with what their texts' models see, but for the last token."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for slot in slots:
            text = self.texts[slot]
            text.start = window_start(len(text.ids), self.block_size)
            alike.setdefault(tuple(text.ids[text.start : -1]), []).append(slot)
        for slot in alike.pop((), []):
            self.cache.clear(slot)
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
        for ids, source, shared in partly:  # in the order in which they may need one another
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
        """`ids`, of which the slot `source` holds the first `shared`, into `slot`."""
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
    """What becomes of a Text: its new tokens and their text, until it is finished.

    It ends with the token `end_of_text` (which is no part of it), before the first of the strings `stop`,
    or after `max_new_tokens`. Raises UserError for a stop string that is empty.
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
        self.tokens: list[Token] = []  # without the end of text; those of a stop string are among them
        self.string = ""  # what was written, without the prompt
        self.finish_reason = ""  # "stop": by a stop string or the end of text; "length"
        self._stream = TextStream(tokenizer, stop)

    def take(self, token: Token) -> str:
        """Add a token that a step has given; returns the text that is certain with it."""
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
    """Write all `completions`, as many at once as there are slots: each new token, with the text that is
    certain with it. Leaves the slots free, also when it is closed before the end."""
    waiting = deque(c for c in completions if c.max_new_tokens > 0)
    of = {c.text: c for c in completions}
    try:
        while waiting or any(text in of for text in decoder.texts):
            decoder.add([waiting.popleft().text for _ in range(min(decoder.free, len(waiting)))])
            for text, token in decoder.step():
                if text in of:
                    piece = of[text].take(token)
                    if of[text].finish_reason:
                        decoder.remove(text)
                    yield of[text], token, piece
    finally:
        for text in [text for text in decoder.texts if text in of]:
            decoder.remove(text)


def longest_prefix_match(ids: Sequence[int], held: Mapping[int, Sequence[int]]) -> tuple[int, int]:
    """The slot of `held` whose tokens begin with most of `ids`, and how many those are; (-1, 0): none."""
    found = (-1, 0)
    wanted = list(ids)
    for slot, tokens in held.items():
        low, high = found[1], min(len(wanted), len(tokens))
        if tokens[: low + 1] != wanted[: low + 1]:
            continue
        while low < high:  # tokens[:low] agree
            middle = (low + high + 1) // 2
            if tokens[low:middle] == wanted[low:middle]:
                low = middle
            else:
                high = middle - 1
        if low > found[1]:
            found = (slot, low)
    return found


def packed(texts: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Texts, the shortest first, in groups to be read at once: padding is at most a third of a group."""
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
    """`token`, drawn by logits (V,), with its log-probability and those of the likeliest, if asked."""
    if alternatives is None:
        return Token(token, None, [])
    logprobs = logits.log_softmax(dim=-1)
    values, ids = logprobs.topk(min(alternatives, len(logprobs)))
    return Token(token, logprobs[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))


@torch.inference_mode()
def score(model: GPT, ids: Sequence[int], alternatives: int = 0) -> list[Token]:
    """Each token of `ids` but the first, with its log-probability given those before it, as `Engine`
    would have seen them."""
    device, block_size = model.wte.weight.device, model.config.block_size
    tokens: list[Token] = []
    while len(tokens) < len(ids) - 1:
        start = window_start(len(tokens) + 1, block_size)
        idx = torch.tensor([ids[start : start + block_size]], device=device)
        hidden = model.hidden(idx)[0, len(tokens) - start :]
        for row, token in zip(hidden, ids[len(tokens) + 1 :], strict=False):
            tokens.append(report(model.head(row), token, alternatives))
    return tokens
