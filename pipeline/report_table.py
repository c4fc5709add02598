"""A report for people: the table in the terminal, and the same rows as markdown for MLflow, with planned beside measured.

One row for each checkpoint, the source model first, with its size and, where a stage measured it, its quality: the waterfall of a
pipeline. `change` is that of perplexity against the measured model before it, `vs source` and KL are against the source. Times of
measurements are summed into the row `evaluation`; one that failed or was not reached has a row of its own. Columns that would
say nothing (`change` with one measured model, `KV/tok` where the cache stays as it was, empty ones) are left out, so that it fits 80
columns; where it does not, the terminal goes without `change`, which follows from `ppl`. No colour is needed: it reads the same in a
pipe and in a log.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from pipeline.artifact import DERIVED, Benchmark, EvalReport, Verdict
from pipeline.comparison import COLUMNS as COMPARED
from pipeline.comparison import comparison, comparison_rows
from pipeline.evidence import PROBE
from pipeline.report import Report, StageReport
from pipeline.target import format_seconds, format_size
from pipeline.task_findings import TaskMetric, TaskReport
from pipeline.waterfall import waterfall

COLUMNS = ("stage", "time", "size", "bits/w", "KV/tok", "ppl", "change", "vs source", "KL")
STYLES = {"hit": "green", "failed": "bold red", "interrupted": "yellow", "not reached": "dim"}
PLANNED_NOTES = ("inserted: ", "stops the run where ")
VERDICTS = {
    "deploy": "every gate passes",
    "investigate": "a gate fails; its figures and the table of stages say where to look",
    "inconclusive": "not every gate could be decided; more documents or items would",
}
WIDEST = 500  # columns: wider than any of these tables
MOST_SCORES = 12  # of tasks, in the terminal
Row = dict[str, str]  # by column; what is missing is an empty cell


def print_report(report: Report, console: Console, mlflow: str = "", page: Path | None = None) -> None:
    """The table, what became of the model, where it is and how to load it. `mlflow` is the tracker's line, `page` the report as HTML."""
    columns, lines = table_of(report)
    table = _terminal_table(columns, lines)
    if "change" in columns and Measurement.get(console, console.options.update(width=WIDEST), table).maximum > console.width:
        table = _terminal_table(columns, lines, left_out="change")
    console.print()
    console.print(table)
    for line in ["", *closing_lines(report, mlflow, page)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)  # lines are for copying: never broken


def _terminal_table(columns: Sequence[str], lines: Sequence[tuple[str, ...]], left_out: str = "") -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    shown = [number for number, name in enumerate(columns) if name != left_out]
    for name in (columns[number] for number in shown):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=name != "stage", overflow="fold")
    for cells in ([line[number] for number in shown] for line in lines):
        table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in cells))
    return table


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
    levels = waterfall(report)
    source, judges = levels[0].judge, [level.judge for level in levels]
    yield {"stage": "source", **_sizes(report.source), **_quality(source), **(_time(source) if source else {})}
    before, rest = source, {level.name: level.judge for level in levels[1:]}
    for stage in report.stages:
        if stage.name in rest:
            judge = rest[stage.name]
            yield {"stage": stage.name, **_time(stage), **_sizes(_facts(stage)), **_quality(judge, before)}
            before = judge or before
        elif stage not in judges and not _told_elsewhere(stage, judges):
            label = f"{stage.name} (of {stage.measures.removesuffix('.model')})" if stage.measures else stage.name
            size = {} if stage.type in (Benchmark.__name__, EvalReport.__name__) else _sizes(_facts(stage))
            yield {"stage": label, **_time(stage), **size, **_quality(stage)}
    stored = [stage for stage in report.stages if stage.type in DERIVED and _told_elsewhere(stage, judges)]
    scored = [stage for stage in report.stages if stage.measures and stage not in judges and _told_elsewhere(stage, judges)]
    summed = [*(judge for judge in judges[1:] if judge), *stored, *scored]
    if summed:
        ran = [stage.seconds or 0.0 for stage in summed if stage.status == "ran"]
        yield {"stage": "evaluation", "time": format_seconds(sum(ran)) if ran else "hit"}


def _told_elsewhere(stage: StageReport, judges: Sequence[StageReport | None]) -> bool:
    """A verdict has a line of its own, scores of tasks a table, a data check its notes, and a probe says less than the model's judge.
    Stored hidden states are part of the evaluations that read them."""
    if stage.status not in ("hit", "ran"):
        return False
    probe = stage.name.startswith(f"{PROBE}@") and any(judge and judge.measures == stage.measures for judge in judges)
    if stage.type == Verdict.__name__ or stage.type in DERIVED or stage.stage == "data_check":
        return True
    return stage.measures is not None and ("perplexity" not in stage.metrics or probe)


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
    forms = (("ppl", "perplexity", "{:.4g}"), ("KL", "kl_divergence", "{:.3g}"))
    row = {column: form.format(metrics[name]) for column, name, form in forms if name in metrics}
    if "perplexity_change_pct" in metrics:
        row["vs source"] = perplexity_change(metrics)
    if "perplexity" in metrics and before is not None and "perplexity" in before.metrics:
        row["change"] = f"{100 * (metrics['perplexity'] / before.metrics['perplexity'] - 1):+.1f} %"
    return row


def perplexity_change(metrics: Mapping[str, float]) -> str:
    """`+9.0 % [8.1, 9.9]`: of the source's, with its 95 % interval where one is known."""
    change = f"{metrics['perplexity_change_pct']:+.1f} %"
    ends = [metrics[f"perplexity_change_pct_{end}"] for end in ("low", "high") if f"perplexity_change_pct_{end}" in metrics]
    return f"{change} [{', '.join(f'{end:.0f}' if abs(end) >= 10 else f'{end:.1f}' for end in ends)}]" if ends else change


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
        sizes += f"; perplexity {metrics['reference_perplexity']:.4g} -> {metrics['perplexity']:.4g} ({perplexity_change(metrics)})"
    if "top1_agreement" in metrics:
        sizes += f"; agrees with the source on {100 * metrics['top1_agreement']:.1f} % of tokens"
    return sizes


def verdict(report: Report) -> tuple[str, str]:
    """Whether the model may be deployed, where gates were set, else how the run ended; and why."""
    if report.decision:
        return report.decision, VERDICTS[report.decision]
    return report.verdict, report.error or "without a gate, nothing says whether to deploy it"


def closing_lines(report: Report, mlflow: str, page: Path | None = None) -> list[str]:
    """What stands below the table. `page` is where the report is as HTML."""
    lines = [summary(report)] if report.verdict == "complete" else []
    held = comparison(report)
    lines += [f"planned  {held}"] if held else []
    computed = sorted({stage.compute_dtype for stage in report.stages if stage.compute_dtype})
    lines += [f"computed in {' and '.join(computed)}"] if computed else []
    lines += [f"note     {name}: {note}" for note, name in notes(report).items()]
    scores = task_sentences(report)
    lines += [f"task     {sentence}" for sentence in scores[:MOST_SCORES]]
    lines += [f"task     and {len(scores) - MOST_SCORES} more, in the report"] if len(scores) > MOST_SCORES else []
    lines += [f"gate     {gate.node}: {gate.says.removeprefix('gate ')}" for gate in report.gates]
    lines += [f"verdict  {': '.join(verdict(report))}"] if report.decision else []
    lines += [f"warning  {text}" for text in report.warnings]
    adapters = [f"adapter  {shown(stage.outputs['adapter'])}" for stage in report.stages if "adapter" in stage.outputs]
    lines += ["", *adapters] if adapters or report.final else []
    if report.final and not report.final.is_source:
        where = shown(report.final.path)
        lines.append(f"model    {where}")
        if not report.final.is_export:
            lines.append(f'load     from transformers import AutoModelForCausalLM; model = AutoModelForCausalLM.from_pretrained("{where}")')
        engine = "llama.cpp" if report.final.is_export else "vllm"
        line = next((line for line in report.serving if line.engine == engine), None)
        lines += [f"serve    {line.command.format(model=where)}{f'   ({line.note})' if line.note else ''}"] if line else []
    lines += [f"report   {shown(str(page))}"] if page else []
    lines += [f"{label:<8} {text}" for label, text in zip(("mlflow", ""), mlflow.splitlines(), strict=False)]
    return lines


def task_sentences(report: Report) -> list[str]:
    """`next_line/acc 0.610 +- 0.028 (quantize.model), the source 0.640; 12 of 300 items turned wrong, 5 right`."""
    return [_task_sentence(task, score) for task in report.tasks for score in task.metrics]


def _task_sentence(task: TaskReport, score: TaskMetric) -> str:
    error = "" if score.stderr is None else f" +- {score.stderr:.3f}"
    sentence = f"{task.task}/{score.metric} {score.value:.3f}{error} ({task.measures})"
    sentence += "" if score.source_value is None else f", the source {score.source_value:.3f}"
    if score.flips_to_wrong is not None:
        sentence += f"; {score.flips_to_wrong} of {task.items} items turned wrong, {score.flips_to_right} right"
    return sentence + (f"; {task.unpaired} items have no counterpart" if task.unpaired else "")


def markdown(report: Report) -> str:
    """The verdict, the table, what was found, and what the plan had said of every stage, for a place that renders markdown."""
    lines = [f"**{': '.join(verdict(report))}**", ""] if report.decision else []
    lines += [*(f"- {gate.node}: {gate.says}" for gate in report.gates), ""] if report.gates else []
    lines += [summary(report), ""] if report.verdict == "complete" else [f"{report.verdict}: {report.error}", ""]
    columns, rows = table_of(report)
    lines += [*markdown_table(columns, rows), ""]
    lines += [*(f"- {sentence}" for sentence in task_sentences(report)), ""] if report.tasks else []
    lines += ["Planned and measured (RAM: above what was loaded before the stage began; a hit: when it was computed)", ""]
    lines += [*markdown_table(COMPARED, comparison_rows(report)), ""]
    said = [f"- warning: {text}" for text in report.warnings] + [f"- {name}: {note}" for note, name in notes(report).items()]
    return "\n".join(lines + said).rstrip()


def notes(report: Report) -> dict[str, str]:
    """What stages said of their results, each with the first stage that said it.

    The source model's twins repeat others, and what a gate or a data check would do is the plan's to say.
    """
    found: dict[str, str] = {}
    for stage in report.stages:
        planned = stage.type == Verdict.__name__ or stage.name.endswith("@source")
        for note in () if planned else stage.notes:
            if stage.stage == "dequantize" or not note.startswith(PLANNED_NOTES):
                found.setdefault(note, stage.name)
    return found


def markdown_table(columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def shown(path: str) -> str:
    """Relative to the working folder where that is shorter to read and still below it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
