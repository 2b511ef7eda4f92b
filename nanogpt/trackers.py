"""Optional experiment trackers, imported only when enabled."""

from typing import Any

from nanogpt.errors import UserError


class Wandb:
    def __init__(self, project: str, name: str, config: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb_log=True needs Weights & Biases: pip install wandb") from None
        self._run = wandb.init(project=project, name=name, config=config)

    def log(self, row: dict[str, Any]) -> None:
        self._run.log({key: value for key, value in row.items() if key != "event"}, step=row["iter"])

    def close(self) -> None:
        self._run.finish()
