"""Progress of a run through its schedule: by iterations, or by time (pace/time_budget.py, --minutes)."""

from nanogpt.checkpoint import Progress
from nanogpt.options import BatchOptions


class Pace:
    """Decides when to evaluate and when to stop.

    `position` is the current position in the schedule, `before` that of the previous iteration.
    """

    def __init__(self, options: BatchOptions, progress: Progress):
        self.options, self.progress = options, progress
        self.position = progress.position(options)
        self.before = self.position - 1

    @property
    def over(self) -> bool:
        """Return whether the schedule is complete."""
        return self.position >= self.options.max_iters

    def passed(self, interval: int) -> bool:
        """Return whether the last iteration passed a multiple of `interval`; False if it is 0."""
        return interval > 0 and self.position // interval > self.before // interval

    def evaluation_due(self, interval: int) -> bool:
        """Return whether to evaluate: every `interval` iterations and at the end."""
        return self.over or self.passed(interval)

    def count_evaluation(self, took_s: float) -> None:
        """Account for the time of an evaluation."""
        self.progress.evaluation_s = max(took_s, self.progress.evaluation_s)

    def left_s(self, step_s: float, interval: int) -> float:
        """Return the expected time to the end: `step_s` per iteration and an evaluation every `interval`."""
        return (self.options.max_iters - self.position) * (step_s + self.progress.evaluation_s / interval)

    def begin_iteration(self) -> None:
        """Set the batch size of the next iteration, if it depends on time."""

    def end_iteration(self, step_s: float, save_s: float) -> None:
        """Count an iteration of `step_s` seconds. `save_s`: duration of a checkpoint. Collective: call on all
        ranks."""
        self.progress.iter_num += 1
        self.progress.share = self.share(step_s, save_s)
        self.before, self.position = self.position, self.progress.position(self.options)

    def share(self, step_s: float, save_s: float) -> float:
        """Return the completed fraction of the schedule."""
        return self.progress.iter_num / self.options.max_iters
