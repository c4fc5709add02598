"""What a run says of tasks: scores with their standard errors beside the source model's, and the answers that compression flipped.

A score may stay while answers change under it: as many items turn right as turn wrong. So the items of a model's report and those of
the source model's (the twin node's) are paired by id, and flips counted both ways (Dutta et al., 2024,
https://arxiv.org/abs/2407.09141). A few are shown with prompt and answers, from `samples_<task>.jsonl`. Formats: stages/lm_eval.py.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from pipeline.findings import twin
from pipeline.graph import worked_on
from pipeline.layout import Frozen
from pipeline.plan import Plan, PlannedNode

TASKS_FILE = "tasks.json"
EXAMPLES = 3  # of each task
PROMPT_WIDTH, ANSWER_WIDTH = 700, 400  # characters that are kept of a prompt's end, and of an answer's beginning
CHOICE_METRIC = "acc"  # where a task gives choices, this one says that the likeliest is the answer; others weigh them otherwise


class TaskMetric(Frozen):
    """`flips_*` count the paired items whose answer changed; None where the metric is not right or wrong, or there is no twin."""

    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    source_value: float | None
    source_stderr: float | None
    flips_to_wrong: int | None
    flips_to_right: int | None


class FlipExample(Frozen):
    """One item that flipped, long texts cut. An answer is None where the samples do not say which it was."""

    id: str
    metric: str
    became: Literal["wrong", "right"]
    prompt: str  # its end
    target: str
    source_answer: str | None
    answer: str | None


class TaskReport(Frozen):
    """One task, or group of tasks, of one model."""

    task: str
    node: str
    measures: str  # the output that answered, such as `quantize.model`
    items: int | None  # None of a group
    n_shot: int | None
    unpaired: int  # items that only one of the two reports holds: they count as no flip
    metrics: tuple[TaskMetric, ...]
    examples: tuple[FlipExample, ...]


class _Score(BaseModel):
    value: float
    stderr: float | None = None
    higher_is_better: bool | None = None


class _Task(BaseModel):
    metrics: dict[str, _Score]
    n_shot: int | None = None
    items: list[dict[str, Any]] | None = None  # None of a group

    def outcomes(self, metric: str) -> dict[str, float]:
        return {str(item["id"]): float(item[metric]) for item in self.items or () if metric in item}


class _Tasks(BaseModel):
    tasks: dict[str, _Task]
    groups: dict[str, _Task] = {}

    def all(self) -> dict[str, _Task]:
        return self.groups | self.tasks


def task_reports(plan: Plan, finished: Mapping[str, Path], warnings: list[str]) -> tuple[TaskReport, ...]:
    """Of every node that asked tasks, in order; twins stand beside what they are the twins of. `finished`: as for `gate_reports`.

    A report that cannot be read is left out with a warning: it was made by a stage of somebody else's.
    """
    twins = {node.name: twin(plan, node) for node in plan.nodes}
    beside = {other.name for other in twins.values() if other is not None}
    found: list[TaskReport] = []
    for node in plan.nodes:
        folder = finished.get(node.name)
        if folder is None or node.name in beside or not (folder / TASKS_FILE).exists():
            continue
        other = twins[node.name]
        try:
            found += _of_node(node, folder, finished.get(other.name) if other else None)
        except (KeyError, TypeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            warnings.append(f"the answers of {node.name} cannot be told: {folder / TASKS_FILE} is not as expected ({reason})")
    return tuple(found)


def task_metrics(reports: Sequence[TaskReport], measured: str) -> dict[str, float]:
    """Flat figures of one model: `next_line/acc`, `next_line/acc_stderr`, `next_line/acc_flips_to_wrong`, `..._to_right`."""
    flat: dict[str, float] = {}
    for report in reports:
        for score in report.metrics if report.measures == measured else ():
            name = f"{report.task}/{score.metric}"
            figures = {"": score.value, "_stderr": score.stderr, "_flips_to_wrong": score.flips_to_wrong}
            figures["_flips_to_right"] = score.flips_to_right
            flat |= {f"{name}{suffix}": float(value) for suffix, value in figures.items() if value is not None}
    return flat


def _of_node(node: PlannedNode, folder: Path, source: Path | None) -> Iterator[TaskReport]:
    mine, theirs = _read(folder), _read(source) if source else _Tasks(tasks={})
    for name, task in mine.all().items():
        other = theirs.all().get(name)
        pairs = {metric: _pairs(task, other, metric) for metric in task.metrics}
        flipping = next((metric for metric, pair in pairs.items() if pair and any(a != b for a, b in pair.values())), None)
        yield TaskReport(
            task=name,
            node=node.name,
            measures=str(worked_on(node.inputs)),
            items=None if task.items is None else len(task.items),
            n_shot=task.n_shot,
            unpaired=len(_ids(task) ^ _ids(other)) if other else 0,
            metrics=tuple(_metric(metric, score, other, pairs[metric]) for metric, score in task.metrics.items()),
            examples=tuple(_examples(name, flipping, pairs[flipping] or {}, folder, source)) if flipping and source else (),
        )


def _read(folder: Path) -> _Tasks:
    return _Tasks.model_validate_json((folder / TASKS_FILE).read_bytes())


def _ids(task: _Task) -> set[str]:
    return {str(item["id"]) for item in task.items or ()}


def _pairs(task: _Task, other: _Task | None, metric: str) -> dict[str, tuple[float, float]] | None:
    """(source's, model's) outcome of each item that both have; None where there is none, or an outcome is not 0 or 1."""
    after, before = task.outcomes(metric), other.outcomes(metric) if other else {}
    pairs = {name: (before[name], value) for name, value in after.items() if name in before}
    return pairs if pairs and all(value in (0.0, 1.0) for pair in pairs.values() for value in pair) else None


def _metric(metric: str, score: _Score, other: _Task | None, pairs: Mapping[str, tuple[float, float]] | None) -> TaskMetric:
    source = other.metrics.get(metric) if other else None
    return TaskMetric(
        metric=metric,
        value=score.value,
        stderr=score.stderr,
        higher_is_better=score.higher_is_better,
        source_value=source.value if source else None,
        source_stderr=source.stderr if source else None,
        flips_to_wrong=None if pairs is None else sum(pair == (1.0, 0.0) for pair in pairs.values()),
        flips_to_right=None if pairs is None else sum(pair == (0.0, 1.0) for pair in pairs.values()),
    )


def _examples(task: str, metric: str, pairs: Mapping[str, tuple[float, float]], folder: Path, source: Path) -> Iterator[FlipExample]:
    """Answers that turned wrong go first."""
    flipped = [name for name, pair in pairs.items() if pair == (1.0, 0.0)] + [name for name, pair in pairs.items() if pair == (0.0, 1.0)]
    shown, reader = flipped[:EXAMPLES], metric.partition(".")[2] or "none"
    asked, asked_source = (_samples(place, task, reader, set(shown)) for place in (folder, source))
    for name in shown:
        if name in asked and name in asked_source:
            row = asked[name]
            yield FlipExample(
                id=name,
                metric=metric,
                became="wrong" if pairs[name][0] else "right",
                prompt=_end(str(row["prompt"])),
                target=_start(_target(row)),
                source_answer=_answer(asked_source[name], metric),
                answer=_answer(row, metric),
            )


def _samples(folder: Path, task: str, reader: str, names: set[str]) -> dict[str, dict[str, Any]]:
    """The rows of these items, by id, of one filter. Empty where the stage kept no samples."""
    file, found = folder / f"samples_{re.sub(r'[^A-Za-z0-9_.-]', '_', task)}.jsonl", dict[str, dict[str, Any]]()
    if not file.exists():
        return found
    with open(file, encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            if row["id"] in names and row["filter"] == reader:
                found[row["id"]] = row
                if len(found) == len(names):
                    break
    return found


def _target(row: Mapping[str, Any]) -> str:
    """The text of the right choice where there are choices, which the target numbers."""
    target, choices = row["target"], row["continuations"]
    numbered = isinstance(target, int) and len(choices) > 1 and 0 <= target < len(choices)
    return str(choices[target] if numbered else target)


def _answer(row: Mapping[str, Any], metric: str) -> str | None:
    """What a model wrote; of several choices, each with its log-likelihood, the likeliest."""
    responses, choices = row["responses"], row["continuations"]
    if responses and isinstance(responses[0], str):
        return _start(responses[0])
    if metric == CHOICE_METRIC and len(responses) == len(choices) > 1:
        likelihoods = [float(response[0]) for response in responses]
        return _start(str(choices[likelihoods.index(max(likelihoods))]))
    return None


def _end(text: str) -> str:
    return _printable(text if len(text) <= PROMPT_WIDTH else "..." + text[-PROMPT_WIDTH:])


def _start(text: str) -> str:
    return _printable(text if len(text) <= ANSWER_WIDTH else text[:ANSWER_WIDTH] + "...")


def _printable(text: str) -> str:
    """A model may write half a surrogate pair, which UTF-8 has no form for."""
    return text.encode("utf-8", "replace").decode()
