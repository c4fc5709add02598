"""Backends as a plan sees them: what each refuses, what is in a key, which environment it needs. None is installed for this."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import compose
from pipeline.architecture import Architecture
from pipeline.artifact import DenseCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.envs import lock_digest
from pipeline.errors import InputProblems
from pipeline.identity import backend, non_default, stage_key
from pipeline.plan import Plan, make_plan
from pipeline.plan_table import plan_json, print_plan
from pipeline.spec import ModelSpec
from pipeline.stage import Context, Stage
from pipeline.store import Store
from pipeline.target import Target
from stages.awq import AWQ
from stages.gptq import GPTQ
from stages.rtn import RTN
from stages.runtime.backends import AWQ_BACKENDS, GPTQ_BACKENDS, check_backend
from stages.runtime.isolated_quantization import check_agrees, legacy_config
from stages.runtime.loading import load_model
from stages.runtime.scoring import token_losses
from tests.pipeline.shipped import shipped_recipe
from tests.stages.models import make_checkpoint

SHAPE = Architecture(
    model_type="llama", dtype="BF16", vocab_size=4096, hidden_size=256, intermediate_size=768, num_layers=4, num_heads=8, num_kv_heads=4,
    head_dim=64, max_position=512, tied=True,
)  # fmt: skip
MODEL = ModelSpec.of(SHAPE)
DATA = DatasetSpec(split="calibration", digest="0", nbytes=250_000)
EVERY = [(GPTQ, name) for name in GPTQ_BACKENDS] + [(AWQ, name) for name in AWQ_BACKENDS]
ENVIRONMENTS = {"autoawq": "legacy", "auto_gptq": "legacy", "gptqmodel": "gptqmodel"}


def made(stage: type[Stage], name: str, execution: dict[str, Any] | None = None, **params: Any) -> Stage:
    return stage.from_dict({"backend": name, "group_size": 64, "num_samples": 32, "max_length": 128, **params}, execution)


@pytest.mark.parametrize(("stage", "name"), EVERY)
def test_it_is_planned_like_llmcompressor_and_computed_in_its_own_environment(stage: type[Stage], name: str) -> None:
    isolated, own = made(stage, name), made(stage, "llmcompressor")
    assert isolated.infer(MODEL, DATA) == own.infer(MODEL, DATA), "the same bytes"
    assert (isolated.env, own.env) == (ENVIRONMENTS[name], "main")
    memory = isolated.memory(MODEL, DATA, Target(name="cpu"))
    assert memory.totals["ram"] > MODEL.nbytes and memory.totals["vram"] == 0
    assert memory.totals["disk"] > isolated.infer(MODEL, DATA).nbytes, "and what the library saves before it is repacked"
    assert isolated.memory(MODEL, DATA, Target(name="gpu", gpus=1)).totals["vram"] > 0


@pytest.mark.parametrize(("stage", "name"), EVERY)
def test_a_key_holds_the_lock_in_place_of_library_versions(stage: type[Stage], name: str) -> None:
    isolated, own = made(stage, name), made(stage, "llmcompressor")
    assert backend(isolated) == {ENVIRONMENTS[name]: lock_digest(ENVIRONMENTS[name])}
    assert set(backend(own)) == {"torch", "transformers", "compressed-tensors", "llmcompressor"}
    assert "backend" not in non_default(own.params), "what was computed before backends could be chosen keeps its key"
    keys = {stage_key(each, {"model": "m", "calibration": "c"}) for each in (isolated, own)}
    assert len(keys) == 2


REFUSED = [
    (AWQ, "autoawq", {"symmetric": True}, "symmetric: autoawq knows only symmetric: false"),
    (AWQ, "autoawq", {"num_bits": 8}, "num_bits: of autoawq 4 bits are read, not 8"),
    (AWQ, "autoawq", {"n_grid": 10}, "n_grid: autoawq cannot be told; leave it at 20"),
    (AWQ, "gptqmodel", {"duo_scaling": False}, "duo_scaling: gptqmodel cannot be told; leave it at True"),
    (AWQ, "gptqmodel", {"symmetric": True}, "symmetric: gptqmodel knows only symmetric: false"),
    (GPTQ, "auto_gptq", {"num_bits": 3}, "num_bits: of auto_gptq 2 or 4 or 8 bits are read, not 3"),
    (GPTQ, "auto_gptq", {"block_size": 64}, "block_size: auto_gptq cannot be told; leave it at 128"),
    (GPTQ, "auto_gptq", {"dampening_frac": 0}, "dampening_frac: auto_gptq takes more than 0 and less than 1, not 0; write 0.01"),
    (GPTQ, "gptqmodel", {"num_bits": 3}, "num_bits: of gptqmodel 2 or 4 or 8 bits are read, not 3"),
    (GPTQ, "gptqmodel", {"dampening_frac": 1}, "dampening_frac: gptqmodel takes more than 0 and less than 1"),
    (GPTQ, "gptqmodel", {"ignore": ["lm_head", "re:.*down_proj"]}, "ignore: gptqmodel rounds all Linear layers but lm_head"),
]


@pytest.mark.parametrize(("stage", "name", "params", "sentence"), REFUSED)
def test_what_a_library_cannot_do_is_refused_and_not_ignored(stage: type[Stage], name: str, params: dict[str, Any], sentence: str) -> None:
    made(stage, "llmcompressor", **params).infer(MODEL, DATA)  # which can
    with pytest.raises(InputProblems) as caught:
        made(stage, name, **params).infer(MODEL, DATA)
    (problem,) = caught.value.problems
    assert problem.startswith(sentence) and "; " in problem, "and says what to write instead"


@pytest.mark.parametrize(("stage", "name"), EVERY)
def test_every_parameter_is_honoured_or_refused(stage: type[Stage], name: str) -> None:
    """A parameter that is added to the stage is refused by every backend until that is said to honour it."""
    library = (GPTQ_BACKENDS if stage is GPTQ else AWQ_BACKENDS)[name]
    others = set(stage.Params.model_fields) - library.honours
    assert library.honours <= set(stage.Params.model_fields)
    execution = made(stage, name).execution
    params = made(stage, name).params
    for field in others:
        changed = params.model_copy(update={field: object()})
        with pytest.raises(InputProblems, match=f"{field}: {name} cannot be told"):
            check_backend(library, changed, execution, MODEL)


@pytest.mark.parametrize(("stage", "name"), EVERY)
def test_offloading_an_untried_model_type_and_uneven_layers_are_refused_together(stage: type[Stage], name: str) -> None:
    odd = ModelSpec.of(SHAPE.model_copy(update={"model_type": "mixtral", "num_kv_heads": 1, "head_dim": 16, "hidden_size": 128}))
    with pytest.raises(InputProblems) as caught:
        made(stage, name, {"offload": "disk"}).infer(odd, DATA)
    found = "\n".join(caught.value.problems)
    assert f"execution.offload: {name} keeps the whole model in RAM" in found
    assert f"{name} is not tried with models of type mixtral" in found
    assert "self_attn.k_proj" in found and "rows and 32 columns at a time" in found


def plan(tmp_path: Path, *overrides: str) -> Plan:
    recipe = shipped_recipe("quickstart", "stage@stages.quantize=gptq", *overrides)
    return make_plan(recipe, Store(tmp_path), compose.resources(), execute=False)


def test_a_plan_says_which_environments_a_recipe_needs_and_whether_they_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    planned = plan(tmp_path, "stages.quantize.backend=auto_gptq", "stages.quantize.group_size=32")
    digest = lock_digest("legacy")
    assert plan_json(planned)["environments"] == [{"name": "legacy", "digest": digest, "nodes": ["quantize"], "built": False}]
    print_plan(planned, Console(width=200))
    told = capsys.readouterr().out
    assert f"environment legacy ({digest[:12]}) of quantize is not built yet: 59 packages are installed when it is first needed" in told
    (tmp_path / "envs" / digest[:12]).mkdir(parents=True)
    (tmp_path / "envs" / digest[:12] / "complete.json").write_text(f'{{"digest": "{digest}"}}')
    print_plan(plan(tmp_path, "stages.quantize.backend=auto_gptq", "stages.quantize.group_size=32"), Console(width=200))
    assert f"environment legacy ({digest[:12]}) of quantize is built" in capsys.readouterr().out


def test_a_recipe_without_backends_needs_no_environment(tmp_path: Path) -> None:
    assert plan_json(plan(tmp_path))["environments"] == []


def test_a_config_of_transformers_5_says_the_same_to_4_51() -> None:
    plain = {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}, "hidden_size": 8}
    assert legacy_config(plain) == {"torch_dtype": "bfloat16", "rope_theta": 500000.0, "hidden_size": 8}
    scaled = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}}
    assert legacy_config(scaled) == {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    old = {"torch_dtype": "float16", "rope_theta": 10000.0}
    assert legacy_config(old) == old


def test_a_checkpoint_that_loads_as_another_model_than_the_library_made_is_not_published(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    made = RTN.from_dict({"group_size": 32}).run(Context(tmp_path / "made", lambda _: None), DenseCheckpoint(source))
    ids = torch.arange(64).reshape(1, 64)
    losses = token_losses(load_model(made.path), ids).flatten()
    check_agrees(losses, made.path, ids, "autoawq")
    wrong = RTN.from_dict({"group_size": 32, "num_bits": 2}).run(Context(tmp_path / "wrong", lambda _: None), DenseCheckpoint(source))
    with pytest.raises(ValueError, match="does not load as the model that autoawq made: its losses on a probe differ by"):
        check_agrees(losses, wrong.path, ids, "autoawq")
    with pytest.raises(ValueError, match="differ by nan"):
        check_agrees(losses * float("nan"), made.path, ids, "autoawq")
