"""Every rule of every engine has a checkpoint that breaks it, and each kind of checkpoint is loaded by those that know it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.engine_contract import Answer, answer, answers
from pipeline.engine_facts import Facts, spec_facts
from pipeline.engine_folder import config_facts
from pipeline.engine_rules import FOLDER, engines, read_engine
from pipeline.layout import Sparsity, WeightFormat
from pipeline.serving import serving_lines
from pipeline.spec import ModelSpec
from tests.pipeline.engine_cases import (
    A8,
    ADAPTER,
    AWQ,
    BITSANDBYTES,
    BLOCK_FP8,
    BREAKING,
    DENSE,
    FP8,
    GGUF,
    GPTQ,
    KV8,
    LLAMA,
    MIXED,
    NVFP4,
    PACKED,
    SPARSE,
    UNEVEN,
    VLLM,
    W4,
    W8,
    model,
    packed,
    quantized,
)
from tests.pipeline.engine_table import DOCUMENT, written

ENGINES = {engine.name: engine for engine in engines()}
CASES = [(engine, rule) for engine, cases in BREAKING.items() for rule in cases]


def found(engine: str, facts: Facts) -> Answer:
    return answer(ENGINES[engine], facts, "/m")


def broken(given: Answer) -> dict[str, str]:
    """Rule -> its sentence, of all that the answer is made of."""
    return {finding.rule: finding.says for finding in (*given.reasons, *given.remarks, *given.needs)}


def test_every_rule_has_a_checkpoint_that_breaks_it() -> None:
    assert {name: [rule.id for rule in engine.rules] for name, engine in ENGINES.items()} == {
        name: list(cases) for name, cases in BREAKING.items()
    }


@pytest.mark.parametrize(("engine", "rule"), CASES)
def test_a_planted_fault_is_found_by_its_rule(engine: str, rule: str) -> None:
    level = next(row.level for row in ENGINES[engine].rules if row.id == rule)
    given = answer(ENGINES[engine], BREAKING[engine][rule], "/m")
    if level == "refuse":
        assert rule in [finding.rule for finding in given.reasons] and given.outcome == "does not load" and not given.command
        assert all("; " in finding.says for finding in given.reasons), "what is wrong; what to write instead"
    else:
        alone = ENGINES[engine].model_copy(update={"rules": tuple(row for row in ENGINES[engine].rules if row.id == rule)})
        assert list(broken(answer(alone, BREAKING[engine][rule], "/m"))) == [rule]
    assert all("None" not in says for says in broken(given).values())


@pytest.mark.parametrize(
    ("facts", "loading"),
    [
        (DENSE, ["vllm", "transformers", "lmdeploy", "llama.cpp"]),
        (PACKED, ["vllm", "transformers", "lmdeploy", "llama.cpp"]),
        (quantized(packed({**W4, "group_size": 64})), ["vllm", "transformers", "llama.cpp"]),
        (quantized(packed(W8)), ["vllm", "transformers"]),
        (quantized(packed(W8, A8, "int-quantized")), ["vllm", "transformers", "llama.cpp"]),
        (quantized(packed(FP8, {**A8, "type": "float"}, "float-quantized")), ["vllm", "transformers", "llama.cpp"]),
        (quantized(packed(NVFP4, form="nvfp4-pack-quantized")), ["vllm", "transformers", "llama.cpp"]),
        (quantized(MIXED), ["vllm", "transformers"]),
        (quantized(GPTQ), ["vllm", "transformers", "lmdeploy", "llama.cpp"]),
        (quantized(AWQ), ["vllm", "transformers", "lmdeploy"]),
        (quantized(BITSANDBYTES), ["vllm", "transformers"]),
        (quantized(BLOCK_FP8), ["vllm", "transformers", "lmdeploy", "llama.cpp"]),
        (GGUF, ["vllm", "transformers", "llama.cpp"]),
        (ADAPTER, ["vllm", "transformers", "llama.cpp"]),
    ],
)
def test_each_kind_of_checkpoint_is_loaded_by_the_engines_that_know_it(facts: Facts, loading: list[str]) -> None:
    assert [given.engine for given in answers(facts, "/m") if given.loads] == loading


def test_all_reasons_are_told_and_not_the_first_alone() -> None:
    facts = quantized(packed({**W4, "group_size": 8, "actorder": "group"}, **SPARSE), **UNEVEN)
    assert {finding.rule for finding in found("vllm", facts).reasons} == {"tensors_as_config", "pack_groups", "pack_order", "sparsity"}


def test_a_model_is_split_over_as_many_gpus_as_its_heads_widths_and_groups_allow() -> None:
    def sizes(facts: Facts) -> tuple[int, ...]:
        return found("vllm", facts).split_sizes

    qwen = {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584, "intermediate_size": 18944}
    assert sizes(DENSE) == (1, 2, 4, 8, 16)  # beyond 8 GPUs its 8 KV heads are repeated
    assert sizes(model(**qwen)) == (1, 2, 4)  # 28 query heads
    assert sizes(model(**qwen, quantization_config=packed())) == (1, 2, 4)  # 18944 / 4 is 37 groups of 128
    assert sizes(model(intermediate_size=11008, quantization_config=packed())) == (1, 2)  # 11008 / 4 is 21.5 groups
    assert sizes(model(num_key_value_heads=6, num_attention_heads=48, head_dim=128, hidden_size=6144)) == (1, 2)
    assert sizes(quantized(BITSANDBYTES)) == (1,)


def test_the_cache_becomes_a_flag_of_each_server() -> None:
    cached = PACKED.model_copy(update={"cache": "per_token_head"})
    assert {given.engine: given.command for given in answers(cached, "/a folder")} == {
        "vllm": "vllm serve '/a folder' --kv-cache-dtype int8_per_token_head --max-model-len 8192",
        "transformers": "AutoModelForCausalLM.from_pretrained('/a folder', dtype='auto')",
        "lmdeploy": "lmdeploy serve api_server '/a folder' --quant-policy 8 --session-len 8192",
        "llama.cpp": "llama-server -m model.gguf -ctk q8_0 -ctv q8_0 -fa on -c 8192",
    }
    assert found("vllm", quantized(packed(kv_cache_scheme=KV8))).command == "vllm serve /m --kv-cache-dtype fp8 --max-model-len 8192"
    narrow = found("vllm", VLLM["cache_narrow"])
    assert "--kv-cache-dtype" not in narrow.command and "16-bit cache" in broken(narrow)["cache_narrow"]


def test_names_from_a_file_are_quoted_in_commands() -> None:
    hostile = ADAPTER.model_copy(update={"base_model": "x; rm -rf ~"})
    assert found("vllm", hostile).command.startswith("vllm serve 'x; rm -rf ~' --enable-lora")


@pytest.mark.parametrize(
    "quantization",
    [
        packed({**W4, "group_size": 64, "symmetric": False}), packed(W8), packed(W8, A8, "int-quantized"),
        packed(FP8, {**A8, "type": "float"}, "float-quantized"), BITSANDBYTES,
        {**BITSANDBYTES, "load_in_4bit": False, "load_in_8bit": True},
    ],
)  # fmt: skip
def test_a_spec_and_the_config_it_stands_for_are_the_same_to_every_engine(quantization: dict[str, Any]) -> None:
    content = {**LLAMA, "quantization_config": quantization}
    read = config_facts(content).model_copy(update={"stored": "safetensors", "misfits": 0})
    assert spec_facts(ModelSpec.from_config(content)) == read


def test_an_export_and_zeros_are_seen_in_a_spec() -> None:
    spec = ModelSpec.from_config(LLAMA)
    groups = tuple(group.model_copy(update={"format": WeightFormat(ggml="Q8_0")}) for group in spec.groups)
    export = spec.model_copy(update={"groups": groups}).with_cache("q8_0")
    assert [line.command for line in serving_lines(export)] == [
        "vllm serve {model}/model.gguf --tokenizer {model} --kv-cache-dtype int8_per_token_head",
        "llama-server -m {model}/model.gguf -ctk q8_0 -ctv q8_0 -fa on",
    ]
    assert "zeros (2:4)" in serving_lines(spec.with_sparsity(Sparsity(share=0.5, pattern="2:4")))[0].note


# the files of rules


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"when": {"headz": 4}}, "there is no fact headz"),
        ({"says": "{headz} heads; write 4"}, "there is no fact headz"),
        ({"must": {"architecture": {"listed": "absent"}}}, "there is no list absent"),
        ({"level": "forbid"}, "level"),
        ({"source": None}, "source"),
        ({"date": "lately"}, "date"),
    ],
)
def test_a_rule_that_could_never_be_asked_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = yaml.safe_load((FOLDER / "vllm.yaml").read_text())
    content["rules"][0] |= change
    (tmp_path / "engine.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        read_engine(tmp_path / "engine.yaml")


def test_an_engine_more_is_a_file_more(tmp_path: Path) -> None:
    rule = {
        "id": "bits",
        "level": "refuse",
        "must": {"num_bits": {"at_least": 8}},
        "says": "{num_bits} bits; write 8",
        "source": "s",
        "date": "2026-11-21",
    }
    content = {
        "name": "other", "version": "1", "date": "2026-11-21", "rank": 9, "commands": [{"line": "other {model}{flags}"}],
        "flags": [{"when": {"any": [{"cache": "static"}, {"experts": {"at_most": 8}}]}, "add": " --flag"}], "rules": [rule],
    }  # fmt: skip
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(content))
    engine = read_engine(tmp_path / "other.yaml")
    assert [finding.says for finding in answer(engine, PACKED, "/m").reasons] == ["4 bits; write 8"]
    assert answer(engine, DENSE, "/m").command == "other /m"
    assert answer(engine, model(num_local_experts=8), "/m").command == "other /m --flag"


def test_the_document_has_the_rules_as_they_are() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == written(text), "write it again: python -m tests.pipeline.engine_table"
