"""Run train.py on the null GPU: kernels compute nothing, so everything that reads values is replaced.

The last line of the output is a JSON object: launches, Triton kernels, waits and peak memory of a step.
"""

import ctypes
import json
import os
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensor

import train
from nanogpt.config import load
from nanogpt.errors import run_program

RUNTIME, DRIVER = (ctypes.CDLL(os.environ[name]) for name in ("NULLGPU_RUNTIME", "NULLGPU_DRIVER"))
STEP = int(os.environ["NULLGPU_STEP"])  # counted from 1; the first ones allocate and compile


def main() -> None:
    tolist, isfinite, step, found = torch.Tensor.tolist, torch.isfinite, train.train_step, {"steps": 0}

    def plausible_sums(tensor: torch.Tensor) -> list:  # of an evaluation, and of whole numbers
        values = tolist(tensor)
        return [1e6, 1e7, 1e5, 10.0] if tensor.dtype == torch.float64 and tensor.shape == (4,) else values

    def finite(tensor: torch.Tensor) -> torch.Tensor:
        traced = isinstance(tensor, FakeTensor)  # by the compiler; others are weights to be saved
        return isfinite(tensor) if traced else torch.ones(1, dtype=torch.bool, device="cpu")

    def counted(*given: object) -> tuple[torch.Tensor, torch.Tensor]:
        found["steps"] += 1
        if found["steps"] == STEP:
            torch.cuda.reset_peak_memory_stats()
            RUNTIME.nullcuda_reset()
            DRIVER.nullcu_reset()
        result = step(*given)
        if found["steps"] == STEP:
            found["launches"], found["triton"] = RUNTIME.nullcuda_launches(), DRIVER.nullcu_launches()
            found["waits"] = RUNTIME.nullcuda_waits()
            found["gigabytes"] = round(torch.cuda.max_memory_allocated() / 1e9, 4)
        return result

    torch.Tensor.tolist, torch.isfinite, train.train_step = plausible_sums, finite, counted
    train.check_finite = lambda loss, grad_norm, *rest: float(loss) + float(grad_norm)
    train.main(*load(train.Config, sys.argv[1:]))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found), file=sys.stderr, flush=True)
    os._exit(0)  # unloading the stand-in is not supported


if __name__ == "__main__":
    torch.cuda.init()
    run_program(main)
