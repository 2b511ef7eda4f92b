"""The options of a run that goes on: those saved, with those given now over them."""

from pathlib import Path
from typing import Any, TypeVar

from nanogpt.checkpoint import reader
from nanogpt.checkpoint.reader import Checkpoint
from nanogpt.errors import UserError
from nanogpt.options import RunOptions
from nanogpt.usage import RENAMED

# A resumed run takes these from the command, and all others from the saved run unless they are given again.
NOT_INHERITED = {"init_from", "out_dir", "overwrite", "eval_only", "max_minutes"}
NOT_INHERITED |= {"rdzv_timeout_s", "hang_timeout_s", "parallel", "shard_size"}
# It keeps these, and the shape of the model.
FIXED = {"freeze", "train_only", "lora_rank", "lora_alpha", "lora_targets"}
R = TypeVar("R", bound=RunOptions)


def resume(
    config: R, origins: dict[str, str], shape: set[str], notices: list[str]
) -> tuple[R, Checkpoint | None]:
    """Return the options of the run in out_dir and its newest checkpoint; `config` and None if it holds
    none and --init_from=auto. UserError if --init_from=resume finds none, or if options given now do not fit:
    `shape` names those that weights decide."""
    fixed = FIXED | shape
    out = Path(config.out_dir)
    resumed, damage = reader.find(out)
    if resumed is None:
        if config.init_from == "resume":
            raise UserError(f"no checkpoint in {out}: train first, or say --init_from=auto or scratch")
        return config, None
    notices += [f"skipped a damaged checkpoint: {line}" for line in damage]
    config, differing = inherit(config, origins, resumed.state["options"], NOT_INHERITED)
    if wrong := [f"{k}={new} given, {k}={old} saved" for k, (old, new) in differing.items() if k in fixed]:
        raise UserError(
            f"{out} holds another model: {'; '.join(wrong)}; leave these out, or choose another --out_dir"
        )
    for key, (old, new) in differing.items():
        notices.append(f"{key} = {new!r} from now on; it was {old!r} when the run was saved")
    return config, resumed


def inherit(
    config: R, origins: dict[str, str], saved: dict[str, Any], fresh: set[str]
) -> tuple[R, dict[str, tuple[Any, Any]]]:
    """The options of a run that goes on: those `saved`, with those given now over them.

    Options in `fresh` are always taken from `config`. Returns also, for each option given with another
    value than the saved one, (saved, given).
    """
    saved = {RENAMED.get(key, key): value for key, value in saved.items()}
    old = {key: value for key, value in saved.items() if key in set(vars(config)) - fresh}
    now = {key: getattr(config, key) for key in origins if key in old}
    differing = {key: (old[key], value) for key, value in now.items() if value != old[key]}
    return type(config)(**{**vars(config), **old, **now}), differing
