"""Every registered stage: what `infer` promised is what stands on disk, tensor by tensor, over unlike architectures."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from pipeline.artifact import MEASUREMENTS, Artifact, Checkpoint, Dataset, DenseCheckpoint, Export, QuantizedCheckpoint, Sensitivity
from pipeline.artifact_spec import DatasetSpec
from pipeline.gguf_file import read_gguf
from pipeline.headers import read_header, tensor_table
from pipeline.spec import ModelSpec
from pipeline.stage import Context, Stage, find_stage, output_ports, stage_names
from pipeline.target import Memory, Target
from stages.runtime.gguf_check import check_file
from stages.runtime.guard import check_checkpoint
from tests.stages.models import TEXT, make_checkpoint

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral-sharded": {"model_type": "mistral", "shard_size": "60KB"},
    "qwen2-odd-vocabulary": {"model_type": "qwen2", "vocab_size": 331},
    "qwen3-tied": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 32},
}
# What makes a stage do something on a model this small; a stage without an entry must work with its defaults.
PARAMS: dict[str, dict[str, Any]] = {
    "structured_prune": {"mlp_ratio": 0.4, "head_ratio": 0.5, "round_to": 32, "group_size": 32},
    "sparse_prune": {"num_samples": 4, "max_length": 32},
    "sensitivity": {"choices": [3, 4], "group_size": 32, "num_samples": 4, "max_length": 32},
    "teacher_logits": {"num_samples": 4, "max_length": 32, "k": 8},
    "distill": {"num_samples": 8, "max_length": 32, "global_batch_size": 4, "lr_scheduler_type": "linear"},
    "qlora": {"num_samples": 8, "max_length": 32, "global_batch_size": 4},
    "rtn": {"group_size": 32, "symmetric": False},
    "gptq": {"group_size": 32, "num_samples": 4, "max_length": 32},
    "awq": {"group_size": 32, "num_samples": 4, "max_length": 32, "n_grid": 4},
    "gguf": {"format": "F16"},  # the others need llama.cpp: tests/stages/test_gguf_quantized.py
    "int8": {"smoothing_strength": 0.5, "num_samples": 4, "max_length": 32},
    "bnb": {"double_quant": True},
    "kv_cache": {"mode": "static", "num_samples": 4, "max_length": 32},
    "evaluate": {"max_length": 64},
    "gate": {"metric": "perplexity", "max": 10},
    "lm_eval": {"tasks": ["next_line"]},
}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = SIZES | ARCHITECTURES[request.param]
    if request.param == "llama-biased":
        settings |= {"head_dim": 16}
    return make_checkpoint(tmp_path_factory.mktemp(request.param), **settings)


def dataset(folder: Path, split: str) -> Dataset:
    path = folder / f"{split}.txt"
    path.write_text("<|endoftext|>".join(TEXT * 12))
    return Dataset(path, DatasetSpec(split=split, digest="00", nbytes=path.stat().st_size))


def run(stage: Stage, folder: Path, **inputs: Artifact) -> Any:
    folder.mkdir()
    return stage.run(Context(folder, lambda event: None), **inputs)


def input_for(stage: Stage, port: str, source: Path, folder: Path) -> Checkpoint:
    """The source as the stage's port takes it: dense, or packed by round-to-nearest."""
    model = DenseCheckpoint(source, ModelSpec.from_config(json.loads((source / "config.json").read_text())))
    if stage.inputs()[port].takes(DenseCheckpoint):
        return model
    packed: QuantizedCheckpoint = run(find_stage("rtn").from_dict(PARAMS["rtn"]), folder / "packed", model=model)
    return packed


def measures(name: str) -> bool:
    """Whether a stage says something of a model and makes none."""
    return all(issubclass(port.accepts[0], MEASUREMENTS) for port in output_ports(find_stage(name)).values())


@pytest.mark.parametrize("name", [name for name in stage_names() if not measures(name)])
def test_the_inferred_spec_is_what_stands_on_disk(name: str, source: Path, tmp_path: Path) -> None:
    params = dict(PARAMS.get(name, {}))
    if name == "structured_prune" and "bias" in source.name:
        params |= {"head_ratio": 0.0}  # a biased Llama with fewer heads cannot be written; that refusal has a test of its own
    stage = find_stage(name).from_dict(params)
    inputs: dict[str, Artifact] = {}
    for port in stage.inputs().values():
        if issubclass(port.accepts[0], Dataset):
            inputs[port.name] = dataset(tmp_path, port.name)
        else:
            inputs[port.name] = input_for(stage, port.name, source, tmp_path)
    specs = {port: artifact.spec for port, artifact in inputs.items()}
    inferred = stage.infer(**specs)
    assert isinstance(stage.memory(target=Target.host(), **specs), Memory)
    assert all(isinstance(sentence, str) for sentence in stage.explain(**specs))

    made = run(stage, tmp_path / "output", **inputs)

    ports = stage.outputs()
    for name, port in ports.items():
        artifact, spec = (made, inferred) if len(ports) == 1 else (getattr(made, name), getattr(inferred, name))
        assert isinstance(artifact, port.accepts)
        if isinstance(artifact, Export):
            hold_export_to_its_spec(artifact, spec)
        elif isinstance(spec, ModelSpec):
            hold_to_its_spec(artifact.path, spec, source)
        elif isinstance(artifact, Sensitivity):
            assert artifact.measured.divergence and artifact.measured.model_copy(update={"divergence": None}) == spec
        else:  # its table is its own test's matter
            assert sum(entry.nbytes for file in artifact.path.rglob("*.safetensors") for entry in read_header(file).values()) == spec.nbytes


def hold_to_its_spec(folder: Path, spec: ModelSpec, source: Path) -> None:
    table = tensor_table(folder)
    assert {n: (entry.dtype, entry.shape) for n, entry in table.items()} == spec.tensors()
    assert sum(entry.nbytes for entry in table.values()) == spec.nbytes
    check_checkpoint(folder, spec)
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert (folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def hold_export_to_its_spec(export: Export, spec: ModelSpec) -> None:
    check_file(export.file, spec)
    assert read_gguf(export.file).tensor_bytes == spec.nbytes


@pytest.mark.parametrize("name", stage_names())
def test_a_stage_says_what_it_is(name: str) -> None:
    stage = find_stage(name)
    assert stage.name == name and stage.version >= 1
    assert stage.__doc__ and stage.libraries
    stage.from_dict(PARAMS.get(name, {}))
