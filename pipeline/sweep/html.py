"""`sweep.html`: what came out of a sweep, the best first, in one file that needs nothing else; made as the report of a run is.

The words are here and in the template, sweep.html.jinja; rows come from pipeline/sweep/table.py, plots from pipeline/sweep/plots.py.
"""

from collections.abc import Iterator
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from pipeline.report_html import CSS, Fact
from pipeline.sweep.plots import MOST_ROWS, draw
from pipeline.sweep.report import SweepReport
from pipeline.sweep.table import executions, position_table, remarks, table_of
from pipeline.target import format_seconds, format_size

TEMPLATE = "sweep.html.jinja"


def render(report: SweepReport) -> tuple[str, list[str]]:
    """The page, and a sentence for each plot that could not be drawn."""
    plots, problems = draw(report)
    columns, rows = table_of(report)
    here, above = Path(__file__).parent, Path(__file__).parents[1]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([here, above]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": format_seconds, "breakable": _breakable}
    page = environment.get_template(TEMPLATE).render(
        report=report,
        css=Markup((above / CSS).read_text(encoding="utf-8")),
        verdict=_verdict(report),
        facts=list(_facts(report)),
        columns=columns,
        rows=[(_breakable(first), *cells) for first, *cells in rows],
        remarks=remarks(report),
        plots={name: Markup(svg) for name, svg in plots.items()},
        sized=len({row.nbytes for row in report.ranked}) > 1,
        more=max(0, len(report.ranked) - MOST_ROWS),
        positions=position_table(report),
        executions=executions(report),
        problems=problems,
    )
    return page, problems


def _breakable(text: str) -> Markup:
    """A name as long as `rtn4>dequantize>prune` may be broken behind a `>`."""
    return escape(text).replace("&gt;", Markup("&gt;<wbr>"))


def _verdict(report: SweepReport) -> tuple[str, str, list[str]]:
    """Tone, headline and what is said below it."""
    headline, *said = report.sentences()
    tone = "bad" if not report.ranked else "open" if report.failed or report.problem else "good" if report.cheapest else "plain"
    return tone, headline, said


def _facts(report: SweepReport) -> Iterator[Fact]:
    ranked, counts = report.ranked, report.executions
    failed = f"{len(report.failed)} failed" if report.failed else "all ended well"
    yield Fact("jobs", str(report.jobs), failed)
    if ranked:
        best = ranked[0]
        if best.perplexity is not None:
            source = f"of the best; source {report.source_perplexity:.4g}" if report.source_perplexity else "of the best"
            yield Fact("perplexity", f"{best.perplexity:.4g}", source)
            yield Fact("tie with the best", str(sum(row.tie for row in ranked)), f"of {len(ranked) - 1} others")
        sizes = [format_size(extreme(row.nbytes for row in ranked)) for extreme in (min, max)]
        whole = f"of {format_size(report.source_nbytes)}" if report.source_nbytes else ""
        yield Fact("size", " to ".join(dict.fromkeys(sizes)), whole)
    yield Fact("stage executions", str(counts.distinct), f"instead of {counts.nodes}; {counts.ran} ran, {counts.hits} from the store")
