"""Workers from a warm server: quick, apart from each other, and gone when they should be."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import LlmpressError
from pipeline.process import ForkServer, Worker, kill
from pipeline.worker import RESPONSE, Success
from tests import toys
from tests.pipeline.test_worker import prepare


def finish(worker: Worker) -> int:
    code = worker.wait(300)
    assert code is not None
    return code


def wall_seconds(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


@pytest.fixture(scope="module")
def import_seconds() -> float:
    """What a worker that is not forked has to do first."""
    command = [sys.executable, "-c", "import torch, transformers"]
    return wall_seconds(lambda: subprocess.run(command, check=True))


def test_forked_and_spawned_workers_do_the_same_job(fork_server: ForkServer, tmp_path: Path) -> None:
    outcomes = []
    for name, server in (("forked", fork_server), ("spawned", toys.spawning(tmp_path / "log"))):
        folder = tmp_path / name
        folder.mkdir()
        prepare(folder)
        assert finish(server.run(folder)) == 0
        response = RESPONSE.validate_json((folder / "response.json").read_bytes())
        assert isinstance(response, Success)
        assert (folder / "log.txt").read_text() == "toy runs write\n"
        outcomes.append((response.outputs, response.environment))
    assert outcomes[0] == outcomes[1]
    assert fork_server.reason == "", "with the pinned libraries, forking is safe on Linux"


def test_a_warm_start_takes_a_fraction_of_what_the_imports_take(fork_server: ForkServer, tmp_path: Path, import_seconds: float) -> None:
    prepare(tmp_path)
    finish(fork_server.run(tmp_path))
    warm = min(wall_seconds(lambda: finish(fork_server.run(tmp_path))) for _ in range(3))
    assert warm < 0.5 * import_seconds


def test_the_libraries_are_there_and_threads_work_after_the_fork(fork_server: ForkServer, tmp_path: Path) -> None:
    prepare(tmp_path, action="threads")
    assert finish(fork_server.run(tmp_path)) == 0, (tmp_path / "log.txt").read_text()
    assert "torch was imported: True" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("forked", [True, False])
def test_a_worker_that_stops_is_killed_with_what_it_started(forked: bool, fork_server: ForkServer, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    prepare(tmp_path, action="stop_with_child", witness=str(witness))
    worker = (fork_server if forked else toys.spawning(tmp_path / "log")).run(tmp_path)
    toys.wait_until(lambda: witness.exists() and len(witness.read_text().split()) == 2)
    kill(worker)
    assert worker.returncode == -signal.SIGTERM
    toys.wait_until(lambda: not any(toys.is_alive(int(pid)) for pid in witness.read_text().split()))


def test_a_process_left_behind_ends_with_its_stage(fork_server: ForkServer, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    prepare(tmp_path, action="leave_child", witness=str(witness))
    assert finish(fork_server.run(tmp_path)) == 0
    toys.wait_until(lambda: not any(toys.is_alive(int(pid)) for pid in witness.read_text().split()))


def test_a_server_that_dies_is_a_clear_error_and_its_workers_are_lost(tmp_path: Path, toys_path: str) -> None:
    server = ForkServer(tmp_path / "server.log")
    server.start()
    assert server._server
    server._server.kill()
    with pytest.raises(LlmpressError, match=r"ended by itself \(exit status -9\); .*server\.log may say why"):
        server.run(tmp_path)
    server.close()


def test_closing_does_not_wait_for_the_imports(tmp_path: Path, import_seconds: float) -> None:
    server = ForkServer(tmp_path / "server.log")
    server.start()
    assert server._server
    pid = server._server.pid
    assert wall_seconds(server.close) < 0.5 * import_seconds
    assert not toys.is_alive(pid)


def test_a_request_names_a_folder_only(fork_server: ForkServer, tmp_path: Path) -> None:
    folder = tmp_path / 'with "quotes"\nand a line break'
    folder.mkdir()
    prepare(folder)
    assert finish(fork_server.run(folder)) == 0
    assert json.loads((folder / "response.json").read_text())["ok"]


def test_what_no_stage_uses_is_not_imported_first_and_still_there_for_one_that_does() -> None:
    code = (
        "import sys\nfrom pipeline.forkserver import HIDDEN, preload\nassert preload() == ''\n"
        "assert not set(HIDDEN) & set(sys.modules), 'hidden while the libraries look for them'\n"
        "import scipy.optimize, sklearn.metrics, transformers\n"
        "from transformers.generation.candidate_generator import AssistedCandidateGenerator\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\nimport torch\n"
        "config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)\n"
        "model = LlamaForCausalLM(config)\n"
        "assert model.generate(torch.tensor([[1, 2]]), min_new_tokens=2, max_new_tokens=2, do_sample=False).shape == (1, 4)\n"
        "assert float(model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss) > 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
