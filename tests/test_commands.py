"""Every command of nanoGPT's documentation, and every command in this project's READMEs.

They run as written, in a copy of the project, with options appended that make the runs small. Two-node
commands run in test_world.py, with the local address.
"""

import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

import bench
import eval as evaluation
import export
import plan
import sample
import serve
import train
from nanogpt.config import read
from nanogpt.convert.pretrained import NAMES
from nanogpt.presets import assignments
from tests import hf_folders, launch, texts
from tests.conftest import found, words, write_dataset

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --gradient_accumulation_steps=2"
TINY = {
    "train.py": f"{SMALL} --max_iters=2 --eval_iters=1 --warmup_iters=1 --lr_decay_iters=2 --device=cpu",
    "sample.py": "--num_samples=2 --max_new_tokens=5 --device=cpu",
    "eval.py": "--device=cpu --limit=5",
    "plan.py": SMALL,
    "bench.py": "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --device=cpu --steps=3 --warmup_steps=1",
    "data/shakespeare_char/prepare.py": "--input=input.txt",
    "data/shakespeare/prepare.py": "--input=input.txt",
    "data/openwebtext/prepare.py": "--source=pages.jsonl --val_fraction=0.1",
}
CPU_COMMAND = (
    "python train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
    "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
NOW = [  # in the order in which a reader uses them
    "python data/shakespeare_char/prepare.py",
    "python train.py config/train_shakespeare_char.py",
    "python train.py config/train_shakespeare_char.py --device=cpu --batch_size=32",
    CPU_COMMAND,
    "python sample.py --out_dir=out-shakespeare-char",
    "python sample.py --out_dir=out-shakespeare-char --device=cpu",
    "python data/shakespeare/prepare.py",
    "python data/openwebtext/prepare.py",
    "python train.py config/train_gpt2.py",
    "python train.py",
    "python train.py --batch_size=32 --compile=False",
    "python sample.py",
    "python sample.py --start=FILE:prompt.txt",
    "python bench.py",
    "python train.py eval_gpt2",
    "python train.py eval_gpt2_medium",
    "python train.py eval_gpt2_large",
    "python train.py eval_gpt2_xl",
    "python train.py config/eval_gpt2.py",
    "python train.py config/finetune_shakespeare.py",
    'python sample.py --init_from=gpt2-xl --start="What is the answer to life, the universe, and '
    'everything?" --num_samples=5 --max_new_tokens=100',
    "torchrun --standalone --nproc_per_node=4 train.py",
    "torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py",
]


def checkout(folder: Path) -> Path:
    """Copy the tracked files of the project to `folder`, as in a clone."""
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("config/*.py"),
        *ROOT.glob("nanogpt/**/*.py"),
        *ROOT.glob("nanogpt/**/*.md"),
    ]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for path in ROOT.glob("data/**/*.py"):
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    return folder


def stocked(folder: Path) -> Path:
    """Create a clone with all that its commands read: texts, token ids, random models in a hub cache."""
    checkout(folder)
    merges = found("gpt2/vocab.bpe")
    if merges:
        (folder / "cache" / "gpt2").mkdir(parents=True)
        shutil.copy(merges, folder / "cache" / "gpt2")
    for name in NAMES:
        shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32}
        hf_folders.write_cache(folder / "hf", f"openai-community/{name}", merges=merges, **shape)
    ids = np.random.default_rng(0).integers(0, 50257, 3000).astype("<u2")
    for dataset, split in itertools.product(("openwebtext", "shakespeare"), ("train", "val")):
        ids.tofile(folder / "data" / dataset / f"{split}.bin")  # as nanoGPT writes them
    (folder / "input.txt").write_text(texts.python_sources(50_000), encoding="utf-8")
    (folder / "prompt.txt").write_text("To be, or not", encoding="utf-8")
    rows = [json.dumps({"text": page}) + "\n" for page in texts.web_pages(200)]
    (folder / "pages.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return stocked(tmp_path_factory.mktemp("clone"))


def needs_merges(command: str) -> bool:
    """Return whether the command encodes or decodes GPT-2 tokens; training on token ids does not."""
    return bool(
        re.search(
            r"(shakespeare|openwebtext)/prepare|sample\.py( --start=FILE|$)|gpt2(-xl)? --start|"
            r"out-shakespeare --num",
            command,
        )
    )


def run(command: str, folder: Path) -> str:
    command = re.sub(r" --minutes=\S+", "", command)  # --max_iters is appended
    command = re.sub(r"--nproc_per_node=\d", "--nproc_per_node=2", command)  # each process imports torch
    program = next((word for word in shlex.split(command) if word.endswith(".py")), "train.py")
    launcher, *words_given = shlex.split(command) + shlex.split(TINY.get(program, ""))
    if launcher == "nanogpt":
        words_given = ["-m", "nanogpt", *words_given]
    if launcher == "torchrun":
        words_given = ["-m", "torch.distributed.run", *words_given, "--gradient_accumulation_steps=4"]
    variables = {"NANOGPT_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf")}
    done = launch.run(words_given, folder, variables)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.parametrize("command", NOW)
def test_nanogpt_documentation_commands_run(command, clone, real):
    if needs_merges(command):
        real("gpt2/vocab.bpe")
    out = run(command, clone)
    assert out.strip()
    if command.startswith("python sample.py"):
        assert out.count("\n---------------\n") == 2


# ----------------------------------------------------------------------------- presets


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.stem)
def test_every_preset_fits_train(path):
    options = read(train.Config, [str(path)])
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert head.startswith("# ") and f"train.py config/{path.name}" in path.read_text(encoding="utf-8")
    assert set(assignments(path)) == set(options.values)


# ----------------------------------------------------------------------------- own documentation


def commands_in(document: str) -> list[str]:
    """Return the lines in the shell blocks of `document` that start one of the project's programs."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, flags=re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(python|torchrun|nanogpt) ", line)]


PAGES = [
    *("README.md", "README.zh-CN.md", "CONTRIBUTING.md"),
    *("docs/data.md", "docs/evaluation.md", "docs/weights.md", "docs/serving.md"),
    *("docs/finetuning.md", "docs/reproduce.md", "docs/gpu.md", "docs/scaling-arithmetic.md"),
]
OURS = [(page, command) for page in PAGES for command in commands_in(page)]
PARSERS = {
    "train.py": train.Config,
    "sample.py": sample.Config,
    "export.py": export.Config,
    "serve.py": serve.Config,
}


@pytest.mark.parametrize(("page", "command"), OURS)
def test_documented_commands_have_valid_options(page, command):
    """Programs, options and presets exist; the commands of README are run below."""
    given = shlex.split(command)
    if given[0] == "nanogpt":
        read(train.Config, given[2:])
        return
    program = next(word for word in given if word.endswith(".py"))
    given = given[given.index(program) + 1 :]
    assert (ROOT / program).is_file()
    if program in PARSERS:
        read(PARSERS[program], given)
    if program == "eval.py":
        read(evaluation.Config, given, arguments=True)
    if program == "plan.py":
        read(plan.Config, given, other_keys=frozenset(train.Config.__dataclass_fields__))
    if program == "bench.py":
        read(bench.Config, given, other_keys=frozenset(train.Config.__dataclass_fields__))


def test_both_readmes_show_the_same_commands():
    assert commands_in("README.md") == commands_in("README.zh-CN.md")


def test_readme_commands_run_in_order(tmp_path):
    """Run the commands of README one after another, with small runs."""
    folder = stocked(tmp_path)
    (folder / "novel.txt").write_text(words(3000), encoding="utf-8")
    (folder / "prompt.txt").write_text("ab", encoding="utf-8")
    write_dataset(folder / "data" / "python_stdlib", words(3000))
    left_out = ["python_stdlib", "serve.py"]  # serve.py does not exit
    commands = [c for c in commands_in("README.md") if not any(name in c for name in left_out)]
    for command in commands:
        if found("gpt2/vocab.bpe") or not needs_merges(command):
            run(command, folder)
