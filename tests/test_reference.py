"""Tests of the bands of reference runs: other seeds are inside, runs with a fault outside, early."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import plot
import train
from benchmarks import record_reference
from nanogpt.data import loader
from nanogpt.diagnostics import reference, runs
from nanogpt.errors import UserError
from tests.conftest import small_run

SHIPPED = sorted(reference.FOLDER.glob("*.json"))


@pytest.fixture
def config(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    return small_run(dataset, tmp_path / "out", max_iters=60, eval_interval=20, batch_size=32)


def trained(config: train.Config, name: str, **options) -> runs.Run:
    config = replace(config, out_dir=str(Path(config.out_dir).with_name(name)), **options)
    train.main(config)
    return runs.load(Path(config.out_dir))


@pytest.fixture
def three(config):
    found = [trained(config, f"reference-{seed}", seed=seed) for seed in range(3)]
    for run in found:
        about = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
        about["command"] = ["train.py", "config/tiny.py"]
        (run.folder / "config.json").write_text(json.dumps(about), encoding="utf-8")
    record_reference.write([str(run.folder) for run in found])
    return config


def unshifted(monkeypatch):
    real = loader.gather
    monkeypatch.setattr(loader, "gather", lambda *args: (real(*args)[0], real(*args)[0].clone()))


def test_other_seeds_are_inside_and_faults_outside(three, monkeypatch):
    inside = "inside the band of tiny.py (3 seeds): 64 losses compared"
    assert [reference.verdict(trained(three, f"o{seed}", seed=seed)) for seed in (3, 4, 5)] == [inside] * 3
    fast = trained(three, "fast", seed=6, learning_rate=1e-2)
    options = fast.about["options"] | {"learning_rate": three.learning_rate}  # a fault that no option shows
    fast = replace(fast, about=fast.about | {"options": options})
    assert "outside the band of tiny.py (3 seeds): training loss below it at " in reference.verdict(fast)
    unshifted(monkeypatch)
    copying = trained(three, "copying", seed=7)
    assert reference.verdict(copying).startswith("outside the band of tiny.py")


def test_the_bands_are_drawn_around_the_losses_of_another_seed(three):
    trained(three, "other", seed=3), trained(three, "short", max_iters=5)
    parent = Path(three.out_dir).parent
    other, apart = (plot.load_run(parent / name, name, "iter") for name in ("other", "short"))
    config = plot.Config(healthy=True)
    losses = plot.draw([[other]], config).axes[0]
    training, validation = (shape.get_paths()[0] for shape in losses.collections)
    rows = json.loads((reference.FOLDER / "dataset-60.json").read_text(encoding="utf-8"))["val_loss"]
    for iteration, *seeds in rows:
        assert validation.contains_point((iteration, sum(seeds) / 3))
        assert not validation.contains_point((iteration, 2 * max(seeds)))
    assert training.get_extents().x1 == 59
    assert not plot.draw([[apart]], config).axes[0].collections  # no reference
    assert not plot.draw([[other]], plot.Config()).axes[0].collections


def test_closing_line_is_printed_only_with_a_reference(three, capsys, monkeypatch, tmp_path):
    said = "this run is inside the band of tiny.py (3 seeds): 64 losses compared\n"
    assert reference.final_line(tmp_path / "reference-0") == said
    other = trained(three, "other", n_layer=1)
    assert reference.final_line(other.folder) == ""
    with pytest.raises(UserError, match=r"other differs from tiny\.py: n_layer=1, not 2"):
        reference.verdict(other)
    with pytest.raises(UserError, match=r"no reference for dataset-5; there are .*: dataset-60"):
        reference.verdict(trained(three, "short", max_iters=5))


def test_runs_by_time_have_no_reference_and_say_so(three, tmp_path, capsys):
    about = tmp_path / "reference-1" / "config.json"
    value = json.loads(about.read_text(encoding="utf-8"))
    value["options"]["minutes"] = 1.0
    about.write_text(json.dumps(value), encoding="utf-8")
    said = "no reference for runs by --minutes, whose iterations depend on the machine; there are"
    assert said in reference.final_line(tmp_path / "reference-1")
    config = plot.Config(healthy=True, out=str(tmp_path / "x.png"))
    plot.main(config, [str(tmp_path / f"reference-{seed}") for seed in (1, 2)])
    lines = capsys.readouterr().out.splitlines()
    assert said in lines[0]  # and the others are still compared
    assert lines[1].startswith("reference-2 is inside the band of tiny.py") and (tmp_path / "x.png").is_file()


def test_reference_needs_three_seeds_of_one_run(three, tmp_path):
    with pytest.raises(UserError, match="2 runs given; expected three or more"):
        record_reference.write([str(tmp_path / "reference-0"), str(tmp_path / "reference-1")])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": "x"}, "loss is 'x', not"),
        ({"val_loss": [[1, 2, 3, "x"]]}, "val_loss.* is 'x', not"),
        ({"loss": [[1, 2.0]]}, "not each row of losses"),
        ({"options": []}, "options is"),
    ],
)
def test_a_damaged_reference_is_an_error_of_one_line(changed, message, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    band = [[1, 2.0, 2.1, 2.2]]
    value = {"preset": "a", "seeds": [1, 2, 3], "options": {}, "loss": band, "val_loss": band} | changed
    (tmp_path / "x-5.json").write_text(json.dumps(value), encoding="utf-8")
    about = {"options": {"dataset": "x", "max_iters": 5}}
    with pytest.raises(UserError, match=message):
        reference.find(runs.Run("a", tmp_path, {}, {}, about, 0, 0))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_references_have_three_seeds_and_options_of_their_preset(path):
    about = json.loads(path.read_text(encoding="utf-8"))
    assert len(set(about["seeds"])) >= 3 and path.stat().st_size < 30_000
    assert path.stem == f"{about['options']['dataset']}-{about['options']['max_iters']}"
    for rows in (about["loss"], about["val_loss"]):
        assert all(len(row) == 1 + len(about["seeds"]) for row in rows)
    given = ["--max_iters=400"] if "quickstart" in about["preset"] else []
    preset = vars(train.load(train.Config, [f"config/{about['preset']}", *given])[0])
    kept = {key: value for key, value in preset.items() if key in about["options"] and key != "minutes"}
    assert kept == {key: about["options"][key] for key in kept}
