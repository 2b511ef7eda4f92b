"""Incremental reading of a run folder while train.py writes to it."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanogpt import files, metrics
from nanogpt.errors import UserError
from nanogpt.evaluation.in_training import SEPARATOR

KEYS = ("event", "iter", "tokens", "elapsed_s", "share", "loss", "train_loss", "val_loss", "tokens_per_s")
CHUNK = 1 << 20  # bytes of metrics.jsonl per call
SAMPLES = 60  # newest sample files per call
SAMPLE_BYTES = 1 << 16


def rows_since(run: Path, position: str) -> tuple[list[dict[str, Any]], str, bool]:
    """Return (rows, next position, restarted): complete rows of metrics.jsonl after `position`, KEYS only.

    `position` "" is the start of the file. `restarted`: the rows are from the start again, because the file
    was replaced (rewound by a resumed run) or truncated. Reads at most CHUNK bytes; call again for the rest.
    """
    try:
        with (run / metrics.NAME).open("rb") as file:
            status = os.fstat(file.fileno())
            identity = f"{status.st_ino:x}"
            offset, _, before = position.partition("-")
            anew = before != identity or not offset.isdigit() or int(offset[:18]) > status.st_size
            start = 0 if anew else int(offset)
            file.seek(start)
            content = file.read(CHUNK)
    except OSError:
        return [], "", True
    end = content.rfind(b"\n") + 1
    if not end and len(content) == CHUNK:  # skip: no valid row is that long
        end = CHUNK
    rows = [row for line in content[:end].splitlines() if (row := _row(line))]
    return rows, f"{start + end}-{identity}", anew


def _row(line: bytes) -> dict[str, Any] | None:
    with suppress(UserError):
        row = files.parse_json(line, metrics.NAME, metrics.ROW)
        if row["event"] in ("step", "eval"):
            return {key: row[key] for key in KEYS if isinstance(row.get(key), int | float | str)}
    return None


def samples(run: Path, after: int = -1) -> list[dict[str, Any]]:
    """Return the newest samples drawn during training (--sample_prompt), of iterations above `after`."""
    numbered = []
    for path in run.glob("samples/step-*.txt"):
        number = path.stem[5:]
        if number.isdigit() and int(number) > after and path.is_file():
            numbered.append((int(number), path))
    result = []
    for iter_num, path in sorted(numbered)[-SAMPLES:]:
        with suppress(OSError):
            text = path.read_bytes()[:SAMPLE_BYTES].decode("utf-8", "replace")
            texts = text.removesuffix(f"\n{SEPARATOR}\n").split(f"\n{SEPARATOR}\n")
            result.append({"iter": iter_num, "texts": texts})
    return result
