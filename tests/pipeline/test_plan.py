"""Plans from shapes: specs carried along, problems collected, hits and misses with their reasons."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import FileRecord, Manifest
from pipeline.errors import RecipeError
from pipeline.graph import Ref
from pipeline.identity import backend_versions
from pipeline.plan import Plan, PlannedNode, make_plan
from pipeline.plan_table import plan_json
from pipeline.recipe import read_config
from pipeline.spec import ModelSpec
from pipeline.store import Store, digests_read
from tests.stages.models import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("model"), hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=300,
    )  # fmt: skip


@pytest.fixture
def config(model: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "eval.txt").write_text("some text to evaluate on")
    return {
        "order": ["prune", "quantize", "evaluate"],
        "stages": {
            "prune": {"stage": "structured_prune", "mlp_ratio": 0.5},
            "quantize": {"stage": "rtn", "group_size": 64},
            "evaluate": {"stage": "evaluate"},
        },
        "model": {"path": str(model)},
        "data": {"splits": {"eval": str(tmp_path / "eval.txt")}},
        "target": {"name": "host"},
    }


def plan_of(config: dict[str, Any], root: Path, *, execute: bool = False) -> Plan:
    return make_plan(read_config(config, "test")[0], Store(root), root, execute=execute)


def publish(root: Path, node: PlannedNode, **changes: Any) -> None:
    """What the executor would have published for a node, with a file that stands for the weights."""
    store = Store(root)
    scratch = store.scratch(node.key)
    (scratch / "weights").write_bytes(b"12")
    fields: dict[str, Any] = {
        "type": next(iter(node.types.values())).__name__, "key": node.key, "stage": node.stage.name, "version": node.stage.version,
        "params": node.stage.params.model_dump(mode="json"), "inputs": dict(node.input_keys),
        "backend": backend_versions(node.stage.libraries), "files": {"weights": FileRecord(nbytes=2, sha256="00")},
        "environment": {}, "execution": {}, "fingerprint": "", "seconds": 1.0, "peak_rss": 1, "created": "now",
    }  # fmt: skip
    store.publish(scratch, Manifest(**(fields | changes)))


def test_specs_are_carried_from_outputs_to_inputs(config: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(config, tmp_path / "outputs")
    nodes = {node.name: node for node in plan.nodes}
    assert list(nodes) == ["hidden_states@source", "evaluate@source", "prune", "quantize", "evaluate"]
    pruned, packed = nodes["prune"].expected["model"], nodes["quantize"].expected["model"]
    assert isinstance(pruned, ModelSpec) and isinstance(packed, ModelSpec)
    assert pruned.architecture.intermediate_size == packed.architecture.intermediate_size == 256
    assert packed.nbytes < pruned.nbytes < plan.source.model_spec.nbytes
    assert {node.status for node in plan.nodes} == {"miss"}
    assert not (tmp_path / "outputs").exists()


def test_equal_recipes_have_equal_keys_and_a_parameter_changes_only_what_follows(config: dict[str, Any], tmp_path: Path) -> None:
    first = {node.name: node.key for node in plan_of(config, tmp_path / "a").nodes}
    assert first == {node.name: node.key for node in plan_of(config, tmp_path / "b").nodes}
    config["stages"]["quantize"]["num_bits"] = 3
    second = {node.name: node.key for node in plan_of(config, tmp_path / "a").nodes}
    assert [name for name in first if first[name] != second[name]] == ["quantize", "evaluate"]


def test_the_folder_that_holds_a_model_is_not_its_identity(config: dict[str, Any], model: Path, tmp_path: Path) -> None:
    first = plan_of(config, tmp_path / "outputs").source.key
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in model.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    config["model"]["path"] = str(moved)
    assert plan_of(config, tmp_path / "outputs").source.key == first
    (moved / "config.json").write_text((moved / "config.json").read_text() + " ")
    assert plan_of(config, tmp_path / "outputs").source.key != first


def test_a_miss_names_the_field_that_changed(config: dict[str, Any], tmp_path: Path) -> None:
    for node in plan_of(config, tmp_path).nodes:
        publish(tmp_path, node)
    assert {node.status for node in plan_of(config, tmp_path).nodes} == {"hit"}
    config["stages"]["quantize"]["group_size"] = 32
    told = {node.name: (node.status, node.reason) for node in plan_of(config, tmp_path).nodes}
    assert told == {
        "hidden_states@source": ("hit", ""),
        "evaluate@source": ("hit", ""),
        "prune": ("hit", ""),
        "quantize": ("miss", "params.group_size: 64 -> 32"),
        "evaluate": ("miss", "follows quantize"),
    }


def test_a_miss_names_a_changed_library_and_version(config: dict[str, Any], tmp_path: Path) -> None:
    config["order"] = ["prune"]
    node = plan_of(config, tmp_path).nodes[0]
    old = dict(backend_versions(node.stage.libraries)) | {"torch": "1.0"}
    publish(tmp_path, node, key="0" * 64, backend=old, version=0)
    now = backend_versions(["torch"])["torch"]
    assert plan_of(config, tmp_path).nodes[0].reason == f"torch: 1.0 -> {now}, version: 0 -> 1"


def test_a_damaged_artifact_is_not_a_hit(config: dict[str, Any], tmp_path: Path) -> None:
    config["order"] = ["prune"]
    node = plan_of(config, tmp_path).nodes[0]
    publish(tmp_path, node)
    (Store(tmp_path).path("structured_prune", node.key) / "weights").unlink()
    planned = plan_of(config, tmp_path).nodes[0]
    assert (planned.status, planned.reason) == ("miss", "its files are damaged")


def test_a_report_holds_only_for_the_bytes_it_was_computed_from(config: dict[str, Any], tmp_path: Path) -> None:
    """A rebuilt checkpoint has its old key and may have other bytes, as results of GPUs do."""
    manifests = {}
    for node in plan_of(config, tmp_path).nodes:
        read = digests_read(node.input_keys, {port: manifests.get(ref.node) for port, ref in node.inputs.items()})
        publish(tmp_path, node, read=read if "report" in node.types else {})
        manifests[node.name] = Store(tmp_path).find(node.stage.name, node.key)
    nodes = {node.name: node for node in plan_of(config, tmp_path).nodes}
    assert {node.status for node in nodes.values()} == {"hit"}

    packed = Store(tmp_path).path("rtn", nodes["quantize"].key)
    shutil.rmtree(packed)
    reasons = {node.name: node.reason for node in plan_of(config, tmp_path).nodes}
    assert reasons["evaluate"] == "follows quantize"

    publish(tmp_path, nodes["quantize"], files={"weights": FileRecord(nbytes=2, sha256="11")})
    reasons = {node.name: node.reason for node in plan_of(config, tmp_path).nodes}
    assert reasons["quantize"] == "" and reasons["evaluate"] == "what it measured was rebuilt and differs"


def test_an_architecture_alone_is_planned_but_not_run(config: dict[str, Any], model: Path, tmp_path: Path) -> None:
    config["model"] = {"architecture": json.loads((model / "config.json").read_text())}
    plan = plan_of(config, tmp_path)
    assert {node.status for node in plan.nodes} == {"pending"}
    with pytest.raises(RecipeError, match=r"model: it is an architecture without weights"):
        plan_of(config, tmp_path, execute=True)


def test_a_large_model_s_digest_is_pending_until_it_is_computed_once(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.source.HASH_AT_ONCE", 0)
    assert {node.status for node in plan_of(config, tmp_path).nodes} == {"pending"}
    assert all(node.key for node in plan_of(config, tmp_path, execute=True).nodes)
    assert {node.status for node in plan_of(config, tmp_path).nodes} == {"miss"}


def test_problems_of_every_kind_are_told_together(config: dict[str, Any], tmp_path: Path) -> None:
    config["stages"]["prune"]["mlp_ratio"] = 0.01
    config["data"]["splits"]["eval"] = str(tmp_path / "absent.txt")
    config["order"].append("evaluat")
    with pytest.raises(RecipeError) as caught:
        plan_of(config, tmp_path)
    told = caught.value.problems
    assert told[0] == "order: 'evaluat' is not under `stages`; did you mean 'evaluate'?"
    assert told[1].startswith("data.splits.eval: ") and told[1].endswith("does not exist")
    assert told[2].startswith("stages.prune.mlp_ratio: 0.01 of 512 MLP neurons rounds to nothing")


def test_a_group_size_that_pruning_breaks_is_found_before_any_weight_is_read(config: dict[str, Any], tmp_path: Path) -> None:
    config["stages"]["quantize"]["group_size"] = 96
    with pytest.raises(RecipeError, match=r"stages\.quantize\.group_size: 96 does not divide .*down_proj \(256\)"):
        plan_of(config, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("eval.txt", b"", "holds no document"),
        ("eval.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("eval.jsonl", b"{}\n", 'line 1 is not a JSON object with a "text"'),
        ("eval.csv", b"a,b", "is not a .jsonl, .parquet or .txt file"),
    ],
)
def test_a_data_file_that_cannot_be_read_is_named(config: dict[str, Any], tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    config["data"]["splits"]["eval"] = str(tmp_path / name)
    with pytest.raises(RecipeError, match=message):
        plan_of(config, tmp_path)


def test_a_checkpoint_that_is_not_what_its_config_says_is_named(config: dict[str, Any], model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    text = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(text | {"intermediate_size": 256}))
    config["model"]["path"] = str(broken)
    with pytest.raises(RecipeError, match=r"model: .* does not hold the model its config.json describes: .*gate_proj"):
        plan_of(config, tmp_path)


def with_cache(config: dict[str, Any], tmp_path: Path, mode: str) -> dict[str, Any]:
    """The recipe on a copy of its model that has an INT8 cache."""
    folder = Path(shutil.copytree(config["model"]["path"], tmp_path / "cached"))
    (folder / "kv_cache.json").write_text(json.dumps({"mode": mode}))
    return {**config, "model": {"path": str(folder)}}


def test_static_scales_go_stale_when_weights_change(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        plan_of(with_cache(config, tmp_path, "static"), tmp_path / "outputs")
    assert refused.value.problems[0] == (
        "order: prune changes the weights that the static KV cache of the source model was calibrated with; "
        "put a kv_cache stage before prune, with mode: per_token_head"
    )


def test_a_cache_that_scales_each_token_travels_through_every_stage(config: dict[str, Any], tmp_path: Path) -> None:
    final = plan_of(with_cache(config, tmp_path, "per_token_head"), tmp_path / "outputs").final_spec
    assert (final.kv_cache.mode, final.kv_cache.bytes_per_token) == ("per_token_head", 2 * 2 * 2 * (64 + 4))


def chatting(config: dict[str, Any], folder: Path, stage: dict[str, Any]) -> dict[str, Any]:
    """A recipe of one stage that is given conversations, on a copy of the model."""
    model = Path(shutil.copytree(config["model"]["path"], folder / "talks"))
    rows = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": str(i)}]} for i in range(9)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"splits": {"chats": {"path": str(folder / "chats.jsonl"), "format": "messages"}}}
    return {**config, "model": {"path": str(model)}, "data": data, "order": ["one"], "stages": {"one": stage}}


@pytest.mark.parametrize(("name", "port"), [("gptq", "calibration"), ("awq", "calibration"), ("evaluate", "eval"), ("distill", "train")])
def test_conversations_are_refused_where_a_stage_reads_text(config: dict[str, Any], tmp_path: Path, name: str, port: str) -> None:
    inputs = {port: "data.chats"} | ({"teacher": "model"} if name == "distill" else {})
    with pytest.raises(RecipeError) as refused:
        plan_of(chatting(config, tmp_path, {"stage": name, "inputs": inputs}), tmp_path / "outputs")
    assert refused.value.problems == [
        f"stages.one.inputs.{port}: data.chats holds conversations and {name} reads plain text; name a split of format text"
    ]


def test_conversations_need_a_model_with_a_chat_template(config: dict[str, Any], tmp_path: Path) -> None:
    tune = {"stage": "qlora", "inputs": {"train": "data.chats"}, "rank": 2, "num_samples": 8, "max_length": 16, "global_batch_size": 2}
    config = chatting(config, tmp_path, tune)
    told = r"^stages\.one\.inputs\.train: data\.chats holds conversations and the model has no chat template; put its chat_template\.jinja"
    with pytest.raises(RecipeError, match=told):
        plan_of(config, tmp_path / "outputs")
    (tmp_path / "talks" / "chat_template.jinja").write_text("{{ messages }}")
    assert plan_of(config, tmp_path / "outputs").nodes[0].stage.name == "qlora"


def test_a_reference_that_names_nothing_is_told_once(config: dict[str, Any], tmp_path: Path) -> None:
    distill = {"stage": "distill", "inputs": {"teacher": "nobody"}}
    with pytest.raises(RecipeError) as refused:
        plan_of(config | {"order": ["distill"], "stages": {"distill": distill}}, tmp_path / "outputs")
    assert [problem.partition(":")[0] for problem in refused.value.problems] == ["data.splits", "stages.distill.inputs.teacher"]


def test_a_plan_tells_what_adapters_and_logits_will_be(config: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"num_samples": 8, "max_length": 16}
    stages = {
        "teacher": {"stage": "teacher_logits", "inputs": {"teacher": "model", "train": "data.eval"}, "k": 4, **sizes},
        "tune": {"stage": "qlora", "inputs": {"train": "data.eval"}, "rank": 2, "global_batch_size": 2, **sizes},
    }
    (tmp_path / "long.txt").write_text("one two three " * 99)
    config |= {"order": ["teacher", "tune"], "stages": stages, "data": {"splits": {"eval": str(tmp_path / "long.txt")}}}
    plan = plan_of(config, tmp_path / "outputs")
    logits, tuned = (node["outputs"] for node in plan_json(plan)["nodes"])
    assert logits["logits"]["bytes"] == plan.nodes[0].expected["logits"].nbytes  # type: ignore[union-attr]
    assert {name: logits["logits"][name] for name in ("k", "temperature", "num_samples")} == {"k": 4, "temperature": 2.0, "num_samples": 8}
    adapter = tuned["adapter"]
    assert (adapter["type"], adapter["rank"], adapter["bytes"]) == ("Adapter", 2, 4 * adapter["parameters"])


def test_models_of_one_stage_must_read_the_same_tokens(config: dict[str, Any], tmp_path: Path) -> None:
    one, other = (Path(shutil.copytree(config["model"]["path"], tmp_path / name)) for name in ("one", "other"))
    for folder in (one, other):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": {folder.name: 0}}}))
    config |= {"model": {"path": str(one)}, "models": {"large": {"path": str(other)}}}
    config["stages"]["evaluate"]["inputs"] = {"reference": "models.large"}
    told = r"^stages\.evaluate\.inputs\.reference: models\.large and quantize\.model \(model\) have different tokenizers"
    with pytest.raises(RecipeError, match=told):
        plan_of(config, tmp_path / "outputs")
    (other / "tokenizer.json").write_bytes((one / "tokenizer.json").read_bytes())
    assert plan_of(config, tmp_path / "outputs").nodes[-1].inputs["reference"] == Ref("models", "large")


def test_a_model_that_no_stage_names_is_checked_and_changes_nothing(config: dict[str, Any], tmp_path: Path) -> None:
    before = plan_of(config, tmp_path / "outputs").digest
    assert plan_of({**config, "models": {"large": config["model"]}}, tmp_path / "outputs").digest == before
    with pytest.raises(RecipeError, match=r"^models\.large: .*absent is not a folder"):
        plan_of({**config, "models": {"large": {"path": str(tmp_path / "absent")}}}, tmp_path / "outputs")


def test_the_plan_says_whether_the_load_fits_the_target(config: dict[str, Any], tmp_path: Path) -> None:
    assert plan_of(config, tmp_path / "outputs").served is None  # nothing is asked
    config["target"] = {"name": "card", "gpus": 1, "memory": "4GiB", "reserve": "1GiB"}
    config["serve"] = {"context": 256, "batch": 2}
    plan = plan_of(config, tmp_path / "outputs")
    assert plan.served is not None and plan.served.fit.fits and not plan.problems
    assert (plan.served.fit.weights, plan.served.fit.cache) == (plan.final_spec.nbytes, 512 * plan.final_spec.kv_cache.bytes_per_token)
    assert plan.served.speed is None  # the card's peak is not known
    config["target"] |= {"memory": "1GiB"}
    problems = plan_of(config, tmp_path / "outputs").problems
    assert [problem.partition(":")[0] for problem in problems] == [
        "stages.hidden_states@source",
        "stages.evaluate@source",
        "stages.evaluate",
        "serve",
    ]


def test_hours_dollars_and_disk_are_those_of_what_is_to_run(config: dict[str, Any], tmp_path: Path) -> None:
    config["target"] = {"name": "card", "gpus": 1, "memory": "4GiB", "flops": 1e12, "bandwidth": 1e12, "disk_bandwidth": 1e6, "price": 3.6}
    plan = plan_of(config, tmp_path, execute=True)
    assert plan.to_run == plan.nodes
    assert plan.seconds == sum(node.seconds or 0 for node in plan.nodes)
    assert plan.dollars == pytest.approx((plan.seconds or 0) * 3.6 / 3600)
    nodes = {node.name: node for node in plan.nodes}
    prune, quantize = nodes["prune"], nodes["quantize"]
    made = [spec.nbytes for node in (prune, quantize) for spec in node.expected.values() if isinstance(spec, ModelSpec)]
    assert plan.disk >= sum(made)
    assert prune.seconds is not None and prune.seconds > (plan.source.model_spec.nbytes + made[0]) / 1e6
    publish(tmp_path, prune)
    later = plan_of(config, tmp_path, execute=True)
    assert [node.name for node in later.to_run] == ["hidden_states@source", "evaluate@source", "quantize", "evaluate"]
    assert later.disk == plan.disk - made[0] and (later.seconds or 0) < (plan.seconds or 0)


@pytest.mark.usefixtures("bf16_units")
def test_another_machine_may_run_the_stages_than_the_one_that_serves(config: dict[str, Any], tmp_path: Path) -> None:
    config |= {"target": {"name": "phone", "ram": "1GiB"}, "compute": {"name": "card", "gpus": 1, "memory": "40GiB"}}
    plan = plan_of(config, tmp_path)
    assert plan.recipe.machine.name == "card" and plan.nodes[-1].memory.vram and not plan.shortages
    assert plan.digest == plan_of({**config, "compute": None}, tmp_path).digest


def test_a_load_that_makes_no_sense_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    config["serve"] = {"context": 100_000, "batch": 1}
    with pytest.raises(RecipeError, match=r"^serve\.context: "):
        plan_of(config, tmp_path / "outputs")
