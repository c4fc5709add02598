"""Keys: what makes two stage executions the same. Every pre-image is canonical JSON with a type tag.

    stage   ["stage", 1, {stage, version, params, inputs, output, backend}]   inputs are upstream *keys*, never bytes,
                                                                              since GPU results are not bit-reproducible
    output  ["output", 1, {key, port}]                                        one output of a stage with several
    folder  ["folder", 1, {file name: sha256}]                                a model given by path: its content
    hub     ["hub", 1, {id, commit}]                                          a model given by hub id: its commit
    data    ["data", 1, {format, file_format, sha256}]                        one split of a dataset: its content, and how it is parsed

Only non-default params enter, so adding a field with a behaviour-preserving default costs nobody a rerun. Never in a key:
paths, hosts, devices, batch sizes, anything of `Execution`. One exception: of a stage that measures the machine, `backend` says which
it is (pipeline/machine.py). Values without a canonical form are an error, never `str()`.
"""

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, TypeAdapter

from pipeline import machine
from pipeline.artifact import Manifest, sha256_file
from pipeline.companions import companion_files
from pipeline.envs import lock_digest
from pipeline.headers import weight_files
from pipeline.remembered import stamp
from pipeline.stage import MAIN, Stage

IDENTITY_SCHEMA = 1
EXTRAS = {"gguf": "gguf", "llama-cpp-python": "gguf"}  # library -> the optional dependencies of llmpress that bring it
HASHERS = 8  # threads that hash the files of one source: faster than most disks read
MEMO = TypeAdapter(dict[str, tuple[tuple[int, ...], str]])  # path -> (stamp, sha256)


def canonical(value: Any, where: str = "value") -> str:
    """Canonical JSON: sorted keys, no spaces, ASCII, whole floats kept apart from integers. TypeError names the field."""
    return json.dumps(_plain(value, where), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
    elif isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    elif isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{where}: {type(value).__name__} {value!r} has no canonical form, so it cannot be part of a key")


def digest(tag: str, content: Any) -> str:
    return hashlib.sha256(canonical([tag, IDENTITY_SCHEMA, content], tag).encode()).hexdigest()


def non_default(params: BaseModel) -> dict[str, Any]:
    """The fields that differ from their declared default, as JSON values."""
    values = params.model_dump(mode="json")
    fields = type(params).model_fields
    return {
        name: value
        for name, value in values.items()
        if fields[name].is_required() or getattr(params, name) != fields[name].get_default(call_default_factory=True)
    }


@cache
def library_version(name: str) -> str | None:
    """torch as major.minor, others in full, local labels (`+cpu`, `+cu130`) stripped; None where it is not installed."""
    try:
        full = version(name).partition("+")[0]
    except PackageNotFoundError:
        return None
    return ".".join(full.split(".")[:2]) if name == "torch" else full


def not_installed(libraries: Iterable[str]) -> str:
    """`torch is not installed here`, so that what is computed with it has no key; empty where all are."""
    absent = [name for name in sorted(libraries) if library_version(name) is None]
    named = " and ".join(f"{name} (extra {EXTRAS[name]})" if name in EXTRAS else name for name in absent)
    return f"{named} {'are' if len(absent) > 1 else 'is'} not installed here" if absent else ""


def to_install(libraries: Iterable[str]) -> str:
    """What brings those that are not installed: `llmpress[gguf]`, or all that llmpress depends on."""
    extras = {EXTRAS.get(name, "") for name in libraries if library_version(name) is None}
    return "what llmpress depends on" if "" in extras or not extras else f"llmpress[{','.join(sorted(extras))}]"


def backend_versions(libraries: Iterable[str]) -> dict[str, str]:
    """PackageNotFoundError for one that is not installed."""
    versions = {name: library_version(name) for name in sorted(libraries)}
    known = {name: found for name, found in versions.items() if found is not None}
    if len(known) < len(versions):
        raise PackageNotFoundError(", ".join(sorted(set(versions) - set(known))))
    return known


def backend(stage: Stage) -> dict[str, str]:
    """What a key covers of where it is computed: versions of libraries, or the digest of the environment that the stage computes in; of a
    stage that measures the machine, which that is."""
    computed_by = backend_versions(stage.libraries) if stage.env == MAIN else {stage.env: lock_digest(stage.env)}
    return computed_by | ({"machine": machine.fingerprint()} if stage.measures_machine else {})


def stage_key(stage: Stage, inputs: Mapping[str, str]) -> str:
    """The key of one execution; `inputs` are upstream keys by port."""
    return digest(
        "stage",
        {
            "stage": stage.name,
            "version": stage.version,
            "params": non_default(stage.params),
            "inputs": dict(inputs),
            "output": {name: str(port) for name, port in stage.outputs().items()},
            "backend": backend(stage),
        },
    )


def output_key(key: str, port: str, ports: int) -> str:
    """The key of one output: the stage's own where there is only one."""
    return key if ports == 1 else digest("output", {"key": key, "port": port})


def hub_key(model_id: str, commit: str) -> str:
    return digest("hub", {"id": model_id, "commit": commit})


def data_key(form: str, file_format: str, sha256: str) -> str:
    return digest("data", {"format": form, "file_format": file_format, "sha256": sha256})


def folder_key(digests: Mapping[str, str]) -> str:
    """From sha256 by file name, relative to the folder and with `/`."""
    return digest("folder", dict(digests))


def content_digest(manifest: Manifest) -> str:
    """Digest of an artifact's bytes, for what was computed from them; its key names the computation, not the bytes."""
    return folder_key({name: record.sha256 for name, record in manifest.files.items()})


def model_files(folder: Path) -> dict[str, Path]:
    """The files a model folder's key covers, by name in it. CheckpointFileError where its weights are incomplete."""
    files = (folder / "config.json", *companion_files(folder), *weight_files(folder))
    return {file.relative_to(folder).as_posix(): file for file in files}


class DigestMemo:
    """sha256 of files, remembered in one JSON file under the outputs folder by path and what a changed file cannot keep.

    What this process has computed it also remembers by itself, since plans write nothing and a sweep makes many.
    """

    _computed: ClassVar[dict[str, tuple[tuple[int, ...], str]]] = {}

    def __init__(self, file: Path) -> None:
        self.file = file
        self._changed = False
        try:
            self._known = MEMO.validate_json(file.read_bytes())
        except (OSError, ValueError):  # absent, or damaged: it is only a memo
            self._known = {}

    def known(self, file: Path) -> str | None:
        seen, sha256 = self._known.get(str(file.resolve()), ((), ""))
        return sha256 if seen == stamp(file) else None

    def compute(self, file: Path) -> str:
        found = self.known(file)
        if found is None:
            seen, place = stamp(file), str(file.resolve())  # before hashing: a change meanwhile is not this content
            if self._computed.get(place, ((), ""))[0] != seen:
                self._computed[place] = (seen, sha256_file(file))
            self._known[place] = self._computed[place]
            self._changed = True
            found = self._known[place][1]
        return found

    def compute_all(self, files: Sequence[Path]) -> list[str]:
        """In their order. Those not remembered are hashed side by side, the last one first, so that what a stage begins to read is what
        the page cache still holds."""
        missing = [file for file in files if self.known(file) is None]
        if len(missing) > 1:
            from multiprocessing.pool import ThreadPool  # here: it takes 5 ms. Its threads do not outlive an interruption

            with ThreadPool(min(len(missing), os.cpu_count() or 1, HASHERS)) as pool:
                pool.map(self.compute, reversed(missing), chunksize=1)
        return [self.compute(file) for file in files]

    def save(self) -> None:
        """Keep what was newly computed. Of two processes that save at once one may lose its entries, to be computed again."""
        if not self._changed:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name(f"{self.file.name}.{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_bytes(MEMO.dump_json(self._known))
            temporary.replace(self.file)
        finally:
            temporary.unlink(missing_ok=True)
        self._changed = False
