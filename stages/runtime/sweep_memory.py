"""What one sweep of `LayerwiseModel` over calibration text needs. Needs no torch: a plan reads it."""

from pipeline.headers import ITEM_BYTES
from pipeline.spec import ModelSpec
from stages.runtime.peak_memory import freed_activations, layer_bytes, widest
from stages.runtime.windows import MICRO_BATCH_TOKENS, VOCABULARY_ROWS

HIDDEN_STATES = "calibration hidden states"  # the item that stays in RAM where the computation is on a GPU


def sweep_memory(model: ModelSpec, num_samples: int, max_length: int) -> dict[str, int]:
    """Bytes by item: one layer, the hidden states of all windows, and what a micro-batch leaves in between."""
    a, item = model.architecture, ITEM_BYTES[model.dtype]
    tokens = max_length * max(1, min(num_samples, MICRO_BATCH_TOKENS // max_length))
    compared = tokens * 4 * 2 * a.hidden_size  # around a layer, in fp32
    return {
        "one decoder layer": layer_bytes(model),
        HIDDEN_STATES: num_samples * max_length * a.hidden_size * item,
        "activations of a micro-batch": tokens * widest(a) * item + compared,
        "freed blocks that malloc keeps": freed_activations(model, tokens) + compared,  # measured: 0.6 to 2.2 of it
        "a slice of the embedding": min(VOCABULARY_ROWS, a.vocab_size) * a.hidden_size * item,
    }
