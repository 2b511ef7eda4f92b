"""Resume runs: merge saved and given options, report changes, and rewind or set aside run folders."""

import glob
import itertools
import json
import os
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from nanogpt import files, metrics
from nanogpt.checkpoint import REPLACED, Progress, comparable, evaluation, reader, step_folders
from nanogpt.checkpoint.reader import Checkpoint
from nanogpt.config import fitted
from nanogpt.data.loader import Dataset, TrainBatches
from nanogpt.errors import UserError
from nanogpt.options import TrainOptions
from nanogpt.runtime import Machine
from nanogpt.usage import RENAMED

if TYPE_CHECKING:
    from nanogpt.optim import TensorShard

# Options that a resumed run does not inherit; all others come from the saved run unless given again.
NOT_INHERITED = {"init_from", "out_dir", "overwrite", "eval_only", "max_minutes"}
NOT_INHERITED |= {"rdzv_timeout_s", "hang_timeout_s", "parallel", "shard_size"}
# Options whose change on resume is an error; a changed architecture option is ignored, with a note.
REFUSED = {"freeze", "train_only", "lora_rank", "lora_alpha", "lora_targets"}
R = TypeVar("R", bound=TrainOptions)


def resume(
    config: R, origins: dict[str, str], ignored_options: set[str], notices: list[str]
) -> tuple[R, Checkpoint | None]:
    """Return the resolved options and the newest checkpoint of the run in out_dir.

    With --init_from=auto and no checkpoint, return `config` and None. `ignored_options` names those that the
    weights determine, which keep their values, as in nanoGPT. Notes for the user are appended to `notices`.
    Raise UserError if --init_from=resume finds no checkpoint, or if an option in REFUSED differs
    from the saved one.
    """
    out = Path(config.out_dir)
    resumed, errors = reader.find(out)
    if resumed is None:
        if config.init_from == "resume":
            raise missing(out, "train first, or use --init_from=auto or scratch")
        return config, None
    notices += [f"skipped a damaged checkpoint: {line}" for line in errors]
    kinds = typing.get_type_hints(type(config), include_extras=True)
    where = f"{resumed.path / 'state.json'}"
    fitted(dict.fromkeys(("options", "scaler", "environment"), dict), resumed.state, where)
    saved = {RENAMED.get(key, key): value for key, value in resumed.state["options"].items()}
    fitted({f"{key}?": kind for key, kind in kinds.items()}, saved, f"{where}: options")
    saved = asdict(resumed.model_config) | saved  # model_config adds architecture options newer than the run
    saved_on_cpu = str(resumed.state["environment"].get("device")).startswith("cpu")
    if saved_on_cpu and not saved.get("compile"):  # perhaps by auto, which may choose otherwise on a GPU
        saved["compile"] = "auto"
    config, differing = inherit(config, origins, saved, NOT_INHERITED)
    if wrong := [f"{k}={new} given, {k}={old} saved" for k, (old, new) in differing.items() if k in REFUSED]:
        raise UserError(
            f"{out} has other trainable weights: {'; '.join(wrong)}; omit these, or give another --out_dir"
        )
    kept = {key: old for key, (old, _) in differing.items() if key in ignored_options}
    for key, (old, new) in differing.items():
        ignored = f"note: {key} = {old!r} as in the checkpoint; {origins[key]} ({new!r}) has no effect"
        changed = f"{key} = {new!r} from now on; it was {old!r} when the run was saved"
        notices.append(ignored if key in kept else changed)
    return replace(config, init_from=saved.get("init_from", config.init_from), **kept), resumed


def missing(run_dir: Path, advice: str) -> UserError:
    """Return the error for a folder without a checkpoint; it names earlier runs there that were renamed."""
    near = sorted(run_dir.parent.glob(f"{glob.escape(run_dir.name)}.*"))
    renamed = " and ".join(path.name for path in near if step_folders(path))
    where = f", but in {renamed}" if renamed else ""
    hint = f"; to start from nanoGPT's ckpt.pt in it, use --init_from={run_dir}"
    return UserError(f"no checkpoint in {run_dir}{where}: {advice}{hint * (run_dir / 'ckpt.pt').is_file()}")


def inherit(
    config: R, origins: dict[str, str], saved: dict[str, Any], not_inherited: set[str]
) -> tuple[R, dict[str, tuple[Any, Any]]]:
    """Merge the `saved` options with those given now, which take precedence.

    Options in `not_inherited` always come from `config`. Also return (saved, given) for each option given
    with a value that differs from the saved one.
    """
    old = {key: value for key, value in saved.items() if key in set(vars(config)) - not_inherited}
    now = {key: getattr(config, key) for key in origins if key in old}
    differing = {key: (old[key], value) for key, value in now.items() if value != old[key]}
    return type(config)(**{**vars(config), **old, **now}), differing


def load_optimizer(resumed: Checkpoint, tensors: "Mapping[str, Tensor | TensorShard]") -> None:
    """Load the optimizer state into `tensors` (full or this rank's shards) by name, in place. Raise UserError
    if the names differ."""
    path = resumed.path / "optimizer.safetensors"
    with reader.open_tensors(path) as saved:
        if set(saved.keys()) != tensors.keys():
            raise UserError(f"{path} belongs to a different optimizer or model")
        for name, tensor in tensors.items():
            tensor.copy_(saved.get_tensor(name))


def restore_progress(
    resumed: Checkpoint,
    config: R,
    dataset: Dataset,
    batches: TrainBatches,
    machine: Machine,
    learning_rate: Callable[[R, float], float],
    notices: list[str],
) -> Progress:
    """Return the progress of the run, and continue `batches` after the sequences already read. Append to
    `notices` what has changed since the run was saved: the data (by the hash of each split, and the sequences
    evaluated), the learning rate, the machine.

    Losses on other validation sequences are not comparable, so the best loss is then reset. With --minutes,
    `share` is rescaled to the new number of minutes; what is left of a schedule in iterations takes what is
    left of the time. Raise UserError for data of another tokenizer.
    """
    if resumed.state.get("tokenizer") != dataset.fingerprint:
        raise UserError(
            f"{resumed.path} was trained with a different tokenizer ({resumed.model_config.vocab_size} ids) "
            f"from that of {dataset.folder} ({dataset.vocab_size} ids); use the --dataset it was trained on"
        )
    progress, hashes = resumed.progress, dataset.hashes
    saved = resumed.state.get("data", hashes)
    changed = [part for part in hashes if saved.get(part, hashes[part]) != hashes[part]]
    if parts := [part for part in changed if part != "sequences"]:
        notices.append(f"note: the data has changed since the run was saved ({', '.join(parts)})")
    elif changed:
        notices.append("note: other validation sequences are evaluated from now on; the best loss is reset")
    if {"val", "sequences"} & {*changed}:
        progress.best_val_loss = progress.val_loss = None
        progress.stale = 0
    old = {k: v for k, v in resumed.state["options"].items() if k in vars(config)}
    before = replace(config, **old)
    ramp = (progress.ramp or before.ramp())[: progress.iter_num]
    read = sum(ramp) + (progress.iter_num - len(ramp)) * before.sequences_per_iteration
    batches.continue_at(progress.iter_num, resumed.state.get("sequences", read))
    old_lr = learning_rate(before, progress.position(before))
    if config.minutes and (before.minutes or progress.share >= 1):
        progress.share *= (before.minutes or progress.clock_s / 60) / config.minutes
    new_lr = learning_rate(config, progress.position(config))
    if not 0.99 * old_lr <= new_lr <= 1.01 * old_lr:
        end, new_end = (options["lr_decay_iters"] or options["max_iters"] for options in (old, vars(config)))
        why = "because its options have changed"
        if config.minutes != before.minutes:
            length = f"{config.minutes:g} minutes" if config.minutes else f"{config.max_iters} iterations"
            why = f"because the schedule now spans {length}"
        elif old["decay_lr"] and not config.minutes and new_end != end:
            why += f"; --lr_decay_iters={end} keeps the old end of the schedule"
        notices.append(f"note: the learning rate jumps from {old_lr:.3g} to {new_lr:.3g}, {why}")
    saved, env = resumed.state["environment"], machine.environment()
    if changes := "; ".join(f"{k} {saved.get(k)} -> {v}" for k, v in env.items() if saved.get(k) != v):
        notices.append(f"note: {changes}: resuming, but results will not be bitwise identical")
    return progress


def rewind(run_dir: Path, progress: Progress, data: str = "") -> None:
    """Remove from a run folder everything that the run, resumed at `progress`, will write again.

    Later checkpoints, which `find` has skipped as damaged, are renamed to `.damaged`. All later rows of
    metrics.jsonl are deleted, and so is the evaluation at the same iteration unless the checkpoint was
    evaluated. Task scores at that iteration belong to the checkpoint and are kept. Validation losses on other
    sequences than `data` (see `evaluation`) are renamed: they are not comparable with those that follow.
    """
    for path in step_folders(run_dir):
        if int(path.name[5:]) > progress.iter_num:
            target = path.with_name(f"{path.name}.damaged")
            files.remove(target)
            files.rename(path, target)
    if not (run_dir / metrics.NAME).is_file():
        return
    before = progress.iter_num - 1
    last = {"eval": before if progress.val_loss is None else progress.iter_num, "tasks": progress.iter_num}
    kept = [row for row in metrics.read(run_dir) if row["iter"] <= last.get(row["event"], before)]
    if not all(comparable(evaluation(path)[1], data) for path in step_folders(run_dir)[:1]):
        for row in (row for row in kept if "val_loss" in row):
            row["other_val_loss"] = row.pop("val_loss")
        files.remove(run_dir / "baseline.json")  # of the counting baseline, on those sequences
    files.write_text(run_dir / metrics.NAME, "".join(json.dumps(row) + "\n" for row in kept))


def left(progress: Progress, options: TrainOptions) -> str:
    """Return the expected time to the end of a run, at the speed of its iterations so far."""
    each_s = progress.elapsed_s / max(1, progress.iter_num)
    left_s = (options.max_iters - progress.iter_num) * each_s
    if options.minutes:
        left_s = options.minutes * 60 - progress.clock_s
    return f"about {tqdm.format_interval(left_s)} left"


def set_aside(run_dir: Path, lock: FileLock, overwrite: bool) -> tuple[FileLock, str]:
    """Rename the folder `run_dir`, locked by `lock`; return the lock of a new folder with that name and a
    notice to print. With `overwrite`, the first checkpoint of the new run deletes the renamed folder
    (writer.prune)."""
    replaced, worthless = run_dir.with_name(run_dir.name + REPLACED), False
    if overwrite:
        # the run in `run_dir` replaced another one and saved no checkpoint
        worthless = replaced.exists() and not step_folders(run_dir)
        aside = files.temporary(run_dir) if worthless else replaced
        files.remove(aside)
    else:
        numbered = (run_dir.with_name(f"{run_dir.name}.{number}") for number in itertools.count(1))
        aside = next(path for path in numbered if not path.exists())
    if os.name == "nt":  # Windows cannot rename a folder that contains an open file
        lock.release()
    files.rename(run_dir, aside)
    new_lock = files.lock(run_dir)
    lock.release()
    kept = f"; it is kept in {replaced}"
    if worthless:
        files.remove(aside)
        kept = f", which saved no checkpoint; {replaced} is kept"
    if overwrite:
        return new_lock, f"replacing the run in {run_dir}{kept} until the first checkpoint"
    return new_lock, f"moved the existing run in {run_dir} to {aside}"
