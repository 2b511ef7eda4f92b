"""Tests of the all-gather of updated parameters, simulated in one process."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nanogpt.distributed import layout
from nanogpt.distributed.layout import Replicated
from nanogpt.optim import TensorShard
from nanogpt.world import World


@pytest.mark.parametrize(("size", "turn"), [(2, 10**9), (3, 1000), (4, 4)])
def test_updated_weights_are_gathered_in_bounded_chunks(size, turn, monkeypatch):
    """Every replica ends up with all ranges, and at most `turn` elements are received at once."""
    monkeypatch.setattr(layout, "TURN", turn)
    copies = [nn.Linear(30, 17) for _ in range(size)]
    layouts = [Replicated(World(rank, size)) for rank in range(size)]
    held = [each.partition(list(copy.named_parameters())) for each, copy in zip(layouts, copies, strict=True)]
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


def test_shards_of_a_checkpoint_are_sent_through_gloo(monkeypatch):
    """NCCL would open a connection, and reserve GPU memory, for each pair of ranks."""
    whole, spans, sent = torch.arange(6.0).view(2, 3), [(0, 2), (2, 6)], []

    def send(part, dst, group):
        sent.append((part, dst, group))

    def recv(place, src, group):
        assert (src, group) == (1, "gloo")
        place.copy_(sent[0][0])

    monkeypatch.setattr(layout.dist, "send", send)
    monkeypatch.setattr(layout.dist, "recv", recv)
    found = {}
    for rank in (1, 0):
        shard = TensorShard(whole.shape, spans, rank, whole.view(-1)[slice(*spans[rank])])
        each = Replicated(SimpleNamespace(rank=rank, size=2, control="gloo"))
        found[rank] = each.gather({"momentum": shard})
    assert [part[1:] for part in sent] == [(0, "gloo")] and not found[1]
    assert torch.equal(found[0]["momentum"], whole)
