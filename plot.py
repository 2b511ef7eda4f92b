"""Plot the training curves of one or more runs.

    python plot.py out-shakespeare-char
    python plot.py out-a out-b --x=tokens --out=compare.png

Reads metrics.jsonl in the run folders; it can be used during training.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nanogpt import files, metrics
from nanogpt.config import FilePath, read
from nanogpt.errors import UserError, run_program

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Config:
    x: Literal["iter", "tokens", "seconds"] = "iter"  # x axis; seconds: without evaluation, saving
    y: Literal["loss", "perplexity"] = "loss"  # y axis of the main panel
    out: FilePath = ""  # output file: .png, .svg or .pdf; empty: loss.png in the run (several runs: here)


X = {  # option: key in metrics.jsonl, axis label
    "iter": ("iter", "iteration"),
    "tokens": ("tokens", "tokens trained on"),
    "seconds": ("elapsed_s", "training time (s)"),
}
PANELS = {  # key in rows of event "step": axis label
    "lr": "learning\nrate",
    "grad_norm": "gradient\nnorm",
    "tokens_per_s": "tokens/s",
}
# Okabe-Ito palette, safe for color blindness; without its yellow, which is too pale for lines.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
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


@dataclass(frozen=True)
class Run:
    """Metrics of a run as columns, float64; NaN where a value was not finite."""

    name: str
    steps: dict[str, np.ndarray]  # "x", "loss", and the keys of PANELS
    evals: dict[str, np.ndarray]  # "x", "iter", "val_loss"
    baseline: dict[str, Any]  # loss of n-gram counts and their order (eval.py --baseline); {}: unknown

    def best(self) -> int | None:
        """Return the index of the evaluation with the lowest validation loss; None if there is none."""
        losses = self.evals["val_loss"]
        return int(np.nanargmin(losses)) if np.isfinite(losses).any() else None


def main(config: Config, folders: Sequence[str]) -> None:
    """Plot the runs in `folders`. Raise UserError if a run cannot be read or the plot cannot be written."""
    if not 0 < len(folders) <= len(COLOURS):
        raise UserError(
            f"{len(folders)} runs given; expected 1 to {len(COLOURS)} run folders: python plot.py out"
        )
    out = Path(config.out) if config.out else (Path(folders[0]) if len(folders) == 1 else Path()) / "loss.png"
    check_suffix(out)
    last_parts = [Path(folder).resolve().name for folder in folders]
    names = last_parts if len(set(last_parts)) == len(folders) else folders
    runs = [load_run(Path(f), name, X[config.x][0]) for f, name in zip(folders, names, strict=True)]
    figure = draw(runs, config)
    try:
        with files.staged(out) as draft:
            figure.savefig(draft, format=out.suffix[1:].lower(), dpi=200)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}; choose another --out") from None
    print(f"wrote {out}; {summary(runs)}")


def check_suffix(out: Path) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if out.suffix[1:].lower() not in known:
        raise UserError(f"--out={out}: the name must end in one of {', '.join(f'.{kind}' for kind in known)}")


def load_run(folder: Path, name: str, x: str) -> Run:
    rows = metrics.read(folder)
    if not rows:
        raise UserError(f"{folder / metrics.NAME} is empty; wait for the first logged iteration")

    def columns(event: str, *keys: str) -> dict[str, np.ndarray]:
        chosen = [row | {"x": row[x]} for row in rows if row["event"] == event]
        return {key: np.array([row[key] for row in chosen], dtype=float) for key in ("x", *keys)}

    try:
        steps, evals = columns("step", "loss", *PANELS), columns("eval", "iter", "val_loss")
        counted = folder / "baseline.json"
        return Run(name, steps, evals, files.read_json(counted, dict) if counted.is_file() else {})
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{folder / metrics.NAME} was not written by train.py: {error!r}") from None


def summary(runs: Sequence[Run]) -> str:
    """Describe the best validation loss over all runs and where it was reached."""
    found = [(run.evals["val_loss"][best], best, run) for run in runs if (best := run.best()) is not None]
    if not found:
        return "no evaluation yet"
    loss, best, run = min(found, key=lambda item: item[0])
    place = f" of {run.name}" if len(runs) > 1 else ""
    return f"best validation loss {loss:.4f} at iteration {run.evals['iter'][best]:.0f}{place}"


# ----------------------------------------------------------------------------- the figure


def draw(runs: Sequence[Run], config: Config) -> "Figure":
    """Plot the loss, and below it one panel per entry of PANELS if any step was logged; shared x axis."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    panels = PANELS if any(run.steps["x"].size for run in runs) else {}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5 + len(panels)), layout="constrained")
        heights = [4.5] + [1] * len(panels)
        axes = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        draw_losses(axes[0], runs, config.y)
        for ax, (key, label) in zip(axes[1:], panels.items(), strict=True):
            for run, colour in zip(runs, COLOURS, strict=False):
                draw_noisy(ax, run.steps["x"], run.steps[key], colour, exact=key == "lr")
            ax.set_ylabel(label)
            ax.set_ylim(bottom=0)
            ax.yaxis.set_major_locator(MaxNLocator(3))
            ax.yaxis.set_major_formatter(FuncFormatter(short if key == "tokens_per_s" else plain))
        axes[-1].set_xlabel(X[config.x][1])
        axes[-1].xaxis.set_major_formatter(FuncFormatter(short if config.x == "tokens" else plain))
        axes[0].margins(x=0.01)
        figure.align_ylabels()
    return figure


def draw_losses(ax: "Axes", runs: Sequence[Run], y: str) -> None:
    """Plot training loss as a line, validation loss as dots; with several runs, one color per run."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    single = len(runs) == 1
    for run, colour in zip(runs, COLOURS, strict=False):
        losses, val_losses, best = run.steps["loss"], run.evals["val_loss"], run.best()
        if y == "perplexity":
            losses, val_losses = np.exp(losses), np.exp(val_losses)
        draw_noisy(ax, run.steps["x"], losses, colour, label="training" if single and losses.size else None)
        label = ("validation" if val_losses.size else None) if single else run.name
        if best is not None and not single:
            label = f"{run.name}, best {val_losses[best]:.4f}"
        val_colour, line = (COLOURS[1], "o-") if single else (colour, "o--")
        ax.plot(run.evals["x"], val_losses, line, color=val_colour, markersize=4, label=label)
        if best is not None:
            mark_best(ax, run.evals["x"], val_losses, best, val_colour, with_value=single)
    for loss, order in {(run.baseline["loss"], run.baseline["order"]) for run in runs if run.baseline}:
        label, height = f"counting, {order}-grams: {loss:.4f}", loss if y == "loss" else np.exp(loss)
        ax.axhline(height, color="#666666", linestyle=":", linewidth=1.2, label=label)
    ax.set_ylabel("loss (nats/token)" if y == "loss" else "perplexity")
    if y == "perplexity":
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(plain))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.legend(loc="upper right", title=None if single else "lines: training, dots: validation")


def mark_best(ax: "Axes", x: np.ndarray, y: np.ndarray, best: int, colour: str, *, with_value: bool) -> None:
    from matplotlib.patheffects import withStroke

    ax.plot(x[best], y[best], "o", color=colour, markersize=9, markeredgecolor="white", clip_on=False)
    if with_value:
        place = "left" if best == 0 else "right" if best == len(y) - 1 else "center"
        halo = withStroke(linewidth=3, foreground="white")  # keeps the label legible over lines
        ax.annotate(
            f"best {y[best]:.4f}",
            (x[best], y[best]),
            xytext=(0, 10),
            textcoords="offset points",
            ha=place,
            va="bottom",
            color=colour,
            fontweight="bold",
            path_effects=[halo],
        )


def draw_noisy(
    ax: "Axes", x: np.ndarray, y: np.ndarray, colour: str, *, label: str | None = None, exact: bool = False
) -> None:
    """Plot the raw values as a pale line below a smoothed one; `exact`: the raw values only."""
    there = np.isfinite(y)
    if not exact:
        ax.plot(x, y, color=colour, alpha=0.3, linewidth=0.7)
    line = y[there] if exact else smooth(y[there])
    marker = "o" if there.sum() == 1 else ""  # a line with a single point is invisible
    ax.plot(x[there], line, color=colour, label=label, marker=marker, markersize=4)


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
    """Format a tick label with SI-like suffixes: 500, 20k, 1.5M, 10B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.10g}{unit}"
    return plain(value)


def command_line(argv: Sequence[str]) -> tuple[Config, list[str]]:
    options = read(Config, argv, arguments=True)
    return Config(**options.values), options.arguments


if __name__ == "__main__":
    run_program(lambda: main(*command_line(sys.argv[1:])))
