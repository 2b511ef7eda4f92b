"""The parts of benchmarks/gpu.py that run both train.py; each writes results as they become available.

python -m benchmarks.gpu_parts NAME about.json answer.json      # started by benchmarks/gpu.py
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import gpu_chip
from benchmarks.gpu_sides import (
    Blocks,
    Failed,
    Lines,
    Setup,
    Side,
    environment,
    figure,
    in_turn,
    started,
)
from benchmarks.shared import exact_loss
from nanogpt.data import loader
from nanogpt.errors import UserError

TARGET = 1.4697  # nanoGPT's published validation loss of its character preset
SIZES = {  # name: layers, heads, channels, our micro-batch (480 sequences per iteration)
    "124M": (12, 12, 768, 60),
    "350M": (24, 16, 1024, 30),
}
TINY = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=32"
WITHOUT = "torch.compile failed"  # printed by our train.py
QUIET = "--wandb_log=False --log_interval=1 --eval_iters=1 --eval_interval=1000000"


def machine_options(setup: Setup) -> list[str]:
    if setup.device == "cuda":
        return ["--device=cuda", "--dtype=bfloat16", f"--compile={setup.compile}"]
    return [f"--device={setup.device}", "--dtype=float32", "--compile=False"]


def random_tokens(setup: Setup) -> Path:
    """Write a dataset of random GPT-2 tokens, readable by both sides."""
    folder = Path(setup.scratch, "random")
    folder.mkdir(exist_ok=True)
    ids = np.random.default_rng(1337).integers(50257, size=20_000 if setup.tiny else 8_000_000)
    for split, part in (("train", ids[: len(ids) * 9 // 10]), ("val", ids[len(ids) * 9 // 10 :])):
        part.astype("<u2").tofile(folder / f"{split}.bin")
    return folder


def gpt2_options(setup: Setup, size: str) -> tuple[list[str], list[str], int]:
    """Return nanoGPT's options, ours, and the tokens per iteration, equal for both."""
    layers, heads, channels, rows = SIZES[size]
    sequences, theirs = 480, setup.their_batch
    shape = f"--n_layer={layers} --n_head={heads} --n_embd={channels} --block_size=1024"
    length = 1024
    if setup.tiny:
        shape, sequences, theirs, rows, length = TINY, 8, 2, 4, 32
    if sequences % theirs:
        raise UserError(f"--their_batch={theirs} does not divide the {sequences} sequences per iteration")
    usual = [*shape.split(), *QUIET.split(), *machine_options(setup), f"--dataset={random_tokens(setup)}"]
    both = [
        [*usual, f"--batch_size={n}", f"--gradient_accumulation_steps={sequences // n}"]
        for n in (theirs, rows)
    ]
    return both[0], [*both[1], *setup.options.split()], sequences * length


def train(setup: Setup, size: str) -> dict[str, Any]:
    """Measure tokens/s of both sides with GPT-2's preset, alternating."""
    theirs, ours, tokens = gpt2_options(setup, size)
    programs = {"theirs": (setup.theirs(), theirs), "ours": (setup.ours(), ours)}
    sides: dict[str, Side] = {}
    found: dict[str, Any] = {"figures": []}
    try:
        for name, (program, options) in programs.items():
            env = environment(Path(setup.cache, f"{name}-{size}"))
            given = [*options, f"--out_dir={setup.scratch}/{name}"]
            sides[name] = Side(name, program, given, env, setup.scratch)
        first = started(sides, setup, settle=2 if setup.tiny else 3)
        Path(setup.cache, f"{size}-is-warm").touch()
        found["said"] = {name: side.said("attention: ", "machine: ", WITHOUT) for name, side in sides.items()}
        note = (
            f"{tokens:,} tokens per iteration, micro-batches {theirs[-2].split('=')[1]} and "
            f"{ours[len(theirs) - 2].split('=')[1]}"
        ) + "; OURS WAS NOT COMPILED" * any(WITHOUT in line for line in found["said"]["ours"])
        cold = figure(
            f"{size} compiled, s to the first step, cold",
            *[first[name][0] for name in ("ours", "theirs")],
            note="both sides concurrently; from process start to the end of the first iteration",
            lower_is_better=True,
        )
        found["figures"] = [cold] if setup.compile else []

        def write(took: Blocks) -> None:
            found["figures"] = [speed_of(f"{size}, tokens/s", took, tokens, note), *[cold] * setup.compile]
            found["seconds_of"] = took
            setup.write(found)

        setup.write(found)
        in_turn(sides, setup, {name: iteration for name, (_, iteration) in first.items()}, write)
    finally:
        for side in sides.values():
            side.close()
    return found


def speed_of(what: str, took: Blocks, tokens: int, note: str) -> dict[str, Any]:
    """Return the median speed over blocks, with the ratio of each pair of blocks in the note."""
    speed = {name: [tokens / float(np.median(block)) for block in blocks] for name, blocks in took.items()}
    pairs = " ".join(f"{a / b:.2f}" for a, b in zip(speed["ours"], speed["theirs"], strict=False))
    seconds = " and ".join(f"{sum(map(sum, took[name])):.0f}" for name in ("theirs", "ours"))
    middle = [float(np.median(speed[name])) for name in ("ours", "theirs")]
    return figure(what, *middle, note=f"{note}; {seconds} s in blocks whose ratios are {pairs}")


def compiled(setup: Setup) -> dict[str, Any]:
    """Measure the time from process start to the end of the first iteration with a warm compile cache (of
    train124; if it has not run, a cold start is measured first), and ours with --compile=blocks."""
    if not setup.compile:
        raise UserError("--compile=False: this part measures compilation; omit it")
    theirs, ours, _ = gpt2_options(setup, "124M")
    blocks = [*ours, *([] if setup.tiny else ["--compile=blocks"])]
    found: dict[str, Any] = {"figures": []}

    def first(name: str, program: Path, options: list[str]) -> float:
        once = [*options, "--gradient_accumulation_steps=1", f"--out_dir={setup.scratch}/{name}"]
        command = [sys.executable, str(program), *once]
        side = Lines(
            command, program.parent, environment(Path(setup.cache, name)), Path(setup.scratch, f"{name}.txt")
        )
        try:
            return side.until("iter 0:", setup.left)
        finally:
            side.close()

    def add(what: str, mine: float, other: float | None = None) -> None:
        found["figures"].append(figure(what, mine, other, lower_is_better=True))
        setup.write(found)

    sides = [("ours-124M", setup.ours(), ours), ("theirs-124M", setup.theirs(), theirs)]
    if not Path(setup.cache, "124M-is-warm").exists():
        add("124M compiled, s to the first step, cold", *[first(*side) for side in sides])
    add("124M compiled, s to the first step, warm", *[first(*side) for side in sides])
    for state in ("cold", "warm"):
        add(
            f"124M compiled by blocks, s to the first step, {state}",
            first("blocks-124M", setup.ours(), blocks),
        )
    return found


# ----------------------------------------------------------------------------- runs to a loss


def kept_checkpoints(
    setup: Setup, name: str, program: Path, options: list[str], limit: float
) -> tuple[float, dict[float, Path]]:
    """Run `program` for at most `limit` seconds. Return its seconds, and copies of its checkpoints by
    completion time in seconds after process start."""
    copies = Path(setup.scratch, f"{name}-copies")
    copies.mkdir()
    watcher, started = Path(__file__).with_name("watched.py"), time.time()
    watch = [sys.executable, str(watcher), "checkpoints", str(started), str(copies), "1337"]
    command = [*watch, str(program)]
    log = Path(setup.scratch, f"{name}.txt")
    env = environment(Path(setup.scratch, f"{name}-cache"))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *options, f"--out_dir={setup.scratch}/{name}"],
            cwd=program.parent,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(timeout=max(1.0, limit))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = 0
    took = time.time() - started
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if code:
        raise Failed(f"{name} exited with {code}: {lines[-1][:300] if lines else ''}")
    whole = sorted((float(path.name), path) for path in copies.iterdir())
    return took, dict(whole[:-1] if took >= limit else whole)  # the last copy may be partial


def shakespeare(setup: Setup) -> dict[str, Any]:
    """Run the character preset; measure the time to a checkpoint with loss 1.4697, and the lowest loss."""
    folder = Path(setup.checkout, "data", "shakespeare_char")
    if not (folder / "train.bin").is_file():
        raise UserError(f"{folder} is not prepared: run its prepare.py")
    val, preset = loader.load(folder).val, "config/train_shakespeare_char.py"
    target, small, machine = TARGET, [], ["--device=cuda"]
    if setup.tiny:
        target = 4.0
        small = [*TINY.split(), "--batch_size=4", "--max_iters=20", "--eval_interval=5", "--eval_iters=2"]
        machine = machine_options(setup)
    runs: dict[str, tuple[Path, list[str]]] = {
        "ours": (
            setup.ours(),
            [preset, f"--dataset={folder}", *setup.options.split()],
        ),
        "ours-graph": (
            setup.ours(),
            [preset, f"--dataset={folder}", "--cuda_graph=True", "--compile=False"],
        ),
        "theirs": (
            setup.theirs(),
            [preset, "--dataset=shakespeare_char", *["--compile=False"] * (not setup.compile)],
        ),
    }
    if setup.device != "cuda":
        del runs["ours-graph"]
    found: dict[str, Any] = {"figures": [], "runs": {}, "errors": []}
    reached: dict[str, float | str] = {}
    lowest: dict[str, float | None] = {}
    for number, (name, (program, options)) in enumerate(runs.items()):
        share = setup.left * (0.25 if name != "theirs" else 0.85) if number else setup.left * 0.3
        given = [*options, "--log_interval=1000", *machine, *small]
        try:
            took, copies = kept_checkpoints(setup, name, program, given, share)
            losses = {at: exact_loss(path, val, setup.device) for at, path in copies.items()}
        except Failed as error:
            found["errors"].append(str(error))
            setup.write(found)
            continue
        found["runs"][name] = {"seconds": took, "losses": losses}
        at_target = min((at for at, loss in losses.items() if loss <= target), default=None)
        reached[name] = f"not within {took:.0f} s" if at_target is None else at_target
        lowest[name] = min(losses.values(), default=None)
        theirs = {"lower_is_better": True, "note": "nanoGPT's run hit the time limit" * (took >= share)}
        found["figures"] = [
            figure("shakespeare_char, s to 1.4697", reached.get("ours"), reached.get("theirs"), **theirs),
            figure("shakespeare_char, lowest loss", lowest.get("ours"), lowest.get("theirs"), **theirs),
        ]
        if "ours-graph" in reached:
            what = "shakespeare_char with --cuda_graph, s to 1.4697"
            found["figures"].append(figure(what, reached["ours-graph"]))
        setup.write(found)
    return found


def mini_owt(setup: Setup) -> dict[str, Any]:
    """Measure the steps to nanoGPT's loss after 30M tokens (GPT-2 124M, batches of 65,536 tokens), with our
    schedule at 2/5 of its steps, then at 2/3 if that did not suffice."""
    source = Path(setup.tokens or Path(setup.checkout, "data", "mini_owt", "train.bin"))
    if not source.is_file():
        raise UserError("mini_owt needs a file of GPT-2 tokens: give --tokens=FILE.bin, raw uint16")
    ids = np.fromfile(source, dtype="<u2", count=(40 << 20) // 2)
    if setup.tiny:
        ids = ids[:40_000]
    folder = Path(setup.scratch, "mini_owt")
    held = min(len(ids) // 20, 262_144)
    folder.mkdir()
    ids[:-held].tofile(folder / "train.bin")
    ids[-held:].tofile(folder / "val.bin")
    steps, rows, shape = 458, ["--batch_size=16", "--gradient_accumulation_steps=4"], []
    if setup.tiny:
        steps, rows, shape = 10, ["--batch_size=2", "--gradient_accumulation_steps=2"], TINY.split()
    usual = ["--wandb_log=False", f"--dataset={folder}", *rows, *shape, *machine_options(setup)]
    schedule = [f"--max_iters={steps}", f"--lr_decay_iters={steps}", f"--warmup_iters={steps // 10}"]
    last = [f"--eval_interval={steps}", "--eval_iters=1", "--log_interval=100"]
    share = setup.left * 0.5
    _, copies = kept_checkpoints(setup, "theirs", setup.theirs(), [*usual, *schedule, *last], share)
    if not copies:
        raise Failed(f"nanoGPT did not reach step {steps} in {share:.0f} s; increase --minutes")
    target = exact_loss(list(copies.values())[-1], loader.load(folder).val, setup.device)
    found: dict[str, Any] = {"figures": [], "their_loss": target, "their_steps": steps, "losses": {}}
    what = "mini_owt, steps to nanoGPT's loss"
    for length in (steps * 2 // 5, steps * 2 // 3):
        losses = found["losses"][f"of {length}"] = {}
        for at, loss in losses_of(setup, usual, length, every=2 if setup.tiny else 20):
            losses[at] = loss
            reached = min((at for at, loss in losses.items() if loss <= target), default=None)
            note = (
                f"nanoGPT's loss after {steps} steps: {target:.4f}; ours with a schedule of {length} steps: "
                f"{loss:.4f} after {at}"
            )
            shown = f"not within {at}" if reached is None else reached
            found["figures"] = [figure(what, shown, steps, note=note, lower_is_better=True)]
            setup.write(found)
            if reached is not None:
                return found
    return found


def losses_of(setup: Setup, usual: list[str], length: int, every: int) -> Iterator[tuple[int, float]]:
    """Run ours for `length` steps; yield (step, loss on the full validation split) at each evaluation."""
    program, name = setup.ours(), f"ours-{length}"
    how = [f"--max_iters={length}", f"--eval_interval={every}", "--eval_iters=100000", "--log_interval=100"]
    given = [*how, *setup.options.split(), f"--out_dir={setup.scratch}/{name}", "--overwrite"]
    command = [sys.executable, str(program), "config/train_gpt2_fast.py", *usual, *given]
    env = environment(Path(setup.scratch, "ours-cache"))
    side, at = Lines(command, program.parent, env, Path(setup.scratch, f"{name}.txt")), -1
    try:
        while at < length:
            line = side.next(setup.left)
            if line.startswith("step ") and " val loss " in line:
                at = int(line.split()[1].rstrip(":"))
                yield at, float(line.split(" val loss ")[1].split()[0])
    finally:
        side.close()


PARTS: dict[str, Callable[[Setup], dict[str, Any]]] = {
    "chip": gpu_chip.chip,
    "train124": lambda setup: train(setup, "124M"),
    "train350": lambda setup: train(setup, "350M"),
    "compile": compiled,
    "shakespeare": shakespeare,
    "decode": gpu_chip.decode,
    "checkpoint": gpu_chip.stall,
    "mini_owt": mini_owt,
    "options": gpu_chip.options,
    "profile": gpu_chip.profile,
}


def main(name: str, about: str, answer: str) -> None:
    setup = Setup(json.loads(Path(about).read_text(encoding="utf-8")), Path(answer), time.monotonic())
    try:
        setup.write(PARTS[name](setup))
    except (Failed, UserError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
