"""The terms that stages' memory is made of. Whether they are true is measured by bench/memory.py."""

from typing import Any

import pytest

from pipeline.artifact_spec import DatasetSpec
from pipeline.layout import WeightFormat
from pipeline.spec import ModelSpec
from pipeline.stage import find_stage
from pipeline.target import Memory, Target
from stages.runtime.peak_memory import freed_activations, kept_by_malloc, peak, resident_memory, widest

pytestmark = pytest.mark.usefixtures("bf16_units")  # what is planned is planned for a processor that has them

CPU, GPU = Target(name="cpu"), Target(name="gpu", gpus=1)
TEXT = DatasetSpec(split="train", digest="0", nbytes=1_000_000)
MODEL = ModelSpec.from_config({
    "model_type": "llama", "dtype": "bfloat16", "vocab_size": 4096, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2048,
})  # fmt: skip
W4 = WeightFormat(num_bits=4, group_size=128)


def memory(name: str, params: dict[str, Any], execution: dict[str, Any], target: Target = CPU, **specs: ModelSpec | DatasetSpec) -> Memory:
    return find_stage(name).from_dict(params, execution).memory(**specs, target=target)


def test_the_phase_that_takes_most_counts_and_not_the_sum() -> None:
    assert peak({"a": 2, "b": 2}, {"c": 3}) == {"a": 2, "b": 2}
    assert peak({"a": 2}, {"b": 1, "c": 2}) == {"b": 1, "c": 2}
    assert peak({}, {}) == {}


def test_the_widest_part_of_a_layer_is_its_mlp_or_else_its_attention() -> None:
    assert widest(MODEL.architecture) == 3 * 2048 + 3 * 8192
    narrow = MODEL.architecture.model_copy(update={"intermediate_size": 1024})
    assert widest(narrow) == 3 * 2048 + 3 * 2048 + 4 * 512


def test_packed_weights_are_unpacked_in_ram_wherever_the_model_then_goes() -> None:
    packed = MODEL.with_format(W4, ("lm_head",))
    weights = MODEL.nbytes - 2 * (2 * 4096 * 2048 + 33 * 2048)  # of its decoder layers, without embeddings and norms
    files = packed.nbytes - (MODEL.nbytes - weights)
    beside, here = resident_memory("model", packed, on_gpu=False)
    assert not beside and here == {"model, dense": MODEL.nbytes, "model, packed, in its mapped files": files}
    beside, there = resident_memory("model", packed, on_gpu=True)
    assert sum(beside.values()) == weights + files and there == {"model, dense": MODEL.nbytes}
    assert resident_memory("model", MODEL, on_gpu=True) == ({}, {"model, dense": MODEL.nbytes})


def test_malloc_keeps_blocks_of_its_heap_and_returns_larger_ones() -> None:
    """At this width a gate_proj is 32 MiB, a mapping of its own; norms are a page, and what holds such blocks is trimmed."""
    attention = 2 * (2 * 2048 * 2048 + 2 * 512 * 2048)
    assert kept_by_malloc(MODEL) == 16 * attention + 2 * 2 * 4096 * 2048


def test_activations_in_mappings_of_their_own_are_not_kept() -> None:
    """2,048 tokens make 32 MiB of a projection to 8,192 neurons: then only the attention's narrower tensors are in the heap."""
    assert freed_activations(MODEL, 512) == 2 * 512 * widest(MODEL.architecture)
    assert freed_activations(MODEL, 2048) == 2 * 2048 * (3 * 2048 + 3 * 2048 + 4 * 512)
    assert freed_activations(MODEL, 1 << 20) == 0


def test_reloading_is_the_peak_of_a_calibration_that_takes_little() -> None:
    few = {"num_samples": 1, "max_length": 32}
    ram = memory("awq", few, {}, model=MODEL, calibration=TEXT).ram
    assert ram["the result, dense"] == MODEL.nbytes and ram["freed weights that malloc keeps"] == kept_by_malloc(MODEL)
    on_disk = memory("awq", few, {"offload": "disk"}, model=MODEL, calibration=TEXT).ram
    assert "the result, dense" not in on_disk and sum(on_disk.values()) < MODEL.nbytes


def test_gradients_take_the_place_of_activations_where_an_update_has_one_micro_batch() -> None:
    params, specs = {"global_batch_size": 4, "num_samples": 64, "alpha": 0}, {"student": MODEL, "train": TEXT}
    accumulating, at_once = (memory("distill", params, {"micro_batch_size": micro}, **specs).totals["ram"] for micro in (2, 4))
    assert at_once < accumulating  # twice the activations weigh less than gradients beside them
    gradients, data = 4 * MODEL.num_parameters, 10 * TEXT.nbytes
    little = {**params, "max_length": 2}  # then the gradients are all that counts
    assert memory("distill", little, {"micro_batch_size": 4}, **specs).totals["ram"] == 4 * gradients + data


def test_loading_the_base_is_the_peak_of_training_adapters_on_little() -> None:
    params, specs = {"max_length": 32, "global_batch_size": 1}, {"model": MODEL, "train": TEXT}
    on_cpu, on_gpu = (memory("qlora", params, {"micro_batch_size": 1}, target, **specs) for target in (CPU, GPU))
    assert on_cpu.ram["the files that it is read from"] == MODEL.nbytes
    assert "the files that it is read from" not in on_gpu.ram | on_gpu.vram
    much = memory("qlora", {"max_length": 2048}, {"micro_batch_size": 8}, model=MODEL, train=TEXT.model_copy(update={"nbytes": 10**7}))
    assert "NF4 base" in much.ram and "the files that it is read from" not in much.ram
