"""Stored hidden states while recipes run: reports stay the same to the last byte, and whatever happens to the states, a run goes on."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import PreTrainedModel

from pipeline.artifact import Artifact, EvalReport
from pipeline.collect import collect
from pipeline.executor import NodeResult, execute
from pipeline.graph import Ref
from pipeline.plan import Plan, make_plan
from pipeline.plan_table import plan_json
from pipeline.process import ForkServer
from pipeline.recipe import read_config
from pipeline.report import build_report
from pipeline.report_table import table_of
from pipeline.run_record import RunRecord
from pipeline.stage import Context
from pipeline.store import Store
from tests.pipeline.rehearsal import small_model
from tests.pipeline.test_shared_passes import CACHED
from tests.stages.models import write_documents

LENGTH, BATCH = 20, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


class Lab:
    """A store, a recipe of four evaluations in it, and a way to run it."""

    def __init__(self, folder: Path, model: Path, server: ForkServer) -> None:
        self.folder, self.model, self.server = folder, model, server
        folder.mkdir(exist_ok=True)
        self.store = Store(folder / "outputs")
        self.text = write_documents(folder / "eval.jsonl", count=5)
        self.events: list[dict[str, Any]] = []

    def plan(self, mode: str = "resident", **quantize: Any) -> Plan:
        evaluate = {"stage": "evaluate", "max_length": LENGTH, "execution": {"mode": mode, "batch_size": BATCH}}
        config = {
            "order": CACHED,
            "stages": {
                "quantize": {"stage": "rtn", "group_size": 64, **quantize},
                "kv_cache": {"stage": "kv_cache"},
                "evaluate": evaluate,
            },
            "model": {"path": str(self.model)},
            "data": {"splits": {"eval": str(self.text)}},
            "target": {"name": "host"},
        }
        return make_plan(read_config(config, "lab")[0], self.store, self.folder, execute=True)

    def run(self, plan: Plan | None = None) -> dict[str, NodeResult]:
        self.events.clear()
        chosen = plan or self.plan()
        record = RunRecord(self.folder / "run")
        results = execute(chosen, self.store, self.folder / "run", [self.events.append, record], self.server)
        self.report = build_report(chosen, record)
        return {result.node.name: result for result in results}

    def notes(self, node: str) -> list[str]:
        return [event["text"] for event in self.events if event["event"] == "note" and event.get("node") == node]


@pytest.fixture
def lab(tmp_path: Path, model: Path, fork_server: ForkServer) -> Lab:
    return Lab(tmp_path, model, fork_server)


def the_long_way(plan: Plan) -> Plan:
    return replace(plan, nodes=tuple(replace(node, derived={}) for node in plan.nodes if not node.is_derived))


def reports(results: dict[str, NodeResult]) -> dict[str, bytes]:
    return {name: (result.path / "report.json").read_bytes() for name, result in results.items() if name.startswith("evaluate")}


def damage(file: Path, content: bytes) -> None:
    os.chmod(file.parent, 0o755)
    os.chmod(file, 0o644)
    file.write_bytes(content)


@pytest.mark.parametrize("mode", ["resident", "layerwise"])
def test_reports_are_those_of_the_long_way(lab: Lab, model: Path, tmp_path: Path, mode: str) -> None:
    short = lab.run(lab.plan(mode))
    assert {name for name, result in short.items() if result.status == "ran"} == {
        "hidden_states@source", "evaluate@source", "quantize", "hidden_states@quantize", "evaluate", "kv_cache", "evaluate@2",
    }  # fmt: skip
    beside = Lab(tmp_path / "long", model, lab.server)
    long = beside.run(the_long_way(beside.plan(mode)))
    assert len(long) == len(short) - 2 and reports(long) == reports(short)
    manifests = [results["evaluate@2"].manifest for results in (short, long)]
    assert manifests[0].read.keys() == manifests[1].read.keys() == {"model", "reference", "eval"}
    assert manifests[0].key == manifests[1].key and manifests[0].inputs == manifests[1].inputs

    again = lab.run(lab.plan(mode))
    assert {result.status for result in again.values()} == {"hit"} and len(again) == len(long)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Windows of each call of a decoder meanwhile."""
    calls: list[int] = []

    def note(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, PreTrainedModel) and type(module).__name__ == "LlamaModel":
            calls.append(len(output.last_hidden_state))

    handle = register_module_forward_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


def test_a_decoder_reads_the_text_as_often_as_there_are_distinct_passes(lab: Lab) -> None:
    """Every stage run in this process, where calls can be seen; the source, the quantized model, and that with its INT8 cache."""
    for plan, expected in ((lab.plan(), 3), (the_long_way(lab.plan()), 6)):
        made: dict[Ref, Artifact] = dict(plan.sources)
        windows = 0
        for node in plan.nodes:
            output = lab.folder / str(expected) / node.name
            output.mkdir(parents=True)
            inputs = {port: made[ref] for port, ref in (*node.inputs.items(), *node.derived.items())}
            with counted() as calls:
                result = node.stage.run(Context(output, lambda event: None), **inputs)
            made[Ref(node.name, next(iter(node.types)))] = result
            windows += sum(calls) if node.stage.name in ("evaluate", "hidden_states") else 0
            if isinstance(result, EvalReport):
                documents = json.loads((output / "report.json").read_text())["documents"]
        text = sum(-(-document["tokens"] // (LENGTH - 1)) for document in documents)
        assert windows == expected * text


def test_what_was_collected_is_missed_only_where_something_is_to_be_computed(lab: Lab) -> None:
    plan = lab.plan()
    runs = lab.store.root / "runs" / "lab" / plan.digest[:12]
    runs.mkdir(parents=True)
    (runs / "plan.json").write_text(json.dumps(plan_json(plan)))
    first = lab.run(plan)
    before = reports(first)
    removed = collect(lab.store).removed
    assert sorted(folder.name.rpartition("-")[0] for folder in removed) == ["hidden_states", "hidden_states"]
    assert {result.status for result in lab.run().values()} == {"hit"} and not list(lab.store.root.glob("store/hidden_states-*"))

    shutil.rmtree(first["evaluate@2"].path)
    again = lab.run()
    assert {name for name, result in again.items() if result.status == "ran"} == {
        "hidden_states@source", "hidden_states@quantize", "evaluate@2",
    }  # fmt: skip
    assert reports(again) == before


@pytest.mark.parametrize("kind", ["content", "size", "manifest"])
def test_damaged_states_are_computed_again_and_the_run_says_so(lab: Lab, kind: str) -> None:
    first = lab.run()
    before, place = reports(first), first["hidden_states@source"].path
    shutil.rmtree(first["evaluate"].path)
    (file,) = place.glob("states-*.safetensors")
    good = file.read_bytes()
    if kind == "content":
        damage(file, good[:-1] + bytes([good[-1] ^ 1]))
    elif kind == "size":
        damage(file, good[:-2])
    else:
        damage(place / "artifact.json", b"{")
    again = lab.run()
    assert {name for name, result in again.items() if result.status == "ran"} == {"hidden_states@source", "evaluate"}
    (note,) = lab.notes("hidden_states@source")
    told = {"content": "is not what was stored", "size": "bytes instead of", "manifest": "artifact.json is not that of the key"}
    assert note.startswith("computed again, because what the store held is damaged: ") and told[kind] in note
    assert note in again["hidden_states@source"].manifest.notes and file.read_bytes() == good
    assert reports(again) == before


def test_states_of_a_model_that_was_rebuilt_otherwise_are_not_its(lab: Lab) -> None:
    """As results of GPUs differ: the key is the same, the bytes are not."""
    first = lab.run()
    shutil.rmtree(first["evaluate"].path)
    packed = first["quantize"].path
    record = json.loads((packed / "artifact.json").read_text())
    record["files"]["model.safetensors"]["sha256"] = "f" * 64
    damage(packed / "artifact.json", json.dumps(record).encode())
    again = lab.run()
    ran = {name for name, result in again.items() if result.status == "ran"}
    assert {"hidden_states@quantize", "evaluate"} <= ran and again["hidden_states@source"].status == "hit"


def test_an_evaluation_that_changed_takes_the_states_that_are_there(lab: Lab) -> None:
    lab.run()
    changed = lab.run(lab.plan(num_bits=3))
    assert {name: result.status for name, result in changed.items()} == {
        "evaluate@source": "hit", "quantize": "ran", "hidden_states@source": "hit", "hidden_states@quantize": "ran", "evaluate": "ran",
        "kv_cache": "ran", "evaluate@2": "ran",
    }  # fmt: skip


def test_the_table_counts_them_as_evaluation(lab: Lab) -> None:
    lab.run()
    columns, lines = table_of(lab.report)
    rows = {row[0]: dict(zip(columns, row, strict=True)) for row in lines}
    assert list(rows) == ["source", "quantize", "kv_cache", "evaluation"]
    measured = [stage for stage in lab.report.stages if stage.type in ("EvalReport", "HiddenStates") and stage.name != "evaluate@source"]
    assert len(measured) == 4
    assert float(rows["evaluation"]["time"].split()[0]) == pytest.approx(sum(stage.seconds or 0 for stage in measured), abs=0.11)
