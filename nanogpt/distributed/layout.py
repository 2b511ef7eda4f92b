"""Distribution of parameters over ranks, and the collectives of the optimizers.

Three layouts share one interface, so optimizers and checkpoints do not depend on the kind of parallelism:

    Layout      a single process; no communication (optim.py)
    Replicated  weights and gradients replicated, optimizer state sharded (ZeRO-1; Rajbhandari et al.)
    Sharded     weights, gradients and optimizer state sharded by rows of each parameter (FSDP2)

Elementwise optimizers (AdamW) update a range of the elements of each parameter on each rank. Muon needs whole
matrices, so each matrix is assigned to one rank, its owner.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanogpt.optim import Layout, Matrix, PartitionedParam, Span, TensorShard, gradient
from nanogpt.world import World

TURN = 1 << 26  # elements per all-gather, summed over ranks: 0.27 GB for any world size


class _Shared(Layout):
    """Base class of the layouts of more than one rank."""

    def __init__(self, world: World, group: Any = None, size: int = 0):
        """`group`: `size` consecutive ranks that together hold one copy of the model; None: all ranks."""
        self.group, self.size, self.control = group, size or world.size, getattr(world, "control", None)
        self.rank = world.rank % self.size
        self.with_first = world.rank < self.size

    def assign_ranks(self, costs: Sequence[float]) -> list[int]:
        return share_out(costs, self.size)

    def gather(self, shards: Mapping[str, TensorShard]) -> dict[str, Tensor]:
        gathered: dict[str, Tensor] = {}
        for name, shard in shards.items() if self.with_first else ():
            done = shard.spans[0][1]  # elements received so far; rank 0's own shard starts at 0
            if self.rank == 0 and done == shard.shape.numel():
                gathered[name] = shard.tensor.view(shard.shape).cpu()
                continue
            whole = torch.empty(shard.shape if self.rank == 0 else 0, dtype=shard.tensor.dtype)
            if self.rank == 0:
                whole.view(-1)[:done] = shard.tensor.view(-1)
            for rank, (start, stop) in list(enumerate(shard.spans))[1:]:
                if start >= stop or stop <= done:
                    continue
                # From CPU to CPU: NCCL would open a connection for each pair of ranks and use GPU memory.
                if self.rank == rank:
                    dist.send(shard.tensor.cpu().contiguous(), dst=0, group=self.control)
                elif self.rank == 0:
                    dist.recv(whole.view(-1)[start:stop], src=rank, group=self.control)
            if self.rank == 0:
                gathered[name] = whole
        return gathered


class Replicated(_Shared):
    """DDP: weights and gradients replicated on every rank, optimizer state sharded (ZeRO-1)."""

    def partition(self, named: Sequence[tuple[str, Tensor]]) -> list[PartitionedParam]:
        total, first, parts = sum(p.numel() for _, p in named), 0, []
        cuts = [total * rank // self.size for rank in range(self.size + 1)]
        for name, p in named:
            p.data = p.data.contiguous()
            spans = [common((lo - first, hi - first), (0, p.numel())) for lo, hi in pairwise(cuts)]
            parts.append(PartitionedParam(name, p, spans))
            first += p.numel()
        return parts

    def local_shard(self, param: PartitionedParam, tensor: Tensor) -> Tensor:
        start, stop = param.spans[self.rank]
        return tensor.detach().reshape(-1)[start:stop]

    def all_gather_params(self, params: Sequence[PartitionedParam]) -> None:
        views = [[_flat(param)[slice(*param.spans[rank])] for param in params] for rank in range(self.size)]
        longest, chunk = max(sum(map(len, of_one)) for of_one in views), max(1, TURN // self.size)
        for done in range(0, longest, chunk):
            turn = [_cut(of_one, done, done + chunk) for of_one in views]
            sent = torch.cat([views[0][0][:0], *turn[self.rank]])
            got = self._all_gather(sent, min(chunk, longest - done))
            for rank, targets in enumerate(turn):
                if rank != self.rank and targets:
                    lengths = [len(target) for target in targets]
                    torch._foreach_copy_(targets, list(got[rank][: sum(lengths)].split(lengths)))

    def gather_grads(self, stack: Sequence[Matrix]) -> Tensor:
        mine = [matrix for matrix in stack if matrix.owner == self.rank]
        if not mine:
            return stack[0].parameter.data.new_empty(0, stack[0].height, stack[0].width)
        return super().gather_grads(mine)

    def scatter_updates(self, stack: Sequence[Matrix], updates: Tensor) -> list[Tensor]:
        counts = [sum(matrix.owner == rank for matrix in stack) for rank in range(self.size)]
        shape = updates.shape[1:]
        got = self._all_gather(updates.reshape(-1), max(counts) * shape.numel()).float()
        by_rank = [got[r][: n * shape.numel()].view(n, *shape) for r, n in enumerate(counts)]
        return [update for of_one in by_rank for update in of_one]

    def average_rows(self, table: Tensor) -> None:
        """Average the sparse gradient of `table` over all ranks, in place, exchanging the rows read; row 0,
        which has no gradient, pads the shorter parts."""
        local = gradient(table).coalesce()
        max_rows = torch.tensor(local.values().shape[0], device=table.device)
        dist.all_reduce(max_rows, op=dist.ReduceOp.MAX, group=self.group)
        rows = self._all_gather(local.indices()[0], int(max_rows)).view(1, -1)
        values = self._all_gather(local.values().reshape(-1), int(max_rows) * table.shape[1]).view(
            -1, table.shape[1]
        )
        table.grad = torch.sparse_coo_tensor(rows, values / self.size, table.shape, check_invariants=False)

    def _all_gather(self, mine: Tensor, width: int) -> Tensor:
        """All-gather `mine`, zero-padded to `width` elements; return shape (size, width)."""
        sent, got = mine.new_zeros(width), mine.new_empty(self.size * width)
        sent[: len(mine)] = mine
        # named all_gather_into_tensor before torch 2.13
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(_bytes(got), _bytes(sent), group=self.group)
        return got.view(self.size, width)


class Sharded(_Shared):
    """FSDP2: parameters and gradients are DTensors, sharded along the first dimension."""

    sharded = True

    def partition(self, named: Sequence[tuple[str, Tensor]]) -> list[PartitionedParam]:
        return [PartitionedParam(name, p, self._spans(p)) for name, p in named]

    def local_shard(self, param: PartitionedParam, tensor: Tensor) -> Tensor:
        return self.to_local(tensor)

    def gather_grads(self, stack: Sequence[Matrix]) -> Tensor:
        height, width = stack[0].height, stack[0].width
        mine = [matrix for matrix in stack if matrix.owner == self.rank]
        sent = torch.cat([self._part(m, self.to_local(gradient(m.parameter))).reshape(-1) for m in stack])
        counts = [[self._count(m, rank) for m in mine] for rank in range(self.size)]  # per sender
        got = self._exchange(sent, self._by_owner(stack), [sum(of_one) for of_one in counts])
        parts = [got_of.split(of_one) for got_of, of_one in zip(got, counts, strict=True)]
        whole = [torch.cat(of_matrix) for of_matrix in zip(*parts, strict=True)]
        return torch.cat([sent[:0], *whole]).view(len(mine), height, width)

    def scatter_updates(self, stack: Sequence[Matrix], updates: Tensor) -> list[Tensor]:
        mine = [matrix for matrix in stack if matrix.owner == self.rank]
        parts = [
            [update[slice(*self._rows(m, rank))].reshape(-1) for m, update in zip(mine, updates, strict=True)]
            for rank in range(self.size)
        ]
        sent = torch.cat([updates.reshape(-1)[:0], *(part for of_one in parts for part in of_one)])
        counts = [sum(map(len, of_one)) for of_one in parts]
        got = torch.cat(self._exchange(sent, counts, self._by_owner(stack))).float()
        held = got.split([self._count(m, self.rank) for m in stack])
        return [part.view(-1, m.width) for part, m in zip(held, stack, strict=True)]

    def weights(self, matrix: Matrix) -> Tensor:
        return self._part(matrix, self.to_local(matrix.parameter))

    def global_norm(self, local_norm: Tensor) -> Tensor:
        square = local_norm.square()
        dist.all_reduce(square, group=self.group)
        return square.sqrt()

    def to_local(self, tensor: Tensor) -> Tensor:
        with torch.no_grad():
            return cast(Any, tensor).to_local()

    def local_params(self, parameters: list[Tensor]) -> list[Tensor]:
        local = []
        for parameter in parameters:
            if parameter.grad is not None:
                local.append(self.to_local(parameter).detach())
                local[-1].grad = self.to_local(parameter.grad)
        return local

    def weight_shards(self, model: nn.Module) -> dict[str, TensorShard]:
        for unit in model.modules():
            if hasattr(unit, "reshard"):  # the root module stays gathered after an evaluation
                cast(Any, unit).reshard()
        return {
            name: TensorShard(p.shape, self._spans(p), self.rank, self.to_local(p))
            for name, p in model.named_parameters()
        }

    def _spans(self, parameter: Tensor) -> list[Span]:
        rest = parameter.numel() // parameter.shape[0]
        rows = (self._rows_of(parameter, rank) for rank in range(self.size))
        return [(first * rest, last * rest) for first, last in rows]

    def _rows_of(self, parameter: Tensor, rank: int) -> Span:
        return rows_of(parameter.shape[0], self.size, rank)

    def _rows(self, matrix: Matrix, rank: int) -> Span:
        """Return the range of the matrix's rows held by `rank`, relative to its first row."""
        first, last = self._rows_of(matrix.parameter, rank)
        return common((first - matrix.first, last - matrix.first), (0, matrix.height))

    def _count(self, matrix: Matrix, rank: int) -> int:
        first, last = self._rows(matrix, rank)
        return (last - first) * matrix.width

    def _part(self, matrix: Matrix, local: Tensor) -> Tensor:
        """Return the rows of the matrix that are in `local`, this rank's shard of its parameter."""
        shift = matrix.first - self._rows_of(matrix.parameter, self.rank)[0]
        first, last = self._rows(matrix, self.rank)
        return local[first + shift : last + shift] if first < last else local[:0]

    def _by_owner(self, stack: Sequence[Matrix]) -> list[int]:
        """Return, per owner, the number of elements of its matrices that this rank holds."""
        counts = [0] * self.size
        for matrix in stack:
            counts[matrix.owner] += self._count(matrix, self.rank)
        return counts

    def _exchange(self, sent: Tensor, to: list[int], come: list[int]) -> list[Tensor]:
        """All-to-all: send `to[r]` elements to each rank r; return the `come[r]` elements received from r."""
        got, width = sent.new_empty(sum(come)), sent.element_size()
        counts = [n * width for n in come], [n * width for n in to]
        dist.all_to_all_single(_bytes(got), _bytes(sent), *counts, group=self.group)
        return list(got.split(come))


def share_out(costs: Sequence[float], size: int) -> list[int]:
    """Assign tasks to `size` ranks greedily: in order of decreasing cost, each to the least loaded rank.

    Return the rank of each task.
    """
    loads, chosen = [0.0] * size, [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda i: -costs[i]):
        chosen[task] = min(range(size), key=loads.__getitem__)
        loads[chosen[task]] += costs[task]
    return chosen


def rows_of(height: int, size: int, rank: int) -> Span:
    """Return the row range that FSDP gives `rank`: ceil(height / size) rows; the last ranks fewer or none."""
    rows = -(-height // size)
    return min(rank * rows, height), min((rank + 1) * rows, height)


def common(a: Span, b: Span) -> Span:
    """Return the intersection of two ranges, (0, 0) if it is empty."""
    first, last = max(a[0], b[0]), min(a[1], b[1])
    return (first, last) if first < last else (0, 0)


def _cut(views: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Return views of the elements start .. stop of the concatenation of flat tensors."""
    parts, first = [], 0
    for view in views:
        lo, hi = common((start - first, stop - first), (0, len(view)))
        if lo < hi:
            parts.append(view[lo:hi])
        first += len(view)
    return parts


def _flat(param: PartitionedParam) -> Tensor:
    return param.parameter.data.view(-1)


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8)  # gloo does not support bfloat16
