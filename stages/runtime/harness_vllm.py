"""vLLM behind lm-evaluation-harness: what its model class is given, and whether it can be given that. Imports vLLM last of all."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.compute_dtype import Dtype
from pipeline.kv_sidecar import read_cache

VLLM_DTYPES: dict[Dtype, str] = {"bf16": "bfloat16", "fp32": "float32"}
INT8_CACHE = "int8_per_token_head"  # vllm-project/vllm pull request 38378: a scale for each token and head, found while serving


def vllm_arguments(folder: Path, batch_size: int, max_length: int, dtype: Dtype) -> dict[str, Any]:
    """Of the harness' `VLLM`. ValueError for a cache whose calibrated scales vLLM does not read."""
    cache = read_cache(folder)
    if cache is not None and cache.mode == "static":
        raise ValueError("engine: vLLM reads no calibrated INT8 scales; write engine: transformers, or give kv_cache mode: per_token_head")
    arguments = {
        "pretrained": str(folder),
        "dtype": VLLM_DTYPES[dtype],
        "trust_remote_code": False,
        "batch_size": batch_size,
        "max_model_len": max_length,
        "seed": 0,
    }
    return arguments if cache is None else arguments | {"kv_cache_dtype": INT8_CACHE}


def load_vllm(folder: Path, batch_size: int, max_length: int, dtype: Dtype) -> Any:
    """The harness' own model class. ValueError where vLLM is not installed."""
    arguments = vllm_arguments(folder, batch_size, max_length, dtype)
    if find_spec("vllm") is None:
        raise ValueError("engine: vllm is not installed here; install it (`pip install vllm`, needs a GPU) or write engine: transformers")
    from lm_eval.models.vllm_causallms import VLLM  # imports vllm, which is optional

    return VLLM(**arguments)
