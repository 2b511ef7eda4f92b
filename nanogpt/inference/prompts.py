"""Prompts from files."""

import os
from pathlib import Path

from nanogpt import files
from nanogpt.errors import UserError


def read_file(prompts_file: str, start: str) -> list[str]:
    """Return the prompts of a JSONL file, one per line; without one the text of the file in `start`
    ("FILE:prompt.txt"). Raise UserError if a file or a line cannot be read."""
    option = f"--prompts={prompts_file}" if prompts_file else f"--start={start}"
    name = prompts_file or os.path.expanduser(start.removeprefix("FILE:"))
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {error}; give a UTF-8 text file") from None
    if not prompts_file:
        return [text]
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            prompts.append(_prompt(line, f"{option}, line {number}"))
    if not prompts:
        raise UserError(f'{option} contains no prompts; write one per line: {{"prompt": "..."}}')
    return prompts


def _prompt(line: str, where: str) -> str:
    value = files.parse_json(line, where)
    value = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise UserError(f'{where}: expected {{"prompt": "..."}} or a string, found {line.strip()[:60]}')
    return value.replace("\r\n", "\n")  # as in training texts
