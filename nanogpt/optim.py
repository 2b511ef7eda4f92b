"""Optimizers over named parameters: AdamW, and Muon for matrices with AdamW for the rest.

The arithmetic of AdamW is torch's own fused kernel. The classes around it are ours because torch.optim
imports the compiler when an optimizer is made (a second of every start), because a checkpoint stores
state by the parameter's name, which survives a change of layout, and because Muon works on stacks of
matrices of one shape. Which process updates what, and what they exchange, a Layout knows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanogpt.options import OptimizerOptions

Named = Sequence[tuple[str, Tensor]]


Span = tuple[int, int]  # first element and the one after the last, in row-major order


@dataclass(frozen=True)
class ParamShard:
    """A parameter, and the range of its elements that each process updates."""

    name: str
    parameter: Tensor
    spans: Sequence[Span]


@dataclass(frozen=True)
class Matrix:
    """Some rows of a parameter, orthogonalised together by one process."""

    label: str
    parameter: Tensor
    first: int  # row
    height: int
    owner: int

    @property
    def width(self) -> int:
        return self.parameter.shape[1]

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.height)


@dataclass(frozen=True)
class TensorShard:
    """What this process has of a tensor; `spans` says what each has."""

    shape: torch.Size  # of the whole
    spans: Sequence[Span]
    rank: int
    tensor: Tensor  # the elements of spans[rank]

    def copy_(self, whole: Tensor) -> None:
        """Take this process's part of `whole`."""
        start, stop = self.spans[self.rank]
        self.tensor.copy_(whole.reshape(-1)[start:stop].view(self.tensor.shape))


class Layout:
    """How parameters lie in the processes of a run: all in this one. distributed/layout.py has others."""

    rank, size = 0, 1  # among those who share
    sharded = False  # a process alone cannot run the model

    def shard(self, named: Sequence[tuple[str, Tensor]]) -> list[ParamShard]:
        """What of each parameter which process updates, where the rule is elementwise."""
        return [ParamShard(name, p, [(0, p.numel())]) for name, p in named]

    def local_shard(self, held: ParamShard, tensor: Tensor) -> Tensor:
        """Of a tensor that lies as the parameter (it or its gradient), the elements of this process's range;
        a view."""
        return tensor

    def all_gather_params(self, parts: Sequence[ParamShard]) -> None:
        """After an update of the ranges of `shard`: see that all who hold the weights have the new ones."""

    def assign_ranks(self, costs: Sequence[float]) -> list[int]:
        """Who does each of the tasks that cost so much."""
        return [0] * len(costs)

    def gather_grads(self, stack: Sequence[Matrix]) -> Tensor:
        """The gradients (n, height, width) of the matrices of `stack`, alike and sorted by owner, that are
        this process's."""
        return torch.stack([gradient(m.parameter)[m.rows] for m in stack])

    def scatter_updates(self, stack: Sequence[Matrix], updates: Tensor) -> list[Tensor]:
        """From `updates` of its own matrices: of each matrix's update, in float32, the rows that this
        process holds."""
        return list(updates.float().unbind())

    def weights(self, matrix: Matrix) -> Tensor:
        """The rows of a matrix that this process holds; a view."""
        return matrix.parameter.data[matrix.rows]

    def global_norm(self, own: Tensor) -> Tensor:
        """The norm of the whole gradient, from that of what this process holds of it."""
        return own

    def to_local(self, tensor: Tensor) -> Tensor:
        """What this process holds of a weight or gradient; a view."""
        return tensor

    def local_grads(self, parameters: list[Tensor]) -> list[Tensor]:
        """Plain tensors whose `grad` is what this process holds of the gradient of each parameter."""
        return parameters

    def gather(self, pieces: Mapping[str, TensorShard]) -> dict[str, Tensor]:
        """The whole tensors in the first process, one by one in its host's memory where they were divided,
        and nothing in the others. All processes must ask together."""
        return {name: piece.tensor for name, piece in pieces.items()}


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "a parameter that is trained has no gradient"
    return parameter.grad


class Optimizer:
    """Parts that step together, each at its own multiple of one learning rate."""

    def __init__(
        self, named: Named, parts: "Sequence[tuple[AdamW | Muon, float]]", layout: Layout | None = None
    ):
        self.named = named
        self.parameters = [p for _, p in named]
        self.parts, self.layout = parts, layout or Layout()
        self.lr: float | Tensor = 0.0  # set before each step

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """What torch's gradient scaler looks at."""
        return [{"params": self.layout.local_grads(self.parameters)}]

    @torch.no_grad()
    def step(self) -> None:
        for part, multiple in self.parts:
            part.step(self.lr * multiple)

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def state_shards(self) -> dict[str, TensorShard]:
        """What this process has of the state, by name; not copied."""
        return {name: piece for part, _ in self.parts for name, piece in part.state_shards().items()}

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs, by name; not copied where one process has it, else gathered in the
        first (empty in the others), which all must ask for together."""
        return self.layout.gather(self.state_shards())


def build(
    config: OptimizerOptions,
    named_parameters: Iterable[tuple[str, Tensor]],
    rows: dict[str, list[int]] | None = None,
    dtype: torch.dtype = torch.float32,
    layout: Layout | None = None,
) -> Optimizer:
    """The optimizer of the parameters that are trained.

    muon takes the matrices of blocks (names that begin with "h."); embeddings, head, vectors and adapters
    go to AdamW. `rows` splits a fused matrix, by name; matrices are orthogonalised in `dtype`. `layout`
    says how the parameters lie in several processes.
    """
    layout = layout or Layout()
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    to_muon = [(n, p) for n, p in named if config.optimizer == "muon" and is_for_muon(n, p)]
    to_adam = [(n, p) for n, p in named if all(p is not other for _, other in to_muon)]
    parts: list[tuple[AdamW | Muon, float]] = [(AdamW(config, to_adam, layout), 1.0)] if to_adam else []
    if to_muon:
        muon = Muon(config, to_muon, rows or {}, dtype, layout)
        parts.append((muon, config.muon_lr / config.learning_rate))
    return Optimizer(named, parts, layout)


def is_for_muon(name: str, parameter: Tensor) -> bool:
    # The low rank of an adapter is what it is for: to move all its directions by as much undoes it.
    return name.startswith("h.") and parameter.dim() == 2 and ".lora_" not in name


class AdamW:
    """Loshchilov and Hutter 2019: decoupled weight decay on matrices, none on vectors."""

    def __init__(self, config: OptimizerOptions, named: Named, layout: Layout | None = None):
        self.config, self.layout = config, layout or Layout()
        self.held = self.layout.shard(named)
        with torch.no_grad():
            own = {held.name: self.layout.local_shard(held, held.parameter) for held in self.held}
            self.exp_avg = {name: torch.zeros_like(weights) for name, weights in own.items()}
            self.exp_avg_sq = {name: torch.zeros_like(weights) for name, weights in own.items()}
        updated = [held for held in self.held if own[held.name].numel()]
        matrices = [held for held in updated if held.parameter.dim() >= 2]
        vectors = [held for held in updated if held.parameter.dim() < 2]
        self.groups = [
            (group, decay) for group, decay in ((matrices, config.weight_decay), (vectors, 0.0)) if group
        ]
        self.steps = torch.zeros((), dtype=torch.float32, device=named[0][1].device)

    def step(self, lr: float | Tensor) -> None:
        self.steps += 1
        own = self.layout.local_shard
        for group, decay in self.groups:
            torch._fused_adamw_(
                [own(held, held.parameter) for held in group],
                [own(held, gradient(held.parameter)) for held in group],
                [self.exp_avg[held.name] for held in group],
                [self.exp_avg_sq[held.name] for held in group],
                [],
                [self.steps] * len(group),
                lr=lr,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                weight_decay=decay,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
            )
        self.layout.all_gather_params(self.held)

    def state_shards(self) -> dict[str, TensorShard]:
        layout = self.layout
        found = {"steps": TensorShard(self.steps.shape, [(0, 1)] * layout.size, layout.rank, self.steps)}
        for held in self.held:
            about = held.parameter.shape, held.spans, layout.rank
            found[f"{held.name}.exp_avg"] = TensorShard(*about, self.exp_avg[held.name])
            found[f"{held.name}.exp_avg_sq"] = TensorShard(*about, self.exp_avg_sq[held.name])
        return found


class Muon:
    """Momentum, then the nearest orthogonal matrix (Jordan et al. 2024): each update changes all
    directions of a matrix by as much, where Adam's are dominated by a few.

    Nesterov momentum warms up from 0.85 to 0.95 over 300 steps; weight decay is decoupled and
    cautious: it pulls a weight only where the update does not push it outwards (Liang et al. 2024).
    Matrices of one shape are orthogonalised in one batch; those of a fused projection (`rows`) one by
    one, because what is orthogonal is each map, not their pile.
    """

    def __init__(
        self,
        config: OptimizerOptions,
        named: Named,
        rows: dict[str, list[int]],
        dtype: torch.dtype = torch.float32,
        layout: Layout | None = None,
    ):
        self.config, self.dtype, self.layout = config, dtype, layout or Layout()
        shares = [
            (f"{name}.{i}" if name in rows else name, p, sum(rows[name][:i]) if name in rows else 0, height)
            for name, p in named
            for i, height in enumerate(rows.get(name, [p.shape[0]]))
        ]
        costs = [newton_schulz_cost(height, p.shape[1]) for _, p, _, height in shares]
        ranks = self.layout.assign_ranks(costs)
        matrices = [Matrix(*share, rank) for share, rank in zip(shares, ranks, strict=True)]
        alike: dict[tuple[int, int], list[Matrix]] = {}
        for matrix in sorted(matrices, key=lambda matrix: matrix.owner):
            alike.setdefault((matrix.height, matrix.width), []).append(matrix)
        device = named[0][1].device
        # matrices of one shape, and the momentum of those among them that are this process's
        self.stacks = [
            (stack, torch.zeros(sum(m.owner == self.layout.rank for m in stack), *shape, device=device))
            for shape, stack in alike.items()
        ]
        self.steps = torch.zeros((), dtype=torch.float32, device=device)

    def step(self, lr: float | Tensor) -> None:
        # Worked out on the device: to read `steps` here would be to wait for a GPU. In float64, so that
        # what is rounded is what Python's own numbers would be.
        momentum = 0.85 + 0.1 * (self.steps.double() / 300).clamp(max=1.0)
        new, momentum = (1 - momentum).float(), momentum.float()
        self.steps += 1
        for stack, buffer in self.stacks:
            gradients = self.layout.gather_grads(stack)
            buffer.lerp_(gradients, new)
            update = gradients.lerp_(buffer, momentum).to(self.dtype)
            updates = self.layout.scatter_updates(stack, orthogonalize(update, self.config.muon_ns_steps))
            weights = [self.layout.weights(matrix) for matrix in stack]
            if self.config.muon_weight_decay:
                inwards = [w * (w * update > 0) for w, update in zip(weights, updates, strict=True)]
                add(weights, inwards, -lr * self.config.muon_weight_decay)
            height, width = buffer.shape[1:]
            add(weights, updates, -lr * max(1.0, height / width) ** 0.5)

    def state_shards(self) -> dict[str, TensorShard]:
        rank, size = self.layout.rank, self.layout.size
        found = {"muon.steps": TensorShard(self.steps.shape, [(0, 1)] * size, rank, self.steps)}
        for stack, buffer in self.stacks:
            mine = iter(buffer)
            for matrix in stack:
                spans = [(0, buffer.shape[1:].numel() * (owner == matrix.owner)) for owner in range(size)]
                tensor = next(mine) if matrix.owner == rank else buffer.new_empty(0)
                found[f"{matrix.label}.momentum"] = TensorShard(buffer.shape[1:], spans, rank, tensor)
        return found


def newton_schulz_cost(height: int, width: int) -> int:
    """Multiplications of a turn of orthogonalisation, for the balance between processes."""
    small, large = sorted((height, width))
    return small * small * (2 * large + small)


def add(weights: list[Tensor], changes: list[Tensor], factor: float | Tensor) -> None:
    """Add `factor` times each of `changes` to each of `weights`, in place."""
    if isinstance(factor, Tensor):
        changes, factor = torch._foreach_mul(changes, factor), 1.0  # type: ignore[assignment]
    torch._foreach_add_(weights, changes, alpha=factor)


# Amsel et al. 2025, "The Polar Express": the polynomials a x + b x^3 + c x^5 that bring singular values
# from [0.001, 1] to 1 in five turns, as published by the authors.
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def orthogonalize(matrices: Tensor, ns_steps: int = len(POLAR_EXPRESS)) -> Tensor:
    """The nearest orthogonal matrix U V^T of each matrix U S V^T in (n, r, c), nearly: singular values
    come out near 1, the more so the more `ns_steps`. A matrix of zeros stays one."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) * 1.02 + 1e-7)
    for a, b, c in POLAR_EXPRESS[:ns_steps]:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float, layout: Layout | None = None) -> Tensor:
    """Scale the gradients together so that their norm, over all processes, is at most `max_norm` (0: leave
    them).

    Returns the norm before, a scalar on the device: reading it waits for the device.
    """
    layout = layout or Layout()
    gradients = [layout.to_local(p.grad) for p in parameters if p.grad is not None]
    norm = layout.global_norm(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
