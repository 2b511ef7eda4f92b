"""Tests of the all-gather of updated parameters, simulated in one process."""

import pytest
import torch
from torch import nn

from nanogpt.distributed import layout
from nanogpt.distributed.layout import Replicated
from nanogpt.world import World


@pytest.mark.parametrize(("size", "turn"), [(2, 10**9), (3, 1000), (4, 4)])
def test_updated_weights_are_gathered_in_bounded_chunks(size, turn, monkeypatch):
    """Every replica ends up with all ranges, and at most `turn` elements are received at once."""
    monkeypatch.setattr(layout, "TURN", turn)
    copies = [nn.Linear(30, 17) for _ in range(size)]
    layouts = [Replicated(World(rank, size)) for rank in range(size)]
    held = [each.shard(list(copy.named_parameters())) for each, copy in zip(layouts, copies, strict=True)]
    flat = [torch.cat([p.data.flatten() for p in copy.parameters()]) for copy in copies]
    cuts = [len(flat[0]) * rank // size for rank in range(size + 1)]
    own = [flat[rank][cuts[rank] : cuts[rank + 1]].clone() for rank in range(size)]
    come = [0] * size  # elements received by each rank from each other rank

    def gathered(self, mine, width):
        assert width * size <= turn
        parts = [part[come[self.rank] : come[self.rank] + width] for part in own]
        assert torch.equal(parts[self.rank], mine)
        come[self.rank] += width
        return torch.stack([nn.functional.pad(part, (0, width - len(part))) for part in parts])

    monkeypatch.setattr(Replicated, "_all_gather", gathered)
    for each, parts in zip(layouts, held, strict=True):
        each.all_gather_params(parts)
    expected = torch.cat(own)
    assert come == [max(map(len, own))] * size
    for copy in copies:
        assert torch.equal(torch.cat([p.data.flatten() for p in copy.parameters()]), expected)
