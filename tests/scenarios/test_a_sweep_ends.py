"""However a sweep ends, it leaves one folder, named after what was swept, with a record of each job and what came out side by side."""

import json
import sqlite3
from pathlib import Path
from typing import Any

from tests.scenarios.conftest import UNTRACKED, Run

SWEEP = ("-m", "recipe=mine.yaml", "order=[quantize,evaluate]", "stages.quantize.num_bits=4,8")


def sweeps(folder: Path) -> list[Path]:
    return sorted((folder / "outputs" / "sweeps").iterdir())


def jobs(sweep: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((sweep / "jobs").glob("*.json"))]


def test_a_sweep_leaves_records_and_a_ranking_and_the_same_sweep_again_finds_them(run: Run, folder: Path) -> None:
    first = run(*SWEEP, UNTRACKED)
    assert first.code == 0, first.err
    (sweep,) = sweeps(folder)
    assert sweep.name.startswith("mine-") and {"sweep.html", "sweep.md", "sweep.json"} <= {file.name for file in sweep.iterdir()}
    runs = {path.name for path in (folder / "outputs" / "runs" / "mine").iterdir()}
    assert {record["digest"][:12] for record in jobs(sweep)} == {file.stem for file in (sweep / "jobs").iterdir()} == runs
    assert [record["exit_code"] for record in jobs(sweep)] == [0, 0]
    assert "rtn4" in first.out and "rtn8" in first.out

    again = run("fit=warn", *SWEEP, UNTRACKED)  # how it is run is no part of what is swept
    assert again.code == 0 and sweeps(folder) == [sweep] and len(jobs(sweep)) == 2
    assert json.loads((sweep / "sweep.json").read_text())["executions"]["ran"] == 0

    other = run(*SWEEP, UNTRACKED, "stages.quantize.group_size=128")
    assert other.code == 0 and len(sweeps(folder)) == 2


def test_a_job_that_fails_is_told_once_and_the_others_are_ranked(run: Run, folder: Path) -> None:
    outcome = run("-m", "recipe=mine.yaml", "order=[quantize,evaluate]", "stages.quantize.group_size=64,100", UNTRACKED)
    assert outcome.code == 2
    assert len(outcome.errors) == 1 and "group_size" in outcome.errors[0]
    (sweep,) = sweeps(folder)
    assert sorted(record["exit_code"] for record in jobs(sweep)) == [0, 2]
    content = json.loads((sweep / "sweep.json").read_text())
    assert len(content["rows"]) == 1 and len(content["failed"]) == 1
    assert "stages.quantize.group_size=100" in outcome.out


def test_what_is_wrong_with_the_whole_sweep_leaves_no_folder_behind(run: Run, folder: Path) -> None:
    unknown = run("-m", "recipe=mine.yaml", "stages.quantise.num_bits=4,8")
    assert unknown.code == 2 and len(unknown.errors) == 1 and "did you mean 'quantize'" in unknown.errors[0]
    assert run("-m", "recipe=nothing", "stages.quantize.num_bits=4,8").code == 2


def test_the_sweep_s_own_run_in_mlflow_carries_the_ranking_and_is_updated(run: Run, folder: Path) -> None:
    def parent() -> list[tuple[str, str, str]]:
        with sqlite3.connect(folder / "outputs" / "mlflow.db") as database:
            rows = database.execute(
                "SELECT runs.run_uuid, runs.name, note.value FROM runs JOIN tags kind ON kind.run_uuid = runs.run_uuid AND "
                "kind.key = 'llmpress.kind' AND kind.value = 'sweep' JOIN tags note ON note.run_uuid = runs.run_uuid AND "
                "note.key = 'mlflow.note.content'"
            )
            return list(rows)

    first = run(*SWEEP)
    assert first.code == 0, first.err
    ((identity, name, note),) = parent()
    assert name == "sweep of mine: 2 jobs" and "rtn8" in note
    (artifacts,) = (folder / "outputs" / "mlartifacts").glob(f"*/{identity}/artifacts")
    assert {"sweep.html", "sweep.json", "sweep.md"} <= {file.name for file in artifacts.iterdir()}

    again = run(*SWEEP)
    assert again.code == 0 and "already recorded" in again.out + again.err
    assert [row[0] for row in parent()] == [identity]
