"""A sweep's plots, drawn as those of a run: pipeline/report_plots.py. Points carry their rank, and names stand in the ranking."""

import math
from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.report_plots import BETTER, FINAL, INK, KEPT, LINE, SOURCE, WIDTH, draw_all
from pipeline.sweep.report import SweepReport
from pipeline.sweep.rows import Row
from pipeline.target import format_seconds, format_size

MOST_ROWS, LABEL_WIDTH = 40, 54  # of the ranking
LARGEST, SMALLEST = 420.0, 24.0  # areas of points, in square points
APART = 11.0  # points between two labels, one above the other


def draw(report: SweepReport) -> tuple[dict[str, str], list[str]]:
    """SVG by name, of what the sweep has something for; and of each plot that failed, the reason."""
    return draw_all({"pareto": partial(pareto, report), "ranking": partial(ranking, report)})


def pareto(report: SweepReport) -> Figure | None:
    """Perplexity against bytes; where all are of one size, against the time that making them took."""
    rows = [row for row in report.ranked if row.perplexity is not None]
    if not rows:
        return None
    sized = len({row.nbytes for row in rows}) > 1
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.subplots()
    across = [float(row.nbytes) if sized else row.cost_seconds for row in rows]
    levels = [row.perplexity or 0.0 for row in rows]
    most = max(row.cost_seconds for row in rows)
    areas = [SMALLEST + (LARGEST - SMALLEST) * row.cost_seconds / most if sized and most else 60.0 for row in rows]
    front = sorted((x, y) for x, y, row in zip(across, levels, rows, strict=True) if row.pareto)
    if sized and len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=LINE, linewidth=1.5, zorder=1)
    axes.scatter(across, levels, areas, [_colour(row) for row in rows], alpha=0.8, edgecolors="none", zorder=2)
    axes.set_xlim(*_limits(across))
    axes.set_ylim(*_limits([*levels, *([report.source_perplexity] if report.source_perplexity else [])]))
    if report.source_perplexity:
        axes.axhline(report.source_perplexity, color=SOURCE, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(f"source {report.source_perplexity:.4g}", (1, report.source_perplexity), (-2, 3), xycoords=("axes fraction", "data"),
                      textcoords="offset points", ha="right", fontsize=9)  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_size(value) if sized else format_seconds(value)))
    axes.tick_params(axis="both", labelsize=10)
    axes.set_xlabel("tensor data" if sized else "made in")
    axes.set_ylabel("perplexity")
    axes.grid(linewidth=0.6)
    axes.set_axisbelow(True)
    _numbers(figure, axes, rows, list(zip(across, levels, areas, strict=True)))
    return figure


def ranking(report: SweepReport) -> Figure | None:
    """How much higher the perplexity of each is than that of the best, with intervals: one that holds 0 is a tie."""
    rows = [row for row in report.ranked if row.rank == 1 or row.vs_best is not None][:MOST_ROWS]
    if len(rows) < 2:
        return None
    figure = Figure(figsize=(WIDTH, 0.7 + 0.46 * len(rows)))
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=1)
    for place, row in enumerate(rows):
        middle = row.vs_best.percent if row.vs_best else 0.0
        if row.vs_best and row.vs_best.low is not None and row.vs_best.high is not None:
            axes.plot([row.vs_best.low, row.vs_best.high], [place, place], color=_colour(row), linewidth=2.5, solid_capstyle="butt")
        axes.plot([middle], [place], "o", markersize=6, color=_colour(row))
        label = row.label if len(row.label) <= LABEL_WIDTH else f"{row.label[: LABEL_WIDTH - 3]}..."
        axes.annotate(
            f"{row.rank}  {label}", (0, place - 0.36), (5, 0), textcoords="offset points", va="center", fontsize=9.5
        ).set_in_layout(False)
    axes.set_ylim(len(rows) - 0.6, -0.65)
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.06)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.3g} %" if value else "best"))
    axes.tick_params(axis="x", labelsize=10)
    return figure


def _colour(row: Row) -> str:
    return FINAL if row.rank == 1 else BETTER if row.tie else KEPT


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """With room around the outermost, also where all are one."""
    low, high = min(values), max(values)
    room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _numbers(figure: Figure, axes: Axes, rows: Sequence[Row], points: Sequence[tuple[float, float, float]]) -> None:
    """Each rank to the right of its point. Rows go upwards, so one that would stand on another's moves up."""
    figure.draw_without_rendering()  # lays the axes out, so that distances are known
    scale = 72 / figure.dpi
    taken: list[tuple[float, float]] = []
    for row, (x, y, area) in zip(rows, points, strict=True):
        across, up = (scale * float(value) for value in axes.transData.transform((x, y)))
        across += math.sqrt(area / math.pi) + 2
        place = up
        while any(abs(place - other) < APART and abs(across - beside) < 2 * APART for beside, other in taken):
            place += 1
        taken.append((across, place))
        axes.annotate(
            str(row.rank), (x, y), (math.sqrt(area / math.pi) + 2, place - up), textcoords="offset points", va="center", fontsize=9.5
        )
