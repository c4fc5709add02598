"""What one sweep of `LayerwiseModel` over calibration text needs. Needs no torch: a plan reads it."""

from pipeline.headers import ITEM_BYTES
from pipeline.spec import ModelSpec
from stages.runtime.windows import MICRO_BATCH_TOKENS, VOCABULARY_ROWS

HIDDEN_STATES = "calibration hidden states"  # the item that stays in RAM where the computation is on a GPU


def sweep_memory(model: ModelSpec, num_samples: int, max_length: int) -> dict[str, int]:
    """Bytes by item: one layer, the hidden states of all windows, and what a micro-batch leaves in between."""
    a = model.architecture
    item, width = ITEM_BYTES[a.dtype], a.num_heads * a.head_dim
    layer = a.hidden_size * (2 * width + 2 * a.num_kv_heads * a.head_dim + 3 * a.intermediate_size)
    tokens = max_length * max(1, min(num_samples, MICRO_BATCH_TOKENS // max_length))
    mlp = tokens * a.intermediate_size * (3 * item + 4)  # gate, up, their product; its sum runs in fp32
    between = max(mlp, tokens * 4 * width * item) + tokens * a.hidden_size * 4 * 4
    return {
        "one decoder layer": layer * item,
        HIDDEN_STATES: num_samples * max_length * a.hidden_size * item,
        "activations of a micro-batch": between,
        "freed blocks that malloc keeps": 2 * between,  # measured at 1 B: half to twice
        "a slice of the embedding": VOCABULARY_ROWS * a.hidden_size * item,
    }
