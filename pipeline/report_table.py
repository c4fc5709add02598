"""A report for people: the table in the terminal, and the same rows as markdown for MLflow.

Size and bits per weight stand on the row of the stage that made a checkpoint, quality on the row of the stage that measured
one, which is the checkpoint above it unless the row says otherwise. The source model comes first. Plain columns, no colour
needed: it reads the same at 80 columns, in a pipe and in a log.
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.report import Report, StageReport
from pipeline.target import format_seconds, format_size

COLUMNS = ("stage", "", "time", "size", "bits/w", "perplexity", "vs source", "KL")
VLLM_BITS, VLLM_GROUPS = (4, 8), (32, 64, 128)  # packed integer weights that vLLM has kernels for
STYLES = {"hit": "green", "ran": "bold", "failed": "bold red", "interrupted": "yellow", "not reached": "dim"}


def print_report(report: Report, console: Console, mlflow: str = "") -> None:
    """The table, what became of the model, where it is and how to load it. `mlflow` is the tracker's line."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("stage", "") else "right", no_wrap=name != "stage", overflow="fold")
    for row in rows(report):
        style = STYLES.get(row[1])
        table.add_row(row[0], f"[{style}]{row[1]}[/{style}]" if style else row[1], *row[2:])
    console.print()
    console.print(table)
    for line in ["", *closing_lines(report, mlflow)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)  # lines are for copying: never broken


def rows(report: Report) -> list[tuple[str, ...]]:
    """The cells of `COLUMNS`, the source model first."""
    stages = {stage.name: stage for stage in report.stages}
    references = [name for name in dict.fromkeys(stage.reference for stage in report.stages) if name]
    size = (format_size(report.source["nbytes"]), f"{report.source['bits_per_weight']:.2f}")
    first = stages[references[0]] if references else None
    table: list[tuple[str, ...]] = [("source model", *(_ran(first) if first else ("", "")), *size, *_quality(first))]
    table += [(name, *_ran(stages[name]), "", "", *_quality(stages[name])) for name in references[1:]]
    latest = "model"
    for stage in report.stages:
        if stage.name in references:
            continue
        label = stage.name
        if stage.measures is None and stage.planned_bytes is not None:
            latest = stage.name
        elif stage.measures is not None and stage.measures.partition(".")[0] != latest:
            label = f"{stage.name} (of {stage.measures.partition('.')[0]})"
        made = stage.bytes is not None and stage.planned_bytes is not None
        size = (format_size(stage.bytes or 0), f"{stage.bits_per_weight:.2f}" if stage.bits_per_weight else "") if made else ("", "")
        table.append((label, *_ran(stage), *size, *_quality(stage)))
    return table


def summary(report: Report) -> str:
    """The whole result in one sentence; empty unless the run is complete."""
    metrics = report.metrics
    if report.verdict != "complete":
        return ""
    sizes = f"{format_size(report.source['nbytes'])} -> {format_size(metrics['nbytes'])}, {metrics['compression_ratio']:.2f}x smaller"
    if "perplexity_change_pct" in metrics:
        change = f"{metrics['perplexity_change_pct']:+.1f} %"
        sizes += f"; perplexity {metrics['reference_perplexity']:.4g} -> {metrics['perplexity']:.4g} ({change})"
    if "top1_agreement" in metrics:
        sizes += f"; agrees with the source on {100 * metrics['top1_agreement']:.1f} % of tokens"
    return sizes


def closing_lines(report: Report, mlflow: str) -> list[str]:
    """What stands below the table."""
    lines = [summary(report)] if report.verdict == "complete" else []
    if any(stage.status == "hit" for stage in report.stages):
        lines.append("a time in brackets is that of the earlier run that computed the stage")
    notes = [(stage.name, note) for stage in report.stages for note in stage.notes if not stage.name.endswith("@source")]
    lines += [f"note     {name}: {note}" for name, note in notes]
    lines += [f"warning  {text}" for text in report.warnings]
    if report.final:
        where = _shown(report.final.path)
        lines += ["", f"model    {where}"]
        lines.append(f'load     from transformers import AutoModelForCausalLM; model = AutoModelForCausalLM.from_pretrained("{where}")')
        if report.final.num_bits in VLLM_BITS and report.final.group_size in VLLM_GROUPS:
            lines.append(f"serve    vllm serve {where}")
    lines += [f"{label:<8} {text}" for label, text in zip(("mlflow", ""), mlflow.splitlines(), strict=False)]
    return lines


def markdown(report: Report) -> str:
    """The table for a place that renders markdown."""
    lines = [summary(report), ""] if report.verdict == "complete" else [f"{report.verdict}: {report.error}", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows(report)]
    return "\n".join(lines)


def _ran(stage: StageReport) -> tuple[str, str]:
    seconds = "" if stage.seconds is None else format_seconds(stage.seconds)
    return stage.status, f"({seconds})" if stage.status == "hit" else seconds


def _quality(stage: StageReport | None) -> tuple[str, str, str]:
    metrics = stage.metrics if stage else {}
    forms = (("perplexity", "{:.4g}"), ("perplexity_change_pct", "{:+.1f} %"), ("kl_divergence", "{:.3g}"))
    perplexity, change, divergence = (form.format(metrics[name]) if name in metrics else "" for name, form in forms)
    return perplexity, change, divergence


def _shown(path: str) -> str:
    """Relative to the working folder where that is shorter to read and still below it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
