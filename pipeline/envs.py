"""Environments of isolated backends: a lock file of exact versions, and the interpreter that holds them, built on first use.

    stages/envs/<name>.txt        every package at one version; its digest stands in keys, in place of library versions
    outputs/envs/<digest12>/      the virtual environment, usable once `complete.json` is in it
    outputs/envs/<digest12>.log   what uv said while it was built

uv and not pip: it links the files of its cache in place of copying them, so that a second environment with the same torch takes
seconds and no disk; pip would copy 1.3 GB. Where uv looks for packages is the user's to say, in uv's own settings or in
those of pip that it does not read by itself (`PIP_INDEX_URL`, `PIP_EXTRA_INDEX_URL`, `PIP_FIND_LINKS`).

A build that was killed leaves a folder without its mark, which the next one removes. One process builds, others wait for it.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock

from pipeline.errors import PlanError, did_you_mean
from pipeline.stage import MAIN

SHORT = 12
MARK = "complete.json"
FROM_PIP = {  # uv's setting -> pip's, and what separates values in uv's
    "UV_DEFAULT_INDEX": ("PIP_INDEX_URL", " "),
    "UV_INDEX": ("PIP_EXTRA_INDEX_URL", " "),
    "UV_FIND_LINKS": ("PIP_FIND_LINKS", ","),
}
UNREACHABLE = ("network was disabled", "dns error", "error sending request", "tcp connect error", "client error (connect)")
ONLY_PYTHON = {"BUILD_CUDA_EXT": "0"}  # auto-gptq, where it has no wheel: its kernels are for inference, which is not done there

Announce = Callable[[str], None]


def _folder() -> Path:
    return Path(__file__).resolve().parent.parent / "stages" / "envs"


@cache
def lock_file(name: str) -> Path:
    """RecipeError's kind of sentence where there is none: a stage names an environment that is not shipped."""
    file = _folder() / f"{name}.txt"
    if not file.is_file():
        raise PlanError(f"env: there is no environment '{name}'{did_you_mean(name, [lock.stem for lock in _folder().glob('*.txt')])}")
    return file


@cache
def pins(name: str) -> dict[str, str]:
    """Package -> version. ValueError for a line that is no exact version."""
    found = {}
    for line in lock_file(name).read_text(encoding="utf-8").splitlines():
        requirement = line.partition("#")[0].strip()
        if requirement:
            package, equals, version = requirement.partition("==")
            if not equals or not version or any(mark in version for mark in ",;*"):
                raise ValueError(f"{lock_file(name).name}: '{requirement}' is not an exact version")
            found[package.lower()] = version
    return found


@cache
def lock_digest(name: str) -> str:
    """sha256 over the versions: comments and order aside."""
    content = "".join(f"{package}=={version}\n" for package, version in sorted(pins(name).items()))
    return hashlib.sha256(content.encode()).hexdigest()


def current_folders() -> set[str]:
    """Names below outputs/envs that this llmpress may use; what else is there was built for other locks."""
    return {lock_digest(lock.stem)[:SHORT] for lock in _folder().glob("*.txt")}


@dataclass(frozen=True)
class PlannedEnvironment:
    """An environment that nodes of a plan compute in. `built` says whether it is there already."""

    name: str
    digest: str
    nodes: tuple[str, ...]
    built: bool

    @property
    def sentence(self) -> str:
        state = "is built" if self.built else f"is not built yet: {len(pins(self.name))} packages are installed when it is first needed"
        return f"environment {self.name} ({self.digest[:SHORT]}) of {', '.join(self.nodes)} {state}"


class Environments:
    """Those below an outputs folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def planned(self, nodes: Iterable[tuple[str, str]]) -> tuple[PlannedEnvironment, ...]:
        """The environments that nodes, given as (node, environment), need beside the main one."""
        users: dict[str, list[str]] = {}
        for node, name in nodes:
            if name != MAIN:
                users.setdefault(name, []).append(node)
        return tuple(PlannedEnvironment(name, lock_digest(name), tuple(users[name]), self.is_built(name)) for name in sorted(users))

    def folder(self, name: str) -> Path:
        return self.root / "envs" / lock_digest(name)[:SHORT]

    def is_built(self, name: str) -> bool:
        try:
            return bool(json.loads((self.folder(name) / MARK).read_bytes())["digest"] == lock_digest(name))
        except (OSError, ValueError, KeyError):
            return False

    def python(self, name: str, announce: Announce) -> Path:
        """Its interpreter, after building it where it is not there. `announce` takes a sentence when that begins and when it ends.

        PlanError: it cannot be built; the sentence names the log.
        """
        interpreter = self.folder(name) / "bin" / "python"
        if self.is_built(name):
            return interpreter
        locks = self.root / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"env-{lock_digest(name)[:SHORT]}.lock"):
            if not self.is_built(name):  # another run has built it meanwhile
                self._build(name, announce)
        return interpreter

    def _build(self, name: str, announce: Announce) -> None:
        folder, started = self.folder(name), time.monotonic()
        log = folder.with_suffix(".log")
        announce(f"{name}: installing {len(pins(name))} packages, once; {log} says how far it is")
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        uv, lock = find_uv(), str(lock_file(name))
        torch = f"torch=={pins(name)['torch']}" if "torch" in pins(name) else ""
        commands = [
            [uv, "venv", "--python", sys.executable, "--no-project", str(folder)],
            [uv, "pip", "install", "--python", str(folder), "--no-deps", "--requirements", lock],
            *([[uv, "pip", "install", "--python", str(folder), "--constraints", lock, torch]] if torch else []),  # its CUDA libraries
        ]
        with open(log, "wb") as stream:
            for command in commands:
                stream.write(f"$ {' '.join(command)}\n".encode())
                stream.flush()
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=_environment(), cwd=folder.parent
                )
                if done.returncode:
                    raise PlanError(_why(name, log))
        seconds = time.monotonic() - started
        temporary = folder / "complete.tmp"
        temporary.write_text(json.dumps({"name": name, "digest": lock_digest(name), "seconds": round(seconds, 1)}) + "\n")
        temporary.rename(folder / MARK)
        announce(f"{name}: installed in {seconds:.0f} s")


def find_uv() -> str:
    """The path of the uv that llmpress depends on, else of the user's own."""
    try:
        from uv import find_uv_bin  # here: a plan does without it

        return str(find_uv_bin())
    except (ImportError, FileNotFoundError):
        found = shutil.which("uv")
    if not found:
        raise PlanError("an isolated backend's environment is built by uv, which is not installed here; write pip install uv")
    return found


def _environment() -> dict[str, str]:
    return {**uv_settings(os.environ), **ONLY_PYTHON}


def uv_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for uv: pip's index and links where uv's own are not set."""
    settings = dict(environ)
    for ours, (pips, separator) in FROM_PIP.items():
        if environ.get(pips):
            settings.setdefault(ours, separator.join(environ[pips].split()))
    return settings


def _why(name: str, log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    said = " ".join(lines).lower()
    if any(text in said for text in UNREACHABLE):
        return f"environment {name}: it cannot be built without a package index, and none could be reached; see {log}"
    return f"environment {name}: it cannot be built ({_first_error(lines)}); see {log}"


def _first_error(lines: Iterable[str]) -> str:
    causes = [re.sub(r"^\W+", "", line).removeprefix("error: ") for line in lines if line and not line.startswith("$")]
    return next((cause for cause in causes if "No solution" in cause or "Failed" in cause or "rror" in cause), causes[-1] if causes else "")
