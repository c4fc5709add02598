"""Tasks of the harness on any checkpoint: answers, their errors and ids; what a task file may not do."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.artifact import Checkpoint, Dataset, DenseCheckpoint, EvalReport
from pipeline.artifact_spec import DatasetSpec
from pipeline.stage import Context
from pipeline.target import Target
from stages.kv_cache import KVCache
from stages.lm_eval import LMEval
from stages.rtn import RTN
from stages.runtime.harness_model import HarnessModel, batches, group_requests
from stages.runtime.harness_vllm import load_vllm, vllm_arguments
from stages.runtime.int8_cache import Int8Layer
from stages.runtime.loading import load_model
from stages.runtime.task_metrics import json_validity, python_validity
from stages.runtime.text import load_tokenizer
from tests.stages.models import TEXT, make_checkpoint

CHOICE = {"output_type": "multiple_choice", "doc_to_text": "prompt", "doc_to_choice": "choices", "doc_to_target": "answer"}
ACCURACY = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
QUIZ = [
    {"id": f"q{n}", "prompt": text, "choices": [" fox", " dog and dog", " layers of it"], "answer": n % 3}
    for n, text in enumerate(TEXT)
]  # fmt: skip
WRITING = {
    "output_type": "generate_until",
    "doc_to_text": "prompt",
    "doc_to_target": "answer",
    "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "json_validity", "aggregation": "mean", "higher_is_better": True}],
}


def write_task(folder: Path, name: str, items: list[dict[str, Any]], **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, "target_delimiter": "", **fields}))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DenseCheckpoint:
    return DenseCheckpoint(make_checkpoint(tmp_path_factory.mktemp("source"), num_hidden_layers=2, dtype=torch.float32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_task(tmp_path_factory.mktemp("data") / "tasks", "quiz", QUIZ, metric_list=ACCURACY, **CHOICE)
    write_task(made, "writing", [{"prompt": text, "answer": '{"a": '} for text in TEXT[:3]], **WRITING)
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    return write_task(made, "text", [{"text": text * 2} for text in TEXT], **rolling)


def lm_eval(output: Path, model: Checkpoint, tasks: Path, *names: str, batch_size: int = 4, **params: Any) -> EvalReport:
    output.mkdir(exist_ok=True)
    stage = LMEval.from_dict({"tasks": names, **params}, {"device": "cpu", "batch_size": batch_size})
    return stage.run(Context(output, lambda event: None), model, Dataset(tasks))


def saved(report: EvalReport) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((report.path / "tasks.json").read_text())["tasks"]
    return found


def lines(report: EvalReport, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (report.path / f"samples_{task}.jsonl").read_text().splitlines()]


def likelihood(model: Any, tokenizer: Any, prompt: str, continuation: str) -> float:
    """Of the tokens that follow the prompt's, one forward over all."""
    whole, start = tokenizer(prompt + continuation)["input_ids"], len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        scores = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(scores[n - 1, whole[n]].item() for n in range(start, len(whole)))


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_an_answer_is_the_likeliest_continuation_whatever_the_batch(
    tmp_path: Path, source: DenseCheckpoint, folder: Path, batch_size: int
) -> None:
    report = lm_eval(tmp_path / "out", source, folder, "quiz", batch_size=batch_size)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source.path), load_tokenizer(source.path)
    sums = [[likelihood(model, tokenizer, item["prompt"], choice) for choice in item["choices"]] for item in QUIZ]
    right = [float(max(range(3), key=row.__getitem__) == item["answer"]) for row, item in zip(sums, QUIZ, strict=True)]
    asked = lines(report, "quiz")
    found = [[response[0] for response in line["responses"]] for line in asked]
    assert [value for row in found for value in row] == pytest.approx([value for row in sums for value in row], rel=1e-4)
    assert [line["prompt"] for line in asked] == [item["prompt"] for item in QUIZ]
    assert {file.name for file in report.path.iterdir()} == {"tasks.json", "samples_quiz.jsonl"}
    result = saved(report)["quiz"]
    assert result["items"] == [{"id": f"q{n}", "acc": value} for n, value in enumerate(right)]
    p = sum(right) / 4
    assert report.metrics == {"quiz/acc": p, "quiz/acc_stderr": pytest.approx(math.sqrt(p * (1 - p) / 3))}
    assert result["metrics"]["acc"]["higher_is_better"] is True and result["n_shot"] == 0


def test_the_harness_own_model_class_says_the_same(source: DenseCheckpoint) -> None:
    """Contexts shared and alone, continuations of one token and of many, and a context that has to be cut."""
    pairs = [(text, f" {word}") for text in TEXT for word in ("fox", "dog and the dog", "a")] + [(TEXT[0] * 9, " end of it"), ("", "x y")]
    requests = [SimpleNamespace(args=pair, task_name="any") for pair in pairs]
    ours = HarnessModel(source.path, torch.device("cpu"), torch.float32, 5, 64, lambda *_: None)
    theirs = HFLM(pretrained=load_model(source.path), tokenizer=load_tokenizer(source.path), batch_size=5, max_length=64)
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert ours.cut == 1
    texts = [SimpleNamespace(args=(text * 3,), task_name="any") for text in TEXT]
    rolling = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(rolling, rel=1e-4)


def test_choices_of_a_question_share_one_forward_over_their_context(source: DenseCheckpoint) -> None:
    groups = group_requests(iter([([1, 2], [3, 4]), ([5, 6, 7], [8, 9]), ([1, 2], [5])]))
    assert [(group.prefix, [(m.number, m.inputs, m.targets) for m in group.members]) for group in groups] == [
        ([5, 6, 7, 8], [(1, [], [8, 9])]),
        ([1, 2], [(0, [3], [3, 4]), (2, [], [5])]),
    ]
    assert [[len(group.members) for group in batch] for batch in batches(groups, 2)] == [[1], [2]]
    assert [[len(group.members) for group in batch] for batch in batches(groups, 1)] == [[1], [1], [1]]
    model, seen = HarnessModel(source.path, torch.device("cpu"), torch.float32, 8, 256, lambda *_: None), []
    model.model.get_decoder().register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
    model._loglikelihood_tokens([(None, list(range(100)), [n, 1, 2]) for n in range(4)])
    assert seen == [100, 4 * 2]


def test_what_is_no_mean_has_a_real_standard_error_too(tmp_path: Path, source: DenseCheckpoint, folder: Path) -> None:
    report = lm_eval(tmp_path / "out", source, folder, "text", "writing")
    assert set(report.metrics) == {
        f"{name}{suffix}"
        for name in ("text/word_perplexity", "text/byte_perplexity", "text/bits_per_byte", "writing/json_validity")
        for suffix in ("", "_stderr")
    }
    assert all(type(value) is float and math.isfinite(value) for value in report.metrics.values())
    assert report.metrics["text/bits_per_byte_stderr"] > 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source.path), load_tokenizer(source.path)
    start, texts = "<|endoftext|>", [text * 2 for text in TEXT]
    nats = -sum(likelihood(model, tokenizer, start, text) for text in texts)
    assert report.metrics["text/bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(len(t.encode()) for t in texts), rel=1e-4)
    items = saved(report)["text"]["items"]
    assert len({item["id"] for item in items}) == 4 and all(set(item) == {"id"} for item in items)  # perplexities of one item are pairs


@pytest.mark.parametrize("mode", ["per_token_head", "static"])
def test_an_int8_cache_answers_and_writes(
    tmp_path: Path, source: DenseCheckpoint, folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(TEXT * 8))
    calibration = {"num_samples": 4, "max_length": 32} if mode == "static" else {}
    cached = KVCache.from_dict({"mode": mode, **calibration}).run(Context(tmp_path / "c", lambda event: None), source, Dataset(text))
    calls: list[int] = []
    update = Int8Layer.update
    monkeypatch.setattr(Int8Layer, "update", lambda self, keys, *rest: calls.append(keys.shape[-2]) or update(self, keys, *rest))
    plain = lm_eval(tmp_path / "plain", source, folder, "quiz", "writing")
    assert not calls
    lm_eval(tmp_path / "quiz", cached, folder, "quiz")
    read = len(calls)
    assert read > 0
    report = lm_eval(tmp_path / "int8", cached, folder, "quiz", "writing")
    assert calls[2 * read :].count(1) >= 2 * 5  # each token after the prompt, in two layers
    ours, theirs = ([line["responses"] for line in lines(made, "quiz")] for made in (report, plain))
    values = [[response[0] for row in rows for response in row] for rows in (ours, theirs)]
    assert values[0] != values[1] and values[0] == pytest.approx(values[1], rel=0.05)


def test_generation_goes_on_as_the_model_does(tmp_path: Path, source: DenseCheckpoint, folder: Path) -> None:
    report = lm_eval(tmp_path / "out", source, folder, "writing")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source.path), load_tokenizer(source.path)
    for line in lines(report, "writing"):
        ids = tokenizer(line["prompt"], return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert line["responses"] == [tokenizer.decode(made, skip_special_tokens=True)]


def test_a_packed_checkpoint_answers_as_its_weights_do(tmp_path: Path, source: DenseCheckpoint, folder: Path) -> None:
    packed = RTN.from_dict({"num_bits": 4, "group_size": 32}).run(Context(tmp_path / "q", lambda event: None), source)
    report = lm_eval(tmp_path / "out", packed, folder, "quiz")
    model, tokenizer = load_model(packed.path), load_tokenizer(packed.path)
    expected = [[likelihood(model, tokenizer, item["prompt"], choice) for choice in item["choices"]] for item in QUIZ]
    found = [[response[0] for response in line["responses"]] for line in lines(report, "quiz")]
    assert [value for row in found for value in row] == pytest.approx([value for row in expected for value in row], rel=1e-3)


def test_a_limit_is_told_and_items_keep_their_ids(tmp_path: Path, source: DenseCheckpoint, folder: Path) -> None:
    events: list[dict[str, Any]] = []
    output = tmp_path / "out"
    output.mkdir()
    report = LMEval.from_dict({"tasks": ["quiz"], "limit": 2}, {"device": "cpu"}).run(
        Context(output, events.append), source, Dataset(folder)
    )
    assert [item["id"] for item in saved(report)["quiz"]["items"]] == ["q0", "q1"]
    assert [e["text"] for e in events if e["event"] == "note"] == ["quiz: the first 2 of 4 items; its score is not the whole task's"]
    progress = [e for e in events if e["event"] == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] == 6


def test_examples_in_the_prompt_are_other_items(tmp_path: Path, source: DenseCheckpoint, folder: Path) -> None:
    report = lm_eval(tmp_path / "out", source, folder, "quiz", num_fewshot=1)
    for line in lines(report, "quiz"):
        question = next(item for item in QUIZ if item["id"] == line["id"])["prompt"]
        assert line["prompt"].endswith(f"\n\n{question}") and line["prompt"].count(question) == 1
    assert saved(report)["quiz"]["n_shot"] == 1


def test_a_group_adds_up_its_tasks(tmp_path: Path, source: DenseCheckpoint, folder: Path) -> None:
    tasks = tmp_path / "tasks"
    shutil.copytree(folder, tasks)
    write_task(tasks, "quiz_too", QUIZ[:2], metric_list=ACCURACY, **CHOICE)
    group = {"group": "both", "task": ["quiz", "quiz_too"], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (tasks / "both.yaml").write_text(yaml.safe_dump(group))
    metrics = lm_eval(tmp_path / "out", source, tasks, "both").metrics
    assert metrics["both/acc"] == pytest.approx((4 * metrics["quiz/acc"] + 2 * metrics["quiz_too/acc"]) / 6)
    assert metrics["both/acc_stderr"] > 0


def test_items_without_ids_are_told_apart_by_their_content(tmp_path: Path, source: DenseCheckpoint) -> None:
    items = [{key: value for key, value in item.items() if key != "id"} for item in [*QUIZ, QUIZ[0]]]
    tasks = write_task(tmp_path / "tasks", "quiz", items, metric_list=ACCURACY, **CHOICE)
    first = [item["id"] for item in saved(lm_eval(tmp_path / "a", source, tasks, "quiz"))["quiz"]["items"]]
    assert len(set(first)) == 5 and first[4] == f"{first[0]}#2"
    write_task(tasks, "quiz", items[::-1], metric_list=ACCURACY, **CHOICE)
    assert {item["id"] for item in saved(lm_eval(tmp_path / "b", source, tasks, "quiz"))["quiz"]["items"]} == set(first)


def test_a_task_that_does_not_exist_is_refused_before_the_model_is_read(tmp_path: Path, folder: Path) -> None:
    nowhere = DenseCheckpoint(tmp_path / "no model")
    with pytest.raises(ValueError, match=r"tasks: 'quizz' does not exist; did you mean 'quiz'\?; tasks: 'nothing' does not exist"):
        lm_eval(tmp_path / "out", nowhere, folder, "quizz", "nothing")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"doc_to_text": "{{ ''.__class__ }}"}, "cannot be built: access to attribute '__class__' of 'str' object is unsafe"),
        ({"dataset_path": "someone/else"}, "dataset_path 'someone/else' is not beside the task file"),
        ({"dataset_kwargs": {"data_files": {"test": "missing.jsonl"}}}, "data_files 'missing.jsonl' does not exist"),
        ({"dataset_kwargs": {"data_files": {"test": "../secret.jsonl"}}}, "data_files '../secret.jsonl' lies outside the folder"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "hf_evaluate would download code for metric 'acc'"),
        ({"metric_list": [{"metric": "acc_nrm"}]}, "metric 'acc_nrm' does not exist; did you mean 'acc_norm'?"),
        ({"generation_kwargs": {"custom_generate": "x", "trust_remote_code": True}}, "generation_kwargs has custom_generate, trust_remote"),
        ({"include": "../other.yaml"}, "include '../other.yaml' lies outside the folder"),
        ({"use_prompt": "promptsource:*"}, "use_prompt names code"),
    ],
)
def test_a_task_file_is_data(tmp_path: Path, source: DenseCheckpoint, fields: dict[str, Any], message: str) -> None:
    (tmp_path / "secret.jsonl").write_text('{"prompt": "a"}\n')
    tasks = write_task(tmp_path / "tasks", "quiz", QUIZ, **({"metric_list": ACCURACY} | CHOICE | fields))
    if "dataset_kwargs" in fields or "dataset_path" in fields:
        content = yaml.safe_load((tasks / "quiz.yaml").read_text()) | fields
        (tasks / "quiz.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError) as refused:
        lm_eval(tmp_path / "out", source, tasks, "quiz")
    assert message in str(refused.value)


def test_code_in_a_task_file_runs_only_where_that_is_allowed(tmp_path: Path, source: DenseCheckpoint) -> None:
    tasks = write_task(tmp_path / "tasks", "quiz", QUIZ, metric_list=ACCURACY, **CHOICE)
    (tasks / "answers.py").write_text("def first(doc):\n    return 0\n")
    (tasks / "base").write_text((tasks / "quiz.yaml").read_text() + "doc_to_target: !function answers.first\n")  # later keys win
    (tasks / "quiz.yaml").write_text("include: base\ntask: quiz\n")
    with pytest.raises(ValueError, match=r"tasks: base: `!function answers\.first` runs code; set allow_code: true if you trust it"):
        lm_eval(tmp_path / "out", source, tasks, "quiz")
    report = lm_eval(tmp_path / "out", source, tasks, "quiz", allow_code=True)
    assert [line["target"] for line in lines(report, "quiz")] == [0] * 4


def test_what_the_plan_can_refuse_it_refuses(source: DenseCheckpoint) -> None:
    spec = source.model_spec
    with pytest.raises(ValueError, match="allow_code: it has an effect only on a folder of task files"):
        LMEval.from_dict({"tasks": ["arc_easy"], "allow_code": True}).infer(spec)
    with pytest.raises(ValueError, match="tasks: the split is of format text; give a folder of task files"):
        LMEval.from_dict({"tasks": ["quiz"]}).infer(spec, DatasetSpec(split="eval", digest="0", nbytes=1))
    with pytest.raises(ValueError, match=r"tasks: 'quizz' does not exist in the folder; did you mean 'quiz'\?"):
        LMEval.from_dict({"tasks": ["quizz", "text"]}).infer(
            spec, DatasetSpec(split="tasks", format="tasks", digest="0", nbytes=1, tasks=("quiz", "text"))
        )
    with pytest.raises(ValueError, match="tasks: quiz is there twice"):
        LMEval.from_dict({"tasks": ["quiz", "quiz"]}).infer(spec)
    stage = LMEval.from_dict({"tasks": ["quiz"], "max_length": 512})
    assert stage.explain(spec.with_cache("static"))[:2] == [
        "max_length 512: prompts are cut to 256 tokens, all the positions there are",
        "answered with its INT8 cache (static)",
    ]
    small, large = (LMEval.from_dict({"tasks": ["q"]}, {"batch_size": n}).memory(spec, Target.host()) for n in (1, 64))
    assert sum(small.ram.values()) < sum(large.ram.values())


def test_a_damaged_model_gets_no_score(tmp_path: Path, folder: Path) -> None:
    broken = DenseCheckpoint(make_checkpoint(tmp_path / "broken", num_hidden_layers=1, dtype=torch.float32))
    weights = load_file(broken.path / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, broken.path / "model.safetensors", metadata={"format": "pt"})
    for task, message in {"quiz": "log-probabilities are nan or infinite", "writing": "logits are nan"}.items():
        with pytest.raises(ValueError, match=message):
            lm_eval(tmp_path / "out", broken, folder, task)


def test_a_chat_template_is_applied_where_there_is_one(tmp_path: Path, source: DenseCheckpoint, folder: Path) -> None:
    with pytest.raises(ValueError, match="apply_chat_template: the checkpoint has no chat template"):
        lm_eval(tmp_path / "out", source, folder, "quiz", apply_chat_template=True)
    chat = tmp_path / "chat"
    shutil.copytree(source.path, chat)
    (chat / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    report = lm_eval(tmp_path / "out", DenseCheckpoint(chat), folder, "quiz", apply_chat_template=True)
    assert lines(report, "quiz")[0]["prompt"] == f"<user>{QUIZ[0]['prompt']}"


def test_more_tokens_than_there_are_positions_are_refused(tmp_path: Path, source: DenseCheckpoint, folder: Path) -> None:
    with pytest.raises(ValueError, match="tasks: 'writing' generates up to 6 tokens, which leaves no room for a prompt in 5 tokens"):
        lm_eval(tmp_path / "out", source, folder, "writing", max_length=5)


def test_vllm_is_given_the_cache_that_the_checkpoint_asks_for(tmp_path: Path, source: DenseCheckpoint) -> None:
    plain = vllm_arguments(source.path, 16, 256, "bf16")
    assert plain == {
        "pretrained": str(source.path),
        "dtype": "bfloat16",
        "trust_remote_code": False,
        "batch_size": 16,
        "max_model_len": 256,
        "seed": 0,
    }
    cached = KVCache().run(Context(tmp_path / "c", lambda event: None), source)
    assert vllm_arguments(cached.path, 16, 256, "bf16")["kv_cache_dtype"] == "int8_per_token_head"
    (cached.path / "kv_cache.json").write_text('{"mode": "static"}')
    with pytest.raises(ValueError, match="engine: vLLM reads no calibrated INT8 scales"):
        vllm_arguments(cached.path, 16, 256, "bf16")


def test_vllm_where_it_is_not_installed_is_refused(source: DenseCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.runtime.harness_vllm.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="engine: vllm is not installed here"):
        load_vllm(source.path, 16, 256, "bf16")


HEAD = '    @cache\n    def size(self, name):\n        """Bytes."""'


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("\n        return 1\n\n    def other(self:", 1.0),  # the rest belongs to another function
        ("\n        return (1\n\n    def other(self):", 0.0),
        ("\n        a = 1\n        return self.sizes[na", 1.0),  # out of tokens in the middle of a line
        ("\n        a = (1\n        return self.sizes[na", 0.0),
        ("\n        if name:\n            ret", 1.0),
        ("\n\n    def other(self):\n        pass", 0.0),  # a docstring is no body
        ("\n        for a in name:\n            if a:\n                b(\n", 0.0),
        ("\n        return 1 +* 2\n    x = 1", 0.0),
        ("\n        return '\\d'\nclass A", 1.0),
        ("\n        return '\0'\nclass A", 0.0),
    ],
)
def test_python_is_valid_where_the_function_parses(completion: str, score: float) -> None:
    assert python_validity([HEAD], [completion]) == score
    assert python_validity([HEAD + "\n"], [completion.removeprefix("\n")]) == score


def test_a_body_can_be_asked_to_be_more_than_one_statement() -> None:
    completion = "    for a in x:\n        if a:\n            return a\nx = 1"
    assert [python_validity(["def f(x):\n"], [completion], min_statements=n) for n in (3, 4)] == [1.0, 0.0]
    assert python_validity(["def f():\n"], ["x = 1"]) == 0.0  # no body at all


@pytest.mark.parametrize(
    ("start", "completion", "score"),
    [('{"a": ', "1} and more", 1.0), ("", ' [1, {"b": null}]', 1.0), ('{"a": ', "1", 0.0), ('{"a": ', "NaN}", 0.0), ("", "", 0.0)],
)
def test_json_is_valid_where_a_whole_value_stands_first(start: str, completion: str, score: float) -> None:
    assert json_validity([start], [completion]) == score
