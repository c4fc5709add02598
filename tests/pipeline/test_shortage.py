"""What does not fit the machine that is to run it is said with its sum, and with a change that, made, does fit."""

from collections.abc import Mapping
from typing import Any

import pytest

from pipeline.artifact_spec import DatasetSpec
from pipeline.compose import resources
from pipeline.served import known_targets
from pipeline.shortage import CUDA_BYTES, Shortage, shortage
from pipeline.spec import ModelSpec
from pipeline.stage import Stage
from pipeline.target import Target
from stages.distill import Distill
from stages.evaluate import Evaluate
from stages.gptq import GPTQ
from stages.rtn import RTN
from tests.pipeline.test_fit import LLAMA2_13B

TEXT = DatasetSpec(split="train", file_format="jsonl", digest="0", nbytes=10**9)
CARD = Target(name="card", gpus=1, memory=24 * 10**9, ram=64 * 10**9)
TRAINING = {"num_samples": 64, "max_length": 2048}


def found(stage: Stage, machine: Target, others: Mapping[str, Target] | None = None, **specs: Any) -> Shortage | None:
    return shortage("node", stage, specs, machine, lambda: others or {})


def test_what_fits_is_no_shortage_and_other_machines_are_not_even_looked_for() -> None:
    def others() -> Mapping[str, Target]:
        raise AssertionError("nothing is lacking")

    layerwise = Evaluate.from_dict({}, {"mode": "layerwise"})
    assert shortage("node", layerwise, {"model": LLAMA2_13B, "eval": TEXT}, CARD, others) is None


@pytest.mark.usefixtures("bf16_units")
def test_the_change_that_is_named_is_the_nearest_that_fits() -> None:
    stage = GPTQ.from_dict({"num_samples": 512, "max_length": 2048}, {"batch_size": 32})
    lacking = found(stage, CARD, model=LLAMA2_13B, calibration=TEXT)
    assert lacking is not None and lacking.place == "vram" and lacking.room == CARD.memory
    setting, _, value = lacking.remedies[0].removeprefix("stages.node.execution.").partition("=")
    assert setting == "batch_size"
    for size, fits in ((int(value), True), (2 * int(value), False)):
        tried = GPTQ(stage.params, stage.execution.model_copy(update={"batch_size": size}))
        need = tried.memory(model=LLAMA2_13B, calibration=TEXT, target=CARD).totals["vram"]
        assert (need + CUDA_BYTES <= lacking.room) is fits


def test_where_no_single_change_is_enough_the_fewest_together_are_named() -> None:
    stage = Distill.from_dict(TRAINING, {"micro_batch_size": 16})
    lacking = found(stage, CARD, student=LLAMA2_13B, train=TEXT, teacher=LLAMA2_13B)
    assert lacking is not None
    named = lacking.remedies[0].split(" and ")
    assert "stages.node.method=lora" in named and len(named) > 1
    assert f"{lacking.needed / 1e9:.3g} GB of VRAM" in lacking.sentence and lacking.sentence.startswith("stages.node: needs ")


def test_a_loaded_teacher_may_be_replaced_by_its_logits() -> None:
    stage = Distill.from_dict({**TRAINING, "method": "lora"}, {"micro_batch_size": 1, "gradient_checkpointing": True})
    lacking = found(stage, CARD, student=LLAMA2_13B, train=TEXT, teacher=LLAMA2_13B)
    assert lacking is not None
    assert lacking.remedies[0].startswith("stages.node.inputs.teacher=<a teacher_logits stage")


@pytest.mark.usefixtures("bf16_units")
def test_among_larger_machines_the_cheapest_that_is_enough_is_named() -> None:
    stage = Evaluate.from_dict({}, {"batch_size": 1})
    lacking = found(stage, CARD, known_targets(resources()), model=LLAMA2_13B, eval=TEXT)
    assert lacking is not None
    assert lacking.remedies == ("stages.node.execution.mode=layerwise", "a larger machine, a100_40gb ($3.50 per hour)")


def test_ram_is_checked_where_it_is_known_and_where_nothing_helps_the_sentence_says_so() -> None:
    small = Target(name="laptop", ram=10**9)
    lacking = found(RTN(), small, model=LLAMA2_13B)
    assert lacking is not None and lacking.place == "ram" and lacking.remedies == ()
    assert lacking.sentence.endswith("no change that is known makes it fit")
    assert found(RTN(), Target(name="unknown"), model=LLAMA2_13B) is None


@pytest.mark.parametrize("unified", [False, True])
def test_stages_compute_on_the_processor_where_memory_is_unified(unified: bool) -> None:
    machine = Target(name="laptop", gpus=1, memory=20 * 10**9, ram=26 * 10**9, unified=unified)
    lacking = found(Evaluate(), machine, model=LLAMA2_13B, eval=TEXT)
    assert isinstance(LLAMA2_13B, ModelSpec) and lacking is not None
    assert lacking.place == ("ram" if unified else "vram")
