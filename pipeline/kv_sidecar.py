"""How a checkpoint's KV cache is to be stored, in a file of its own beside the weights: `kv_cache.json`.

Not in config.json: `kv_cache_scheme` there is read by servers as FP8 or refused, and no reader of it stores INT8 with a scale for each
token and head. A reader that does not know this file serves the same weights with a 16-bit cache.

    {"format_version": 1, "num_bits": 8, "mode": "per_token_head"}

`mode: static` has its scales in `kv_cache.safetensors`: fp32 `layers.{i}.k_scale` and `layers.{i}.v_scale`, each [kv_heads];
a stored value times its scale is the value.
"""

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from pipeline.companions import CACHE_FILE
from pipeline.headers import CheckpointFileError, read_json
from pipeline.layout import CacheMode, Frozen


class CacheSettings(Frozen):
    """The content of `kv_cache.json`."""

    format_version: Literal[1] = 1
    num_bits: Literal[8] = 8
    mode: CacheMode


def read_cache(folder: Path) -> CacheSettings | None:
    """None where the folder says nothing, which means a 16-bit cache. CheckpointFileError where its file cannot be understood."""
    try:
        return CacheSettings.model_validate(read_json(folder / CACHE_FILE))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        row = error.errors(include_url=False)[0]
        field = ".".join(map(str, row["loc"]))
        raise CheckpointFileError(f"{folder / CACHE_FILE}: {field or 'it'}: {row['msg']}; write it with the stage kv_cache") from None


def write_cache(folder: Path, settings: CacheSettings) -> None:
    (folder / CACHE_FILE).write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
