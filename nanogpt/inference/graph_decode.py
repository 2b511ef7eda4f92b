"""Decoding with CUDA graphs: one captured step of all sequences, replayed for each token.

With small batches and models, kernel launches dominate a step; a replay launches the whole graph at once.
Experimental: not yet tested on a GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanogpt.gpu.cuda_graphs import WARM_UPS, Record, aside, cuda_graph, require_cuda
from nanogpt.inference.engine import Engine
from nanogpt.inference.kv_cache import KVCache, Step, masked_after
from nanogpt.inference.sampling import SamplingOptions, draw
from nanogpt.model import GPT

SHORTEST = 128  # minimum cache length (tokens) of a captured step


class FixedStep(Step):
    """Variant of kv_cache.Step with positions (B,) on the device: attends to `length` cached tokens of every
    sequence and masks those after its position."""

    def __init__(self, cache: KVCache, positions: Tensor, length: int, bias: Tensor | None):
        self.cache, self.count, self.length = cache, len(positions), length
        self.position_ids, self.alike = positions[:, None], False
        if bias is None:
            bias = masked_after(positions, length, cache.keys.dtype)[:, None, None]
        self.bias = bias.to(cache.keys.dtype)
        self.index = (torch.arange(self.count, device=positions.device), slice(None), positions)


@dataclass
class _Recorded:
    """A captured step, for one batch size, cache length and sampling configuration."""

    idx: Tensor  # int64 (B, 1): last token of each sequence
    positions: Tensor  # int64 (B,)
    uniform: Tensor  # float64 (B,)
    logits: Tensor = field(init=False)  # (B, V)
    tokens: Tensor = field(init=False)  # int64 (B,)
    replay: Callable[[], None] = field(init=False)


class GraphEngine(Engine):
    """Engine with captured steps. Sampling is part of the graph if all sequences use the same options,
    without repetition penalty and top-p."""

    def __init__(self, model: GPT, slots: int, length: int = 0, record: Record = cuda_graph):
        if record is cuda_graph:
            require_cuda(model.wte.weight.device)
        super().__init__(model, slots, length)
        self.record = record
        self.recorded: dict[tuple[int, int, SamplingOptions | None], _Recorded] = {}
        self.last: _Recorded | None = None  # graph of the current step

    @torch.inference_mode()
    def logits(self) -> Tensor:
        self.last = self._prepared()
        self.last.replay()
        return self.last.logits

    def _draw(self, logits: Tensor) -> list[int]:
        recorded = self.last
        if self._kind() is None or recorded is None:
            return super()._draw(logits)
        return recorded.tokens.tolist()

    @torch.inference_mode()
    def run(self, count: int) -> Tensor:
        """Generate `count` tokens per sequence, int64 (count, B), as `count` calls of `step` would. Tokens
        are copied to the host at the end, so no sequence can stop early. All must stay within the context."""
        kind = self._kind()
        assert kind is not None, "all sequences need the same options, without repetition penalty and top-p"
        at = max(len(text.ids) - text.start for text in self.texts)
        assert at + count <= self.length, f"{at} + {count} tokens do not fit in length={self.length}"
        recorded = self._prepared(room=count)
        uniform = self._uniform(count - 1).T.to(self.device)
        uniform = torch.cat([recorded.uniform[None], uniform])  # first: from _prepared
        written = torch.empty(count, len(self.texts), dtype=torch.int64, device=self.device)
        for turn in range(count):
            recorded.uniform.copy_(uniform[turn])
            recorded.replay()
            written[turn] = recorded.tokens
            recorded.idx.copy_(recorded.tokens[:, None])
            recorded.positions += 1
        for text, new in zip(self.texts, written.T.tolist(), strict=True):
            text.ids += new
        return written

    def _kind(self) -> SamplingOptions | None:
        """Return the sampling options shared by all sequences, or None if they cannot be captured."""
        kinds: Sequence[SamplingOptions] = list({text.options for text in self.texts})
        plain = len(kinds) == 1 and kinds[0].repetition_penalty == 1 and kinds[0].top_p == 1
        return kinds[0] if plain else None

    def _prepared(self, room: int = 1) -> _Recorded:
        """Return the captured step for the current sequences, inputs set, with `room` for new tokens."""
        positions = [len(text.ids) - 1 - text.start for text in self.texts]
        longest = max(positions) + room
        assert longest <= self.length, f"a sequence is longer than length={self.length}"
        bucket = SHORTEST
        while bucket < longest:
            bucket *= 2
        key = (len(self.texts), min(bucket, self.length), self._kind())
        recorded = self.recorded.get(key)
        inputs = self._inputs(positions)
        if recorded is None:
            recorded = self.recorded[key] = _Recorded(*inputs)
            self._record(recorded, key[1], key[2])
        for place, new in zip((recorded.idx, recorded.positions, recorded.uniform), inputs, strict=True):
            place.copy_(new)
        return recorded

    def _inputs(self, positions: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        unused = torch.zeros(len(positions), dtype=torch.float64)
        uniform = self._uniform(1)[:, 0] if self._kind() else unused
        idx = torch.tensor([text.ids[-1:] for text in self.texts])
        parts = (idx, torch.tensor(positions), uniform)
        return tuple(part.to(self.device) for part in parts)  # type: ignore[return-value]

    def _record(self, recorded: _Recorded, length: int, kind: SamplingOptions | None) -> None:
        def work() -> tuple[Tensor, Tensor]:
            at = recorded.positions[:, None]
            bias = self.model.position.bias_at(at, length)
            past = FixedStep(self.cache, recorded.positions, length, bias)
            logits = self.model.head(self.model.hidden(recorded.idx, past)[:, 0])
            tokens = draw(logits, kind, recorded.uniform) if kind else logits.argmax(dim=-1)
            return logits, tokens

        # Repeating a step writes the same keys and values, but smear's last embedding changes: restore it.
        before = self.cache.embeddings.clone()
        for _ in range(WARM_UPS):
            aside(work, self.device)
        (recorded.logits, recorded.tokens), recorded.replay = self.record(work)
        self.cache.embeddings.copy_(before)
