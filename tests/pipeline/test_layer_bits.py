"""Which layer has how many bits, as a report shows it."""

from pipeline.layer_bits import LayerBits, layer_bits
from pipeline.layout import WeightFormat
from pipeline.spec import ModelSpec
from tests.pipeline.test_model_config import MIXTRAL

LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "dtype": "bfloat16",
}  # fmt: skip


def form(bits: int) -> WeightFormat:
    return WeightFormat(num_bits=bits, group_size=32)


def test_each_kind_is_a_row_and_what_stays_dense_is_left_out() -> None:
    q, down = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.down_proj"
    formats = {q.format(n): form(bits) for n, bits in enumerate((4, 3, 4))} | {down.format(0): form(8), down.format(2): form(3)}
    spec = ModelSpec.from_config(LLAMA).with_formats(formats)
    assert layer_bits(spec) == (LayerBits(kind="self_attn.q_proj", bits=(4, 3, 4)), LayerBits(kind="mlp.down_proj", bits=(8, None, 3)))
    with_head = spec.with_formats({"lm_head": form(8)})
    assert layer_bits(with_head)[-1] == LayerBits(kind="lm_head", bits=(8,))


def test_of_layers_that_are_alike_there_is_nothing_to_show() -> None:
    spec = ModelSpec.from_config(LLAMA)
    assert layer_bits(spec) == layer_bits(spec.with_format(form(4), ("lm_head",))) == ()
    assert layer_bits(ModelSpec.from_config(MIXTRAL).with_format(form(4))) == ()
