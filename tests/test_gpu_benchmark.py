"""benchmarks/gpu.py with tiny sizes on the CPU, against a stand-in for a checkout of nanoGPT."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from nanogpt.errors import UserError

# Prints what nanoGPT's train.py prints, and needs nothing but Python.
TRAIN = """
import sys, time
given = dict(word[2:].split("=") for word in sys.argv[1:] if word.startswith("--"))
assert given["wandb_log"] == "False" and int(given["batch_size"]) == 2
print("step 0: train loss 10.0000, val loss 10.0000")
for i in range(int(given.get("max_iters", 10**6))):
    time.sleep(0.01)
    print(f"iter {i}: loss 9.0000, time 10.00ms, mfu -100.00%")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "train.py").write_text(TRAIN, encoding="utf-8")
    return folder


def test_one_call_measures_and_survives_a_part_that_fails(checkout, tmp_path, capsys):
    """chip and train124 are measured; shakespeare cannot be, and is told so; nothing is left running."""
    out = tmp_path / "out"
    config = gpu.Config(out=str(out), device="cpu", tiny=True, parts="chip,shakespeare,train124", minutes=1.5)
    gpu.main(config, [str(checkout)])
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    parts = results["parts"]
    assert "is not prepared" in parts["shakespeare"]["error"] and "figures" not in parts["shakespeare"]
    rate, copied = parts["chip"]["figures"]
    assert rate["ours"] > 0 and copied["ours"] > 0 and "error" not in parts["chip"]
    speed, first = parts["train124"]["figures"]
    assert 0 < first["theirs"] < 30 and first["what"] == "124M compiled, s to the first step, cold"
    assert "error" not in parts["train124"] and speed["what"] == "124M, tokens/s"
    # A batch of 8 windows of 32 tokens every 10 ms and a little more.
    assert 8 * 32 / 0.2 < speed["theirs"] < 8 * 32 / 0.01
    assert speed["ratio"] == pytest.approx(speed["ours"] / speed["theirs"])
    assert {len(blocks) for blocks in parts["train124"]["seconds_of"].values()} == {2}
    page = (out / "table.md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out
    assert (
        "Tiny sizes: these figures mean nothing" in page and "| 1.4 times, 550K | 1.7 times, 650K |" in page
    )
    assert page.count("not measured") == len(gpu.GOALS) - 2 and "- shakespeare: " in page


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {!r}]); time.sleep(60)"
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(mark)!r}).touch()"
    log = tmp_path / "log"
    assert gpu.supervised([sys.executable, "-c", code.format(child)], log, 1.0) == "not done after 1 s"
    subprocess.run([sys.executable, "-c", "import time; time.sleep(2)"], check=True)
    assert not mark.exists()


def test_what_went_wrong_is_one_line(tmp_path):
    log = tmp_path / "log"
    assert gpu.supervised([sys.executable, "-c", "1 / 0"], log, 20) == "ZeroDivisionError: division by zero"
    assert (
        gpu.supervised([sys.executable, "-c", "raise SystemExit(3)"], log, 20)
        == "ended with 3 and said nothing"
    )


def test_every_goal_has_a_row_whatever_was_measured():
    found = {"what": "checkpoint stall 124M, s", "ours": 0.5, "theirs": 1.5, "ratio": 3.0, "note": "n"}
    results = {"parts": {"checkpoint": {"figures": [found]}}, "machine": "m", "cuda": None, "tiny": False}
    page = gpu.report(results | {"command": ["c"]})
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(gpu.GOALS)
    line = (
        "| checkpoint stall 124M, s | blocking torch.save | 1.5 | 0.5 | 3.00 | 0.1 of it | 0.02 of it | n |"
    )
    assert line in rows


def test_no_part_takes_the_time_of_all():
    everything = gpu.limits([name for name, part in gpu.PARTS.items() if part.usual], 480)
    assert sum(everything.values()) == pytest.approx(480) and min(everything.values()) >= 20
    assert gpu.limits(["train124"], 480) == {"train124": 360.0}
    assert gpu.limits(["chip", "train124"], 60)["chip"] == 20 and gpu.limits(["chip"], 8) == {"chip": 8}


def test_what_cannot_begin_is_refused(checkout, tmp_path):
    tokens = tmp_path / "tokens.bin"
    with tokens.open("wb") as file:
        file.truncate(41 << 20)
    cases = [
        ({}, [], "name one checkout of nanoGPT"),
        ({"parts": "chip,trian124"}, [str(checkout)], "no part trian124; there are chip, "),
        ({"tokens": "nowhere"}, [str(checkout)], "--tokens=nowhere is no file"),
        ({"tokens": str(tokens)}, [str(checkout)], "is larger than 40 MB"),
    ]
    for options, arguments, said in cases:
        with pytest.raises(UserError, match=said):
            gpu.main(gpu.Config(out=str(tmp_path / "none"), **options), arguments)
    assert not (tmp_path / "none").exists()
