"""What a pruning plan says of Llama 3 70B: sizes, sentences and memory from integers alone."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.architecture import Architecture
from pipeline.artifact_spec import DatasetSpec
from pipeline.spec import ModelSpec
from pipeline.target import Target
from stages.structured_prune import StructuredPrune

pytestmark = pytest.mark.usefixtures("bf16_units")  # what is planned is planned for a processor that has them

TARGET = Target(name="host")
CALIBRATION = DatasetSpec(split="calibration", digest="00", nbytes=1)
LLAMA_70B = Architecture(
    model_type="llama", dtype="BF16", vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64,
    num_kv_heads=8, head_dim=128, max_position=131072,
)  # fmt: skip


@pytest.mark.parametrize(
    ("params", "sizes", "sentence"),
    [
        ({"head_ratio": 0.125}, (56, 7, 28672, 80), "heads: removes 12.5 % (56 query / 7 KV heads)"),
        ({"head_ratio": 0.2}, (48, 6, 28672, 80), "heads: asked to remove 20.0 %, 25.0 % is the nearest (48 query / 6 KV heads)"),
        ({"head_ratio": 0.18}, (56, 7, 28672, 80), "heads: asked to remove 18.0 %, 12.5 % is the nearest (56 query / 7 KV heads)"),
        ({"head_ratio": 0.1875}, (56, 7, 28672, 80), "heads: asked to remove 18.8 %, 12.5 % is the nearest (56 query / 7 KV heads)"),
        (
            {"head_ratio": 0.2, "heads": "queries"},
            (48, 8, 28672, 80),
            "heads: asked to remove 20.0 %, 25.0 % is the nearest (48 query / 8 KV heads)",
        ),
        ({"num_heads": 40, "heads": "queries"}, (40, 8, 28672, 80), "heads: removes 37.5 % (40 query / 8 KV heads)"),
        ({"mlp_ratio": 0.2}, (64, 8, 22528, 80), "MLP: asked to remove 20.0 %, 21.4 % is the nearest (width 22528)"),
        ({"mlp_ratio": 0.2, "round_to": 128}, (64, 8, 22912, 80), "MLP: asked to remove 20.0 %, 20.1 % is the nearest (width 22912)"),
        ({"intermediate_size": 20096}, (64, 8, 20096, 80), "MLP: removes 29.9 % (width 20096)"),
        ({"layer_ratio": 0.25}, (64, 8, 28672, 60), "layers: removes 25.0 % (60 of 80 layers)"),
    ],
    ids=str,
)
def test_ratios_go_to_the_nearest_legal_count(params: dict[str, Any], sizes: tuple[int, ...], sentence: str) -> None:
    stage, model = StructuredPrune.from_dict(params), ModelSpec.of(LLAMA_70B)
    a = stage.infer(model, CALIBRATION).architecture
    assert (a.num_heads, a.num_kv_heads, a.intermediate_size, a.num_layers) == sizes
    assert (a.hidden_size, a.head_dim, a.vocab_size) == (8192, 128, 128256)
    assert stage.explain(model)[0] == sentence


def test_a_llama_whose_heads_no_longer_divide_its_width_becomes_a_mistral_and_the_plan_says_so() -> None:
    stage, model = StructuredPrune(StructuredPrune.Params(num_kv_heads=7)), ModelSpec.of(LLAMA_70B)
    assert stage.infer(model, CALIBRATION).architecture.model_type == "mistral"
    assert stage.explain(model)[1].startswith(
        "model_type: written as mistral, because transformers refuses a llama config whose hidden_size 8192"
    )
    assert StructuredPrune(StructuredPrune.Params(num_kv_heads=4)).infer(model, CALIBRATION).architecture.model_type == "llama"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "head_ratio: nothing is pruned; give head_ratio, mlp_ratio or layer_ratio, or a size to keep"),
    ({"head_ratio": 0.01}, "head_ratio: 0.01 of 8 KV heads rounds to nothing removed; the smallest step is 0.125"),
    ({"head_ratio": 0.99}, "head_ratio: 0.99 of 8 KV heads rounds to everything removed; the largest is 0.875"),
    ({"mlp_ratio": 0.001}, "mlp_ratio: 0.001 of 28672 MLP neurons rounds to nothing removed; the smallest step is 0.03571"),
    ({"layer_ratio": 0.001}, "layer_ratio: 0.001 of 80 layers rounds to nothing removed; the smallest step is 0.0125"),
    ({"num_kv_heads": 8}, "num_kv_heads: 8 removes nothing, the model has 8 KV heads; write a smaller number"),
    ({"num_layers": 81}, "num_layers: 81 removes nothing, the model has 80 layers; write a smaller number"),
    ({"num_heads": 42, "heads": "queries"}, "num_heads: 42 query heads cannot be, every one of the 8 KV heads must keep equally many"),
    ({"intermediate_size": 20000}, "the width must be divisible by group_size 128; write 19968 or 20096"),
    ({"head_ratio": 0.5, "group_size": 10000}, "head_ratio: none of the 8 KV heads can go, each holds 1024 columns"),
    ({"head_ratio": 0.2, "num_kv_heads": 7}, "head_ratio: it and num_kv_heads both say how much to remove; give one of them"),
    ({"num_heads": 56}, "num_heads: heads: groups is sized by num_kv_heads; write num_kv_heads, or change heads"),
    ({"mlp_ratio": 0.2, "heads": "queries"}, "heads: it has an effect only where heads are pruned; leave it out"),
    ({"mlp_ratio": 0.2, "num_samples": 64}, "num_samples: it has an effect only where importance is activation or layers are pruned"),
    ({"layer_ratio": 0.2, "importance": "activation"}, "importance: it has an effect only where heads or the MLP are pruned"),
    ({"intermediate_size": 1024, "round_to": 512}, "round_to: it has an effect only where mlp_ratio is given"),
    ({"layer_ratio": 0.2, "group_size": 64}, "group_size: it has an effect only where heads or the MLP are pruned"),
]  # fmt: skip


@pytest.mark.parametrize(("params", "sentence"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_or_has_no_effect_is_refused_in_a_sentence(params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as refusal:
        StructuredPrune.from_dict(params).infer(ModelSpec.of(LLAMA_70B), CALIBRATION)
    assert sentence in str(refusal.value)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"^head_ratio: .*; mlp_ratio: .*; layer_ratio: "):
        StructuredPrune.from_dict({"head_ratio": 0.01, "mlp_ratio": 0.001, "layer_ratio": 0.999}).infer(
            ModelSpec.of(LLAMA_70B), CALIBRATION
        )


def test_a_biased_llama_cannot_become_a_mistral() -> None:
    biased = ModelSpec.of(LLAMA_70B.model_copy(update={"qkv_bias": True, "o_bias": True}))
    with pytest.raises(ValueError, match=r"^head_ratio: 56 heads do not divide hidden_size 8192: .* has no biases"):
        StructuredPrune.from_dict({"head_ratio": 0.125}).infer(biased, CALIBRATION)


def test_calibration_is_wired_only_where_it_is_used() -> None:
    def inputs(**params: Any) -> list[str]:
        return list(StructuredPrune.from_dict(params).inputs())

    assert inputs(mlp_ratio=0.2) == ["model"]
    assert inputs(layer_ratio=0.2) == inputs(mlp_ratio=0.2, importance="activation") == ["model", "calibration"]


def test_a_70b_model_is_pruned_in_the_memory_of_a_layer() -> None:
    model = ModelSpec.of(LLAMA_70B)
    by_magnitude = StructuredPrune.from_dict({"head_ratio": 0.125, "mlp_ratio": 0.2})
    memory = by_magnitude.memory(model, TARGET)
    layer = 2 * 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672)
    assert memory.ram["the matrices of one layer"] == layer
    assert layer < memory.totals["ram"] < 1.5 * layer
    assert memory.disk == {"checkpoint": by_magnitude.infer(model, CALIBRATION).nbytes}
    calibrated = StructuredPrune.from_dict({"mlp_ratio": 0.2, "importance": "activation", "num_samples": 128, "max_length": 2048})
    swept = calibrated.memory(model, TARGET)
    assert swept.ram["calibration hidden states"] == 128 * 2048 * 8192 * 2
    assert swept.totals["ram"] < 10e9


def test_planning_imports_no_torch() -> None:
    code = "import sys, stages.structured_prune; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0
