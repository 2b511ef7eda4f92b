"""Evaluate a trained model: loss of texts, LAMBADA, HellaSwag, any multiple choice; compare two models.

    python eval.py out-mine                                   # validation split of its training dataset
    python eval.py out-mine --baseline                        # and n-gram counts: is the model better?
    python eval.py out-mine --text=novel.txt                  # loss, perplexity, bits/byte of any text
    python eval.py out-mine --tasks=hellaswag,lambada         # from the Hub, or files in the cache
    python eval.py out-mine --tasks=hellaswag:hellaswag_val.jsonl,questions.jsonl
    python eval.py out-mine --tasks=lm_eval:arc_easy,piqa     # with lm-eval: pip install 'nanogpt[lm-eval]'
    python eval.py out-a --against=out-b --tasks=hellaswag    # paired test: is a better than b?
    python eval.py out-a --against=out-a/step-001000          # did it improve since that checkpoint?
    python eval.py gpt2 --tasks=hellaswag                     # OpenAI's weights
    torchrun --standalone --nproc_per_node=8 eval.py out-mine --tasks=hellaswag    # rows shared by 8 GPUs

docs/evaluation.md documents the fields of task files and the metrics.
"""

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from nanogpt import ROOT, checkpoint, files, metrics, resolve, runtime
from nanogpt.config import FilePath, NonNegativeInt, load_with_arguments
from nanogpt.convert import weights
from nanogpt.convert.pretrained import NAMES
from nanogpt.data import loader, mixture
from nanogpt.errors import UserError, run_program
from nanogpt.evaluation import counting, evals, harness, tasks
from nanogpt.evaluation.evals import Report
from nanogpt.evaluation.log_likelihood import Advance, Subject, Windows, encode_text
from nanogpt.options import ProcessOptions
from nanogpt.prepare import readers, text_files
from nanogpt.tokenizer import tokenizer
from nanogpt.world import World


@dataclass(frozen=True)
class Config:
    # model
    out_dir: FilePath = "out"  # run folder, gpt2 .. gpt2-xl, or Hugging Face folder; also `eval.py FOLDER`
    which: str = "best"  # checkpoint: best (lowest validation loss), last, or an iteration number
    against: FilePath = ""  # second model (run or step-... folder): print differences and p-values
    # data; default: the validation split of the dataset it was trained on
    dataset: FilePath = ""  # name of a folder in data/, or path of a prepared dataset
    split: Literal["val", "train"] = "val"  # split of the dataset to score
    text: FilePath = ""  # text file, or JSONL with a field "text": each row is a separate text
    stride: NonNegativeInt = 0  # tokens scored per window of a text; fewer: more context; 0: block_size
    tasks: str = ""  # comma-separated: hellaswag, lambada, NAME:FILE, JSONL files, lm_eval:NAME
    baseline: bool = False  # also score n-gram counts (Kneser-Ney) on the sequences of the run's validation
    limit: NonNegativeInt = 0  # maximum number of items per task and of windows per text; 0: all
    # output
    out: FilePath = ""  # write all results to this JSON file
    items: FilePath = ""  # write per-item results to this JSONL file
    # device
    batch_size: NonNegativeInt = 0  # full-length sequences per batch; 0: 8,192 tokens
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # compute dtype


@dataclass(frozen=True)
class Opened:
    """A loaded model with its tokenizer."""

    path: str
    subject: Subject
    dataset: str  # dataset it was trained on, "" if unknown


def main(config: Config) -> None:
    """Print scores and, with --against, a comparison; write them to --out and --items.

    Under torchrun all ranks share the rows. Raise UserError for unreadable inputs and inconsistent options,
    before anything is written.
    """
    options = asdict(config) | asdict(ProcessOptions())
    with resolve.join(options, Path(tempfile.gettempdir(), "nanogpt-eval")) as world:
        world.raise_on_all_ranks(lambda: run(config, world))


def run(config: Config, world: World) -> None:
    ours, _, others = f",{config.tasks}".partition(",lm_eval:")  # the tasks after lm_eval: are lm-eval's
    for_lm_eval = [name for name in others.split(",") if name]
    check(config, bool(for_lm_eval))
    loaded = [tasks.load(spec, config.limit) for spec in ours.split(",") if spec]
    for task in loaded:
        print(task.note, end="")
    names = [config.out_dir] + ([config.against] if config.against else [])
    scored: list[tuple[Opened, list[Report]]] = []
    for name in names:
        opened = open_model(name, config, world)
        dataset = dataset_of(scored[0][0] if scored else opened, config)  # the same for both
        if config.baseline and not scored:  # refuses mixtures before anything is scored
            chosen = config.dataset or opened.dataset
            counted = counting.sequences_of(Path(name), chosen, opened.subject.block_size)
        with opened.subject.machine.memory_errors():
            scored.append((opened, evaluate(opened, loaded, dataset, config)))
    opened, result = scored[0][0], results(*scored[0])
    if config.against:
        result |= compare(scored[0], scored[1], config.limit)
    if config.baseline:
        result["baseline"] = baseline(counted, config)
    if for_lm_eval:
        result["lm_eval"], table = harness.run(for_lm_eval, opened.subject, config.limit)
        print(table)
    if world.is_main_process:
        write(config, result | {"options": asdict(config), **opened.subject.machine.environment()}, scored)


def check(config: Config, has_lm_eval: bool) -> None:
    """Raise UserError early for options that would fail only after scoring."""
    if config.against and has_lm_eval:
        raise UserError("--against needs per-item scores, which lm_eval: tasks do not provide; omit one")
    for option in ("out", "items"):
        path = Path(getattr(config, option))
        writable = path.parent.is_dir() and os.access(path.parent, os.W_OK)
        if path != Path() and (path.is_dir() or not writable):
            raise UserError(f"--{option}={path} is not a writable file path; create its folder first")


def open_model(name: str, config: Config, world: World) -> Opened:
    """Load model `name`: a run folder (its checkpoint --which), one of its checkpoints, gpt2 to gpt2-xl, a
    Hugging Face folder or nanoGPT's ckpt.pt. Raise UserError if it does not exist or is incomplete."""
    folder = Path(name)
    is_run = bool(checkpoint.step_folders(folder)) or not (folder.exists() or name in NAMES)
    source = weights.open_weights("resume" if is_run else name, ROOT, folder, config.which)
    print("".join(f"{line}\n" for line in source.notices), end="", file=sys.stderr)
    tokens = source.open_tokenizer()
    machine = runtime.setup(config.device, config.dtype, source.config.n_embd, world)
    model = source.load(source.fitted(), machine.device)
    subject = Subject(model, tokens, machine, config.batch_size)
    size = f"{model.n_params():,} parameters, context {subject.block_size:,}"
    print(f"{source.origin}: {size}; {machine.reason}")
    return Opened(source.origin, subject, source.dataset)


# ----------------------------------------------------------------------------- scores


def dataset_of(opened: Opened, config: Config) -> str:
    """Return the dataset to score: --dataset or, if no data option is given, the training dataset."""
    if config.dataset or config.text or config.tasks:
        return config.dataset
    if not opened.dataset:
        raise UserError("nothing to score: give --text=FILE, --dataset=FOLDER or --tasks=hellaswag,lambada")
    return opened.dataset


def evaluate(opened: Opened, loaded: list[tasks.Task], dataset: str, config: Config) -> list[Report]:
    """Score the text, dataset and tasks selected by the options; print one line for each."""
    subject, reports = opened.subject, []
    if config.text:
        documents = list(filter(None, read_texts(config.text)))
        sources = [encode_text(document, subject.tokenizer) for document in documents]
        reports.append(score_text(Path(config.text).name, sources, documents, subject, config))
    if dataset:
        data = mixture.load(dataset, ROOT)
        if data.fingerprint != tokenizer.fingerprint(subject.tokenizer):
            raise UserError(
                f"{data.folder} and {opened.path} have different tokenizers; give a dataset with the "
                f"model's tokenizer, or raw text: --text=FILE"
            )
        split = data.val if config.split == "val" else data.train
        for text in split.texts:  # each source of a mixture separately
            name = f"{text.name or data.folder.name}/{config.split}"
            known = data.bytes_per_token if split is data.val and len(split.texts) == 1 else None
            reports.append(score_text(name, [text], [], subject, config, known))
        if dataset == opened.dataset and config.split == "val":
            print(difference_from_training(Path(opened.path), data, config.limit), end="")
    for task in loaded:
        endings = sum(len(item.endings) for item in task.items)
        reports.append(watched(task.name, endings, partial(evals.run_task, task, subject)))
    return reports


def difference_from_training(path: Path, data: loader.Dataset, limit: int) -> str:
    """Return a line about the validation loss that training printed for a checkpoint, if it is of another
    text or of fewer sequences than the validation split of `data`, else ""."""
    logged, text = checkpoint.evaluation(path)
    if not checkpoint.comparable(text, data.hashes["val"]):
        return f"note: {data.folder} has changed since {path} was saved: this is another text\n"
    if math.isinf(logged) or limit or len(data.val.texts) > 1:
        return ""
    sequences = counting.sequences_of(path.parent, data=data)
    whole = (len(data.val) - 1) // sequences.block_size
    part = f"{sequences.count:,} of the {whole:,} sequences of this split (--eval_iters)"
    return f"training evaluated {part}: val loss {logged:.4f}\n" * (sequences.count < whole)


def baseline(sequences: counting.Sequences, config: Config) -> dict[str, Any]:
    """Score n-gram counts on the run's validation sequences; print lines about them and the run."""
    run = Path(config.out_dir)
    figure, line = counting.measure(sequences)
    print(line)
    known = (run / metrics.NAME).is_file() and not config.dataset
    if known and (compared := counting.compared(run)):  # empty if the figure could not be kept
        print(f"{run}: {compared}", end="")
    return figure


def score_text(
    name: str,
    sources: list[Any],
    documents: list[str],
    subject: Subject,
    config: Config,
    bytes_per_token: float | None = None,
) -> Report:
    """Score token `sources`; `documents` are their texts, `bytes_per_token` those of the text, if known."""
    if config.stride > subject.block_size:
        raise UserError(f"--stride={config.stride} exceeds the context of {subject.block_size} tokens")
    stride = config.stride or subject.block_size
    windows = Windows(sources, subject.block_size, stride, config.limit)
    words = 0 if config.limit else sum(map(evals.count_words, documents))
    lost = sum(evals.lost(document, subject.tokenizer) for document in documents)
    return watched(
        name,
        len(windows),
        lambda see: evals.run_text(name, windows, subject, words, lost, see, bytes_per_token),
    )


def watched(name: str, total: int, work: Callable[[Advance], Report]) -> Report:
    """Run `work` with a progress bar, and print its summary line."""
    hidden = None if os.environ.get("RANK", "0") == "0" else True  # None: disabled if not a terminal
    with tqdm(total=total, desc=name, disable=hidden, leave=False, unit="row") as bar:
        report = work(bar.update)
    print(report.describe())
    return report


def read_texts(path: str) -> list[str]:
    """Read the texts of a file. Raise UserError if all are empty."""
    try:
        sources = text_files.find([Path(path)]).sources
    except UserError as error:
        if "--" not in str(error):
            raise
        raise UserError(f"{error}; these are options of data/prepare.py: for --text convert it") from None
    documents: list[str] = []
    for source, pieces in groupby(readers.pieces(sources, readers.Reading()), lambda p: sources[p.source]):
        if source.kind == "text":
            documents.append("".join(str(piece.content) for piece in pieces))
            continue
        for _, row in (row for piece in pieces for row in readers.documents(piece, "text")):
            if isinstance(row, readers.BadRow):
                raise UserError(f"{source.path}, line {row.number} {row.reason}")
            documents.append(row)
    if not any(documents):
        raise UserError(f"--text={path} contains no text")
    return documents


def compare(a: tuple[Opened, list[Report]], b: tuple[Opened, list[Report]], limit: int) -> dict[str, Any]:
    """Print the score differences a minus b; return them with b's results for the JSON file. Raise UserError
    if `limit` selects other parts of a text for each model."""
    contexts = [opened.subject.block_size for opened, _ in (a, b)]
    if limit and len({*contexts}) > 1 and any(report.kind == "text" for report in a[1]):
        raise UserError(f"--limit={limit} selects other parts of a text for contexts of {contexts}; omit it")
    print(f"{a[0].path} minus {b[0].path}:")
    differences = {}
    for one, other in zip(a[1], b[1], strict=True):
        by_metric = evals.compare(one, other)
        parts = [f"{name} {difference.describe()}" for name, difference in by_metric.items()]
        print(f"{one.name}: {', '.join(parts)}")
        differences[one.name] = {name: asdict(difference) for name, difference in by_metric.items()}
    return {"against": results(*b), "differences": differences}


def results(opened: Opened, reports: list[Report]) -> dict[str, Any]:
    """Return the model and its scores for the JSON file."""
    return {"model": opened.path, "results": {report.name: report.to_json() for report in reports}}


def write(config: Config, result: dict[str, Any], scored: list[tuple[Opened, list[Report]]]) -> None:
    if config.out:
        files.write_json(Path(config.out), result)
    if config.items:
        rows = [
            {"model": opened.path, "task": report.name, **row}
            for opened, reports in scored
            for report in reports
            for row in report.rows
        ]
        files.write_text(Path(config.items), "".join(json.dumps(row) + "\n" for row in rows))


def program() -> None:
    config, models = load_with_arguments(Config, sys.argv[1:])
    if len(models) > 1:
        raise UserError(f"expected one model, not {', '.join(models)}; another: --against=FOLDER")
    if models and any(word.startswith("--out_dir") for word in sys.argv):
        raise UserError(f"{models[0]} and --out_dir={config.out_dir} given; expected one model: omit one")
    main(replace(config, out_dir=models[0]) if models else config)


if __name__ == "__main__":
    run_program(program)
