"""CUDA graphs: a whole training step, recorded once and replayed (decoding: inference/graph_decode.py).

A replay launches hundreds of kernels as one, without Python: where they are so short that a GPU waits for its
next order (small models), that is most of the time. What is recorded reads and writes fixed places
in memory, so inputs are copied to theirs, the rate among them. Nothing here has run on a GPU yet.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from nanogpt.errors import UserError
from nanogpt.optim import Optimizer
from nanogpt.options import MachineOptions
from nanogpt.runtime import Machine

T = TypeVar("T")
Record = Callable[[Callable[[], T]], tuple[T, Callable[[], None]]]
WARM_UPS = 3  # calls before the one that is recorded: kernels are loaded, workspaces made


def require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError(f"--cuda_graph=True needs a CUDA GPU, and this is {device}; leave the option out")


def cuda_graph(work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """What `work` returns, and what makes that be worked out: nothing is before it is called."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads may call CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()
    return result, graph.replay


def aside(work: Callable[[], T], device: torch.device) -> T:
    """`work` on a stream of its own, as it must run before it is recorded."""
    if device.type != "cuda":
        return work()
    stream, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(main)
    with torch.cuda.stream(stream):
        result = work()
    main.wait_stream(stream)
    return result


# ----------------------------------------------------------------------------- training


def require_recordable(options: MachineOptions, machine: Machine, scored: bool) -> None:
    """UserError if a run of these options cannot be recorded; `scored`: some targets are left out."""
    require_cuda(machine.device)
    problems = {
        "several processes": machine.world.size > 1,
        "float16, whose scaled loss is looked at in each iteration": machine.dtype == "float16",
        "--activation_checkpointing, which saves random states": options.activation_checkpointing,
        "data of prompts and responses, of which each batch scores another number of tokens": scored,
    }
    if wrong := [what for what, there in problems.items() if there]:
        raise UserError(f"--cuda_graph=True does not go with {' and '.join(wrong)}; leave the option out")


class StepGraph:
    """A training step for batches of one shape: the first few calls run as ever, the next is recorded, and
    replayed from then on. Batches of another shape (--batch_ramp_tokens) run as ever. The result of a call
    is overwritten by the next one."""

    def __init__(
        self,
        step: Callable[..., tuple[Tensor, Tensor]],
        windows: int,
        machine: Machine,
        record: Record = cuda_graph,
    ):
        self.step, self.windows = step, windows  # train.train_step, and of a full batch
        self.machine, self.record = machine, record
        self.calls = 0
        self.lr = torch.zeros((), device=machine.device)
        self.batches: list[tuple[Tensor, ...]] = []  # where a recorded step finds them
        self.result: tuple[Tensor, Tensor] | None = None
        self.replay: Callable[[], None] | None = None

    def __call__(
        self,
        model: Callable[..., tuple[Tensor, Tensor]],
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        micro_batches: Iterable[tuple[float | Tensor, tuple[Tensor, ...]]],
        lr: float | Tensor,
        grad_clip: float,
    ) -> tuple[Tensor, Tensor]:
        weighted = list(micro_batches)
        if sum(len(batch[0]) for _, batch in weighted) != self.windows:
            return self.step(model, optimizer, scaler, weighted, lr, grad_clip)
        self._take(batch for _, batch in weighted)
        self.lr.fill_(lr)
        there = [(weight, batch) for (weight, _), batch in zip(weighted, self.batches, strict=True)]
        work = partial(self.step, model, optimizer, scaler, there, self.lr, grad_clip)
        self.calls += 1
        if self.calls <= WARM_UPS:
            return aside(work, self.machine.device)
        if self.replay is None:
            self.result, self.replay = self.record(work)
        self.replay()
        assert self.result
        return self.result

    def _take(self, batches: Iterable[tuple[Tensor, ...]]) -> None:
        """Put `batches` where they are looked for."""
        for number, batch in enumerate(batches):
            if number == len(self.batches):
                self.batches.append(tuple(part.clone() for part in batch))
            else:
                for place, part in zip(self.batches[number], batch, strict=True):
                    place.copy_(part)
