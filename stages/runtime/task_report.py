"""From the harness' samples to `tasks.json`: every metric with its standard error, every item with an id that two reports share."""

import json
import math
import random
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from lm_eval.api.metrics import mean

BOOTSTRAP = 200  # resamples where a metric is no mean: its standard error is then known to 5 %
TASKS_FILE = "tasks.json"

Metrics = dict[str, dict[str, Any]]  # name -> {"value", "stderr", "higher_is_better"}


def metric_name(metric: str, filter_name: str) -> str:
    """`acc`; `exact_match.strict-match` where a task reads the answers through several filters."""
    return metric if filter_name == "none" else f"{metric}.{filter_name}"


def task_result(task: Any, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entry of one task in tasks.json. ValueError where a metric is nan or infinite."""
    values: dict[tuple[str, str], list[Any]] = {}
    items: dict[int, dict[str, Any]] = {}
    ids = item_ids(samples)
    for sample in samples:
        item = items.setdefault(sample["doc_id"], {"id": ids[sample["doc_id"]]})
        for metric in sample["metrics"]:
            values.setdefault((metric, sample["filter"]), []).append(sample[metric])
            if isinstance(sample[metric], Real):  # others, such as (log-likelihood, bytes), mean something only together
                item[metric_name(metric, sample["filter"])] = float(sample[metric])
    metrics = {}
    for (metric, filter_name), scores in values.items():
        aggregate, name = task.aggregation().get(metric, mean), metric_name(metric, filter_name)
        value = float(aggregate(scores))
        if not math.isfinite(value):
            raise ValueError(f"task {task.config.task}: {name} is nan or infinite; the model's weights are damaged")
        higher = task.higher_is_better().get(metric)
        metrics[name] = {"value": value, "stderr": standard_error(aggregate, scores), "higher_is_better": higher}
    version, shots = task.VERSION, int(task.config.num_fewshot or 0)
    return {"metrics": metrics, "n_shot": shots, "version": version, "items": list(items.values())}


def standard_error(aggregate: Callable[[Sequence[Any]], float], scores: Sequence[Any]) -> float | None:
    """Of `aggregate(scores)`, by items: s / sqrt(n) of a mean, which for answers right or wrong is sqrt(p (1 - p) / (n - 1)).

    Of anything else the bootstrap (Efron, 1979). None for a single item, which says nothing of its spread.
    """
    if len(scores) < 2:
        return None
    if aggregate is mean:
        return statistics.stdev(map(float, scores)) / math.sqrt(len(scores))
    generator = random.Random(0)
    return statistics.stdev(float(aggregate(generator.choices(scores, k=len(scores)))) for _ in range(BOOTSTRAP))


def item_ids(samples: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """By doc_id: the document's own `id` where every document has one of its own, else the start of its content's sha256.

    A document that occurs twice is told apart by its number among its equals: `1f3a...`, `1f3a...#2`.
    """
    documents = {sample["doc_id"]: sample for sample in samples}
    own = {n: sample["doc"].get("id") for n, sample in documents.items()}
    if all(isinstance(name, str | int) for name in own.values()) and len(set(own.values())) == len(own):
        return {n: str(name) for n, name in own.items()}
    seen: Counter[str] = Counter()
    ids = {}
    for n, sample in documents.items():
        digest = sample["doc_hash"][:16]
        seen[digest] += 1
        ids[n] = digest if seen[digest] == 1 else f"{digest}#{seen[digest]}"
    return ids


def group_results(groups: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Metrics]:
    """Metrics of each group that adds up its tasks' own, by the harness' rule for value and standard error."""
    scores = {name: _as_the_harness_writes(result) for name, result in tasks.items()}
    higher = {metric: entry["higher_is_better"] for result in tasks.values() for metric, entry in result["metrics"].items()}
    return {name: _group_metrics(group.aggregate(scores), higher) for name, group in groups.items() if group.has_aggregation}


def _as_the_harness_writes(result: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"sample_len": len(result["items"])}
    for name, entry in result["metrics"].items():
        metric, _, filter_name = name.partition(".")
        found[f"{metric},{filter_name or 'none'}"] = entry["value"]
        found[f"{metric}_stderr,{filter_name or 'none'}"] = entry["stderr"]
    return found


def _group_metrics(found: Mapping[str, Any], higher: Mapping[str, bool | None]) -> Metrics:
    metrics: Metrics = {}
    for key, value in found.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr, name = found.get(f"{metric}_stderr,{filter_name}"), metric_name(metric, filter_name)
            known = float(stderr) if isinstance(stderr, Real) else None  # the harness says "N/A"
            metrics[name] = {"value": float(value), "stderr": known, "higher_is_better": higher.get(name)}
    return metrics


def flat_metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """`task/metric`, and `task/metric_stderr` where it is known."""
    flat = {}
    for task, result in results.items():
        for metric, entry in result["metrics"].items():
            flat[f"{task}/{metric}"] = entry["value"]
            if entry["stderr"] is not None:
                flat[f"{task}/{metric}_stderr"] = entry["stderr"]
    return flat


def write_tasks(folder: Path, tasks: Mapping[str, Any], groups: Mapping[str, Metrics]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"tasks": tasks, "groups": {name: {"metrics": metrics} for name, metrics in groups.items()}}
    (folder / TASKS_FILE).write_text(json.dumps(content, indent=1, allow_nan=False, default=str) + "\n", encoding="utf-8")


def write_samples(folder: Path, task: str, samples: Sequence[Mapping[str, Any]]) -> None:
    """`samples_<task>.jsonl`: what the model was asked and what it said, one line for each item and filter."""
    ids = item_ids(samples)
    with open(folder / f"samples_{re.sub(r'[^A-Za-z0-9_.-]', '_', task)}.jsonl", "w", encoding="utf-8") as stream:
        for sample in samples:
            asked = sample["arguments"]
            row = {
                "id": ids[sample["doc_id"]],
                "filter": sample["filter"],
                "prompt": asked[0][0],
                "continuations": [arguments[1] for arguments in asked if len(arguments) > 1 and isinstance(arguments[1], str)],
                "target": sample["target"],
                "responses": sample["filtered_resps"],
                "metrics": {metric: sample[metric] for metric in sample["metrics"]},
            }
            stream.write(json.dumps(row, default=str) + "\n")
