"""A rank of tests/test_scaling.py: bytes sent and memory used in a step, per kind of parallelism.

Bytes are the kernel's count of what this process wrote, which goes to sockets only; gloo implements
reduce-scatter as all-reduce.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from nanogpt import optim
from nanogpt.distributed import parallelize
from nanogpt.distributed.parallelize import Division
from nanogpt.distributed.world import Processes
from nanogpt.model import GPT, GPTConfig
from nanogpt.options import OptimizerOptions
from nanogpt.runtime import Machine

SHAPE = GPTConfig(vocab_size=502, block_size=32, n_layer=3, n_head=4, n_embd=64, bias=False)
MICRO_BATCHES = 2


def written() -> int:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("wchar")))


def sharded(model: GPT, mesh) -> GPT:
    for block in model.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def held(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    def size(tensor) -> int:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        return local.numel() * local.element_size()

    state = [t for some in optimizer.state.values() for name, t in some.items() if name != "step"]
    return {
        "weights": sum(map(size, model.parameters())),
        "gradients": sum(size(p.grad) for p in model.parameters()),
        "optimizer": sum(map(size, state)),
    }


def updates(size: int) -> dict[str, dict[str, int]]:
    """Return the bytes that an update sends, per optimizer and layout."""
    machine = Machine(torch.device("cpu"), "float32", "", Processes(dist.get_rank(), size, on_node=size))
    divisions = {"ddp": Division(), "fsdp": Division("fsdp", size)}
    if size == 4:
        divisions["hsdp"] = Division("hsdp", 2)
    idx = torch.randint(0, SHAPE.vocab_size, (1, SHAPE.block_size))
    found: dict[str, dict[str, int]] = {"adamw": {}, "muon": {}}
    for rule, sent in found.items():
        for mode, division in divisions.items():
            model = GPT(SHAPE)
            layout = parallelize.lay_out(model, machine, division)
            about = (model.named_parameters(), model.part_heights(), torch.float32, layout)
            optimizer = optim.build(OptimizerOptions(rule), *about)
            for _ in range(2):
                model(idx, idx)[1].backward()
                dist.barrier()
                before = written()
                optimizer.step()
                sent[mode] = written() - before
                optimizer.zero_grad()
    return found


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    models, steps = {}, {}
    models["ddp"] = GPT(SHAPE)
    replicated = DistributedDataParallel(models["ddp"], gradient_as_bucket_view=True)

    def by_ddp(last: bool):
        replicated.require_backward_grad_sync = last
        return replicated

    steps["ddp"] = by_ddp
    meshes = {"fsdp": init_device_mesh("cpu", (size,))}
    if size == 4:
        meshes["hsdp"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for mode, mesh in meshes.items():
        models[mode] = sharded(GPT(SHAPE), mesh)

        def by_fsdp(last: bool, model=models[mode]):
            model.set_requires_gradient_sync(last)
            return model

        steps[mode] = by_fsdp
    idx = torch.randint(0, SHAPE.vocab_size, (2, SHAPE.block_size))
    found = {}
    for mode, model in models.items():
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):  # the first one creates buckets and groups
            dist.barrier()
            before = written()
            for micro in range(MICRO_BATCHES):
                steps[mode](micro == MICRO_BATCHES - 1)(idx, idx)[1].backward()
            sent = written() - before
            optimizer.step()
            found[mode] = {"sent": sent, **held(model, optimizer)}
            optimizer.zero_grad()
    everything = {"torch": found, **updates(size)}
    out.with_suffix(f".{rank}").write_text(json.dumps(everything), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # FSDP's threads take a second to terminate


if __name__ == "__main__":
    main(Path(sys.argv[1]))
