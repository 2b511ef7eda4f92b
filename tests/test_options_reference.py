"""docs/options.md is what the source says."""

from dataclasses import fields

import train
from benchmarks import options_reference


def test_reference_is_up_to_date():
    written = options_reference.TARGET.read_text(encoding="utf-8")
    assert written == options_reference.reference(), "run python -m benchmarks.options_reference"
    listed = written.split("## sample.py")[0]
    assert all(f"| `{field.name}` |" in listed for field in fields(train.Config))
