"""A benchmark among the stages of a recipe: it has a row of its own, and is no part of the model or of its name."""

from pathlib import Path

import pytest

from pipeline.plan import Plan
from pipeline.report import RunRecord, build_report
from pipeline.report_table import table_of
from pipeline.tracking import short_name
from tests.pipeline.rehearsal import plan_of, rehearse, small_model

STAGES = {
    "quantize": {"stage": "rtn", "group_size": 64, "num_bits": 4},
    "evaluate": {"stage": "evaluate"},
    "speed": {"stage": "benchmark", "prompt_tokens": 32},
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    model = small_model(tmp_path_factory.mktemp("model"))
    return plan_of(model, tmp_path_factory.mktemp("outputs"), order=["quantize", "evaluate", "speed"], stages=STAGES)


def test_it_has_a_row_with_its_time_and_no_size(plan: Plan, tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    rehearse(plan, tmp_path, [record])
    report = build_report(plan, record)
    columns, rows = table_of(report)
    row = next(dict(zip(columns, cells, strict=True)) for cells in rows if cells[0] == "speed")
    assert {name: cell for name, cell in row.items() if cell} == {"stage": "speed", "time": "12.5 s"}


def test_the_last_checkpoint_stays_the_result_and_its_quality_the_headline(plan: Plan, tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    rehearse(plan, tmp_path, [record])
    report = build_report(plan, record)
    assert report.final is not None and report.final.output == "quantize.model"
    assert report.metrics["perplexity"] == 8.0
    assert report.stages[-1].measures is None


def test_a_run_is_named_for_what_was_done_to_the_model(plan: Plan) -> None:
    assert short_name(plan) == "rtn4g64"
