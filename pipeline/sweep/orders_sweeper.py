"""`hydra/sweeper=orders`: every legal order of a recipe's stages, crossed with the other axes of the command line.

    run -m recipe=X hydra/sweeper=orders stages.quantize.num_bits=4,3
    run -m recipe=X hydra/sweeper=orders hydra.sweeper.subset=true mode=plan     only the tree of what the jobs have in common

Every job is composed and planned in this process. What is illegal is told with the reason and skipped; the rest is launched, orders
that begin alike after each other, `hydra.sweeper.max_batch_size` at a time. A job that fails leaves the others alone.

Hydra makes a sweeper only from a class whose module is below `hydra_plugins`, and looks it up there by import. This module gets such
a name when it is registered, so that nothing outside this package need be installed.
"""

import importlib
import json
import re
import sys
import types
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from pipeline.errors import LlmpressError, PlanError, RecipeError
from pipeline.plan import Plan, make_plan
from pipeline.recipe import Recipe, Settings, read_config
from pipeline.store import Store
from pipeline.sweep.orders import Candidate, legal_orders
from pipeline.sweep.prefix_tree import PrefixTree, identities, prefix_rank

MODULE = "hydra_plugins.llmpress_orders"
MOST_NAMED = 6  # orders that are named where one reason holds for many


class SweepFailed(LlmpressError):
    """Some jobs failed, as the sweep's last table tells. The exit code is that of the first."""

    told = True

    def __init__(self, sentence: str, first: object) -> None:
        self.exit_code = first.exit_code if isinstance(first, LlmpressError) else LlmpressError.exit_code
        super().__init__(sentence)


@dataclass(frozen=True)
class Job:
    """One order under one choice of the other axes."""

    overrides: tuple[str, ...]
    moved: tuple[str, ...]
    plan: Plan


class OrdersSweeper(Sweeper):
    """Not a BasicSweeper: Hydra's search for plugins executes that module again, which breaks `super()` in what inherits from it."""

    resources: ClassVar[Path]  # set by `register`

    def __init__(self, subset: Any, max_batch_size: int | None) -> None:
        self.subset, self.max_batch_size = subset, max_batch_size

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config: DictConfig = config
        self.loader = hydra_context.config_loader
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """The jobs' returns, in batches; nothing for a plan. RecipeError or PlanError where no order is legal, SweepFailed at the end."""
        if not isinstance(self.subset, bool):
            raise RecipeError(f"hydra.sweeper.subset: {self.subset!r} is not a choice; write true or false")
        if self.max_batch_size is not None and self.max_batch_size < 1:
            raise RecipeError("hydra.sweeper.max_batch_size: it is the number of jobs launched together; write 1 or more, or null for all")
        jobs = _Jobs(self.config, self.loader, self.subset, self.resources)
        jobs.plan(BasicSweeper.split_arguments(OverridesParser.create(self.loader).parse_overrides(arguments), None)[0])
        if not jobs.found and (always := _always(jobs.refused)):
            raise always
        for sentence in _skipped(jobs.refused):
            print(sentence, file=sys.stderr)
        if not jobs.found:
            kind = PlanError if all(isinstance(error, PlanError) for _, error in jobs.refused) else RecipeError
            raise kind("order: none of the orders can be run, for the reasons above; change the stages or name others with order=[...]")
        tree = PrefixTree(job.plan for job in jobs.found)
        if jobs.settings.mode == "plan":
            moved = dict.fromkeys(name for job in jobs.found for name in job.moved)
            _print_plan(tree, f"orders of {', '.join(moved)}", jobs.settings)
            return []
        for sentence in tree.sentences():
            print(sentence, file=sys.stderr)
        return self._launch([list(job.overrides) for job in jobs.found])

    def _launch(self, jobs: list[list[str]]) -> list[Sequence[JobReturn]]:
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        returns: list[Sequence[JobReturn]] = []
        failed: list[tuple[int, object]] = []
        launched = 0
        for batch in BasicSweeper.split_overrides_to_chunks(jobs, self.max_batch_size):
            try:
                done = self.launcher.launch(batch, initial_job_idx=launched)
            except Exception as error:  # a worker was killed: which of its batch had finished is not known, and a later run finds out
                print(f"error: jobs {launched} to {launched + len(batch) - 1} were lost: {_first_line(error)}", file=sys.stderr)
                failed += [(launched + number, error) for number in range(len(batch))]
                done = []
            # `return_value` of a failed job raises
            failed += [(launched + n, job._return_value) for n, job in enumerate(done) if job.status is not JobStatus.COMPLETED]
            returns.append(done)
            launched += len(batch)
        if failed:
            named = ", ".join(str(number) for number, _ in failed)
            raise SweepFailed(
                f"{len(failed)} of {launched} jobs failed ({named}); the same command runs only what is missing", failed[0][1]
            )
        return returns


class _Jobs:
    """Composes and plans: `found` in the order to be visited, `refused` with what they are called."""

    def __init__(self, config: DictConfig, loader: Any, subset: bool, resources: Path) -> None:
        self.config, self.loader, self.subset, self.resources = config, loader, subset, resources
        self.found: list[Job] = []
        self.seen: set[Hashable] = set()
        self.refused: list[tuple[str, RecipeError]] = []
        self.settings = Settings()

    def plan(self, bases: Sequence[Sequence[str]]) -> None:
        """`bases` are the overrides of every choice of the other axes. RecipeError where `mode` is not one, run or plan, for all."""
        modes = set()
        same = set(bases[0]).intersection(*bases)
        for base in bases:
            axes = [override for override in base if not _is_order(override)]
            chosen = [override for override in axes if override not in same]
            choice = " ".join(chosen)
            try:
                recipe, self.settings = self._compose(base)
                modes.add(self.settings.mode)
                for candidate in legal_orders(recipe, self._plan_of, self.subset):
                    self._take(axes, chosen, candidate)
            except RecipeError as error:
                self.refused.append((choice or "every order", error))
        if modes not in ({"run"}, {"plan"}, set()):
            told = " and ".join(sorted(modes))
            raise RecipeError(f"mode: the orders are either all run or all planned, not {told}; write mode=run or mode=plan")
        ranked = zip(prefix_rank([job.plan for job in self.found]), range(len(self.found)), strict=True)
        self.found = [self.found[number] for _, number in sorted(ranked)]

    def _take(self, axes: list[str], chosen: list[str], candidate: Candidate) -> None:
        """An order that leaves a stage out is one job, whatever is chosen for that stage."""
        if candidate.plan is None:
            assert candidate.error is not None, "an order has a plan or the reason why not"
            self.refused.append((">".join(candidate.moved) + (f" ({' '.join(chosen)})" if chosen else ""), candidate.error))
            return
        executions = identities(candidate.plan)
        present = {name.partition("@")[0] for name in executions}
        effective = [override for override in chosen if (stage := _stage_of(override)) is None or stage in present]
        same = (candidate.order, *effective, *executions.values())
        if same not in self.seen:
            self.seen.add(same)
            self.found.append(Job((*axes, f"order=[{','.join(candidate.order)}]"), candidate.moved, candidate.plan))

    def _compose(self, overrides: Sequence[str]) -> tuple[Recipe, Settings]:
        config = self.loader.load_sweep_config(self.config, list(overrides))
        name = config.hydra.runtime.choices.get("recipe")
        if name is None:
            raise RecipeError("no recipe is chosen; write recipe=<name>")
        with open_dict(config):
            del config["hydra"]
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        assert isinstance(plain, dict)
        recipe, settings = read_config({str(key): value for key, value in plain.items()}, name)
        return (replace(recipe, compute=recipe.machine.here()) if settings.mode == "run" else recipe), settings

    def _plan_of(self, recipe: Recipe) -> Plan:
        """PlanError where it cannot run on its machine and the user does not want it all the same."""
        store = Store(Path(self.settings.outputs).expanduser().resolve())
        plan = make_plan(recipe, store, self.resources, execute=False)
        if plan.problems and self.settings.fit == "refuse":
            raise PlanError(plan.problems)
        return plan


def register(resources: Path) -> DictConfig:
    """Make this class known to Hydra, and return the settings of `hydra/sweeper=orders`. `resources` holds conf/ and assets/."""
    OrdersSweeper.resources = resources
    OrdersSweeper.__module__ = MODULE
    package, _, name = MODULE.rpartition(".")
    try:
        plugins = importlib.import_module(package)  # there where other plugins are installed
    except ImportError:
        plugins = sys.modules[package] = types.ModuleType(package)
        plugins.__path__ = []
    sys.modules[MODULE] = sys.modules[__name__]
    setattr(plugins, name, sys.modules[__name__])
    Plugins.instance().register(OrdersSweeper)
    settings: DictConfig = OmegaConf.structured(OrdersConfig)
    return settings


@dataclass
class OrdersConfig:
    """What can be set below `hydra.sweeper`."""

    _target_: str = f"{MODULE}.OrdersSweeper"
    subset: Any = False  # leave stages out too; a boolean, which OmegaConf would also make of a number
    max_batch_size: int | None = None  # jobs launched together; null: all


def _is_order(override: str) -> bool:
    return override.partition("=")[0].lstrip("+") == "order"


def _stage_of(override: str) -> str | None:
    """`quantize` of `stages.quantize.num_bits=4` and of `stage@stages.quantize=awq`."""
    found = re.match(r"[+~]*(?:stage@)?stages\.(\w+)", override)
    return found.group(1) if found else None


def _skipped(refused: Sequence[tuple[str, RecipeError]]) -> list[str]:
    """Each reason once, with what it holds for."""
    by_reason: dict[str, dict[str, None]] = {}
    for label, error in refused:
        for problem in error.problems:
            by_reason.setdefault(problem, {})[label] = None
    return [f"skipped {_names(list(labels))}: {problem}" for problem, labels in by_reason.items()]


def _names(labels: Sequence[str]) -> str:
    more = len(labels) - MOST_NAMED
    return ", ".join(labels[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _always(refused: Sequence[tuple[str, RecipeError]]) -> RecipeError | None:
    """The error that every order has, if they all have the same."""
    first = refused[0][1]
    return first if all(error.problems == first.problems for _, error in refused) else None


def _print_plan(tree: PrefixTree, title: str, settings: Settings) -> None:
    if settings.format == "json":
        print(json.dumps(tree.content(), indent=1))
        return
    console = Console()
    console.print(tree.tree(title), soft_wrap=True, highlight=False)
    for sentence in tree.sentences():
        console.print(sentence, soft_wrap=True, highlight=False)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
