"""How to serve a model, engine by engine: `serving.yaml` beside it, and the lines that a report ends with.

Which engine takes it, with which flags and remarks, is said by the rules that `mode=check` asks too (pipeline/engines/*.yaml), of the
spec instead of the files. An INT8 cache is a setting of the server, not of the checkpoint: no mainstream server loads calibrated INT8
scales, and all of these find their scales by themselves.
"""

from collections.abc import Mapping
from pathlib import Path

import yaml

from pipeline.engine_contract import Answer, answers, model_place
from pipeline.engine_facts import spec_facts
from pipeline.engine_rules import engines
from pipeline.layout import Frozen, WeightFormat
from pipeline.spec import ModelSpec

SERVING_FILE = "serving.yaml"
MODEL = "{model}"  # stands in a line for the model's folder


class ServingLine(Frozen):
    """One engine's command, with `{model}` for the folder."""

    engine: str
    command: str
    note: str = ""


def packed_format(spec: ModelSpec) -> WeightFormat:
    """That of the linear weights; dense where all are."""
    return next((group.format for group in spec.linear_groups if not group.format.is_dense), WeightFormat())


def serving_lines(spec: ModelSpec) -> tuple[ServingLine, ...]:
    """Of the engines that answer requests and load it."""
    facts = spec_facts(spec)
    servers = {engine.name for engine in engines() if engine.server}
    found = answers(facts, model_place(MODEL, facts), template=True)
    return tuple(_line(answer) for answer in found if answer.loads and answer.engine in servers)


def _line(found: Answer) -> ServingLine:
    return ServingLine(engine=found.engine, command=found.command, note="; ".join(remark.says for remark in found.remarks))


def serving_yaml(spec: ModelSpec, model: str, metrics: Mapping[str, float]) -> str:
    """The file's content. `metrics` are those of the model's quality report, where there is one."""
    mode = spec.kv_cache.mode
    measured = {name: metrics[name] for name in ("kv_cache_perplexity_change_pct", "kv_cache_kl_divergence") if name in metrics}
    content = {
        "model": model,
        "engines": {line.engine: _engine(line, model) for line in serving_lines(spec)},
        "kv_cache": {
            "num_bits": spec.kv_cache.num_bits,
            **({"mode": mode} if mode else {}),
            "bytes_per_token": spec.kv_cache.bytes_per_token,
            **({"measured": measured} if measured else {}),
        },
    }
    return yaml.safe_dump(content, sort_keys=False, width=1000)


def _engine(line: ServingLine, model: str) -> dict[str, str]:
    return {"command": line.command.format(model=model), **({"note": line.note} if line.note else {})}


def write_serving(folder: Path, spec: ModelSpec, model: str, metrics: Mapping[str, float]) -> None:
    (folder / SERVING_FILE).write_text(serving_yaml(spec, model, metrics), encoding="utf-8")
