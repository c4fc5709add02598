import re

import pytest

from pipeline.errors import InputProblems
from pipeline.fit import Change, Fit, bits_sentence, capacity, fit, requantized
from pipeline.layout import WeightFormat
from pipeline.spec import ModelSpec
from pipeline.target import Target
from tests.pipeline.test_target import FILES, shipped
from tests.yardsticks import import_seconds, work_seconds

TARGETS = {file.stem: shipped(file.stem) for file in FILES}
A100, RTX4090, NVL = TARGETS["a100_80gb"], TARGETS["rtx4090"], TARGETS["h100_nvl_188gb"]


def llama(hidden: int, width: int, layers: int, heads: int, kv_heads: int, positions: int, vocab: int = 128256) -> ModelSpec:
    return ModelSpec.from_config({
        "model_type": "llama", "dtype": "bfloat16", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": width, "head_dim": 128,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": positions,
    })  # fmt: skip


LLAMA2_13B = llama(5120, 13824, 40, 40, 40, 4096, vocab=32000)
LLAMA3_70B = llama(8192, 28672, 80, 64, 8, 131072)
LLAMA3_405B = llama(16384, 53248, 126, 128, 8, 131072)


def packed(spec: ModelSpec) -> ModelSpec:
    return spec.with_format(WeightFormat(num_bits=4, group_size=128), ("lm_head",)).with_cache("per_token_head")


def change(found: Fit, setting: str) -> Change:
    return next(change for change in found.changes if change.setting == setting)


def with_change(spec: ModelSpec, target: Target, found: Fit, made: Change) -> Fit:
    """The verdict after that one change, made by hand."""
    context, batch = found.context, found.batch
    if made.setting == "num_bits":
        spec = requantized(spec, int(made.value))
    elif made.setting == "kv_cache":
        spec = spec.with_cache("per_token_head")
    elif made.setting == "target":
        target = TARGETS[str(made.value)]
    elif made.setting == "context":
        context = int(made.value)
    elif made.setting == "batch":
        batch = int(made.value)
    else:
        old, value = spec.architecture, int(made.value)
        sizes = {made.setting: value}
        if made.setting == "num_kv_heads":
            sizes["num_heads"] = value * old.num_heads // old.num_kv_heads
        assert not spec.is_dense
        spec = packed(ModelSpec.of(old.model_copy(update=sizes)))
    return fit(spec, target, context, batch)


def test_70b_fits_one_a100_at_8_x_32k_only_when_pruned() -> None:
    pruned = fit(packed(llama(8192, 22528, 80, 56, 7, 131072)), A100, 32768, 8)
    assert pruned.fits
    assert pruned.weights + pruned.cache == pytest.approx(71.3e9, rel=0.005)
    assert pruned.sentences() == [
        "8 x 32,768 tokens fit a100_80gb: 32.5 GB of weights + 38.8 GB of KV cache + 10.7 GB kept for the engine = 82 GB of 85.9 GB",
        "the longest context at batch 8 is 36,076 tokens, the largest batch at 32,768 tokens is 8",
    ]
    whole = fit(packed(LLAMA3_70B), A100, 32768, 8, TARGETS)
    assert not whole.fits
    assert whole.weights + whole.cache == pytest.approx(84e9, rel=0.005)
    assert whole.sentences()[1] == "nearest change that fits: serve.context=26383 instead of 32768"
    assert {made.setting for made in whole.changes} == {"context", "batch", "num_kv_heads", "target", "num_bits"}


@pytest.mark.parametrize(
    ("spec", "target", "context", "batch"),
    [
        (packed(LLAMA3_70B), A100, 32768, 8),
        (packed(LLAMA3_70B), A100, 32768, 7),
        (LLAMA2_13B, RTX4090, 4096, 2),
        (requantized(LLAMA2_13B, 8), RTX4090, 4096, 4),
        (packed(LLAMA3_405B), NVL, 8192, 1),
    ],
)
def test_every_change_offered_fits_and_the_nearest_is_first(spec: ModelSpec, target: Target, context: int, batch: int) -> None:
    found = fit(spec, target, context, batch, TARGETS)
    assert not found.fits
    assert found.changes
    for made in found.changes:
        assert with_change(spec, target, found, made).fits, made.sentence
    shares = [made.share for made in found.changes]
    assert shares == sorted(shares)


def test_a_change_is_the_smallest_that_fits() -> None:
    spec = packed(LLAMA3_70B)
    found = fit(spec, A100, 32768, 8, TARGETS)
    for setting in ("context", "batch", "num_kv_heads"):
        made = change(found, setting)
        assert not with_change(spec, A100, found, made.model_copy(update={"value": int(made.value) + 1})).fits
    close = fit(spec, A100, 32768, 7, TARGETS)
    made = change(close, "intermediate_size")
    assert int(made.value) % 128 == 0
    assert not with_change(spec, A100, close, made.model_copy(update={"value": int(made.value) + 128})).fits


def test_the_limits_told_where_it_fits_are_exact() -> None:
    spec = packed(LLAMA3_70B)
    found = fit(spec, A100, 8192, 3)
    assert found.fits
    assert fit(spec, A100, found.longest_context, 3).fits
    assert not fit(spec, A100, found.longest_context + 1, 3).fits
    assert fit(spec, A100, 8192, found.largest_batch).fits
    assert not fit(spec, A100, 8192, found.largest_batch + 1).fits


def test_13b_on_a_4090_needs_int4_from_batch_3_on() -> None:
    assert fit(LLAMA2_13B, RTX4090, 4096, 2, TARGETS).sentences() == [
        "2 x 4,096 tokens do not fit rtx4090: 26 GB of weights + 6.71 GB of KV cache + 4.72 GB kept for the engine = 37.5 GB of 25.8 GB",
        "nearest change that fits: num_bits=8 for the linear layers: 26 GB -> 13.5 GB of weights",
        "or: target=a100_40gb: 1 x 42.9 GB, $3.50 per hour",
    ]
    assert fit(requantized(LLAMA2_13B, 8), RTX4090, 4096, 2).fits
    three = fit(requantized(LLAMA2_13B, 8), RTX4090, 4096, 3)
    assert not three.fits
    assert change(three, "num_bits").value == 4
    assert bits_sentence(LLAMA2_13B, RTX4090, 4096) == (
        "rtx4090: 8 bits leave room for 9,145 tokens of cache, 2 x 4,096; "
        "from batch 3 on 4 bits are needed, which leave room for 16,889 tokens of cache, 4 x 4,096"
    )
    assert capacity(requantized(LLAMA2_13B, 8), RTX4090) == 9145


def test_eight_bits_are_offered_before_anything_that_costs_quality_or_load() -> None:
    found = fit(requantized(LLAMA2_13B, 8), RTX4090, 4096, 4, TARGETS)
    assert found.changes[0].sentence == "an INT8 KV cache (stage kv_cache): 819,200 -> 422,400 bytes per token"


def test_405b_at_4_bits_is_too_much_for_a_pair_of_94_gb_and_at_3_bits_it_is_not() -> None:
    found = fit(packed(LLAMA3_405B), NVL, 8192, 1, TARGETS)
    assert found.sentences()[0].startswith("1 x 8,192 tokens do not fit h100_nvl_188gb: on each of 2 GPUs: 108 GB of weights + ")
    assert change(found, "num_bits").value == 3
    assert int(change(found, "intermediate_size").value) % 256 == 0  # each GPU's part in whole groups


def test_two_gpus_share_weights_and_cache_and_each_keeps_its_own_reserve() -> None:
    pair = A100.model_copy(update={"gpus": 2, "reserve": 10**9})
    found = fit(LLAMA3_70B, pair, 4096, 2)
    assert (found.weights, found.cache, found.kept) == (LLAMA3_70B.nbytes // 2, 327_680 * 4096, 10**9)
    assert capacity(LLAMA3_70B, pair) == (2 * (85_899_345_920 - 10**9) - LLAMA3_70B.nbytes) // 327_680


def test_a_machine_without_a_gpu_is_held_to_its_ram() -> None:
    found = fit(LLAMA2_13B, Target(name="server", ram=64 * 2**30), 4096, 1)
    assert found.fits
    assert found.room == 64 * 2**30


def test_where_no_single_change_is_enough_it_is_said() -> None:
    found = fit(LLAMA3_405B, RTX4090, 8192, 1, TARGETS)
    assert found.changes == ()
    assert found.sentences()[1] == "no single change of bits, KV cache, context, batch, size or target makes it fit"
    assert bits_sentence(LLAMA3_405B, RTX4090, 8192) == "rtx4090: not one sequence of 8,192 tokens fits, at 2 bits either"


def test_a_larger_target_is_the_smallest_that_fits_and_can_share_the_heads() -> None:
    found = fit(LLAMA3_70B, A100, 4096, 1, TARGETS)
    assert change(found, "target").value == "h100_nvl_188gb"
    seven = ModelSpec.of(LLAMA3_70B.architecture.model_copy(update={"num_heads": 56, "num_kv_heads": 7}))
    assert "target" not in {made.setting for made in fit(seven, A100, 4096, 1, TARGETS).changes}


def test_a_tiny_model_is_packed_in_groups_that_divide_it() -> None:
    small = llama(96, 160, 2, 2, 1, 512, vocab=256)
    form = next(group.format for group in requantized(small, 4).groups if not group.format.is_dense)
    assert form.group_size == 32
    card = Target(name="card", gpus=1, memory=small.nbytes + 512 * small.kv_cache.bytes_per_token - 100, reserve=0)
    assert change(fit(small, card, 512, 1), "num_bits").value == 8


@pytest.mark.parametrize(
    ("target", "context", "sentences"),
    [
        (
            Target(name="mine", gpus=2),
            10,
            ["target.memory: the memory of a GPU of mine is not known; write for example target.memory=80GiB"],
        ),
        (Target(name="mine"), 10, ["target.ram: mine has no GPU and its RAM is not known; write for example target.ram=64GiB"]),
        (
            A100.model_copy(update={"gpus": 6}),
            200_000,
            [
                "target.gpus: 8 KV heads cannot be dealt out evenly to 6 GPUs; write target.gpus=4",
                "serve.context: 200,000 tokens are more than the 131,072 positions of the model; write serve.context=131072 or less",
            ],
        ),
    ],
)
def test_what_cannot_be_told_is_one_sentence_each_all_at_once(target: Target, context: int, sentences: list[str]) -> None:
    with pytest.raises(InputProblems) as caught:
        fit(LLAMA3_70B, target, context, 1)
    assert caught.value.problems == sentences
    with pytest.raises(InputProblems, match=re.escape(sentences[0])):
        bits_sentence(LLAMA3_70B, target, context)


def test_asking_is_quick_enough_for_a_thousand_orders() -> None:
    spec = packed(LLAMA3_70B)
    assert work_seconds(lambda: fit(spec, A100, 32768, 8, TARGETS), repeats=10) < 0.1 * import_seconds()
