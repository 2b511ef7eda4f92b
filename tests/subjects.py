"""What tests of scores share: a small model that has opinions, and lm-eval's own tasks on local rows."""

import json
from pathlib import Path
from typing import Any

import torch

from nanogpt import runtime, tokenizer
from nanogpt.model import GPT, GPTConfig
from nanogpt.scoring import Subject

LETTERS = tokenizer.CharTokenizer("\n abcdefgh")


def subject_of(tokens, block_size: int, **options) -> Subject:
    """A model whose weights are so large that it has opinions."""
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32} | options
    model = GPT(GPTConfig(vocab_size=tokens.vocab_size, block_size=block_size, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return Subject(model, tokens, runtime.Machine(torch.device("cpu"), "float32", "test"))


def lm_eval_task(folder: Path, name: str, rows: list[dict], **config: Any) -> Any:
    """A task of lm-eval's own code on `rows`, with the settings of one of its YAML files."""
    from lm_eval.api.task import ConfigurableTask

    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config |= {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "num_fewshot": 0,
    }
    return ConfigurableTask(cache_dir=str(folder / "cache"), config=config)


def by_lm_eval(task: Any, lm: Any) -> tuple[list[dict], dict]:
    """The samples of a task in their order, and its scores."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    none = TaskManager(include_defaults=False)  # its own 15,000 files take some seconds to read
    found = simple_evaluate(model=lm, tasks=[task], task_manager=none, log_samples=True, bootstrap_iters=0)
    name = task.config.task
    return sorted(found["samples"][name], key=lambda sample: sample["doc_id"]), found["results"][name]
