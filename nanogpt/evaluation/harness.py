"""Adapter to EleutherAI's lm-evaluation-harness, for running its tasks on our models.

https://github.com/EleutherAI/lm-evaluation-harness has thousands of tasks, including HELM-style ones.
Optional dependency: pip install 'nanogpt[lm-eval]'.
"""

import difflib
from typing import Any

import numpy as np

from nanogpt.errors import UserError
from nanogpt.evaluation.log_likelihood import Requests, Subject, Windows, beginning, encode_text, score
from nanogpt.evaluation.tasks import quiet_hub
from nanogpt.inference.engine import Completion, Engine, Text, complete
from nanogpt.inference.sampling import SamplingOptions

MAX_NEW_TOKENS = 256  # default for tasks without max_gen_toks


def run(names: list[str], subject: Subject, limit: int = 0) -> tuple[dict[str, dict[str, Any]], str]:
    """Run lm-eval tasks `names` (or paths of task YAML files); return results by task and metric, and their
    table as lm-eval prints it.

    Raise UserError if lm-eval is not installed, a name is unknown, or a dataset cannot be loaded.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError:
        raise UserError("--tasks=lm_eval:... needs lm-eval: pip install 'nanogpt[lm-eval]'") from None
    are_files = all(name.endswith((".yaml", ".yml")) for name in names)
    manager = TaskManager(include_defaults=not are_files)  # slow: reads about 15,000 files
    for name in names:
        if not name.endswith((".yaml", ".yml")) and name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"unknown lm-eval task {name!r}; {hint}`lm_eval ls tasks` lists all tasks")
    quiet_hub()
    try:
        loaded = manager.load(names)
    except Exception as error:  # any error of the network, the Hub or the task's own code
        reason = (str(error).splitlines() or [""])[0][:160]
        raise UserError(
            f"lm-eval cannot load {', '.join(names)} ({type(error).__name__}: {reason}); its data are on the "
            f"Hub: run once online, then set HF_HUB_OFFLINE=1 to use the cache (HF_HOME)"
        ) from None
    inside = {child for children in loaded["group_map"].values() for child in children}
    wanted = {**loaded["groups"], **loaded["tasks"]}
    results = simple_evaluate(
        model=adapter(subject),
        tasks=[task for name, task in wanted.items() if name not in inside],
        limit=limit or None,
        task_manager=manager,
        log_samples=False,
    )
    return {name: _plain(values) for name, values in results["results"].items()}, make_table(results)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Rename "acc,none" to "acc" and drop non-numeric values ("N/A")."""
    numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {key.removesuffix(",none"): value for key, value in numbers.items()}


def adapter(subject: Subject) -> Any:
    """Wrap `subject` as an lm_eval.api.model.LM."""
    from lm_eval.api.model import TemplateLM

    class Adapter(TemplateLM):
        tokenizer_name = subject.tokenizer.kind

        @property
        def eot_token_id(self) -> int:
            return beginning(subject.tokenizer)

        def tok_encode(self, string: str, **unused: Any) -> list[int]:
            return subject.tokenizer.encode(string).tolist()

        def _loglikelihood_tokens(self, requests: Any, **unused: Any) -> list[tuple[float, bool]]:
            pairs = [(np.array(context), np.array(after)) for _, context, after in requests]
            rows = Requests(pairs, subject.block_size)
            results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
            for i, nats, greedy in score(subject, rows, greedy=True):
                results[i] = (-float(nats.sum()), greedy)
            return results

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            texts = [encode_text(request.args[0], subject.tokenizer) for request in requests]
            numbers = [i for i, text in enumerate(texts) if len(text) > 1]  # empty texts score 0
            sums = [0.0] * len(requests)
            if numbers:
                windows = Windows(texts, subject.block_size, subject.block_size)
                for i, nats, _ in score(subject, windows):
                    sums[numbers[windows.place(i)[0]]] -= float(nats.sum())
            return sums

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [continuation(subject, *request.args) for request in requests]

    return Adapter()


def continuation(subject: Subject, context: str, options: dict[str, Any]) -> str:
    """Generate a continuation of `context` up to the first stop string (`until`), with lm-eval's
    generation `options`."""
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
    prompt = subject.tokenizer.encode_prompt(context) if context else []
    limit = int(options.get("max_gen_toks") or options.get("max_new_tokens") or MAX_NEW_TOKENS)
    sampling = SamplingOptions(
        temperature=float(options.get("temperature") or 0) if options.get("do_sample") else 0.0,
        top_k=int(options.get("top_k") or 0),
    )
    text = Text(prompt or [beginning(subject.tokenizer)], sampling, seed=1337)
    completion = Completion(text, subject.tokenizer, limit, stops, subject.tokenizer.end_of_text)
    with subject.machine.autocast():
        for _ in complete(Engine(subject.model, 1, len(text.ids) + limit), [completion]):
            pass
    return completion.string
