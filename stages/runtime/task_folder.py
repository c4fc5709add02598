"""Task files of lm-evaluation-harness in a folder: read as data, which must not be able to run code or to reach outside the folder.

The harness itself trusts its task files: `!function` imports Python, templates reach any attribute, `dataset_path` may be a hub's
or a script's, `generation_kwargs` reach `generate`. Tasks given as a recipe's data are checked before the harness sees them, and their
templates run in jinja's sandbox. What a task does beyond that needs `allow_code: true`.

A task's `data_files` are relative to its own file, which the harness leaves to the working directory.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.utils
import yaml
from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.registry import metric_registry
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

from pipeline.errors import InputProblems, did_you_mean
from stages.runtime import task_metrics  # noqa: F401  # registers what task files may name

READERS = ("json", "csv", "text", "parquet")  # of `datasets`, for files: they run no code
GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty"}
FOREIGN = ("class", "use_prompt", "custom_dataset", "unsafe_code")  # fields that name code


class Function(str):
    """A `!function module.name` in a task file."""


class _Loader(yaml.SafeLoader):
    """YAML's own types, and `!function` as what it is."""


_Loader.add_constructor("!function", lambda loader, node: Function(node.value))


def check_folder(folder: Path) -> None:
    """InputProblems lists all that a task file may not do without `allow_code`."""
    problems: list[str] = []
    files = sorted(folder.rglob("*.yaml"))
    seen = set(files)
    for file in files:  # grows by what is included, which may be named otherwise
        try:
            content = yaml.load(file.read_bytes(), Loader=_Loader)  # a SafeLoader
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            problems.append(f"{file.relative_to(folder)} is no task file: {' '.join(str(error).split())}")
            continue
        except FileNotFoundError:
            problems.append(f"{file.relative_to(folder)} is included, but does not exist")
            continue
        problems += [f"{file.relative_to(folder)}: {problem}" for problem in _problems(content, file, folder)]
        for other in _included(content, file, folder):
            if other not in seen:
                seen.add(other)
                files.append(other)
    if problems:
        raise InputProblems(f"tasks: {problem}" for problem in problems)


def _included(content: Any, file: Path, folder: Path) -> Iterator[Path]:
    """Files in the folder; others are a problem already."""
    if isinstance(content, dict):
        for name in _as_list(content.get("include")):
            if _inside(other := (file.parent / str(name)).resolve(), folder):
                yield folder / other.relative_to(folder.resolve())


def _problems(node: Any, file: Path, folder: Path) -> Iterator[str]:
    if isinstance(node, Function):
        yield f"`!function {node}` runs code; set allow_code: true if you trust it, or name one of the harness' metrics and filters"
    elif isinstance(node, list):
        for item in node:
            yield from _problems(item, file, folder)
    elif isinstance(node, dict):
        for item in node.values():
            yield from _problems(item, file, folder)
        yield from _field_problems(node, file, folder)


def _field_problems(node: Mapping[Any, Any], file: Path, folder: Path) -> Iterator[str]:
    for name in FOREIGN:
        if node.get(name) and not isinstance(node[name], Function):
            yield f"{name} names code; set allow_code: true if you trust it"
    for name in _as_list(node.get("include")):
        if not _inside((file.parent / str(name)).resolve(), folder):
            yield f"include '{name}' lies outside the folder; copy it into the folder"
    if isinstance(node.get("task"), list) and any(isinstance(member, dict) and "dataset_path" in member for member in node["task"]):
        yield "a group holds a whole task; write that in a file of its own and name it here"
    if isinstance(node.get("generation_kwargs"), dict) and (others := sorted(set(node["generation_kwargs"]) - GENERATION)):
        yield f"generation_kwargs has {', '.join(map(str, others))}; there are: {', '.join(sorted(GENERATION))}"
    yield from _data_problems(node, file, folder)
    yield from _metric_problems(node)


def _data_problems(node: Mapping[Any, Any], file: Path, folder: Path) -> Iterator[str]:
    if "dataset_path" in node and node["dataset_path"] not in READERS:
        yield (
            f"dataset_path '{node['dataset_path']}' is not beside the task file, so not part of what is digested; "
            f"write {', '.join(READERS)} with data_files"
        )
    options = node.get("dataset_kwargs")
    if not isinstance(options, dict):
        return
    if others := sorted(set(options) - {"data_files"}):
        yield f"dataset_kwargs has {', '.join(map(str, others))}; only data_files is read"
    for name in _data_files(options.get("data_files")):
        path = (file.parent / name).resolve()
        if not _inside(path, folder):
            yield f"data_files '{name}' lies outside the folder; copy it into the folder"
        elif not path.is_file():
            yield f"data_files '{name}' does not exist; paths are relative to the task file"


def _metric_problems(node: Mapping[Any, Any]) -> Iterator[str]:
    metric = node.get("metric")
    if metric is None or isinstance(metric, Function):
        return
    if node.get("hf_evaluate"):
        yield f"hf_evaluate would download code for metric '{metric}'; name one of the harness' own metrics"
    elif metric not in metric_registry:
        yield f"metric '{metric}' does not exist{did_you_mean(str(metric), metric_registry.keys())}"


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _data_files(value: Any) -> list[str]:
    """Of `file`, `[file, ...]` or `{split: file or files}`."""
    if isinstance(value, dict):
        return [name for files in value.values() for name in _data_files(files)]
    return [str(name) for name in _as_list(value)]


def _inside(path: Path, folder: Path) -> bool:
    return path.is_relative_to(folder.resolve())


class FolderFactory(TaskFactory):  # type: ignore[misc]  # lm_eval is not followed
    """Builds tasks whose data files lie beside their own file. `datasets` keeps its tables in `cache`."""

    def __init__(self, cache: Path) -> None:
        super().__init__()
        self.cache = cache

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config: dict[str, Any] = super()._load_full_config(entry, overrides)
        options = dict(config.get("dataset_kwargs") or {})
        if "data_files" in options and entry.yaml_path:
            options |= {"data_files": _resolved(options["data_files"], entry.yaml_path.parent), "cache_dir": str(self.cache)}
            config["dataset_kwargs"] = options
        return config


def _resolved(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {split: _resolved(files, folder) for split, files in value.items()}
    if isinstance(value, list):
        return [_resolved(name, folder) for name in value]
    return str((folder / str(value)).resolve())


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of `datasets` and of the harness, which a log only fills up with."""
    shown, bar = datasets.is_progress_bar_enabled(), lm_eval.api.task.tqdm
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def sandboxed_templates() -> Iterator[None]:
    """The harness' templates, without access to what Python objects lead to."""
    trusted = lm_eval.utils.env
    sandbox = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters |= {name: trusted.filters[name] for name in ("regex_replace",)}
    lm_eval.utils.env = sandbox
    try:
        yield
    finally:
        lm_eval.utils.env = trusted


def task_manager(folder: Path | None, cache: Path) -> Any:
    """Of a folder's tasks, or of the harness' own, which takes half a minute to look through."""
    if folder is None:
        return TaskManager()
    manager = TaskManager(include_path=folder, include_defaults=False)
    manager._factory = FolderFactory(cache)
    return manager


def load_tasks(manager: Any, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tasks and groups by name, their data read. ValueError: all names that do not exist; or the task whose data cannot be read."""
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        raise InputProblems(f"tasks: '{name}' does not exist{_near(name, manager.all_tasks)}" for name in unknown)
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # whatever a task file's author got wrong; its traceback goes to the log
            sentence = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"tasks: '{name}' cannot be built: {sentence}{_offline(manager)}") from error
        tasks |= loaded["tasks"]
        groups |= loaded["groups"]
    return tasks, groups


def _near(name: str, known: Sequence[str]) -> str:
    if len(known) < 30:
        return did_you_mean(name, known)
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else "; `lm_eval ls tasks` lists those of the harness"


def _offline(manager: Any) -> str:
    if manager.include_path is not None:
        return ""
    return "; tasks of the harness fetch their data: run with HF_HUB_OFFLINE=0 in the environment, once, with a connection"
