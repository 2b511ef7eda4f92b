"""benchmarks/gpu.py with tiny sizes on the CPU, against a mock nanoGPT checkout."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bench
import train
from benchmarks import gpu, gpu_chip
from benchmarks.gpu_sides import Setup
from nanogpt import ROOT, config
from nanogpt.errors import UserError
from nanogpt.inference import quantize
from nanogpt.inference.graph_decode import GraphEngine
from tests.test_cuda_graphs import Recorder

# Prints the same lines as nanoGPT's train.py; standard library only.
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


def test_one_call_measures_and_survives_a_failing_part(checkout, tmp_path, capsys):
    """chip and train124 are measured; shakespeare fails and is reported; no process is left running."""
    out = tmp_path / "out"
    asked = gpu.Config(out=str(out), device="cpu", tiny=True, parts="chip,shakespeare,train124", minutes=1.5)
    gpu.main(asked, [str(checkout)])
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    parts = results["parts"]
    assert "is not prepared" in parts["shakespeare"]["error"] and "figures" not in parts["shakespeare"]
    rate, copied = parts["chip"]["figures"]
    assert rate["ours"] > 0 and copied["ours"] > 0 and "error" not in parts["chip"]
    speed, first = parts["train124"]["figures"]
    assert 0 < first["theirs"] < 40 and first["what"] == "124M compiled, s to the first step, cold"
    (machine,) = parts["train124"]["said"]["ours"]
    assert machine.startswith("machine: ")
    assert "error" not in parts["train124"] and speed["what"] == "124M, tokens/s"
    # A batch of 8 sequences of 32 tokens every 10 ms, plus overhead.
    assert 8 * 32 / 0.2 < speed["theirs"] < 8 * 32 / 0.01
    assert speed["ratio"] == pytest.approx(speed["ours"] / speed["theirs"])
    assert {len(blocks) for blocks in parts["train124"]["seconds_of"].values()} == {2}
    page = (out / "table.md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out
    assert "Tiny sizes: these figures mean nothing" in page and "- shakespeare: " in page
    rows = [line for line in page.splitlines() if line.startswith(tuple(f"| {what} |" for what in gpu.ROWS))]
    assert len(rows) == len(gpu.ROWS) == 9
    assert sum("| not measured | not measured |" in row for row in rows) == 7  # measured: 124M speed, and
    assert f"| {first['theirs']:.4g} / not measured |" in page  # the cold start, not the warm one
    assert {path.name for path in (out / "logs").iterdir()} >= {"train124-ours.txt", "chip-part.txt"}


def test_later_call_adds_parts_to_those_of_the_same_machine(checkout, tmp_path, monkeypatch):
    """Intermediate results of a part are in the files while it runs."""
    seen = []

    def run_part(name, config, checkout, limit, cache, look):
        figures = [{"what": "350M, tokens/s", "ours": 3.0, "theirs": 2.0, "ratio": 1.5, "note": ""}]
        if name == "train350":
            look({"figures": figures, "error": "not done yet", "seconds": 1.0})
            seen.append((out / "table.md").read_text(encoding="utf-8"))
            return {"figures": figures, "seconds": 2.0}
        return {"error": "broken", "seconds": 1.0}

    out = tmp_path / "out"
    monkeypatch.setattr(gpu, "run_part", run_part)
    for parts in ("train350", "decode"):
        gpu.main(gpu.Config(out=str(out), device="cpu", tiny=True, parts=parts), [str(checkout)])
    row = "| 350M, tokens/s | 189K (llm.c, H100) | 2 | 3 | 1.50 |"
    assert row in seen[0] and "- train350: not done yet" in seen[0]
    page = (out / "table.md").read_text(encoding="utf-8")
    assert row in page and "- decode: broken" in page and "train350:" not in page
    saved = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert list(saved["parts"]) == ["train350", "decode"] and len(saved["commands"]) == 2
    (out / "results.json").write_text(json.dumps(saved | {"torch": "1.0"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"was measured with torch 1\.0; give another --out"):
        gpu.main(gpu.Config(out=str(out), device="cpu", tiny=True, parts="chip"), [str(checkout)])


def test_hanging_part_is_killed_with_its_children(tmp_path):
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {!r}]); time.sleep(60)"
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(mark)!r}).touch()"
    log = tmp_path / "log"
    assert gpu.supervised([sys.executable, "-c", code.format(child)], log, 1.0) == "not done after 1 s"
    subprocess.run([sys.executable, "-c", "import time; time.sleep(2)"], check=True)
    assert not mark.exists()


def test_failures_are_summarized_in_one_line(tmp_path):
    log = tmp_path / "log"
    assert gpu.supervised([sys.executable, "-c", "1 / 0"], log, 20) == "ZeroDivisionError: division by zero"
    assert (
        gpu.supervised([sys.executable, "-c", "raise SystemExit(3)"], log, 20)
        == "exited with 3 and no output"
    )


def test_running_processes_are_monitored(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOOKS_S", 0.2)
    looks = []
    code = "import time; time.sleep(1)"
    said = gpu.supervised([sys.executable, "-c", code], tmp_path / "log", 20, lambda: looks.append(1))
    assert said == "" and len(looks) >= 3


def test_documented_table_matches_the_program():
    """docs/results.md has the rows, published figures and goals of table.md."""
    expected = [[what, row.public, row.least, row.aim] for what, row in gpu.ROWS.items()]
    lines = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    begin = lines.index("| " + " | ".join(gpu.HEADER) + " |") + 2
    rows = [line.strip("| ").split(" | ") for line in lines[begin : begin + len(gpu.ROWS)]]
    assert [[row[0], row[1], row[-2], row[-1]] for row in rows] == expected


def test_documented_gpu_options_exist_and_are_off_by_default():
    """Each option in the table of docs/gpu.md exists in train.py, with a value other than its default."""
    lines = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("| change | option |")) + 2
    rows = itertools.takewhile(lambda line: line.startswith("| "), lines[begin:])
    given = [word for row in rows for word in row.split(" | ")[1].strip("`").split() if word.startswith("--")]
    assert len(given) > 6
    values = config.read(train.Config, [word.strip("`,") for word in given]).values
    same = [name for name, value in values.items() if value == getattr(train.Config, name)]
    assert same == [] and len(values) > 6
    for option in set(itertools.chain(*(line.split() for line in gpu_chip.TRIED.values()))):
        assert config.read(bench.Config, [option]).values


def test_time_limit_is_divided_among_the_parts():
    usual = [name for name, part in gpu.PARTS.items() if part.usual]
    everything = gpu.limits(usual, 480)
    assert sum(everything.values()) == pytest.approx(480) and min(everything.values()) >= 20
    assert gpu.limits(["train124"], 480) == {"train124": 480}
    assert gpu.limits(["chip", "train124"], 60)["chip"] == 20 and gpu.limits(["chip"], 8) == {"chip": 8}


def test_decoding_with_cuda_graphs_is_timed(tmp_path, monkeypatch):
    """Uses the capture stand-in of test_cuda_graphs.py, and one for nanoGPT's model."""

    class Recorded(GraphEngine):
        def __init__(self, *given):
            super().__init__(*given, record=Recorder().text)

    class Theirs(torch.nn.Module):
        def generate(self, idx, count, temperature, top_k):
            time.sleep(0.001 * count)

    def cast(model, dtype):
        moved.append(next(model.parameters()).device)
        return quantize.cast(model, dtype)

    moved = []
    monkeypatch.setattr(gpu_chip, "cast", cast)
    monkeypatch.setattr(gpu_chip.GPT, "to", lambda model, device: moved.append(f"to {device}") or model)
    monkeypatch.setattr(gpu_chip, "GraphEngine", Recorded)
    monkeypatch.setattr(gpu_chip, "nanogpt_model", lambda checkout, shape: Theirs())
    about = {"device": "cpu", "tiny": True, "checkout": "", "budget_s": 60.0}
    found = gpu_chip.decode(Setup(about, tmp_path / "answer.json", time.monotonic()))
    assert not found["errors"]
    assert moved[:2] == ["to cpu", torch.device("cpu")]  # on a GPU before it is cast
    *batches, job = found["figures"]
    assert [one["what"] for one in batches] == [f"decode 124M, batch {n}, tokens/s" for n in (1, 10, 64)]
    for one in [*batches, job]:
        assert one["ratio"] > 0 and "Engine " in one["note"] and "Recorded " in one["note"]
    assert 100 < batches[0]["theirs"] <= 1001  # also on a busy machine
    assert job["what"] == "default sample job, s"


def test_invalid_arguments_are_rejected(checkout, tmp_path):
    tokens = tmp_path / "tokens.bin"
    with tokens.open("wb") as file:
        file.truncate(41 << 20)
    cases = [
        ({}, [], "expected one nanoGPT checkout"),
        ({"parts": "chip,trian124"}, [str(checkout)], "unknown part trian124 in --parts; expected chip, "),
        ({"tokens": "nowhere"}, [str(checkout)], "--tokens=nowhere is not a file"),
        ({"tokens": str(tokens)}, [str(checkout)], "is larger than 40 MB"),
    ]
    for options, arguments, said in cases:
        with pytest.raises(UserError, match=said):
            gpu.main(gpu.Config(out=str(tmp_path / "none"), **options), arguments)
    assert not (tmp_path / "none").exists()
