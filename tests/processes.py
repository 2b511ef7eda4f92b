"""Training in several processes that are started once for many runs: `python -m tests.processes JOBS.json`.

The processes are forked when torch is there, which takes a start from seconds to nothing. Those of a job find
one another as torchrun would let them, run train.main, and say in files beside the listing how it ended.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from nanogpt import ROOT


@dataclass(frozen=True)
class Job:
    name: str
    processes: int
    options: list[str]  # of train.py, but --out_dir
    resumes: str = ""  # the job whose folder is copied before


def run(folder: Path, jobs: list[Job], timeout_s: float = 170) -> None:
    """Train as each job says, one after the other, in `folder`/NAME; what it said is in NAME.log."""
    listing = folder / "jobs.json"
    listing.write_text(json.dumps([asdict(job) for job in jobs]), encoding="utf-8")
    command = [sys.executable, "-m", "tests.processes", str(listing)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr


def said(folder: Path, name: str) -> str:
    """What the first process of a job printed, on both streams."""
    return (folder / f"{name}.log").read_text(encoding="utf-8")


def peaks(folder: Path, name: str) -> list[int]:
    """The largest memory of each process of a job, in bytes."""
    return [int(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{name}.peak*"))]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def one(rank: int, job: Job, port: int, folder: Path) -> None:
    """What a process does of a job."""
    import torch

    import train
    from nanogpt import runtime
    from nanogpt.config import load
    from nanogpt.distributed import layout

    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.processes, "LOCAL_WORLD_SIZE": job.processes}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    runtime.NATIVE_BFLOAT16 = ()  # so that float32 runs are float32 throughout, on any machine
    layout.TURN = 1000  # so that an exchange takes several turns
    log = open(folder / (f"{job.name}.log" + f".{rank}" * bool(rank)), "w", encoding="utf-8")  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        train.main(*load(train.Config, [*job.options, f"--out_dir={folder / job.name}"]))
    finally:
        sys.stdout.flush()
    status = Path("/proc/self/status")
    if status.exists():
        peak = int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) * 1024
        (folder / f"{job.name}.peak{rank}").write_text(str(peak), encoding="utf-8")


def main(listing: Path) -> None:
    # before the processes part, so that they are read once
    import torch._dynamo  # DDP and FSDP want it, for 1 to 4 seconds each time
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
