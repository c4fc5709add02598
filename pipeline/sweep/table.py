"""A sweep for people: the ranking in the terminal, and the same rows as markdown.

In the terminal a pipeline has two lines, so that names as long as `rtn4>dequantize>prune>distill>rtn4` fit 80 columns beside their
figures. What is the same for all (a size, bits) is said once, above. Commands are for copying and never broken.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.report_table import markdown_table, shown
from pipeline.sweep.report import SweepReport, change
from pipeline.sweep.rows import Row
from pipeline.target import format_seconds, format_size

PAGE = "sweep.html"
COLUMNS = ("pipeline", "seeds", "perplexity", "vs source, 95 %", "vs best, 95 %", "size", "bits/w", "made in", "measured in", "gates")
GATES = {"deploy": "pass", "investigate": "fail", "inconclusive": "open"}
STYLES = {"pass": "green", "fail": "bold red", "open": "yellow"}
POSITION_COLUMNS = ("stage", "position", "executions", "time", "perplexity")
ORDINALS = {1: "st", 2: "nd", 3: "rd"}
LEAST_NAME, MOST_NAME, MOST_POSITIONS, MOST_FAILURES = 16, 60, 16, 12  # in the terminal


def print_sweep(report: SweepReport, console: Console, mlflow: str = "") -> None:
    """The ranking, what it says, what stages cost by position, failed jobs, and what to run next. `mlflow` are the tracker's lines."""
    console.print()
    if report.rows:
        console.print(_ranking(report, console.width))
    for line in ["", *remarks(report), *report.sentences(), executions(report)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if report.positions:
        console.print()
        console.print(_positions(report))
        if len(report.positions) > MOST_POSITIONS:
            console.print(f"and {len(report.positions) - MOST_POSITIONS} more, in the report", highlight=False)
    lost = failures(report)
    if len(lost) > MOST_FAILURES:
        lost = [*lost[:MOST_FAILURES], f"and {len(lost) - MOST_FAILURES} more, in the report"]
    for line in ["", *lost, *([""] if lost else []), *_closing(report, mlflow)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def table_of(report: SweepReport) -> tuple[list[str], list[tuple[str, ...]]]:
    """The columns that say something, and the cells of each row."""
    sized = len(_sizes(report.rows)) > 1
    rows = [dict(zip(COLUMNS, _cells(row, sized), strict=True)) for row in report.rows]
    idle = {"seeds"} if all(len(row.runs) == 1 for row in report.rows) else set()
    idle |= set() if sized else {"size", "bits/w"}
    columns = [name for name in COLUMNS if name not in idle and any(row[name] for row in rows)]
    return columns, [tuple(row[name] for name in columns) for row in rows]


def position_table(report: SweepReport) -> tuple[list[str], list[tuple[str, ...]]]:
    """As `table_of`, of the stages by position. A stage is named in its first row."""
    rows = []
    for name, group in groupby(report.positions, key=lambda cost: cost.stage):
        for number, cost in enumerate(group):
            moved = "" if cost.change_pct is None else f"{cost.change_pct:+.1f} %"
            place = f"{cost.position}{ORDINALS.get(cost.position, 'th')}"
            rows.append(("" if number else name, place, str(cost.executions), format_seconds(cost.seconds), moved))
    known = len(POSITION_COLUMNS) if any(row[-1] for row in rows) else -1
    return list(POSITION_COLUMNS[:known]), [row[:known] for row in rows]


def executions(report: SweepReport) -> str:
    """`6 jobs: 15 stage executions instead of 24; 3 were in the store, 12 ran`."""
    counts = report.executions
    told = f"{report.jobs} {'job' if report.jobs == 1 else 'jobs'}: {counts.distinct} stage executions instead of {counts.nodes}; "
    told += f"{counts.hits} were in the store, {counts.ran} ran"
    missing = counts.distinct - counts.hits - counts.ran
    return told + (f", {missing} did not end" if missing else "")


def markdown(report: SweepReport) -> str:
    """The same for a place that renders markdown."""
    lines = [*(f"- {sentence}" for sentence in report.sentences()), f"- {executions(report)}", ""]
    columns, rows = table_of(report)
    lines += [*markdown_table(columns, rows), "", *remarks(report), ""] if rows else []
    if report.positions:
        lines += ["What each stage cost, by its position among those that make a model", ""]
        lines += [*markdown_table(*position_table(report)), ""]
    lines += [*(f"- {line}" for line in failures(report)), ""] if report.failed or report.problem else []
    choice = report.cheapest or report.suggestion
    return "\n".join(lines + ([f"    {choice.command}"] if choice else [])).rstrip()


def _cells(row: Row, sized: bool) -> tuple[str, ...]:
    return (
        f"{_rank(row, sized)} {row.label}".strip(),
        str(len(row.runs)),
        "" if row.perplexity is None else f"{row.perplexity:.4g}",
        change(row.vs_source),
        change(row.vs_best),
        format_size(row.nbytes),
        f"{row.bits_per_weight:.2f}",
        format_seconds(row.cost_seconds),
        format_seconds(row.measuring_seconds),
        GATES[row.decision] if row.decision else "",
    )


def _rank(row: Row, sized: bool) -> str:
    """A front of one size is its best alone, and needs no mark."""
    return f"{'' if row.rank is None else row.rank}{'=' if row.tie else ''}{'*' if row.pareto and sized else ''}"


def _ranking(report: SweepReport, width: int) -> Table:
    rows = report.rows
    sized, gated, measured = len(_sizes(rows)) > 1, any(row.decision for row in rows), any(row.perplexity is not None for row in rows)
    marks = [_rank(row, sized) for row in rows]
    figures = {"ppl\nvs source": [_level(row) for row in rows], "vs best\n95 %": [change(row.vs_best).replace(" [", "\n[") for row in rows]}
    columns = figures if measured else {}
    columns |= {"size\nbits/w": [f"{format_size(row.nbytes)}\n{row.bits_per_weight:.2f}" for row in rows]} if sized else {}
    columns |= {"made in": [format_seconds(row.cost_seconds) for row in rows]}
    columns |= {"gates": [GATES[row.decision] if row.decision else "" for row in rows]} if gated else {}
    taken = sum(2 + max(len(line) for cell in (name, *cells) for line in cell.split("\n")) for name, cells in columns.items())
    room = min(MOST_NAME, max(LEAST_NAME, width - taken - max(map(len, marks)) - 4))
    table = _table(("#", "pipeline", *columns), left=("#", "pipeline"))
    for mark, row, cells in zip(marks, rows, zip(*columns.values(), strict=True), strict=True):
        table.add_row(
            mark,
            escape(_folded(row, room, _even_seeds(rows))),
            *(f"[{STYLES[cell]}]{cell}[/]" if cell in STYLES else escape(cell) for cell in cells),
        )
    return table


def _table(columns: Sequence[str], left: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True, overflow="fold")
    return table


def _level(row: Row) -> str:
    """Perplexity, and below it the change from the source's."""
    level = "" if row.perplexity is None else f"{row.perplexity:.4g}"
    return level + ("" if row.vs_source is None else f"\n{row.vs_source.percent:+.1f} %")


def _even_seeds(rows: Sequence[Row]) -> int | None:
    """How many seeds all rows have; None where they have different numbers."""
    counts = {len(row.runs) for row in rows}
    return counts.pop() if len(counts) == 1 else None


def _positions(report: SweepReport) -> Table:
    columns, rows = position_table(report)
    table = _table(columns, left=("stage",))
    for cells in rows[:MOST_POSITIONS]:
        table.add_row(*map(escape, cells))
    return table


def _folded(row: Row, width: int, seeds: int | None) -> str:
    """The label in lines of that width, broken before a `>` or a parameter; with its seeds, unless all rows have as many."""
    lines = [""]
    told = f" ({len(row.runs)} seeds)" if seeds is None and len(row.runs) > 1 else ""
    for part in f"{row.label}{told}".replace(">", "\0>").replace(" ", "\0 ").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part if lines[-1] else part.lstrip(" ")
    return "\n".join(lines)


def _sizes(rows: Sequence[Row]) -> set[tuple[int, float]]:
    return {(row.nbytes, row.bits_per_weight) for row in rows}


def remarks(report: SweepReport) -> list[str]:
    """What the marks mean, and what all rows have in common."""
    rows = report.rows
    lines = ["= ties with the best"] if any(row.tie for row in rows) else []
    if len(_sizes(rows)) > 1:
        lines += ["* on the front: no other is as small and as good, and better in one of them"] if any(row.pareto for row in rows) else []
    elif rows:
        whole = f" of {format_size(report.source_nbytes)}" if report.source_nbytes else ""
        subject = "every pipeline ends at" if len(rows) > 1 else "it ends at"
        lines.append(f"{subject} {format_size(rows[0].nbytes)}{whole}, {rows[0].bits_per_weight:.2f} bits per weight")
    seeds = _even_seeds(rows)
    if seeds != 1 and rows:
        lines.append("figures are means over the seeds" if seeds is None else f"figures are means over {seeds} seeds")
    return lines


def failures(report: SweepReport) -> list[str]:
    lines = [f"the sweep ended early: {report.problem}"] if report.problem else []
    for job in report.failed:
        code = "" if job.exit_code is None else f" ({job.exit_code})"
        lines.append(f"failed{code}  {job.name or job.command.removeprefix('run ')}: {'; '.join(job.error.splitlines())}")
    return lines


def _closing(report: SweepReport, mlflow: str) -> list[str]:
    choice = report.cheapest or report.suggestion
    lines = [f"{'cheapest' if report.cheapest else 'best':<8} {choice.command}"] if choice else []
    again = [f"again    {report.command}   (runs only what is missing)"] if report.failed or report.problem else []
    recorded = [f"{label:<8} {text}" for label, text in zip(("mlflow", ""), mlflow.splitlines(), strict=False)]
    return [*lines, *again, f"report   {shown(str(Path(report.folder) / PAGE))}", *recorded]
