"""Data parallelism (ddp, fsdp, hsdp) and the order in which it wraps a model.

The steps, in this order:

1. `lay_out`, before the optimizer is built. fsdp and hsdp shard the parameters in place (FSDP2's fully_shard:
   one unit per block, and one for the rest), so the optimizer sees shards only, and a model larger than a
   device is never materialized on one. ddp leaves the model as it is.
2. `in_dtype`: mixed precision. Under fsdp and hsdp it is the units' policy, so weights are gathered in the
   narrow dtype.
3. `compile.checkpoint_activations`: per block, inside the hooks of its FSDP unit, which gathers
   the weights again for the backward pass.
4. `compile.train_function`: torch.compile of the whole function or of each block, outside the checkpointing,
   so that the compiler sees it, and inside the FSDP hooks: weights are gathered outside of compiled code.
5. `connect`: DDP around the compiled function, so that its parameter hooks see complete gradients. It wraps
   the function before the first call compiles it. A switch enables gradient synchronization for the last
   micro-batch of a step only.

Only this module and layout.py depend on the kind of parallelism.
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
from nanogpt.distributed.step_times import StepTimes
from nanogpt.errors import UserError
from nanogpt.finetune import lora
from nanogpt.loss import IGNORE
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import Layout, is_for_muon
from nanogpt.options import OptimizerOptions
from nanogpt.runtime import DTYPES, Machine
from nanogpt.world import World

Batch = TypeVar("Batch")

ROOM = 0.8  # fraction of device memory for weights, gradients and optimizer state; the rest: activations


@dataclass(frozen=True)
class Division:
    """Sharding of a model over ranks."""

    mode: str = "ddp"
    shard_size: int = 1  # ranks that share one copy of the weights
    why: str = ""  # one-line reason; "" for a single process

    @property
    def whole(self) -> bool:
        """Return whether every rank holds the whole model."""
        return self.mode == "ddp"


def choose(asked: str, shard_size: int, world: World, weights: int, optimizer: int, memory: int) -> Division:
    """Resolve --parallel. "auto" chooses ddp if weights and gradients (`weights` bytes each) and this rank's
    share of the optimizer state (`optimizer` bytes in all) fit in a device of `memory` bytes. Raise UserError
    if `shard_size` does not divide the world size."""
    if world.size == 1:
        return Division()
    on_a_node = shard_size or world.on_node
    if asked == "hsdp" and (world.size % on_a_node or on_a_node in (1, world.size)):
        raise UserError(
            f"--parallel=hsdp: invalid sharding group size {on_a_node} for {world.size} ranks; "
            + (f"--shard_size may be {_divisors(world.size)}" if _divisors(world.size) else "use fsdp or ddp")
        )
    need = 2 * weights + optimizer // world.size
    fits = need <= ROOM * memory
    mode, why = asked, "as asked"
    if asked == "auto":
        several = 1 < on_a_node < world.size and not world.size % on_a_node
        mode = "ddp" if fits else "hsdp" if several else "fsdp"
        why = (
            f"weights, gradients and 1/{world.size} of the optimizer state take {need / 1e9:.3g} GB, "
            f"{'less' if fits else 'more'} than {ROOM:.0%} of the {memory / 1e9:.3g} GB of device memory"
        )
    size = {"ddp": 1, "fsdp": world.size, "hsdp": on_a_node}[mode]
    copies = f", {world.size // size} replicas of {size} ranks each" if mode == "hsdp" else ""
    return Division(mode, size, f"{mode}{copies}: {why}")


def divide(
    shape: GPTConfig, rules: OptimizerOptions, asked: str, shard_size: int, machine: Machine
) -> Division:
    """Choose the sharding of a model of `shape` by --parallel and --shard_size (see `choose`)."""
    with torch.device("meta"):
        named = list(GPT(shape).named_parameters())
    weights = sum(p.nbytes for _, p in named)
    to_muon = sum(p.nbytes for n, p in named if rules.optimizer == "muon" and is_for_muon(n, p))
    optimizer = 2 * weights - to_muon  # AdamW keeps two values per parameter, Muon one
    return choose(asked, shard_size, machine.world, weights, optimizer, device_memory(machine))


def gather_model(model: GPT, layout: Layout, lora_config: dict[str, Any] | None) -> GPT | None:
    """Gather a sharded model: return an unsharded copy on rank 0, None elsewhere. Collective."""
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
    """Return the memory in bytes per rank: that of its GPU, or its share of the host memory."""
    if machine.device.type == "cuda":
        return torch.cuda.mem_get_info(machine.device)[1]
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:  # Windows
        return 1 << 62
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // machine.world.on_node


def lay_out(model: GPT, machine: Machine, division: Division) -> Layout:
    """Shard `model` (fsdp, hsdp: in place, moving it to the device); return its layout."""
    world = machine.world
    if world.size == 1:
        return Layout()
    if division.mode == "ddp":
        return Replicated(world)
    # imported here: they take 0.1 s, and most runs do not need them
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    shard_size = division.shard_size
    shape, names = (world.size // shard_size, shard_size), ("replicate", "shard")
    skip = division.mode == "fsdp"  # 1-D mesh: no replicate dimension
    mesh = init_device_mesh(machine.device.type, shape[skip:], mesh_dim_names=names[skip:])
    in_blocks, outside = _policies(machine)
    for unit in [*model.h, model]:
        fully_shard(unit, mesh=mesh, mp_policy=outside if unit is model else in_blocks)
        assert isinstance(unit, FSDPModule)
        if machine.device.type == "cpu":
            unit.set_force_sum_reduction_for_comms(True)  # gloo has sum, but no mean
    return Sharded(world, mesh["shard"].get_group(), shard_size)


def _policies(machine: Machine) -> tuple[Any, Any]:
    """Return the FSDP mixed-precision policies (of blocks, of the rest), equivalent to Machine.in_dtype.

    Where that casts weights, everything runs in the narrow dtype; otherwise under autocast. On a GPU the
    weights of blocks are then cast before they are gathered, as autocast would cast nearly all of them; not
    on a CPU, where autocast would give norms inputs of mixed dtypes. Gradients are reduced in float32.
    """
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
    """Return Machine.in_dtype(model); for a sharded model, casting weights is left to its FSDP units."""
    return model if is_sharded(model) and machine.casts_weights else machine.in_dtype(model)


def sharded_scaler(machine: Machine) -> torch.amp.GradScaler:
    """Return a GradScaler for float16 whose overflow check is all-reduced over gradient shards."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    return ShardedGradScaler(machine.device.type, process_group=dist.group.WORLD)


def micro_batches(
    batches: TrainBatches, world: World, function: Function, step: int
) -> Iterator[tuple[float | Tensor, tuple[Tensor, ...]]]:
    """Yield (loss weight, batch) for this rank's micro-batches of iteration `step`.

    Weights are multiplied by the world size, because gradients are averaged over ranks. All ranks run the
    same number of passes, because those of a sharded model are collective: a rank with one micro-batch fewer
    runs a dummy row with weight 0.
    """
    sequences, targets = batches.sequences(step), responses.count_targets(batches, step)
    left, made = world.share(sequences)[1], 0
    largest = -(-sequences // world.size)
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
        if isinstance(function, Connected):  # average in the last pass only; its forward reads the switch
            function.switch(following is None)
        weight: float | Tensor = counted / sequences
        if targets:  # with no scored target the weight is 0: a mean over nothing is NaN
            idx, wanted, *documents = batch
            scored = wanted != IGNORE
            weight = scored[:counted].sum() / targets
            batch = idx, torch.where(scored.any(), wanted, 0), *documents
        yield weight * world.size, batch
        world.report_phase(step, "reading data")
        batch = following
    world.report_phase(step, "updating")
    if isinstance(function, Connected):
        function.finish()


def step_of_all(step: Function, run: Any, log: Any = None) -> Function:
    """Wrap the step of `run` so that it returns the loss averaged over all ranks. On rank 0, `log` receives a
    row of event "ranks" with the time of each rank now and then (StepTimes)."""
    world, progress = run.machine.world, run.progress

    def write(**values: Any) -> None:
        log.write("ranks", progress.iter_num, run.batches.tokens_before(progress.iter_num + 1), **values)

    times = StepTimes(world, run.machine.device, write if log and world.is_main_process else None)

    def step_together(function: Function, *given: Any) -> tuple[Tensor, Tensor]:
        loss, grad_norm = step(times.timed(function), *given)
        times.end_step()
        return world.sum(loss) / world.size, grad_norm

    return step_together


def in_step(
    model: object, batches: Iterable[Batch], world: World, stopped: Callable[[], bool]
) -> Iterator[Batch | None]:
    """Yield `batches` until `stopped`. For a sharded model, ranks that run out of batches yield None until
    all ranks are done, so that all yield the same number."""
    source, alone = iter(batches), not is_sharded(model)
    while (batch := next(source, None)) is not None or not alone:
        over = stopped() if alone else world.any_rank(stopped()) or not world.any_rank(batch is not None)
        if over:
            return
        yield batch


class Connected:
    """Wraps a function whose backward pass averages gradients over ranks while its switch is on; `finish`,
    called after the last pass of a step, averages those that it leaves out.

    `inside.function` is the function without averaging; compile.py replaces it.
    """

    def __init__(
        self,
        function: Function,
        switch: Callable[[bool], None],
        inside: "_Calls | None" = None,
        finish: Callable[[], None] = lambda: None,
    ):
        self.function, self.switch, self.finish = function, switch, finish
        self.inside = inside or self

    def __call__(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def connect(model: nn.Module, machine: Machine) -> Connected:
    """Return the forward function of `model` in its dtype, whose backward pass averages gradients over all
    ranks."""
    function = in_dtype(model, machine)
    if is_sharded(model):
        units: Any = model

        def switch_units(on: bool) -> None:
            units.set_requires_gradient_sync(on)
            units.set_is_last_backward(on)

        return Connected(function, switch_units)
    on_device = [machine.device] if machine.device.type == "cuda" else None
    tables = getattr(model, "ngrams", None)
    apart = tables.weight if tables is not None and tables.sparse else None
    calls = _Calls(function, model, apart)
    ddp = DistributedDataParallel(
        calls,
        device_ids=on_device,
        gradient_as_bucket_view=True,  # avoids a second copy of the gradients
    )

    def switch_ddp(on: bool) -> None:
        ddp.require_backward_grad_sync = on

    def average_tables() -> None:
        if apart is not None and apart.requires_grad:
            Replicated(machine.world).average_rows(apart)

    switch_ddp(False)  # no collectives while compiling, which may fail on one rank only
    return Connected(ddp, switch_ddp, calls, average_tables)


class _Calls(nn.Module):
    """Wraps a function as a module that owns its parameters, as DistributedDataParallel requires.

    It has neither the parameter `apart` nor buffers: DDP would broadcast them before each
    pass, but they are position tables, equal on all ranks.
    """

    def __init__(self, function: Function, model: nn.Module, apart: Tensor | None):
        super().__init__()
        self.owned = nn.ParameterList(p for p in model.parameters() if p is not apart)
        self.function = lambda *inputs: function(*inputs)  # a module would be registered, with its buffers

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)
