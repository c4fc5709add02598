"""Planned beside measured: a toy stage that takes what it planned, in a real worker; and reports with figures of a GPU machine."""

import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.comparison import COLUMNS, comparison, comparison_rows
from pipeline.report import Report, StageReport, build_report
from pipeline.report_table import closing_lines, markdown
from pipeline.run_record import RunRecord
from tests.pipeline.rehearsal import plan_of, rehearse, small_model
from tests.toys.fixtures import Bench

GB = 10**9
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"  # old savers left it in files; every reader may ignore it


def run_toys(bench: Bench, **stages: dict[str, Any]) -> Report:
    plan, record = bench.plan(**stages), RunRecord(bench.run_dir)
    bench.run(record, **stages)
    return build_report(plan, record)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Of a rehearsed prune, rtn, evaluate on a machine whose peaks are stated."""
    outputs = tmp_path_factory.mktemp("outputs")
    machine = {"name": "host", "flops": 1e8, "bandwidth": 1e8}
    plan = plan_of(small_model(outputs / "model"), outputs, target=machine)
    record = RunRecord(outputs)
    rehearse(plan, outputs, [record])
    return build_report(plan, record)


def with_figures(report: Report, **changes: dict[str, Any]) -> Report:
    """The report with other figures of the stages that are named; the rest of it untold of memory and time."""
    untold = {"measured_floor": None, "planned_seconds": None}
    stages = tuple(stage.model_copy(update=untold | changes.get(stage.name, {})) for stage in report.stages)
    return report.model_copy(update={"stages": stages})


def ram(planned: float, measured: float, floor: float = 0.4 * GB) -> dict[str, Any]:
    return {
        "planned_peak": {"ram": int(planned), "vram": 0, "disk": 0},
        "measured_peak": int(floor + measured),
        "measured_floor": int(floor),
    }


def of(report: Report, name: str) -> StageReport:
    return next(stage for stage in report.stages if stage.name == name)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say what is resident now")
def test_a_stage_that_takes_what_it_planned_is_told_so(spawn_bench: Bench) -> None:
    report = run_toys(spawn_bench, toy={"action": "as_planned"})
    (stage,) = report.stages
    assert stage.planned_peak["ram"] == 100_000_000
    assert stage.measured_ram == pytest.approx(100_000_000, rel=0.2)
    assert re.fullmatch(r"memory (0\.9\d|1(\.[12])?) of planned \(toy \d+(\.\d)? MB of 100 MB\)", comparison(report))
    assert stage.measured_peak_vram is None and stage.planned_seconds is None
    assert f"planned  {comparison(report)}" in closing_lines(report, "")


def test_bytes_are_counted_in_the_files_that_were_made(bench: Bench) -> None:
    report = run_toys(bench, toy_copy={})
    assert comparison(report) == "bytes exact"
    assert report.stages[0].bytes == report.stages[0].planned_bytes


def test_a_tensor_that_nobody_planned_is_found_in_the_bytes(bench: Bench) -> None:
    weights = bench.model / "model.safetensors"
    content = weights.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    table, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    table[INV_FREQ] = {"dtype": "F32", "shape": [4], "data_offsets": [len(data), len(data) + 16]}
    header = json.dumps(table).encode()
    weights.write_bytes(struct.pack("<Q", len(header)) + header + data + bytes(16))

    report = run_toys(bench, toy_copy={})
    planned = report.stages[0].planned_bytes
    assert planned == len(data)
    assert comparison(report) == f"bytes differ: toy_copy {planned + 16:,} instead of {planned:,}"


def test_a_run_of_hits_has_nothing_to_compare(bench: Bench) -> None:
    run_toys(bench, toy_copy={})
    report = run_toys(bench, toy_copy={})
    assert comparison(report) == ""
    assert not any(line.startswith("planned") for line in closing_lines(report, ""))
    assert comparison_rows(report)[0][0] == "toy_copy (hit)", "what an earlier run measured still stands in the table"
    assert comparison_rows(report)[0][2] != ""


def test_the_sentence_names_the_range_and_the_highest(complete: Report) -> None:
    report = with_figures(
        complete,
        prune=ram(2 * GB, 1.7 * GB) | {"planned_seconds": 10.0, "seconds": 12.0},
        quantize=ram(1.1 * GB, 1.2 * GB) | {"planned_seconds": 10.0, "seconds": 16.0},
    )
    assert comparison(report) == "bytes exact; memory 0.85 to 1.1 of planned (highest: quantize 1.2 GB of 1.1 GB); time 1.4x planned"


def test_one_stage_is_no_range(complete: Report) -> None:
    report = with_figures(complete, prune=ram(2 * GB, 3 * GB))
    assert comparison(report) == "bytes exact; memory 1.5 of planned (prune 3 GB of 2 GB)"


def test_a_peak_smaller_than_libraries_says_nothing(complete: Report) -> None:
    assert comparison(with_figures(complete, prune=ram(0.09 * GB, 0.3 * GB))) == "bytes exact"
    assert "memory 0.45" in comparison(with_figures(complete, prune=ram(0.2 * GB, 0.09 * GB)))


def test_a_planned_time_shorter_than_imports_says_nothing(complete: Report) -> None:
    short, long = {"planned_seconds": 0.01, "seconds": 0.4}, {"planned_seconds": 2.0, "seconds": 3.0}
    assert comparison(with_figures(complete, prune=short)) == "bytes exact"
    assert comparison(with_figures(complete, prune=short, quantize=long)) == "bytes exact; time 1.5x planned"


def test_a_floor_that_is_not_known_leaves_memory_out(complete: Report) -> None:
    assert comparison(with_figures(complete, prune=ram(2 * GB, 3 * GB) | {"measured_floor": None})) == "bytes exact"


def test_memory_of_a_gpu_is_compared_with_that_of_a_gpu(complete: Report) -> None:
    gpu = {"planned_peak": {"ram": 10**6, "vram": 10 * GB, "disk": 0}, "planned_seconds": 5.0, "seconds": 10.0}
    on_gpu = with_figures(complete, prune=gpu | {"measured_peak_vram": 12 * GB})
    assert comparison(on_gpu) == "bytes exact; memory 1.2 of planned (prune 12 GB of 10 GB); time 2x planned"
    on_cpu = with_figures(complete, prune=gpu | {"measured_peak": 12 * GB, "measured_floor": 0, "measured_peak_vram": None})
    assert comparison(on_cpu) == "bytes exact", "planned for a GPU, run without one"


def test_the_table_has_every_stage_and_every_figure(complete: Report) -> None:
    gpu = ram(1 * GB, 2 * GB) | {"planned_seconds": 3600.0, "seconds": 1.25}
    gpu["planned_peak"] |= {"vram": 3 * GB}
    rows = comparison_rows(with_figures(complete, quantize=gpu | {"measured_peak_vram": 4 * GB}))
    assert [row[0] for row in rows] == ["hidden_states@source", "evaluate@source", "prune", "quantize", "evaluate"]
    quantize = of(complete, "quantize")
    size = f"{quantize.bytes:,}"
    assert rows[3] == ("quantize", size, size, "1 GB RAM, 3 GB VRAM", "2 GB RAM, 4 GB VRAM", "3,600.0", "1.2")
    assert rows[1][1] == "" and rows[1][4:6] == ("", ""), "a report has no planned bytes; its memory and time are not known here"
    table = markdown(complete).partition("Planned and measured")[2]
    assert "| " + " | ".join(COLUMNS) + " |" in table and f"| quantize | {size} | {size} |" in table


def test_planned_seconds_of_a_run_are_those_of_the_stages_it_ran(complete: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert complete.metrics["planned_seconds"] == pytest.approx(sum(s.planned_seconds or 0 for s in complete.stages), abs=1e-3)
    assert complete.metrics["planned_seconds"] > 0
    monkeypatch.setattr("pipeline.plan.at_measured_rates", lambda target: target)  # as where it could not be measured
    plan = plan_of(small_model(tmp_path / "model"), tmp_path)
    for expected in (False, True):  # the second run only has hits, which take no time on any machine
        record = RunRecord(tmp_path)
        rehearse(plan, tmp_path, [record])
        assert ("planned_seconds" in build_report(plan, record).metrics) == expected
