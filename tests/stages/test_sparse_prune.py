"""Sparse checkpoints: exactly as sparse as planned, calibrated on the pruned layers before, and sparse after whatever follows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from pipeline.artifact import Artifact, Checkpoint, Dataset, DenseCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.headers import CheckpointFileError
from pipeline.layout import Sparsity
from pipeline.spec import ModelSpec
from pipeline.stage import Context, Stage, find_stage
from pipeline.target import Target
from stages.functional.sparsity import add_products, inverse_factor, sparsegpt
from stages.runtime.guard import check_checkpoint
from stages.runtime.sparsity import four_zeros, sparse_weights
from stages.runtime.tensors import TensorReader, copy_companions
from stages.runtime.text import calibration_windows, load_tokenizer
from stages.sparse_prune import SparsePrune
from tests.stages.models import make_checkpoint, save_tensors, write_documents

pytestmark = pytest.mark.usefixtures("bf16_units")  # what is planned is planned for a processor that has them

WINDOWS = {"num_samples": 6, "max_length": 32}
TWO_OF_FOUR = Sparsity(share=0.5, pattern="2:4")
Events = list[dict[str, Any]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DenseCheckpoint:
    return as_checkpoint(make_checkpoint(tmp_path_factory.mktemp("source"), num_hidden_layers=2))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = write_documents(tmp_path_factory.mktemp("data") / "text.jsonl")
    return Dataset(path, DatasetSpec(split="text", digest="d1", nbytes=path.stat().st_size))


@pytest.fixture(scope="module")
def sparse(source: DenseCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> DenseCheckpoint:
    """2:4 by magnitude."""
    made: DenseCheckpoint
    made, _ = run("sparse_prune", tmp_path_factory.mktemp("sparse"), {"model": source}, method="magnitude", pattern="2:4")
    return made


def as_checkpoint(folder: Path) -> DenseCheckpoint:
    return DenseCheckpoint(folder, ModelSpec.from_config(json.loads((folder / "config.json").read_text())))


def run(name: str, folder: Path, inputs: dict[str, Artifact], **params: Any) -> tuple[Any, Events]:
    """A stage's only artifact, or its `model`, with the spec that was planned, once it has proven to be that."""
    stage: Stage = find_stage(name).from_dict(params)
    inferred, events = stage.infer(**{port: artifact.spec for port, artifact in inputs.items()}), Events()
    folder.mkdir(exist_ok=True)
    made = stage.run(Context(folder, events.append), **inputs)
    artifact, spec = (made, inferred) if isinstance(made, Checkpoint) else (made.model, inferred.model)
    measured = check_checkpoint(artifact.path, spec)
    assert ("sparsity" in measured) == (spec.sparsity is not None)
    return type(artifact)(artifact.path, spec, metrics=measured), events


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """As a reader sees them, by module."""
    return dict(sparse_weights(TensorReader(checkpoint.path), checkpoint.model_spec))


def share_two_of_four(checkpoint: Checkpoint) -> float:
    fours = torch.cat([four_zeros(weight).flatten() for weight in weights(checkpoint).values()])
    return float((fours >= 2).float().mean())


def notes(events: Events) -> list[str]:
    return [event["text"] for event in events if event["event"] == "note"]


# ---- What is pruned


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("params", [{"sparsity": 0.5}, {"sparsity": 0.3}, {"pattern": "2:4"}], ids=str)
def test_the_decoders_linear_layers_are_as_sparse_as_planned_and_nothing_else_changes(
    source: DenseCheckpoint, text: Dataset, tmp_path: Path, method: str, params: dict[str, Any]
) -> None:
    calibration = {} if method == "magnitude" else {"calibration": text}
    made, events = run(
        "sparse_prune", tmp_path / "made", {"model": source, **calibration}, method=method, **params, **(WINDOWS if calibration else {})
    )
    share = params.get("sparsity", 0.5)
    for name, weight in weights(made).items():
        rows, columns = weight.shape
        assert int((weight == 0).sum()) == rows * int(share * columns + 1e-6), name
    assert made.metrics["sparsity"] == pytest.approx(share, abs=0.02)
    assert (share_two_of_four(made) == 1) == ("pattern" in params)
    before, after = TensorReader(source.path), TensorReader(made.path)
    sparse_names = {f"{name}.weight" for name in weights(made)}
    assert {name for name in before.table if not torch.equal(before.read(name), after.read(name))} == sparse_names
    if method != "sparsegpt":  # what stays is as it was
        assert all(torch.equal(after.read(n)[after.read(n) != 0], before.read(n)[after.read(n) != 0]) for n in sparse_names)
    assert made.config == source.config and events[-1]["done"] == events[-1]["total"]
    AutoModelForCausalLM.from_pretrained(made.path)


def test_each_layer_is_calibrated_on_what_the_pruned_ones_before_it_compute(source: DenseCheckpoint, text: Dataset, tmp_path: Path) -> None:
    """The last layer's weights, from a plain forward of transformers' own model in which the layers before are the pruned ones."""
    made, _ = run("sparse_prune", tmp_path / "made", {"model": source, "calibration": text}, method="sparsegpt", **WINDOWS)
    windows = calibration_windows(text, load_tokenizer(source.path), *WINDOWS.values())
    pruned, dense = TensorReader(made.path), TensorReader(source.path)

    def down_proj_of_the_last_layer(first_layer: TensorReader) -> torch.Tensor:
        model, inputs = AutoModelForCausalLM.from_pretrained(source.path, dtype="auto").eval(), []
        with torch.no_grad():
            for name, parameter in model.model.layers[0].named_parameters():
                parameter.copy_(first_layer.read(f"model.layers.0.{name}"))
            module = model.model.layers[1].mlp.down_proj
            module.register_forward_pre_hook(lambda _, x: inputs.append(x[0].flatten(0, -2)))
            model(windows, use_cache=False)
        factor = inverse_factor(add_products(None, inputs[0]), 0.01)
        return sparsegpt(module.weight.detach(), factor, module.weight.numel() // 2, 128).bfloat16()

    found = pruned.read("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(found, down_proj_of_the_last_layer(pruned))
    assert not torch.equal(found == 0, down_proj_of_the_last_layer(dense) == 0)


def test_the_same_input_gives_the_same_bytes(source: DenseCheckpoint, text: Dataset, tmp_path: Path) -> None:
    contents = []
    for name in ("once", "again"):
        made, _ = run("sparse_prune", tmp_path / name, {"model": source, "calibration": text}, method="wanda", pattern="2:4", **WINDOWS)
        contents.append({file.name: file.read_bytes() for file in made.path.iterdir()})
    assert contents[0] == contents[1]


def test_a_damaged_model_is_not_pruned(source: DenseCheckpoint, text: Dataset, tmp_path: Path) -> None:
    tensors = TensorReader(source.path)
    weights = {name: tensors.read(name) for name in tensors.table}
    weights["model.layers.1.mlp.up_proj.weight"].fill_(torch.nan)
    save_tensors(tmp_path / "damaged", weights)
    copy_companions(source.path, tmp_path / "damaged", source.config)
    damaged = as_checkpoint(tmp_path / "damaged")
    with pytest.raises(ValueError, match="inputs of layer 1 are nan or infinite"):
        run("sparse_prune", tmp_path / "made", {"model": damaged, "calibration": text}, **WINDOWS)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds nan or inf"):
        run("sparse_prune", tmp_path / "made", {"model": damaged}, method="magnitude")


def test_without_dampening_a_hessian_of_too_few_tokens_is_one_sentence(source: DenseCheckpoint, text: Dataset, tmp_path: Path) -> None:
    few = {"num_samples": 1, "max_length": 16, "dampening_frac": 0}
    with pytest.raises(ValueError, match=r"^dampening_frac: the Hessian of model\.layers\.0\.\S+ has no inverse; raise dampening_frac"):
        run("sparse_prune", tmp_path / "made", {"model": source, "calibration": text}, **few)


# ---- Rounds


def test_a_second_round_is_of_what_is_left_and_keeps_the_zeros_of_the_first(source: DenseCheckpoint, text: Dataset, tmp_path: Path) -> None:
    inputs: dict[str, Artifact] = {"model": source, "calibration": text}
    first, _ = run("sparse_prune", tmp_path / "first", inputs, method="wanda", sparsity=0.5, **WINDOWS)
    second, _ = run("sparse_prune", tmp_path / "second", inputs | {"model": first}, method="sparsegpt", sparsity=0.5, **WINDOWS)
    assert second.model_spec.sparsity == Sparsity(share=0.75) and second.metrics["sparsity"] == 0.75
    assert all(bool((weights(second)[name][weight == 0] == 0).all()) for name, weight in weights(first).items())


def test_pruning_a_two_of_four_model_further_leaves_it_two_of_four(sparse: DenseCheckpoint, tmp_path: Path) -> None:
    made, _ = run("sparse_prune", tmp_path / "made", {"model": sparse}, method="magnitude", sparsity=0.25)
    assert made.model_spec.sparsity == Sparsity(share=0.625, pattern="2:4")
    assert share_two_of_four(made) == 1 and made.metrics["sparsity"] == 0.625


def test_magnitude_pruning_lets_a_sparse_source_be_known_and_changes_nothing(sparse: DenseCheckpoint, tmp_path: Path) -> None:
    made, _ = run("sparse_prune", tmp_path / "made", {"model": as_checkpoint(sparse.path)}, method="magnitude", pattern="2:4")
    assert made.model_spec.sparsity == TWO_OF_FOUR
    assert all(torch.equal(weights(made)[name], weight) for name, weight in weights(sparse).items())


# ---- What follows keeps the zeros

AFTER: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {"group_size": 32}),
    "rtn asymmetric": ("rtn", {"group_size": 32, "symmetric": False}),
    "rtn 3 bits asymmetric": ("rtn", {"group_size": 32, "num_bits": 3, "symmetric": False}),
    "gptq": ("gptq", {"group_size": 32, **WINDOWS}),
    "gptq asymmetric": ("gptq", {"group_size": 32, "symmetric": False, "actorder": None, **WINDOWS}),
    "awq": ("awq", {"group_size": 32, "n_grid": 4, **WINDOWS}),
    "awq symmetric": ("awq", {"group_size": 32, "n_grid": 4, "symmetric": True, **WINDOWS}),
    "kv_cache": ("kv_cache", {"mode": "per_token_head"}),
    "layers pruned": ("structured_prune", {"num_layers": 1, **WINDOWS}),
}


@pytest.mark.parametrize("case", AFTER)
def test_all_groups_are_still_two_of_four(sparse: DenseCheckpoint, text: Dataset, tmp_path: Path, case: str) -> None:
    name, params = AFTER[case]
    ports = find_stage(name).from_dict(params).inputs()
    made, _ = run(name, tmp_path / "made", {"model": sparse} | ({"calibration": text} if "calibration" in ports else {}), **params)
    assert made.model_spec.sparsity == TWO_OF_FOUR
    assert share_two_of_four(made) == 1 and made.metrics["sparsity"] >= 0.5
    if name in ("rtn", "gptq", "awq"):
        dense, _ = run("dequantize", tmp_path / "dense", {"model": made})
        assert dense.model_spec.sparsity == TWO_OF_FOUR and share_two_of_four(dense) == 1


def test_gptqs_own_arithmetic_would_break_the_pattern(
    sparse: DenseCheckpoint, text: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above, and of the guard: it is the mask that keeps the zeros, and a loss does not go unsaid."""
    from stages.runtime import masked_gptq
    from stages.runtime.oneshot import GPTQWithReport

    monkeypatch.setattr(masked_gptq, "MaskedGPTQ", GPTQWithReport)
    with pytest.raises(ValueError, match=r"groups of four with fewer than two zeros|zeros, expected 50\.00%.*does not keep zeros"):
        run("gptq", tmp_path / "made", {"model": sparse, "calibration": text}, num_bits=8, group_size=32, **WINDOWS)


def test_distillation_trains_only_what_is_not_zero(source: DenseCheckpoint, sparse: DenseCheckpoint, text: Dataset, tmp_path: Path) -> None:
    params = {"num_samples": 24, "max_length": 24, "global_batch_size": 4, "learning_rate": 2e-3}
    for name, more in (("clipped", {}), ("not clipped", {"max_grad_norm": 0.0, "weight_decay": 0.1})):
        made, _ = run("distill", tmp_path / name, {"student": sparse, "train": text, "teacher": source}, **params, **more)
        assert made.model_spec.sparsity == TWO_OF_FOUR and share_two_of_four(made) == 1
        for module, weight in weights(sparse).items():
            after = weights(made)[module]
            assert torch.equal(after == 0, weight == 0) and not torch.equal(after, weight), module


def test_merged_adapters_keep_the_zeros_and_say_what_that_cost(sparse: DenseCheckpoint, text: Dataset, tmp_path: Path) -> None:
    params = {"num_samples": 8, "max_length": 32, "global_batch_size": 4, "learning_rate": 1e-2}
    tuned, events = run("qlora", tmp_path / "qlora", {"model": sparse, "train": text}, rank=4, **params)
    cost = [note for note in notes(events) if "the model's zeros were kept: they took " in note]
    assert share_two_of_four(tuned) == 1 and len(cost) == 1
    took = float(cost[0].partition("took ")[2].partition("%")[0])
    assert 40 < took < 60, "half of the weights are zero, and the adapter does not know which"
    assert any(not torch.equal(weights(tuned)[name], weight) for name, weight in weights(sparse).items())
    inputs: dict[str, Artifact] = {"student": sparse, "train": text}
    distilled, events = run("distill", tmp_path / "distill", inputs, method="lora", lora={"rank": 4}, alpha=0, **params)
    assert share_two_of_four(distilled) == 1 and any("the model's zeros were kept" in note for note in notes(events))


def test_a_plan_says_where_sparsity_is_lost(sparse: DenseCheckpoint, text: Dataset) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("structured_prune", {"mlp_ratio": 0.4, "round_to": 32, "group_size": 32}, "zeros: columns go one by one"),
        ("gptq", {"backend": "gptqmodel", "group_size": 32, **WINDOWS}, "zeros: gptqmodel corrects them too, so that they are lost"),
    ]
    for name, params, sentence in cases:
        stage = find_stage(name).from_dict(params)
        specs = {port: text.spec if port == "calibration" else sparse.spec for port in stage.inputs()}
        assert stage.infer(**specs).sparsity is None
        assert any(said.startswith(sentence) for said in stage.explain(**specs)), name


def test_a_stage_that_loses_zeros_does_not_go_unsaid(sparse: DenseCheckpoint, tmp_path: Path) -> None:
    tensors = TensorReader(sparse.path)
    broken = "model.layers.1.mlp.up_proj.weight"

    def write(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
        weights = {name: tensors.read(name) for name in tensors.table}
        save_tensors(folder, weights | {broken: change(weights[broken])})
        copy_companions(sparse.path, folder, sparse.config)
        return folder

    def moved(weight: torch.Tensor) -> torch.Tensor:
        """As many zeros, one of them in another group of four."""
        weight = weight.clone()
        zero, other = int((weight[0, :4] == 0).nonzero()[0]), int((weight[0, 4:8] != 0).nonzero()[0])
        weight[0, zero], weight[0, 4 + other] = 1, 0
        return weight

    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj is 0\.00% zeros, expected 50\.00%; the stage that made it does"):
        check_checkpoint(write(tmp_path / "lost", lambda weight: weight + 1), sparse.model_spec)
    moved_folder = write(tmp_path / "moved", moved)
    with pytest.raises(ValueError, match=r"up_proj has 1 groups of four with fewer than two zeros"):
        check_checkpoint(moved_folder, sparse.model_spec)
    unstructured = sparse.model_spec.with_sparsity(Sparsity(share=0.5))
    assert check_checkpoint(moved_folder, unstructured) == {"sparsity": 0.5}
    assert check_checkpoint(moved_folder, sparse.model_spec.with_sparsity(None)) == {}


# ---- Plans and refusals


def test_a_plan_is_honest_about_what_zeros_are_worth(source: DenseCheckpoint) -> None:
    stage = SparsePrune.from_dict({"method": "magnitude", "pattern": "2:4"})
    said = stage.explain(source.spec)
    assert said[0].startswith("sparsity: 50 % zeros, 2:4 in every Linear layer of the decoder")
    assert "dense kernels gain nothing" in said[1] and "0.5625 of their bytes" in said[2]
    assert stage.infer(source.spec).nbytes == source.model_spec.nbytes
    assert len(SparsePrune.from_dict({"method": "magnitude"}).explain(source.spec)) == 2


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"pattern": "2:4", "sparsity": 0.6}, r"^sparsity: 2:4 removes half of the weights, not 0\.6"),
        ({"pattern": "2:4", "block_size": 30}, r"^block_size: .* write 32 in place of 30"),
        ({"method": "magnitude", "num_samples": 5}, r"^num_samples: it has an effect only with method: wanda or sparsegpt"),
        ({"method": "wanda", "dampening_frac": 0.1}, r"^dampening_frac: it has an effect only with method: sparsegpt"),
        ({"method": "magnitude", "sparsity": 0.001}, r"^sparsity: 0\.001 of what is left of a row .* is less than one weight"),
    ],
    ids=str,
)
def test_settings_without_effect_are_refused(source: DenseCheckpoint, text: Dataset, params: dict[str, Any], sentence: str) -> None:
    stage = SparsePrune.from_dict(params)
    with pytest.raises(ValueError, match=sentence):
        stage.infer(source.spec, *([text.spec] if "calibration" in stage.inputs() else []))


def test_a_model_that_cannot_be_two_of_four_is_refused(sparse: DenseCheckpoint, tmp_path: Path) -> None:
    stage = SparsePrune.from_dict({"method": "magnitude", "pattern": "2:4"})
    odd = sparse.model_spec.architecture.model_copy(update={"intermediate_size": 90})
    with pytest.raises(ValueError, match=r"^pattern: 2:4 needs columns in fours, unlike those of model\.layers\.\*\.mlp\.down_proj \(90\)"):
        stage.infer(ModelSpec.of(odd))
    with pytest.raises(ValueError, match=r"^pattern: the model is 2:4 already"):
        stage.infer(sparse.spec)


def test_the_number_that_yaml_makes_of_the_pattern_is_explained() -> None:
    with pytest.raises(ValidationError, match="write it in quotes, '2:4'"):
        SparsePrune.from_dict({"pattern": 124})


def test_a_device_without_use_is_refused(source: DenseCheckpoint) -> None:
    with pytest.raises(ValueError, match=r"^execution\.device: only a calibration computes on it"):
        SparsePrune.from_dict({"method": "magnitude"}, {"device": "cpu"}).infer(source.spec)


def test_files_that_are_not_the_models_are_refused(source: DenseCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for file in source.path.iterdir():
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    config = json.loads((source.path / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"intermediate_size": 112}))
    with pytest.raises((ValueError, CheckpointFileError), match=r"is not the model its config\.json describes"):
        run("sparse_prune", tmp_path / "made", {"model": as_checkpoint(tmp_path / "source")}, method="magnitude")


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_memory_is_that_of_layers_and_not_of_the_model(source: DenseCheckpoint, text: Dataset, method: str) -> None:
    deep = ModelSpec.of(source.model_spec.architecture.model_copy(update={"num_layers": 100}))
    stage = SparsePrune.from_dict({"method": method})
    data = {} if method == "magnitude" else {"calibration": text.spec}
    shallow, deeper = (stage.memory(model, target=Target.host(), **data) for model in (source.model_spec, deep))
    assert shallow.ram == deeper.ram and deeper.disk["checkpoint"] == deep.nbytes
