"""Stored hidden states take the place of forward passes: the report does not change by a byte, and nothing is computed twice."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import PreTrainedModel

from pipeline.artifact import Checkpoint, Dataset, DenseCheckpoint, EvalReport, HiddenStates
from pipeline.artifact_spec import DatasetSpec
from pipeline.headers import CheckpointFileError, read_header
from pipeline.layout import WeightFormat
from pipeline.stage import Context
from pipeline.target import Target
from stages.evaluate import Evaluate
from stages.hidden_states import StoreHiddenStates
from stages.kv_cache import KVCache
from stages.rtn import RTN
from stages.runtime.scoring import CacheBytes, batched
from stages.runtime.states_layout import StatesFile
from stages.runtime.stored_states import StatesWriter, StoredStates
from stages.runtime.text import encode_documents, load_tokenizer
from stages.runtime.windows import batches, cut_windows
from tests.stages.models import make_checkpoint, write_documents

LENGTH, BATCH = 20, 3
LAYERWISE = {"mode": "layerwise", "hidden_states": 4096}  # a few windows at a time


def context(folder: Path) -> Context:
    return Context(folder, lambda event: None)


def evaluated(folder: Path, execution: dict[str, Any] | None = None, **inputs: Any) -> bytes:
    stage = Evaluate.from_dict({"max_length": LENGTH}, {"batch_size": BATCH, "device": "cpu", **(execution or {})})
    made: EvalReport = stage.run(context(folder), **inputs)
    return (made.path / "report.json").read_bytes()


def stored(folder: Path, model: Checkpoint, text: Dataset, execution: dict[str, Any] | None = None, **params: Any) -> HiddenStates:
    stage = StoreHiddenStates.from_dict({"max_length": LENGTH, **params}, {"batch_size": BATCH, "device": "cpu", **(execution or {})})
    return stage.run(context(folder), model, text)


@contextmanager
def counted_forwards() -> Iterator[list[str]]:
    """The transformers models below a head that compute meanwhile, by class, and the decoder layers."""
    made: list[str] = []

    def note(module: torch.nn.Module, *_: Any) -> None:
        name = type(module).__name__
        if name.endswith("DecoderLayer") or (isinstance(module, PreTrainedModel) and name.endswith("Model")):
            made.append(name)

    handle = register_module_forward_hook(note)
    try:
        yield made
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DenseCheckpoint:
    return DenseCheckpoint(make_checkpoint(tmp_path_factory.mktemp("source"), num_hidden_layers=2))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = write_documents(tmp_path_factory.mktemp("data") / "eval.jsonl", count=7)
    return Dataset(path, DatasetSpec(split="eval", digest="00", nbytes=path.stat().st_size))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, source: DenseCheckpoint) -> Checkpoint:
    """Its head too."""
    return RTN.from_dict({"group_size": 32, "ignore": []}).run(context(tmp_path_factory.mktemp("packed")), source)


@pytest.fixture(scope="module", params=["per_token_head", "static"])
def cached(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, packed: Checkpoint, text: Dataset) -> Checkpoint:
    calibration = {"num_samples": 4, "max_length": 32} if request.param == "static" else {}
    return KVCache.from_dict({"mode": request.param, **calibration}).run(context(tmp_path_factory.mktemp("cached")), packed, text)


@pytest.mark.parametrize("execution", [{}, LAYERWISE], ids=["resident", "layerwise"])
class TestReports:
    def test_of_a_packed_model_beside_its_source(
        self, tmp_path: Path, source: DenseCheckpoint, packed: Checkpoint, text: Dataset, execution: dict[str, Any]
    ) -> None:
        models = {"model": packed, "eval": text, "reference": source}
        long = evaluated(tmp_path / "long", execution, **models)
        own, beside = stored(tmp_path / "own", packed, text, execution), stored(tmp_path / "beside", source, text, execution)
        for given in ({"reference_states": beside}, {"states": own}, {"states": own, "reference_states": beside}):
            with counted_forwards() as made:
                assert evaluated(tmp_path / "-".join(given), execution, **models, **given) == long
            assert bool(made) == (len(given) < 2), "nothing computes where everything is stored"

    def test_of_an_int8_cache_beside_the_model_without_it(
        self, tmp_path: Path, source: DenseCheckpoint, packed: Checkpoint, cached: Checkpoint, text: Dataset, execution: dict[str, Any]
    ) -> None:
        models = {"model": cached, "eval": text, "reference": source}
        long = evaluated(tmp_path / "long", execution, **models)
        assert json.loads(long)["metrics"]["kv_cache_kl_divergence"] > 0
        own, plain = stored(tmp_path / "own", cached, text, execution), stored(tmp_path / "plain", packed, text, execution)
        for given in ({"plain_states": plain}, {"states": own}, {"states": own, "plain_states": plain}):
            assert evaluated(tmp_path / "-".join(given), execution, **models, **given) == long


def test_a_tied_head_is_read_too(tmp_path: Path, text: Dataset) -> None:
    model = DenseCheckpoint(make_checkpoint(tmp_path / "model", tie_word_embeddings=True, num_hidden_layers=2))
    states = stored(tmp_path / "states", model, text)
    assert evaluated(tmp_path / "a", model=model, eval=text, states=states) == evaluated(tmp_path / "b", model=model, eval=text)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_layers_and_batches_do_not_change_where_what_is_stored(tmp_path: Path, cached: Checkpoint, text: Dataset, batch_size: int) -> None:
    resident = stored(tmp_path / "resident", cached, text, {"batch_size": batch_size})
    layerwise = stored(tmp_path / "layerwise", cached, text, {"batch_size": batch_size, **LAYERWISE})
    usual = stored(tmp_path / "usual", cached, text)
    files = sorted(file.name for file in resident.path.iterdir())
    assert files == ["states-00001-of-00001.safetensors", "states.json"]
    assert all((resident.path / name).read_bytes() == (layerwise.path / name).read_bytes() for name in files)
    rows = [rows_of(states, text, cached) for states in (resident, usual)]
    assert rows[0].shape == rows[1].shape
    assert torch.allclose(rows[0].float(), rows[1].float(), atol=0.3) and StatesFile.load(resident.path) == StatesFile.load(usual.path)


def rows_of(states: HiddenStates, text: Dataset, model: Checkpoint) -> torch.Tensor:
    """Batch by batch, as they were written."""
    ids = [ids for _, _, ids in encode_documents(text, load_tokenizer(model.path))]
    windows = cut_windows(ids, LENGTH)
    reader = StoredStates(states.path, sum(len(document) - 1 for document in ids), torch.device("cpu"))
    return torch.cat([reader.states(batch) for batch in batched(batches(windows, 4))])


def test_what_is_inferred_is_the_most_that_stands_on_disk(tmp_path: Path, packed: Checkpoint, text: Dataset) -> None:
    states = stored(tmp_path, packed, text)
    spec = StoreHiddenStates().infer(packed.model_spec, text.spec)
    (file,) = tmp_path.glob("*.safetensors")
    (entry,) = read_header(file).values()
    assert (entry.dtype, entry.shape) == (spec.dtype, (int(states.metrics["tokens"]), spec.hidden_size))
    assert spec.nbytes / 4 < entry.nbytes <= spec.nbytes
    some = StoreHiddenStates.from_dict({"max_documents": 2})
    counted = text.spec.model_copy(update={"documents": 7})
    assert some.infer(packed.model_spec, counted).nbytes == pytest.approx(2 / 7 * spec.nbytes, rel=0.01)
    shape = packed.model_spec.architecture.model_copy(update={"vocab_size": 4096})
    wordy = packed.model_spec.model_copy(update={"architecture": shape})
    assert some.infer(wordy, counted).nbytes == pytest.approx(1 / 7 * spec.nbytes, rel=0.01)
    target = Target(name="machine")
    assert some.memory(packed.model_spec, counted, target).totals["disk"] == some.infer(packed.model_spec, counted).nbytes


def test_rows_cross_from_file_to_file(tmp_path: Path) -> None:
    rows = torch.arange(11 * 4, dtype=torch.float32).view(11, 4)
    layout = StatesFile(tokens=11, hidden_size=4, dtype="F32")
    with StatesWriter(tmp_path, layout, shard_bytes=3 * 16) as writer:
        for part in rows.split([2, 5, 4]):
            writer.add(part)
        writer.finish(CacheBytes(7.0, 2.0))
    assert len(list(tmp_path.glob("states-*-of-00004.safetensors"))) == 4
    reader = StoredStates(tmp_path, 11, torch.device("cpu"))
    assert torch.equal(reader.rows(0, 11), rows) and torch.equal(reader.rows(2, 9), rows[2:9])
    assert reader.held == CacheBytes(7.0, 2.0)


def test_states_of_another_text_or_cut_short_are_refused(tmp_path: Path, packed: Checkpoint, text: Dataset) -> None:
    states = stored(tmp_path / "states", packed, text, max_documents=2)
    with pytest.raises(CheckpointFileError, match=r"holds hidden states of \d+ tokens, not of the \d+ of this text"):
        evaluated(tmp_path / "report", model=packed, eval=text, states=states)
    (file,) = states.path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(CheckpointFileError, match="truncated"):
        StoredStates(states.path, 1, torch.device("cpu"))


class TestPasses:
    """What an evaluation says that it computes, for the plan to share."""

    def test_each_view_of_a_model_is_one(self, source: DenseCheckpoint) -> None:
        spec, stage = source.model_spec, Evaluate.from_dict({"max_length": 512, "max_documents": 3}, {"batch_size": 2})
        alone = stage.passes(model=spec, eval=DatasetSpec(split="eval", digest="", nbytes=9))
        assert list(alone) == ["states"]
        assert alone["states"].params == {"compute_dtype": "auto", "max_length": 256, "max_documents": 3}, (
            "the windows are those that the model has room for"
        )
        assert alone["states"].execution["batch_size"] == 2
        both = stage.passes(model=spec.with_cache("static"), eval=DatasetSpec(split="eval", digest="", nbytes=9), reference=spec)
        assert {port: (made.inputs["model"], made.plain) for port, made in both.items()} == {
            "states": ("model", False),
            "plain_states": ("model", True),
            "reference_states": ("reference", False),
        }

    def test_a_head_that_rounds_its_inputs_is_computed_with_its_model(self, source: DenseCheckpoint) -> None:
        spec = source.model_spec.with_format(WeightFormat.of("int-quantized"))
        data = DatasetSpec(split="eval", digest="", nbytes=9)
        assert Evaluate().passes(model=spec, eval=data) == {}
        assert list(Evaluate().passes(model=spec, eval=data, reference=source.model_spec)) == ["reference_states"]
        shorter = source.model_spec.model_copy(
            update={"architecture": source.model_spec.architecture.model_copy(update={"max_position": 16})}
        )
        assert list(Evaluate().passes(model=source.model_spec, eval=data, reference=shorter)) == ["states"], "windows of other lengths"


def test_what_is_stored_needs_neither_weights_nor_forward(source: DenseCheckpoint, text: Dataset) -> None:
    spec, target = source.model_spec, Target(name="machine")
    states = StoreHiddenStates().infer(spec, text.spec)
    inputs: dict[str, Any] = {"model": spec, "eval": text.spec, "reference": spec}
    for execution in ({}, LAYERWISE):
        stage = Evaluate.from_dict({}, execution)
        long, short = stage.memory(target=target, **inputs), stage.memory(target=target, **inputs, reference_states=states)
        assert short.totals["ram"] != long.totals["ram"] and "reference, output embedding" in short.ram
        nothing = stage.memory(target=target, **inputs, states=states, reference_states=states)
        assert not {"reference, dense", "model, dense", "activations of one layer", "the largest decoder layer"} & set(nothing.ram)
        works = [stage.work(**inputs, **given).float32_flops for given in ({}, {"reference_states": states})]
        assert works[0] / 2 < works[1] < works[0]
        assert StoreHiddenStates.from_dict({}, execution).work(spec, text.spec).float32_flops < works[0] / 2
