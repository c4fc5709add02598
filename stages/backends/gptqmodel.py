"""GPTQ and AWQ by gptqmodel 7.6.0, the successor of auto-gptq and autoawq."""

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it takes one worker for what it then wants two of, and stops

from typing import Any

from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization import FORMAT
from gptqmodel.quantization.config import AWQConfig, GPTQConfig

from pipeline.stage import Context
from stages.backends.calibration import follow_layers, own_losses, read_windows


def gptq(
    ctx: Context,
    source: str,
    output: str,
    windows: str,
    num_bits: int,
    group_size: int,
    symmetric: bool,
    actorder: str | None,
    dampening_frac: float,
    batch_size: int,
) -> dict[str, Any]:
    """`actorder: static` is the library's `desc_act` with `static_groups`; format v2, whose zero points are stored as they are."""
    config = GPTQConfig(
        bits=num_bits,
        group_size=group_size,
        sym=symmetric,
        desc_act=actorder is not None,
        static_groups=actorder is not None,
        act_group_aware=False,
        damp_percent=dampening_frac,
        format=FORMAT.GPTQ_V2,
        fallback=None,  # rounding to nearest where few tokens arrive, without a word
        offload_to_disk=False,
        pack_impl="original",
    )
    return _quantize(ctx, source, output, windows, config, BACKEND.GPTQ_TORCH, batch_size)


def awq(
    ctx: Context, source: str, output: str, windows: str, num_bits: int, group_size: int, symmetric: bool, batch_size: int
) -> dict[str, Any]:
    config = AWQConfig(bits=num_bits, group_size=group_size, sym=symmetric, format=FORMAT.GEMM, fallback=None, offload_to_disk=False)
    return _quantize(ctx, source, output, windows, config, BACKEND.AWQ_TORCH, batch_size)


def _quantize(ctx: Context, source: str, output: str, windows: str, config: Any, backend: Any, batch_size: int) -> dict[str, Any]:
    ids = read_windows(windows)
    model = GPTQModel.load(source, config, trust_remote_code=False)
    follow_layers(ctx, model.model.model.layers)
    examples = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in ids]
    log = model.quantize(examples, batch_size=batch_size, backend=backend, calibration_sort=None, calibration_data_min_length=0)
    model.save(output)
    return {"losses": own_losses(model.model, ids[0]), "notes": _dampened(log, config)}


def _dampened(log: dict[str, list[dict[str, Any]]], config: Any) -> list[str]:
    """Where a Hessian cannot be inverted, the library dampens it more until it can."""
    rows = [row for row in log.get("gptq", []) if float(row["damp"]) > 1.01 * config.damp_percent]
    if not rows:
        return []
    names = ", ".join(f"layer {row['layer']} {row['module']} ({row['damp']})" for row in rows[:5])
    return [f"gptqmodel dampened {len(rows)} layers more than dampening_frac says, whose Hessian it could not invert: {names}"]
