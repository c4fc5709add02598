"""Sources are checked before any work: hub models through the hub's own cache, local folders, and data, each problem one sentence."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from pipeline import source
from pipeline.artifact import Checkpoint, Dataset
from pipeline.errors import RecipeError
from pipeline.headers import read_json
from pipeline.identity import DigestMemo, hub_key
from pipeline.kv_sidecar import CacheSettings, write_cache
from pipeline.recipe import DataSource, ModelSource
from pipeline.source import HUB_FILES, check_disjoint, open_model, open_split
from tests.stages.models import make_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import sys
from pathlib import Path
from pipeline.errors import RecipeError
from pipeline.identity import DigestMemo
from pipeline.recipe import ModelSource
from pipeline.source import open_model
try:
    model = open_model(ModelSource(id=sys.argv[1]), Path(), DigestMemo(Path("memo.json")), execute=sys.argv[2] == "run")
    print(type(model).__name__, model.key, model.path, model.model_spec.nbytes)
except RecipeError as error:
    print(error)
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The hub's cache as its own client lays it out, holding one model."""
    model = tmp_path / "hub" / "models--org--tiny"
    make_checkpoint(model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    return tmp_path


def opened(cache: Path, model: str, mode: str) -> str:
    """In a process of its own: the hub's client reads its environment once, at import."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model, mode], env=environment, cwd=cache, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_cached_hub_model_is_known_by_its_commit(cache: Path) -> None:
    kind, key, path, _ = opened(cache, "org/tiny", "run").split()
    assert (kind, key) == ("DenseCheckpoint", hub_key("org/tiny", COMMIT))
    assert path.endswith(COMMIT)
    assert opened(cache, "org/tiny", "plan").split()[1] == key


def test_a_mixture_of_experts_is_planned_for_but_not_run(tmp_path: Path) -> None:
    refused = r"^model: mixtral is a mixture of experts, whose compression can be planned but not run yet; write mode=plan, or give"
    folder = make_checkpoint(tmp_path / "experts", model_type="mixtral", num_local_experts=2, num_experts_per_tok=1)
    architecture = read_json(folder / "config.json")
    for model in (ModelSource(path=str(folder)), ModelSource(id="org/not-asked-for", architecture=architecture)):
        assert open_model(model, Path(), DigestMemo(tmp_path / "memo"), execute=False).model_spec.architecture.experts
        with pytest.raises(RecipeError, match=refused):
            open_model(model, Path(), DigestMemo(tmp_path / "memo"), execute=True)


def test_experts_of_the_hub_are_refused_by_their_config_alone(cache: Path) -> None:
    snapshot = cache / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    config = read_json(snapshot / "config.json") | {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
    (snapshot / "config.json").write_text(json.dumps(config))
    (snapshot / "model.safetensors").unlink()
    assert opened(cache, "org/tiny", "run").startswith("model: mixtral is a mixture of experts")
    assert opened(cache, "org/tiny", "plan").startswith("DenseCheckpoint")


@pytest.mark.parametrize("model", ["org/absent", "not a name"])
def test_a_model_that_the_hub_cannot_give_is_one_sentence(cache: Path, model: str) -> None:
    told = opened(cache, model, "run")
    assert told.startswith(f"model.id: '{model}' at revision 'main' cannot be had from the hub (")
    assert told.endswith("check the name and your access, or give model.path=/folder")
    assert "\n" not in told


def open_folder(folder: Path, *, execute: bool = True) -> Checkpoint:
    return open_model(ModelSource(path=str(folder)), Path(), DigestMemo(folder / "memo"), execute=execute)


def open_data(file: Path, *, execute: bool = True) -> Dataset:
    return open_split(DataSource(splits={"eval": str(file)}), "eval", Path(), DigestMemo(file.with_name("memo")), execute=execute)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", tie_word_embeddings=True, num_hidden_layers=1)


def test_an_adapter_is_refused_since_readers_would_load_its_base_model(folder: Path) -> None:
    assert open_folder(folder).key
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"^model: .* holds adapter_config\.json.*merge the adapter or remove it$"):
        open_folder(folder)


def test_a_path_of_nobody_is_named_by_its_field() -> None:
    with pytest.raises(RecipeError, match=r"^model: ~nosuchuser/x: there is no such user"):
        open_folder(Path("~nosuchuser/x"))
    with pytest.raises(RecipeError, match=r"^data\.splits\.eval: ~nosuchuser/x: there is no such user"):
        open_data(Path("~nosuchuser/x"))


def test_a_damaged_tokenizer_is_refused_before_any_work(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text()[:500])
    with pytest.raises(RecipeError, match=r"^model: .*tokenizer\.json is not JSON; copy it again$"):
        open_folder(folder, execute=False)


@pytest.mark.parametrize("content", ["[1]", "{", "[" * 100_000, '{"model_type": "llama", "vocab_size": "many"}', "\udcff"])
def test_an_odd_config_is_one_sentence_for_each_field(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(RecipeError, match=r"^model: .*config\.json") as caught:
        open_folder(folder)
    assert all(problem.startswith("model: ") and "\n" not in problem for problem in caught.value.problems)
    assert len(caught.value.problems) == (5 if "many" in content else 1)  # the one that is wrong, four that are missing


def add_head(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Beside the tied embedding, a `lm_head.weight` of its own in the file."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = change(weights["model.embed_tokens.weight"].clone())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def last_value_changed(head: torch.Tensor) -> torch.Tensor:
    head[-1, -1] += 1
    return head


def test_a_tied_model_s_copy_of_its_embedding_is_accepted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "BLOCK_BYTES", 1000)  # several blocks, the last one in part
    add_head(folder, lambda head: head)
    assert open_folder(folder).model_spec.architecture.tied


@pytest.mark.parametrize("change", [last_value_changed, lambda head: head[:-1].contiguous(), lambda head: head.float()])
def test_a_tied_model_whose_head_differs_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    monkeypatch.setattr(source, "BLOCK_BYTES", 1000)
    add_head(folder, change)
    for execute in (True, False):
        with pytest.raises(RecipeError, match=r"tied embeddings but lm_head\.weight differs; set tie_word_embeddings to false$"):
            open_folder(folder, execute=execute)


def test_large_heads_are_compared_only_when_executing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "HASH_AT_ONCE", 1000)
    add_head(folder, last_value_changed)
    assert open_folder(folder, execute=False).key == ""
    with pytest.raises(RecipeError, match="differs"):
        open_folder(folder, execute=True)


def test_a_local_model_s_key_follows_its_chat_templates_but_not_its_readme(folder: Path) -> None:
    first = open_folder(folder).key
    (folder / "README.md").write_text("about it")
    assert open_folder(folder).key == first
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    assert open_folder(folder).key != first


def test_all_that_a_stage_copies_and_the_licence_are_downloaded_with_a_hub_model() -> None:
    wanted = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.model", "qwen.tiktoken",
              "vocab.txt", "chat_template.json", "additional_chat_templates/tools.jinja", "README.md"]  # fmt: skip
    other = ["pytorch_model.bin", "modeling_custom.py", "training_args.bin", "onnx/model.onnx"]
    assert list(filter_repo_objects(wanted + other, allow_patterns=HUB_FILES)) == wanted


def test_a_file_s_format_is_in_its_spec_and_its_key(tmp_path: Path) -> None:
    lines, text = tmp_path / "eval.jsonl", tmp_path / "eval.txt"
    for file in (lines, text):
        file.write_text('{"text": "one"}\n')
    opened = [open_data(lines), open_data(text)]
    assert [data.file_format for data in opened] == ["jsonl", "txt"]
    assert opened[0].key != opened[1].key
    link = Dataset(lines.rename(tmp_path / "blob"), opened[0].spec)  # as when a link was resolved
    assert list(link.documents()) == [("1", "one")]


def test_every_document_is_checked_before_the_run_and_in_a_plan_where_that_is_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "eval.jsonl"
    file.write_text('{"text": "one"}\n' * 5 + '{"text": 5}\n')
    for execute in (True, False):
        with pytest.raises(RecipeError, match=r'^data\.splits\.eval: .* line 6 is not a JSON object with a "text" that is a string$'):
            open_data(file, execute=execute)
    monkeypatch.setattr(source, "READ_AT_ONCE", 10)
    assert open_data(file, execute=False).key
    with pytest.raises(RecipeError, match="line 6"):
        open_data(file, execute=True)


def test_splits_must_be_disjoint(tmp_path: Path) -> None:
    for name, content in (("a", "same"), ("b", "same"), ("c", "other"), ("d", "same")):
        (tmp_path / f"{name}.txt").write_text(content)
    a, b, c, d = (open_data(tmp_path / f"{name}.txt") for name in "abcd")
    check_disjoint({"calibration": a, "eval": c})
    with pytest.raises(RecipeError, match=r"^data\.splits: calibration and eval are the same file content; splits must be disjoint$"):
        check_disjoint({"calibration": a, "eval": b, "train": c})
    with pytest.raises(RecipeError, match="calibration, eval and train are the same"):
        check_disjoint({"calibration": a, "eval": b, "train": d})


CHAT = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'


def open_train(content: dict[str, object]) -> Dataset:
    return open_split(DataSource.model_validate(content), "train", Path(), DigestMemo(Path("memo")), execute=False)


def test_a_split_may_have_a_format_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(CHAT)
    file = str(tmp_path / "chats.jsonl")
    alone = open_train({"splits": {"train": {"path": file, "format": "messages"}}})
    assert alone.is_chat and len(list(alone.conversations())) == 1
    assert alone.key == open_train({"format": "messages", "splits": {"train": file}}).key
    with pytest.raises(ValueError, match=r"^chats\.jsonl holds conversations \(format: messages\); plain text is needed here$"):
        alone.documents()
    with pytest.raises(RecipeError, match=r'^data\.splits\.train: .* line 1 is not a JSON object with a "text" that is a string$'):
        open_train({"splits": {"train": file}})


def test_conversations_are_read_from_jsonl_only(tmp_path: Path) -> None:
    (tmp_path / "chats.txt").write_text(CHAT)
    with pytest.raises(
        RecipeError, match=r"^data\.splits\.train: chats\.txt is not a \.jsonl or \.parquet file; conversations are read from those only$"
    ):
        open_train({"format": "messages", "splits": {"train": str(tmp_path / "chats.txt")}})


def test_a_checkpoint_with_an_int8_cache_is_known_by_its_sidecar(folder: Path) -> None:
    before = open_folder(folder)
    write_cache(folder, CacheSettings(mode="per_token_head"))
    after = open_folder(folder)
    assert after.model_spec == before.model_spec.with_cache("per_token_head") and after.key != before.key
    (folder / "kv_cache.json").write_text('{"num_bits": 4, "mode": "per_token_head"}')
    with pytest.raises(RecipeError, match=r"^model: .*kv_cache\.json: num_bits: .*; write it with the stage kv_cache$"):
        open_folder(folder)
