"""What a run says about itself: report.json for scripts, the table for people."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.errors import Interrupted, StageFailed
from pipeline.plan import Plan
from pipeline.report import Report, build_report
from pipeline.report_table import closing_lines, markdown, print_report, table_of
from pipeline.run_record import RunRecord
from tests.pipeline.rehearsal import plan_of, rehearse, small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


def run(plan: Plan, outputs: Path, error: BaseException | None = None, **events: Any) -> Report:
    record = RunRecord(outputs / "runs" / "rehearsed" / plan.digest[:12])
    rehearse(plan, outputs, [record], **events)
    return build_report(plan, record, error)


def printed(report: Report, mlflow: str = "") -> str:
    out = io.StringIO()
    print_report(report, Console(file=out, width=80), mlflow)
    return out.getvalue()


def test_a_complete_run_is_told_stage_by_stage(model: Path, tmp_path: Path) -> None:
    plan = plan_of(model, tmp_path)
    report = run(plan, tmp_path)
    assert report.verdict == "complete"
    names = ("hidden_states@source", "evaluate@source", "prune", "quantize", "evaluate")
    assert [(s.name, s.status) for s in report.stages] == [(n, "ran") for n in names]
    quantize = report.stages[3]
    assert quantize.bytes == quantize.planned_bytes == report.metrics["nbytes"]
    assert report.metrics["compression_ratio"] == pytest.approx(report.source["nbytes"] / report.metrics["nbytes"], rel=1e-3)
    assert (report.metrics["perplexity"], report.metrics["reference_perplexity"]) == (8.0, 5.0)
    assert report.source["perplexity"] == 5.0
    assert (report.metrics["stages_ran"], report.metrics["stages_hit"]) == (5, 0)
    assert report.final is not None
    assert (report.final.node, report.final.type, report.final.num_bits) == ("quantize", "QuantizedCheckpoint", 4)
    assert report.final.path.endswith(f"{plan.digest[:12]}/model")


def test_the_file_is_the_report(model: Path, tmp_path: Path) -> None:
    report = run(plan_of(model, tmp_path), tmp_path)
    report.write(tmp_path)
    assert Report.model_validate_json((tmp_path / "report.json").read_text()) == report
    assert json.loads((tmp_path / "report.json").read_text())["schema_version"] == 1


def test_a_second_run_is_all_hits_with_the_first_ones_seconds(model: Path, tmp_path: Path) -> None:
    run(plan_of(model, tmp_path), tmp_path)
    report = run(plan_of(model, tmp_path), tmp_path)
    assert {(stage.status, stage.seconds) for stage in report.stages} == {("hit", 12.5)}
    assert [row[1] for row in table_of(report)[1]] == ["hit"] * 4


def test_a_failure_keeps_what_was_reached(model: Path, tmp_path: Path) -> None:
    plan = plan_of(model, tmp_path)
    report = run(plan, tmp_path, StageFailed("quantize", "out of memory"), fail="quantize")
    assert [stage.status for stage in report.stages] == ["ran", "ran", "ran", "failed", "not reached"]
    failed = report.stages[3]
    assert failed.log == "/logs/quantize/log.txt"
    assert "out of memory: 9 GB needed, 8 GB there" in failed.notes
    assert (report.verdict, report.final, report.error) == ("failed", None, "quantize: out of memory")
    assert "perplexity" not in report.metrics


def test_an_interrupted_stage_is_not_called_failed(model: Path, tmp_path: Path) -> None:
    report = run(plan_of(model, tmp_path), tmp_path, Interrupted("stopped"), stop="prune")
    assert [stage.status for stage in report.stages] == ["ran", "ran", "interrupted", "not reached", "not reached"]
    assert report.verdict == "interrupted"


def test_a_run_that_never_started_reports_too(model: Path, tmp_path: Path) -> None:
    report = build_report(plan_of(model, tmp_path), RunRecord(tmp_path), StageFailed("prune", "no"))
    assert {stage.status for stage in report.stages} == {"not reached"}
    assert "source" in printed(report)


def test_the_table_reads_at_80_columns_and_in_a_pipe(model: Path, tmp_path: Path) -> None:
    text = printed(run(plan_of(model, tmp_path), tmp_path), "mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db")
    table = [line for line in text.splitlines()[1:7] if line]
    assert max(map(len, table)) <= 80
    assert table[0].split() == ["stage", "time", "size", "bits/w", "ppl", "vs", "source", "KL"]
    assert table[1].split() == ["source", "12.5", "s", "1.33", "MB", "16.00", "5"]
    assert table[3].split() == ["quantize", "12.5", "s", "364", "KB", "6.19", "8", "+60.0", "%", "0.3"]
    assert table[4].split() == ["evaluation", "25.0", "s"], "with the source's hidden states, which it reads"
    assert "\x1b" not in text
    assert text.isascii()


def test_lines_for_copying_are_never_broken(model: Path, tmp_path: Path) -> None:
    report = run(plan_of(model, tmp_path), tmp_path)
    assert report.final is not None
    lines = printed(report, "mlflow ui").splitlines()
    assert (
        f'load     from transformers import AutoModelForCausalLM; model = AutoModelForCausalLM.from_pretrained("{report.final.path}")'
        in lines
    )
    assert f"serve    vllm serve {report.final.path}" in lines
    assert lines[-1] == "mlflow   mlflow ui"


@pytest.mark.parametrize(("num_bits", "noted"), [(4, False), (8, False), (3, True)])
def test_vllm_is_named_with_what_is_to_be_known_of_its_kernels(model: Path, tmp_path: Path, num_bits: int, noted: bool) -> None:
    lines = closing_lines(run(plan_of(model, tmp_path, num_bits=num_bits), tmp_path), "")
    served = next(line for line in lines if line.startswith("serve"))
    assert ("only Humming's multiply weights of 3 bits" in served) == noted


def test_an_inserted_conversion_is_explained(model: Path, tmp_path: Path) -> None:
    report = run(plan_of(model, tmp_path, order=["quantize", "prune", "evaluate"]), tmp_path)
    assert "dequantize" in [row[0] for row in table_of(report)[1]]
    assert "prune needs dense weights and quantize.model is quantized" in printed(report)
    assert report.final is not None
    assert report.final.num_bits is None


def test_quality_stands_beside_the_model_that_was_measured(model: Path, tmp_path: Path) -> None:
    probe = {"probe": {"stage": "evaluate", "inputs": {"model": "prune"}}}
    stages = {"prune": {"stage": "structured_prune", "mlp_ratio": 0.5}, "quantize": {"stage": "rtn", "group_size": 64}, **probe}
    report = run(plan_of(model, tmp_path, order=["prune", "quantize", "probe"], stages=stages), tmp_path)
    quality = {row[0]: row[-1] for row in table_of(report)[1]}
    assert (quality["prune"], quality["quantize"]) == ("0.3", "")
    assert "perplexity" not in report.metrics  # the final model was not measured


def test_an_order_that_only_evaluates_ends_with_the_source_model(model: Path, tmp_path: Path) -> None:
    report = run(plan_of(model, tmp_path, order=["evaluate"]), tmp_path)
    assert report.final is not None
    assert (report.final.node, report.final.path, report.metrics["compression_ratio"]) == ("model", str(model), 1.0)
    text = printed(report)
    assert "the model stays as it is: " in text and "perplexity 5" in text
    assert "smaller" not in text and "from_pretrained" not in text and "serve" not in text


def test_columns_in_which_nothing_stands_are_left_out(model: Path, tmp_path: Path) -> None:
    assert table_of(run(plan_of(model, tmp_path, order=["prune"]), tmp_path))[0] == ["stage", "time", "size", "bits/w"]


def test_markdown_has_the_same_cells(model: Path, tmp_path: Path) -> None:
    report = run(plan_of(model, tmp_path), tmp_path)
    body = markdown(report).partition("\n\nPlanned")[0].splitlines()[4:]
    assert [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in body] == table_of(report)[1]


def test_warnings_and_notes_of_events_are_kept(model: Path, tmp_path: Path) -> None:
    plan, record = plan_of(model, tmp_path), RunRecord(tmp_path)
    record({"event": "warning", "time": 0.0, "text": "the disk is nearly full"})
    rehearse(plan, tmp_path, [record])
    record({"event": "note", "time": 0.0, "node": "prune", "text": "kept 3 of 4 heads"})
    text = printed(build_report(plan, record))
    assert "warning  the disk is nearly full" in text
    assert "note     prune: kept 3 of 4 heads" in text


def test_a_model_measured_after_each_stage_makes_a_waterfall(model: Path, tmp_path: Path) -> None:
    report = run(plan_of(model, tmp_path, order=["prune", "evaluate", "quantize", "evaluate"]), tmp_path)
    columns, rows = table_of(report)
    change = {row[0]: row[columns.index("change")] for row in rows}
    assert change == {"source": "", "prune": "+60.0 %", "quantize": "+0.0 %", "evaluation": ""}
    assert dict(zip(columns, rows[-1], strict=True))["time"] == "37.5 s"


def test_a_change_stands_beside_its_interval_and_the_table_fits_its_terminal(model: Path, tmp_path: Path) -> None:
    report = run(plan_of(model, tmp_path, order=["prune", "evaluate", "quantize", "evaluate"]), tmp_path)
    ends = {"perplexity_change_pct_low": 48.25, "perplexity_change_pct_high": 71.9}
    known = [stage.model_copy(update={"metrics": stage.metrics | ends}) if stage.reference else stage for stage in report.stages]
    report = report.model_copy(update={"stages": known, "metrics": report.metrics | ends})
    assert "perplexity 5 -> 8 (+60.0 % [48, 72])" in printed(report)
    tables = {}
    for width in (66, 100):
        out = io.StringIO()
        print_report(report, Console(file=out, width=width))
        tables[width] = out.getvalue().strip().splitlines()[:5]
    assert all("+60.0 % [48, 72]" in line for table in tables.values() for line in table[2:4])
    assert "change" in tables[100][0] and "change" not in tables[66][0]
    assert max(map(len, tables[66])) <= 66


def test_a_measurement_that_was_not_reached_has_a_row_of_its_own(model: Path, tmp_path: Path) -> None:
    report = run(plan_of(model, tmp_path), tmp_path, StageFailed("quantize", "out of memory"), fail="quantize")
    assert [row[:2] for row in table_of(report)[1]] == [
        ("source", "12.5 s"), ("prune", "12.5 s"), ("quantize", "failed"), ("evaluate (of quantize)", "not reached"),
        ("evaluation", "12.5 s"),
    ]  # fmt: skip
