"""`compute_dtype: auto` is what the machine that computes does fastest: decided without torch, in the key, one for a whole comparison."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.compute_dtype import DECIDED, fastest_dtype, has_bf16_units, processor_dtype, slow_sentences
from pipeline.errors import RecipeError
from pipeline.identity import stage_key
from pipeline.stage import BUILT_IN, find_stage
from pipeline.target import Target

FLAGS = {
    "a laptop with AVX2": ("flags\t\t: fpu avx avx2 fma", False),
    "AVX-512 without bf16": ("flags\t\t: fpu avx512f avx512_vnni", False),
    "AVX-512 with bf16": ("flags\t\t: fpu avx512f avx512_bf16", True),
    "AMX": ("flags\t\t: fpu amx_tile amx_bf16", True),
    "Arm with bf16": ("Features\t: fp asimd bf16 i8mm", True),
    "Arm without": ("Features\t: fp asimd", False),
    "a kernel that says nothing": ("processor\t: 0", False),
}


@pytest.mark.skipif("__import__('sys').platform == 'darwin'")
@pytest.mark.parametrize("machine", FLAGS)
def test_a_processor_s_units_are_read_from_its_flags(tmp_path: Path, machine: str) -> None:
    line, expected = FLAGS[machine]
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\n{line}\nbogomips\t: 5000\n")
    assert has_bf16_units(tmp_path) is expected
    assert has_bf16_units(tmp_path / "nowhere") is False


def test_a_gpu_decides_by_its_compute_capability_and_else_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Target(name="card", gpus=1, memory=1 << 34)
    for processor in ("bf16", "fp32"):
        monkeypatch.setenv(DECIDED, processor)
        assert fastest_dtype(card) == "bf16"  # not said: a card of today
        assert fastest_dtype(card.model_copy(update={"compute_capability": 8.0})) == "bf16"
        assert fastest_dtype(card.model_copy(update={"compute_capability": 7.5})) == "fp32"
        assert fastest_dtype(Target.host()) == processor
        assert fastest_dtype(card.model_copy(update={"unified": True})) == processor  # stages compute on its CPU's side


def test_what_the_environment_says_is_a_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DECIDED, "fp16")
    with pytest.raises(RecipeError, match="LLMPRESS_COMPUTE_DTYPE: 'fp16' is no dtype; write bf16 or fp32, or leave it unset"):
        processor_dtype()


@pytest.mark.parametrize("processor", ["bf16", "fp32"])
def test_what_auto_became_is_in_the_key_as_if_it_had_been_written(monkeypatch: pytest.MonkeyPatch, processor: str) -> None:
    monkeypatch.setenv(DECIDED, processor)
    evaluate, inputs = find_stage("evaluate"), {"model": "a", "eval": "b"}
    settled = evaluate().on(Target.host())
    written = {dtype: stage_key(evaluate.from_dict({"compute_dtype": dtype}), inputs) for dtype in ("bf16", "fp32")}
    assert stage_key(settled, inputs) == written[processor] and written["bf16"] != written["fp32"]
    assert evaluate.from_dict({"compute_dtype": "bf16"}).on(Target.host()).params.compute_dtype == "bf16"  # what is written stays


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("structured_prune", {"mlp_ratio": 0.5}),
        ("sparse_prune", {"method": "magnitude"}),
        ("kv_cache", {}),
        ("int8", {}),
        ("gptq", {"backend": "gptqmodel"}),
        ("awq", {"backend": "autoawq"}),
        ("benchmark", {"engine": "llama.cpp"}),
    ],
)
def test_a_stage_that_multiplies_nothing_keeps_one_key_on_every_machine(
    monkeypatch: pytest.MonkeyPatch, name: str, params: dict[str, str]
) -> None:
    keys = set()
    for processor in ("bf16", "fp32"):
        monkeypatch.setenv(DECIDED, processor)
        stage = find_stage(name).from_dict(params).on(Target.host())
        keys.add(str(stage.params.model_dump()))
        assert stage.compute_dtype is None and stage.params.compute_dtype == "auto"
    assert len(keys) == 1


def test_every_stage_that_runs_a_model_has_the_parameter() -> None:
    having = {name for name in BUILT_IN if "compute_dtype" in find_stage(name).Params.model_fields}
    without = {"rtn", "fp8", "bnb", "dequantize", "gguf", "data_check", "gate"}
    assert having == set(BUILT_IN) - without


@pytest.mark.parametrize("name", ["distill", "qlora"])
def test_the_old_name_is_answered_with_the_new_one(name: str) -> None:
    with pytest.raises(ValidationError, match="dtype: it is called compute_dtype; write compute_dtype: fp32"):
        find_stage(name).from_dict({"dtype": "fp32"})


def test_bf16_without_units_is_allowed_and_the_plan_says_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DECIDED, "fp32")
    measured = Target(name="host", flops=30e9, float32_flops=160e9)
    assert slow_sentences("bf16", measured, on_gpu=False) == [
        "compute_dtype bf16: this processor has no units for it, and takes 5.3 times as long as in fp32"
    ]
    assert "takes 4 to 8 times" in slow_sentences("bf16", Target.host(), on_gpu=False)[0]
    assert slow_sentences("fp32", measured, on_gpu=False) == slow_sentences(None, measured, on_gpu=False) == []
    monkeypatch.setenv(DECIDED, "bf16")
    assert slow_sentences("bf16", measured, on_gpu=False) == []
