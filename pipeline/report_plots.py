"""A report's plots, as SVG to stand inside a page: text stays text, and every colour is the page's, so that light and dark both work.

Matplotlib knows no colours of a page. So plots are drawn in stand-ins, which `inline` replaces: `currentColor` for ink, a CSS variable for
each other one. Nothing here opens a display. Importing this module takes 0.4 CPU s, so only what writes a page does.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.report import Report
from pipeline.target import format_size
from pipeline.task_findings import TaskMetric, TaskReport
from pipeline.waterfall import waterfall

INK, LINE, FINAL, SOURCE, WORSE, BETTER, KEPT, ROOM = (f"#0102{number:02x}" for number in range(3, 11))
COLOURS = {
    INK: "currentColor", LINE: "var(--line)", FINAL: "var(--final)", SOURCE: "var(--source)", WORSE: "var(--worse)",
    BETTER: "var(--better)", KEPT: "var(--kept)", ROOM: "var(--room)",
}  # fmt: skip
STYLE: Any = {  # matplotlib's own settings
    "svg.fonttype": "none", "svg.hashsalt": "llmpress", "text.parse_math": False, "font.size": 11.0, "axes.titlesize": 11.0,
    "text.color": INK, "axes.edgecolor": LINE, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": LINE,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "figure.constrained_layout.use": True,
    "figure.facecolor": "none", "axes.facecolor": "none",
}  # fmt: skip
WIDTH, ROW = 5.0, 0.36  # inches: one unit of the SVG is 1/72 of it, so that 11-point text is readable where 360 pixels are all there is
LOG_FROM = 20.0  # largest by smallest value from which an axis is logarithmic
MOST_TASKS = 20
MOST_NUMBERED = 24  # layers whose bits are written into the map too
TWO_SIDED_95 = 1.96  # standard errors


def draw(report: Report) -> tuple[dict[str, str], list[str]]:
    """SVG by name, of what the report has something for; and of each plot that failed, the reason."""
    return draw_all({name: partial(plot, report) for name, plot in PLOTS.items()})


def draw_all(plots: Mapping[str, Callable[[], Figure | None]]) -> tuple[dict[str, str], list[str]]:
    """As `draw`, of any plots: None is nothing to show."""
    drawn, problems = {}, []
    for name, plot in plots.items():
        try:
            with matplotlib.rc_context(STYLE):
                figure = plot()
                if figure is not None:
                    drawn[name] = inline(figure, name)
        except (ValueError, RuntimeError, ArithmeticError, OSError) as error:  # what matplotlib raises of data, layout and fonts
            problems.append(f"the plot of {name} could not be drawn: {' '.join(str(error).split())}")
    return drawn, problems


def inline(figure: Figure, name: str) -> str:
    """Its SVG element alone, with ids of its own, the page's colours and font, and as wide as it is given room."""
    stream = StringIO()
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2).replace("<svg", f'<svg role="img" aria-label="plot of {name}"', 1)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font(-family)?: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font\1: \2var(--font)", svg)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for stand_in, colour in COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return svg.strip()


def perplexity(report: Report) -> Figure | None:
    """What each stage cost, among the checkpoints that were measured the same way."""
    known = [(level.name, level.perplexity) for level in waterfall(report) if level.perplexity is not None]
    return _falls([name for name, _ in known], [value for _, value in known], "{:.4g}".format) if len(known) > 1 else None


def size(report: Report) -> Figure | None:
    levels = [("source", report.source["nbytes"])]
    levels += [(level.name, float(level.made.bytes)) for level in waterfall(report) if level.made and level.made.bytes is not None]
    return _falls([name for name, _ in levels], [value for _, value in levels], format_size) if len(levels) > 1 else None


def memory(report: Report) -> Figure | None:
    """One GPU of the target under the load that the recipe states."""
    if report.served is None:
        return None
    fit = report.served.fit
    parts = [("weights", fit.weights, FINAL), ("KV cache", fit.cache, SOURCE), ("kept for the engine", fit.kept, KEPT)]
    parts += [("free", fit.room - fit.needed, ROOM)] if fit.fits else []
    figure = Figure(figsize=(WIDTH, 1.9))
    axes = figure.subplots()
    start, handles = 0, list[Artist]()
    for label, nbytes, colour in parts:
        handles += axes.barh(0, nbytes, left=start, height=0.5, color=colour)
        handles[-1].set_label(f"{label} {format_size(nbytes)}")
        start += nbytes
    room = f"all of {fit.target} {format_size(fit.room)}"
    handles.append(axes.axvline(fit.room, color=INK if fit.fits else WORSE, linewidth=2, label=room))
    axes.set_ylim(-0.4, 0.4)
    axes.set_axis_off()
    figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=10, handlelength=1.2)
    return figure


def positions(report: Report) -> Figure | None:
    """A rising gap to the source model is an error that grows with context."""
    rows = report.positions
    if len(rows) < 2:
        return None
    figure = Figure(figsize=(WIDTH, 3.0))
    axes, places = figure.subplots(), range(len(rows))
    if all(row.source_perplexity is not None for row in rows):
        sources = [row.source_perplexity for row in rows]
        axes.plot(places, sources, marker="o", markersize=4, color=SOURCE, label="source model")  # type: ignore[arg-type]
    axes.plot(places, [row.perplexity for row in rows], marker="o", markersize=4, color=FINAL, label="final model")
    axes.set_xticks(places, [f"{row.start:,}-{row.end:,}" for row in rows], rotation=45, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("perplexity")
    axes.grid(axis="y", linewidth=0.6)
    axes.legend()
    return figure


def bits(report: Report) -> Figure | None:
    """Which layer has how many: the more, the darker."""
    rows = report.layer_bits
    if not rows:
        return None
    layers, most = max(len(row.bits) for row in rows), max(width for row in rows for width in row.bits if width)
    figure = Figure(figsize=(WIDTH, 0.7 + 0.27 * len(rows)))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        for layer, width in enumerate(row.bits):
            if width is not None:
                shade = 0.7 * width / most  # so that numbers upon it can be read
                axes.barh(place, 1, left=layer - 0.5, height=0.9, label=f"{width} bits", color=FINAL, alpha=shade, linewidth=0)
                if layers <= MOST_NUMBERED:
                    axes.annotate(str(width), (layer, place), ha="center", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row.kind.rpartition(".")[2] for row in rows], fontsize=10)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-0.5, layers - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("decoder layer")
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    widths = sorted(handles, key=lambda label: int(label.partition(" ")[0]))
    figure.legend([handles[width] for width in widths], widths, loc="outside lower left", ncols=len(widths), fontsize=10, handlelength=1.2)
    return figure


def tasks(report: Report) -> Figure | None:
    """Shares with their 95 % intervals; other metrics have no place on one axis with them."""
    rows = plotted_tasks(report)[:MOST_TASKS]
    if not rows:
        return None
    figure = Figure(figsize=(WIDTH, 0.9 + ROW * 1.2 * len(rows)))
    axes = figure.subplots()
    scores = [score for _, score in rows]
    if all(score.source_value is not None for score in scores):
        sources = [(score.source_value or 0.0, score.source_stderr) for score in scores]
        _intervals(axes, sources, -0.13, SOURCE, "source model")
    _intervals(axes, [(score.value, score.stderr) for score in scores], 0.13, FINAL, "compressed")
    axes.set_yticks(range(len(rows)), [f"{task.task}\n{score.metric}" for task, score in rows], fontsize=10)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.6)
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def plotted_tasks(report: Report) -> list[tuple[TaskReport, TaskMetric]]:
    """Shares of the final model, of the last one that was asked where there is none."""
    asked = [task.measures for task in report.tasks]
    final = report.final.output if report.final else ""
    measured = final if final in asked else asked[-1] if asked else ""
    return [(task, score) for task in report.tasks if task.measures == measured for score in task.metrics if 0 <= score.value <= 1]


def _intervals(axes: Axes, values: Sequence[tuple[float, float | None]], shift: float, colour: str, label: str) -> None:
    widths = [TWO_SIDED_95 * (stderr or 0.0) for _, stderr in values]
    places = [place + shift for place in range(len(values))]
    axes.errorbar([value for value, _ in values], places, xerr=widths, fmt="o", markersize=5, capsize=3, color=colour, label=label)


def _falls(names: Sequence[str], values: Sequence[float], form: Callable[[float], str]) -> Figure:
    """A waterfall that runs down the page: each bar goes from the level before to its own, up is worse."""
    figure = Figure(figsize=(WIDTH, 0.2 + ROW * len(names)))
    axes = figure.subplots()
    log = min(values) > 0 and max(values) / min(values) > LOG_FROM
    start = min(values) / 2 if log else 0.0
    for place, value in enumerate(values):
        before = values[place - 1] if place else start
        colour = SOURCE if place == 0 else WORSE if value > before else BETTER
        axes.barh(place, value - before, left=before, height=0.62, color=colour)
        axes.plot([value, value], [place - 0.31, place + (1.31 if place < len(values) - 1 else 0.31)], color=INK, linewidth=1)
        change = f"  {100 * (value / before - 1):+.1f} %" if place and value != before else ""
        axes.annotate(f"{form(value)}{change}", (max(value, before), place), (5, 0), textcoords="offset points", va="center", fontsize=10)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xscale("log" if log else "linear")
    axes.set_xlim(start, max(values) * (max(values) / start) ** 0.7 if log else max(values) * 1.55)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if log:
        axes.set_title("logarithmic", loc="right", fontsize=9)
    return figure


PLOTS: dict[str, Callable[[Report], Figure | None]] = {
    "perplexity": perplexity,
    "size": size,
    "bits": bits,
    "memory": memory,
    "positions": positions,
    "tasks": tasks,
}
