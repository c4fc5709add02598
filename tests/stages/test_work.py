"""What stages say they compute and move, against what is known of them; nothing runs."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.architecture import Architecture
from pipeline.artifact_spec import DatasetSpec
from pipeline.layout import Sparsity, WeightFormat
from pipeline.roofline import Work, seconds
from pipeline.spec import ModelSpec
from pipeline.stage import find_stage
from pipeline.target import Target
from stages.runtime.stage_work import TOKEN_BYTES, forward_flops, packed_weights, training
from stages.runtime.training_settings import TrainingExecution

pytestmark = pytest.mark.usefixtures("bf16_units")  # what is planned is planned for a processor that has them

A100 = Target(name="a100", gpus=1, memory=80 * 2**30, flops=312e12, bandwidth=2039e9)
TEXT = DatasetSpec(split="text", digest="00", nbytes=2 * 10**8)
STEP = dict(model_type="llama", dtype="BF16", max_position=8192)
SEVEN = ModelSpec.of(Architecture(**STEP, vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32,
                                  num_heads=32, num_kv_heads=32, head_dim=128))  # fmt: skip
SEVENTY = ModelSpec.of(Architecture(**STEP, vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_layers=80,
                                    num_heads=64, num_kv_heads=8, head_dim=128))  # fmt: skip
OPT_175 = ModelSpec.of(Architecture(**STEP, vocab_size=50272, hidden_size=12288, intermediate_size=32768, num_layers=96,
                                    num_heads=96, num_kv_heads=96, head_dim=128))  # fmt: skip
MIXTRAL = ModelSpec.from_config({
    "model_type": "mixtral", "dtype": "bfloat16", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "num_local_experts": 8, "num_experts_per_tok": 2,
})  # fmt: skip


def packed(model: ModelSpec) -> ModelSpec:
    return model.with_format(WeightFormat(num_bits=4, group_size=128), ("lm_head",))


INPUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # parameters, specs by port
    "structured_prune": ({"mlp_ratio": 0.2}, {"model": SEVEN}),
    "teacher_logits": ({}, {"teacher": SEVEN, "train": TEXT}),
    "distill": ({}, {"student": SEVEN, "train": TEXT, "teacher": SEVEN}),
    "qlora": ({}, {"model": SEVEN, "train": TEXT}),
    "rtn": ({}, {"model": SEVEN}),
    "gptq": ({}, {"model": SEVEN, "calibration": TEXT}),
    "awq": ({}, {"model": SEVEN, "calibration": TEXT}),
    "kv_cache": ({}, {"model": SEVEN}),
    "dequantize": ({}, {"model": packed(SEVEN)}),
    "evaluate": ({}, {"model": SEVEN, "eval": TEXT, "reference": SEVEN}),
}


def work_of(stage: str, params: dict[str, Any] | None = None, execution: dict[str, Any] | None = None, **specs: Any) -> Work:
    given, inputs = INPUTS[stage]
    work = find_stage(stage).from_dict(given if params is None else params, execution).work(**(specs or inputs))
    assert work is not None
    return work


def hours(work: Work, target: Target = A100) -> float:
    found = seconds(work, target)
    assert found is not None
    return found / 3600


@pytest.mark.parametrize("stage", sorted(INPUTS.keys() - {"kv_cache"}))
def test_every_stage_says_its_work_and_reads_its_model_from_files(stage: str) -> None:
    work = work_of(stage)
    assert work.disk >= next(iter(INPUTS[stage][1].values())).nbytes
    assert 0 < hours(work) < 24


def test_training_every_weight_takes_six_flop_for_each_weight_and_token() -> None:
    stage = find_stage("distill").from_dict({"alpha": 0})
    work = training(stage.params, stage.execution, SEVEN)
    embedding, attention = 32000 * 4096, 2 * 32 * 32 * 128 * 512  # causal: half of 4 x layers x heads x head_dim x length
    assert work.flops / stage.params.tokens == 6 * (SEVEN.num_parameters - embedding) + 3 * attention
    assert work.flops / stage.params.tokens == pytest.approx(6 * SEVEN.num_parameters, rel=0.02)


def test_frozen_weights_save_a_third_of_training_and_all_of_their_optimizer_s_traffic() -> None:
    full, lora = (work_of("distill", {"alpha": 0, "method": method}, student=SEVEN, train=TEXT) for method in ("full", "lora"))
    assert lora.flops / full.flops == pytest.approx(2 / 3, rel=0.03)
    assert lora.nbytes < full.nbytes / 2


def test_gradient_checkpointing_computes_the_layers_once_more() -> None:
    stage = find_stage("qlora").from_dict({})
    kept = training(stage.params, stage.execution, SEVEN)
    again = training(stage.params, TrainingExecution(gradient_checkpointing=True), SEVEN)
    assert again.flops - kept.flops == forward_flops(SEVEN, stage.params.tokens, 512, head=False)


def test_float32_is_slower_on_gpus_than_bf16_by_what_the_data_sheet_says() -> None:
    bf16, fp32 = (work_of("distill", {"alpha": 0, "compute_dtype": dtype}, student=SEVEN, train=TEXT) for dtype in ("bf16", "fp32"))
    assert bf16.flops == fp32.float32_flops and not fp32.flops and not bf16.float32_flops
    assert seconds(Work(float32_flops=19.5e12), A100, utilisation=1) == pytest.approx(1)


def test_what_cpus_compute_beside_gpus_is_shared_by_their_cores_and_elsewhere_done_at_the_target_s_own_rate() -> None:
    work = Work(cpu=1, cpu_shared=8, cpu_flops=8 * 2e11)
    assert seconds(work, A100, utilisation=1) == pytest.approx(1 + 1 + 1)  # eight cores, where a target with GPUs does not say
    assert seconds(work, A100.model_copy(update={"cores": 16}), utilisation=1) == pytest.approx(1 + 0.5 + 0.5)
    assert seconds(work, Target(name="cpu", cores=4, flops=8e11), utilisation=1) == pytest.approx(1 + 2 + 2)
    assert seconds(Work(cpu_flops=1), Target(name="cpu")) is None


def test_a_teacher_adds_one_forward_and_stored_logits_none() -> None:
    alone = work_of("distill", {"alpha": 0}, student=SEVEN, train=TEXT)
    logits = find_stage("teacher_logits").from_dict({}).infer(teacher=SEVEN, train=TEXT)
    taught, stored = (work_of("distill", {}, student=SEVEN, train=TEXT, teacher=teacher) for teacher in (SEVEN, logits))
    assert taught.flops - alone.flops == pytest.approx(forward_flops(SEVEN, 1024 * 512, 512))
    assert stored.flops == alone.flops
    assert stored.disk - alone.disk == logits.nbytes


def test_processes_share_the_products_of_a_distillation(tmp_path: Path) -> None:
    config = tmp_path / "accelerate.yaml"
    config.write_text("distributed_type: MULTI_GPU\nnum_processes: 4\n")
    one, four = work_of("distill"), work_of("distill", {}, {"accelerate_config": str(config)})
    assert one.flops == pytest.approx(4 * four.flops)
    assert one.disk == four.disk


def test_gptq_of_175_billion_weights_takes_about_the_four_hours_that_its_authors_report() -> None:
    """On one A100 with 128 windows of 2,048 tokens: https://arxiv.org/abs/2210.17323, section 5."""
    work = work_of("gptq", {"max_length": 2048}, model=OPT_175, calibration=TEXT)
    assert 2 < hours(work) < 8
    algorithm = work.model_copy(update={"disk": 0, "cpu": 0, "cpu_shared": 0, "cpu_flops": 0})  # what they time: no packing, no proof
    assert 3 < hours(algorithm) < 6


def test_offloading_to_disk_costs_only_files() -> None:
    ram, disk = (work_of("gptq", {}, {"offload": offload}, **INPUTS["gptq"][1]) for offload in ("ram", "disk"))
    assert (ram.flops, ram.float32_flops, ram.nbytes) == (disk.flops, disk.float32_flops, disk.nbytes)
    assert disk.disk - ram.disk > 3 * SEVEN.nbytes - SEVEN.nbytes / 10  # two more reads, and the rounded weights written


def test_awq_s_search_grows_with_its_grid_and_the_rest_does_not() -> None:
    few, more, most = (work_of("awq", {"n_grid": grid}, **INPUTS["awq"][1]) for grid in (4, 5, 24))
    assert most.flops - few.flops == pytest.approx(20 * (more.flops - few.flops))
    layers = SEVEN.num_parameters - 2 * 32000 * 4096
    searched = (layers + 32 * 4096 * (4096 + 11008)) * 2 * 128 * 256  # o_proj and down_proj are searched with their module and alone
    assert more.flops - few.flops == pytest.approx(searched, rel=0.03)
    assert (few.disk, few.cpu) == (most.disk, most.cpu)


def test_a_layerwise_evaluation_reads_all_weights_in_each_sweep() -> None:
    states = int(TEXT.nbytes / TOKEN_BYTES) * 2 * 8192  # bytes, of all text
    specs = {"model": SEVENTY, "eval": TEXT}
    resident = work_of("evaluate", {}, **specs)
    five = work_of("evaluate", {}, {"mode": "layerwise", "hidden_states": states // 5}, **specs)
    assert resident.disk == SEVENTY.nbytes + TEXT.nbytes
    assert five.disk == 5 * SEVENTY.nbytes + TEXT.nbytes
    assert resident.flops == five.flops


def test_a_packed_model_is_read_faster_unpacked_on_the_cpu_and_computes_the_same() -> None:
    dense, small = (work_of("evaluate", {}, model=model, eval=TEXT) for model in (SEVENTY, packed(SEVENTY)))
    assert small.flops == dense.flops
    assert small.disk < dense.disk / 3
    assert not dense.cpu_shared and small.cpu_shared == pytest.approx(packed_weights(packed(SEVENTY)) / 50e6)


def test_an_int8_cache_is_scored_beside_the_ordinary_one_and_a_reference_by_itself() -> None:
    plain, cached = (work_of("evaluate", {}, model=model, eval=TEXT) for model in (SEVEN, SEVEN.with_cache("per_token_head")))
    assert cached.flops == 2 * plain.flops
    assert work_of("evaluate").flops == 2 * plain.flops
    assert work_of("evaluate").disk == plain.disk + SEVEN.nbytes


def test_pruning_70_billion_weights_takes_minutes_of_files_not_seconds() -> None:
    magnitude = work_of("structured_prune", {"mlp_ratio": 0.2}, model=SEVENTY)
    made = find_stage("structured_prune").from_dict({"mlp_ratio": 0.2}).infer(SEVENTY)
    assert magnitude.disk == SEVENTY.nbytes + made.nbytes, "read once, written once, and not read for its proof"
    assert 2 * 60 < magnitude.disk / A100.disk_bandwidth < 10 * 60
    assert not magnitude.flops
    measured = work_of("structured_prune", {"mlp_ratio": 0.2, "importance": "activation"}, model=SEVENTY, calibration=TEXT)
    assert measured.disk == magnitude.disk + SEVENTY.nbytes + TEXT.nbytes
    assert measured.flops == forward_flops(SEVENTY, 128 * 512, 512, head=False)


def test_packing_is_shared_by_the_cores_that_the_target_has_and_runs_on_no_gpu() -> None:
    work = work_of("rtn", model=SEVENTY)
    assert not work.flops and not work.nbytes
    assert 0.05 < hours(work, A100.model_copy(update={"cores": 64})) < hours(work) < hours(work, A100.model_copy(update={"cores": 1})) < 1


def test_experts_compute_on_their_tokens_and_are_calibrated_on_all() -> None:
    share = forward_flops(MIXTRAL, 1, 2) / forward_flops(MIXTRAL, 1, 2, all_experts=True)
    assert share == pytest.approx(MIXTRAL.active_parameters / MIXTRAL.num_parameters, rel=0.02)
    assert work_of("gptq", {}, model=MIXTRAL, calibration=TEXT).flops > 2 * 2 * 128 * 256 * 0.95 * MIXTRAL.num_parameters


def test_a_linked_checkpoint_is_not_read_again() -> None:
    linked, static = work_of("kv_cache"), work_of("kv_cache", {"mode": "static"}, model=SEVEN, calibration=TEXT)
    assert linked == Work() and hours(linked) == 0
    assert work_of("kv_cache", model=SEVEN.with_sparsity(Sparsity(share=0.5))).disk == SEVEN.nbytes, "its zeros are counted"
    assert static.disk == SEVEN.nbytes + TEXT.nbytes
    assert static.flops == forward_flops(SEVEN, 128 * 256, 256, head=False)
