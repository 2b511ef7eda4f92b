"""In-training evaluation: task scores and samples from a fixed prompt, at each evaluation.

As in build-nanogpt (HellaSwag, and "Hello, I'm a language model,"). It has no effect on training: scoring and
sampling use separate random generators and do not modify the weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from nanogpt import files, metrics
from nanogpt.errors import UserError
from nanogpt.evaluation import evals, tasks
from nanogpt.evaluation.log_likelihood import Subject
from nanogpt.gpu import attention_kernels
from nanogpt.inference.engine import Engine, Text
from nanogpt.inference.sampling import SamplingOptions
from nanogpt.model import GPT
from nanogpt.options import InTrainingOptions
from nanogpt.runtime import Machine
from nanogpt.tokenizer import tokenizer
from nanogpt.world import World

SEPARATOR = "-" * 15
SAMPLES = 4


class _Stopped(Exception):
    pass


class InTrainingEvaluation:
    """Runs eval tasks and sampling. Loads its data on construction, so errors surface before training."""

    def __init__(
        self,
        options: InTrainingOptions,
        run: Path,
        tokenizer_json: str,
        machine: Machine,
        sharded: bool = False,
    ):
        """`sharded`: rank 0 alone scores, with a copy of the model; else all ranks share the rows."""
        if not machine.world.is_main_process:
            tasks_too = "" if sharded else options.eval_tasks
            options = InTrainingOptions(tasks_too, options.eval_tasks_items)
        self.options, self.run, self.machine = options, run, machine
        self.scoring = replace(machine, world=World()) if sharded else machine
        self.tasks: list[tasks.Task] = []
        self.scored: set[int] = set()  # iterations whose scores are in metrics.jsonl
        if not options.eval_tasks and not options.sample_prompt:
            return
        self.tokenizer = tokenizer.from_text(tokenizer_json)
        for spec in options.eval_tasks.split(",") if options.eval_tasks else []:
            if spec.startswith("lm_eval:"):
                raise UserError(f"--eval_tasks={spec}: run lm-eval tasks after training, with eval.py")
            task = tasks.load(spec)
            print(task.note if machine.world.is_main_process else "", end="")
            self.tasks.append(replace(task, items=_spread(task.items, options.eval_tasks_items)))
        if options.sample_prompt:
            self.prompt = self.tokenizer.encode_prompt(options.sample_prompt)

    def resume(self) -> None:
        """Read from metrics.jsonl which iterations are already scored."""
        self.scored = {row["iter"] for row in metrics.read(self.run) if row["event"] == "tasks"}

    def maybe_run(
        self, model: GPT, iter_num: int, write: Callable[..., None], stopped: Callable[[], bool]
    ) -> Iterator[str]:
        """Score and sample if due; yield lines to print. `write` is called with the scores as keyword
        arguments. If `stopped` returns True on a rank, scoring is abandoned and repeated after resuming.
        Collective, unless the model is sharded."""
        was_training = model.training
        model.eval()
        # Blocks compiled for the training shape would be recompiled for every new sequence length.
        compiled = [(block, block.__dict__.pop("forward", None)) for block in model.h]
        try:
            # deterministic mode off: it refuses CUDA's cumsum, which sampling uses
            with attention_kernels.chosen(without_cudnn=True):
                if self.scoring.world.any_rank(self._scores(iter_num)):
                    yield from self._score(model, iter_num, write, stopped)
                if self.options.sample_prompt:
                    yield from self._sample(model, iter_num)
        finally:
            for block, forward in compiled:
                if forward:
                    block.forward = forward
            model.train(was_training)

    def due(self, iter_num: int) -> bool:
        """Return whether `maybe_run` would do anything at this iteration; valid on rank 0 only."""
        return self._scores(iter_num) or bool(self.options.sample_prompt)

    def _scores(self, iter_num: int) -> bool:
        return bool(self.tasks) and iter_num not in self.scored and self.machine.world.is_main_process

    def _score(
        self, model: GPT, iter_num: int, write: Callable[..., None], stopped: Callable[[], bool]
    ) -> Iterator[str]:
        def advance(count: int) -> None:
            self.machine.world.report_progress()
            if stopped():
                raise _Stopped

        subject = Subject(model, self.tokenizer, self.scoring)
        values = {}
        try:
            for task in self.tasks:
                report = evals.run_task(task, subject, advance)
                yield f"step {iter_num}: {report.describe()}"
                for name, metric in report.metrics.items():
                    values[f"{task.name}_{name}"] = metric.value
                    values[f"{task.name}_{name}_stderr"] = metric.stderr
        except _Stopped:
            return
        write(**values)
        self.scored.add(iter_num)

    def _sample(self, model: GPT, iter_num: int) -> Iterator[str]:
        """Sample at temperature 1 with top_k=50, as build-nanogpt does."""
        options = self.options
        sampling = SamplingOptions(temperature=1.0, top_k=50)
        written = [Text(self.prompt, sampling, seed=42 + i) for i in range(SAMPLES)]
        with self.machine.autocast():
            decoder = Engine(model, len(written), len(self.prompt) + options.sample_tokens)
            decoder.add(written)
            for _ in range(options.sample_tokens):
                self.machine.world.report_progress()
                decoder.step()
        texts = [tokenizer.decode(self.tokenizer, text.ids) for text in written]
        (self.run / "samples").mkdir(exist_ok=True)
        content = "".join(f"{text}\n{SEPARATOR}\n" for text in texts)
        files.write_text(self.run / "samples" / f"step-{iter_num:06d}.txt", content)
        yield from (f"step {iter_num}: {text!r}" for text in texts)


def _spread(items: list[tasks.Item], count: int) -> list[tasks.Item]:
    """Return at most `count` items, evenly spaced, because difficulty may vary within the file."""
    return items if len(items) <= count else [items[i * len(items) // count] for i in range(count)]
