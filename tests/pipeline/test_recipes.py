"""The recipes for large models keep what the comments on top of them promise, by the plan's own numbers."""

from pathlib import Path

import pytest

from pipeline.fit import Fit, fit
from pipeline.plan import Plan
from pipeline.serving import serving_lines
from pipeline.shortage import CUDA_BYTES
from pipeline.spec import ModelSpec
from tests.pipeline.shipped import plan_of_shipped

LARGE = ["70b_to_single_a100", "70b_distill_7b_awq", "13b_to_rtx4090", "8b_qlora_awq", "405b_to_h100_nvl"]


def fit_of(plan: Plan) -> Fit:
    assert plan.served is not None
    return plan.served.fit


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_for_a_large_model_fits_its_machine_and_its_load(name: str, tmp_path: Path) -> None:
    plan = plan_of_shipped(tmp_path, name)
    assert plan.problems == [] and fit_of(plan).fits
    card = plan.recipe.machine.memory
    assert card is not None and plan.recipe.machine.cuda
    held = {node.name: node.memory.totals["vram"] + CUDA_BYTES for node in plan.nodes}
    assert {node: needed for node, needed in held.items() if needed > card} == {}
    assert "vllm" in [line.engine for line in serving_lines(plan.final_spec)]


@pytest.mark.parametrize(
    ("overrides", "weights", "cache"),
    [
        (["order=[quantize]"], 107.8, 8.5),
        (["order=[quantize,kv_cache]"], 107.8, 4.4),
        (["order=[quantize]", "stages.quantize.num_bits=3"], 82.7, 8.5),
        (["order=[prune,quantize,kv_cache]", "~stages.prune.num_layers", "stages.prune.mlp_ratio=0.25"], 86.5, 4.4),
        (["order=[prune,quantize]"], 84.7, 6.6),
        (["order=[prune,quantize,kv_cache]", "stages.prune.num_layers=99"], 85.6, 3.4),
    ],
)
def test_what_405b_s_recipe_says_does_not_fit_does_not(tmp_path: Path, overrides: list[str], weights: float, cache: float) -> None:
    """GB on each GPU."""
    found = fit_of(plan_of_shipped(tmp_path, "405b_to_h100_nvl", *overrides))
    assert (round(found.weights / 1e9, 1), round(found.cache / 1e9, 1), found.fits) == (weights, cache, False)


def test_three_bits_of_405b_would_fit_and_one_kernel_of_vllm_takes_them(tmp_path: Path) -> None:
    plan = plan_of_shipped(tmp_path, "405b_to_h100_nvl", "order=[quantize,kv_cache]", "stages.quantize.num_bits=3")
    vllm = serving_lines(plan.final_spec)[0]
    assert fit_of(plan).fits and vllm.engine == "vllm" and "only Humming's multiply weights of 3 bits" in vllm.note


def test_98_layers_of_405b_are_too_many_to_be_trained_on_the_gpu_of_a_stage(tmp_path: Path) -> None:
    qlora = ("order=[prune,recover]", "+stage@stages.recover=qlora", "stages.recover.num_samples=192", "stages.recover.max_length=2048")
    sparing = ("stages.recover.execution.micro_batch_size=1", "stages.recover.execution.gradient_checkpointing=true")
    plan = plan_of_shipped(tmp_path, "405b_to_h100_nvl", *qlora, *sparing)
    recover = plan.nodes[-1]
    assert recover.name == "recover" and recover.memory.totals["vram"] == pytest.approx(197e9, rel=0.1)
    assert plan.recipe.machine.memory is not None and plan.recipe.machine.memory < 101e9
    assert any(problem.startswith("stages.recover: ") for problem in plan.problems)


def test_70b_at_8_bits_is_what_405b_must_beat_on_the_same_machine(tmp_path: Path) -> None:
    plan = plan_of_shipped(tmp_path, "405b_to_h100_nvl", "order=[quantize]", "model=llama3_1_70b", "stages.quantize.num_bits=8")
    assert fit_of(plan).largest_batch == 38


def test_four_bits_of_13b_serve_twice_the_sequences_of_eight_and_sixteen_serve_none(tmp_path: Path) -> None:
    batches = []
    for bits in (8, 4):
        plan = plan_of_shipped(tmp_path, "13b_to_rtx4090", f"stages.quantize.num_bits={bits}")
        batches.append(fit_of(plan).largest_batch)
    source = plan.source.model_spec
    dense = fit(source, plan.recipe.target, context=4096, batch=1)
    assert batches == [2, 4] and not dense.fits and f"{dense.weights / 1e9:.0f}" == "26"


def test_the_student_of_70b_is_trained_whole_on_one_machine_for_another(tmp_path: Path) -> None:
    plan = plan_of_shipped(tmp_path, "70b_distill_7b_awq")
    assert (plan.recipe.machine.name, plan.recipe.target.name) == ("h200_141gb", "rtx4090")
    teacher = next(node for node in plan.nodes if node.name == "teacher")
    assert str(teacher.inputs["teacher"]) == "models.large"
    distilled = next(node for node in plan.nodes if node.name == "distill")
    student = plan.source.model_spec
    assert distilled.expected["model"] == student
    assert 16 * student.num_parameters < distilled.memory.totals["vram"] == pytest.approx(125e9, rel=0.1)
    adapted = plan_of_shipped(tmp_path, "70b_distill_7b_awq", "stages.distill.method=lora")
    assert next(node for node in adapted.nodes if node.name == "distill").memory.totals["vram"] == pytest.approx(7e9, rel=0.2)


def test_another_student_of_the_family_takes_its_place_from_the_command_line(tmp_path: Path) -> None:
    plan = plan_of_shipped(tmp_path, "70b_distill_7b_awq", "model=llama2_13b", "stages.distill.method=lora", "target=a100_80gb")
    spec = plan.final_spec
    assert isinstance(spec, ModelSpec) and spec.architecture.num_layers == 40 and plan.problems == []


def test_8b_is_tuned_on_conversations_given_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}\n' * 300
    )
    split = f"data.splits.train={{path: {tmp_path / 'chats.jsonl'}, format: messages}}"
    plan = plan_of_shipped(tmp_path, "8b_qlora_awq", split)
    tune = next(node for node in plan.nodes if node.name == "tune")
    assert "192 conversations of at most 2048 tokens, learning what the assistant says" in tune.notes[0]
    assert plan.final_spec.kv_cache.mode == "per_token_head"
