"""What the evidence says, beyond a score: answers that flipped, perplexity far into a text, whether the evaluation text can be trusted."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.destination import legal
from pipeline.findings import GateReport, gate_metrics, position_reports
from pipeline.plan import Plan
from pipeline.report import Report, build_report
from pipeline.report_table import task_sentences
from pipeline.run_record import RunRecord
from pipeline.task_findings import TaskReport, task_metrics, task_reports
from tests.pipeline.rehearsal import plan_of, rehearse, small_model

STAGES = {
    "quantize": {"stage": "rtn", "group_size": 64},
    "evaluate": {"stage": "evaluate"},
    "tasks": {"stage": "lm_eval", "tasks": ["quiz"]},
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """quantize, then the quiz; the source model is asked the same by `tasks@source`."""
    folder = tmp_path_factory.mktemp("plan")
    return plan_of(small_model(folder / "model"), folder, order=["quantize", "evaluate", "tasks"], stages=STAGES)


def answers(folder: Path, outcomes: dict[str, float], task: str = "quiz", metric: str = "acc", **more: Any) -> Path:
    """A report of stage lm_eval."""
    folder.mkdir(parents=True, exist_ok=True)
    value = sum(outcomes.values()) / len(outcomes)
    score = {"value": value, "stderr": 0.125, "higher_is_better": True}
    items = [{"id": name, metric: outcome} for name, outcome in outcomes.items()]
    content = {"tasks": {task: {"metrics": {metric: score}, "n_shot": 2, "version": 1, "items": items}}, "groups": {}, **more}
    (folder / "tasks.json").write_text(json.dumps(content))
    return folder


def choices(folder: Path, likelihoods: dict[str, Sequence[float]], target: int = 0, prompt: str = "What?", task: str = "quiz") -> Path:
    """What was asked and answered, as stage lm_eval keeps it: the choices are `a`, `b`, ..."""
    rows = [
        {"id": name, "filter": "none", "prompt": prompt, "continuations": [" a", " b", " c"], "target": target,
         "responses": [[value, False] for value in values], "metrics": {}}
        for name, values in likelihoods.items()
    ]  # fmt: skip
    (folder / f"samples_{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def found(plan: Plan, mine: Path, source: Path | None, warnings: list[str] | None = None) -> tuple[TaskReport, ...]:
    finished = {"tasks": mine} | ({"tasks@source": source} if source else {})
    told: list[str] = []
    reports = task_reports(plan, finished, told)
    if warnings is None:
        assert told == []
    else:
        warnings += told
    return reports


def test_answers_that_turned_are_counted_both_ways_though_the_score_stays(plan: Plan, tmp_path: Path) -> None:
    before = answers(tmp_path / "before", {"1": 1, "2": 1, "3": 0, "4": 0, "5": 1})
    after = answers(tmp_path / "after", {"5": 1, "4": 1, "3": 1, "2": 0, "1": 0})  # in another order: paired by id
    (task,) = found(plan, after, before)
    (score,) = task.metrics
    assert (score.value, score.source_value) == (0.6, 0.6)
    assert (score.flips_to_wrong, score.flips_to_right, task.unpaired) == (2, 2, 0)
    assert (task.task, task.node, task.measures, task.items, task.n_shot) == ("quiz", "tasks", "quantize.model", 5, 2)


def test_items_without_a_counterpart_are_told_and_no_flips(plan: Plan, tmp_path: Path) -> None:
    before = answers(tmp_path / "before", {"1": 1, "2": 1, "gone": 0})
    after = answers(tmp_path / "after", {"1": 0, "2": 1, "new": 0, "newer": 1})
    (task,) = found(plan, after, before)
    assert (task.metrics[0].flips_to_wrong, task.metrics[0].flips_to_right, task.unpaired) == (1, 0, 3)


def test_a_score_that_is_not_right_or_wrong_has_no_flips(plan: Plan, tmp_path: Path) -> None:
    before, after = answers(tmp_path / "before", {"1": 0.25, "2": 1}), answers(tmp_path / "after", {"1": 0.5, "2": 0})
    (task,) = found(plan, after, before)
    assert (task.metrics[0].flips_to_wrong, task.metrics[0].flips_to_right, task.examples) == (None, None, ())


def test_a_model_that_was_asked_alone_has_scores_and_no_flips(plan: Plan, tmp_path: Path) -> None:
    (task,) = found(plan, answers(tmp_path / "after", {"1": 1, "2": 0}), None)
    (score,) = task.metrics
    assert (score.value, score.stderr, score.source_value, score.flips_to_wrong, task.unpaired) == (0.5, 0.125, None, None, 0)


def test_examples_say_what_was_asked_and_what_either_model_said(plan: Plan, tmp_path: Path) -> None:
    before = choices(answers(tmp_path / "before", {"1": 1, "2": 0}), {"1": [-1, -2, -3], "2": [-2, -1, -3]})
    after = choices(answers(tmp_path / "after", {"1": 0, "2": 1}), {"1": [-2, -3, -1], "2": [-1, -2, -3]})
    (task,) = found(plan, after, before)
    wrong, right = task.examples
    assert (wrong.id, wrong.became, wrong.prompt, wrong.target) == ("1", "wrong", "What?", " a")
    assert (wrong.source_answer, wrong.answer) == (" a", " c")
    assert (right.id, right.became, right.source_answer, right.answer) == ("2", "right", " b", " a")


def test_there_are_three_examples_at_most_and_wrong_answers_go_first(plan: Plan, tmp_path: Path) -> None:
    names = [str(n) for n in range(6)]
    likelihoods = {name: [-1.0, -2.0, -3.0] for name in names}
    before = choices(answers(tmp_path / "before", {n: float(n in "45") for n in names}), likelihoods)
    after = choices(answers(tmp_path / "after", {n: float(n not in "45") for n in names}), likelihoods)
    (task,) = found(plan, after, before)
    assert [(example.id, example.became) for example in task.examples] == [("4", "wrong"), ("5", "wrong"), ("0", "right")]


def test_long_texts_are_cut_where_the_least_is_lost_and_half_a_character_is_no_error(plan: Plan, tmp_path: Path) -> None:
    rows = {"id": "1", "filter": "none", "prompt": "x" * 5000 + "the end", "continuations": [], "target": "t", "metrics": {}}
    folders = [answers(tmp_path / name, {"1": outcome}) for name, outcome in (("before", 1), ("after", 0))]
    for folder in folders:
        (folder / "samples_quiz.jsonl").write_text(json.dumps(rows | {"responses": ["\ud83d" + "y" * 5000]}) + "\n")
    ((example,),) = (task.examples for task in found(plan, folders[1], folders[0]))
    assert example.prompt.endswith("the end") and example.prompt.startswith("...x") and len(example.prompt) < 1000
    assert example.answer is not None and example.answer.startswith("?y") and example.answer.endswith("...")
    example.model_dump_json().encode()


def test_an_answer_is_not_guessed_where_another_rule_chose_it(plan: Plan, tmp_path: Path) -> None:
    before = choices(answers(tmp_path / "before", {"1": 1}, metric="acc_norm"), {"1": [-1, -2, -3]})
    after = choices(answers(tmp_path / "after", {"1": 0}, metric="acc_norm"), {"1": [-2, -1, -3]})
    ((example,),) = (task.examples for task in found(plan, after, before))
    assert (example.source_answer, example.answer, example.target) == (None, None, " a")


def test_groups_have_scores_and_no_items(plan: Plan, tmp_path: Path) -> None:
    groups = {"groups": {"all": {"metrics": {"acc": {"value": 0.7, "stderr": None, "higher_is_better": True}}}}}
    before, after = answers(tmp_path / "before", {"1": 1}, **groups), answers(tmp_path / "after", {"1": 1}, **groups)
    group, task = found(plan, after, before)
    assert (group.task, group.items, group.metrics[0].source_value, group.metrics[0].flips_to_wrong) == ("all", None, 0.7, None)
    assert task.metrics[0].flips_to_wrong == 0


def test_a_report_in_another_form_is_a_warning(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "tasks.json").write_text('{"tasks": {"quiz": {"metrics": {"acc": "high"}}}}')
    warnings: list[str] = []
    assert found(plan, tmp_path, None, warnings) == ()
    (warning,) = warnings
    assert "tasks.json" in warning and warning.startswith("the answers of tasks cannot be told")


def test_flat_figures_are_of_the_final_model(plan: Plan, tmp_path: Path) -> None:
    before, after = answers(tmp_path / "before", {"1": 1, "2": 1}), answers(tmp_path / "after", {"1": 0, "2": 1})
    reports = found(plan, after, before)
    flat = {"quiz/acc": 0.5, "quiz/acc_stderr": 0.125, "quiz/acc_flips_to_wrong": 1.0, "quiz/acc_flips_to_right": 0.0}
    assert task_metrics(reports, "quantize.model") == flat
    assert task_metrics(reports, "prune.model") == {}


def test_perplexity_by_position_is_of_sums_over_tokens(tmp_path: Path) -> None:
    rows = [
        {"from": 0, "to": 64, "tokens": 4, "nll": 4 * math.log(8), "reference_nll": 4 * math.log(5), "kl": 1.0, "top1_matches": 3},
        {"from": 64, "to": 128, "tokens": 2, "nll": 2 * math.log(3), "reference_nll": None, "kl": None, "top1_matches": None},
    ]
    (tmp_path / "report.json").write_text(json.dumps({"metrics": {}, "documents": [], "positions": rows}))
    first, second = position_reports(tmp_path)
    assert (first.start, first.end, first.tokens) == (0, 64, 4)
    assert (first.perplexity, first.source_perplexity, first.kl_divergence) == (pytest.approx(8), pytest.approx(5), 0.25)
    assert (second.perplexity, second.source_perplexity, second.kl_divergence) == (pytest.approx(3), None, None)


def test_an_evaluation_from_before_positions_were_counted_has_none(tmp_path: Path) -> None:
    assert position_reports(tmp_path) == ()
    (tmp_path / "report.json").write_text(json.dumps({"metrics": {}, "documents": []}))
    assert position_reports(tmp_path) == ()


def rehearsed(plan: Plan, folder: Path) -> Report:
    """The rehearsed run's report, after an answer of the quantized model turned wrong."""
    record = RunRecord(folder)
    rehearse(plan, folder, [record])
    for node, outcome in (("tasks@source", 1.0), ("tasks", 0.0)):
        answers(record.folders[node], {"1": outcome, "2": 1.0})
    return build_report(plan, record)


def test_scores_of_tasks_do_not_hide_the_perplexity_of_the_same_model(plan: Plan, tmp_path: Path) -> None:
    report = rehearsed(plan_of(Path(plan.source.path), tmp_path, order=["quantize", "evaluate", "tasks"], stages=STAGES), tmp_path)
    assert report.metrics["perplexity"] == report.final_quality()["perplexity"] == 8.0
    assert report.metrics["quiz/acc"] == 0.5 and report.metrics["quiz/acc_flips_to_wrong"] == 1.0
    assert {stage.name: stage.reference for stage in report.stages}["tasks"] == "tasks@source"
    assert task_sentences(report) == [
        "quiz/acc 0.500 +- 0.125 (quantize.model), the source 1.000; 1 of 2 items turned wrong, 0 right"
    ]  # fmt: skip


def test_where_everything_came_from_is_told_as_it_was_written(plan: Plan, tmp_path: Path) -> None:
    report = build_report(plan, RunRecord(tmp_path))
    model, data = report.origins
    assert (model.name, model.type, model.written, model.bytes) == (
        "model", "DenseCheckpoint", str(plan.source.path), plan.source.model_spec.nbytes,
    )  # fmt: skip
    assert model.key == plan.source.key
    assert (data.name, data.format, data.documents, data.bytes) == ("data.eval", "text, txt", 1, len("some text to evaluate on"))


def test_gates_have_flat_names_that_mlflow_takes() -> None:
    gate = GateReport(
        outcome="fail", metric="perplexity", limit_name="max_increase_pct", limit=5.0, value=6.0, source_value=5.5, change=9.0, low=8.0,
        high=10.0, confidence=0.95, samples=55, noun="documents", needed=None, node="gate@quantize", measures="quantize.model",
        report="evaluate", says="",
    )  # fmt: skip
    metrics = gate_metrics([gate, gate.model_copy(update={"node": "gate@quantize@2", "change": -1.0})])
    assert metrics == {"gate/quantize/change": 9.0, "gate/quantize.2/change": -1.0}
    assert [legal(name) for name in metrics] == list(metrics)
