"""The rows that a card runs, rehearsed on the CPU from the unpacked bundle, without the libraries that a rented machine lacks."""

import json
import os
import subprocess
import sys
import tarfile
import time
from importlib.metadata import PackageNotFoundError, distributions, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bench.memory import config, make_checkpoint
from pipeline.plan import make_plan
from pipeline.process import ForkServer
from pipeline.recipe import read_config
from pipeline.store import Store
from tests.gpu import bundle, measure
from tests.gpu.agreement import COMPARED_BY
from tests.gpu.rows import DENSE, SIZES, Row, rows

REHEARSED = ["evaluate rtn, layer by layer", "gptq", "distill"]  # with what they need: every stage once
CARD = {"count": 1, "name": "NVIDIA H200", "memory": 150_754_820_096, "compute_capability": 9.0}


def required(names: tuple[str, ...]) -> set[str]:
    """They and what they require, as it is installed here; extras aside."""
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needs = [Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:  # of another platform
            continue
        waiting += [canonicalize_name(need.name) for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    return found


def hidden() -> dict[str, list[str]]:
    """All that is installed here, llmpress too, and is neither on the machine nor in the bundle."""
    there = required(bundle.MACHINE) | {canonicalize_name(name) for name in bundle.WHEELS}
    absent = {canonicalize_name(found.metadata["Name"]) for found in distributions()} - there
    modules = {
        module for module, names in packages_distributions().items() if {canonicalize_name(name) for name in names} <= absent
    } - {"pipeline", "stages"}  # the bundle has its own  # fmt: skip
    return {"modules": sorted(modules), "distributions": sorted(absent), "paths": [str(bundle.ROOT)]}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle's folder, without wheels: those libraries are installed here."""
    folder = tmp_path_factory.mktemp("carried")
    bundle.pack(bundle.ROOT, folder / "no wheels", folder / "bundle.tar.gz")
    with tarfile.open(folder / "bundle.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / bundle.NAME


def run_bundle(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    changed = {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(folder / "tree/tests/gpu/bare"),
        "LLMPRESS_HIDDEN": json.dumps(hidden()),
    }
    command = ["sh", str(folder / "run.sh"), "--model", "tiny", *arguments]
    return subprocess.run(command, cwd=folder, env=os.environ | changed, capture_output=True, text=True)


def test_the_bundle_runs_on_a_machine_with_little_more_than_torch(unpacked: Path, tmp_path: Path) -> None:
    done = run_bundle(unpacked, "--device", "cpu", "--scratch", str(tmp_path), "--rows", *REHEARSED)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((unpacked / "gpu.json").read_text())
    assert record["problems"] == record["warnings"] == []
    assert {name for name, version in record["versions"].items() if version is None} == {
        "hydra-core", "omegaconf", "mlflow", "bitsandbytes", "peft",
    }  # fmt: skip
    found = {row["name"]: row for row in record["rows"]}
    assert {row["stage"] for row in found.values()} == {"structured_prune", "rtn", "gptq", "evaluate", "distill"}
    assert all(row["planned_bytes"] > 0 and row["measured_bytes"] > 0 and row["seconds"] > 0 for row in found.values())
    layerwise = found["evaluate rtn, layer by layer"]
    assert layerwise["execution"]["mode"] == "layerwise" and layerwise["results"]["kl_divergence"] > 0
    assert layerwise["agreement"]["with"] == "evaluate rtn" and layerwise["agreement"]["identical"]
    assert list(tmp_path.iterdir()) == [], "checkpoints are removed"


@pytest.mark.gpu
def test_every_row_runs_on_a_card_and_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    status = measure.main(["--json", str(tmp_path / "gpu.json"), "--model", "tiny"])
    assert status == 0, json.loads((tmp_path / "gpu.json").read_text())["problems"]


def test_without_a_card_one_sentence_says_how_to_rehearse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match="no NVIDIA card here that torch can use; write --device cpu"):
        measure.main(["--json", str(tmp_path / "gpu.json")])


def test_a_row_that_fails_takes_only_those_with_it_that_need_its_result(tmp_path: Path) -> None:
    record: dict[str, Any] = {"started": time.monotonic(), "rows": [], "warnings": [], "problems": []}
    session = measure.Session(tmp_path, tmp_path / "gpu.json", {"name": "host"}, False, record)
    with ForkServer(tmp_path / "log") as server:
        for row in (Row("first", "rtn"), Row("second", "evaluate", model="first"), Row("third", "rtn")):
            session.run(row, server)
    first, second, third = json.loads((tmp_path / "gpu.json").read_text())["problems"]
    assert first.startswith("first: model: ") and DENSE in first  # there is no such folder
    assert second == "second: not run: it needs the result of first"
    assert third.startswith("third: model: ")


def test_what_is_planned_for_a_gpu_is_what_computes_on_it(tmp_path: Path) -> None:
    """Of every row that reads the dense model alone."""
    sizes = SIZES["tiny"]
    make_checkpoint(tmp_path / DENSE, config("tiny", measure.VOCABULARY) | {"num_hidden_layers": sizes.layers})
    planned = {}
    for row in rows(sizes):
        if not row.needs and not row.beside:
            content = row.recipe({DENSE: str(tmp_path / DENSE)}, measure.DATA, measure.target(CARD, on_gpu=True))
            plan = make_plan(read_config(content, row.name)[0], Store(tmp_path), measure.ROOT, execute=True)
            assert plan.problems == []
            planned[row.name] = plan.nodes[0].memory.totals["vram"]
            assert measure.computed_in(plan.nodes[0]) == (None if not planned[row.name] else "fp32" if "fp32" in row.name else "bf16")
    assert {name for name, nbytes in planned.items() if nbytes == 0} == {"prune by magnitude", "rtn"}
    assert set(planned) >= {"evaluate dense", "evaluate dense, layer by layer", "prune by activation", "gptq", "gptq, offloaded to disk"}
    assert planned["evaluate dense in fp32"] > planned["evaluate dense"]


@pytest.mark.parametrize(
    ("planned", "peak", "problem"),
    [
        (10 << 30, 9 << 30, ""),
        (10 << 30, 12 << 30, "took 12.9 GB of VRAM, planned were 10.7 GB"),
        (10 << 30, 4 << 30, "planned 10.7 GB of VRAM and took 4.29 GB"),
        (10 << 30, None, "planned 10.7 GB of VRAM and used no GPU"),
        (0, None, ""),
        (0, 1 << 20, "took 1.05 MB of VRAM, planned were 0 B"),
        (50 << 20, 150 << 20, ""),  # cuBLAS has its part
    ],
)
def test_a_plan_has_to_be_enough_and_not_twice_what_was_needed(planned: int, peak: int | None, problem: str) -> None:
    assert measure.vram_problems(planned, peak) == ([problem] if problem else [])


def test_rows_bring_those_that_they_need_and_are_compared_with() -> None:
    chosen = [row.name for row in measure.chosen_rows(SIZES["tiny"], ["evaluate gptq, layer by layer"])]
    assert chosen == ["gptq", "evaluate gptq", "evaluate gptq, layer by layer"]
    with pytest.raises(SystemExit, match="there is no row 'awq'; there are: evaluate dense, "):
        measure.chosen_rows(SIZES["tiny"], ["awq"])


@pytest.mark.parametrize("size", list(SIZES))
def test_what_a_row_needs_comes_before_it(size: str) -> None:
    before = {""}
    for row in rows(SIZES[size]):
        assert row.needs | {row.equals} <= before and row.name not in before
        assert not row.equals or row.stage in COMPARED_BY
        before.add(row.name)
