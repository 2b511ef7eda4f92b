"""Options of a resumed run: those saved, overridden by those given now."""

from pathlib import Path
from typing import Any, TypeVar

from nanogpt.checkpoint import Progress, reader
from nanogpt.checkpoint.reader import Checkpoint
from nanogpt.errors import UserError
from nanogpt.options import RunOptions
from nanogpt.usage import RENAMED

# Options that a resumed run never inherits; all others come from the saved run unless given again.
NOT_INHERITED = {"init_from", "out_dir", "overwrite", "eval_only", "max_minutes"}
NOT_INHERITED |= {"rdzv_timeout_s", "hang_timeout_s", "parallel", "shard_size"}
# Options that cannot change on resume, besides the model architecture.
FIXED = {"freeze", "train_only", "lora_rank", "lora_alpha", "lora_targets"}
R = TypeVar("R", bound=RunOptions)


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
    config, differing = inherit(config, origins, resumed.state["options"], NOT_INHERITED)
    if wrong := [f"{k}={new} given, {k}={old} saved" for k, (old, new) in differing.items() if k in fixed]:
        raise UserError(
            f"{out} holds a different model: {'; '.join(wrong)}; omit these, or choose another --out_dir"
        )
    for key, (old, new) in differing.items():
        notices.append(f"{key} = {new!r} from now on; it was {old!r} when the run was saved")
    return config, resumed


def progress_on(resumed: Checkpoint, content: dict[str, str], notices: list[str]) -> Progress:
    """Return the progress of the run on data with these hashes. Report changed data; losses on another
    validation text are not comparable, so the best one is reset."""
    progress, saved = resumed.progress, resumed.state.get("data", content)
    if changed := [split for split in content if saved.get(split) != content[split]]:
        notices.append(f"note: the data has changed since the run was saved ({', '.join(changed)})")
    if "val" in changed:
        progress.best_val_loss = progress.val_loss = None
        progress.stale = 0
    return progress


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
