"""Preset files: Python assignments that are parsed, never executed, so untrusted presets are safe to load."""

import ast
import operator
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanogpt import ROOT
from nanogpt.errors import UserError


def find(name: str) -> Path:
    """Return the path of preset `name`, a file or the name of one in config/."""
    for path in (Path(name), Path("config") / f"{name}.py", ROOT / name, ROOT / "config" / f"{name}.py"):
        if path.is_file():
            return path
    from nanogpt import usage

    raise usage.missing_preset(name, ROOT)


def assignments(path: Path) -> dict[str, Any]:
    """Return the names a preset file assigns, except scratch names with a leading underscore."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8-sig"))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UserError(f"{shown(path)} is not a preset: {error}") from None
    names: dict[str, Any] = {}
    for node in tree.body:
        try:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if docstring or ast.unparse(node) == "import time":
                continue
            if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
                raise ValueError(f"{ast.unparse(node).splitlines()[0]!r} is not an assignment `name = value`")
            names[node.targets[0].id] = _value(node.value, names)
        except (ValueError, ArithmeticError, RecursionError) as error:
            raise UserError(f"{shown(path)}, line {node.lineno}: {error}") from None
    return {name: value for name, value in names.items() if not name.startswith("_")}


_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]]
_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Pow: operator.pow}
_ARITHMETIC |= {ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    """Evaluate literals, arithmetic on numbers, and names set above; nothing else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | None):
        return node.value
    if ast.unparse(node) == "str(time.time())":  # the only code in nanoGPT's presets
        return str(time.time())
    if isinstance(node, ast.Name):
        if node.id in names:
            return names[node.id]
        raise ValueError(f"{node.id!r} is not set above")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(_value(node.operand, names))
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = _value(node.left, names), _value(node.right, names)
        if isinstance(left, str) and isinstance(right, str) and isinstance(node.op, ast.Add):
            return left + right
        left, right = _number(left), _number(right)
        if isinstance(node.op, ast.Pow) and not (abs(right) <= 64 and abs(left) <= 1e6):
            raise ValueError(f"{ast.unparse(node)!r} is too large")
        result = _ARITHMETIC[type(node.op)](left, right)
        if not isinstance(result, int | float) or abs(result) > 1e300:
            raise ValueError(f"{ast.unparse(node)!r} is too large")
        return result
    raise ValueError(
        f"{ast.unparse(node)!r} is code; use only numbers, strings, arithmetic and names set above"
    )


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return value


def shown(path: Path) -> str:
    """Return the name of a preset to print: its path, relative to the repository if inside it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
