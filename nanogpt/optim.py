"""AdamW over named parameters (Loshchilov and Hutter 2019), one fused call a group.

The arithmetic is torch's own fused kernel. The class around it is ours because torch.optim imports
the compiler when an optimizer is made (a second of every start), and because a checkpoint stores
state by the parameter's name, which survives a change of layout.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class AdamW:
    """Decoupled weight decay on matrices; none on vectors (biases and gains)."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
    ):
        self.betas, self.eps = betas, eps
        named = [(name, p) for name, p in named_parameters if p.requires_grad]
        self.names = {p: name for name, p in named}
        matrices = [p for _, p in named if p.dim() >= 2]
        vectors = [p for _, p in named if p.dim() < 2]
        self.param_groups: list[dict[str, Any]] = [  # the shape that torch's gradient scaler expects
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.param_groups = [group for group in self.param_groups if group["params"]]
        self.exp_avg = {p: torch.zeros_like(p) for _, p in named}
        self.exp_avg_sq = {p: torch.zeros_like(p) for _, p in named}
        device = named[0][1].device
        self.steps = torch.zeros((), dtype=torch.float32, device=device)
        self.lr = 0.0  # set before each step

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for group in self.param_groups:
            params = group["params"]
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [self.exp_avg[p] for p in params],
                [self.exp_avg_sq[p] for p in params],
                [],
                [self.steps] * len(params),
                lr=self.lr,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=group["weight_decay"],
                eps=self.eps,
                amsgrad=False,
                maximize=False,
            )

    def zero_grad(self) -> None:
        for p in self.names:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """The state by name: `NAME.exp_avg`, `NAME.exp_avg_sq` and `steps`; not copied."""
        tensors = {"steps": self.steps}
        for p, name in self.names.items():
            tensors[f"{name}.exp_avg"] = self.exp_avg[p]
            tensors[f"{name}.exp_avg_sq"] = self.exp_avg_sq[p]
        return tensors


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
