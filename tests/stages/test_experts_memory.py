"""Mixtures of experts in a plan: a layer holds all of its experts, and a router may be named in `ignore`."""

import math
from pathlib import Path

import pytest
import yaml

from pipeline.artifact_spec import DatasetSpec
from pipeline.spec import ModelSpec
from pipeline.stage import Stage, find_stage
from pipeline.target import Target
from stages.runtime.peak_memory import inner_width, largest_layer, layer_bytes
from stages.runtime.scheme import offloaded_bytes
from tests.pipeline.test_experts import QWEN3_30B_A3B

pytestmark = pytest.mark.usefixtures("bf16_units")  # what is planned is planned for a processor that has them

CPU, GPU = Target(name="cpu"), Target(name="gpu", gpus=1)
DATA = DatasetSpec(split="calibration", digest="0", nbytes=10_000_000)
H, I, KV, EXPERTS = 4096, 14336, 1024, 8  # noqa: E741  # Mixtral 8x7B
LAYER = 2 * (2 * H * H + 2 * KV * H + EXPERTS * 3 * H * I)  # bytes of its attention and all experts in bf16


@pytest.fixture(scope="module")
def mixtral() -> ModelSpec:
    content = yaml.safe_load((Path(__file__).parents[2] / "conf/model/mixtral_8x7b.yaml").read_text())
    return ModelSpec.from_config(content["architecture"])


def stage(name: str, params: dict[str, object] | None = None, **execution: object) -> Stage:
    return find_stage(name).from_dict(params or {}, execution)


def test_a_layer_is_its_attention_and_all_of_its_experts(mixtral: ModelSpec) -> None:
    assert layer_bytes(mixtral) == LAYER
    assert inner_width(mixtral.architecture) == 2 * I  # of the two experts that a token visits


def test_where_layers_differ_the_largest_counts() -> None:
    dense_first = ModelSpec.from_config(QWEN3_30B_A3B | {"mlp_only_layers": [0]})
    attention, expert, mlp = 2 * 2048 * (4096 + 512), 3 * 2048 * 768, 3 * 2048 * 6144
    assert layer_bytes(dense_first) == 2 * (attention + 128 * expert) > 2 * (attention + mlp)
    assert layer_bytes(ModelSpec.from_config(QWEN3_30B_A3B | {"num_experts": 8, "mlp_only_layers": [0]})) == 2 * (attention + mlp)
    some = stage("rtn", {"ignore": ["lm_head", r"re:model\.layers\.[1-9].*", r"re:.*self_attn.*"]}).infer(dense_first)
    rounded = [group for group in some.groups if not group.format.is_dense]
    assert largest_layer(rounded, lambda group: math.prod(group.shape)) == mlp  # of layer 0, the only one that is rounded


def test_gptq_gathers_a_hessian_for_every_expert(mixtral: ModelSpec) -> None:
    hessians = 4 * (4 * H**2 + EXPERTS * (2 * H**2 + I**2))  # q k v o; gate and up, down
    on_cpu = stage("gptq", offload="disk").memory(model=mixtral, calibration=DATA, target=CPU)
    assert on_cpu.ram["Hessians of one layer"] == hessians
    on_gpu = stage("gptq", offload="disk").memory(model=mixtral, calibration=DATA, target=GPU)
    assert on_gpu.vram["Hessians of one layer"] == hessians
    assert on_gpu.vram["one layer"] == 2 * LAYER  # in float32
    assert on_gpu.ram["one layer, or the embedding"] == LAYER


def test_awq_and_the_layerwise_stages_hold_a_layer_with_all_experts(mixtral: ModelSpec) -> None:
    assert stage("awq").memory(model=mixtral, calibration=DATA, target=GPU).vram["one layer"] == LAYER
    teacher = stage("teacher_logits", mode="layerwise").memory(teacher=mixtral, train=DATA, target=CPU)
    assert teacher.ram["one decoder layer"] == LAYER
    evaluated = stage("evaluate", mode="layerwise").memory(model=mixtral, eval=DATA, target=CPU)
    assert evaluated.ram["the largest decoder layer"] == LAYER
    assert stage("kv_cache", {"mode": "static"}).memory(model=mixtral, calibration=DATA, target=CPU).ram["one decoder layer"] == LAYER


def test_changed_experts_are_all_written_to_disk(mixtral: ModelSpec) -> None:
    quantized = stage("gptq").infer(model=mixtral, calibration=DATA)
    changed = {name for group in quantized.linear_groups if not group.format.is_dense for name in group.module_names}
    weights = 32 * LAYER // 2
    assert offloaded_bytes(quantized, changed) == 2 * weights + weights // 128 * 3


@pytest.mark.parametrize("entry", ["re:.*block_sparse_moe.gate", "model.layers.31.block_sparse_moe.gate", "re:.*block_sparse_moe.gate$"])
def test_a_router_may_be_ignored_as_recipes_of_llm_compressor_do(mixtral: ModelSpec, entry: str) -> None:
    for name in ("rtn", "gptq", "awq"):
        data = {} if name == "rtn" else {"calibration": DATA}
        assert stage(name, {"ignore": ["lm_head", entry]}).infer(model=mixtral, **data) == stage(name).infer(model=mixtral, **data)


@pytest.mark.parametrize("entry", ["re:.*mlp.gate$", "model.layers.32.block_sparse_moe.gate", "model.layers.0.block_sparse_moe"])
def test_what_matches_neither_a_linear_layer_nor_a_router_is_refused(mixtral: ModelSpec, entry: str) -> None:
    with pytest.raises(ValueError, match=r"^ignore: .* matches no Linear layer"):
        stage("rtn", {"ignore": ["lm_head", entry]}).infer(mixtral)


def test_ignoring_routers_alone_leaves_everything_to_quantize_and_no_layer_without_them_matches() -> None:
    dense = ModelSpec.from_config({**QWEN3_30B_A3B, "model_type": "qwen3"})
    with pytest.raises(ValueError, match="matches no Linear layer"):
        stage("rtn", {"ignore": ["lm_head", "re:.*mlp.gate$"]}).infer(dense)
