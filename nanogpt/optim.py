"""AdamW; Muon for the matrices in blocks, with AdamW for the rest; row-wise Adagrad for n-gram tables.

AdamW runs torch's fused kernel. The classes do not derive from torch.optim.Optimizer, for three reasons:
instantiating it imports torch._dynamo (1 s); checkpoints store state by parameter name, independently of how
it is sharded; Muon works on stacks of matrices of the same shape. A Layout defines which rank updates which
part of each parameter, and communicates the results.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nanogpt.model import NGRAM_TABLES
from nanogpt.options import OptimizerOptions

Named = Sequence[tuple[str, Tensor]]
Span = tuple[int, int]  # [start, stop) of elements in row-major order


@dataclass(frozen=True)
class PartitionedParam:
    """A parameter and, for each rank, the range of its elements that the rank updates."""

    name: str
    parameter: Tensor
    spans: Sequence[Span]


@dataclass(frozen=True)
class Matrix:
    """Rows of a parameter that one rank, the owner, orthogonalizes as one matrix."""

    label: str
    parameter: Tensor
    first: int  # first row
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
    """This rank's shard of a tensor."""

    shape: torch.Size  # shape of the full tensor
    spans: Sequence[Span]  # range of elements of each rank
    rank: int  # this rank
    tensor: Tensor  # elements in spans[rank]

    def copy_(self, full: Tensor) -> None:
        """Copy this rank's range of the tensor `full` to `tensor`, in place."""
        start, stop = self.spans[self.rank]
        self.tensor.copy_(full.reshape(-1)[start:stop].view(self.tensor.shape))


class Layout:
    """Distribution of parameters and optimizer state over ranks.

    This base class is the single-process case, without communication; see distributed/layout.py for DDP
    with ZeRO-1 and for FSDP.
    """

    rank, size = 0, 1  # rank in, and size of, the group over which the optimizer state is sharded
    sharded = False  # True: each rank holds only a shard of every parameter

    def partition(self, named: Sequence[tuple[str, Tensor]]) -> list[PartitionedParam]:
        """Assign to each rank a range of the elements of every parameter, for elementwise update rules."""
        return [PartitionedParam(name, p, [(0, p.numel())]) for name, p in named]

    def local_shard(self, param: PartitionedParam, tensor: Tensor) -> Tensor:
        """Return a view of the range of `tensor` that this rank updates; `tensor` is `param.parameter` or its
        gradient."""
        return tensor

    def all_gather_params(self, params: Sequence[PartitionedParam]) -> None:
        """All-gather the ranges that the ranks have updated, if weights are replicated. Collective: call on
        all ranks."""

    def replicated_shard(self, tensor: Tensor) -> TensorShard:
        """Describe `tensor`, optimizer state that every rank holds in full, as a TensorShard."""
        return TensorShard(tensor.shape, [(0, tensor.numel())] * self.size, self.rank, tensor)

    def assign_ranks(self, costs: Sequence[float]) -> list[int]:
        """Return the rank that owns each matrix, balancing `costs`."""
        return [0] * len(costs)

    def gather_grads(self, stack: Sequence[Matrix]) -> Tensor:
        """Return a copy of the gradients, (n, height, width), of the matrices in `stack` that this rank owns.

        Matrices of a stack have the same shape and are sorted by owner. Collective: call on all ranks.
        """
        return torch.stack([gradient(m.parameter)[m.rows] for m in stack])

    def scatter_updates(self, stack: Sequence[Matrix], updates: Tensor) -> list[Tensor]:
        """Exchange `updates`, those of the matrices that this rank owns; return for every matrix in `stack`
        the update of the rows that this rank stores, in float32. Collective: call on all ranks."""
        return list(updates.float().unbind())

    def weights(self, matrix: Matrix) -> Tensor:
        """Return the rows of `matrix` that this rank stores, as a view."""
        return matrix.parameter.data[matrix.rows]

    def global_norm(self, local_norm: Tensor) -> Tensor:
        """Return the norm of the full gradients, given that of the gradients that this rank holds.
        Collective: call on all ranks."""
        return local_norm

    def to_local(self, tensor: Tensor) -> Tensor:
        """Return what this rank stores of a weight or gradient, as a view: its shard if weights are sharded,
        else all of it."""
        return tensor

    def local_params(self, parameters: list[Tensor]) -> list[Tensor]:
        """Return plain tensors whose `grad` is what this rank stores of each parameter's gradient."""
        return parameters

    def gather(self, shards: Mapping[str, TensorShard]) -> dict[str, Tensor]:
        """Return the full tensors on rank 0, gathered one by one to CPU memory if sharded; {} on other ranks.
        Collective: call on all ranks."""
        return {name: shard.tensor for name, shard in shards.items()}


def coalesce_gradient(parameter: Tensor) -> Tensor:
    """Coalesce the sparse gradient of `parameter` and assign it to `grad`; return its values (rows, C)."""
    parameter.grad = gradient(parameter).coalesce()
    return parameter.grad.values()


def gradient(parameter: Tensor) -> Tensor:
    """Return `parameter.grad`, which must not be None."""
    assert parameter.grad is not None, "a trainable parameter has no gradient"
    return parameter.grad


class Rule(Protocol):
    """Update rule for some of the parameters: AdamW, Muon or RowAdagrad."""

    def step(self, lr: float | Tensor) -> None: ...

    def state_shards(self) -> dict[str, TensorShard]: ...


class Optimizer:
    """Update all parameters, each by one of several update rules.

    `rules` pairs each rule with the factor by which it multiplies `lr`, the learning rate of AdamW. Not a
    torch.optim.Optimizer: it implements only what torch.amp.GradScaler uses.
    """

    def __init__(self, named: Named, rules: Sequence[tuple[Rule, float]], layout: Layout | None = None):
        self.named = named
        self.parameters = [p for _, p in named]
        self.rules, self.layout = rules, layout or Layout()
        self.lr: float | Tensor = 0.0  # set before each step

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Minimal `param_groups` for torch.amp.GradScaler, without options."""
        return [{"params": self.layout.local_params(self.parameters)}]

    @torch.no_grad()
    def step(self) -> None:
        for rule, factor in self.rules:
            rule.step(self.lr * factor)

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def state_shards(self) -> dict[str, TensorShard]:
        """Return this rank's shards of the optimizer state by name, not copied."""
        return {name: shard for rule, _ in self.rules for name, shard in rule.state_shards().items()}

    def state(self) -> dict[str, Tensor]:
        """Return the full optimizer state by name: the live tensors in a single process, else tensors
        gathered on rank 0 ({} on other ranks). Collective: call on all ranks."""
        return self.layout.gather(self.state_shards())


def build(
    config: OptimizerOptions,
    named_parameters: Iterable[tuple[str, Tensor]],
    part_heights: dict[str, list[int]] | None = None,
    dtype: torch.dtype = torch.float32,
    layout: Layout | None = None,
) -> Optimizer:
    """Build the optimizer of the trainable parameters.

    With optimizer="muon", Muon trains the matrices of blocks (names that start with "h.") except adapters.
    Row-wise Adagrad trains n-gram tables, AdamW the rest. `part_heights`: numbers of rows of the parts of
    each fused matrix (q, k, v), by name. `dtype`: dtype of the orthogonalization. `layout`: None for a single
    process.
    """
    layout = layout or Layout()
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    for_muon = [(n, p) for n, p in named if config.optimizer == "muon" and is_for_muon(n, p)]
    excluded = {NGRAM_TABLES, *(name for name, _ in for_muon)}
    for_adamw = [(n, p) for n, p in named if n not in excluded]
    rules: list[tuple[Rule, float]] = [(AdamW(config, for_adamw, layout), 1.0)] if for_adamw else []
    if NGRAM_TABLES in (by_name := dict(named)):
        from nanogpt.ngrams.training import RATE, RowAdagrad

        rules.append((RowAdagrad(NGRAM_TABLES, by_name[NGRAM_TABLES], layout), RATE))
    if for_muon:
        muon = Muon(config, for_muon, part_heights or {}, dtype, layout)
        rules.append((muon, config.muon_lr / config.learning_rate))
    return Optimizer(named, rules, layout)


def is_for_muon(name: str, parameter: Tensor) -> bool:
    """Return whether Muon trains a parameter: a matrix of a block, except LoRA factors, which AdamW trains as
    in Hu et al. 2021."""
    return name.startswith("h.") and parameter.dim() == 2 and ".lora_" not in name


class AdamW:
    """AdamW (Loshchilov and Hutter 2019); 1-D parameters have no weight decay."""

    def __init__(self, config: OptimizerOptions, named: Named, layout: Layout | None = None):
        self.config, self.layout = config, layout or Layout()
        self.partitioned = self.layout.partition(named)
        with torch.no_grad():
            local = {p.name: self.layout.local_shard(p, p.parameter) for p in self.partitioned}
            self.exp_avg = {name: torch.zeros_like(weights) for name, weights in local.items()}
            self.exp_avg_sq = {name: torch.zeros_like(weights) for name, weights in local.items()}
        updated = [param for param in self.partitioned if local[param.name].numel()]
        matrices = [param for param in updated if param.parameter.dim() >= 2]
        vectors = [param for param in updated if param.parameter.dim() < 2]
        self.groups = [
            (group, decay) for group, decay in ((matrices, config.weight_decay), (vectors, 0.0)) if group
        ]
        self.steps = torch.zeros((), dtype=torch.float32, device=named[0][1].device)

    def step(self, lr: float | Tensor) -> None:
        self.steps += 1
        local_shard = self.layout.local_shard
        for group, decay in self.groups:
            torch._fused_adamw_(
                [local_shard(param, param.parameter) for param in group],
                [local_shard(param, gradient(param.parameter)) for param in group],
                [self.exp_avg[param.name] for param in group],
                [self.exp_avg_sq[param.name] for param in group],
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
        self.layout.all_gather_params(self.partitioned)

    def state_shards(self) -> dict[str, TensorShard]:
        state = {"steps": self.layout.replicated_shard(self.steps)}
        for param in self.partitioned:
            name, shape, rank = param.name, param.parameter.shape, self.layout.rank
            state[f"{name}.exp_avg"] = TensorShard(shape, param.spans, rank, self.exp_avg[name])
            state[f"{name}.exp_avg_sq"] = TensorShard(shape, param.spans, rank, self.exp_avg_sq[name])
        return state


class Muon:
    """Muon (Jordan et al. 2024): momentum, then orthogonalization, which equalizes the singular values of an
    update; in Adam's updates, a few large ones dominate.

    Nesterov momentum is warmed up from 0.85 to 0.95 over 300 steps. Weight decay is decoupled and cautious:
    it is applied only to weights that the update also shrinks (Chen et al. 2025). Matrices of the same shape
    are orthogonalized in one batch, and the parts of a fused projection (`part_heights`) separately. The
    update of an (r, c) matrix is scaled by sqrt(max(1, r / c)).
    """

    def __init__(
        self,
        config: OptimizerOptions,
        named: Named,
        part_heights: dict[str, list[int]],
        dtype: torch.dtype = torch.float32,
        layout: Layout | None = None,
    ):
        self.config, self.dtype, self.layout = config, dtype, layout or Layout()
        matrix_args = []  # label, parameter, first row, height
        for name, p in named:
            heights = part_heights.get(name, [p.shape[0]])
            for i, height in enumerate(heights):
                label = f"{name}.{i}" if name in part_heights else name
                matrix_args.append((label, p, sum(heights[:i]), height))
        costs = [newton_schulz_cost(height, p.shape[1]) for _, p, _, height in matrix_args]
        owners = self.layout.assign_ranks(costs)
        matrices = [Matrix(*args, owner) for args, owner in zip(matrix_args, owners, strict=True)]
        by_shape: dict[tuple[int, int], list[Matrix]] = {}
        for matrix in sorted(matrices, key=lambda matrix: matrix.owner):
            by_shape.setdefault((matrix.height, matrix.width), []).append(matrix)
        device = named[0][1].device
        # matrices of the same shape, and the momentum of those that this rank owns
        self.stacks = [
            (stack, torch.zeros(sum(m.owner == self.layout.rank for m in stack), *shape, device=device))
            for shape, stack in by_shape.items()
        ]
        self.steps = torch.zeros((), dtype=torch.float32, device=device)
        momentum = 0.85 + 0.1 * (torch.arange(301, dtype=torch.float64, device="cpu") / 300)
        # (2, 301): momentum and 1 - momentum, by step
        self.momentum_table = torch.stack([momentum, 1 - momentum]).float().to(device)

    def step(self, lr: float | Tensor) -> None:
        # Look up the momentum on the device: reading `steps` here would synchronize with a GPU.
        step = self.steps.long().clamp(max=300)[None]
        momentum, one_minus_momentum = self.momentum_table.index_select(1, step).unbind()
        self.steps += 1
        for stack, buffer in self.stacks:
            gradients = self.layout.gather_grads(stack)
            buffer.lerp_(gradients, one_minus_momentum)
            update = gradients.lerp_(buffer, momentum).to(self.dtype)
            updates = self.layout.scatter_updates(stack, orthogonalize(update, self.config.muon_ns_steps))
            weights = [self.layout.weights(matrix) for matrix in stack]
            if self.config.muon_weight_decay:
                decayed = [w * (w * update > 0) for w, update in zip(weights, updates, strict=True)]
                add(weights, decayed, -lr * self.config.muon_weight_decay)
            height, width = buffer.shape[1:]
            add(weights, updates, -lr * max(1.0, height / width) ** 0.5)

    def state_shards(self) -> dict[str, TensorShard]:
        rank, size = self.layout.rank, self.layout.size
        state = {"muon.steps": self.layout.replicated_shard(self.steps)}
        for stack, buffer in self.stacks:
            owned = iter(buffer)
            for matrix in stack:
                spans = [(0, buffer.shape[1:].numel() * (r == matrix.owner)) for r in range(size)]
                tensor = next(owned) if matrix.owner == rank else buffer.new_empty(0)
                state[f"{matrix.label}.momentum"] = TensorShard(buffer.shape[1:], spans, rank, tensor)
        return state


def newton_schulz_cost(height: int, width: int) -> int:
    """Return the multiply-adds of one Newton-Schulz iteration, to balance the load of the ranks."""
    small, large = sorted((height, width))
    return small * small * (2 * large + small)


def add(weights: list[Tensor], changes: list[Tensor], factor: float | Tensor) -> None:
    """Add `factor * change` to each of `weights`, in place."""
    if isinstance(factor, Tensor):
        changes, factor = torch._foreach_mul(changes, factor), 1.0  # type: ignore[assignment]
    torch._foreach_add_(weights, changes, alpha=factor)


# Amsel et al. 2025, "The Polar Express": polynomials a x + b x^3 + c x^5 that map singular values in
# [0.001, 1] to 0.85 ... 1.14 in five iterations (computed with a safety factor of 0.02).
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def orthogonalize(matrices: Tensor, ns_steps: int = len(POLAR_EXPRESS)) -> Tensor:
    """Approximate, for each matrix U S V^T of `matrices` (n, r, c), the nearest (semi-)orthogonal matrix
    U V^T, by `ns_steps` iterations (at most 5); more bring the singular values closer to 1. Zero matrices
    stay zero."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) * 1.02 + 1e-7)
    for a, b, c in POLAR_EXPRESS[:ns_steps]:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float, layout: Layout | None = None) -> Tensor:
    """Scale all gradients in place so that their global norm, over all ranks, is at most `max_norm`; 0: no
    clipping.

    Return the norm before clipping, a 0-d tensor on the device; reading it synchronizes. Sparse gradients are
    coalesced, as RowAdagrad requires. At least one parameter must have a gradient. Collective: call on all
    ranks.
    """
    layout = layout or Layout()
    trained = [p for p in parameters if p.grad is not None]
    grads = [coalesce_gradient(p) if gradient(p).is_sparse else layout.to_local(gradient(p)) for p in trained]
    norm = layout.global_norm(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))
    if max_norm > 0:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
