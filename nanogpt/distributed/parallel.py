"""From a plain model to the one that runs: divided between processes, compiled, its gradients averaged.

In what order, and why:

1. `lay_out`, before there is an optimizer. fsdp and hsdp cut the parameters themselves (FSDP2's fully_shard,
   each block a unit, what is outside of blocks the last one), so the optimizer is made of the parts, and a
   model that fits on no device is never whole on one. Under ddp nothing happens to the model.
2. `in_dtype`: the number format. Under fsdp and hsdp it belongs to the units, which send weights in it.
3. `recompute`: activation checkpointing of each block, inside the hooks of its unit, which has its weights
   there again when the backward pass wants them.
4. `wrap`: torch.compile, of the whole function or of each block, around the checkpointing, so that the
   compiler sees it. A unit is compiled inside its hooks: weights are gathered outside of compiled code.
5. `connect`: DDP around what was compiled, so that the hooks on its parameters see gradients that are
   complete. A switch says which backward pass is the last of a step; only that one averages gradients.

Nobody outside this module and layout.py asks which of them it is.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nanogpt import download
from nanogpt.distributed.layout import Replicated, Sharded
from nanogpt.errors import UserError
from nanogpt.model import GPT
from nanogpt.optim import Layout
from nanogpt.runtime import DTYPES, Machine
from nanogpt.world import World

Function = Callable[..., Any]
Batch = TypeVar("Batch")

# What the choice of --compile=auto rests on; nanoGPT's README says "a minute" and 250 to 135 ms a step.
COMPILING_S = 60.0  # before the first step, with nothing in the cache
SAVED = 0.25  # of the time of a step
EAGER_MFU = 0.3  # share of the chip's peak that a plain step reaches
UNKNOWN_PEAK = 100e12  # FLOP/s of a GPU that flops.py does not know
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

    def home(self, device: torch.device) -> torch.device:
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


def is_sharded(model: object) -> bool:
    """Whether no process has all weights of `model`, so that all must run it together."""
    return hasattr(model, "set_requires_gradient_sync")


def in_dtype(model: nn.Module, machine: Machine) -> Function:
    """Machine.in_dtype; where it casts weights, the units of a sharded model do so themselves."""
    return model if is_sharded(model) and machine.casts_weights else machine.in_dtype(model)


def make_scaler(machine: Machine, layout: Layout) -> torch.amp.GradScaler:
    """For float16; processes that hold different gradients agree on whether one overflowed."""
    enabled = machine.dtype == "float16"
    if not layout.sharded or not enabled:
        return torch.amp.GradScaler(machine.device.type, enabled=enabled)
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    return ShardedGradScaler(machine.device.type, process_group=dist.group.WORLD)


def in_step(
    model: object, batches: Iterable[Batch], world: World, stopped: Callable[[], bool]
) -> Iterator[Batch | None]:
    """`batches` until `stopped`; of a sharded model as many for all processes, None while others have one."""
    source, alone = iter(batches), not is_sharded(model)
    while (batch := next(source, None)) is not None or not alone:
        over = stopped() if alone else world.any(stopped()) or not world.any(batch is not None)
        if over:
            return
        yield batch


def choose_compile(asked: bool | str, device: torch.device, flops: float, peak: float | None) -> bool | str:
    """--compile, where "auto" asks whether it saves more time than it takes in a run of so many `flops`.

    It is worked out, not measured, so that a run and its resumed half choose the same. On a CPU the
    answer is no: it saves 25 % of a step at 128 channels but 4 % at 384 (docs/results.md).
    """
    if asked != "auto":
        return asked
    plain_s = flops / (EAGER_MFU * (peak or UNKNOWN_PEAK))
    return device.type == "cuda" and SAVED * plain_s > COMPILING_S


def without_logits(function: Function) -> Function:
    """`function`, which gives logits and a loss, with None for the logits: a compiler need not write what
    nobody is given, 13 GB in float32 for 64 x 1,024 tokens of GPT-2's vocabulary."""

    def loss_alone(*inputs: Tensor) -> Any:
        return None, function(*inputs)[1]

    return loss_alone


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


def recompute(model: GPT, machine: Machine) -> None:
    """Keep of each block's forward pass the input alone, and run it again in the backward pass: a third more
    arithmetic, a fraction of the activations (Chen et al. 2016).

    UserError where Machine.in_dtype lends the model its weights for the forward pass alone.
    """
    if machine.casts_weights and not is_sharded(model):
        on_cpu = machine.device.type == "cpu"
        how, instead = (
            ("on a CPU", "--dtype=float32") if on_cpu else ("by --casting=weights", "--casting=auto")
        )
        raise UserError(
            f"--recompute in {machine.dtype} {how} works with --parallel=fsdp alone; else give {instead}"
        )
    from torch.utils.checkpoint import checkpoint

    for block in model.h:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def wrap(
    function: Function,
    *,
    compile: bool | str,
    trial: Callable[[Function], None],
    blocks: Iterable[nn.Module] = (),
    dynamic: bool = False,
    head: Any = None,
) -> tuple[Function, str]:
    """Compile a model (or one of its methods) if asked: True, in one piece; "blocks", each of `blocks` by
    itself, which are alike, so that one is traced for all (docs/results.md: a quarter of the time for half
    of the gain).

    With "blocks" the head and the loss of the model `head`, if it is given, are one more piece: a GPU writes
    and reads its logits several times otherwise. Those of a sharded model stay as they are.

    Compilation happens at the first call, so `trial` calls it once. `dynamic`: for shapes that change
    from call to call. Returns what to call and a notice ("" if all went as asked). A machine without a
    working compiler gets `function` back and one line that says so; or a UserError where blocks are sharded,
    which the trial has left half gathered. The plain model stays the one to save.
    """
    if not compile:
        return function, ""
    blocks = list(blocks)
    sharded = any(map(is_sharded, blocks))
    # torch's own place for what it compiled is lost with the system's temporary files
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(download.cache_folder() / "compiled"))
    parts = blocks if compile == "blocks" or sharded else []
    before = [vars(block).get("forward") for block in parts]
    for block in parts:
        block.forward = torch.compile(block.forward, dynamic=dynamic)
    if parts and head is not None and not sharded:
        head.compiled_loss = torch.compile(head.loss, dynamic=dynamic)
    compiled = function if parts else torch.compile(function, dynamic=dynamic)
    try:
        trial(compiled)
    except Exception as error:  # the compiler raises whatever its back end does
        for block, forward in zip(parts, before, strict=True):
            del block.forward  # the class's own shows again
            if forward:
                block.forward = forward
        if head is not None:
            head.compiled_loss = None
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if sharded:
            raise UserError(
                f"torch.compile does not work here ({lines[0][:120]}); start with --compile=False"
            ) from None
        return function, f"torch.compile does not work here ({lines[0][:120]}); running without it"
    return compiled, ""
