"""How to serve a model, engine by engine: `serving.yaml` beside it, and the lines that a report ends with.

Only what an engine is known to read is listed. An INT8 cache is a setting of the server, not of the checkpoint: no mainstream server loads
calibrated INT8 scales, and all of these find a scale for each token and head by themselves.

    vLLM        compressed-tensors weights; --kv-cache-dtype int8_per_token_head (vllm-project/vllm pull request 38378, Triton attention)
    LMDeploy    dense weights; --quant-policy 8 (INT8 per token and head)
    llama.cpp   a GGUF export; -ctk q8_0 -ctv q8_0, of which the second needs flash attention (-fa on)
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from pipeline.layout import Frozen, WeightFormat
from pipeline.spec import ModelSpec

SERVING_FILE = "serving.yaml"
VLLM_BITS, VLLM_GROUPS = (4, 8), (32, 64, 128)  # packed integer weights that vLLM has kernels for


class ServingLine(Frozen):
    """One engine's command, with `{model}` for the folder."""

    engine: str
    command: str
    note: str = ""


def packed_format(spec: ModelSpec) -> WeightFormat:
    """That of the linear weights; dense where all are."""
    return next((group.format for group in spec.linear_groups if not group.format.is_dense), WeightFormat())


def serving_lines(spec: ModelSpec) -> tuple[ServingLine, ...]:
    return tuple(_lines(spec))


def _lines(spec: ModelSpec) -> Iterator[ServingLine]:
    packed, mode = packed_format(spec), spec.kv_cache.mode
    stale = "the calibrated scales of this cache are read by llmpress alone; " if mode == "static" else ""
    if packed.is_dense or (packed.num_bits in VLLM_BITS and packed.group_size in VLLM_GROUPS):
        flag = " --kv-cache-dtype int8_per_token_head" if mode else ""
        note = f"{stale}the flag finds a scale for each token and head instead" if stale else ""
        yield ServingLine(engine="vllm", command=f"vllm serve {{model}}{flag}", note=note)
    if packed.is_dense:
        flag = " --quant-policy 8" if mode else ""
        yield ServingLine(engine="lmdeploy", command=f"lmdeploy serve api_server {{model}}{flag}")
    cache = " -ctk q8_0 -ctv q8_0 -fa on" if mode else ""
    yield ServingLine(engine="llama.cpp", command=f"llama-server -m model.gguf{cache}", note="needs an export to GGUF first")


def serving_yaml(spec: ModelSpec, model: str, metrics: Mapping[str, float]) -> str:
    """The file's content. `metrics` are those of the model's quality report, where there is one."""
    mode = spec.kv_cache.mode
    measured = {name: metrics[name] for name in ("kv_cache_perplexity_change_pct", "kv_cache_kl_divergence") if name in metrics}
    content = {
        "model": model,
        "engines": {line.engine: _engine(line, model) for line in serving_lines(spec)},
        "kv_cache": {
            "num_bits": spec.kv_cache.num_bits,
            **({"mode": mode} if mode else {}),
            "bytes_per_token": spec.kv_cache.bytes_per_token,
            **({"measured": measured} if measured else {}),
        },
    }
    return yaml.safe_dump(content, sort_keys=False, width=1000)


def _engine(line: ServingLine, model: str) -> dict[str, str]:
    return {"command": line.command.format(model=model), **({"note": line.note} if line.note else {})}


def write_serving(folder: Path, spec: ModelSpec, model: str, metrics: Mapping[str, float]) -> None:
    (folder / SERVING_FILE).write_text(serving_yaml(spec, model, metrics), encoding="utf-8")
