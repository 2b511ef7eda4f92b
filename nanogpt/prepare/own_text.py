"""Training on your own texts in one command: `nanogpt novel.txt`, `train.py --dataset=novel.txt`."""

import hashlib
import importlib.util
import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from nanogpt import command, files, quoted
from nanogpt.errors import UserError
from nanogpt.prepare import corpus, text_files
from nanogpt.prepare.analyze import counted

MINUTES = 5  # of training, if no other length is given
LENGTHS = ("--minutes", "--max_iters", "--max_tokens", "--init_from")  # options that give another length
ALSO_OF_SAMPLE = ("--device", "--dtype")
ON_CPU, ON_GPU = "quickstart.py", "train_shakespeare_char.py"  # presets: 0.8M and 10.7M parameters
LARGE = 10_000_000  # tokens from which a model is trained from scratch, not finetuned


def folder_of(paths: Sequence[Path]) -> Path:
    """Return the dataset folder of these texts, data/NAME-HASH in the current folder. HASH depends on the
    names and contents of the files, so a text that has changed is prepared anew."""
    digest = hashlib.sha256()
    for path in paths:
        for file in text_files.listed(path) if path.is_dir() else [path]:
            if file.is_file():
                name = file.relative_to(path) if path.is_dir() else file.name
                digest.update(os.fsencode(name) + b"\0" + bytes.fromhex(files.sha256(file)))
    return Path("data", f"{paths[0].resolve().stem}-{digest.hexdigest()[:8]}")


def prepare(paths: Sequence[Path]) -> Path:
    """Prepare the texts in `folder_of(paths)`, unless that is done; return the folder.

    Raise UserError for text that cannot be used.
    """
    folder = folder_of(paths)
    if not (folder / "train.bin").is_file():
        try:
            summary = corpus.prepare(paths, folder)
        except UserError as error:
            if "--" not in str(error):
                raise
            texts = " ".join(quoted(str(path)) for path in paths)
            raise UserError(f"{error}; options such as these go to: {command('prepare')} {texts}") from None
        sizes = [f"{summary.meta['splits'][split]['tokens']:,}" for split in ("train", "val")]
        print(
            f"prepared {counted(len(summary.texts.sources), 'file')}: {sizes[0]} training and {sizes[1]} "
            f"validation tokens ({summary.tokenizer.kind}), in {folder}",
            *summary.remarks(),
            sep="\n",
        )
    return folder


def training_command(
    summary: corpus.Summary, *, on_cpu: str = "", on_gpu: str = "", dataset: str = ""
) -> str:
    """Return the command that trains on this dataset, with the preset for this machine.

    `on_cpu`, `on_gpu`: presets made for this dataset; `dataset`: its name in data/, if it is there.
    """
    pretrained = summary.tokenizer.kind == "gpt2" and summary.meta["splits"]["train"]["tokens"] < LARGE
    usual = "finetune_shakespeare.py --init_from=gpt2" if pretrained else ""
    chosen = (on_gpu or usual or ON_GPU) if has_gpu() else (on_cpu or usual or ON_CPU)
    option = f"--dataset={dataset}" if dataset else summary.option
    out = quoted(f"--out_dir=out-{summary.out.resolve().name.replace('_', '-')}")
    return f"{command('train')} config/{chosen} {option} {out}"


def has_gpu() -> bool:
    """Return whether there is an NVIDIA GPU, without importing torch."""
    return shutil.which("nvidia-smi") is not None


def train_and_sample(words: Sequence[str], run: Callable[..., None]) -> None:
    """Prepare the texts that `words` begins with, train on them with the options that follow, and sample.

    `run` starts a program: run("train", "--max_iters=10"). Raise UserError for a file that does not exist.
    """
    texts = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    options = list(words[len(texts) :])
    if missing := [text for text in texts if not Path(text).exists()]:
        raise UserError(
            f"no file or folder {missing[0]!r}; to train with a preset: {command('train')} PRESET"
        )
    if ready := [text for text in texts if (Path(text) / "meta.json").is_file()]:
        example = f"{command('train')} PRESET {quoted(f'--dataset={ready[0]}')}"
        raise UserError(f"{ready[0]} is a prepared dataset; to train on it: {example}")
    if any(option.startswith(("--help", "-h")) for option in options):
        run("train", *options)
    given = dict(option.partition("=")[::2] for option in options)
    folder = prepare([Path(text) for text in texts])
    out = given.get("--out_dir", f"out-{Path(texts[0]).resolve().stem}")
    length = [] if given.keys() & set(LENGTHS) else [f"--minutes={MINUTES}"]
    preset = ON_GPU if has_gpu() else ON_CPU
    run("train", f"config/{preset}", f"--dataset={folder}", f"--out_dir={out}", *length, *options)
    print("--- samples:", flush=True)
    device = [f"{name}={given[name]}" for name in ALSO_OF_SAMPLE if name in given]
    run("sample", f"--out_dir={out}", "--num_samples=3", "--max_new_tokens=400", "--overlap", *device)
    print(f"--- the model is in {out}, the tokens of the text in {folder}")
    option = quoted(f"--out_dir={out}")
    print(f"sample from it:   {command('sample')} {option}")
    if not given.keys() & set(LENGTHS) - {"--minutes"}:
        longer = f"--init_from=resume --minutes={2 * float(given.get('--minutes', MINUTES)):g}"
        print(f"train it longer:  {command('train')} {option} {longer}")
    print(f"plot the loss:    {command('plot')} {quoted(out)}")
    needed = "" if importlib.util.find_spec("starlette") else " (first: pip install 'nanogpt[serve]')"
    print(f"open a web page:  {command('serve')} {option}{needed}")
