"""Check the architecture of docs/design.md: imports point downwards, files and functions stay small."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PICTURE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
# Modules of nanogpt/, packages with a slash; each imports only from lower rows of the diagram.
LAYERS = [row.split(", ") for row in re.findall(r'(?m)^  r\d+\["([\w/, ]+)"\]$', PICTURE)]
LAYER_OF = {unit: number for number, units in enumerate(LAYERS) for unit in units}
LIBRARY = {
    path.relative_to(ROOT / "nanogpt").with_suffix("").as_posix(): path
    for path in (ROOT / "nanogpt").rglob("*.py")
    if path.stem not in ("__init__", "__main__")
}
PROGRAMS = [*ROOT.glob("*.py"), *ROOT.glob("data/**/prepare.py")]
PYTHON = [
    *PROGRAMS,
    *LIBRARY.values(),
    *(p for d in ("tests", "benchmarks", "config") for p in (ROOT / d).glob("*.py")),
]
PLAIN = {  # modules that do not import torch
    *("exits", "errors", "files", "presets", "usage", "config", "metrics", "options"),
    *("data/ramp", "data/samplers", "data/mixture_sampler", "data/token_files", "evaluation/tasks"),
    *(name for name in LIBRARY if name.startswith(("tokenizer/", "prepare/"))),
}


def imported(path: Path) -> set[str]:
    """Return every module that the file imports, including imports inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def ours(module: str) -> set[str]:
    """Return the library modules that a library module imports, as relative paths."""
    names = {name.removeprefix("nanogpt.").replace(".", "/") for name in imported(LIBRARY[module])}
    return names & set(LIBRARY)


def unit(module: str) -> str:
    """Return the package of a module, or the module itself if it is not in a package."""
    package, slash, _ = module.partition("/")
    return package + slash


def test_every_module_has_a_layer():
    assert {unit(module) for module in LIBRARY} == set(LAYER_OF)
    assert len([name for name in LIBRARY if "/" not in name]) <= 18


@pytest.mark.parametrize("module", sorted(LIBRARY))
def test_imports_point_downwards(module):
    for name in ours(module):
        if unit(name) != unit(module):
            assert LAYER_OF[unit(name)] < LAYER_OF[unit(module)], f"{module} imports {name}"


def test_no_import_cycles():
    TopologicalSorter({module: ours(module) for module in LIBRARY}).prepare()  # CycleError lists modules


def test_programs_import_no_other_program_except_train():
    stems = {path.stem for path in ROOT.glob("*.py")}
    for path in PROGRAMS:
        assert not imported(path) & stems - ({"train", "bench"} if path.name == "plan.py" else {"train"}), (
            path.name
        )


def test_plain_modules_do_not_import_torch():
    for module in PLAIN:
        assert not {name for name in imported(LIBRARY[module]) if name.startswith("torch")}


def test_model_imports_only_torch():
    allowed = {
        "math",
        "torch",
        "dataclasses",
        "functools",
        "importlib",  # of the methods for code written for nanoGPT
        "collections",
        "nanogpt.chunked_loss",
        "nanogpt.loss",
        "nanogpt.ngrams",
        "typing",
    }
    names = imported(ROOT / "nanogpt" / "model.py")
    assert {
        name for name in names if not any(name == a or name.startswith(a + ".") for a in allowed)
    } == set()


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_sizes_and_forbidden_calls(path):
    text = path.read_text(encoding="utf-8")
    main = path.name in ("train.py", "model.py")
    assert len(text.splitlines()) <= (650 if main else 500), "does this file hold two subjects?"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{node.name} is too long"
        if isinstance(node, ast.Call) and "tests" not in path.parts:
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "pickle.load", "pickle.loads", "os.system")
            if called == "torch.load":
                assert "weights_only=True" in ast.unparse(node)
            if called == "open" or called.endswith(".read_text"):
                assert any(k.arg == "encoding" for k in node.keywords) or "b" in ast.unparse(node), called


def test_pickle_is_read_in_one_restricted_place():
    users = [path.name for path in LIBRARY.values() if "pickle" in imported(path)]
    assert sorted(users) == ["ckpt.py", "foreign.py"]
    used = {ast.unparse(n) for n in ast.walk(tree("convert/ckpt")) if isinstance(n, ast.Attribute)}
    assert {name for name in used if name.startswith("pickle.")} == {"pickle.dumps", "pickle.UnpicklingError"}


def tree(module: str) -> ast.Module:
    return ast.parse(LIBRARY[module].read_text(encoding="utf-8"))
