"""Write a reference for `plot.py --healthy` to benchmarks/reference/ from three or more runs.

    python -m benchmarks.record_reference OUT1 OUT2 OUT3

The runs differ only in the seed.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanogpt import files
from nanogpt.diagnostics import reference, runs
from nanogpt.errors import UserError, run_program


def write(folders: Sequence[str]) -> None:
    """Write the reference of these runs, which differ only in the seed, to reference.FOLDER."""
    found = [runs.load(Path(folder)) for folder in folders]
    if len(runs.grouped(found)) != 1 or len(found) < 3:
        raise UserError(f"{len(found)} runs given; expected three or more that differ only in the seed")
    about = found[0].about
    columns = {"loss": [run.steps for run in found], "val_loss": [run.evals for run in found]}
    table = {}
    for key, each in columns.items():
        numbers = np.stack([column[key] for column in each], axis=1).round(4).tolist()
        table[key] = [[int(i), *row] for i, row in zip(each[0]["iter"], numbers, strict=True)]
    preset = next(Path(word).name for word in about["command"] if word.startswith("config"))
    path = reference.path_of(found[0].options)
    seeds = [run.about["options"]["seed"] for run in found]
    machine = {key: about[key] for key in ("torch", "numpy", "python", "device", "dtype") if key in about}
    heading = {"preset": preset, "seeds": seeds, "machine": machine, "options": found[0].options}
    # One iteration per line: these files are read in diffs.
    text = json.dumps(heading | table).replace("], [", "],\n [").replace('": [[', '": [\n [')
    files.write_text(path, text + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    run_program(lambda: write(sys.argv[1:]))
