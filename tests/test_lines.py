"""Limits on the lines of code that a plain run and sampling load, and on the modules they load.

A code line has a token other than a comment or docstring. docs/design.md tracks the counts.
"""

import ast
import json
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from tests.conftest import train_until_it_knows

ROOT = Path(__file__).resolve().parent.parent
TRAIN, SAMPLE, PRODUCT = 2894, 2391, 14700
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
SILENT |= {tokenize.ENDMARKER, tokenize.ENCODING}
LOADED = """
import json, runpy, sys
program, target = sys.argv[1:3]
sys.argv = [program, *sys.argv[3:]]
sys.path[0] = "."
try:
    runpy.run_path(program, run_name="__main__")
finally:
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    open(target, "w", encoding="utf-8").write(json.dumps([file for file in files if file]))
"""


def code_lines(path: Path) -> int:
    lines: set[int] = set()
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in SILENT:
                lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def loaded(program: str, *arguments: str, note: Path) -> dict[str, int]:
    """Run a program; return the project files it has loaded at exit, with their code lines."""
    command = [sys.executable, "-c", LOADED, program, str(note), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    paths = {ROOT / program} | {Path(file).resolve() for file in json.loads(note.read_text(encoding="utf-8"))}
    own = [path for path in paths if path.suffix == ".py" and path.is_relative_to(ROOT) and path.exists()]
    own = [path for path in own if "site-packages" not in path.parts]
    return {path.relative_to(ROOT).as_posix(): code_lines(path) for path in own}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train_until_it_knows(folder, 3)
    return folder


def test_plain_run_loads_only_what_its_options_need(run, tmp_path):
    given = [f"--dataset={run / 'dataset'}", f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--max_iters=1"]
    found = loaded("train.py", "config/quickstart.py", *given, "--eval_iters=1", note=tmp_path / "note.json")
    assert {"train.py", "nanogpt/model.py", "nanogpt/checkpoint/writer.py"} <= set(found)
    foreign = ("distributed", "convert", "evaluation", "finetune", "gpu", "inference", "planning", "prepare")
    optional = ("chunked_loss", "compile", "data/mixture", "data/documents", "tokenizer/tokenizer", "usage")
    unwanted = [f"nanogpt/{name}/__init__.py" for name in (*foreign, "server")] + [
        f"nanogpt/{n}.py" for n in optional
    ]
    assert set(found) & set(unwanted) == set()
    assert sum(found.values()) <= TRAIN, found


def test_sampling_loads_few_lines(run, tmp_path):
    given = [f"--out_dir={run / 'out'}", "--device=cpu", "--num_samples=1", "--max_new_tokens=3"]
    found = loaded("sample.py", *given, note=tmp_path / "note.json")
    assert "nanogpt/distributed/__init__.py" not in found
    assert sum(found.values()) <= SAMPLE, found


def test_total_line_count_is_limited():
    files = [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py"), *ROOT.glob("nanogpt/**/*.py")]
    assert sum(map(code_lines, files)) <= PRODUCT


ENTERED = """
import json, sys
import train
from nanogpt.config import load
from nanogpt.world import World
run = train.build(*load(train.Config, sys.argv[2:]), World())
model, micro_batches, step = train.prepare_step(run)
step(model, run.optimizer, run.scaler, micro_batches(0), 1e-3, 1.0)
batches, entered = list(micro_batches(1)), set()
sys.setprofile(lambda frame, event, arg: entered.add(frame.f_code.co_filename))
step(model, run.optimizer, run.scaler, batches, 1e-3, 1.0)
sys.setprofile(None)
open(sys.argv[1], "w", encoding="utf-8").write(json.dumps(sorted(entered)))
"""


def test_training_step_spans_at_most_five_files(run, tmp_path):
    given = ["config/quickstart.py", f"--dataset={run / 'dataset'}", "--device=cpu"]
    command = [sys.executable, "-c", ENTERED, str(tmp_path / "note.json"), *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    paths = [Path(file) for file in json.loads((tmp_path / "note.json").read_text(encoding="utf-8"))]
    names = {path.name for path in paths if path.is_relative_to(ROOT) and "site-packages" not in path.parts}
    assert names <= {"train.py", "runtime.py", "model.py", "loss.py", "optim.py"}
