"""`hydra/sweeper=orders`: every legal order runs, what they share runs once, what is illegal is told; a plan makes nothing."""

import json
from pathlib import Path

from tests.scenarios.conftest import UNTRACKED, Run

ORDERS = ("recipe=mine.yaml", "hydra/sweeper=orders", UNTRACKED)
REASON = "order: prune needs a dense checkpoint and quantize.model is quantized"


def ran(folder: Path) -> list[str]:
    """Keys of the stages that the jobs executed, over all reports."""
    reports = [json.loads(file.read_text()) for file in (folder / "outputs" / "runs").glob("*/*/report.json")]
    return sorted(stage["key"] for report in reports for stage in report["stages"] if stage["status"] == "ran")


def test_every_distinct_execution_of_the_tree_runs_once_and_again_all_are_hits(run: Run, folder: Path) -> None:
    planned = run(*ORDERS, "mode=plan", "format=json")
    assert planned.code == 0, planned.err
    assert not (folder / "outputs").exists() and not (folder / "multirun").exists()
    tree = json.loads(planned.out)
    assert tree["jobs"] == 2 and tree["executions"]["to_run"] == tree["executions"]["distinct"]

    first = run(*ORDERS)
    assert first.code == 0, first.err
    store = sorted(path.name for path in (folder / "outputs" / "store").iterdir())
    assert len(ran(folder)) == len(set(ran(folder))) == len(store) == tree["executions"]["distinct"]
    assert len(list((folder / "outputs" / "runs" / "mine").iterdir())) == 2

    again = run(*ORDERS)
    assert again.code == 0 and ran(folder) == []
    lasting = [name for name in store if not name.startswith("hidden_states-")]  # the others only spare work, and there is none
    assert len(lasting) < len(store) and f"{len(lasting)} are in the store, 0 are to run" in again.err
    assert sorted(path.name for path in (folder / "outputs" / "store").iterdir()) == store


def test_an_illegal_order_is_skipped_with_its_reason_and_the_plan_is_a_tree(run: Run, folder: Path) -> None:
    outcome = run(*ORDERS, "mode=plan", "convert=never", "stages.quantize.num_bits=4,8", "hydra.sweeper.subset=true")
    assert outcome.code == 0, outcome.err
    named = ", ".join(f"quantize>prune (stages.quantize.num_bits={bits})" for bits in (4, 8))
    assert f"skipped {named}: {REASON}" in outcome.err
    assert "quantize (num_bits=4)" in outcome.out and "quantize (num_bits=8)" in outcome.out
    assert "5 jobs: " in outcome.out  # prune, prune and quantize in 4 or 8 bits, quantize in 4 or 8 bits
    assert not (folder / "outputs").exists()


def test_without_a_legal_order_nothing_starts(run: Run, folder: Path) -> None:
    missing = run(*ORDERS, "data.splits.eval=data/nowhere.txt")
    assert missing.code == 2 and len(missing.errors) == 1 and "data/nowhere.txt" in missing.errors[0]
    small = run(*ORDERS, "mode=plan", "target.ram=1KiB")
    assert small.code == 3, small.err
    for order, sentence in {
        "[]": "error: order: a recipe needs a list of its stages",
        "[evaluate]": "error: order: nothing in it makes a model",
        "[prune,quantise]": "error: order: 'quantise' is not under `stages`; did you mean 'quantize'?",
    }.items():
        outcome = run(*ORDERS, f"order={order}")
        assert outcome.code == 2 and outcome.errors[0].startswith(sentence), outcome.err
    assert not (folder / "outputs").exists()


def test_options_of_the_sweeper_are_checked(run: Run) -> None:
    for option, sentence in {
        "subset=9": "error: hydra.sweeper.subset: 9 is not a choice; write true or false",
        "max_batch_size=0": "error: hydra.sweeper.max_batch_size: it is the number of jobs launched together; write 1 or more",
        "legal=os.system": "error: hydra.sweeper.legal: there is no such setting",
    }.items():
        outcome = run(*ORDERS, "mode=plan", f"hydra.sweeper.{option}")
        assert outcome.code == 2 and outcome.errors[0].startswith(sentence), outcome.err
    gc = run(*ORDERS, "mode=gc")
    assert gc.code == 2 and "write mode=run or mode=plan" in gc.errors[0]


def test_a_failed_job_leaves_the_others_alone_and_the_sweep_says_so_at_the_end(run: Run, folder: Path) -> None:
    limited = ("order=[prune,quantize]", "hydra.sweeper.subset=true", "hydra.sweeper.max_batch_size=1")
    outcome = run(*ORDERS, *limited, "stages.prune.execution.memory_limit=1KiB")
    assert outcome.code == 4
    assert len(outcome.errors) == outcome.out.count("\nfailed (4)") == 3
    assert [path.name.partition("-")[0] for path in (folder / "outputs" / "store").iterdir()].count("structured_prune") == 0
    assert run(*ORDERS, *limited).code == 0


def test_a_job_returns_the_objectives_and_an_unknown_one_is_told(run: Run) -> None:
    outcome = run("recipe=mine.yaml", "order=[quantize]", UNTRACKED, "objectives=[nbytes,perplexty]")
    assert outcome.code == 2 and outcome.errors[0].startswith("error: objectives: the run has no metric 'perplexty'")
