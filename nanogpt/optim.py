"""Optimizers over named parameters: AdamW, and Muon for matrices with AdamW for the rest.

The arithmetic of AdamW is torch's own fused kernel. The classes around it are ours because torch.optim
imports the compiler when an optimizer is made (a second of every start), because a checkpoint stores
state by the parameter's name, which survives a change of layout, and because Muon works on stacks of
matrices of one shape.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nanogpt import lora

Named = Sequence[tuple[str, Tensor]]


class Part(Protocol):
    """Some of the parameters and the rule that updates them."""

    def step(self, lr: float | Tensor) -> None: ...  # a tensor: a scalar on the device

    def state(self) -> dict[str, Tensor]: ...  # by name; not copied


class Optimizer:
    """Parts that step together, each at its own multiple of one learning rate."""

    def __init__(self, named: Named, parts: Sequence[tuple[Part, float]]):
        self.names = {p: name for name, p in named}
        self.parts = parts
        self.lr: float | Tensor = 0.0  # set before each step
        # What torch's gradient scaler looks at.
        self.param_groups: list[dict[str, Any]] = [{"params": list(self.names)}]

    @torch.no_grad()
    def step(self) -> None:
        for part, multiple in self.parts:
            part.step(self.lr * multiple)

    def zero_grad(self) -> None:
        for p in self.names:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs, by name; not copied."""
        return {name: tensor for part, _ in self.parts for name, tensor in part.state().items()}


@dataclass(frozen=True)
class OptimConfig:
    optimizer: str = "adamw"  # or "muon": for the matrices of blocks, AdamW for the rest
    learning_rate: float = 6e-4  # of AdamW, at its peak
    weight_decay: float = 0.1  # of AdamW's matrices
    beta1: float = 0.9
    beta2: float = 0.95
    muon_lr: float = 0.02  # of Muon, when AdamW's is at its peak
    muon_weight_decay: float = 0.0
    muon_turns: int = 5  # of orthogonalisation

    def problems(self) -> list[str]:
        """What makes these numbers impossible; empty if nothing does."""
        wrong = []
        if self.beta1 == 1 or self.beta2 == 1:
            wrong.append(f"beta1={self.beta1} and beta2={self.beta2} must be below 1")
        if self.optimizer == "muon" and not self.learning_rate:
            wrong.append("learning_rate=0 leaves Muon without a schedule; make it small instead")
        return wrong


def build(
    config: OptimConfig,
    named_parameters: Iterable[tuple[str, Tensor]],
    rows: dict[str, list[int]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Optimizer:
    """The optimizer of the parameters that are trained.

    muon takes the matrices of blocks (names that begin with "h."); embeddings, head, vectors and adapters
    go to AdamW. `rows` splits a fused matrix, by name; matrices are orthogonalised in `dtype`.
    """
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    to_muon = [(n, p) for n, p in named if config.optimizer == "muon" and is_for_muon(n, p)]
    to_adam = [(n, p) for n, p in named if all(p is not other for _, other in to_muon)]
    parts: list[tuple[Part, float]] = [(AdamW(config, to_adam), 1.0)] if to_adam else []
    if to_muon:
        parts.append((Muon(config, to_muon, rows or {}, dtype), config.muon_lr / config.learning_rate))
    return Optimizer(named, parts)


def is_for_muon(name: str, parameter: Tensor) -> bool:
    # The low rank of an adapter is what it is for: to move all its directions by as much undoes it.
    return name.startswith("h.") and parameter.dim() == 2 and not lora.is_adapter(name)


class AdamW:
    """Loshchilov and Hutter 2019: decoupled weight decay on matrices, none on vectors."""

    def __init__(self, config: OptimConfig, named: Named):
        self.config, self.named = config, named
        matrices = [p for _, p in named if p.dim() >= 2]
        vectors = [p for _, p in named if p.dim() < 2]
        self.groups = [
            (group, decay) for group, decay in ((matrices, config.weight_decay), (vectors, 0.0)) if group
        ]
        self.exp_avg = {p: torch.zeros_like(p) for _, p in named}
        self.exp_avg_sq = {p: torch.zeros_like(p) for _, p in named}
        self.steps = torch.zeros((), dtype=torch.float32, device=named[0][1].device)

    def step(self, lr: float | Tensor) -> None:
        self.steps += 1
        for params, decay in self.groups:
            torch._fused_adamw_(
                params,
                [p.grad for p in params if p.grad is not None],
                [self.exp_avg[p] for p in params],
                [self.exp_avg_sq[p] for p in params],
                [],
                [self.steps] * len(params),
                lr=lr,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                weight_decay=decay,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
            )

    def state(self) -> dict[str, Tensor]:
        tensors = {"steps": self.steps}
        for name, p in self.named:
            tensors[f"{name}.exp_avg"] = self.exp_avg[p]
            tensors[f"{name}.exp_avg_sq"] = self.exp_avg_sq[p]
        return tensors


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
        config: OptimConfig,
        named: Named,
        rows: dict[str, list[int]],
        dtype: torch.dtype = torch.float32,
    ):
        self.config, self.dtype = config, dtype
        pieces: dict[tuple[int, int], list[tuple[str, Tensor, slice]]] = {}
        for name, p in named:
            first = 0
            for i, height in enumerate(rows.get(name, [p.shape[0]])):
                label = f"{name}.{i}" if name in rows else name
                pieces.setdefault((height, p.shape[1]), []).append((label, p, slice(first, first + height)))
                first += height
        self.stacks = [
            (group, torch.zeros(len(group), *shape, device=group[0][1].device))
            for shape, group in pieces.items()
        ]
        self.steps = torch.zeros((), dtype=torch.float32, device=named[0][1].device)

    def step(self, lr: float | Tensor) -> None:
        # Worked out on the device: to read `steps` here would be to wait for a GPU. In float64, so that
        # what is rounded is what Python's own numbers would be.
        momentum = 0.85 + 0.1 * (self.steps.double() / 300).clamp(max=1.0)
        new, momentum = (1 - momentum).float(), momentum.float()
        self.steps += 1
        for group, buffer in self.stacks:
            gradients = torch.stack([p.grad[rows] for _, p, rows in group if p.grad is not None])
            buffer.lerp_(gradients, new)
            update = gradients.lerp_(buffer, momentum).to(self.dtype)
            update = orthogonalise(update, self.config.muon_turns).to(buffer.dtype)
            height, width = update.shape[1:]
            weights = [p.data[rows] for _, p, rows in group]
            if self.config.muon_weight_decay:
                inwards = torch.stack(weights)
                inwards *= inwards * update > 0
                add(weights, inwards, -lr * self.config.muon_weight_decay)
            add(weights, update, -lr * max(1.0, height / width) ** 0.5)

    def state(self) -> dict[str, Tensor]:
        tensors = {"muon.steps": self.steps}
        for group, buffer in self.stacks:
            for (label, _, _), momentum in zip(group, buffer, strict=True):
                tensors[f"{label}.momentum"] = momentum
        return tensors


def add(weights: list[Tensor], stack: Tensor, factor: float | Tensor) -> None:
    """Add `factor` times each matrix of `stack` (n, r, c) to each of the n `weights`."""
    if isinstance(factor, Tensor):
        stack, factor = stack * factor, 1.0
    torch._foreach_add_(weights, list(stack.unbind()), alpha=factor)


# Amsel et al. 2025, "The Polar Express": the polynomials a x + b x^3 + c x^5 that bring singular values
# from [0.001, 1] to 1 in five turns, as published by the authors.
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def orthogonalise(matrices: Tensor, turns: int = len(POLAR_EXPRESS)) -> Tensor:
    """The nearest orthogonal matrix U V^T of each matrix U S V^T in (n, r, c), nearly: singular values
    come out near 1, the more so the more `turns`. A matrix of zeros stays one."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) * 1.02 + 1e-7)
    for a, b, c in POLAR_EXPRESS[:turns]:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients together so that their norm is at most `max_norm` (0: leave them).

    Returns the norm before, a scalar on the device: reading it waits for the device.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
