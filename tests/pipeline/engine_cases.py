"""Checkpoints planted for the rules of pipeline/engines/*.yaml: for each rule of each engine, one that breaks it."""

from collections.abc import Mapping
from typing import Any

from pipeline.engine_facts import Facts
from pipeline.engine_folder import config_facts

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}  # fmt: skip
W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True, "dynamic": False}
W8 = {**W4, "num_bits": 8, "strategy": "channel", "group_size": None}
A8 = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
FP8 = {**W8, "type": "float"}
NVFP4 = {**W4, "type": "float", "strategy": "tensor_group", "group_size": 16}
KV8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}
BLOCK_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
LORA = {"r": 16, "base_model_name_or_path": "org/base"}


def model(**fields: Any) -> Facts:
    """Of a config.json: an 8B Llama with `fields` changed, its tensors as it says."""
    return config_facts({**LLAMA, **fields}).model_copy(update={"stored": "safetensors", "misfits": 0})


def quantized(quantization: Mapping[str, Any], **facts: Any) -> Facts:
    return model(quantization_config=dict(quantization)).model_copy(update=facts)


def packed(
    weights: Mapping[str, Any] = W4, inputs: Mapping[str, Any] | None = None, form: str = "pack-quantized", **more: Any
) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": dict(inputs) if inputs else None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, **more}


def facts_of(**fields: Any) -> Facts:
    return Facts(**fields)


DENSE, PACKED = model(), quantized(packed())
MIXED = packed() | {"config_groups": {"a": {"weights": W4}, "b": {"weights": {**W4, "num_bits": 8}}}}
TORN = packed() | {
    "config_groups": {
        "a": {"targets": ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"], "weights": W4},
        "b": {"targets": ["model.layers.0.mlp.up_proj"], "weights": {**W4, "num_bits": 8}},
    }
}
GGUF = facts_of(stored="gguf", file="model.gguf", architecture="llama", heads=32, head_dim=128, context=4096)
ADAPTER = facts_of(stored="adapter", rank=16, lora_rank=16, base_model="org/base", use_dora=False, lora_bias=False, modules_to_save=False)
PICKLED = DENSE.model_copy(update={"stored": "pickle"})
UNEVEN = {"misfits": 2, "misfit": "model.layers.1.mlp.up_proj.weight is [96, 64] and config.json says [128, 64]"}
ZEROS = DENSE.model_copy(update={"zeros": "2:4"})
SPARSE = {"sparsity_config": {"format": "sparse-24-bitmask", "targets": ["Linear"]}}

VLLM = {
    "architecture_named": model(architectures=None),
    "architecture_own": model(architectures=["NovelForCausalLM"]),
    "architecture_through_transformers": model(architectures=["SmolLM3ForCausalLM"]),
    "method_known": quantized({"quant_method": "olive"}),
    "method_deprecated": quantized({"quant_method": "fbgemm_fp8"}),
    "tensors_as_config": DENSE.model_copy(update=UNEVEN),
    "heads_deal_out": model(num_attention_heads=24, num_key_value_heads=8, head_dim=128),
    "dtype_narrowed": model(dtype="float32"),
    "pack_strategy": quantized(packed({**W4, "strategy": "tensor", "group_size": None})),
    "pack_torn": quantized(TORN),
    "pack_bits": quantized(packed({**W4, "num_bits": 1})),
    "pack_dtype": quantized(packed(), packed_dtype="U8"),
    "pack_dense": quantized(packed({**W4, "num_bits": 3}), padded=True),
    "pack_kernel": quantized(packed({**W4, "num_bits": 3})),
    "pack_groups": quantized(packed({**W4, "group_size": 8})),
    "pack_order": quantized(packed({**W4, "actorder": "group"})),
    "pack_g_idx": quantized(packed(), g_idx=True),
    "pack_gpu": PACKED,
    "int_unquantized": quantized(packed(W8, form="int-quantized")),
    "int8_weights": quantized(packed({**W8, "symmetric": False}, A8, "int-quantized")),
    "int8_activations": quantized(packed(W8, {**A8, "strategy": "tensor"}, "int-quantized")),
    "int8_gpu": quantized(packed(W8, A8, "int-quantized")),
    "fp8_weights": quantized(packed({**FP8, "strategy": "group", "group_size": 128}, form="float-quantized")),
    "fp8_activations": quantized(packed(FP8, {**A8, "type": "float", "dynamic": False}, "float-quantized")),
    "fp8_gpu": quantized(BLOCK_FP8),
    "nvfp4_groups": quantized(packed({**NVFP4, "group_size": 32}, form="nvfp4-pack-quantized")),
    "nvfp4_gpu": quantized(packed(NVFP4, form="nvfp4-pack-quantized")),
    "mxfp4_gpu": quantized(packed({**NVFP4, "strategy": "group", "group_size": 32}, form="mxfp4-pack-quantized")),
    "compressed_format": quantized(packed(form="marlin-24")),
    "sparsity": quantized(packed(**SPARSE)),
    "zeros": ZEROS,
    "kv_scheme": quantized(packed(kv_cache_scheme={**KV8, "type": "int"})),
    "cache_static": DENSE.model_copy(update={"cache": "static"}),
    "cache_narrow": model(head_dim=16).model_copy(update={"cache": "per_token_head"}),
    "gptq_scheme": quantized({**GPTQ, "bits": 3}),
    "gptq_order": quantized({**GPTQ, "desc_act": True}),
    "awq_bits": quantized({**AWQ, "bits": 8}),
    "awq_kernel": quantized({**AWQ, "group_size": 16}),
    "older_gpu": quantized(AWQ),
    "bitsandbytes_plugin": quantized(BITSANDBYTES),
    "gguf_plugin": GGUF,
    "pickled": PICKLED,
    "lora_rank": ADAPTER.model_copy(update={"rank": 600, "lora_rank": None}),
    "lora_features": ADAPTER.model_copy(update={"use_dora": True}),
    "lora_base": ADAPTER,
}
TRANSFORMERS = {
    "type_named": model(model_type=None),
    "type_known": model(model_type="novel"),
    "tensors_as_config": DENSE.model_copy(update=UNEVEN),
    "heads_deal_out": VLLM["heads_deal_out"],
    "method_known": quantized({"quant_method": "modelopt"}),
    "reordered": VLLM["pack_g_idx"],
    "transformed": quantized(packed(transform_config={"config_groups": {"v": {}}})),
    "padded": VLLM["pack_dense"],
    "compressed_format": quantized(packed(form="marlin-24")),
    "bitmask": quantized(packed(**SPARSE)),
    "zeros": quantized(packed(sparsity_config={"format": "dense", "targets": ["Linear"]})),
    "nvfp4_dtype": model(dtype="float32", quantization_config=packed(NVFP4, form="nvfp4-pack-quantized")),
    "kv_scheme": quantized(packed(kv_cache_scheme=KV8)),
    "cache": VLLM["cache_static"],
    "multiplied_out": PACKED,
    "fp8_without_gpu": quantized(BLOCK_FP8),
    "needs_compressed_tensors": PACKED,
    "needs_gptqmodel": quantized(GPTQ),
    "needs_gptqmodel_awq": quantized(AWQ),
    "needs_bitsandbytes": quantized(BITSANDBYTES),
    "needs_accelerate": quantized(BLOCK_FP8),
    "gguf_architecture": GGUF.model_copy(update={"architecture": "novel"}),
    "gguf_multiplied_out": GGUF,
    "pickled": PICKLED,
    "lora_base": ADAPTER,
}
LMDEPLOY = {
    "files": GGUF,
    "architecture": model(architectures=["NovelForCausalLM"]),
    "tensors_as_config": DENSE.model_copy(update=UNEVEN),
    "heads_deal_out": VLLM["heads_deal_out"],
    "method": quantized(BITSANDBYTES),
    "compressed_scheme": quantized(packed({**W4, "group_size": 64})),
    "compressed_engine": quantized(packed(), architecture="MistralForCausalLM"),
    "older_groups": quantized({**AWQ, "group_size": 64}),
    "gptq_order": quantized({**GPTQ, "desc_act": True}),
    "sparsity": quantized(packed(**SPARSE)),
    "zeros": ZEROS,
    "cache_static": VLLM["cache_static"],
}
LLAMA_CPP = {
    "export_first": DENSE,
    "tokenizer": DENSE,
    "architecture": model(architectures=["NovelForCausalLM"]),
    "tensors_as_config": DENSE.model_copy(update=UNEVEN),
    "method": quantized(AWQ),
    "one_scheme": quantized(MIXED),
    "compressed_format": quantized(packed(form="mxfp4-pack-quantized")),
    "pack_strategy": quantized(packed(W8)),
    "pack_bits": VLLM["pack_kernel"],
    "scale_strategy": quantized(packed({**FP8, "strategy": "tensor"}, form="float-quantized")),
    "rounded_twice": PACKED,
    "sparsity": quantized(packed(**SPARSE)),
    "zeros": ZEROS,
    "cache_static": VLLM["cache_static"],
    "cache_narrow": VLLM["cache_narrow"],
    "lora_base": ADAPTER,
}
BREAKING: dict[str, dict[str, Facts]] = {"vllm": VLLM, "transformers": TRANSFORMERS, "lmdeploy": LMDEPLOY, "llama.cpp": LLAMA_CPP}
