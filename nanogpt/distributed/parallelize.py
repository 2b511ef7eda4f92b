"""From a plain model to the one that runs: divided between processes, compiled, its gradients averaged.

In what order, and why:

1. `lay_out`, before there is an optimizer. fsdp and hsdp cut the parameters themselves (FSDP2's fully_shard,
   each block a unit, what is outside of blocks the last one), so the optimizer is made of the parts, and a
   model that fits on no device is never whole on one. Under ddp nothing happens to the model.
2. `in_dtype`: the number format. Under fsdp and hsdp it belongs to the units, which send weights in it.
3. `compile.recompute`: activation checkpointing of each block, inside the hooks of its unit, which has its
   weights there again when the backward pass wants them.
4. `compile.wrap`: torch.compile, of the whole function or of each block, around the checkpointing, so that
   the compiler sees it. A unit is compiled inside its hooks: weights are gathered outside of compiled code.
5. `connect`: DDP around what was compiled, so that the hooks on its parameters see gradients that are
   complete. A switch says which backward pass is the last of a step; only that one averages gradients.

Nobody outside this module and layout.py asks which of them it is.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nanogpt.compile import Function, is_sharded
from nanogpt.data import responses
from nanogpt.data.loader import TrainBatches
from nanogpt.distributed.layout import Replicated, Sharded
from nanogpt.errors import UserError
from nanogpt.finetune import lora
from nanogpt.loss import IGNORE
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import Layout, is_for_muon
from nanogpt.options import OptimizerOptions
from nanogpt.runtime import DTYPES, Machine
from nanogpt.world import World

Batch = TypeVar("Batch")

ROOM = 0.8  # of a device's memory, for what a run holds all the time; the rest is for activations


@dataclass(frozen=True)
class Division:
    """What several processes hold of a model."""

    mode: str = "ddp"
    shard_size: int = 1  # processes that share one copy of the weights
    why: str = ""  # in a line; nothing for one process

    @property
    def whole(self) -> bool:
        """Whether each process holds the whole model."""
        return self.mode == "ddp"

    def init_device(self, device: torch.device) -> torch.device:
        """Where the whole model is made: what is sharded comes to the device in parts."""
        return device if self.whole else torch.device("cpu")


def choose(asked: str, shard_size: int, world: World, weights: int, optimizer: int, memory: int) -> Division:
    """--parallel, where "auto" asks whether a device of `memory` bytes holds weights and gradients, `weights`
    bytes each, and a share of the `optimizer` bytes. UserError if `shard_size` does not fit the number of
    processes."""
    if world.size == 1:
        return Division()
    on_a_node = shard_size or world.on_node
    if asked == "hsdp" and (world.size % on_a_node or on_a_node in (1, world.size)):
        raise UserError(
            f"--parallel=hsdp: copies of {on_a_node} processes each are none of {world.size}; "
            + (f"--shard_size may be {_divisors(world.size)}" if _divisors(world.size) else "use fsdp or ddp")
        )
    need = 2 * weights + optimizer // world.size
    fits = need <= ROOM * memory
    mode, why = asked, "as asked"
    if asked == "auto":
        several = 1 < on_a_node < world.size and not world.size % on_a_node
        mode = "ddp" if fits else "hsdp" if several else "fsdp"
        why = (
            f"weights, gradients and 1/{world.size} of the optimizer's state take {need / 1e9:.3g} GB, "
            f"{'less' if fits else 'more'} than {ROOM:.0%} of the {memory / 1e9:.3g} GB of a device"
        )
    size = {"ddp": 1, "fsdp": world.size, "hsdp": on_a_node}[mode]
    copies = f", {world.size // size} copies of {size} processes each" if mode == "hsdp" else ""
    return Division(mode, size, f"{mode}{copies}: {why}")


def divide(
    shape: GPTConfig, rules: OptimizerOptions, asked: str, shard_size: int, machine: Machine
) -> Division:
    """What each process holds of a model of `shape`, by --parallel and --shard_size (`choose`)."""
    with torch.device("meta"):
        named = list(GPT(shape).named_parameters())
    weights = sum(p.nbytes for _, p in named)
    to_muon = sum(p.nbytes for n, p in named if rules.optimizer == "muon" and is_for_muon(n, p))
    optimizer = 2 * weights - to_muon  # AdamW keeps two numbers a parameter, Muon one
    return choose(asked, shard_size, machine.world, weights, optimizer, device_memory(machine))


def gather_model(model: GPT, layout: Layout, lora_config: dict[str, Any] | None) -> GPT | None:
    """A copy of a sharded model with all its weights, in the first process; None in the others."""
    assert isinstance(layout, Sharded)
    tensors = layout.gather(layout.weight_shards(model))
    if not tensors:
        return None
    with torch.device("meta"):
        whole = GPT(model.config)
        if lora_config:
            lora.adapt(whole, lora.Adapters(**lora_config))
    whole.load_state_dict(tensors, assign=True)
    return whole.requires_grad_(False).train()


def _divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(2, n) if n % i == 0)


def device_memory(machine: Machine) -> int:
    """Bytes for each process: of its GPU, or its share of the machine's memory."""
    if machine.device.type == "cuda":
        return torch.cuda.mem_get_info(machine.device)[1]
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:  # Windows
        return 1 << 62
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // machine.world.on_node


def lay_out(model: GPT, machine: Machine, division: Division) -> Layout:
    """Divide `model` (fsdp, hsdp: in place, to the device); returns how its weights lie."""
    world = machine.world
    if world.size == 1:
        return Layout()
    if division.mode == "ddp":
        return Replicated(world)
    # imported here: they take a tenth of a second that most runs need not spend
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    shard_size = division.shard_size
    shape, names = (world.size // shard_size, shard_size), ("replicate", "shard")
    skip = division.mode == "fsdp"  # a mesh of one row has no first dimension
    mesh = init_device_mesh(machine.device.type, shape[skip:], mesh_dim_names=names[skip:])
    in_blocks, outside = _policies(machine)
    for unit in [*model.h, model]:
        fully_shard(unit, mesh=mesh, mp_policy=outside if unit is model else in_blocks)
        assert isinstance(unit, FSDPModule)
        if machine.device.type == "cpu":
            unit.set_force_sum_reduction_for_comms(True)  # gloo adds, and knows no mean
    return Sharded(world, mesh["shard"].get_group(), shard_size)


def _policies(machine: Machine) -> tuple[Any, Any]:
    """In which numbers units of FSDP compute (blocks, and what is outside), to do as Machine.in_dtype: all in
    the narrow format where it casts weights; else by autocast, on a GPU with the weights of blocks, nearly
    all of which it would cast, cast before they are sent (a CPU's autocast leaves norms two formats, which
    they do not take). Gradients are added in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    narrow = DTYPES[machine.dtype]
    if narrow == torch.float32:
        return MixedPrecisionPolicy(), MixedPrecisionPolicy()
    cast_all = machine.casts_weights
    policy = MixedPrecisionPolicy(
        param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=cast_all
    )
    if cast_all:
        return policy, policy
    return MixedPrecisionPolicy() if machine.device.type == "cpu" else policy, MixedPrecisionPolicy()


def in_dtype(model: nn.Module, machine: Machine) -> Function:
    """Machine.in_dtype; where it casts weights, the units of a sharded model do so themselves."""
    return model if is_sharded(model) and machine.casts_weights else machine.in_dtype(model)


def sharded_scaler(machine: Machine) -> torch.amp.GradScaler:
    """For float16: processes that hold different gradients agree on whether one overflowed."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    return ShardedGradScaler(machine.device.type, process_group=dist.group.WORLD)


def micro_batches(
    batches: TrainBatches, world: World, function: Function, step: int
) -> Iterator[tuple[float | Tensor, tuple[Tensor, ...]]]:
    """This process's micro-batches of update number `step` with their loss weights, times the number of
    processes, because gradients are averaged over them. All make the same number of passes, because those of
    a sharded model need one another: a rank with one micro-batch fewer runs a dummy row with weight 0."""
    windows, targets = batches.windows(step), responses.count_targets(batches, step)
    left, made = world.share(windows)[1], 0
    largest = -(-windows // world.size)
    passes = -(-largest // batches.batch_size)
    world.report_phase(step, "reading data")
    source = batches.step(step)
    batch = next(source, None)
    while batch is not None:
        following, made = next(source, None), made + 1
        if following is None and made < passes:
            following = tuple(part[:1] for part in batch)
        counted = min(left, len(batch[0]))
        left -= counted
        world.report_phase(step, "computing")
        average_next(function, wanted=following is None)
        weight: float | Tensor = counted / windows
        if targets:  # with no scored target the weight is 0: a mean over nothing is NaN
            idx, wanted, *documents = batch
            scored = wanted != IGNORE
            weight = scored[:counted].sum() / targets
            batch = idx, torch.where(scored.any(), wanted, 0), *documents
        yield weight * world.size, batch
        world.report_phase(step, "reading data")
        batch = following
    world.report_phase(step, "updating")


def step_of_all(step: Function, world: World) -> Function:
    """train.py's step, whose loss becomes the mean over all processes."""

    def step_together(*given: Any) -> tuple[Tensor, Tensor]:
        loss, grad_norm = step(*given)
        return world.sum(loss) / world.size, grad_norm

    return step_together


def in_step(
    model: object, batches: Iterable[Batch], world: World, stopped: Callable[[], bool]
) -> Iterator[Batch | None]:
    """`batches` until `stopped`; of a sharded model as many for all processes, None while others have one."""
    source, alone = iter(batches), not is_sharded(model)
    while (batch := next(source, None)) is not None or not alone:
        over = stopped() if alone else world.any_rank(stopped()) or not world.any_rank(batch is not None)
        if over:
            return
        yield batch


class Connected:
    """A function whose backward pass averages the gradients of all processes, while its switch is on."""

    def __init__(self, function: Function, switch: Callable[[bool], None]):
        self.function, self.switch = function, switch

    def __call__(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def connect(function: Function, model: nn.Module, machine: Machine) -> Function:
    """`function`, which runs `model`, so that its backward pass averages the gradients of all processes."""
    if machine.world.size == 1:
        return function
    if is_sharded(model):
        units: Any = model

        def switch_units(on: bool) -> None:
            units.set_requires_gradient_sync(on)
            units.set_is_last_backward(on)

        return Connected(function, switch_units)
    on_device = [machine.device] if machine.device.type == "cuda" else None
    ddp = DistributedDataParallel(
        _Calls(function, model),
        device_ids=on_device,
        gradient_as_bucket_view=True,  # one copy of the gradients, not two
    )

    def switch_ddp(on: bool) -> None:
        ddp.require_backward_grad_sync = on

    return Connected(ddp, switch_ddp)


class _Calls(nn.Module):
    """A function as a module that owns the parameters it uses, as DistributedDataParallel wants it, and no
    buffers, which it would send before each pass: they are tables of positions, the same in all."""

    def __init__(self, function: Function, model: nn.Module):
        super().__init__()
        self.owned = nn.ParameterList(model.parameters())
        self.call = lambda *inputs: function(*inputs)  # a module itself would be seen, with its buffers

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(*inputs)


def average_next(function: Function, wanted: bool) -> None:
    """Whether the next pass of a connected function averages gradients: only the last micro-batch should.
    The forward pass looks at it, too."""
    if isinstance(function, Connected):
        function.switch(wanted)
