"""What sparse weights are worth and what keeping them takes, in sentences of a plan. Needs no torch: a plan reads it."""

from pipeline.spec import ModelSpec

SHARED_INPUTS = (  # Linear layers of a decoder layer that read the same input
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def described(model: ModelSpec) -> str:
    """`50 % zeros, 2:4`; the model has a sparsity."""
    assert model.sparsity is not None, "it says how sparse it is"
    pattern = "" if model.sparsity.pattern == "unstructured" else f", {model.sparsity.pattern}"
    return f"{100 * model.sparsity.share:.4g} % zeros{pattern}"


MERGED_ZEROS = "of an adapter's product, which is dense, only what falls on other weights is merged, and the note says how much that is"
ADAPTER_ALONE = "the model's stay, but with the adapter beside it the products are dense; write merge: true for one sparse checkpoint"


def sparse_names(model: ModelSpec) -> frozenset[str]:
    """Names of the tensors whose zeros must stay; none where nothing is known of zeros."""
    groups = model.sparse_groups if model.sparsity else ()
    return frozenset(f"{name}.weight" for group in groups for name in group.module_names)


def merge_cost(lost: float) -> str:
    """`lost`: the share of the squares of an adapter's products that fell on zeros."""
    return (
        f"the model's zeros were kept: they took {lost:.1%} of the adapter's update (of its squares), which was trained as if it were "
        "whole; the training loss is not the merged model's"
    )
