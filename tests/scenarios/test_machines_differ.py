"""One store, one recipe, machines whose processors have units for bf16 and others."""

import json
from pathlib import Path

from pipeline.artifact import Manifest
from pipeline.compute_dtype import DECIDED
from tests.scenarios.conftest import Run

QUIET = "tracking.enabled=false"
MEASURED = ("recipe=mine.yaml", "order=[quantize,evaluate]", QUIET)


def test_what_another_machine_computed_is_not_taken_and_the_plan_says_how_to_take_it(run: Run, folder: Path) -> None:
    first = run(*MEASURED, env={DECIDED: "bf16"})
    assert first.code == 0 and "computed in bf16\n" in first.out, first.err
    planned = run(*MEASURED, "mode=plan", env={DECIDED: "fp32"})
    assert "to run (params.compute_dtype: bf16 -> fp32; compute_dtype: bf16 takes what is stored)" in " ".join(planned.out.split())
    taken = run(*MEASURED, "mode=plan", "stages.evaluate.compute_dtype=bf16", "format=json", env={DECIDED: "fp32"})
    assert {node["status"] for node in json.loads(taken.out)["nodes"]} == {"hit"}
    second = run(*MEASURED, env={DECIDED: "fp32"})
    assert second.code == 0 and "computed in fp32\n" in second.out
    manifests = [Manifest.load(file.parent) for file in (folder / "outputs/store").glob("*/artifact.json")]
    dtypes = sorted(manifest.params["compute_dtype"] for manifest in manifests if manifest.stage == "evaluate")
    assert dtypes == ["bf16", "bf16", "fp32", "fp32"], "the source model and the quantized one, twice"
    told = [line for line in run("mode=gc").out.splitlines() if "alone: delete that folder" in line]
    assert len(told) == 2, "what each machine computed is of use to one run"
    assert sum(manifest.stage == "rtn" for manifest in manifests) == 1, "rounding multiplies nothing, so that both machines share it"


def test_a_store_that_was_filled_before_dtypes_were_in_keys_is_computed_again_and_says_so(run: Run, folder: Path) -> None:
    assert run(*MEASURED).code == 0
    for file in (folder / "outputs/store").glob("evaluate-*/artifact.json"):
        old = json.loads(file.read_text())
        del old["params"]["compute_dtype"]
        old["key"] = "0" * 64
        file.parent.chmod(0o755)
        file.chmod(0o644)
        file.write_text(json.dumps(old))
    planned = run(*MEASURED, "mode=plan")
    assert "to run (params.compute_dtype: absent -> fp32): evaluate@source" in " ".join(planned.out.split())
    assert run(*MEASURED).code == 0


def test_a_sweep_decides_once_for_all_its_jobs(run: Run, folder: Path) -> None:
    """Its jobs run in other processes, which are made to see another kind of processor than the command that began the sweep."""
    started = ("-m", "recipe=mine.yaml", "order=[quantize,evaluate]", "stages.quantize.num_bits=4,8", QUIET)
    done = run(*started, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "+hydra.job.env_set.OMP_NUM_THREADS=1", env={DECIDED: "bf16"})
    assert done.code == 0, done.err
    plans = [json.loads(file.read_text()) for file in (folder / "outputs/runs").glob("*/*/plan.json")]
    dtypes = {node["params"]["compute_dtype"] for plan in plans for node in plan["nodes"] if node["stage"] == "evaluate"}
    assert len(plans) == 2 and dtypes == {"bf16"}


def test_a_dtype_where_nothing_is_multiplied_is_refused(run: Run) -> None:
    done = run("recipe=mine.yaml", "stages.prune.compute_dtype=bf16", "mode=plan")
    assert done.code == 2 and done.errors == [
        "error: stages.prune.compute_dtype: with these settings structured_prune multiplies nothing with the model's weights itself; "
        "leave it out"
    ]


def test_the_old_name_is_answered_with_the_new_one_in_a_recipe_and_on_the_command_line(run: Run, folder: Path) -> None:
    recipe = folder / "mine.yaml"
    recipe.write_text(
        recipe.read_text()
        .replace("stages.quantize: rtn", "stages.quantize: qlora")
        .replace("quantize: {group_size: 64}", "quantize: {dtype: fp32}")
    )
    told = "error: stages.quantize: dtype: it is called compute_dtype; write compute_dtype: fp32"
    assert told in run("recipe=mine.yaml", "mode=plan").errors
    plain = run("recipe=quickstart", "mode=plan", "stages.distill.dtype=fp32")
    assert plain.code == 2 and "it is called compute_dtype; write stages.distill.compute_dtype" in plain.err, plain.err
