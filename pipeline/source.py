"""What a recipe's `model` and `data` stand for: opened, checked from headers, and given the key of their content.

A local model's key is the digest of its files, wherever they lie; a hub model's is its id and resolved commit; a split's is its
content, also where it came from the hub. Hashing a large folder takes minutes, so a plan leaves the digest of one above
`HASH_AT_ONCE` pending (`key` is empty) unless it is remembered, and that of a hub dataset until it was fetched; executing computes it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.artifact import SUFFIXES, Checkpoint, Dataset, DenseCheckpoint, QuantizedCheckpoint, tokenizer_digest
from pipeline.artifact_spec import DataFormat, DatasetSpec
from pipeline.companions import CACHE_FILE, COMPANIONS
from pipeline.errors import InputProblems, RecipeError
from pipeline.headers import CheckpointFileError, TensorEntry, read_json, tensor_table
from pipeline.hub_data import export, exported, find_hub_split
from pipeline.identity import DigestMemo, data_key, folder_key, hub_key, model_files
from pipeline.kv_sidecar import read_cache
from pipeline.recipe import DataSource, ModelSource, SplitSource, resolve_path
from pipeline.spec import ModelSpec
from pipeline.task_names import task_files, task_names

HASH_AT_ONCE = 256_000_000  # bytes of a model that a plan reads whole
READ_AT_ONCE = 64_000_000  # bytes of text that a plan reads whole
BLOCK_BYTES = 1 << 20  # of each of two tensors that are compared
ADAPTER = "adapter_config.json"  # leads transformers away from the folder's own weights, to those the adapter was made for
HUB_FILES = ["README.md", "config.json", ADAPTER, "*.safetensors", "model.safetensors.index.json", *COMPANIONS]


def open_model(model: ModelSource, resources: Path, memo: DigestMemo, *, execute: bool, where: str = "model") -> Checkpoint:
    """A source checkpoint with its spec and key. RecipeError: why it cannot be read, before any weight is.

    `where` names it in messages.
    """
    try:
        if model.path:
            folder = _place(model.path, resources, where)
            spec = _read_spec(folder)
            _check_runs(spec, execute)
            _check_folder(folder, spec, execute)
            return _typed(folder, spec, _local_key(folder, memo, execute))
        if model.architecture is not None:
            spec = ModelSpec.from_config(model.architecture)
            _check_runs(spec, execute)
            if not execute:
                return _typed(Path(), spec, "")
            if not model.id:
                raise ValueError(f"it is an architecture without weights, which can be planned but not run; give {where}.path=/folder")
        return _hub_model(model, execute, where)
    except InputProblems as error:
        raise RecipeError(f"{where}: {problem}" for problem in error.problems) from None
    except (ValueError, OSError) as error:  # CheckpointFileError is a ValueError
        raise RecipeError(f"{where}: {error}") from None


def open_split(data: DataSource, split: str, resources: Path, memo: DigestMemo, *, execute: bool) -> Dataset:
    """One split with its spec and key. RecipeError where it is missing, empty or not what its format says.

    Every document is read; of a file above `READ_AT_ONCE` only the first one unless `execute`. A hub dataset is fetched when executing,
    to a file beside the memo; before that its digest is pending.
    """
    where = f"data.splits.{split}"
    source = data.splits[split]
    if source.path is None:
        return _hub_split(source, split, memo, execute, where)
    path = _place(source.path, resources, where)
    try:
        return _task_split(path, split, memo) if source.format == "tasks" else _read_split(path, source.format, split, memo, execute)
    except FileNotFoundError:
        raise RecipeError(f"{where}: {path} does not exist") from None
    except OSError as error:
        raise RecipeError(f"{where}: {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from None


def _read_split(path: Path, form: DataFormat, split: str, memo: DigestMemo, execute: bool, origin: str = "") -> Dataset:
    """Of a file. ValueError, OSError: what is wrong with it."""
    file_format = SUFFIXES.get(path.suffix)
    if file_format is None:
        raise ValueError(f"{path.name} is not a .jsonl, .parquet or .txt file")
    if form == "messages" and file_format == "txt":
        raise ValueError(f"{path.name} is not a .jsonl or .parquet file; conversations are read from those only")
    digest, nbytes = memo.compute(path), path.stat().st_size
    spec = DatasetSpec(split=split, format=form, file_format=file_format, digest=digest, nbytes=nbytes, origin=origin)
    dataset = Dataset(path, spec, data_key(form, file_format, digest))
    samples: Iterator[object] = dataset.conversations() if dataset.is_chat else dataset.documents()
    if next(samples, None) is None:
        raise ValueError(f"{path} holds no document")
    if not (execute or nbytes <= READ_AT_ONCE):
        return dataset
    return replace(dataset, spec=spec.model_copy(update={"documents": 1 + sum(1 for _ in samples)}))  # each is checked as it is read


def _task_split(folder: Path, split: str, memo: DigestMemo) -> Dataset:
    """A folder of evaluation tasks. Its digest covers every file, by name and content."""
    folder.stat()  # FileNotFoundError
    if not folder.is_dir():
        raise ValueError(f"{folder.name} is not a folder; give the folder of lm-evaluation-harness tasks")
    files = task_files(folder)
    names = task_names(files)
    digest, nbytes = folder_key({name: memo.compute(file) for name, file in files.items()}), sum(f.stat().st_size for f in files.values())
    spec = DatasetSpec(split=split, format="tasks", file_format="folder", digest=digest, nbytes=nbytes, tasks=names)
    return Dataset(folder, spec, data_key("tasks", "folder", digest))


def _hub_split(source: SplitSource, split: str, memo: DigestMemo, execute: bool, where: str) -> Dataset:
    cache = memo.file.parent / "datasets"
    found, nbytes = find_hub_split(source, cache, where)
    file = exported(found, cache)
    if file is None and execute:
        file = export(found, source, cache, where)
    if file is None:
        spec = DatasetSpec(split=split, format=source.format, file_format="jsonl", digest="", nbytes=nbytes, origin=str(found))
        return Dataset(Path(), spec, "")
    try:
        return _read_split(file, source.format, split, memo, execute, str(found))
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from None


def check_disjoint(splits: Mapping[str, Dataset]) -> None:
    """RecipeError where two splits, by name, are the same content: what a model was calibrated on cannot measure it."""
    by_digest: dict[str, list[str]] = {}
    for name, dataset in splits.items():
        assert isinstance(dataset.spec, DatasetSpec)
        if not dataset.spec.digest:  # not here yet
            continue
        by_digest.setdefault(dataset.spec.digest, []).append(name)
    problems = [
        f"data.splits: {', '.join(names[:-1])} and {names[-1]} are the same file content; splits must be disjoint"
        for names in by_digest.values()
        if len(names) > 1
    ]
    if problems:
        raise RecipeError(problems)


def _place(written: str, resources: Path, where: str) -> Path:
    try:
        return resolve_path(written, resources)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointFileError(f"{folder} is not a folder; give the folder of a Hugging Face checkpoint")
    try:
        return read_json(folder / "config.json")
    except FileNotFoundError:
        raise CheckpointFileError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint") from None


def _read_spec(folder: Path) -> ModelSpec:
    spec = ModelSpec.from_config(_read_config(folder))
    cache = read_cache(folder)
    return spec.with_cache(cache.mode if cache else None)


def _check_runs(spec: ModelSpec, execute: bool) -> None:
    """ValueError where the model can only be planned for, because no stage runs on it yet."""
    if execute and spec.architecture.experts:
        raise ValueError(
            f"{spec.architecture.model_type} is a mixture of experts, whose compression can be planned but not run yet; "
            "write mode=plan, or give a dense model"
        )


def _check_folder(folder: Path, spec: ModelSpec, execute: bool) -> None:
    """CheckpointFileError unless the folder is exactly the model that its config.json describes, with a tokenizer that can be read."""
    if (folder / ADAPTER).exists():
        raise CheckpointFileError(
            f"{folder} holds {ADAPTER}, so readers would load the model that it names; merge the adapter or remove it"
        )
    table = tensor_table(folder)
    differences = spec.differences(table)
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise CheckpointFileError(f"{folder} does not hold the model its config.json describes: {'; '.join(differences[:3])}{more}")
    _check_tied_copy(table, spec, execute)
    tokenizer_digest(folder)  # raises where tokenizer.json is damaged


def _check_tied_copy(table: Mapping[str, TensorEntry], spec: ModelSpec, execute: bool) -> None:
    """A tied model's file may carry a copy of the embedding as `lm_head.weight`; transformers does not tie one that differs.

    The values are compared when executing, and in a plan up to `HASH_AT_ONCE` bytes.
    """
    head, embedding = table.get("lm_head.weight"), table["model.embed_tokens.weight"]
    if not spec.architecture.tied or head is None:
        return
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if same and (execute or head.nbytes <= HASH_AT_ONCE):
        same = _equal_bytes(head, embedding)
    if not same:
        raise CheckpointFileError("config.json says tied embeddings but lm_head.weight differs; set tie_word_embeddings to false")


def _equal_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    """Of two tensors of one dtype and shape, block by block."""
    with open(one.file, "rb") as left, open(other.file, "rb") as right:
        left.seek(one.offset)
        right.seek(other.offset)
        blocks = (min(BLOCK_BYTES, one.nbytes - start) for start in range(0, one.nbytes, BLOCK_BYTES))
        return all(left.read(count) == right.read(count) for count in blocks)


def _typed(folder: Path, spec: ModelSpec, key: str) -> Checkpoint:
    return (DenseCheckpoint if spec.is_dense else QuantizedCheckpoint)(folder, spec, key)


def _local_key(folder: Path, memo: DigestMemo, execute: bool) -> str:
    files = model_files(folder)
    small = sum(file.stat().st_size for file in files.values()) <= HASH_AT_ONCE
    if not (execute or small or all(memo.known(file) for file in files.values())):
        return ""
    return folder_key(dict(zip(files, memo.compute_all(list(files.values())), strict=True)))


def _hub_model(model: ModelSource, execute: bool, where: str) -> Checkpoint:
    """A hub model at its commit: downloaded when executing, only its config otherwise. RecipeError where it cannot be had.

    Where the hub does not answer, what the hub's own cache on this machine holds of that revision is used, at its recorded commit.
    The hub's own look-up order finds the token; it is never read or logged here.
    """
    import httpx  # with the hub's client 0.3 s, and only hub models need them
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    assert model.id
    described = ["config.json", CACHE_FILE]
    try:
        try:
            commit, offline = HfApi().model_info(model.id, revision=model.revision).sha or model.revision, False
        except (httpx.TransportError, ConnectionError):
            commit, offline = model.revision, True
        folder = Path(snapshot_download(model.id, revision=commit, allow_patterns=described, local_files_only=offline))
        commit = folder.name if offline else commit
        spec = _read_spec(folder)
        _check_runs(spec, execute)  # before a hundred gigabytes are fetched for nothing
        if execute:
            snapshot_download(model.id, revision=commit, allow_patterns=HUB_FILES, local_files_only=offline)
    except (OSError, httpx.HTTPError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"{where}.id: '{model.id}' at revision '{model.revision}' cannot be had from the hub ({reason}); check the name and your "
            f"access, or give {where}.path=/folder"
        ) from None
    if not execute:
        return _typed(Path(), spec, hub_key(model.id, commit))
    _check_folder(folder, spec, execute)
    return _typed(folder, spec, hub_key(model.id, commit))
