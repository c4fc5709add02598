"""What a recipe's `model` and `data` stand for: opened, checked from headers, and given the key of their content.

A local model's key is the digest of its files, wherever they lie; a hub model's is its id and resolved commit. Hashing a large
folder takes minutes, so a plan leaves the digest of one above `HASH_AT_ONCE` pending (`key` is empty) unless it is remembered;
executing computes it.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.artifact import Checkpoint, Dataset, DatasetSpec, DenseCheckpoint, QuantizedCheckpoint
from pipeline.errors import RecipeError
from pipeline.headers import CheckpointFileError, tensor_table
from pipeline.identity import DigestMemo, data_key, folder_key, hub_key, model_files
from pipeline.recipe import DataSource, ModelSource, resolve_path
from pipeline.spec import ModelSpec

HASH_AT_ONCE = 256_000_000  # bytes
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]


def open_model(model: ModelSource, resources: Path, memo: DigestMemo, *, execute: bool) -> Checkpoint:
    """The source checkpoint with its spec and key. RecipeError: why it cannot be read, before any weight is."""
    try:
        if model.path:
            folder = resolve_path(model.path, resources)
            spec = ModelSpec.from_config(_read_config(folder))
            _check_tensors(folder, spec)
            return _typed(folder, spec, _local_key(folder, memo, execute))
        if model.architecture is not None and not (execute and model.id):
            if execute:
                raise ValueError("it is an architecture without weights, which can be planned but not run; give model.path=/folder")
            return _typed(Path(), ModelSpec.from_config(model.architecture), "")
        return _hub_model(model, execute)
    except (ValueError, OSError) as error:  # CheckpointFileError and config problems are ValueErrors
        raise RecipeError(f"model: {error}") from None


def open_split(data: DataSource, split: str, resources: Path, memo: DigestMemo) -> Dataset:
    """One split with its spec and key. RecipeError where the file is missing, empty or no text."""
    path = resolve_path(data.splits[split], resources)
    where = f"data.splits.{split}"
    if path.suffix not in (".jsonl", ".txt"):
        raise RecipeError(f"{where}: {path.name} is not a .jsonl or .txt file")
    try:
        digest = memo.compute(path)
        dataset = Dataset(path, DatasetSpec(split=split, digest=digest, nbytes=path.stat().st_size), data_key(data.format, digest))
        first = next(dataset.documents(), None)
    except FileNotFoundError:
        raise RecipeError(f"{where}: {path} does not exist") from None
    except OSError as error:
        raise RecipeError(f"{where}: {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise RecipeError(f"{where}: {error if 'JSON' in str(error) else f'{path} is not UTF-8 text'}") from None
    if first is None:
        raise RecipeError(f"{where}: {path} holds no document")
    return dataset


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointFileError(f"{folder} is not a folder; give the folder of a Hugging Face checkpoint")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointFileError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint") from None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise CheckpointFileError(f"{folder}/config.json is not JSON; copy it again")
    return config


def _check_tensors(folder: Path, spec: ModelSpec) -> None:
    """CheckpointFileError unless the folder's files hold exactly the model that its config.json describes."""
    differences = spec.differences(tensor_table(folder))
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise CheckpointFileError(f"{folder} does not hold the model its config.json describes: {'; '.join(differences[:3])}{more}")


def _typed(folder: Path, spec: ModelSpec, key: str) -> Checkpoint:
    return (DenseCheckpoint if spec.is_dense else QuantizedCheckpoint)(folder, spec, key)


def _local_key(folder: Path, memo: DigestMemo, execute: bool) -> str:
    files = model_files(folder)
    small = sum(file.stat().st_size for file in files) <= HASH_AT_ONCE
    if not (execute or small or all(memo.known(file) for file in files)):
        return ""
    return folder_key({file.name: memo.compute(file) for file in files})


def _hub_model(model: ModelSource, execute: bool) -> Checkpoint:
    """A hub model at its commit: downloaded when executing, only its config otherwise. RecipeError where it cannot be had.

    Where the hub does not answer, what the hub's own cache on this machine holds of that revision is used, at its recorded commit.
    The hub's own look-up order finds the token; it is never read or logged here.
    """
    import httpx  # with the hub's client 0.3 s, and only hub models need them
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    assert model.id
    wanted = HUB_FILES if execute else ["config.json"]
    try:
        try:
            commit = HfApi().model_info(model.id, revision=model.revision).sha or model.revision
        except (httpx.TransportError, ConnectionError):
            folder = Path(snapshot_download(model.id, revision=model.revision, allow_patterns=wanted, local_files_only=True))
            commit = folder.name
        else:
            folder = Path(snapshot_download(model.id, revision=commit, allow_patterns=wanted))
        spec = ModelSpec.from_config(_read_config(folder))
    except (OSError, httpx.HTTPError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"model.id: '{model.id}' at revision '{model.revision}' cannot be had from the hub ({reason}); check the name and your "
            "access, or give model.path=/folder"
        ) from None
    if not execute:
        return _typed(Path(), spec, hub_key(model.id, commit))
    _check_tensors(folder, spec)
    return _typed(folder, spec, hub_key(model.id, commit))
