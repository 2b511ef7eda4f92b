"""The tree stays as docs/design.md draws it: imports point downwards, files and functions stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [
    {"errors"},
    {"files", "download", "bpe", "world", "vocabulary", "trackers", "usage"}
    | {"prepare/pool", "serving/refusal", "serving/meters"},
    {"config", "schedule", "flops", "tokenizer", "order", "tokenfiles", "loss"}
    | {"meta_pkl"}
    | {"score/significance", "serving/guard", "serving/transport", "distributed/heartbeat"}
    | {"distributed/meeting"},
    {
        "options",
        "chunked_loss",
        "data",
        "metrics",
        "position",
        "cache",
        "sampling",
        "stream",
        "lora",
        "native",
    }
    | {"prepare/text", "prepare/shards", "score/tasks", "exchange/hf_tokenizer", "distributed/world"},
    {"model", "finetune", "documents", "decode_step", "mixture", "optim"}
    | {"prepare/sources", "distributed/interconnect"},
    {"checkpoint", "runtime", "generate", "distributed/layout", "prepare/encode", "estimate"}
    | {"exchange/pretrained", "exchange/modeling_nanogpt"},
    {"compile", "writer", "kernels", "quantize", "fit", "graphs", "score/scoring"}
    | {"prepare/survey", "exchange/hf", "exchange/hf_export", "exchange/ckpt"}
    | {"serving/completions", "serving/scheduler"},
    {"distributed/parallel", "distributed/wire", "score/evals", "score/harness", "prepare/corpus"}
    | {"exchange/weights", "serving/answers"},
    {"watch", "resolve", "api", "validation", "distributed/scaling", "prepare/web", "prepare/shakespeare"},
    {"serving/follow"},
    {"serving/server"},
]
LAYER_OF = {module: number for number, modules in enumerate(LAYERS) for module in modules}
LIBRARY = {
    path.relative_to(ROOT / "nanogpt").with_suffix("").as_posix(): path
    for path in (ROOT / "nanogpt").rglob("*.py")
    if path.stem != "__init__"
}
PROGRAMS = [*ROOT.glob("*.py"), *ROOT.glob("data/**/prepare.py")]
PYTHON = [
    *PROGRAMS,
    *LIBRARY.values(),
    *(p for d in ("tests", "benchmarks", "config") for p in (ROOT / d).glob("*.py")),
]
PLAIN = (LAYERS[0] | LAYERS[1] | LAYERS[2]) - {"loss", "world"}  # they do without torch
PLAIN |= {"options", "score/tasks"}
PLAIN |= {f"prepare/{name}" for name in ("text", "shards", "sources", "encode", "survey", "corpus", "web")}
PLAIN |= {"prepare/shakespeare"}


def imported(path: Path) -> set[str]:
    """Every module that the file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def ours(names: set[str]) -> set[str]:
    """The modules of the library among `names`, by their path in it."""
    return {name.removeprefix("nanogpt.").replace(".", "/") for name in names} & set(LAYER_OF)


def test_every_module_has_a_layer():
    assert set(LIBRARY) == set(LAYER_OF)


@pytest.mark.parametrize("module", sorted(LAYER_OF))
def test_imports_point_downwards(module):
    for name in ours(imported(LIBRARY[module])):
        assert LAYER_OF[name] < LAYER_OF[module], f"{module} imports {name}"


def test_programs_import_no_other_but_train():
    stems = {path.stem for path in ROOT.glob("*.py")}
    for path in PROGRAMS:
        assert not imported(path) & stems - {"train"}, path.name


def test_plain_modules_do_without_torch():
    for module in PLAIN:
        assert not {name for name in imported(LIBRARY[module]) if name.startswith("torch")}


def test_the_model_knows_torch_and_nothing_else():
    allowed = {
        "math",
        "torch",
        "dataclasses",
        "functools",
        "collections",
        "nanogpt.inference.kv_cache",
        "nanogpt.chunked_loss",
        "nanogpt.loss",
        "nanogpt.position",
        "typing",
    }
    names = imported(ROOT / "nanogpt" / "model.py")
    assert {
        name for name in names if not any(name == a or name.startswith(a + ".") for a in allowed)
    } == set()


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_sizes_and_dangers(path):
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


def test_pickle_is_read_in_one_guarded_place():
    users = [path.name for path in LIBRARY.values() if "pickle" in imported(path)]
    assert sorted(users) == ["ckpt.py", "meta_pkl.py"]
    used = {ast.unparse(n) for n in ast.walk(tree("exchange/ckpt")) if isinstance(n, ast.Attribute)}
    assert {name for name in used if name.startswith("pickle.")} == {"pickle.dumps", "pickle.UnpicklingError"}


def tree(module: str) -> ast.Module:
    return ast.parse(LIBRARY[module].read_text(encoding="utf-8"))
