"""What a sweep leaves for reading: the table that fits a terminal, and a page that needs nothing else."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import pipeline.sweep.plots
from pipeline.report_plots import COLOURS
from pipeline.sweep.html import render
from pipeline.sweep.page import FILES, write_sweep
from pipeline.sweep.plots import draw
from pipeline.sweep.record import JobRecord
from pipeline.sweep.report import SweepReport, build_sweep
from pipeline.sweep.table import markdown, print_sweep, table_of
from tests.pipeline.rehearsal import small_model
from tests.pipeline.sweep.jobs import Jobs, losses
from tests.pipeline.test_report_html import HOSTILE, Page

SECTIONS = ["verdict", "ranking", "positions", "jobs"]
DOCS = Path(__file__).parents[3] / "docs" / "sweep.md"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """A tie, a smaller and worse one, two seeds, a gate that failed and a job that was lost."""
    jobs = Jobs(small_model(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("sweep") / "outputs")
    order = ("prune", "distill", "quantize", "evaluate")
    for seed, shift in enumerate((0.10, 0.12)):
        override = f"stages.distill.seed={seed}"
        jobs.add(order, losses(shift), stages={"distill": {"seed": seed}}, overrides=[override], decision="deploy")
    jobs.add(("quantize", "prune", "distill", "evaluate"), losses(0.1101, wobble=0.05), decision="deploy")
    jobs.add(("prune", "evaluate"), losses(0.1103, wobble=0.03), decision="deploy")
    jobs.add(("prune", "quantize", "evaluate"), losses(0.5), stages={"quantize": {"num_bits": 2}}, decision="investigate", exit_code=6)
    return jobs


@pytest.fixture(scope="module")
def report(jobs: Jobs) -> SweepReport:
    return build_sweep(jobs.sweep(JobRecord(digest="f" * 64, overrides=("recipe=rehearsed", "order=[distill]"))))


@pytest.fixture(scope="module")
def even(jobs: Jobs) -> SweepReport:
    """Pipelines of one size, all of whose jobs ended well."""
    sweep = jobs.sweep()
    return build_sweep(sweep.model_copy(update={"jobs": sweep.jobs[:3]}))


def printed(report: SweepReport, mlflow: str = "") -> str:
    out = io.StringIO()
    print_sweep(report, Console(file=out, width=80), mlflow)
    return out.getvalue()


def test_the_table_fits_80_columns_and_says_what_it_has_to(report: SweepReport) -> None:
    text = printed(report)
    table = text[: text.index("= ties with")].rstrip().splitlines()
    assert max(map(len, table)) <= 80 and text.isascii() and "\x1b" not in text
    assert table[1].split() == ["ppl", "vs", "best", "size"] and table[2].split()[:4] == ["#", "pipeline", "vs", "source"]
    whole = " ".join(text.split())
    for row in report.rows:
        assert all(part in whole for part in row.label.split(">")[1:-1])
    assert any(re.match(r"\d=", line) for line in table) and "fail" in text and "pass" in text
    assert not any(line.endswith(("M", "[", ",")) for line in table)


def test_a_name_is_folded_before_an_arrow_and_never_inside_a_stage(even: SweepReport) -> None:
    out = io.StringIO()
    print_sweep(even, Console(file=out, width=70))
    text = out.getvalue()
    folded = text[text.index("rtn4>dequantize") : text.index("= ties")].splitlines()
    assert folded[1].strip().startswith(">") and "rtn4>dequantize>prune>distill>rtn4" not in "\n".join(folded[:2])


def test_what_all_have_in_common_is_said_once(even: SweepReport, report: SweepReport) -> None:
    assert "every pipeline ends at " in printed(even) and "every pipeline ends" not in printed(report)
    assert "size" not in table_of(even)[0] and "size" in table_of(report)[0]


def test_the_last_lines_are_for_copying_and_never_broken(report: SweepReport) -> None:
    lines = printed(report, "mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db\nhttp://127.0.0.1:5000/#/x").splitlines()
    assert report.cheapest is not None
    assert f"cheapest {report.cheapest.command}" in lines
    assert f"report   {report.folder}/sweep.html" in lines
    assert lines[-2:] == ["mlflow   mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db", "         http://127.0.0.1:5000/#/x"]
    assert any(line.startswith("failed (6)") for line in lines) and any("it never ended" in line for line in lines)
    assert any(line.startswith("again    run -m ") for line in lines)


def test_three_files_say_the_same(report: SweepReport, tmp_path: Path) -> None:
    assert write_sweep(report, tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    assert SweepReport.model_validate_json((tmp_path / "sweep.json").read_text()) == report
    text = (tmp_path / "sweep.md").read_text()
    assert text == markdown(report) + "\n" and all(f"- {sentence}" in text for sentence in report.sentences())
    html = Page((tmp_path / "sweep.html").read_text()).text
    assert all(sentence in html for sentence in report.sentences())
    for row in report.rows:
        assert row.label in text and row.label in html and f"{row.perplexity:.4g}" in text


def test_the_page_is_whole_and_loads_nothing(report: SweepReport) -> None:
    html, problems = render(report)
    page = Page(html)
    assert problems == [] and "None" not in page.text
    assert [attributes.get("id") for tag, attributes in page.elements if tag == "section"] == SECTIONS
    assert len(page.ids()) == len(set(page.ids()))
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in page.elements}
    assert [name for _, attributes in page.elements for name in attributes if name in ("src", "href", "srcset", "action")] == []
    assert "@import" not in html and set(re.findall(r"url\((.)", html)) <= {"#"}
    assert set(re.findall(r"https?://[^\"' ]+", html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_plots_are_in_the_pages_colours_and_show_the_report(report: SweepReport, even: SweepReport) -> None:
    for built in (report, even):
        plots, problems = draw(built)
        assert (sorted(plots), problems) == (["pareto", "ranking"], [])
        for svg in plots.values():
            assert re.findall(r"#[0-9a-fA-F]{6}\b", svg) == [] and any(colour in svg for colour in COLOURS.values())
            assert "<text" in svg and "DejaVu" not in svg
    sized, equal = (re.sub(r"\s+", " ", draw(built)[0]["pareto"]) for built in (report, even))
    assert "tensor data" in sized and f"source {report.source_perplexity:.4g}" in sized
    assert "made in" in equal and "tensor data" not in equal
    assert "var(--better)" in draw(even)[0]["ranking"]  # the tie


def test_a_plot_that_fails_is_told_on_the_page(report: SweepReport, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(report: SweepReport) -> None:
        raise ValueError("cannot convert float NaN to integer")

    monkeypatch.setattr(pipeline.sweep.plots, "ranking", broken)
    html, problems = render(report)
    assert problems == ["the plot of ranking could not be drawn: cannot convert float NaN to integer"]
    assert problems[0] in Page(html).text and 'aria-label="plot of pareto"' in html


def test_one_pipeline_and_none_have_pages_too(jobs: Jobs, tmp_path: Path) -> None:
    sweep = jobs.sweep()
    alone = build_sweep(sweep.model_copy(update={"jobs": sweep.jobs[:1]}))
    assert sorted(draw(alone)[0]) == ["pareto"] and "it ends at" in printed(alone)
    nothing = build_sweep(sweep.model_copy(update={"jobs": (JobRecord(digest="f" * 64, overrides=(), exit_code=2, error="no"),)}))
    for built in (alone, nothing):
        write_sweep(built, tmp_path)
        assert "None" not in Page((tmp_path / "sweep.html").read_text()).text
    assert "no job has made its model" in printed(nothing)


def test_text_of_others_stays_text(report: SweepReport) -> None:
    row = report.rows[0].model_copy(update={"label": HOSTILE, "command": HOSTILE, "folder": HOSTILE})
    failed = report.failed[0].model_copy(update={"name": HOSTILE, "error": f"{HOSTILE} [bold]x[/bold] [/]"})
    hostile = report.model_copy(
        update={"command": HOSTILE, "problem": HOSTILE, "rows": (row, *report.rows[1:]), "failed": (failed,), "notes": (HOSTILE,)}
    )
    page = Page(render(hostile)[0])
    assert "script" not in {tag for tag, _ in page.elements} and page.text.count(HOSTILE) > 6
    assert "[bold]x[/bold] [/]" in printed(hostile)


def test_every_field_of_sweep_json_is_documented(report: SweepReport) -> None:
    documented = set(re.findall(r"`([A-Za-z0-9_]+)`", DOCS.read_text()))

    def fields(value: Any) -> set[str]:
        if isinstance(value, list):
            return {name for item in value for name in fields(item)}
        if not isinstance(value, dict):
            return set()
        return set(value) | {name for key, item in value.items() if key not in ("params", "seeds") for name in fields(item)}

    assert fields(json.loads(report.model_dump_json())) - documented == set()


def test_a_folder_that_is_gone_is_an_os_error(report: SweepReport, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    with pytest.raises(OSError, match="No such file"):
        write_sweep(report, tmp_path / "gone")
