"""Training for a given time (--minutes): the elapsed share of the time replaces iter_num / max_iters."""

from collections.abc import Callable

from tqdm import tqdm

from nanogpt.checkpoint import Progress
from nanogpt.data.loader import TrainBatches
from nanogpt.errors import UserError
from nanogpt.options import BatchOptions
from nanogpt.pace import Pace
from nanogpt.world import World

FEW = 50  # iterations: a schedule of fewer hardly trains, which a note says


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
        # duration of all evaluations; of those before a resume, only the longest is known
        self.evaluations_s = progress.evaluation_s
        self.step_s = 0.0  # duration of the last iteration and of what preceded it
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
        left_s = self.options.minutes * 60 - self.last_s - self.progress.evaluation_s - save_s - step_s / 2
        self.step_s, self.last_s = now_s - self.last_s, now_s
        share = self.progress.share
        share = share + (1 - share) * self.step_s / left_s if self.step_s < left_s else 1.0
        if self.progress.iter_num == 2 or (self.progress.iter_num == 1 and share == 1):
            self.tell_if_few(left_s - self.step_s)
        return self.world.sum_int(round(share * 1e12) * self.world.is_main_process) / 1e12

    def tell_if_few(self, left_s: float) -> None:
        """Print a note if fewer than FEW iterations fit, with `left_s` left for training."""
        minutes, done = self.options.minutes, self.progress.iter_num
        fit = done + max(0, round(left_s / self.step_s))
        if fit < FEW:
            enough = minutes + ((2 * FEW - done) * self.step_s - left_s) / 60
            more = f"{2 * FEW} need about --minutes={enough:.2g}"
            tqdm.write(f"note: few iterations (about {fit}) fit into --minutes={minutes:g}; {more}")

    def evaluation_due(self, interval: int) -> bool:
        """Return whether to evaluate: every `interval` iterations or eighth of the run, whichever is shorter,
        if evaluations have taken at most a tenth of the time, there is time for three more, and the last
        one is more than half an interval away. Collective: call on all ranks."""
        interval = max(1, min(interval, self.options.max_iters // 8))
        if self.over or not self.progress.share or not self.passed(interval):
            return super().evaluation_due(interval)
        elapsed_s = self.clock_s()
        left_s = self.options.minutes * 60 - elapsed_s  # this evaluation, the last one, and training
        is_last = left_s < 2 * self.step_s or self.position + interval / 2 > self.options.max_iters
        affordable = self.evaluations_s <= elapsed_s / 10 and 3 * self.progress.evaluation_s < left_s
        return self.world.any_rank(affordable and not is_last and self.world.is_main_process)

    def count_evaluation(self, took_s: float) -> None:
        """Raise UserError after the first evaluation if no time is left to train."""
        super().count_evaluation(took_s)
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
        return max(0.0, self.options.minutes * 60 - self.clock_s())


def repeated(options: object, iterations: int) -> str:
    """Return the flags of a run with the same schedule in `iterations` iterations, without a clock. `options`
    are those of train.py."""
    known = vars(options)
    flags = [f"--max_iters={iterations}"]
    for name in ("warmup_iters", "lr_decay_iters", "batch_ramp_tokens"):
        if known[name] and (known["decay_lr"] or name == "batch_ramp_tokens"):
            iters = round(known[name] * iterations / known["max_iters"])
            flags.append(f"--{name}={iters if name == 'warmup_iters' else max(1, iters)}")
    return " ".join(flags)


def fractions(options: object, origins: dict[str, str]) -> list[str]:
    """Return a note if flags of train.py give numbers of iterations, of which --minutes makes fractions."""
    known, names = vars(options), ("eval_interval", "save_interval", "warmup_iters", "lr_decay_iters")
    flags = [name for name in names if known[name] and origins.get(name, "").startswith("--")]
    shares = ", ".join(f"{name}={known[name]} is {known[name] / known['max_iters']:.2%}" for name in flags)
    why = f"with --minutes, iterations stand for shares of max_iters={known['max_iters']} (set by presets)"
    return [f"note: {why}: {shares} of the time"] if flags else []
