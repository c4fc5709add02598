"""`mode=check` by the real command: what the stages write, files of every kind, and what a person gets wrong."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.artifact import Checkpoint, Dataset, DenseCheckpoint, QuantizedCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.check import check_checkpoint, check_json
from pipeline.engine_contract import Answer, answer, answers
from pipeline.engine_facts import Facts, spec_facts
from pipeline.engine_folder import read_facts
from pipeline.engine_rules import engines
from pipeline.errors import RecipeError
from pipeline.headers import CheckpointFileError
from pipeline.recipe import Settings
from pipeline.serving import serving_lines
from pipeline.stage import Context
from stages.kv_cache import KVCache
from stages.rtn import RTN
from tests.pipeline.engine_cases import GPTQ, LLAMA, LORA
from tests.pipeline.test_plan_speed import COMMAND, ROOT
from tests.stages.models import make_checkpoint, write_documents


def by_vllm(facts: Facts) -> Answer:
    return answer(next(engine for engine in engines() if engine.name == "vllm"), facts, "/m")


# what a folder says


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose heads of 32 are wide enough for every INT8 cache."""
    return make_checkpoint(tmp_path_factory.mktemp("dense"), hidden_size=128, intermediate_size=256, num_attention_heads=4)


@pytest.fixture(scope="module")
def rounded(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounded")
    RTN.from_dict({"group_size": 32}).run(Context(folder, lambda event: None), DenseCheckpoint(dense))
    return folder


def cached(source: Path, folder: Path, documents: Path, **params: Any) -> Path:
    calibration = Dataset(write_documents(documents), DatasetSpec(split="calibration", digest="d", nbytes=1, file_format="jsonl"))
    stage = KVCache.from_dict(params)
    stage.run(Context(folder, lambda event: None), QuantizedCheckpoint(source), calibration if params["mode"] == "static" else None)
    return folder


def ask(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command, as in a plan: nothing heavy can be imported."""
    command = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_what_rtn_writes_is_loaded_by_all_and_the_command_says_how(rounded: Path, tmp_path: Path) -> None:
    done = ask("mode=check", f"path={rounded}", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM, compressed-tensors 4-bit int in groups of 32 (pack-quantized)" in done.stdout
    assert f"vllm serve {rounded} --max-model-len 256" in done.stdout and "--tensor-parallel-size 2 or 4" in done.stdout
    assert "does not load" not in done.stdout and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["static", "per_token_head"])
def test_an_int8_cache_is_served_and_its_calibrated_scales_are_not_promised(rounded: Path, tmp_path: Path, mode: str) -> None:
    limits = {"num_samples": 2, "max_length": 16} if mode == "static" else {}
    folder = cached(rounded, tmp_path / "cached", tmp_path / "text.jsonl", mode=mode, **limits)
    done = ask("mode=check", f"path={folder}", "format=json", folder=tmp_path)
    content = json.loads(done.stdout)
    vllm = content["engines"][0]
    assert (done.returncode, content["schema_version"], content["facts"]["cache"], vllm["engine"]) == (0, 1, mode, "vllm")
    assert vllm["command"] == f"vllm serve {folder} --kv-cache-dtype int8_per_token_head --max-model-len 256"
    assert [remark["rule"] for remark in vllm["remarks"]] == (["cache_static"] if mode == "static" else [])
    assert all(row["source"] and row["date"] for engine in content["engines"] for row in engine["remarks"] + engine["needs"])


def test_serving_lines_say_what_the_check_of_the_same_checkpoint_says(rounded: Path, tmp_path: Path) -> None:
    for folder in (rounded, cached(rounded, tmp_path / "cached", tmp_path / "text.jsonl", mode="per_token_head")):
        spec, read = Checkpoint(folder).model_spec, read_facts(folder)
        headers = {"g_idx", "packed_dtype", "padded"}
        assert spec_facts(spec).model_dump(exclude=headers) == read.model_dump(exclude=headers)
        lines = {line.engine: line.command.format(model="/m") for line in serving_lines(spec)}
        assert lines == {given.engine: given.command for given in answers(read, "/m", template=True) if given.engine in lines}
        assert set(lines) == {"vllm", "lmdeploy", "llama.cpp"}


def test_zeros_are_read_from_the_manifest_that_llmpress_wrote(rounded: Path, tmp_path: Path) -> None:
    shutil.copytree(rounded, tmp_path / "sparse")
    (tmp_path / "sparse" / "artifact.json").write_text(json.dumps({"spec": {"sparsity": {"share": 0.5, "pattern": "2:4"}}}))
    assert read_facts(tmp_path / "sparse").zeros == "2:4"
    (tmp_path / "sparse" / "artifact.json").write_text(json.dumps({"spec": ["another program's"]}))
    assert read_facts(tmp_path / "sparse").zeros is None


def test_a_layer_narrower_than_the_config_says_is_loaded_by_no_engine(dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path / "uneven")
    tensors = load_file(tmp_path / "uneven" / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"] = tensors[f"model.layers.1.mlp.{name}.weight"][:192].clone()
    save_file(tensors, tmp_path / "uneven" / "model.safetensors", {"format": "pt"})
    done = ask("mode=check", "path=uneven", folder=tmp_path)
    assert done.returncode == 3 and "error: path: no engine loads uneven; " in done.stderr
    assert done.stdout.count("2 tensors are not as config.json says, the first: model.layers.1.mlp.gate_proj.weight is [192, 128]") == 4


def test_three_bits_packed_ten_to_a_word_are_told_from_those_that_fill_their_words(dense: Path, tmp_path: Path) -> None:
    RTN.from_dict({"group_size": 32, "num_bits": 3}).run(Context(tmp_path, lambda event: None), DenseCheckpoint(dense))
    assert read_facts(tmp_path).padded is False and by_vllm(read_facts(tmp_path)).outcome == "loads with a remark"
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        columns = tensors[name].shape[1] * 32 // 3
        tensors[name] = torch.zeros(len(tensors[name]), -(-columns // 10), dtype=torch.int32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert read_facts(tmp_path).padded is True and by_vllm(read_facts(tmp_path)).outcome == "does not load"


def test_a_config_alone_is_judged_and_says_that_no_tensor_was_seen(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": GPTQ}))
    done = ask("mode=check", "path=m", folder=tmp_path)
    assert done.returncode == 0 and "no safetensors headers: the sizes of its tensors were not checked" in done.stdout


def test_an_adapter_is_served_with_the_room_its_rank_needs(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({**LORA, "r": 24}))
    assert by_vllm(read_facts(tmp_path)).command.startswith("vllm serve org/base --enable-lora --max-lora-rank 32 ")


def test_a_gguf_file_is_found_in_its_folder_and_read_from_its_header(tmp_path: Path) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    numbers = {"attention.head_count": 4, "attention.head_count_kv": 2, "embedding_length": 128, "context_length": 512}
    entries = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    entries += b"".join(text(f"llama.{key}") + struct.pack("<II", 4, value) for key, value in numbers.items())
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1 + len(numbers)) + entries)
    facts = read_facts(tmp_path)
    assert (facts.architecture, facts.heads, facts.kv_heads, facts.head_dim, facts.context) == ("llama", 4, 2, 32, 512)
    done = ask("mode=check", f"path={tmp_path}", folder=tmp_path)
    assert done.returncode == 0 and f"llama-server -m {tmp_path}/model.gguf -c 512" in done.stdout
    assert f"vllm serve {tmp_path}/model.gguf --tokenizer {tmp_path}" in done.stdout


# what a person gets wrong


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("absent", "path: absent is not a folder; give the folder of a checkpoint or a GGUF file"),
        ("empty", "path: empty holds no config.json; give the folder of a checkpoint, an adapter or a GGUF file"),
        ("torn", "path: torn/config.json is not JSON; copy it again"),
        ("wrong", "path: config.json: hidden_size is 'wide'; input should be a valid integer"),
        ("listed", "path: config.json: quantization_config is not a JSON object; copy it again"),
        ("torn.gguf", "path: torn.gguf is not a GGUF file; give one that llama.cpp reads"),
    ],
)
def test_what_cannot_be_read_costs_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, sentence: str) -> None:
    wrong = {"wrong": {**LLAMA, "hidden_size": "wide"}, "listed": {**LLAMA, "quantization_config": "awq"}}
    contents = {"torn": "{"} | {name: json.dumps(content) for name, content in wrong.items()}
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.gguf").write_text("none")
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        check_checkpoint(Settings(mode="check", path=path), ROOT)
    assert caught.value.problems == [sentence]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["mode=check"], "path: which checkpoint is to be checked? write mode=check path=/folder"),
        (["mode=check", "path=x", "recipe=quickstart"], "recipe: mode=check looks at a checkpoint and reads no recipe; "),
        (["mode=plan", "path=x", "recipe=quickstart"], "path: it has an effect only with mode=check; "),
        pytest.param(["mode=gc", "path=x"], "path: it has an effect only with mode=check; ", marks=pytest.mark.slow),
    ],
)
def test_a_setting_without_effect_is_refused(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    done = ask(*arguments, folder=tmp_path)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and errors[0].startswith(f"error: {sentence}"), done.stderr


def test_damaged_weights_are_named(dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointFileError, match="truncated"):
        read_facts(tmp_path / "cut")


def test_the_json_carries_every_fact(dense: Path) -> None:
    facts = read_facts(dense)
    content = check_json(dense, facts, answers(facts, str(dense)))
    assert content["facts"] == facts.model_dump(mode="json") and json.dumps(content)
