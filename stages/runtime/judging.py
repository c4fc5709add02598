"""From two reports to a verdict: figures paired by document or item, the metric's change, its bootstrap interval, one sentence."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.verdict import Outcome, VerdictFile
from stages.functional.bootstrap import resampled_sums

REPORT, TASKS = "report.json", "tasks.json"
# total and weight by document, and what their ratio becomes
COLUMNS: dict[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "perplexity": ("nll", "tokens", torch.exp),
    "nll_per_token": ("nll", "tokens", torch.clone),
    "bits_per_byte": ("nll", "bytes", lambda ratio: ratio / math.log(2)),
    "kl_divergence": ("kl", "tokens", torch.clone),
    "top1_agreement": ("top1_matches", "tokens", torch.clone),
}


@dataclass(frozen=True)
class Rule:
    """What a metric is held to; `limit_name` as in stage gate."""

    metric: str
    limit_name: str
    limit: float
    confidence: float

    def change(self, value: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """In the unit of the limit; a drop counts upwards. `before` is the source model's value, None for a limit of the metric itself."""
        if before is None:
            return value
        change = before - value if "drop" in self.limit_name else value - before
        if self.limit_name.endswith("_points"):
            return change * (100 if "/" in self.metric or self.metric == "top1_agreement" else 1)
        if bool((before == 0).any()):
            raise ValueError(
                f"metric: {self.metric} is 0 of the source model, or of a draw of its items, so that a relative change of it says nothing; "
                f"write {self.limit_name.removesuffix('_pct')}_points"
            )
        return 100 * change / before

    def outcome(self, low: float, high: float) -> Outcome:
        limit = self.limit
        if self.limit_name == "min":
            low, high, limit = -high, -low, -limit
        return "pass" if high <= limit else "fail" if low > limit else "inconclusive"

    def verdict(
        self, change: float, ends: tuple[float, float] | None, value: float, before: float | None, samples: int, noun: str = ""
    ) -> VerdictFile:
        """With the number of samples that would decide, where it is inconclusive: an interval narrows by the root of it."""
        low, high = ends or (change, change)
        outcome, needed = self.outcome(low, high), None
        if outcome == "inconclusive" and change != self.limit:
            needed = math.ceil(samples * ((high - low) / 2 / abs(change - self.limit)) ** 2)
        return VerdictFile(
            outcome=outcome, metric=self.metric, limit_name=self.limit_name, limit=self.limit, value=value, source_value=before,
            change=change, low=ends and low, high=ends and high, confidence=self.confidence, samples=samples, noun=noun, needed=needed,
        )  # fmt: skip


@dataclass(frozen=True)
class Samples:
    """Figures by document or item id: the metric is `finish(sum of totals / sum of weights)`."""

    totals: dict[str, tuple[float, float]]
    finish: Callable[[torch.Tensor], torch.Tensor]
    noun: str

    def columns(self, ids: list[str]) -> torch.Tensor:
        """[samples, 2] of total and weight."""
        return torch.tensor([self.totals[name] for name in ids], dtype=torch.float64)


def read_samples(folder: Path, metric: str) -> Samples | None:
    """None where the report holds the metric as one number. ValueError where it does not hold it at all."""
    if "/" in metric:
        task, _, name = metric.partition("/")
        tasks = _json(folder / TASKS).get("tasks", {})
        items = tasks.get(task, {}).get("items", [])
        if not items or name not in items[0]:
            held = [f"{known}/{each}" for known, content in tasks.items() for each in content.get("metrics", {})]
            raise ValueError(f"metric: the report holds no {metric}; it holds: {', '.join(held) or 'no task'}")
        return Samples({str(item["id"]): (float(item[name]), 1.0) for item in items}, torch.clone, "items")
    if metric not in COLUMNS:
        return None
    total, weight, finish = COLUMNS[metric]
    rows = _json(folder / REPORT).get("documents", [])
    if not rows or rows[0].get(total) is None:
        raise ValueError(f"metric: the report holds no {metric}, which is measured against a reference model")
    return Samples({str(row["id"]): (float(row[total]), float(row[weight])) for row in rows}, finish, "documents")


def judge(rule: Rule, report: Path, source: Path | None, resamples: int, seed: int) -> VerdictFile:
    """The verdict on the report in folder `report`, beside the source model's in `source`. ValueError: it cannot be told, and why."""
    mine = read_samples(report, rule.metric)
    if mine is None:
        return _of_one_number(rule, report, source)
    ids = list(mine.totals)
    columns = mine.columns(ids)
    if source is not None:
        other = read_samples(source, rule.metric)
        if other is None or other.totals.keys() != mine.totals.keys():
            raise ValueError(f"metric: the source model's {rule.metric} is of other {mine.noun}, so that the two cannot be paired")
        columns = torch.cat([columns, other.columns(ids)], dim=1)
    if len(ids) < 2:
        raise ValueError(f"metric: {rule.metric} has {len(ids)} of {mine.noun}; an interval needs two or more")

    def values(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return mine.finish(sums[:, 0] / sums[:, 1]), mine.finish(sums[:, 2] / sums[:, 3]) if source is not None else None

    value, before = values(columns.sum(0, keepdim=True))
    drawn = rule.change(*values(resampled_sums(columns, resamples, seed)))
    tail = (1 - rule.confidence) / 2
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    change = rule.change(value, before).item()
    return rule.verdict(change, (low, high), value.item(), None if before is None else before.item(), len(ids), mine.noun)


def _of_one_number(rule: Rule, report: Path, source: Path | None) -> VerdictFile:
    value = _metric(report, rule.metric)
    before = None if source is None else _metric(source, rule.metric)
    tensors = [None if number is None else torch.tensor([number], dtype=torch.float64) for number in (value, before)]
    assert tensors[0] is not None
    return rule.verdict(rule.change(tensors[0], tensors[1]).item(), None, value, before, samples=1)


def _metric(folder: Path, metric: str) -> float:
    held: dict[str, float] = _json(folder / REPORT).get("metrics", {})
    if metric not in held:
        raise ValueError(f"metric: the report holds no {metric}; it holds: {', '.join(sorted(held)) or 'none'}")
    return float(held[metric])


def _json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"metric: {file.parent.name} holds no {file.name}, so this gate's metric was not measured there") from None
    return content
