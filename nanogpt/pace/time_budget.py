"""Training for a given time (--minutes): the elapsed share of the time replaces iter_num / max_iters."""

from collections.abc import Callable

from nanogpt.checkpoint import Progress
from nanogpt.data.loader import TrainBatches
from nanogpt.errors import UserError
from nanogpt.options import BatchOptions
from nanogpt.pace import Pace
from nanogpt.world import World


class TimeBudget(Pace):
    """Pace by the clock of rank 0.

    The completed share of the schedule grows in proportion to time, from its value at construction, and
    reaches 1 when just enough time is left for the last evaluation and checkpoint.
    """

    def __init__(
        self,
        options: BatchOptions,
        progress: Progress,
        batches: TrainBatches,
        clock_s: Callable[[], float],
        world: World,
    ):
        """`clock_s` returns the seconds since the start of the run, with start-up and earlier sessions."""
        super().__init__(options, progress)
        self.batches, self.clock_s, self.world = batches, clock_s, world
        self.last_s = clock_s()
        self.evaluations_s = 0.0  # duration of all evaluations
        self.planned_ramp = batches.ramp
        progress.ramp = progress.ramp or batches.ramp[: progress.iter_num]
        batches.set_ramp(progress.ramp)

    def begin_iteration(self) -> None:
        ramp = self.progress.ramp
        if len(ramp) == self.progress.iter_num and self.position < len(self.planned_ramp):
            ramp.append(self.planned_ramp[int(self.position)])
            self.batches.set_ramp(ramp)

    def share(self, step_s: float, save_s: float) -> float:
        now_s = self.clock_s()
        left_s = self.options.minutes * 60 - self.last_s - self.evaluation_s - save_s - step_s / 2
        passed_s, self.last_s = now_s - self.last_s, now_s
        share = self.progress.share
        share = share + (1 - share) * passed_s / left_s if passed_s < left_s else 1.0
        return self.world.sum_int(round(share * 1e12) * self.world.is_main_process) / 1e12

    def evaluation_due(self, interval: int) -> bool:
        """Return whether to evaluate: every `interval` iterations or eighth of the run, whichever is shorter,
        if evaluations have taken at most a tenth of the time and there is time for three more. Collective:
        call on all ranks."""
        interval = max(1, min(interval, self.options.max_iters // 8))
        if self.over or not self.progress.share or not self.passed(interval):
            return super().evaluation_due(interval)
        elapsed_s = self.clock_s()
        left_s = self.options.minutes * 60 - elapsed_s  # this evaluation, the last one, and training
        allowed = 3 * self.evaluation_s < left_s and self.evaluations_s <= elapsed_s / 10
        return self.world.any_rank(allowed and self.world.is_main_process)

    def evaluated(self, took_s: float) -> None:
        """Raise UserError after the first evaluation if no time is left to train."""
        super().evaluated(took_s)
        self.evaluations_s += took_s
        if self.progress.share:
            return
        self.last_s = self.clock_s()  # training starts now
        shortest = (self.last_s + took_s) / 60
        if self.options.minutes <= shortest:
            raise UserError(
                f"--minutes={self.options.minutes:g} is too short: start-up and two evaluations take "
                f"{shortest:.2f} minutes here; give at least --minutes={2 * shortest:.2f}, or a smaller "
                f"--eval_iters"
            )

    def left_s(self, step_s: float, interval: int) -> float:
        return self.options.minutes * 60 - self.clock_s()


def repeated(options: object, iterations: int) -> str:
    """Return the flags of a run with the same schedule in `iterations` iterations, without a clock. `options`
    are those of train.py."""
    known = vars(options)
    flags = [f"--max_iters={iterations}"]
    for name in ("warmup_iters", "lr_decay_iters", "batch_ramp_tokens"):
        if known[name] and (known["decay_lr"] or name == "batch_ramp_tokens"):
            flags.append(f"--{name}={round(known[name] * iterations / known['max_iters'])}")
    return " ".join(flags)
