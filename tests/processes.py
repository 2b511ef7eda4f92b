"""Multi-process training with processes started once for many runs: `python -m tests.processes JOBS.json`.

Processes are forked after torch is imported, which saves seconds per start. The ranks of a job rendezvous as
under torchrun, run train.main, and write their outcome to files next to the job list.
"""

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from nanogpt import ROOT


@dataclass(frozen=True)
class Job:
    name: str
    processes: int
    options: list[str]  # options of train.py except --out_dir
    resumes: str = ""  # name of the job whose folder is copied first
    slow: int = -1  # rank whose forward passes take 20 ms longer
    prepare: str = ""  # MODULE:FUNCTION to call first in each process
    program: str = "train"  # or eval, of the folder of `resumes`


def run(folder: Path, jobs: list[Job], timeout_s: float = 170) -> None:
    """Run the jobs one after another in `folder`/NAME; output goes to NAME.log."""
    listing = folder / "jobs.json"
    listing.write_text(json.dumps([asdict(job) for job in jobs]), encoding="utf-8")
    command = [sys.executable, "-m", "tests.processes", str(listing)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr


def said(folder: Path, name: str) -> str:
    """Return the stdout and stderr of rank 0 of a job."""
    return (folder / f"{name}.log").read_text(encoding="utf-8")


def peaks(folder: Path, name: str) -> list[int]:
    """Return the peak memory of each rank of a job in bytes."""
    return [int(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{name}.peak*"))]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def one(rank: int, job: Job, port: int, folder: Path) -> None:
    """Run a job on one rank."""
    import torch

    import train
    from nanogpt import runtime
    from nanogpt.config import load
    from nanogpt.distributed import layout
    from nanogpt.model import GPT

    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.processes, "LOCAL_WORLD_SIZE": job.processes}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    runtime.NATIVE_BFLOAT16 = ()  # keeps float32 runs in float32 on any machine
    layout.TURN = 1000  # makes an exchange take several rounds
    if rank == job.slow:
        forward = GPT.forward
        GPT.forward = lambda *inputs: time.sleep(0.02) or forward(*inputs)
    if job.prepare:
        module, _, name = job.prepare.partition(":")
        getattr(importlib.import_module(module), name)()
    log = open(folder / (f"{job.name}.log" + f".{rank}" * bool(rank)), "w", encoding="utf-8")  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        if job.program == "eval":
            sys.argv = ["eval.py", *job.options, f"--out_dir={folder / job.name}"]
            importlib.import_module("eval").program()
        else:
            train.main(*load(train.Config, [*job.options, f"--out_dir={folder / job.name}"]))
    finally:
        sys.stdout.flush()
    status = Path("/proc/self/status")
    if status.exists():
        peak = int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) * 1024
        (folder / f"{job.name}.peak{rank}").write_text(str(peak), encoding="utf-8")


def main(listing: Path) -> None:
    # imported before forking, so that modules load once
    import torch._dynamo  # needed by DDP and FSDP; takes 1 to 4 seconds to import
    import torch.distributed.fsdp  # noqa: F401

    import train  # noqa: F401

    for about in json.loads(listing.read_text(encoding="utf-8")):
        job, folder, port = Job(**about), listing.parent, free_port()
        if job.resumes:
            shutil.copytree(folder / job.resumes, folder / job.name)
        children = []
        for rank in range(job.processes):
            child = os.fork()
            if not child:
                try:
                    one(rank, job, port, folder)
                except BaseException:
                    traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]
        if any(codes):
            print(f"{job.name}: {codes}\n{said(folder, job.name)}", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
