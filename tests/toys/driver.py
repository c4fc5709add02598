"""A main process of its own, for tests that kill it: `python -m tests.toys.driver '{"outputs": ..., "model": ..., ...}'`.

`die_before`: kill -9 itself before the n-th file system call by which an artifact is published. Without it, or when there are fewer
calls, the run ends normally and prints how many there were. Exits as the command line does.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from pipeline.artifact import Manifest
from pipeline.errors import LlmpressError
from pipeline.executor import execute
from pipeline.process import ForkServer
from pipeline.store import Store
from tests import toys

PUBLISHING_CALLS = ("fsync", "chmod", "rename")


def wrap_calls(made: list[str], die_before: int | None) -> None:
    """From here on, note every call of PUBLISHING_CALLS in `made`."""

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def call(*args: Any, **keywords: Any) -> Any:
            made.append(name)
            if len(made) == die_before:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **keywords)

        setattr(os, name, call)

    for name in PUBLISHING_CALLS:
        wrap(name)


def main() -> int:
    wanted = json.loads(sys.argv[1])
    store = Store(Path(wanted["outputs"]))
    log = store.root / "server.log"
    plan = toys.plan_of(store, Path(wanted["model"]), wanted["stages"])
    server = toys.spawning(log) if wanted.get("spawn", True) else ForkServer(log)
    calls: list[str] = []
    publish, rename = store.publish, os.rename

    def counted(scratch: Path, manifest: Manifest) -> Path:
        if os.rename is rename:
            wrap_calls(calls, wanted.get("die_before"))
        return publish(scratch, manifest)

    store.publish = counted  # type: ignore[method-assign]
    try:
        with server:
            results = execute(plan, store, store.root / wanted.get("run", "run"), [], server)
    except LlmpressError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps({"calls": calls, "statuses": [result.status for result in results]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
