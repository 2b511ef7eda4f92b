"""From a plain model to the one that runs: compiled where that was asked and works here."""

from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]


def wrap(
    function: Function,
    *,
    compile: bool | str,
    device: torch.device,
    trial: Callable[[Function], None],
    dynamic: bool = False,
) -> tuple[Function, str]:
    """Compile a model (or one of its methods) if asked; "auto" asks where it always pays, on CUDA.

    Compilation happens at the first call, so `trial` calls it once. `dynamic`: for shapes that change
    from call to call. Returns what to call and a notice ("" if all went as asked). A machine without a
    working compiler gets `function` back and one line that says so. The plain model stays the one to save.
    """
    if not compile or (compile == "auto" and device.type != "cuda"):
        return function, ""
    compiled = torch.compile(function, dynamic=dynamic)
    try:
        trial(compiled)
    except Exception as error:  # the compiler raises whatever its back end does
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return function, f"torch.compile does not work here ({lines[0][:120]}); running without it"
    return compiled, ""
