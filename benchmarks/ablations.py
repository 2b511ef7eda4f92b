"""What each ingredient of the fast recipe is worth: left out of it, and put into GPT-2's.

    python -m benchmarks.ablations --out=docs/ablations.md

Every line is `--seeds` runs of train.py as it is, at the size and length of the CPU preset, each scored on
the whole validation split in float32. Time is processor time of whole runs on one thread, imports and all,
so that other processes on the machine count little. The page is written by this program, all of it.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks import table
from benchmarks.exact import exact_loss
from nanogpt import data, files
from nanogpt.config import ROOT, Positive, load
from nanogpt.errors import UserError, run_program

PRESET = "config/train_shakespeare_char_cpu.py"

ADAMW = "--optimizer=adamw --weight_decay=0.1 --grad_clip=1"
COSINE = "--lr_schedule=cosine --warmup_iters=10"
# nanoGPT's model and optimizer, at the preset's length
GPT2 = (
    "--position=learned --activation=gelu --tied=True --softcap=0 --smear=False --init=gpt2 "
    f"{ADAMW} --learning_rate=0.001 --beta2=0.99 {COSINE} --min_lr=0.0001"
)

# Each ingredient: what leaves it out of the preset. The opposite is the preset's own value.
LEFT_OUT = {
    "Muon (AdamW at 0.004 instead)": f"{ADAMW} --learning_rate=0.004",
    "Muon (AdamW at 0.001 instead)": f"{ADAMW} --learning_rate=0.001",
    "linear decay to zero (cosine to a tenth, 10 warm-up steps)": f"{COSINE} --min_lr=0.002",
    "rotary positions (learned ones)": "--position=learned",
    "smear": "--smear=False",
    "projections that begin at zero (GPT-2's initialisation)": "--init=gpt2",
    "projections that begin at zero (scaled by depth)": "--init=depth",
    "head of its own (tied)": "--tied=True",
    "soft cap": "--softcap=0",
    "ReLU² (GELU)": "--activation=gelu",
    "bfloat16 (float32)": "--dtype=float32",
    "three turns of Muon (five)": "--muon_turns=5",
}
ADDED = {
    "QK-norm": "--qk_norm=True",
    "RMSNorm without gains": "--norm=rms",
    "SwiGLU": "--activation=swiglu",
    "ALiBi": "--position=alibi",
    "two heads of keys and values": "--n_kv_head=2",
    "weight decay of Muon 0.1": "--muon_weight_decay=0.1",
    "a batch that grows over a third of the run": "--batch_ramp_tokens=55000 --batch_ramp_start=0.25",
}
ADDED_TO_GPT2 = {
    "rates of 0.004": "--learning_rate=0.004 --min_lr=0.0004",
    "linear decay to zero, no warm-up": "--lr_schedule=wsd --lr_cooldown=0.7 --warmup_iters=0 --min_lr=0",
    "Muon": "--optimizer=muon --muon_lr=0.03 --grad_clip=0",
    "rotary positions": "--position=rope",
    "smear": "--smear=True",
    "projections that begin at zero": "--init=zero",
    "initialisation scaled by depth": "--init=depth",
    "head of its own": "--tied=False",
    "soft cap 15": "--softcap=15",
    "ReLU²": "--activation=relu2",
}


@dataclass(frozen=True)
class Config:
    dataset: str = "shakespeare_char"  # must be prepared
    seeds: Positive = 4  # runs of each line
    out: str = ""  # the page to write; nothing: print it


@dataclass(frozen=True)
class Line:
    name: str
    losses: np.ndarray
    cpu_s: float  # median

    def cells(self, base: "Line") -> list[str]:
        error = np.hypot(_error(self.losses), _error(base.losses))
        change = self.losses.mean() - base.losses.mean()
        return [
            self.name,
            f"{self.losses.mean():.4f}",
            f"{self.losses.min():.4f} to {self.losses.max():.4f}",
            "" if self is base else f"{change:+.4f} ± {error:.4f}",
            f"{self.cpu_s / base.cpu_s:.2f}",
        ]


def _error(losses: np.ndarray) -> float:
    return float(losses.std(ddof=1) / len(losses) ** 0.5) if len(losses) > 1 else 0.0


def main(config: Config) -> None:
    """Run everything and write the page. Raises UserError if the data is not prepared or a run fails."""
    folder = data.find(config.dataset, ROOT)
    total = 2 + len(LEFT_OUT) + len(ADDED) + len(ADDED_TO_GPT2)
    with tqdm(total=total * config.seeds, unit="run", disable=None) as bar:

        def measured(name: str, *options: str) -> Line:
            return measure(name, " ".join(options).split(), folder, config.seeds, bar)

        fast, plain = measured("**the preset**"), measured("**GPT-2's block, AdamW, cosine**", GPT2)
        left_out = [measured(f"without {name}", options) for name, options in LEFT_OUT.items()]
        added = [measured(f"with {name}", options) for name, options in ADDED.items()]
        grown = [measured(f"with {name}", GPT2, options) for name, options in ADDED_TO_GPT2.items()]
    header = ["", "validation loss", "from, to", "change", "time"]
    text = page(config.seeds).format(
        first=table.markdown(header, [line.cells(fast) for line in [fast, *left_out]]),
        second=table.markdown(header, [line.cells(fast) for line in [fast, *added]]),
        third=table.markdown(header, [line.cells(plain) for line in [plain, *grown]]),
    )
    if config.out:
        files.write_text(Path(config.out), text)
    else:
        print(text)


def measure(name: str, options: list[str], folder: Path, seeds: int, bar: tqdm) -> Line:
    losses, cpu_s = [], []
    for seed in range(1337, 1337 + seeds):
        bar.set_description(name[:40])
        loss, took_s = run(
            [*options, f"--dataset={folder.resolve()}", f"--seed={seed}"], data.load(folder).val
        )
        losses.append(loss)
        cpu_s.append(took_s)
        bar.update()
    return Line(name, np.array(losses), float(np.median(cpu_s)))


def run(options: list[str], val: data.Tokens) -> tuple[float, float]:
    """One run of train.py on one thread: its exact final loss, and its seconds of processor time."""
    with tempfile.TemporaryDirectory() as out:
        before = os.times()
        ended = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), PRESET, *options, f"--out_dir={out}/run"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        after = os.times()
        if ended.returncode:
            raise UserError(
                f"train.py {' '.join(options)} ended with {ended.returncode}: {ended.stderr[-500:]}"
            )
        last = max(Path(out, "run").glob("step-*"))
        took_s = after.children_user + after.children_system - before.children_user - before.children_system
        return exact_loss(last, val), took_s


def page(seeds: int) -> str:
    return f"""# What each ingredient is worth

Made by `python -m benchmarks.ablations --out=docs/ablations.md`; do not edit. {table.machine()}.

`{PRESET}` (4 layers, 128 channels, 64 characters, batches of 20, 140 updates of Tiny Shakespeare), {seeds}
seeds a line. Validation loss on the whole split, in float32; the change is that of the means, with its
standard error; time is processor time of the whole run on one thread, as a share of the first line's.
An ingredient earns its place if leaving it out costs loss, or time. All of this is a run of a few seconds:
what longer and larger ones say, and what follows, is in [results.md](results.md).

## Left out of the fast recipe

{{first}}

## Put into the fast recipe

{{second}}

## Put into GPT-2's recipe

Each alone, on nanoGPT's block, optimizer and schedule at the same length.

{{third}}
"""


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
