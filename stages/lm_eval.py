"""Tasks of lm-evaluation-harness: what a model can still do, where perplexity only says how surprised it is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import Field

from pipeline.artifact import Checkpoint, Dataset, EvalReport, has_chat_template
from pipeline.artifact_spec import DatasetSpec
from pipeline.compute_dtype import Computing
from pipeline.errors import InputProblems, did_you_mean
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import HALVES, Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.stage_work import TOKEN_BYTES, forward_flops, reading
from stages.runtime.windows import LOGITS_BYTES

SEED = 1234  # the harness' own, of few-shot examples and of tasks that sample


class LMEval(Stage):
    """Tasks of EleutherAI's lm-evaluation-harness (Gao et al., 2024, 10.5281/zenodo.12608602), by name, on any checkpoint.

    `tasks` wires a folder of task files and their data (a split of `format: tasks`): only those are known then, and no connection is
    needed. Without it the harness' own are known, whose data comes from a hub: run once with HF_HUB_OFFLINE=0 in the environment.
    A folder's task files are data and run no code (stages/runtime/task_folder.py) unless `allow_code` says that they may.

    A checkpoint with a `kv_cache.json` answers with its INT8 cache. `engine: vllm` computes with vLLM, where that is installed.

    Metrics, for each task and group: `task/metric` and `task/metric_stderr` (standard error over items), for tasks that read answers in
    several ways `task/metric.filter`. `tasks.json`: {"tasks": {name: {"metrics": {metric: {"value", "stderr", "higher_is_better"}},
    "n_shot", "version", "items": [{"id", metric: value, ...}]}}, "groups": {name: {"metrics"}}}. An item's id is the same in every
    report on the same data, so that two can be paired. `samples_<task>.jsonl`: prompts, targets and what the model said.
    """

    name, version = "lm_eval", 1
    libraries: tuple[str, ...] = ("torch", "transformers", "compressed-tensors", "lm-eval")
    compares = True
    lightens = {"execution.batch_size": HALVES}

    class Params(Computing, Stage.Params):
        tasks: tuple[str, ...] = Field(min_length=1)  # names of tasks, groups or tags
        num_fewshot: int | None = Field(default=None, ge=0)  # examples in the prompt; as each task says, unless given
        limit: int | None = Field(default=None, ge=2)  # items of each task, the first ones
        apply_chat_template: bool = False
        engine: Literal["transformers", "vllm"] = "transformers"
        max_length: int | None = Field(default=None, ge=2)  # tokens of context; all the positions the model has, unless given
        allow_code: bool = False  # of the folder's task files: run the Python that they name

    class Execution(Stage.Execution):
        batch_size: int = Field(default=16, ge=1)  # requests at once
        device: Literal["auto", "cpu", "cuda"] = "auto"

    params: Params
    execution: Execution

    def __init__(self, params: Any = None, execution: Any = None) -> None:
        super().__init__(params, execution)
        if self.params.engine == "vllm":
            self.libraries = (*self.libraries, "vllm")

    def infer(self, model: ModelSpec, tasks: DatasetSpec | None = None) -> None:
        problems = []
        if tasks is not None and tasks.format != "tasks":
            problems.append(f"tasks: the split is of format {tasks.format}; give a folder of task files, as format: tasks")
        elif tasks is not None:
            unknown = [name for name in self.params.tasks if name not in tasks.tasks]
            problems += [f"tasks: '{name}' does not exist in the folder{did_you_mean(name, tasks.tasks)}" for name in unknown]
        if tasks is None and self.params.allow_code:
            problems.append("allow_code: it has an effect only on a folder of task files; leave it out")
        if repeated := sorted({name for name in self.params.tasks if self.params.tasks.count(name) > 1}):
            problems.append(f"tasks: {', '.join(repeated)} is there twice; name each once")
        if self.params.engine == "vllm" and self.execution.device == "cpu":
            problems.append("engine: vllm computes on a GPU here; leave execution.device out or write engine: transformers")
        if problems:
            raise InputProblems(problems)

    def measures(self) -> tuple[str, ...]:
        return tuple(f"{task}/*" for task in self.params.tasks)

    def window(self, model: ModelSpec) -> int:
        positions = model.architecture.max_position
        return min(self.params.max_length or positions, positions)

    def memory(self, model: ModelSpec, target: Target, tasks: DatasetSpec | None = None) -> Memory:
        packed = 0 if model.is_dense else model.nbytes
        model = self.params.in_memory(model)
        shape, item = model.architecture, self.params.item
        tokens = self.execution.batch_size * self.window(model)
        widest = 4 * shape.hidden_size + 3 * shape.intermediate_size + 2 * shape.num_heads * shape.head_dim
        items = {"model, dense": model.dense().nbytes}
        if packed:
            items["model, packed, while loading"] = packed
        items["activations of one layer"] = tokens * widest * item
        items["KV cache"] = tokens * model.kv_cache.bytes_per_token
        if model.kv_cache.mode:
            one_layer = 2 * tokens * shape.num_kv_heads * shape.head_dim
            items["keys and values of one layer, dequantized"] = one_layer * (item + 4)  # by way of fp32
        items["logits of a chunk of tokens"] = 3 * LOGITS_BYTES  # as the model gives them, in float32, as log-probabilities
        held = {"the tasks' items, prompts and answers": 20 * tasks.nbytes if tasks else 1 << 30}
        return Memory(ram=held, vram=items) if self.on_gpu(target) else Memory(ram=held | items)

    def work(self, model: ModelSpec, tasks: DatasetSpec | None = None) -> Work | None:
        """Each item's text is read once; what is generated is taken to be as long. Of the harness' own tasks nothing is known before."""
        if tasks is None:
            return None
        return reading(model) + self.params.products(2 * forward_flops(model, tasks.nbytes / TOKEN_BYTES, self.window(model)))

    def explain(self, model: ModelSpec, tasks: DatasetSpec | None = None) -> list[str]:
        said = []
        if self.params.max_length not in (None, self.window(model)):
            said.append(f"max_length {self.params.max_length}: prompts are cut to {self.window(model)} tokens, all the positions there are")
        if model.kv_cache.mode:
            said.append(f"answered with its INT8 cache ({model.kv_cache.mode})")
        if tasks is None:
            said.append("the harness' own tasks: data that is not cached is fetched, which needs HF_HUB_OFFLINE=0 in the environment")
        return said

    def run(self, ctx: Context, model: Checkpoint, tasks: Dataset | None = None) -> EvalReport:
        from contextlib import nullcontext

        from stages.runtime.task_folder import check_folder, load_tasks, sandboxed_templates, task_manager, without_bars
        from stages.runtime.task_report import flat_metrics, group_results, task_result, write_samples, write_tasks

        params, folder = self.params, tasks.path if tasks else None
        if params.apply_chat_template and not has_chat_template(model.path):
            raise ValueError("apply_chat_template: the checkpoint has no chat template; leave it out")
        data_only = folder is not None and not params.allow_code
        if folder is not None and data_only:
            check_folder(folder)
        ctx.output.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=ctx.output) as cache, without_bars(), sandboxed_templates() if data_only else nullcontext():
            loaded, groups = load_tasks(task_manager(folder, Path(cache)), params.tasks)
            samples = self._answers(ctx, model, loaded)
            results = {name: task_result(task, samples[name]) for name, task in loaded.items()}
        added = group_results(groups, results)
        write_tasks(ctx.output, results, added)
        for name, asked in samples.items():
            write_samples(ctx.output, name, asked)
        self._say(ctx, results, loaded)
        return EvalReport(path=ctx.output, metrics=flat_metrics(results | {name: {"metrics": metrics} for name, metrics in added.items()}))

    def _answers(self, ctx: Context, model: Checkpoint, tasks: Mapping[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
        """The harness' samples of each task."""
        import random

        import numpy
        import torch
        from lm_eval.evaluator import evaluate

        from stages.runtime.harness_model import HarnessModel
        from stages.runtime.harness_vllm import load_vllm
        from stages.runtime.loading import COMPUTE_DTYPES, resolve_device

        params, batch_size, window = self.params, self.execution.batch_size, self.window(model.model_spec)
        for task in tasks.values():
            if params.num_fewshot and task.get_config("num_fewshot") == 0:  # the harness' rule: such a task makes no sense with any
                ctx.note(f"{task.config.task}: it is a task without examples in the prompt, and stays so")
            elif params.num_fewshot is not None or task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=params.num_fewshot or 0)
            task.set_fewshot_seed(seed=SEED)
        random.seed(SEED)
        numpy.random.seed(SEED)
        torch.manual_seed(SEED)
        lm: Any
        if params.engine == "vllm":
            lm = load_vllm(model.path, batch_size, window, params.computes_in)
        else:
            device, dtype = resolve_device(self.execution.device), COMPUTE_DTYPES[params.computes_in]
            lm = HarnessModel(model.path, device, dtype, batch_size, window, ctx.progress)
        found = evaluate(
            lm=lm,
            task_dict={"tasks": dict(tasks), "groups": {}},
            limit=params.limit,
            bootstrap_iters=0,  # standard errors are of the items, in task_report
            apply_chat_template=params.apply_chat_template,
            fewshot_as_multiturn=params.apply_chat_template,
        )
        if cut := getattr(lm, "cut", 0):
            ctx.note(f"{cut} requests did not fit into {window} tokens; their beginning was cut off")
        samples: dict[str, Sequence[Mapping[str, Any]]] = found["samples"]
        return samples

    def _say(self, ctx: Context, results: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Any]) -> None:
        for name, result in results.items():
            items, known = len(result["items"]), len(tasks[name].eval_docs)
            if items < known:
                ctx.note(f"{name}: the first {items} of {known} items; its score is not the whole task's")
