"""`report.html`: what a run found, verdict first, in one file that needs nothing else, on a phone as on a desk, in light and dark.

The words are here and in the template, report.html.jinja; numbers come from the report, rows from pipeline/report_table.py, plots from
pipeline/report_plots.py. Everything is escaped; the page's own policy forbids scripts and whatever would be loaded from elsewhere.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from pipeline.comparison import COLUMNS as COMPARED
from pipeline.comparison import comparison, comparison_rows
from pipeline.report import Report
from pipeline.report_plots import MOST_TASKS, TWO_SIDED_95, draw, plotted_tasks
from pipeline.report_table import notes, perplexity_change, summary, table_of, verdict
from pipeline.target import format_seconds, format_size
from pipeline.task_findings import TaskMetric

TEMPLATE, CSS = "report.html.jinja", "report.css"
TONES = {
    "deploy": "good", "investigate": "bad", "inconclusive": "open", "complete": "plain", "failed": "bad", "interrupted": "open",
    "pass": "good", "fail": "bad",
}  # fmt: skip


class Fact(NamedTuple):
    label: str
    value: str
    beside: str = ""


class Command(NamedTuple):
    """How one engine serves the final model; an empty `text` where it cannot as it is."""

    engine: str
    text: str
    note: str


def render(report: Report, mark: str) -> tuple[str, list[str]]:
    """The page, and a sentence for each plot that could not be drawn; the page then lacks `mark`, so that it is tried again."""
    plots, problems = draw(report)
    columns, rows = table_of(report)
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"size": format_size, "duration": format_seconds}
    page = environment.get_template(TEMPLATE).render(
        report=report,
        mark="" if problems else mark,
        css=Markup((folder / CSS).read_text(encoding="utf-8")),
        tones=TONES,
        verdict=verdict(report),
        summary=summary(report),
        facts=list(_facts(report)),
        columns=columns,
        rows=rows,
        plots={name: Markup(svg) for name, svg in plots.items()},
        problems=problems,
        more_tasks=max(0, len(plotted_tasks(report)) - MOST_TASKS),
        interval=_interval,
        bits_rows=[(row.kind, *("" if width is None else width for width in row.bits)) for row in report.layer_bits],
        held=comparison(report),
        compared=COMPARED,
        comparison=comparison_rows(report),
        commands=list(_commands(report)),
        notes=notes(report),
        environments=_environments(report),
    )
    return page, problems


def _facts(report: Report) -> Iterator[Fact]:
    """The headline, as far as it is known."""
    metrics, source = report.metrics, report.source
    if "nbytes" in metrics:
        yield Fact("size", format_size(metrics["nbytes"]), f"of {format_size(source['nbytes'])}, {metrics['compression_ratio']:.2f}x")
        yield Fact("bits per weight", f"{metrics['bits_per_weight']:.2f}", f"of {source['bits_per_weight']:.2f}")
        yield Fact("KV cache per token", format_size(metrics["kv_bytes_per_token"]), f"of {format_size(source['kv_bytes_per_token'])}")
    if "perplexity" in metrics:
        change = f", {perplexity_change(metrics)}" if "perplexity_change_pct" in metrics else ""
        beside = f"source {metrics['reference_perplexity']:.4g}{change}" if "reference_perplexity" in metrics else ""
        yield Fact("perplexity", f"{metrics['perplexity']:.4g}", beside)
    if "kl_divergence" in metrics:
        yield Fact("KL divergence", f"{metrics['kl_divergence']:.3g}", "nats per token, from the source")
    if "top1_agreement" in metrics:
        yield Fact("top-1 agreement", f"{metrics['top1_agreement']:.1%}", "of tokens, with the source")
    yield Fact(
        "time of this run", format_seconds(report.seconds), f"{metrics['stages_ran']:.0f} ran, {metrics['stages_hit']:.0f} from the store"
    )


def _interval(score: TaskMetric) -> str:
    """`0.610 [0.555, 0.665]`, the interval at 95 %."""
    if score.stderr is None:
        return f"{score.value:.3f}"
    half = TWO_SIDED_95 * score.stderr
    return f"{score.value:.3f} [{score.value - half:.3f}, {score.value + half:.3f}]"


def _commands(report: Report) -> Iterator[Command]:
    if report.final is None:
        return
    path = report.final.path
    if not report.final.is_export:
        load = f"from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained({path!r})"
        yield Command("transformers", load, "")
    for line in report.serving:
        yield Command(line.engine, line.command.format(model=shlex.quote(path)), line.note)


def _environments(report: Report) -> dict[str, list[str]]:
    """Where stages were computed, each with the stages that were computed there."""
    found: dict[str, list[str]] = {}
    for stage in report.stages:
        if stage.environment:
            found.setdefault(", ".join(f"{name} {value}" for name, value in stage.environment.items()), []).append(stage.name)
    return found if len(found) > 1 else {where: ["all stages"] for where in found}
