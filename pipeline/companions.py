"""The files that make a checkpoint folder besides config.json and the weights: tokenizer, chat templates, generation settings, KV cache.

One list for all who need it: these are downloaded with a hub model, copied by every stage, and part of a local model's key.
Anything else in a folder (README, images, code, other formats of the weights) changes nothing of what the model computes.
"""

from pathlib import Path

CACHE_FILE = "kv_cache.json"  # how the KV cache is stored (pipeline/kv_sidecar.py) ...
SCALES_FILE = "kv_cache.safetensors"  # ... and the scales of a calibrated one
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    CACHE_FILE, SCALES_FILE,
    "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.model", "*.tiktoken",
)  # fmt: skip


def companion_files(folder: Path) -> list[Path]:
    """Those that `folder` has, in a fixed order."""
    return sorted({file for pattern in COMPANIONS for file in folder.glob(pattern) if file.is_file()})
