"""A recipe ends with evidence, and stops where the evidence is bad; the model that was judged stays."""

import json
from pathlib import Path

from tests.scenarios.conftest import UNTRACKED, Run


def report_of(folder: Path) -> dict:  # type: ignore[type-arg]
    """Of the last run: other gates are another run's folder."""
    file = max((folder / "outputs" / "runs").glob("*/*/report.json"), key=lambda file: file.stat().st_mtime_ns)
    content: dict = json.loads(file.read_text())  # type: ignore[type-arg]
    return content


def test_a_gate_that_fails_ends_the_run_with_its_own_exit_code_and_keeps_the_model(run: Run, folder: Path) -> None:
    outcome = run("recipe=mine.yaml", UNTRACKED, "gates=[{after: prune, metric: perplexity, max: 1.5}]")
    assert outcome.code == 6
    (error,) = outcome.errors
    assert error.startswith("error: gate@prune: gate fails: perplexity is ") and "[" in error and "over 6 documents" in error
    report = report_of(folder)
    assert (report["verdict"], report["decision"]) == ("failed", "investigate")
    status = {stage["name"]: stage["status"] for stage in report["stages"]}
    assert status["quantize"] == "not reached" and status["gate@prune"] == "ran"
    pruned = next(stage for stage in report["stages"] if stage["name"] == "prune")
    assert (Path(pruned["path"]) / "model.safetensors").exists()
    assert report["gates"][0]["measures"] == "prune.model" and report["gates"][0]["says"] in error
    assert "verdict  investigate" in outcome.out and "gate     gate@prune: fails" in outcome.out


def test_the_same_gate_as_a_warning_lets_the_run_go_on_and_costs_no_second_measurement(run: Run, folder: Path) -> None:
    run("recipe=mine.yaml", UNTRACKED, "gates=[{after: prune, metric: perplexity, max: 1.5}]")
    outcome = run("recipe=mine.yaml", UNTRACKED, "gates=[{after: prune, metric: perplexity, max: 1.5, on_fail: warn}]")
    assert outcome.code == 0
    report = report_of(folder)
    assert (report["verdict"], report["decision"]) == ("complete", "investigate")
    status = {stage["name"]: stage["status"] for stage in report["stages"]}
    assert status["evaluate@prune"] == status["gate@prune"] == "hit"


def test_gates_that_pass_say_deploy_and_one_that_cannot_tell_says_so(run: Run, folder: Path) -> None:
    passing = "{metric: perplexity, max_increase_pct: 1000}"
    outcome = run("recipe=mine.yaml", UNTRACKED, f"gates=[{passing},{{metric: top1_agreement, min: 0.0}}]")
    assert outcome.code == 0 and "verdict  deploy: every gate passes" in outcome.out
    change = next(gate for gate in report_of(folder)["gates"] if gate["metric"] == "perplexity")["change"]
    straddling = f"{{metric: perplexity, max_increase_pct: {max(change, 0.0):.12f}}}"
    outcome = run("recipe=mine.yaml", UNTRACKED, f"gates=[{straddling}]")
    if report_of(folder)["gates"][0]["outcome"] == "inconclusive":
        assert outcome.code == 0 and "verdict  inconclusive" in outcome.out
        assert run("recipe=mine.yaml", UNTRACKED, f"gates=[{straddling[:-1]}, on_inconclusive: stop}}]").code == 6
    else:
        assert change <= 0  # nothing straddles a limit of 0


def test_probes_show_what_each_stage_costs(run: Run, folder: Path) -> None:
    outcome = run("recipe=mine.yaml", UNTRACKED, "probe={after: each, max_documents: 2}")
    assert outcome.code == 0
    measured = {stage["name"]: stage["metrics"]["documents"] for stage in report_of(folder)["stages"] if stage["name"].startswith("probe@")}
    assert measured == {"probe@source": 2, "probe@prune": 2, "probe@quantize": 2}


def test_a_gate_on_what_nobody_measures_is_refused_before_anything_runs(run: Run, folder: Path) -> None:
    outcome = run("recipe=mine.yaml", "gates=[{metric: perplexty, max: 2},{after: destill, metric: perplexity, max: 2}]")
    assert outcome.code == 2
    assert [error.partition(":")[2].partition(":")[0].strip() for error in outcome.errors] == ["gates[0].metric", "gates[1].after"]
    assert not (folder / "outputs").exists()
