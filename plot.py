"""Plot and compare the training curves of runs.

    python plot.py out-shakespeare-char
    python plot.py out-a out-b --x=tokens --out=compare.png     # also prints a table, best first
    python plot.py --healthy out-shakespeare-char               # is it inside the band of the reference runs?
    python plot.py --compare out-a out-b                        # is the difference larger than the noise?

Reads metrics.jsonl in the run folders; it can be used during training. Runs that differ only in the seed are
drawn as one curve with a band, and --compare takes several of each kind.
"""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nanogpt import command, files
from nanogpt.config import FilePath, load_with_arguments
from nanogpt.diagnostics import runs as reading
from nanogpt.diagnostics.runs import Run
from nanogpt.errors import UserError, run_program

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Config:
    x: Literal["iter", "tokens", "seconds", "flops"] = "iter"  # x axis; seconds: without evaluation, saving
    y: Literal["loss", "perplexity"] = "loss"  # y axis of the main panel
    out: FilePath = ""  # output file: .png, .svg or .pdf; empty: loss.png in the run (several runs: here)
    compare: bool = False  # say whether two runs, or two groups of seeds, differ by more than the noise
    healthy: bool = False  # say whether runs are inside the band of the reference runs of their preset


X = {  # option: key in metrics.jsonl, axis label
    "iter": ("iter", "iteration"),
    "tokens": ("tokens", "tokens trained on"),
    "seconds": ("elapsed_s", "training time (s)"),
    "flops": ("tokens", "training FLOPs"),
}
PANELS = {  # key in rows of event "step": axis label
    "lr": "learning\nrate",
    "grad_norm": "gradient\nnorm",
    "tokens_per_s": "tokens/s",
}
HEALTH = {  # key in rows of event "health", with a value per block: axis label
    "grad_norm": "gradient\n(per block)",
    "update": "update /\nweights",
    "activation": "activation\n(RMS)",
    "dead": "dead\nMLP units",
    "entropy": "attention\nentropy",
}
# Okabe-Ito palette, safe for color blindness; without its yellow, which is too pale for lines.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
# Fonts of common systems for characters that matplotlib's own font lacks.
CJK_FONTS = ["Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei", "WenQuanYi Micro Hei"]
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": "#999999",
    "ytick.color": "#999999",
    "xtick.labelcolor": "#333333",
    "ytick.labelcolor": "#333333",
    "legend.frameon": False,
    "legend.title_fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


def main(config: Config, folders: Sequence[str]) -> None:
    """Plot the runs in `folders`. Raise UserError if a run cannot be read or the plot cannot be written."""
    if not folders:
        raise UserError(f"0 runs given; expected run folders: {command('plot')} out")
    folders = list(dict.fromkeys(folders))
    out = Path(config.out) if config.out else (Path(folders[0]) if len(folders) == 1 else Path()) / "loss.png"
    last_parts = [Path(folder).resolve().name for folder in folders]
    names = last_parts if len(set(last_parts)) == len(folders) else folders
    runs = []
    for folder, name in zip(folders, names, strict=True):
        try:
            runs.append(load_run(Path(folder), name, config.x))
        except UserError as error:
            if folder == folders[-1] and not runs:
                raise
            print(f"left out: {error}")
    if config.healthy:
        from nanogpt.diagnostics import reference

        for run in runs:
            try:
                print(f"{run.name} is {reference.verdict(run)}")
            except UserError as error:  # no reference; the others are still compared, and all are drawn
                print(error)
    if config.compare:
        print(compare(runs))
    groups = sorted(reading.grouped(runs), key=rank) if len(runs) > 1 else [runs]
    if len(runs) > 1:
        print(*table(groups), sep="\n")
    if len(groups) > len(COLOURS):
        print(f"{len(groups)} different runs; the {len(COLOURS)} best are drawn")
    check_suffix(out)  # needs matplotlib, which is not needed to compare
    figure = draw(groups[: len(COLOURS)], config)
    try:
        with files.staged(out) as draft:
            figure.savefig(draft, format=out.suffix[1:].lower(), dpi=200)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}; choose another --out") from None
    print(f"wrote {out}; {summary(runs)}")


def rank(group: Sequence[Run]) -> float:
    """Return the mean validation loss of `group`; infinity if there is no evaluation."""
    loss = float(np.mean([run.val_loss for run in group]))
    return loss if np.isfinite(loss) else float("inf")


def compare(runs: Sequence[Run]) -> str:
    groups = [[run] for run in runs] if len(runs) == 2 else reading.grouped(runs)
    if len(groups) != 2:
        raise UserError(
            f"--compare: {len(runs)} runs of {len(groups)} kinds; give two, or seeds of two kinds"
        )
    return reading.compare(*groups)


def table(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Return the lines of a table of `groups`: loss, tokens, time, and the options that differ."""
    rows = [("", "run", "validation loss", "tokens", "time", "options that differ")]
    different = reading.differing([group[0] for group in groups])
    for number, (group, options) in enumerate(zip(groups, different, strict=True), start=1):
        apart = reading.one_per_seed(group)
        loss, error = reading.mean_and_error([run.val_loss for run in apart])
        if len(apart) == 1:
            error = group[0].stderr
        shown = f"{loss:.4f}" + (f" ± {error:.4f}" if np.isfinite(error) else "")
        seconds = float(np.mean([run.seconds for run in group]))
        tokens, time = short(float(f"{group[0].tokens:.3g}")), f"{seconds // 60:.0f}:{seconds % 60:02.0f}"
        shown = shown if np.isfinite(loss) else "none yet"
        rows.append((str(number), label(group), shown, tokens, time, options))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    every = [run for group in groups for run in group]
    if why := reading.unlike(every):
        lines.append(f"{why}: their losses cannot be ranked")
    elif part := reading.evaluated_unlike(every):
        lines.append(f"note: {part}")
    return [*lines, "±: standard error, of the mean over seeds or of the evaluation of one run"]


def label(group: Sequence[Run]) -> str:
    what = "seeds" if len(reading.one_per_seed(group)) == len(group) else "runs"
    return group[0].name + (f" ({len(group)} {what})" if len(group) > 1 else "")


def check_suffix(out: Path) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if out.suffix[1:].lower() not in known:
        raise UserError(f"--out={out}: the name must end in one of {', '.join(f'.{kind}' for kind in known)}")


def load_run(folder: Path, name: str, x: str) -> Run:
    run = reading.load(folder, name, X[x][0], tuple(PANELS))
    if x == "flops":
        if "model" not in run.about:
            raise UserError(f"{folder} has no config.json, so its FLOPs are not known; use --x=tokens")
        from nanogpt.model import GPTConfig
        from nanogpt.planning import estimate

        flops = estimate.flops_per_token(GPTConfig(**run.about["model"]))
        for columns in (run.steps, run.evals):
            columns["x"] *= flops
    return run


def summary(runs: Sequence[Run]) -> str:
    """Describe the best validation loss over all runs and where it was reached."""
    evaluated = [run for run in runs if np.isfinite(run.val_loss)]
    if not evaluated:
        return "no evaluation yet"
    best = min(evaluated, key=lambda run: run.val_loss)
    place = f" of {best.name}" if len(runs) > 1 else ""
    return f"best validation loss {best.val_loss:.4f} at iteration {best.best('iter'):.0f}{place}"


# ----------------------------------------------------------------------------- the figure


def draw(groups: Sequence[Sequence[Run]], config: Config) -> "Figure":
    """Plot the loss of each group of seeds, and below it one panel per entry of PANELS if it has steps, and
    of a single run one per entry of HEALTH that is not 0 throughout."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.font_manager import get_font_names
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    runs = [group[0] for group in groups]
    panels = PANELS if any(run.steps["x"].size for run in runs) else {}
    single = panels and sum(map(len, groups)) == 1  # lines of several runs' blocks could not be told apart
    health = {key: curves for key in HEALTH if single and (curves := per_block(runs[0], key))[1].any()}
    installed = set(get_font_names())
    fonts = ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]
    with matplotlib.rc_context({**STYLE, "font.family": fonts}):
        heights = [4.5] + [1] * (len(panels) + len(health))
        figure = Figure(figsize=(8, sum(heights) + 0.25 * len(groups) - 0.25), layout="constrained")
        axes = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        if config.healthy and len(runs) == 1:
            draw_reference(axes[0], runs[0], config.y)
        draw_losses(axes[0], groups, config.y)
        for ax, (key, label) in zip(axes[1:], panels.items(), strict=False):
            for run, colour in zip(runs, COLOURS, strict=False):
                draw_noisy(ax, run.steps["x"], run.steps[key], colour, exact=key == "lr")
            ax.set_ylabel(label)
        for ax, (key, (x, values)) in zip(axes[1 + len(panels) :], health.items(), strict=True):
            draw_blocks(ax, x, values, legend=ax is axes[1 + len(panels)])
            ax.set_ylabel(HEALTH[key])
        for ax in axes[1:]:
            ax.set_ylim(bottom=0)
            ax.yaxis.set_major_locator(MaxNLocator(3))
            ax.yaxis.set_major_formatter(FuncFormatter(short))
        axes[-1].set_xlabel(X[config.x][1])
        axes[-1].xaxis.set_major_formatter(FuncFormatter(short if config.x in ("tokens", "flops") else plain))
        axes[0].margins(x=0.01)
        figure.align_ylabels()
    return figure


def draw_losses(ax: "Axes", groups: Sequence[Sequence[Run]], y: str) -> None:
    """Plot training loss as a line, validation loss as dots; with several groups, one color per group. The
    seeds of a group are drawn as their mean, in a band from the lowest to the highest."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    single = len(groups) == 1 and len(groups[0]) == 1
    for group, colour in zip(groups, COLOURS, strict=False):
        x, losses, ends = band(group, "steps", "loss")
        at, val_losses, val_ends = band(group, "evals", "val_loss")
        best = int(np.nanargmin(val_losses)) if np.isfinite(val_losses).any() else None
        if y == "perplexity":
            losses, ends, val_losses, val_ends = map(np.exp, (losses, ends, val_losses, val_ends))
        if len(group) > 1:
            low, high = smooth(ends[0]), smooth(ends[1])
            ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            ax.fill_between(at, val_ends[0], val_ends[1], color=colour, alpha=0.35, linewidth=0)
        training = "training" if single and losses.size else None
        draw_noisy(ax, x, losses, colour, label=training, raw=len(group) == 1)
        title = ("validation" if val_losses.size else None) if single else label(group)
        if best is not None:
            title = f"{title}, best {val_losses[best]:.4f}"
        val_colour, line = (COLOURS[1], "o-") if single else (colour, "o--")
        ax.plot(at, val_losses, line, color=val_colour, markersize=4, label=title)
        if best is not None:
            ax.plot(at[best], val_losses[best], "o", color=val_colour, markersize=9, markeredgecolor="white")
    counted = [reading.baseline(run.folder) for group in groups for run in group]
    for loss, order in {(figures["loss"], figures["order"]) for figures in counted if figures}:
        title, height = f"counting, {order}-grams: {loss:.4f}", loss if y == "loss" else np.exp(loss)
        ax.axhline(height, color="#666666", linestyle=":", linewidth=1.2, label=title)
    ax.set_ylabel("loss (nats/token)" if y == "loss" else "perplexity")
    if y == "perplexity":
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(plain))
        ax.yaxis.set_minor_formatter(NullFormatter())
    seeds = ", bands: seeds" * any(len(group) > 1 for group in groups)
    title = None if single else f"lines: training, dots: validation{seeds}"
    # Above the axes: names of many runs would cover the curves.
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3 if single else 1, title=title)


def draw_reference(ax: "Axes", run: Run, y: str) -> None:
    """Draw the bands of the reference runs of this preset, if there are any, as far as `run` has come."""
    from nanogpt.diagnostics import reference

    with contextlib.suppress(UserError):
        found = reference.find(run)
        for colour, key, own in ((COLOURS[0], "loss", run.steps), (COLOURS[1], "val_loss", run.evals)):
            iters, center, half = reference.band(found[key])
            x = np.interp(iters, own["iter"], own["x"], right=np.nan) if own["x"].size else iters
            edges = center - half, center + half
            low, high = map(np.exp, edges) if y == "perplexity" else edges
            label = f"band of {len(found['seeds'])} runs" if key == "loss" else None
            ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0, label=label)


def band(group: Sequence[Run], event: str, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x, and the mean and the (lowest, highest) of `key` there over the runs of `group`.

    Runs are averaged at equal iterations, also if x is time: at those of the longest run that all reach.
    """
    columns = [getattr(run, event) for run in group]
    first = max(columns, key=lambda column: len(column["x"]))
    if len(group) == 1 or not len(first["x"]):
        return first["x"], first[key], np.stack([first[key], first[key]])
    columns = [column for column in columns if len(column["x"])]
    at = [i for i in first["iter"] if all(i <= column["iter"][-1] for column in columns)]
    x, values = (
        np.stack([np.interp(at, column["iter"], column[name]) for column in columns]) for name in ("x", key)
    )
    return x.mean(axis=0), values.mean(axis=0), np.stack([values.min(axis=0), values.max(axis=0)])


def draw_noisy(
    ax: "Axes",
    x: np.ndarray,
    y: np.ndarray,
    colour: str,
    *,
    label: str | None = None,
    exact: bool = False,
    raw: bool = True,
) -> None:
    """Plot the values smoothed, or not if `exact`, above a pale line of the `raw` ones."""
    there = np.isfinite(y)
    if raw and not exact:
        ax.plot(x, y, color=colour, alpha=0.3, linewidth=0.7)
    line = y[there] if exact else smooth(y[there])
    marker = "o" if there.sum() == 1 else ""  # a line with a single point is invisible
    ax.plot(x[there], line, color=colour, label=label, marker=marker, markersize=4)


def per_block(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return x and the values (blocks, x) of `key` in the health checks of `run`."""
    rows = [row for row in run.health if isinstance(row.get(key), list)]
    x = np.interp([row["iter"] for row in rows], run.steps["iter"], run.steps["x"])
    blocks = zip_longest(*([reading.number(value) for value in row[key]] for row in rows))
    return x, np.array(list(blocks), dtype=float)


def draw_blocks(ax: "Axes", x: np.ndarray, values: np.ndarray, *, legend: bool) -> None:
    """Plot `values` (blocks, x), from dark for the first block to light for the last."""
    from matplotlib import colormaps

    ends = {0: "block 0", len(values) - 1: f"block {len(values) - 1}"}
    for block, colour in enumerate(colormaps["viridis"](np.linspace(0, 0.85, len(values)))):
        ax.plot(x, values[block], ".-", color=colour, linewidth=1, markersize=4, label=ends.get(block))
    if legend:  # above the panel: lines fill it
        ax.legend(loc="lower right", bbox_to_anchor=(1, 0.9), ncols=2, fontsize=8)


def smooth(values: np.ndarray) -> np.ndarray:
    """Smooth with a centered moving average over about 3 % of the values.

    The window is narrower at the start, to follow the initial steep drop, and truncated at the end.
    """
    n = len(values)
    places = np.arange(n)
    reach = np.minimum(n // 60, places)
    first, last = places - reach, np.minimum(places + reach + 1, n)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[last] - sums[first]) / (last - first)


def plain(value: float, position: int | None = None) -> str:
    """Format a tick label: 0.0006, 250, 1,000,000."""
    return f"{value:,.10g}"


def short(value: float, position: int | None = None) -> str:
    """Format a tick label with SI-like suffixes: 500, 20k, 1.5M, 10B, 3P."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.10g}{unit}"
    return plain(value)


if __name__ == "__main__":
    run_program(lambda: main(*load_with_arguments(Config, sys.argv[1:])))
