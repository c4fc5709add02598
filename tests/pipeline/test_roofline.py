"""Textbook figures, and the same from specs."""

import pytest

from pipeline.fit import requantized
from pipeline.roofline import (
    Work,
    crossover_batch,
    decode_bound,
    decode_seconds_per_token,
    decode_work,
    dollars,
    nominal_bytes,
    prefill_tokens_per_second,
    ridge,
    seconds,
)
from pipeline.spec import ModelSpec
from pipeline.target import Target

A100 = Target(name="a100", gpus=1, memory=80 * 2**30, flops=312e12, bandwidth=2e12, price=5)
LLAMA2_7B = ModelSpec.from_config({
    "model_type": "llama", "dtype": "bfloat16", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096,
})  # fmt: skip
LLAMA3_8B = ModelSpec.from_config({
    "model_type": "llama", "dtype": "bfloat16", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
})  # fmt: skip


@pytest.mark.parametrize(
    ("billions", "gigabytes", "gibibytes"),
    [
        (1, (4, 2, 1, 0.5), (3.7, 1.9, 0.9, 0.5)),
        (7, (28, 14, 7, 3.5), (26.1, 13.0, 6.5, 3.3)),
        (13, (52, 26, 13, 6.5), (48.4, 24.2, 12.1, 6.1)),
        (70, (280, 140, 70, 35), (260.8, 130.4, 65.2, 32.6)),
        (405, (1620, 810, 405, 202.5), (1508.7, 754.4, 377.2, 188.6)),
    ],
)
def test_the_table_of_nominal_sizes(billions: int, gigabytes: tuple[float, ...], gibibytes: tuple[float, ...]) -> None:
    sizes = [nominal_bytes(billions * 1e9, bits) for bits in (32, 16, 8, 4)]
    assert tuple(size / 1e9 for size in sizes) == pytest.approx(gigabytes)
    assert tuple(round(size / 2**30, 1) for size in sizes) == gibibytes


def test_seven_billion_weights_at_two_terabytes_per_second() -> None:
    half = seconds(Work(nbytes=nominal_bytes(7e9, 16)), A100, utilisation=1)
    assert half == pytest.approx(7e-3)
    assert 1 / half == pytest.approx(143, abs=0.5)
    assert seconds(Work(nbytes=nominal_bytes(7e9, 4)), A100, utilisation=1) == pytest.approx(half / 4)


def test_the_ridge_of_an_a100() -> None:
    assert ridge(A100) == 156
    assert ridge(Target.host()) is None


def test_a_decode_step_reads_weights_without_the_embedding_and_the_whole_cache() -> None:
    embedding, cache = 32000 * 4096 * 2, 2 * 32 * 32 * 128 * 2 * 1000 * 3
    assert decode_work(LLAMA2_7B, 1000, 3).nbytes == LLAMA2_7B.nbytes - embedding + cache
    step = decode_seconds_per_token(LLAMA2_7B, A100, 1000, 3)
    assert step == pytest.approx((LLAMA2_7B.nbytes - embedding + cache) / 2e12)


def test_a_tied_embedding_is_read_and_multiplied_as_the_head() -> None:
    tied = ModelSpec.of(LLAMA3_8B.architecture.model_copy(update={"tied": True}))
    assert decode_work(tied, 0, 1).nbytes == decode_work(LLAMA3_8B, 0, 1).nbytes == tied.nbytes
    assert decode_work(tied, 0, 1).flops == decode_work(LLAMA3_8B, 0, 1).flops == 2 * tied.num_parameters


def test_the_cache_grows_the_compute_of_attention_too() -> None:
    none, some = decode_work(LLAMA3_8B, 0, 2), decode_work(LLAMA3_8B, 1000, 2)
    assert some.flops - none.flops == 2 * 1000 * 4 * 32 * 32 * 128


def test_without_a_cache_the_batch_at_the_crossover_is_the_ridge() -> None:
    assert crossover_batch(LLAMA2_7B, A100, 0) == pytest.approx(156, rel=1e-3)
    assert decode_bound(LLAMA2_7B, A100, 0, 155) == "bandwidth"
    assert decode_bound(LLAMA2_7B, A100, 0, 157) == "compute"
    packed = crossover_batch(requantized(LLAMA2_7B, 4), A100, 0)
    assert packed == pytest.approx(156 * 4.25 / 16, rel=0.1)  # 4 bits and a 16-bit scale for every 128; the head stays at 16


def test_the_crossover_is_where_both_times_are_equal() -> None:
    batch = crossover_batch(LLAMA3_8B, A100, 500)
    assert batch and batch > 156
    low, high = int(batch), int(batch) + 1
    assert (decode_bound(LLAMA3_8B, A100, 500, low), decode_bound(LLAMA3_8B, A100, 500, high)) == ("bandwidth", "compute")


def test_a_cache_of_full_width_keeps_decoding_bound_by_bandwidth_at_every_batch() -> None:
    assert crossover_batch(LLAMA2_7B, A100, 4096) is None
    assert decode_bound(LLAMA2_7B, A100, 4096, 10_000) == "bandwidth"


def test_tensor_parallelism_divides_the_time_of_a_step() -> None:
    pair = A100.model_copy(update={"gpus": 2})
    one, two = (decode_seconds_per_token(LLAMA3_8B, target, 4096, 8) for target in (A100, pair))
    assert one and two
    assert one / two == pytest.approx(2)
    assert crossover_batch(LLAMA3_8B, pair, 100) == crossover_batch(LLAMA3_8B, A100, 100)


def test_a_prefill_is_bound_by_compute_and_a_prompt_of_one_token_by_bandwidth() -> None:
    body = LLAMA2_7B.num_parameters - 2 * 32000 * 4096
    attention = 2 * 32 * 32 * 128 * 2048  # causal: half of what a token at the end sees
    assert prefill_tokens_per_second(LLAMA2_7B, A100, 2048) == pytest.approx(312e12 / (2 * body + attention))
    alone = prefill_tokens_per_second(LLAMA2_7B, A100, 1)
    assert alone == pytest.approx(2e12 / (LLAMA2_7B.nbytes - 32000 * 4096 * 2))


def test_a_stage_s_hours_and_dollars() -> None:
    compute, traffic = Work(flops=312e12 * 3600 * 0.4), Work(nbytes=2e12 * 1800 * 0.4)
    assert seconds(compute, A100) == pytest.approx(3600)
    assert seconds(compute + traffic, A100) == pytest.approx(3600)  # the longer of the two hides the other
    assert seconds(compute + compute, A100, utilisation=0.8, devices=2) == pytest.approx(1800)
    assert dollars(1800, A100) == 2.5
    assert seconds(Work(), Target.host()) == 0


def test_what_the_target_does_not_state_is_not_guessed() -> None:
    slow = A100.model_copy(update={"flops": None, "price": None})
    assert seconds(Work(flops=1), slow) is None
    assert seconds(Work(nbytes=2e12), slow, utilisation=1) == 1
    assert dollars(3600, slow) is None
    assert dollars(None, A100) is None
    assert decode_seconds_per_token(LLAMA3_8B, slow, 100, 1) is None
    assert decode_bound(LLAMA3_8B, slow, 100, 1) is None
    assert crossover_batch(LLAMA3_8B, slow, 100) is None
    assert prefill_tokens_per_second(LLAMA3_8B, slow, 100) is None


@pytest.mark.parametrize("utilisation", [0, -0.1, 1.1])
def test_a_utilisation_that_is_no_share_is_refused(utilisation: float) -> None:
    with pytest.raises(ValueError, match="is not a share of the peak; write a number above 0 and up to 1"):
        seconds(Work(flops=1), A100, utilisation=utilisation)
