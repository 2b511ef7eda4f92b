"""Optional experiment trackers, imported only when enabled."""

from typing import Any

from nanogpt.errors import UserError


class Wandb:
    def __init__(self, project: str, name: str, config: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb_log=True needs Weights & Biases: pip install wandb") from None
        try:
            self._run = wandb.init(project=project, name=name, config=config)
        except Exception as error:  # login, network and settings, of several types
            what = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--wandb_log=True: {what}; run `wandb login`, or set WANDB_MODE=offline to log to files"
            ) from None

    def log(self, row: dict[str, Any]) -> None:
        self._run.log({key: value for key, value in row.items() if key != "event"}, step=row["iter"])

    def close(self) -> None:
        self._run.finish()
