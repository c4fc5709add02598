"""Whatever a person gets wrong costs them one clear sentence each, an exit code, and nothing else."""

import json
from pathlib import Path

import pytest
import torch

from tests.scenarios.conftest import Run

slow = pytest.mark.slow  # a sentence of a kind that another case has too


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["recipe=quickstrat"], "recipe: there is no 'quickstrat'; did you mean 'quickstart'?"),
        pytest.param(["recipe=absent.yaml"], "recipe: absent.yaml does not exist; there are: 13b_to_rtx4090, ", marks=slow),
        (["mode=plan"], "no recipe is chosen; write recipe=<name>"),
        (["recipe=mine.yaml", "stage@stages.quantize=gtpq"], "stage: there is no 'gtpq'; did you mean 'gptq'?"),
        (["recipe=mine.yaml", "stages.prune.mlp_raito=0.3"], "stages.prune.mlp_raito: there is no such setting; did you mean 'mlp_ratio'?"),
        (["recipe=mine.yaml", "mode=plam"], "mode: 'plam' does not fit; input should be 'run', 'plan', 'gc' or 'check'"),
        (["recipe=mine.yaml", "oops"], "oops: this is not `key=value`; quote values that hold spaces, commas or brackets"),
        pytest.param(["recipe=mine.yaml", "target=a100"], "target: there is no 'a100'; did you mean 'a100_80gb'?", marks=slow),
        (
            ["recipe=mine.yaml", "convert=never", "order=[quantize,prune]"],
            "order: prune needs a dense checkpoint and quantize.model is quantized",
        ),
    ],
)
def test_a_wrong_word_is_named_with_the_right_one(run: Run, folder: Path, arguments: list[str], sentence: str) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert outcome.errors[0].startswith(f"error: {sentence}")
    assert outcome.out == ""
    assert not (folder / "outputs").exists()


def test_several_mistakes_are_told_at_once(run: Run, folder: Path) -> None:
    outcome = run("recipe=mine.yaml", "order=[prune,quantise,evaluate]", "stages.prune.mlp_ratio=0.001", "data.splits.eval=data/none.txt")
    assert outcome.code == 2
    assert [error.partition(": ")[2].partition(":")[0] for error in outcome.errors] == [
        "order",
        "data.splits.eval",
        "stages.prune.mlp_ratio",
    ]
    assert not (folder / "outputs").exists()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("stages.prune.mlp_ratio=1.5", "stages.prune.mlp_ratio: 1.5 does not fit; input should be less than 1"),
        pytest.param(
            "stages.prune.mlp_ratio=-0.1",
            "stages.prune.mlp_ratio: -0.1 does not fit; input should be greater than or equal to 0",
            marks=slow,
        ),
        ("stages.quantize.group_size=96", "stages.quantize.group_size: 96 does not divide"),
        pytest.param("stages.quantize.num_bits=5", "stages.quantize.num_bits: 5 does not fit; input should be 2, 3, 4 or 8", marks=slow),
    ],
)
def test_a_value_out_of_range_is_named_by_its_field(run: Run, setting: str, sentence: str) -> None:
    outcome = run("recipe=mine.yaml", setting)
    assert outcome.code == 2
    assert outcome.errors[0].startswith(f"error: {sentence}")


def test_a_checkpoint_that_is_missing_truncated_or_pickled_is_named(run: Run, folder: Path, model: Path) -> None:
    assert run("recipe=mine.yaml", "model.path=nowhere").errors == [
        "error: model: nowhere is not a folder; give the folder of a Hugging Face checkpoint"
    ]
    broken = folder / "broken"
    broken.mkdir()
    for file in model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is truncated" in run("recipe=mine.yaml", "model.path=broken").errors[0]
    weights.unlink()
    torch.save({"weights": torch.ones(1)}, broken / "pytorch_model.bin")
    outcome = run("recipe=mine.yaml", "model.path=broken")
    assert outcome.code == 2 and "only pickled weights (pytorch_model.bin), which can run code" in outcome.errors[0]
    (broken / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "model_type 'gpt2' is not supported" in run("recipe=mine.yaml", "model.path=broken").errors[0]


@pytest.mark.parametrize(
    "line",
    [
        "hydra: {launcher: {_target_: os.system}}",
        "stages: {prune: {_target_: os.system}}",
        "export_to: ${oc.env:SECRET}",
        pytest.param("export_to: ${oc.decode:'${oc.env:SECRET}'}", marks=slow),
        pytest.param("serve: {context: '${oc.env:SECRET}'}", marks=slow),
        "mode: gc",
        pytest.param("outputs: /somewhere/else", marks=slow),
        "tracking: {uri: 'http://127.0.0.1:1'}",
    ],
)
def test_a_hostile_recipe_runs_nothing_and_leaks_nothing(run: Run, folder: Path, line: str) -> None:
    recipe = [row for row in (folder / "mine.yaml").read_text().splitlines() if not row.startswith(line.partition(":")[0])]
    if line.startswith("stages"):
        recipe = [row for row in recipe if not row.startswith("  prune: {") and not row.startswith("  quantize: {")]
    (folder / "evil.yaml").write_text("\n".join([*recipe, line]) + "\n")
    outcome = run("recipe=evil.yaml", env={"SECRET": "hunter2"})
    assert outcome.code == 2
    assert outcome.errors[0].startswith("error: evil.yaml: ")
    assert "hunter2" not in outcome.out + outcome.err
    assert not (folder / "outputs").exists()


def test_a_recipe_with_a_yaml_tag_that_names_code_is_not_read(run: Run, folder: Path) -> None:
    (folder / "evil.yaml").write_text("order: !!python/object/apply:os.system ['touch pwned']\n")
    outcome = run("recipe=evil.yaml")
    assert outcome.code == 2 and "is not readable YAML" in outcome.errors[0]
    assert not (folder / "pwned").exists()


def test_an_outputs_folder_that_cannot_be_written_is_told_before_any_work(run: Run, folder: Path) -> None:
    (folder / "file").write_text("in the way")
    outcome = run("recipe=mine.yaml", "outputs=file/outputs")
    assert outcome.code == 5
    assert len(outcome.errors) == 1 and "file" in outcome.errors[0]


def test_an_export_never_overwrites(run: Run, folder: Path) -> None:
    (folder / "taken").mkdir()
    (folder / "taken" / "precious").write_text("data")
    outcome = run("recipe=mine.yaml", "export_to=taken")
    assert outcome.code == 2
    assert outcome.errors[0].endswith("taken exists already; name a new folder")
    assert (folder / "taken" / "precious").read_text() == "data"
    assert not (folder / "outputs").exists()


def test_a_stage_s_name_cannot_lead_out_of_the_run_s_folder(run: Run, folder: Path) -> None:
    """Node names become folders of logs, and those are replaced."""
    victim = folder / "victim"
    victim.mkdir()
    (victim / "precious").write_text("data")
    recipe = (folder / "mine.yaml").read_text().replace("stages.quantize: rtn", f'"stages.{victim}": rtn')
    (folder / "evil.yaml").write_text(recipe + f"  {victim}: {{stage: rtn, group_size: 64}}\n")
    outcome = run("recipe=evil.yaml", f"order=['{victim}']")
    assert outcome.code == 2
    assert (victim / "precious").read_text() == "data"


def test_gc_touches_nothing_that_llmpress_did_not_make(run: Run, folder: Path) -> None:
    for name in ("scratch/thesis", "store/my-photos"):
        (folder / "outputs" / name).mkdir(parents=True)
    outcome = run("mode=gc")
    assert outcome.code == 5 and "is not an outputs folder of llmpress" in outcome.errors[0]
    (folder / "outputs" / ".llmpress").write_text("")
    assert run("mode=gc").code == 0
    assert (folder / "outputs" / "scratch" / "thesis").is_dir() and (folder / "outputs" / "store" / "my-photos").is_dir()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["export_to=mine.yaml"], "export_to: "),
        pytest.param(["order=[evaluate]", "export_to=new"], "export_to: the recipe makes no model", marks=slow),
        pytest.param(["export_to=mine.yaml/model"], "export_to: ", marks=slow),
        pytest.param(["export_to=${"], "export_to=${", marks=slow),
        (["model.path='~nosuchuser/x'"], "model: ~nosuchuser/x: there is no such user"),
        pytest.param(["stages.quantize.ignore=['re:(']"], "stages.quantize.ignore: ", marks=slow),
        pytest.param(["stages.quantize.execution.memory_limit=-1"], "stages.quantize.execution.memory_limit: -1 does not fit", marks=slow),
        (["+stages.quantize.inputs.model=model.tpyo"], "stages.quantize.inputs.model: there is no 'model.tpyo' before it"),
        (["tracking.uri=postgresql://me:hunter2@host/db"], "tracking.uri: it holds a password or token"),
        (["data.splits.eval=data/calibration.txt", "stages.prune.importance=activation"], "data.splits: "),
    ],
)
def test_what_would_break_late_is_refused_early(run: Run, folder: Path, arguments: list[str], sentence: str) -> None:
    outcome = run("recipe=mine.yaml", *arguments)
    assert outcome.code == 2
    assert outcome.errors[0].startswith(f"error: {sentence}")
    assert "hunter2" not in outcome.out + outcome.err
    assert not (folder / "outputs").exists()
