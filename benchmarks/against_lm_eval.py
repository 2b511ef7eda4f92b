"""Compare eval.py's scores with lm-eval's own model class on an exported copy of the same weights.

    python export.py --out_dir=out-mine --to=exported
    pip install accelerate peft      # required by lm-eval's HFLM
    python -m benchmarks.against_lm_eval --run=out-mine --export=exported --hellaswag=hellaswag_val.jsonl \
        --lambada=lambada_test.jsonl --text=valid.txt

lm-eval tokenizes, runs the model with transformers, builds the prompts, windows the text and scores, all
with its own code; only the data files are local. Predictions must be equal, log-likelihoods within 1e-3.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import shared
from nanogpt import files, runtime
from nanogpt.checkpoint import reader
from nanogpt.config import NonNegativeInt, load
from nanogpt.errors import UserError, run_program
from nanogpt.evaluation import evals, log_likelihood, tasks
from nanogpt.tokenizer import tokenizer


@dataclass(frozen=True)
class Config:
    run: str = "out"  # run folder
    export: str = ""  # the same weights, as a Hugging Face folder
    hellaswag: str = ""  # HellaSwag as JSONL; empty: skip
    lambada: str = ""  # LAMBADA as JSONL; empty: skip
    text: str = ""  # text file; empty: skip
    limit: NonNegativeInt = 0  # maximum number of items per task; 0: all
    batch_size: NonNegativeInt = 16  # sequences per batch in lm-eval


def main(config: Config) -> None:
    """Run the comparison and print it. Raise UserError if a score differs."""
    from lm_eval.models.huggingface import HFLM

    found, _ = reader.find(Path(config.run), "best")
    if found is None:
        raise UserError(f"no checkpoint in {config.run}")
    tokens = tokenizer.from_text((Path(config.run) / "tokenizer.json").read_text(encoding="utf-8"))
    machine = runtime.setup("cpu", "float32", found.model_config.n_embd)
    subject = log_likelihood.Subject(found.load_model(), tokens, machine)
    theirs = HFLM(pretrained=config.export, dtype="float32", device="cpu", batch_size=config.batch_size)
    rows = []
    for kind in ("hellaswag", "lambada", "text"):
        if path := getattr(config, kind):
            rows.append([kind, *compare(kind, Path(path), subject, theirs, config.limit)])
    columns = ["", "items", "predictions that differ", "largest difference", "ours, s", "lm-eval, s"]
    shared.show("eval.py against lm-eval on the exported copy, float32", columns, rows)
    if any(row[2] != "0" or float(row[3]) > 1e-3 for row in rows):
        raise UserError("a score differs from lm-eval's")


def compare(kind: str, path: Path, subject: log_likelihood.Subject, lm: Any, limit: int) -> list[str]:
    """Return the number of items, of differing predictions, the largest log-likelihood difference (for a
    text: in nats/token), and the seconds of both sides."""
    with tempfile.TemporaryDirectory() as folder:
        if kind == "text":
            text = path.read_text(encoding="utf-8")
            samples, took_s = timed(lambda: by_lm_eval(Path(folder), kind, [{"page": text}], lm)[0])
            ids = log_likelihood.encode_text(text, subject.tokenizer)
            windows = log_likelihood.Windows([ids], subject.block_size, subject.block_size)
            report = evals.run_text(kind, windows, subject)
            total = -float(samples[0]["filtered_resps"][0]) / report.counts["tokens"]
            found = [str(len(windows)), "0", f"{abs(total - report.metrics['loss'].value):.1e}"]
        else:
            given = [row for _, row in tasks.file_rows(path)][: limit or None]
            samples, took_s = timed(lambda: by_lm_eval(Path(folder), kind, given, lm)[0])
            report = evals.run_task(tasks.load(f"{kind}:{path}", limit), subject)
            pairs = list(zip(report.rows, samples, strict=True))
            differing = sum(not same_prediction(row, sample) for row, sample in pairs)
            largest = max(float(np.abs(likelihoods(row) - given_by(sample)).max()) for row, sample in pairs)
            found = [str(len(pairs)), str(differing), f"{largest:.1e}"]
    return [*found, f"{report.seconds:.0f}", f"{took_s:.0f}"]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


# ----------------------------------------------------------------------------- items


def likelihoods(row: dict[str, Any]) -> np.ndarray:
    """Return our log-likelihood of each ending of an item."""
    return np.array(row["loglikelihoods"] if "loglikelihoods" in row else [row["loglikelihood"]])


def given_by(sample: dict[str, Any]) -> np.ndarray:
    """Return lm-eval's log-likelihood of each ending of an item."""
    return np.array([value for value, _ in sample["filtered_resps"]])


def same_prediction(row: dict[str, Any], sample: dict[str, Any]) -> bool:
    """Return whether both sides agree on correctness, for each of the task's metrics."""
    if "correct" in row:
        return row["correct"] == bool(sample["acc"])
    names = {"acc": "prediction", "acc_norm": "prediction_norm"}
    return all((row[ours] == row["label"]) == bool(sample[theirs]) for theirs, ours in names.items())


# ----------------------------------------------------------------------------- lm-eval on local rows


def by_lm_eval(folder: Path, kind: str, rows: list[dict], lm: Any, **config: Any) -> tuple[list[dict], dict]:
    """Run lm-eval's own code on `rows`, with the settings of its YAML file for `kind` ("hellaswag",
    "lambada", "text") or with `config`. Return the samples in order, and the scores."""
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    path = folder / f"{kind}.jsonl"
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "task": f"local_{kind}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "num_fewshot": 0,
    }
    settings |= config or SETTINGS[kind]()
    task = ConfigurableTask(cache_dir=str(folder / "cache"), config=settings)
    none = TaskManager(include_defaults=False)  # reading its 15,000 files takes seconds
    found = simple_evaluate(model=lm, tasks=[task], task_manager=none, log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"][settings["task"]], key=lambda sample: sample["doc_id"])
    return samples, found["results"][settings["task"]]


def hellaswag() -> dict[str, Any]:
    """Return the settings of lm-eval's hellaswag, for rows with `ctx` instead of `ctx_a` and `ctx_b`."""
    from lm_eval.tasks.hellaswag.utils import preprocess

    def one(row: dict[str, Any]) -> dict[str, Any]:
        query = preprocess(row["activity_label"] + ": " + row["ctx"])
        return {"query": query, "choices": [preprocess(ending) for ending in row["endings"]]}

    return {
        "process_docs": lambda rows: rows.map(one),
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "choices",
        "metric_list": _mean("acc", "acc_norm"),
    }


def lambada() -> dict[str, Any]:
    """Return the settings of lm-eval's lambada_openai."""
    perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    return {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [perplexity, *_mean("acc")],
    }


def text() -> dict[str, Any]:
    """Return the settings of lm-eval's wikitext, without its text preprocessing."""
    names = {"word_perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"}
    measures = [
        {"metric": name, "aggregation": how, "higher_is_better": False} for name, how in names.items()
    ]
    return {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": measures,
    }


def _mean(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {"hellaswag": hellaswag, "lambada": lambada, "text": text}

if __name__ == "__main__":
    import sys

    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
