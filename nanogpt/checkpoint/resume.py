"""Resuming: saved options, overridden by those given now; what has changed; folders of earlier runs."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from nanogpt import files, metrics
from nanogpt.checkpoint import Progress, reader, steps
from nanogpt.checkpoint.reader import Checkpoint
from nanogpt.errors import UserError
from nanogpt.options import TrainOptions
from nanogpt.usage import RENAMED

# Options that a resumed run never inherits; all others come from the saved run unless given again.
NOT_INHERITED = {"init_from", "out_dir", "overwrite", "eval_only", "max_minutes"}
NOT_INHERITED |= {"rdzv_timeout_s", "hang_timeout_s", "parallel", "shard_size"}
# Options that cannot change on resume, besides the model architecture.
FIXED = {"freeze", "train_only", "lora_rank", "lora_alpha", "lora_targets"}
R = TypeVar("R", bound=TrainOptions)


def resume(
    config: R, origins: dict[str, str], shape: set[str], notices: list[str]
) -> tuple[R, Checkpoint | None]:
    """Return the resolved options and the newest checkpoint of the run in out_dir.

    With --init_from=auto and no checkpoint, return `config` and None. `shape` names the options fixed by the
    weights. Notes for the user are appended to `notices`. Raise UserError if --init_from=resume finds no
    checkpoint or an option given now contradicts the weights.
    """
    fixed = FIXED | shape
    out = Path(config.out_dir)
    resumed, damage = reader.find(out)
    if resumed is None:
        if config.init_from == "resume":
            theirs = (
                f"; for nanoGPT's ckpt.pt there use --init_from={out}" if (out / "ckpt.pt").is_file() else ""
            )
            raise UserError(
                f"no checkpoint in {out}: train first, or use --init_from=auto or scratch{theirs}"
            )
        return config, None
    notices += [f"skipped a damaged checkpoint: {line}" for line in damage]
    saved, device = resumed.state["options"], resumed.state["environment"]["device"]
    if device.startswith("cpu") and not saved.get("compile"):  # the default there; on a GPU decide again
        saved = saved | {"compile": "auto"}
    config, differing = inherit(config, origins, saved, NOT_INHERITED)
    if wrong := [f"{k}={new} given, {k}={old} saved" for k, (old, new) in differing.items() if k in fixed]:
        raise UserError(
            f"{out} holds a different model: {'; '.join(wrong)}; omit these, or choose another --out_dir"
        )
    for key, (old, new) in differing.items():
        notices.append(f"{key} = {new!r} from now on; it was {old!r} when the run was saved")
    return config, resumed


def inherit(
    config: R, origins: dict[str, str], saved: dict[str, Any], fresh: set[str]
) -> tuple[R, dict[str, tuple[Any, Any]]]:
    """Merge the `saved` options with those given now, which take precedence.

    Options in `fresh` always come from `config`. Also return (saved, given) for each option given with a
    value that differs from the saved one.
    """
    saved = {RENAMED.get(key, key): value for key, value in saved.items()}
    old = {key: value for key, value in saved.items() if key in set(vars(config)) - fresh}
    now = {key: getattr(config, key) for key in origins if key in old}
    differing = {key: (old[key], value) for key, value in now.items() if value != old[key]}
    return type(config)(**{**vars(config), **old, **now}), differing


def restore_progress(
    resumed: Checkpoint,
    config: R,
    content: dict[str, str],
    environment: dict[str, Any],
    learning_rate: Callable[[R, float], float],
    notices: list[str],
) -> Progress:
    """Return the progress of the run; append to `notices` what has changed since it was saved: the data
    (`content`: hash of each split), the learning rate, the machine.

    Losses on another validation text are not comparable, so the best one is then reset. With --minutes the
    share completed is that of the new number of minutes.
    """
    progress, saved = resumed.progress, resumed.state.get("data", content)
    if changed := [split for split in content if saved.get(split) != content[split]]:
        notices.append(f"note: the data has changed since the run was saved ({', '.join(changed)})")
    if "val" in changed:
        progress.best_val_loss = progress.val_loss = None
        progress.stale = 0
    old = {k: v for k, v in resumed.state["options"].items() if k in vars(config)}
    before = replace(config, **old)
    was = learning_rate(before, progress.position(before))
    if before.minutes and config.minutes:
        progress.share *= before.minutes / config.minutes
    now = learning_rate(config, progress.position(config))
    if not 0.99 * was <= now <= 1.01 * was:
        end = old["lr_decay_iters"] or old["max_iters"]
        notices.append(
            f"note: the learning rate jumps from {was:.3g} to {now:.3g}, as the schedule has changed; "
            f"--lr_decay_iters={end} keeps the old one"
        )
    if moved := resumed.moved(environment):
        notices.append(f"note: {moved}: resuming, but results will not be bitwise identical")
    return progress


def rewind_metrics(run: Path, iter_num: int, evaluated: bool) -> None:
    """Delete the rows that a run resumed at `iter_num` will write again.

    These are all later rows, and the evaluation at `iter_num` unless the checkpoint was `evaluated`. Task
    scores at `iter_num` belong to the checkpoint and are kept.
    """
    if not (run / metrics.NAME).is_file():
        return
    last = {"eval": iter_num if evaluated else iter_num - 1, "tasks": iter_num}
    kept = [row for row in metrics.read(run) if row["iter"] <= last.get(row["event"], iter_num - 1)]
    files.write_text(run / metrics.NAME, "".join(json.dumps(row) + "\n" for row in kept))


def set_aside_newer(run: Path, iter_num: int) -> None:
    """Rename checkpoints after `iter_num`, found damaged on resume, to `.damaged`, so that they are not taken
    for the newest again."""
    for path in steps(run):
        if int(path.name[5:]) > iter_num:
            target = path.with_name(f"{path.name}.damaged")
            files.remove(target)
            files.rename(path, target)


def set_aside(run: Path, lock: FileLock, overwrite: bool) -> tuple[FileLock, str]:
    """Rename the folder `run`, held by `lock`, or delete it with `overwrite`; return the lock of a new one
    and a notice to print."""
    number = 1
    while (aside := run.with_name(f"{run.name}.{number}")).exists():
        number += 1
    if os.name == "nt":  # Windows cannot rename a folder that contains an open file
        lock.release()
    files.rename(run, aside)
    fresh = files.lock(run)
    lock.release()
    if overwrite:
        files.remove(aside)
        return fresh, f"replaced the run in {run}"
    return fresh, f"moved the existing run in {run} to {aside}"
