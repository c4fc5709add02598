"""Who may work on what, in a store that several runs use: a lock of the operating system, or a lease.

`file` is a flock: the system frees it as soon as its holder dies. It holds on one machine, and between machines only where their
file system carries such locks. `lease` is a file that its holder touches every LEASE / 3 seconds: on the same machine a dead holder is
seen at once, elsewhere its claim is taken over when nothing has touched it for LEASE seconds of the waiting run's own clock. A flock and
a lease do not see each other, so once a run with `lock=lease` has worked in a store, all that follow use leases, whatever they ask for.

A lease is a hint. A machine that stood still for longer than LEASE wakes up beside its successor, so nothing may rely on a lease but
that work is seldom done twice: each holder has a scratch folder of its own, and the first to publish wins.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, SoftFileLease, Timeout

LockKind = Literal["auto", "file", "lease"]
LEASE = 60.0  # seconds; the same for all who share a store, for a lease of another duration is refused
POLL = {"file": 0.05, "lease": 0.5}  # seconds between two looks of one who waits; a lease is looked at through a network
SHARED = "shared"  # in the folder of locks: leases are used here
FOREVER = -1.0


@dataclass(frozen=True)
class Claim:
    """A claim that is held. `token` names this very hold of a lease; it is empty for a flock."""

    file: Path
    token: str
    inode: int

    def lost(self) -> bool:
        """Whether another has taken it over meanwhile, which only happens to leases."""
        if not self.token:
            return False
        try:
            return self.file.stat().st_ino != self.inode
        except FileNotFoundError:
            return True


class Claims:
    """The claims of one store, kept as files below `folder`."""

    def __init__(self, folder: Path, wanted: LockKind = "auto", lease: float = LEASE) -> None:
        self.folder, self.wanted, self.lease = folder, wanted, lease

    def kind(self) -> Literal["file", "lease"]:
        """What is used here. OSError where the folder cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        shared = self.folder / SHARED
        if self.wanted == "lease" and not shared.exists():
            shared.touch()
        return "lease" if shared.exists() else "file"

    @contextmanager
    def hold(self, name: str, timeout: float = FOREVER) -> Iterator[Claim]:
        """Wait at most `timeout` seconds for the claim called `name`. TimeoutError where another holds it still."""
        kind = self.kind()
        lock: FileLock | SoftFileLease
        if kind == "lease":
            lock = SoftFileLease(self.folder / f"{name}.lease", lease_duration=self.lease, timeout=timeout, poll_interval=POLL[kind])
        else:
            lock = FileLock(self.folder / f"{name}.lock", timeout=timeout, poll_interval=POLL[kind])
        try:
            lock.acquire()
        except Timeout:
            raise TimeoutError(f"another run holds {name}") from None
        file = Path(lock.lock_file)
        try:
            yield Claim(file, lock.token or "" if isinstance(lock, SoftFileLease) else "", file.stat().st_ino)
        finally:
            lock.release()

    @contextmanager
    def announce(self, name: str) -> Iterator[None]:
        """Hold a claim of a name that nobody else uses; its file is gone afterwards, unless this process is killed."""
        with self.hold(name) as claim:
            try:
                yield
            finally:
                if not claim.token:  # a lease removes its file by itself
                    claim.file.unlink(missing_ok=True)

    def held(self, pattern: str) -> list[str]:
        """The names that somebody holds now. What a killed process left is removed."""
        names = []
        for file in sorted((*self.folder.glob(f"{pattern}.lock"), *self.folder.glob(f"{pattern}.lease"))):
            if self._is_held(file):
                names.append(file.stem)
            else:
                file.unlink(missing_ok=True)
        return names

    def _is_held(self, file: Path) -> bool:
        if file.suffix == ".lease" and self._age(file) > self.lease:
            return False
        lock = FileLock(file, timeout=0) if file.suffix == ".lock" else SoftFileLease(file, lease_duration=self.lease, timeout=0)
        try:
            with lock:
                return False
        except Timeout:
            return True

    def _age(self, file: Path) -> float:
        """Seconds since `file` was touched, by the clock of the file system, which all machines see."""
        probe = self.folder / f".now-{os.uname().nodename}-{os.getpid()}"
        probe.touch()
        try:
            return probe.stat().st_mtime - file.stat().st_mtime
        except FileNotFoundError:  # released meanwhile
            return float("inf")
        finally:
            with suppress(FileNotFoundError):
                probe.unlink()
