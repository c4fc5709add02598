"""A report for people: the table in the terminal, and the same rows as markdown for MLflow.

One row for each checkpoint, the source model first, with its size and, where a stage measured it, its quality: the waterfall of a
pipeline. `change` is that of perplexity against the measured model before it, `vs source` and KL are against the source. Times of
measurements are summed into the row `evaluation`; one that failed or was not reached has a row of its own. Columns that would
say nothing (`change` with one measured model, `KV/tok` where the cache stays as it was, empty ones) are left out, so that it fits 80
columns. No colour is needed: it reads the same in a pipe and in a log.
"""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.report import Report, StageReport
from pipeline.target import format_seconds, format_size

COLUMNS = ("stage", "time", "size", "bits/w", "KV/tok", "ppl", "change", "vs source", "KL")
STYLES = {"hit": "green", "failed": "bold red", "interrupted": "yellow", "not reached": "dim"}
Row = dict[str, str]  # by column; what is missing is an empty cell


def print_report(report: Report, console: Console, mlflow: str = "") -> None:
    """The table, what became of the model, where it is and how to load it. `mlflow` is the tracker's line."""
    columns, lines = table_of(report)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=name != "stage", overflow="fold")
    for cells in lines:
        table.add_row(*(f"[{STYLES[cell]}]{cell}[/{STYLES[cell]}]" if cell in STYLES else cell for cell in cells))
    console.print()
    console.print(table)
    for line in ["", *closing_lines(report, mlflow)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)  # lines are for copying: never broken


def table_of(report: Report) -> tuple[list[str], list[tuple[str, ...]]]:
    """The columns that say something, and the cells of each row."""
    rows = list(_rows(report))
    measured = sum("ppl" in row for row in rows)
    idle = {"change"} if measured <= 2 else set()
    if len({row["KV/tok"] for row in rows if row.get("KV/tok")}) <= 1:
        idle.add("KV/tok")
    columns = [name for name in COLUMNS if name not in idle and any(row.get(name) for row in rows)]
    return columns, [tuple(row.get(name, "") for name in columns) for row in rows]


def _rows(report: Report) -> Iterator[Row]:
    judges: dict[str, StageReport] = {}  # by the output measured: the first to measure it
    for stage in report.stages:
        if stage.measures is not None and stage.status in ("hit", "ran"):
            judges.setdefault(stage.measures, stage)
    source = judges.get("model")
    yield {"stage": "source", **_sizes(report.source), **_quality(source), **(_time(source) if source else {})}
    before = source
    for stage in report.stages:
        if stage.planned_bytes is not None:
            judge = judges.get(f"{stage.name}.model")
            yield {"stage": stage.name, **_time(stage), **_sizes(_facts(stage)), **_quality(judge, before)}
            before = judge or before
        elif stage not in judges.values():
            label = f"{stage.name} (of {stage.measures.removesuffix('.model')})" if stage.measures else stage.name
            size = {} if stage.measures else _sizes(_facts(stage))
            yield {"stage": label, **_time(stage), **size, **_quality(stage)}
    summed = [judge for measured, judge in judges.items() if measured != "model"]
    if summed:
        ran = [judge.seconds or 0.0 for judge in summed if judge.status == "ran"]
        yield {"stage": "evaluation", "time": format_seconds(sum(ran)) if ran else "hit"}


def _facts(stage: StageReport) -> dict[str, float]:
    facts = {"nbytes": stage.bytes, "bits_per_weight": stage.bits_per_weight, "kv_bytes_per_token": stage.kv_bytes_per_token}
    return {name: float(value) for name, value in facts.items() if value is not None}


def _sizes(facts: dict[str, float]) -> Row:
    forms = (("size", "nbytes", format_size), ("bits/w", "bits_per_weight", "{:.2f}".format), ("KV/tok", "kv_bytes_per_token", format_size))
    return {column: form(facts[name]) for column, name, form in forms if name in facts}


def _time(stage: StageReport) -> Row:
    return {"time": format_seconds(stage.seconds or 0.0) if stage.status == "ran" else stage.status}


def _quality(stage: StageReport | None, before: StageReport | None = None) -> Row:
    metrics = stage.metrics if stage else {}
    forms = (("ppl", "perplexity", "{:.4g}"), ("vs source", "perplexity_change_pct", "{:+.1f} %"), ("KL", "kl_divergence", "{:.3g}"))
    row = {column: form.format(metrics[name]) for column, name, form in forms if name in metrics}
    if "perplexity" in metrics and before is not None and "perplexity" in before.metrics:
        row["change"] = f"{100 * (metrics['perplexity'] / before.metrics['perplexity'] - 1):+.1f} %"
    return row


def summary(report: Report) -> str:
    """The whole result in one sentence; empty unless the run is complete."""
    metrics = report.metrics
    if report.final is None:
        return ""
    if report.final.is_source:
        measured = f", perplexity {metrics['perplexity']:.4g}" if "perplexity" in metrics else ""
        return f"the model stays as it is: {format_size(metrics['nbytes'])}{measured}"
    before, after = report.source["nbytes"], metrics["nbytes"]
    change = "the same size" if before == after else f"{before / after:.2f}x smaller" if after < before else f"{after / before:.2f}x larger"
    sizes = f"{format_size(before)} -> {format_size(after)}, {change}"
    if "perplexity_change_pct" in metrics:
        change = f"{metrics['perplexity_change_pct']:+.1f} %"
        sizes += f"; perplexity {metrics['reference_perplexity']:.4g} -> {metrics['perplexity']:.4g} ({change})"
    if "top1_agreement" in metrics:
        sizes += f"; agrees with the source on {100 * metrics['top1_agreement']:.1f} % of tokens"
    return sizes


def closing_lines(report: Report, mlflow: str) -> list[str]:
    """What stands below the table."""
    lines = [summary(report)] if report.verdict == "complete" else []
    notes: dict[str, str] = {}  # said once, by the first stage that says it
    for stage in report.stages:
        for note in () if stage.name.endswith("@source") else stage.notes:
            notes.setdefault(note, stage.name)
    lines += [f"note     {name}: {note}" for note, name in notes.items()]
    lines += [f"warning  {text}" for text in report.warnings]
    adapters = [f"adapter  {_shown(stage.outputs['adapter'])}" for stage in report.stages if "adapter" in stage.outputs]
    lines += ["", *adapters] if adapters or report.final else []
    if report.final and not report.final.is_source:
        where = _shown(report.final.path)
        lines.append(f"model    {where}")
        lines.append(f'load     from transformers import AutoModelForCausalLM; model = AutoModelForCausalLM.from_pretrained("{where}")')
        vllm = next((line for line in report.serving if line.engine == "vllm"), None)
        lines += [f"serve    {vllm.command.format(model=where)}{f'   ({vllm.note})' if vllm.note else ''}"] if vllm else []
    lines += [f"{label:<8} {text}" for label, text in zip(("mlflow", ""), mlflow.splitlines(), strict=False)]
    return lines


def markdown(report: Report) -> str:
    """The table for a place that renders markdown."""
    lines = [summary(report), ""] if report.verdict == "complete" else [f"{report.verdict}: {report.error}", ""]
    columns, rows = table_of(report)
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _shown(path: str) -> str:
    """Relative to the working folder where that is shorter to read and still below it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
