"""A quantizer's work done by another library in its own environment, and its result brought home.

    token ids, cut here  ->  the library quantizes and saves (stages/backends)  ->  repacked  ->  loaded by transformers  ->  compared

The library is given token ids and no text, and a config.json that its transformers understands. What comes back is its integers, scales and
zero points in compressed-tensors' layout, with the source's own config.json and tokenizer. It counts as done when the losses of the
reloaded checkpoint are those that the library's own kernels compute, token by token.
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.artifact import Dataset, DenseCheckpoint, QuantizedCheckpoint
from pipeline.companions import companion_files
from pipeline.headers import weight_files
from pipeline.stage import Context
from stages.runtime.backends import Backend
from stages.runtime.loading import load_model
from stages.runtime.packing import quantization_config, write_quantized
from stages.runtime.repacking import repacker
from stages.runtime.scheme import CalibratedQuantization
from stages.runtime.scoring import token_losses
from stages.runtime.tensors import DTYPES, TensorReader
from stages.runtime.text import calibration_windows, load_tokenizer

INDEX = "model.safetensors.index.json"
FOLDER = "backend"  # within the output while it is made
# Mean over tokens of |difference|, in nats, of float32 or float16 kernels there and the model's dtype here, scales rounded to it: 0.01 to
# 0.02 with the small model in bf16. With the scales of the next group it is 1.5, with zero points off by one 8.
TOLERANCE = 0.05


def quantize_isolated(
    ctx: Context,
    model: DenseCheckpoint,
    calibration: Dataset,
    params: CalibratedQuantization,
    backend: Backend,
    settings: Mapping[str, Any],
    folds_scales: bool = False,
) -> QuantizedCheckpoint:
    """`settings` are what `backend.function` takes beside folders and text. With `folds_scales` dense tensors are the library's too."""
    assert ctx.isolated, f"the stage needs the interpreter of {backend.env}"
    source, form, work = model.model_spec, params.format, ctx.output / FOLDER
    spec, dtype = params.apply(source), DTYPES[source.dtype]
    windows = calibration_windows(calibration, load_tokenizer(model.path), params.num_samples, params.max_length)
    work.mkdir(parents=True)
    (work / "windows.json").write_text(json.dumps(windows.tolist()))
    link_source(model, work / "source")
    made = ctx.isolated(
        backend.function, source=str(work / "source"), output=str(work / "saved"), windows=str(work / "windows.json"), **settings
    )
    for note in made["notes"]:
        ctx.note(note)
    saved = TensorReader(work / "saved")
    write_quantized(
        ctx,
        model,
        spec,
        quantization_config(form, params.ignored_names(source)),
        repacker(work / "saved", form, dtype),
        (lambda name: saved.read(name).to(dtype)) if folds_scales else None,
    )
    shutil.rmtree(work)
    check_agrees(torch.tensor(made["losses"]), ctx.output, windows[:1], backend.name)
    return QuantizedCheckpoint(path=ctx.output, spec=spec)


def link_source(model: DenseCheckpoint, folder: Path) -> None:
    """The model as transformers 4.51 and 5.17 alike read it, its files by link; gptqmodel loads the tokenizer too."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(legacy_config(model.config), indent=1), encoding="utf-8")
    index = model.path / INDEX
    for file in (*weight_files(model.path), *([index] if index.is_file() else []), *companion_files(model.path)):
        link = folder / file.relative_to(model.path)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(file.resolve())


def legacy_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what transformers 5 renamed under its old names too: 4.51 knows neither `dtype` nor `rope_parameters`, and without
    a word takes float32 and a base of 10,000 instead."""
    legacy = dict(config)
    if "dtype" in legacy:
        legacy["torch_dtype"] = legacy.pop("dtype")
    rope = legacy.pop("rope_parameters", None)
    if rope:
        legacy["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            legacy["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return legacy


def check_agrees(expected: torch.Tensor, folder: Path, ids: torch.Tensor, backend: str) -> None:
    """ValueError where the checkpoint, loaded by transformers, does not compute what the library computed: the [length - 1] losses of `ids`
    [1, length], in nats."""
    losses = token_losses(load_model(folder), ids).flatten().cpu()
    difference = (losses - expected).abs().mean().item()
    if not difference <= TOLERANCE or math.isnan(difference):
        raise ValueError(
            f"the checkpoint does not load as the model that {backend} made: its losses on a probe differ by {difference:.3g} nats per "
            f"token ({losses.mean():.3f} and {expected.mean():.3f}), rounding explains {TOLERANCE}; report this"
        )
