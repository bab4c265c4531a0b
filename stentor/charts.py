"""One palette and one way to draw for every chart of the suite.

The colours are Okabe and Ito's, safe for all eyes, or shades of them; names stand at the lines'
ends in their colours. A run, to the functions below, is {"name", "colour", "train": rows,
"eval": rows} with the rows of metrics.jsonl: {"step", "tokens", "loss", ...}.
"""
from __future__ import annotations

import io
import math
from pathlib import Path
from zlib import crc32

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from stentor.metrics import read_metrics

# The palette.

INK, GREY, PALE_GREY, PALEST_GREY = "#222222", "#767676", "#C9C9C9", "#EFEFEF"
OTHERS = "#9A9A9A"                                    # models that are nobody's here
BLUE, SKY, GREEN, ORANGE = "#0072B2", "#9BD3F5", "#009E73", "#E69F00"
VERMILION, PURPLE, YELLOW, BLACK = "#D55E00", "#CC79A7", "#F0E442", "#000000"
TINTS = "#CFE8F7", "#FCE3B4", "#CDEBDD", "#F3D3E4"    # behind text

MODEL_COLOURS = {                                     # one hue a family, darker the larger
    "stentor-12m": "#CC7F00", "stentor-30m": "#9C5400",
    "stentor2-12m-preview": "#3D9BD6", "stentor2-12m": "#0B65A3", "stentor2-30m": "#063A63",
    "stentor3-20m": "#0A8A66", "stentor3-50m": "#044D39",
    "portimbria-150m": "#B5598F", "stentor-big": "#6B2F55"}
RUN_COLOURS = [VERMILION, BLUE, GREEN, BLACK, PURPLE]  # dark enough for a thin line on white
PART_COLOURS = {"embedding": ORANGE, "attention": BLUE, "ffn": SKY, "norms": BLACK}
MIXTURE_COLOURS = [BLUE, SKY, GREEN, ORANGE, PURPLE, GREY, VERMILION, YELLOW]
SOURCE_COLOURS = {"falsereject": BLUE, "beavertails": VERMILION, "dolly": GREEN,
                  "seed_safety": "#B5598F", "concise_qa": BLACK}
LABEL_COLOURS = {"refusal": BLUE, "silent": PALE_GREY, "fake_refusal": VERMILION, "help": GREEN,
                 "degenerate": PALEST_GREY, "unsafe_compliance": BLACK}
MARKERS = "osD^vP"                                    # for readers who see no colours at all

STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
    "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.edgecolor": GREY, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#E4E4E4", "grid.linewidth": 0.7,
    "axes.axisbelow": True, "axes.titlelocation": "left", "axes.titlesize": 11,
    "lines.linewidth": 1.8, "lines.solid_capstyle": "round", "svg.hashsalt": "stentor"}


def colours_of(names) -> dict[str, str]:
    """{name: colour}. Published models have theirs; a run's follows from its name, and only a
    clash moves it on."""
    colours = {name: MODEL_COLOURS[name] for name in names if name in MODEL_COLOURS}
    for name in sorted(set(names) - set(colours)):
        start = crc32(name.encode()) % len(RUN_COLOURS)
        order = RUN_COLOURS[start:] + RUN_COLOURS[:start]
        free = (colour for colour in order if colour not in colours.values())
        colours[name] = next(free, order[0])
    return colours


# Figures.

def panels(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """(figure, axes) in the suite's style, which is the session's from here on.

    width, height: inches. axes and options: those of matplotlib's Figure.subplots. No pyplot: a
    figure is gone when nobody holds it, and is drawn once, by `show`.
    """
    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def show(figure, *paths) -> None:
    """Show a chart in the notebook, and save that very picture to `paths`, each .png or .svg.

    An unchanged chart is an unchanged file: nothing has a date in it.
    """
    from IPython.display import Image, display
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=160)
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            path.write_bytes(picture.getvalue())
        else:
            figure.savefig(path, metadata={"Date": None})
    display(Image(picture.getvalue(), width=round(figure.get_figwidth() * 96)))


# Axes.

X_AXES = {"step": "optimizer steps", "tokens": "training tokens", "elapsed_seconds": "hours"}
Y_AXES = {"loss": "loss (nats per token)", "perplexity": "perplexity",
          "bits_per_byte": "bits per byte"}


def short(number: float, _=None) -> str:
    """950 -> 950, 12,000 -> 12,000, 240,001,024 -> 240M, 8.5e9 -> 8.5B."""
    for unit, suffix in ((1e9, "B"), (1e6, "M")):
        if abs(number) >= unit:
            return f"{number / unit:,.4g}{suffix}"
    return f"{number:,.6g}"


def short_ticks(axis) -> None:
    """Writes the ticks of an x or y axis as `short` does."""
    axis.set_major_formatter(FuncFormatter(short))


def dress_x(ax, x: str, ends=(0,)) -> float:
    """Label, scale and ticks of an x axis for runs that end at `ends`; returns the unit to divide
    by.

    Time is in minutes where the longest run took under two hours; runs of very different lengths
    get a log axis.
    """
    label, unit = X_AXES[x], 1.0
    if x == "elapsed_seconds":
        label, unit = ("hours", 3600.0) if max(ends) >= 7200 else ("minutes", 60.0)
    ax.set_xlabel(label)
    if max(ends) > 8 * max(min(ends), 1):
        ax.set_xscale("log", nonpositive="mask")      # the evaluation before step 1 has no place
        ax.set_xlim(min(ends) / unit / 100, max(ends) / unit * 1.5)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    short_ticks(ax.xaxis)
    return unit


def log_axis(axis, decades: bool = False) -> None:
    """Ticks of a log axis as numbers: at 1, 2, 5, 10 and so on; closer over less than a decade;
    or at decades only."""
    low, high = sorted(axis.get_view_interval())
    subs = (1,) if decades else (1, 1.5, 2, 3, 4, 5, 6, 8) if high < 10 * low else (1, 2, 5)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_minor_formatter(NullFormatter())
    short_ticks(axis)


def label_right(ax, labels, gap: float = 13) -> None:
    """Writes each (y, text, colour) at the right edge, at the height of the line's end, at least
    `gap` points apart."""
    ax.figure.draw_without_rendering()                # the layout settles: data is now in points
    inside = ax.get_ylim()                            # a line that ends outside: named at the edge
    ys = [min(max(y, min(inside)), max(inside)) for y, _, _ in labels]
    heights = [float(ax.transData.transform((1, y))[1]) * 72 / ax.figure.dpi for y in ys]
    below = -np.inf
    for i in sorted(range(len(labels)), key=lambda i: heights[i]):
        _, text, colour = labels[i]
        below = max(heights[i], below + gap)
        ax.annotate(text, (1, ys[i]), xycoords=ax.get_yaxis_transform(),
                    xytext=(6, below - heights[i]), textcoords="offset points", color=colour,
                    va="center", fontsize=9, annotation_clip=False)


def label_top(ax, x: float, text: str, **style) -> None:
    """Writes `text` just above the axes, at x in data coordinates."""
    ax.annotate(text, (x, 1), xycoords=ax.get_xaxis_transform(), xytext=(0, 3),
                textcoords="offset points", ha="center", va="bottom", **{"fontsize": 9, **style})


def draw_intervals(ax, at, middles, lows, highs, **style):
    """A dot at each height of `at`, with its interval from low to high; a nan leaves one out."""
    middles, lows, highs = (np.asarray(values, float) for values in (middles, lows, highs))
    error = np.maximum(0, [middles - lows, highs - middles])
    return ax.errorbar(middles, at, xerr=error, **{"markersize": 6, "linewidth": 1.2, **style})


def mixture_colours(sources) -> dict[str, str]:
    """{source: colour}, by their names in order."""
    return {source: MIXTURE_COLOURS[i % len(MIXTURE_COLOURS)]
            for i, source in enumerate(sorted(sources))}


def draw_shares(ax, at, shares, colours) -> None:
    """Stacked percentages {source: values at `at`}, each named at the right edge with its last."""
    ax.stackplot(at, list(shares.values()), colors=[colours[source] for source in shares],
                 edgecolor="white", linewidth=0.8)
    ax.set(xlim=(at[0], at[-1]), ylim=(0, 100))
    ax.grid(False)
    last = np.array([values[-1] for values in shares.values()])
    middles = np.cumsum(last) - last / 2
    label_right(ax, [(middle, f"{source} {share:.3g}%", INK)
                     for middle, source, share in zip(middles, shares, last)])


# Parameters: 01, 02, 03, 06 and 08 draw where they sit.

def draw_parts(ax, budgets: dict[str, dict[str, int]]) -> None:
    """A bar a model of {name: parameters by part}, from the bottom up: the share of each part."""
    rows, left = np.arange(len(budgets)), np.zeros(len(budgets))
    total = np.array([sum(parts.values()) for parts in budgets.values()], float)
    for part, colour in PART_COLOURS.items():
        width = 100 * np.array([parts[part] for parts in budgets.values()]) / total
        ax.barh(rows, width, left=left, color=colour, height=0.72)
        for row in rows[width >= 4]:
            ax.text(left[row] + width[row] / 2, row, f"{width[row]:.0f}", ha="center", va="center",
                    fontsize=8, color="white" if part == "attention" else INK)
        middle = min(left[-1] + width[-1] / 2, 99.9)
        ax.text(middle, rows[-1] + 0.6, "FFN" if part == "ffn" else part, ha="center", fontsize=9)
        left += width
    ax.set(xlabel="share of the parameters (%)", xlim=(0, 100))
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)


def draw_parameters(budgets: dict[str, dict[str, int]]):
    """The figure of `draw_parts`, the first model on top, each with its total beside its name."""
    budgets = dict(reversed(budgets.items()))
    figure, ax = panels(8, 1.1 + 0.4 * len(budgets))
    draw_parts(ax, budgets)
    ax.set_yticks(range(len(budgets)), [f"{name}: {short(float(f'{sum(parts.values()):.3g}'))}"
                                        for name, parts in budgets.items()])
    return figure


# Training curves: 02 and 03 draw their run, 06 several.

def series(rows, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """x and y, two float arrays, of the rows in which both were measured."""
    def number(value):
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None

    pairs = [(number(row.get(x)), number(row.get(y))) for row in rows]
    pairs = [pair for pair in pairs if None not in pair]
    return np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])


def best_row(run) -> dict | None:
    """The evaluation that best/ was saved from: the last one marked best, else the lowest loss."""
    rows = [row for row in run["eval"] if series([row], "step", "loss")[0].size]
    marked = [row for row in rows if row.get("best")]
    return marked[-1] if marked else min(rows, key=lambda row: row["loss"], default=None)


def smooth(values, share: float = 0.02) -> np.ndarray:
    """Mean over `share` of the points to either side; unlike an EMA it does not lag where the
    loss falls."""
    total, count = np.concatenate([[0.0], np.cumsum(values)]), len(values)
    at, half = np.arange(count), max(1, round(share * count))
    first = np.maximum(at - half, 0)
    last = np.minimum(at + np.minimum(at, half), count - 1)      # symmetric at the start
    return (total[last + 1] - total[first]) / (last + 1 - first)


def draw_metric(ax, runs, x: str, y: str) -> list[tuple]:
    """One panel: y (loss, perplexity or bits_per_byte) of each run against x.

    Thin: as logged; thicker: smoothed; dots: evaluations; a star: the best. Returns the labels of
    the lines' ends, for `label_right`.
    """
    ends = [series(run["train"] + run["eval"], x, "step")[0].max() for run in runs]
    unit, labels = dress_x(ax, x, ends), []
    for run in runs:
        colour, name = run["colour"], f"{run['name']} " if len(runs) > 1 else ""
        best = best_row(run)
        train, train_y = series(run["train"], x, y)
        held, held_y = series(run["eval"], x, y)
        star, star_y = series([best] if best else [], x, y)
        if train.size:
            smoothed = np.exp(smooth(np.log(train_y))) if y == "perplexity" else smooth(train_y)
            ax.plot(train / unit, train_y, color=colour, alpha=0.25, linewidth=0.7)
            ax.plot(train / unit, smoothed, color=colour, alpha=0.6, linewidth=1.2)
            if not (held.size and name):
                labels.append((smoothed[-1], f"{name}train", colour))
        ax.plot(held / unit, held_y, color=colour, marker="o", markersize=3.5)
        ax.plot(star / unit, star_y, color=colour, marker="*", markersize=14,
                markeredgecolor="white", zorder=5)
        if held.size:
            label = (name or "eval ") + (f"★ {star_y[0]:.4g}" if star.size else "")
            labels.append((held_y[-1], label.strip(), colour))
    return labels


def crop_start(ax, runs, y: str) -> None:
    """Cuts the steep first 8% of training off the top, where it would flatten all the rest, and
    says where it began."""
    tops, starts, lowest = [], [], []
    for run in runs:
        curves = [series(run[kind], "step", y) for kind in ("train", "eval")]
        curves = [(at, values) for at, values in curves if values.size]
        if curves:
            at, values = curves[0]                    # the training curve, if any: more points
            early = np.searchsorted(at, 0.08 * at[-1])
            tops.append(values[early] if values.size > 3 else values[-1])
            tops += [values[-1] for _, values in curves]         # a short run's end stays in view
            starts.append(max(values[0] for _, values in curves))
            lowest.append(min(values.min() for _, values in curves))
    if tops and max(starts) > 1.1 * max(tops) > 1.12 * min(lowest):      # else nothing is left
        room = (max(tops) / min(lowest)) ** 0.08      # a factor suits perplexity's log axis too
        ax.set_ylim(min(lowest) / room, max(tops) * room)
        start = short(float(f"{max(starts):.3g}"))
        ax.text(0.98, 0.98, f"starts at {start}", transform=ax.transAxes, ha="right", va="top",
                fontsize=9, color=GREY)


def draw_progress(run_dir):
    """The loss of a run that is being trained, small enough to be drawn again and again; None where
    it has not said anything yet."""
    rows = read_metrics(Path(run_dir) / "metrics.jsonl")
    run = {"name": "", "colour": BLUE,
           **{kind: [row for row in rows if row["kind"] == kind] for kind in ("train", "eval")}}
    if not run["train"]:
        return None
    figure, ax = panels(7, 2.4)
    for kind, colour, marker in (("train", GREY, None), ("eval", BLUE, "o")):
        at, losses = series(run[kind], "step", "loss")
        ax.plot(at, losses, color=colour, marker=marker, markersize=4, linewidth=1.2)
    ax.set(xlabel=X_AXES["step"] + " (grey: training, blue: held out)", ylabel=Y_AXES["loss"])
    crop_start(ax, [run], "loss")
    return figure


def draw_training(run_dir, *, anneal_from: float | None = None, yardsticks: dict | None = None):
    """The figure of one run: its loss, and its bits per byte on held-out text, against steps.

    anneal_from: the step from which other weights mix the sources. yardsticks: {name: bits per
    byte} of what the run has to beat, drawn dashed.
    """
    rows = read_metrics(Path(run_dir) / "metrics.jsonl")
    name = Path(run_dir).name
    run = {"name": name, "colour": colours_of([name])[name],
           **{kind: [row for row in rows if row["kind"] == kind] for kind in ("train", "eval")}}
    figure, (loss, bits) = panels(11, 3.6, columns=2)
    labels = {ax: draw_metric(ax, [run], "step", y)
              for ax, y in ((loss, "loss"), (bits, "bits_per_byte"))}
    loss.set_ylabel(Y_AXES["loss"])
    crop_start(loss, [run], "loss")
    yardsticks = yardsticks or {}
    for text, value in yardsticks.items():
        bits.axhline(value, color=GREY, linestyle="--", linewidth=1.2)
        labels[bits].append((value, text, GREY))
    measured = series(run["eval"], "step", "bits_per_byte")[1]
    bits.set(ylabel=Y_AXES["bits_per_byte"] + ", held-out text",
             ylim=(0, 1.05 * max([0.1, *measured, *yardsticks.values()])))
    for ax, named in labels.items():
        if anneal_from is not None:
            end = max(row["step"] for row in rows)
            ax.axvspan(anneal_from, end, color=ORANGE, alpha=0.15, linewidth=0, zorder=0)
            label_top(ax, (anneal_from + end) / 2, "anneal")
        label_right(ax, named)
    return figure
