"""CUDA graphs: a whole training step, captured once and replayed (decoding: inference/graph_decode.py).

A replay launches hundreds of kernels at once, without Python. In small models, whose kernels are so short
that the GPU waits for launches, this saves most of the step time. A captured step reads and writes fixed
addresses, so its inputs, including the learning rate, are copied there. Nothing here has run on a GPU yet.
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
WARM_UPS = 3  # calls before capture, which load kernels and allocate workspaces


def require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError(f"--cuda_graph=True needs a CUDA GPU, and this is {device}; leave the option out")


def cuda_graph(work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """Capture `work`; return its result and a function that replays it. It is valid after a replay."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads may call CUDA during capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()
    return result, graph.replay


def aside(work: Callable[[], T], device: torch.device) -> T:
    """Run `work` on a side stream, as required before capture, and return its result."""
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
    """Raise UserError if a run with these options cannot be captured; `scored`: some targets are ignored."""
    require_cuda(machine.device)
    problems = {
        "several processes": machine.world.size > 1,
        "float16, whose gradient scaler synchronizes in each iteration": machine.dtype == "float16",
        "--activation_checkpointing, which saves RNG states": options.activation_checkpointing,
        "data of prompts and responses, whose batches differ in scored tokens": scored,
    }
    if wrong := [feature for feature, there in problems.items() if there]:
        raise UserError(f"--cuda_graph=True does not support {' and '.join(wrong)}; leave the option out")


class StepGraph:
    """A training step for batches of one shape: the first WARM_UPS calls run eagerly, the next is captured
    and replayed from then on. Batches of another shape (--batch_ramp_tokens) run eagerly. Each call
    overwrites the result of the previous one."""

    def __init__(
        self,
        step: Callable[..., tuple[Tensor, Tensor]],
        sequences: int,
        machine: Machine,
        record: Record = cuda_graph,
    ):
        self.step, self.sequences = step, sequences  # train.train_step, sequences per full batch
        self.machine, self.record = machine, record
        self.calls = 0
        self.lr = torch.zeros((), device=machine.device)
        self.batches: list[tuple[Tensor, ...]] = []  # static inputs of the captured step
        self.result: tuple[Tensor, Tensor] | None = None
        self.replay: Callable[[], None] | None = None

    def __call__(
        self,
        function: Callable[..., tuple[Tensor, Tensor]],
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        micro_batches: Iterable[tuple[float | Tensor, tuple[Tensor, ...]]],
        lr: float | Tensor,
        grad_clip: float,
    ) -> tuple[Tensor, Tensor]:
        weighted = list(micro_batches)
        if sum(len(batch[0]) for _, batch in weighted) != self.sequences:
            return self.step(function, optimizer, scaler, weighted, lr, grad_clip)
        if not self.batches:
            self.batches = [tuple(part.clone() for part in batch) for _, batch in weighted]
        for places, (_, batch) in zip(self.batches, weighted, strict=True):
            for place, part in zip(places, batch, strict=True):
                place.copy_(part)
        self.lr.fill_(lr)
        there = [(weight, batch) for (weight, _), batch in zip(weighted, self.batches, strict=True)]
        work = partial(self.step, function, optimizer, scaler, there, self.lr, grad_clip)
        self.calls += 1
        if self.calls <= WARM_UPS:
            return aside(work, self.machine.device)
        if self.replay is None:
            self.result, self.replay = self.record(work)
        self.replay()
        assert self.result
        return self.result
