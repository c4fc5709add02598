"""A gate passes, fails or says that it cannot tell; what it says of noise, of pairing and of its own figures must be true."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.artifact import EvalReport
from pipeline.stage import Context
from pipeline.verdict import VerdictFile
from stages.gate import Gate


def report(folder: Path, nll: list[float], *, tokens: int = 100, kl: float | None = None, names: str = "d", **metrics: float) -> EvalReport:
    """Of documents of `tokens` tokens and 4 bytes each, with a loss per token."""
    rows = [
        {"id": f"{names}{n}", "tokens": tokens, "bytes": 4 * tokens, "nll": loss * tokens, "kl": None if kl is None else kl * tokens,
         "top1_matches": None if kl is None else tokens // 2}
        for n, loss in enumerate(nll)
    ]  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"metrics": metrics, "documents": rows}))
    return EvalReport(folder)


def answers(folder: Path, right: list[int]) -> EvalReport:
    folder.mkdir(parents=True)
    items = [{"id": str(n), "acc": float(value)} for n, value in enumerate(right)]
    content = {"tasks": {"quiz": {"metrics": {"acc": {"value": sum(right) / len(right)}}, "items": items}}}
    (folder / "tasks.json").write_text(json.dumps(content))
    return EvalReport(folder)


def verdict(folder: Path, params: dict[str, Any], mine: EvalReport, source: EvalReport | None = None) -> VerdictFile:
    output = folder / "out"
    output.mkdir()
    made = Gate.from_dict(params).run(Context(output, lambda event: None), mine, source)
    found = VerdictFile.load(made.path)
    assert made.metrics["change"] == found.change
    return found


def losses(shift: float, noise: float = 0.0, count: int = 60) -> list[float]:
    draw = random.Random(0)
    return [2 + draw.random() + shift + noise * draw.gauss(0, 1) for _ in range(count)]


@pytest.mark.parametrize(("limit", "outcome"), [(5.0, "pass"), (3.0, "inconclusive"), (1.0, "fail")])
def test_it_fails_only_where_the_whole_interval_is_beyond_the_limit(tmp_path: Path, limit: float, outcome: str) -> None:
    source = report(tmp_path / "source", losses(0.0))
    draw = random.Random(1)
    mine = report(tmp_path / "mine", [loss + 0.03 + 0.02 * draw.gauss(0, 1) for loss in losses(0.0)])
    found = verdict(tmp_path, {"metric": "perplexity", "max_increase_pct": limit}, mine, source)
    assert found.outcome == outcome
    assert found.low is not None and found.high is not None and found.low < found.change < found.high
    assert found.change == pytest.approx(3.0, abs=0.6) and found.samples == 60
    assert (found.needed is not None) == (outcome == "inconclusive")


def test_the_figures_are_those_of_the_reports(tmp_path: Path) -> None:
    source, mine = report(tmp_path / "source", losses(0.0)), report(tmp_path / "mine", losses(0.1))
    found = verdict(tmp_path, {"metric": "perplexity", "max_increase_pct": 5}, mine, source)
    assert found.source_value is not None
    assert found.value / found.source_value == pytest.approx(math.exp(0.1))
    assert [found.change, found.low, found.high] == pytest.approx([100 * math.expm1(0.1)] * 3)  # every document differs by the same
    assert found.outcome == "fail"
    assert found.sentence.startswith("gate fails: perplexity changed by +10.5 % [+10.5, +10.5] at 95% over 60 documents, allowed is an inc")


def test_the_number_of_samples_that_would_decide_does_decide(tmp_path: Path) -> None:
    draw, base = random.Random(2), losses(0.0, count=40)
    worse = [loss + 0.016 + 0.05 * draw.gauss(0, 1) for loss in base]
    params = {"metric": "nll_per_token", "max_increase_points": 0.01}

    def run(folder: Path, times: int) -> VerdictFile:
        return verdict(folder, params, report(folder / "mine", worse * times), report(folder / "source", base * times))

    first = run(tmp_path / "few", 1)
    assert first.outcome == "inconclusive" and first.needed is not None and first.needed > 40
    times = math.ceil(1.2 * first.needed / 40)  # the same differences again and again: an interval that is narrower by the root of it
    assert run(tmp_path / "many", times).outcome != "inconclusive"
    assert run(tmp_path / "half", max(1, times // 4)).outcome == "inconclusive"


def test_answers_are_paired_item_by_item_and_points_are_hundredths(tmp_path: Path) -> None:
    right = [1] * 80 + [0] * 20
    source = answers(tmp_path / "source", right)
    mine = answers(tmp_path / "mine", [0] * 10 + right[10:])
    found = verdict(tmp_path, {"metric": "quiz/acc", "max_drop_points": 3}, mine, source)
    assert (found.outcome, found.change) == ("fail", pytest.approx(10))
    assert "changed by -10 points [-" in found.sentence and "a drop of at most 3 points" in found.sentence
    relative = verdict(tmp_path / "mine", {"metric": "quiz/acc", "max_drop_pct": 25}, mine, source)
    assert (relative.outcome, relative.change) == ("pass", pytest.approx(12.5))


@pytest.mark.parametrize(
    ("limits", "outcome"), [({"max": 0.2}, "pass"), ({"max": 0.05}, "fail"), ({"min": 0.05}, "pass"), ({"min": 0.2}, "fail")]
)
def test_limits_of_the_metric_itself_need_no_source(tmp_path: Path, limits: dict[str, float], outcome: str) -> None:
    mine = report(tmp_path / "mine", losses(0.0), kl=0.1)
    assert Gate.from_dict({"metric": "kl_divergence", **limits}).unused() == {"source"}
    found = verdict(tmp_path, {"metric": "kl_divergence", **limits}, mine)
    assert (found.outcome, found.source_value) == (outcome, None)


def test_a_figure_without_samples_has_no_interval(tmp_path: Path) -> None:
    mine = report(tmp_path / "mine", losses(0.0), kl_divergence_p99=1.5)
    found = verdict(tmp_path, {"metric": "kl_divergence_p99", "max": 1.0}, mine)
    assert (found.outcome, found.low, found.high) == ("fail", None, None)
    assert found.sentence == "gate fails: kl_divergence_p99 is 1.5, allowed is at most 1"


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"metric": "quiz/f1", "max_drop_pct": 5}, "metric: mine holds no tasks.json"),
        ({"metric": "surprise", "max": 5}, "metric: the report holds no surprise; it holds: none"),
        ({"metric": "kl_divergence", "max": 5}, "metric: the report holds no kl_divergence, which is measured against a reference model"),
    ],
)
def test_what_was_not_measured_is_an_error_and_not_a_zero(tmp_path: Path, params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        verdict(tmp_path, params, report(tmp_path / "mine", losses(0.0)))


def test_reports_of_other_documents_are_not_compared(tmp_path: Path) -> None:
    mine, source = report(tmp_path / "mine", losses(0.0)), report(tmp_path / "source", losses(0.0), names="other")
    with pytest.raises(ValueError, match="is of other documents, so that the two cannot be paired"):
        verdict(tmp_path, {"metric": "perplexity", "max_increase_pct": 5}, mine, source)


def test_a_relative_change_from_nothing_is_refused_and_points_are_offered(tmp_path: Path) -> None:
    none, mine = answers(tmp_path / "source", [0] * 10), answers(tmp_path / "mine", [0] * 10)
    with pytest.raises(ValueError, match="says nothing; write max_drop_points"):
        verdict(tmp_path, {"metric": "quiz/acc", "max_drop_pct": 5}, mine, none)


@pytest.mark.parametrize("limits", [{}, {"max": 1, "min": 0}])
def test_a_gate_has_exactly_one_limit(limits: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="a gate has one limit"):
        Gate.from_dict({"metric": "perplexity", **limits})
