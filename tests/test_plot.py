"""Tests of plot.py: the curves equal the logged rows, for any kinds of rows."""

import json
from pathlib import Path

import numpy as np
import pytest

import plot
from nanogpt.config import load_with_arguments
from nanogpt.diagnostics import runs
from nanogpt.errors import UserError
from nanogpt.model import GPT, GPTConfig

PANELS = ["learning\nrate", "gradient\nnorm", "tokens/s"]


def step(iter_num: int, loss: float | None) -> dict:
    return {
        "event": "step",
        "iter": iter_num,
        "tokens": (iter_num + 1) * 10,
        "loss": loss,
        "step_s": 0.1,
        "tokens_per_s": 100.0,
        "lr": 1e-3 * iter_num,
        "grad_norm": 2.0,
        "clipped": True,
        "elapsed_s": (iter_num + 1) * 0.1,
    }


def evaluation(iter_num: int, val_loss: float | None) -> dict:
    row = {"event": "eval", "iter": iter_num, "tokens": iter_num * 10, "train_loss": 1.0}
    return row | {"val_loss": val_loss, "val_stderr": 0.1, "epochs": 0.0, "elapsed_s": iter_num * 0.1}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes rows to a run folder and returns the folder's path as typed by a user."""

    def write_run(name: str, *rows: dict) -> str:
        (tmp_path / name).mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write_run


@pytest.fixture
def usual(write):
    """A run of 30 steps and 3 evaluations; the second evaluation is the best."""
    steps = [step(i, 4.0 - i / 10) for i in range(30)]
    return write(
        "out", evaluation(0, 4.1), *steps[:10], evaluation(10, 2.9), *steps[10:], evaluation(20, 3.2)
    )


def figure_of(folders, **options):
    config = plot.Config(**options)
    runs = [plot.load_run(Path(folder), Path(folder).name, config.x) for folder in folders]
    return plot.draw([[run] for run in runs], config)


def curves(axes) -> list[tuple[list[float], list[float]]]:
    return [tuple(np.asarray(part, dtype=float).tolist() for part in line.get_data()) for line in axes.lines]


def test_tokens_and_time_include_the_steps_after_the_last_logged_one(write):
    run = plot.load_run(Path(write("out", step(0, 4.0), step(10, 3.0), evaluation(15, 2.9))), "out", "iter")
    assert (run.tokens, run.seconds) == (150, 1.5)


def test_writes_a_figure_and_reports_the_best_loss(usual, tmp_path, capsys):
    plot.main(plot.Config(), [usual])
    png = (tmp_path / "out" / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 20_000
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (1600, 1500)
    said = f"wrote {tmp_path / 'out' / 'loss.png'}; best validation loss 2.9000 at iteration 10\n"
    assert capsys.readouterr().out == said


def test_several_runs_are_plotted_in_one_figure(usual, write, tmp_path, monkeypatch, capsys):
    better = write("better", evaluation(7, 1.5))
    monkeypatch.chdir(tmp_path)
    plot.main(plot.Config(), [usual, better])
    assert (tmp_path / "loss.png").is_file()
    assert capsys.readouterr().out.endswith(
        "loss.png; best validation loss 1.5000 at iteration 7 of better\n"
    )


@pytest.mark.parametrize(
    ("x", "steps_at", "evals_at", "label"),
    [
        ("iter", range(30), [0, 10, 20], "iteration"),
        ("tokens", range(10, 310, 10), [0, 100, 200], "tokens trained on"),
        ("seconds", np.arange(1, 31) / 10, [0, 1, 2], "training time (s)"),
    ],
)
def test_curves_equal_the_logged_rows(usual, x, steps_at, evals_at, label):
    figure = figure_of([usual], x=x)
    losses, *panels = figure.axes
    raw, smoothed, validation, best = curves(losses)
    assert raw[0] == smoothed[0] == pytest.approx(list(steps_at))
    assert raw[1] == pytest.approx([4.0 - i / 10 for i in range(30)])
    assert validation[0] == pytest.approx(evals_at) and validation[1] == [4.1, 2.9, 3.2]
    assert best == ([pytest.approx(evals_at[1])], [2.9])
    assert [text.get_text() for text in losses.get_legend().get_texts()] == [
        "training",
        "validation, best 2.9000",
    ]
    assert [panel.get_ylabel() for panel in panels] == PANELS
    assert curves(panels[0])[0][1] == pytest.approx([1e-3 * i for i in range(30)])
    assert panels[-1].get_xlabel() == label


def test_perplexity_is_the_exponential_of_the_loss(usual):
    axes = figure_of([usual], y="perplexity").axes[0]
    assert curves(axes)[2][1] == pytest.approx(np.exp([4.1, 2.9, 3.2]))
    assert axes.get_ylabel() == "perplexity" and axes.get_yscale() == "log"


def test_each_run_has_a_color_and_a_legend_entry(usual, write):
    figure = figure_of([usual, write("b", step(0, 3.0))])
    axes = figure.axes[0]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["out, best 2.9000", "b"]
    assert {line.get_color() for line in axes.lines} == set(plot.COLOURS[:2])


def test_runs_of_the_same_name_are_labeled_by_path(write, tmp_path, monkeypatch):
    folders = [write("a/out", evaluation(0, 3.0)), write("b/out", evaluation(0, 2.0))]
    drawn, real = [], plot.draw
    monkeypatch.setattr(plot, "draw", lambda groups, config: drawn.extend(groups) or real(groups, config))
    plot.main(plot.Config(out=str(tmp_path / "x.png")), folders)
    assert [run.name for (run,) in drawn] == folders[::-1]  # best first


@pytest.mark.parametrize(
    "rows",
    [
        [step(0, 3.0)],
        [evaluation(0, 3.0)],
        [step(i, 3.0) for i in range(20)],
        [step(0, 3.0), step(1, None), step(2, 2.0), evaluation(3, None)],
    ],
    ids=["one step", "one evaluation", "only steps", "numbers that were not finite"],
)
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_incomplete_runs_are_plotted(write, rows, suffix, tmp_path, recwarn):
    out = tmp_path / f"x.{suffix}"
    plot.main(plot.Config(out=str(out)), [write("odd", *rows)])
    ours = [warning for warning in recwarn if not issubclass(warning.category, ResourceWarning)]
    assert out.stat().st_size > 5000 and not ours


def check(iter_num: int, **values) -> dict:
    return {"event": "health", "iter": iter_num, "tokens": iter_num * 10, "warnings": [], **values}


def test_health_of_a_single_run_has_a_panel_per_quantity_and_a_line_per_block(usual, write):
    rows = [step(i, 3.0) for i in range(5)]
    values = [{"activation": [1.0, 2.0], "dead": [0.0, 0.0], "entropy": [0.5]}, {"activation": [3.0, None]}]
    values += [{"activation": "damaged"}, {"entropy": [0.1, "x"]}]
    checked = write("checked", *rows, *(check(i, **row) for i, row in enumerate(values, start=1)))
    figure = figure_of([checked], x="seconds")
    activation, entropy = figure.axes[4:]  # none of dead: it is 0 throughout
    assert [activation.get_ylabel(), entropy.get_ylabel()] == ["activation\n(RMS)", "attention\nentropy"]
    assert curves(activation)[0] == (pytest.approx([0.2, 0.3]), [1.0, 3.0])
    assert curves(activation)[1][1] == pytest.approx([2.0, np.nan], nan_ok=True)
    assert curves(entropy)[0] == (pytest.approx([0.2, 0.5]), [0.5, 0.1])
    assert [text.get_text() for text in activation.get_legend().get_texts()] == ["block 0", "block 1"]
    assert len(figure_of([checked, usual]).axes) == 4


def test_no_empty_panels_without_steps(write):
    assert len(figure_of([write("evaluated", evaluation(0, 3.0))]).axes) == 1


def test_smoothing_keeps_the_mean_and_the_start():
    noisy = np.tile([1.0, 3.0], 300)
    assert plot.smooth(noisy)[20:] == pytest.approx(2.0, abs=0.1)
    falling = np.linspace(4, 1, 600)
    assert plot.smooth(falling)[:500] == pytest.approx(falling[:500])
    assert plot.smooth(np.array([5.0])).tolist() == [5.0]


def test_tick_labels_are_short():
    assert [plot.short(v) for v in (0, 500, 1500, 20_000, 2_000_000, 10e9)] == [
        "0",
        "500",
        "1.5k",
        "20k",
        "2M",
        "10B",
    ]
    assert [plot.short(v) for v in (3e15, 2.5e20)] == ["3P", "250E"]
    assert [plot.plain(v) for v in (6e-4, 250.0, 1_000_000)] == ["0.0006", "250", "1,000,000"]


def test_bad_input_is_a_one_line_error(usual, write, tmp_path):
    empty, foreign = write("empty"), write("foreign", {"event": "step", "iter": 1})
    for folders, out, reason in (
        ([], "", "0 runs given"),
        ([str(tmp_path / "none")], "", "has no metrics.jsonl"),
        ([empty], "", "has no rows of train.py; wait"),
        ([foreign], "", "was not written by train.py"),
        ([usual], "x.doc", "must end in one of"),
        ([usual], str(tmp_path / "nowhere" / "x.png"), "cannot be written: No such file"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            plot.main(plot.Config(out=out), folders)
        assert "\n" not in str(caught.value)


def test_of_several_runs_those_that_cannot_be_read_are_left_out(usual, write, tmp_path, capsys):
    damaged = write("damaged")
    (Path(damaged) / "metrics.jsonl").write_bytes(b"\xff\n{")
    plot.main(plot.Config(out=str(tmp_path / "x.png")), [damaged, usual, usual])
    left_out, wrote = capsys.readouterr().out.splitlines()
    assert left_out.startswith(f"left out: {Path(damaged) / 'metrics.jsonl'} has no rows of train.py; wait")
    assert wrote.endswith("best validation loss 2.9000 at iteration 10")
    with pytest.raises(UserError, match="has no rows of train"):
        plot.main(plot.Config(out=str(tmp_path / "x.png")), [damaged, write("empty")])


def describe(folder: str, **options) -> None:
    about = {"options": {"dataset": "d", "max_iters": 30, "learning_rate": 0.1, "out_dir": folder} | options}
    (Path(folder) / "config.json").write_text(json.dumps(about), encoding="utf-8")


def test_options_of_another_type_are_an_error_of_one_line(usual, tmp_path):
    (Path(usual) / "config.json").write_text('{"options": 3}', encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json: options is 3, not an object"):
        plot.main(plot.Config(healthy=True, out=str(tmp_path / "x.png")), [usual])


@pytest.fixture
def seeds(write):
    """Three seeds each of two recipes, in order: worse, better."""
    folders = []
    for rate, base in ((0.1, 3.0), (0.2, 2.0)):
        for seed in range(3):
            losses = [step(i, base + seed / 100 - i / 50) for i in range(10)]
            folders.append(write(f"r{rate}-{seed}", *losses, evaluation(10, base + seed / 100)))
            describe(folders[-1], learning_rate=rate, seed=seed)
    return folders


def test_table_ranks_groups_of_seeds_and_lists_what_differs(seeds, usual, tmp_path, capsys):
    plot.main(plot.Config(out=str(tmp_path / "x.png")), [*seeds, usual])
    heading, first, second, third, note, _ = capsys.readouterr().out.splitlines()
    assert heading.split("  ")[-1] == "options that differ" and note.startswith("±: standard error")
    options = ["dataset=d", "learning_rate=0.2", "max_iters=30"]
    assert first.split() == ["1", "r0.2-0", "(3", "seeds)", "2.0100", "±", "0.0058", "100", "0:01", *options]
    assert second.split() == ["2", "out", "2.9000", "±", "0.1000", "300", "0:03"]
    assert "learning_rate=0.1" in third


def test_runs_from_other_weights_or_on_other_data_are_no_seeds_of_each_other(seeds, capsys, tmp_path):
    describe(seeds[0], learning_rate=0.1, seed=0, init_from="base")
    describe(seeds[1], learning_rate=0.1, seed=0, init_from="resume")
    describe(seeds[2], learning_rate=0.1, seed=0)
    groups = runs.grouped([runs.load(Path(folder)) for folder in seeds[:3]])
    assert [len(group) for group in groups] == [1, 2] and plot.label(groups[1]) == "r0.1-1 (2 runs)"
    for number, folder in enumerate(seeds[3:]):
        path = Path(folder, "config.json")
        about = json.loads(path.read_text(encoding="utf-8")) | {"data": {"val": str(number)}}
        path.write_text(json.dumps(about), encoding="utf-8")
    plot.main(plot.Config(out=str(tmp_path / "x.png"), compare=True), seeds[3:5])
    said = capsys.readouterr().out
    assert "cannot be compared: d was prepared anew between the runs" in said and "2 seeds" not in said
    assert "\nd was prepared anew between the runs: their losses cannot be ranked\n" in said


def test_copies_of_a_seed_are_no_seeds_and_parts_of_the_text_are_mentioned(seeds, tmp_path, capsys):
    for number, folder in enumerate(seeds[:4]):
        describe(folder, learning_rate=0.1 if number < 2 else 0.2, seed=0)
        path = Path(folder, "config.json")
        about = json.loads(path.read_text(encoding="utf-8"))
        about["data"] = {"val": "a", "sequences": f"[{4 + number // 2}] of 16"}
        path.write_text(json.dumps(about), encoding="utf-8")
    plot.main(plot.Config(out=str(tmp_path / "x.png"), compare=True), seeds[:4])
    said = capsys.readouterr().out
    assert "(twice the standard error of the evaluations; that of the seeds is not known" in said
    assert "(2 runs)" in said and said.count("note: evaluated on different parts of the validation text") == 2


def test_seeds_are_drawn_as_their_mean_in_a_band(seeds):
    runs = [plot.load_run(Path(folder), Path(folder).name, "iter") for folder in seeds]
    axes = plot.draw(plot.reading.grouped(runs), plot.Config()).axes[0]
    training, validation = curves(axes)[:2]
    assert training[1] == pytest.approx([3.01 - i / 50 for i in range(10)])
    assert validation == ([10.0], [pytest.approx(3.01)])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((3.0 - 9 / 50, 3.02))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "r0.1-0 (3 seeds), best 3.0100",
        "r0.2-0 (3 seeds), best 2.0100",
    ]


def test_seeds_of_unequal_speed_are_averaged_at_equal_iterations(write):
    folders = []
    for name, step_s in (("slow", 2.0), ("fast", 1.0)):
        rows = [
            row | {"elapsed_s": row["iter"] * step_s} for row in (evaluation(0, 4.0), evaluation(10, 3.0))
        ]
        folders.append(write(name, *rows))
    runs = [plot.load_run(Path(folder), Path(folder).name, "seconds") for folder in folders]
    axes = plot.draw([runs], plot.Config(x="seconds")).axes[0]
    assert ([0.0, 15.0], [4.0, 3.0]) in curves(axes)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["slow (2 seeds), best 3.0000"]


@pytest.mark.parametrize(("gap", "verdict"), [(1.0, "yes"), (0.005, "no")])
def test_compare_judges_the_difference_by_the_noise(gap, verdict, write, tmp_path, capsys):
    folders = []
    for rate in (0, 1):
        for seed in range(3):
            loss = 2.0 + rate * gap + seed / 100
            folders.append(write(f"{rate}-{seed}", step(0, 3.0), evaluation(10, loss)))
            describe(folders[-1], learning_rate=rate, seed=seed)
    config = plot.Config(out=str(tmp_path / "x.png"), compare=True)
    plot.main(config, folders)
    lines = capsys.readouterr().out.splitlines()
    assert f"0-0 is better by {gap:.4f} ± 0.02" in lines[0] and "(95 % interval, 3 and 3 seeds)" in lines[0]
    assert lines[1] == f"difference larger than the noise: {verdict}"
    plot.main(config, [folders[0], folders[3]])
    assert "± 0.2828 (twice the standard error of the evaluations; that of" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--compare: 3 runs of 1 kinds; give two"):
        plot.main(config, folders[:3])


def test_runs_of_different_datasets_are_not_compared(seeds, tmp_path, capsys):
    describe(seeds[0], dataset="other")
    plot.main(plot.Config(out=str(tmp_path / "x.png"), compare=True), [seeds[0], seeds[3]])
    said = capsys.readouterr().out
    assert said.startswith("cannot be compared: the datasets differ (d, other)\n")
    assert "\nthe datasets differ (d, other): their losses cannot be ranked\n" in said


def test_flops_axis_needs_the_shape_of_the_model(usual, tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json, so its FLOPs are not known; use --x=tokens"):
        figure_of([usual], x="flops")
    model = {"vocab_size": 10, "block_size": 4, "n_layer": 1, "n_head": 1, "n_embd": 8}
    (Path(usual) / "config.json").write_text(json.dumps({"model": model}), encoding="utf-8")
    figure = figure_of([usual], x="flops")
    per_token = GPT(GPTConfig(**model)).flops_per_token()
    assert curves(figure.axes[0])[2][0] == pytest.approx([0, 100 * per_token, 200 * per_token])
    assert figure.axes[-1].get_xlabel() == "training FLOPs"


def test_rows_of_another_version_or_cut_in_mid_line_are_left_out(write, tmp_path, capsys):
    old = {"event": "step", "iter": 1, "loss": 2.0}
    folder = write("old", old, {"iter": 3}, {"event": "new", "iter": 4, "x": {}}, evaluation(5, 1.5))
    with (Path(folder) / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('7\n{"event": "ev')
    plot.main(plot.Config(), [folder])
    assert capsys.readouterr().out.endswith("best validation loss 1.5000 at iteration 5\n")


def test_command_line_arguments():
    config, folders = load_with_arguments(plot.Config, ["a", "--x=tokens", "b"])
    assert config == plot.Config(x="tokens") and folders == ["a", "b"]
