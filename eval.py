"""Score a trained model: loss of texts, LAMBADA, HellaSwag, any multiple choice; compare two models.

    python eval.py out-mine                                   # the validation text it was trained with
    python eval.py out-mine --text=novel.txt                  # loss, perplexity, bits a byte of any text
    python eval.py out-mine --tasks=hellaswag,lambada         # from the hub, or files put into the cache
    python eval.py out-mine --tasks=hellaswag:hellaswag_val.jsonl,questions.jsonl
    python eval.py out-mine --tasks=lm_eval:arc_easy,piqa     # by lm-eval: pip install 'nanogpt[lm-eval]'
    python eval.py out-a --against=out-b --tasks=hellaswag    # the same items: is a better than b?
    python eval.py out-a --against=out-a/step-001000          # has it still learned since?
    python eval.py gpt2 --tasks=hellaswag                     # OpenAI's weights

docs/evaluation.md has the fields of task files and says what each number means.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from nanogpt import ROOT, checkpoint, files, runtime
from nanogpt.config import NonNegativeInt, read
from nanogpt.convert import weights
from nanogpt.convert.pretrained import NAMES
from nanogpt.data import mixture
from nanogpt.errors import UserError, run_program
from nanogpt.evaluation import evals, harness, tasks
from nanogpt.evaluation.evals import Report
from nanogpt.evaluation.log_likelihood import Advance, Subject, Windows, encode_text
from nanogpt.prepare import readers, text_files
from nanogpt.tokenizer import tokenizer


@dataclass(frozen=True)
class Config:
    # which model
    out_dir: str = "out"  # a run folder, gpt2 .. gpt2-xl, or any folder; `eval.py FOLDER` is the same
    which: str = "best"  # its checkpoint: best (lowest validation loss), last, or a step number
    against: str = ""  # another run, or one of its step-... folders: the difference and its significance
    # what to score it on; nothing: the validation split of the dataset it was trained on
    dataset: str = ""  # a folder in data/, or any path that data/prepare.py wrote
    split: Literal["val", "train"] = "val"  # which of its splits
    text: str = ""  # a text file, or JSONL with the field text: each row a text of its own
    stride: NonNegativeInt = 0  # new tokens per window of a text, fewer give more context; 0: all
    tasks: str = ""  # hellaswag, lambada, NAME:FILE, files with questions, lm_eval:NAME; commas between
    limit: NonNegativeInt = 0  # only the first so many items of a task, so many windows of a text; 0: all
    # what to write
    out: str = ""  # all results as JSON, to this file
    items: str = ""  # a line of JSON for each item, to this file
    # machine
    batch_size: NonNegativeInt = 0  # sequences per batch at full context length; 0: 8,192 tokens
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products


@dataclass(frozen=True)
class Opened:
    """A model with its tokenizer, ready to be scored."""

    path: str
    subject: Subject
    dataset: str  # the one it was trained on, "" if that is not known
    description: str


def main(config: Config) -> None:
    """Print scores, and a comparison if that is asked; write them where the options say.

    Raises UserError for what cannot be read or does not fit together, before anything is written.
    """
    own, for_lm_eval = split_tasks(config.tasks)
    check(config, bool(for_lm_eval))
    loaded = [tasks.load(spec, config.limit) for spec in own]
    names = [config.out_dir] + ([config.against] if config.against else [])
    found = []
    for name in names:
        opened = open_model(name, config)
        print(opened.description)
        with opened.subject.machine.memory_errors():
            found.append((opened, evaluate(opened, loaded, dataset_of(opened, config), config)))
    opened, reports = found[0]
    result: dict[str, Any] = {
        "model": str(opened.path),
        "results": {report.name: report.to_json() for report in reports},
    }
    if config.against:
        result |= compare(*found)
    if for_lm_eval:
        result["lm_eval"] = harness.run(for_lm_eval, opened.subject, config.limit)
        print("\n".join(harness.describe(result["lm_eval"])))
    write(config, result | {"options": asdict(config), **opened.subject.machine.environment()}, found)


def split_tasks(given: str) -> tuple[list[str], list[str]]:
    """Our tasks, and lm-eval's: those after lm_eval:."""
    ours, _, others = f",{given}".partition(",lm_eval:")
    return [name for name in ours.split(",") if name], [name for name in others.split(",") if name]


def check(config: Config, has_lm_eval: bool) -> None:
    """Refuse what would fail only after the work is done."""
    if config.against and has_lm_eval:
        raise UserError("--against compares item by item, which lm_eval: tasks do not give; leave one out")
    for option in ("out", "items"):
        path = Path(getattr(config, option))
        if not path.parent.is_dir() or (path.is_dir() and path != Path()):
            raise UserError(f"--{option}={path} is no file that could be written; make its folder first")


def open_model(name: str, config: Config) -> Opened:
    """What `name` stands for: a run folder (its checkpoint --which) or one of its checkpoints, gpt2 to
    gpt2-xl, a folder of Hugging Face, nanoGPT's ckpt.pt; UserError if it is nothing or lacks a part."""
    run = Path(name)
    is_run = bool(checkpoint.steps(run)) or not (run.exists() or name in NAMES)
    found = weights.open_weights("resume" if is_run else name, ROOT, run, config.which)
    print("".join(f"{line}\n" for line in found.notices), end="", file=sys.stderr)
    tokens = found.open_tokenizer()
    machine = runtime.setup(config.device, config.dtype, found.config.n_embd)
    model = found.load(found.fitted(), machine.device)
    subject = Subject(model, tokens, machine, config.batch_size)
    size = f"{model.n_params():,} parameters, context {subject.block_size:,}"
    return Opened(found.origin, subject, found.dataset, f"{found.origin}: {size}; {machine.reason}")


# ----------------------------------------------------------------------------- scores


def dataset_of(opened: Opened, config: Config) -> str:
    """The dataset to score: the one that is named, or if nothing is, the one it was trained with."""
    if config.dataset or config.text or config.tasks:
        return config.dataset
    if not opened.dataset:
        raise UserError("say what to score: --text=FILE, --dataset=FOLDER or --tasks=hellaswag,lambada")
    return opened.dataset


def evaluate(opened: Opened, loaded: list[tasks.Task], dataset: str, config: Config) -> list[Report]:
    """Score everything that is asked; print a line for each."""
    subject, reports = opened.subject, []
    if config.text:
        documents = list(read_texts(config.text))
        sources = [encode_text(document, subject.tokenizer) for document in documents]
        words = 0 if config.limit else sum(map(evals.count_words, documents))
        reports.append(score_text(Path(config.text).name, sources, words, subject, config))
    if dataset:
        found = mixture.load(dataset, ROOT)
        if found.fingerprint != tokenizer.fingerprint(subject.tokenizer):
            raise UserError(
                f"{found.folder} has another tokenizer than {opened.path}; give a dataset that it could have "
                f"been trained on, or the text itself: --text=FILE"
            )
        split = found.val if config.split == "val" else found.train
        for text in split.texts:  # each by itself
            name = f"{text.name or found.folder.name}/{config.split}"
            reports.append(score_text(name, [text], 0, subject, config))
    for task in loaded:
        endings = sum(len(item.endings) for item in task.items)
        reports.append(watched(task.name, endings, partial(evals.run_task, task, subject)))
    return reports


def score_text(name: str, sources: list[Any], words: int, subject: Subject, config: Config) -> Report:
    if config.stride > subject.block_size:
        raise UserError(f"--stride={config.stride} is more than the context of {subject.block_size} tokens")
    stride = config.stride or subject.block_size
    windows = Windows(sources, subject.block_size, stride, config.limit)
    return watched(name, len(windows), lambda see: evals.run_text(name, windows, subject, words, see))


def watched(name: str, total: int, work: Callable[[Advance], Report]) -> Report:
    """Do `work` under a progress bar, and print its line."""
    with tqdm(total=total, desc=name, disable=None, leave=False, unit="row") as bar:
        report = work(bar.update)
    print(report.describe())
    return report


def read_texts(path: str) -> list[str]:
    """The texts of a file, not encoded yet; UserError if there is none."""
    found = text_files.find([Path(path)]).sources
    documents: list[str] = []
    for source, pieces in groupby(readers.pieces(found, readers.Reading()), lambda p: found[p.source]):
        if source.kind == "text":
            documents.append("".join(str(piece.content) for piece in pieces))
            continue
        for row in (row for piece in pieces for row in readers.rows(piece, source.kind, "text")):
            if isinstance(row, readers.BadRow):
                raise UserError(f"{source.path}, line {row.number} {row.reason}")
            documents.append(row)
    if not any(documents):
        raise UserError(f"--text={path} holds no text")
    return documents


def compare(a: tuple[Opened, list[Report]], b: tuple[Opened, list[Report]]) -> dict[str, Any]:
    """Print how much a scores above b; returns the same for the JSON file."""
    print(f"{a[0].path} minus {b[0].path}:")
    differences = {}
    for one, other in zip(a[1], b[1], strict=True):
        found = evals.compare(one, other)
        parts = [f"{name} {difference.describe()}" for name, difference in found.items()]
        print(f"{one.name}: {', '.join(parts)}")
        differences[one.name] = {name: asdict(difference) for name, difference in found.items()}
    results = {report.name: report.to_json() for report in b[1]}
    return {"against": {"model": str(b[0].path), "results": results}, "differences": differences}


def write(config: Config, result: dict[str, Any], found: list[tuple[Opened, list[Report]]]) -> None:
    if config.out:
        files.write_json(Path(config.out), result)
    if config.items:
        rows = [
            {"model": str(opened.path), "task": report.name, **row}
            for opened, reports in found
            for report in reports
            for row in report.rows
        ]
        files.write_text(Path(config.items), "".join(json.dumps(row) + "\n" for row in rows))


def program() -> None:
    options = read(Config, sys.argv[1:], arguments=True)
    if len(options.arguments) > 1:
        raise UserError(f"one model at a time, not {', '.join(options.arguments)}; another: --against=FOLDER")
    if options.arguments:
        options.values["out_dir"] = options.arguments[0]
    main(Config(**options.values))


if __name__ == "__main__":
    run_program(program)
