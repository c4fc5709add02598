"""The content-addressed store: `outputs/store/<stage>-<key12>/`, published whole or not at all.

    claim on the key -> scratch/<key12> (kept for resuming) -> fsync -> artifact.json last -> one rename into store/

A folder without a valid `artifact.json` of the full key does not exist. Publishing is idempotent: the first rename wins and
a loser discards its copy. Failures are never stored. `scratch/` and `store/` are on one file system, under one root. Under a lease
(pipeline/claim.py) the scratch folder bears the holder's token, so that two holders, should there ever be two, do not meet in it.
"""

import errno
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from pipeline.artifact import MANIFEST, FileRecord, Manifest, sha256_file
from pipeline.claim import FOREVER, LEASE, Claim, Claims, LockKind
from pipeline.errors import StoreError
from pipeline.hashed import Hashed
from pipeline.identity import content_digest
from pipeline.remembered import stamp

SHORT = 12
TOKEN = 8  # characters of a holder's token in the name of its scratch folder
MARKER = ".llmpress"  # in the outputs folder, so that nothing is ever collected from another


class Store:
    """Artifacts under `root` (the outputs folder), found by stage name and key."""

    def __init__(self, root: Path, lock: LockKind = "auto") -> None:
        self.root = root
        self.claims = Claims(root / "locks", lock)
        self._held: dict[str, Claim] = {}  # by key

    def path(self, stage: str, key: str) -> Path:
        return self.root / "store" / f"{stage}-{key[:SHORT]}"

    def find(self, stage: str, key: str) -> Manifest | None:
        """The manifest of a published artifact, its files present in their recorded sizes; None where there is none."""
        folder = self.path(stage, key)
        manifest = read_manifest(folder)
        if manifest is None or manifest.key != key:
            return None
        for name, record in manifest.files.items():
            try:
                if (folder / name).stat().st_size != record.nbytes:
                    return None
            except OSError:
                return None
        return manifest

    def find_hit(self, stage: str, key: str, read: Mapping[str, str]) -> Manifest | None:
        """What makes an execution a hit. `read` is what it would read now, by port (see `digests_read`).

        A report holds for the very bytes it was computed from: where an input was rebuilt and came out differently, as results of
        GPUs do, the key is the same and the report is not.
        """
        found = self.find(stage, key)
        return found if found and (not found.read or found.read == dict(read)) else None

    def damage(self, stage: str, key: str) -> str:
        """What is wrong with what stands in the place of that key, every byte read; empty where it is whole, or nothing is there."""
        folder = self.path(stage, key)
        if not folder.exists():
            return ""
        manifest = read_manifest(folder)
        if manifest is None or manifest.key != key:
            return f"{MANIFEST} is not that of the key"
        for name, record in manifest.files.items():
            try:
                if (nbytes := (folder / name).stat().st_size) != record.nbytes:
                    return f"{name} has {nbytes:,} bytes instead of {record.nbytes:,}"
                if sha256_file(folder / name) != record.sha256:
                    return f"{name} is not what was stored"
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"
        return ""

    def remove(self, stage: str, key: str) -> None:
        """What stands in the place of that key, which the caller has locked."""
        shutil.rmtree(self.path(stage, key), ignore_errors=True)

    def all(self, stage: str = "*") -> Iterator[tuple[Path, Manifest]]:
        """Every valid artifact, or those of one stage, in order of folder name."""
        for folder in sorted((self.root / "store").glob(f"{stage}-*")):
            manifest = read_manifest(folder)
            if manifest is not None:
                yield folder, manifest

    def scratch(self, key: str) -> Path:
        """Where the stage of that key works; what an interrupted attempt left is still there."""
        folder = self._scratch(key)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _scratch(self, key: str) -> Path:
        claim = self._held.get(key)
        return self.root / "scratch" / (f"{key[:SHORT]}-{claim.token[:TOKEN]}" if claim and claim.token else key[:SHORT])

    def attempt(self, key: str) -> Path:
        """What is recorded of the scratch folder (pipeline/attempt.py)."""
        return self.root / "scratch" / f"{key[:SHORT]}.json"

    def discard(self, key: str) -> None:
        shutil.rmtree(self._scratch(key), ignore_errors=True)
        self.attempt(key).unlink(missing_ok=True)

    @contextmanager
    def lock(self, key: str, timeout: float = FOREVER) -> Iterator[None]:
        """One execution of a key at a time; a killed holder's claim is taken over. TimeoutError after `timeout` seconds.

        StoreError where what is done inside fails because the claim was taken over meanwhile.
        """
        with self.claims.hold(key[:SHORT], timeout) as claim:
            self._held[key] = claim
            try:
                self._inherit(key)
                yield
            except Exception as error:
                if claim.lost():
                    raise StoreError(
                        f"{key[:SHORT]}: another run took it over, because this one gave no sign of life for {LEASE:.0f} s; the same "
                        "command takes what that one publishes"
                    ) from error
                raise
            finally:
                del self._held[key]

    def _inherit(self, key: str) -> None:
        """What earlier holders of the key left becomes this one's, the newest for resuming; whoever still writes there finds it gone."""
        mine = self._scratch(key)
        left = [folder for folder in self.root.glob(f"scratch/{key[:SHORT]}*") if folder.is_dir() and folder != mine]
        for folder in sorted(left, key=lambda folder: folder.stat().st_mtime, reverse=True):
            if mine.exists():
                shutil.rmtree(folder, ignore_errors=True)
            else:
                folder.rename(mine)

    def publish(self, scratch: Path, manifest: Manifest) -> Path:
        """Move a finished scratch folder to its place. The caller holds the lock; a crash at any point leaves nothing or all."""
        final = self.path(manifest.stage, manifest.key)
        final.parent.mkdir(parents=True, exist_ok=True)
        for name in manifest.files:
            _fsync(scratch / name)
            os.chmod(scratch / name, 0o444)  # published means unchanging
        for folder in {(scratch / name).parent for name in manifest.files} | {scratch}:
            _fsync(folder)
        (scratch / "artifact.tmp").write_text(manifest.model_dump_json(indent=1) + "\n")
        _fsync(scratch / "artifact.tmp")
        os.rename(scratch / "artifact.tmp", scratch / MANIFEST)
        _fsync(scratch)
        if final.exists() and self.find_hit(manifest.stage, manifest.key, manifest.read) is None:
            shutil.rmtree(final)  # damaged, of another key with the same first digits, or a report on bytes that are gone
        try:
            os.rename(scratch, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or self.find_hit(manifest.stage, manifest.key, manifest.read) is None:
                raise
            shutil.rmtree(scratch)  # somebody else published the same key first
        _fsync(final.parent)
        return final


def digests_read(input_keys: Mapping[str, str], manifests: Mapping[str, Manifest | None]) -> dict[str, str]:
    """What an execution reads, by port: the digest of an artifact's bytes, or the key of a source, which is its content's digest."""
    return {port: content_digest(found) if (found := manifests.get(port)) else key for port, key in input_keys.items()}


def read_manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.load(folder)
    except (OSError, ValueError, ValidationError):
        return None


def file_records(folder: Path, hashed: Mapping[str, Hashed] | None = None) -> dict[str, FileRecord]:
    """Size and sha256 of every file below `folder`, by relative path, `artifact.json` aside. Of those in `hashed` that were not
    touched since, without reading them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    records = {}
    for name, path in ((path.relative_to(folder).as_posix(), path) for path in files):
        known = (hashed or {}).get(name)
        digest = known.sha256 if known and known.stamp == stamp(path) else sha256_file(path)
        records[name] = FileRecord(nbytes=path.stat().st_size, sha256=digest)
    return records


def check_writable(root: Path) -> None:
    """StoreError where the outputs folder cannot be written, found before any work is done."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        write_whole(root / MARKER, "outputs of llmpress: store/, runs/, scratch/, locks/, mlflow.db\n")
    except OSError as error:
        raise StoreError(explain_os_error(error, root)) from None


def write_whole(file: Path, text: str) -> None:
    """Replace a small file in one step: a reader, also after a crash, sees the old text or the new."""
    temporary = file.with_name(f".{file.name}-{uuid.uuid4().hex}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def explain_os_error(error: OSError, place: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {place} is full; free some space (`run mode=gc` removes what no run uses) and run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{place} cannot be written ({error.strerror}); choose another folder with `outputs=...`"
    return f"{place} cannot be used ({error.strerror or error}); choose another folder with `outputs=...`"


def _fsync(path: Path) -> None:
    if sys.platform == "win32":  # directories cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
