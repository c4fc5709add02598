"""The sentences on speed say the roofline's figures, those that textbooks give."""

from pipeline.speed import speed
from pipeline.target import Target
from tests.pipeline.test_fit import LLAMA2_13B

CARD = Target(name="card", gpus=1, memory=80 * 2**30, flops=312e12, bandwidth=2e12, price=3.6)


def test_one_sequence_decodes_as_fast_as_weights_and_cache_are_read() -> None:
    found = speed(LLAMA2_13B, CARD, context=1, batch=1)
    assert found is not None and found.bound == "bandwidth"
    read = LLAMA2_13B.nbytes - 2 * 32000 * 5120 + LLAMA2_13B.kv_cache.bytes_per_token  # of the embedding, a row
    assert found.decode_seconds * CARD.bandwidth == read  # type: ignore[operator]
    assert found.dollars_per_million_tokens == 1e6 * found.decode_seconds * 3.6 / 3600
    assert found.intensity < 2 < found.ridge == 156


def test_a_batch_shares_the_reading_until_compute_binds() -> None:
    one, many = (speed(LLAMA2_13B, CARD, context=1, batch=batch) for batch in (1, 400))
    assert one is not None and many is not None and one.crossover_batch is not None
    assert 150 < one.crossover_batch < 160 and many.bound == "compute"
    assert "compute does from batch" in one.sentences()[0] and "above the ridge at 156" in many.sentences()[0]
    assert 150 < many.decode_tokens_per_second / one.decode_tokens_per_second < 160


def test_with_a_long_context_no_batch_is_enough_and_that_is_said() -> None:
    found = speed(LLAMA2_13B, CARD, context=4096, batch=8)
    assert found is not None and found.crossover_batch is None
    assert "at no batch" in found.sentences()[0] and "$" in found.sentences()[0]


def test_without_a_peak_or_a_price_nothing_is_made_up() -> None:
    assert speed(LLAMA2_13B, Target(name="host"), context=1, batch=1) is None
    free = speed(LLAMA2_13B, CARD.model_copy(update={"price": None}), context=1, batch=1)
    assert free is not None and free.dollars_per_million_tokens is None and "$" not in free.sentences()[0]
