"""The abstract evaluation of a recipe: every node's key, spec, memory and whether it is already done, from shapes alone.

A plan needs no weights, no torch and well under a second. The executor takes only a `Plan`, so the plan and the run cannot disagree:
`expected` is what the guard holds each finished artifact to.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipeline.artifact import Artifact, Checkpoint, Dataset, DenseCheckpoint, Manifest
from pipeline.artifact_spec import Spec
from pipeline.bounds import is_open, outputs_as_made
from pipeline.compute_dtype import slow_sentences
from pipeline.envs import Environments, PlannedEnvironment
from pipeline.errors import InputProblems, RecipeError
from pipeline.evidence import build
from pipeline.graph import SOURCE_MODEL, Graph, Node, Ref, worked_on
from pipeline.identity import DigestMemo, not_installed, output_key, stage_key
from pipeline.installed import check_installed
from pipeline.misses import explain_miss
from pipeline.rates import at_measured_rates
from pipeline.recipe import Recipe
from pipeline.recipe_digest import recipe_digest
from pipeline.requantize import configured, left_dense
from pipeline.roofline import STARTED, STARTING, Work, dollars, seconds
from pipeline.served import Served, known_targets, senseless, served
from pipeline.shared_passes import share_passes
from pipeline.shortage import Shortage, lacking, shortage
from pipeline.source import check_disjoint, open_model, open_split
from pipeline.spec import ModelSpec
from pipeline.stage import Stage
from pipeline.store import Store, digests_read
from pipeline.target import Memory
from pipeline.together import conversation_problems, idle_dtype, located, read_tokenizer, reads_chats, task_problems, token_problems

NOTHING = Ref("", "")
Status = Literal["hit", "miss", "pending", "unknown"]  # unknown: a library of the stage is not installed here


@dataclass(frozen=True)
class PlannedNode:
    """One node, evaluated. `key` is empty while a source's digest is pending, or a library's version not known."""

    name: str
    stage: Stage
    inputs: Mapping[str, Ref]
    input_keys: Mapping[str, str]  # upstream keys by port
    key: str
    types: Mapping[str, type[Artifact]]  # of its outputs, by port
    expected: Mapping[str, Spec]  # specs of its outputs, by port
    memory: Memory
    status: Status
    reason: str  # of a miss, down to the field
    notes: tuple[str, ...] = ()
    work: Work | None = None  # None: the stage does not say
    seconds: float | None = None  # on the recipe's machine; None: the machine states no peak, or the stage no work
    dollars: float | None = None  # None: neither time nor price may be missing
    shortage: Shortage | None = None  # why it cannot run on the recipe's machine
    bound: bool = False  # `expected` is the most that it can be, until something before it is measured (pipeline/bounds.py)
    derived: Mapping[str, Ref] = field(default_factory=dict)  # what spares it work, by port; no part of its key

    @property
    def is_derived(self) -> bool:
        """Whether it only spares others work: it is in a plan where one of them is to run."""
        return all(kind.derived for kind in self.types.values())


@dataclass(frozen=True)
class Plan:
    """Nodes in the order they run. `sources` are the artifacts that `model` and `data.<split>` stand for."""

    recipe: Recipe
    graph: Graph
    digest: str  # of the recipe; names the run's folder
    nodes: tuple[PlannedNode, ...]
    sources: Mapping[Ref, Artifact]
    served: Served | None = None  # the final model under the recipe's `serve` load
    environments: tuple[PlannedEnvironment, ...] = ()  # beside llmpress's own, of isolated backends

    @property
    def final(self) -> Ref:
        return self.graph.final

    @property
    def final_spec(self) -> ModelSpec:
        """Of the checkpoint that the pipeline is for."""
        if self.final == SOURCE_MODEL:
            return self.source.model_spec
        spec = next(node for node in self.nodes if node.name == self.final.node).expected[self.final.port]
        assert isinstance(spec, ModelSpec), "the final output is a checkpoint"
        return spec

    @property
    def to_run(self) -> tuple[PlannedNode, ...]:
        """What the store does not hold, or is not known to hold."""
        return tuple(node for node in self.nodes if node.status != "hit")

    @property
    def starting(self) -> float:
        """Seconds of imports before the first stage begins; 0 where nothing is to run, and on a machine whose cores nobody measured."""
        return seconds(Work(overhead=STARTING), self.recipe.machine) or 0.0 if self.to_run else 0.0

    @property
    def seconds(self) -> float | None:
        """Of all that is to run, one after the other, and of starting; None where that of one is not known."""
        return _sum([self.starting, *(node.seconds for node in self.to_run)])

    @property
    def dollars(self) -> float | None:
        return _sum(node.dollars for node in self.to_run)

    @property
    def disk(self) -> int:
        """Bytes that what is to run takes at its fullest: everything made so far stays, and a stage needs more while it runs."""
        made, most = 0, 0
        for node in self.to_run:
            needed = node.memory.totals["disk"]
            most = max(most, made + needed)
            made += min(needed, sum(getattr(spec, "nbytes", 0) for spec in node.expected.values()))
        return most

    @property
    def shortages(self) -> tuple[Shortage, ...]:
        """Why it cannot run on the recipe's machine."""
        return tuple(node.shortage for node in self.to_run if node.shortage)

    @property
    def problems(self) -> list[str]:
        """Why what is to run cannot, and why its result cannot be served, a sentence each with what would change that."""
        unserved = self.served.problem if self.served else ""
        return [*(lacking.sentence for lacking in self.shortages), *([unserved] if unserved else [])]

    @property
    def source(self) -> Checkpoint:
        model = self.sources[SOURCE_MODEL]
        assert isinstance(model, Checkpoint)
        return model


def make_plan(recipe: Recipe, store: Store, resources: Path, *, execute: bool) -> Plan:
    """Open the sources, wire the graph, evaluate every node. RecipeError with every problem found; reads headers only.

    With `execute`, digests left pending by a plan are computed and a hub model is downloaded; PlanError where a library is missing.
    """
    recipe = recipe.on_its_machine()
    machine = at_measured_rates(recipe.machine)
    recipe = recipe if machine == recipe.machine else replace(recipe, compute=machine)
    if execute:
        check_installed({name: recipe.stages[name].stage for name in recipe.order if name in recipe.stages})
    memo = DigestMemo(store.root / "digests.json")
    problems: list[str] = []
    models: dict[Ref, Checkpoint] = {}
    written = {SOURCE_MODEL: recipe.model} | {Ref("models", name): model for name, model in recipe.models.items()}
    for ref, model in written.items():
        try:
            models[ref] = open_model(model, resources, memo, execute=execute, where=str(ref))
        except RecipeError as error:
            problems += error.problems
    # an unreadable one is taken as dense, to find what else is wrong
    graph = build(recipe, {ref: type(models[ref]) if ref in models else DenseCheckpoint for ref in written}, problems)
    sources: dict[Ref, Artifact] = {ref: model for ref, model in models.items() if ref in graph.sources()}
    splits: dict[str, Dataset] = {}
    for ref in graph.sources():
        if ref.node == "data":
            try:
                splits[ref.port] = open_split(recipe.data, ref.port, resources, memo, execute=execute)
            except RecipeError as error:
                problems += error.problems
    try:
        check_disjoint(splits)
    except RecipeError as error:
        problems += error.problems
    sources |= {Ref("data", split): dataset for split, dataset in splits.items()}
    evaluation = _Evaluation(recipe, store, sources, problems, resources)
    nodes = [planned for node in graph.nodes if (planned := evaluation.node(node, graph))]
    if problems:
        source = models.get(SOURCE_MODEL)
        raise RecipeError(problems + (senseless(source.model_spec, recipe) if source else []))
    if execute:
        memo.save()
    graph, nodes = evaluation.without_repeated_passes(graph, nodes)
    plan = Plan(recipe, graph, recipe_digest(recipe, sources), tuple(nodes), sources)
    environments = Environments(store.root).planned((node.name, node.stage.env) for node in nodes)
    return replace(plan, served=served(plan.final_spec, recipe, resources), environments=environments)


class _Evaluation:
    """Walks the graph once, carrying specs and keys from outputs to inputs."""

    def __init__(self, recipe: Recipe, store: Store, sources: Mapping[Ref, Artifact], problems: list[str], resources: Path) -> None:
        self.recipe, self.store, self.problems, self.resources = recipe, store, problems, resources
        self.specs: dict[Ref, Spec] = {ref: artifact.spec for ref, artifact in sources.items()}
        self.tokenizers = {ref: read_tokenizer(artifact) for ref, artifact in sources.items()}  # None: not known, or not text
        self.folders = {ref: artifact.path for ref, artifact in sources.items() if isinstance(artifact, Checkpoint)}
        self.chats = {ref: reads_chats(artifact) for ref, artifact in sources.items()}  # None: not known, or no model
        self.keys = {ref: artifact.key for ref, artifact in sources.items()}
        self.calibrated_by = ""  # the node whose static cache is in force; the source model's where there is none
        self.missed: set[str] = set()
        self.unknown: set[str] = set()  # nodes without a key because of a library, and what follows them
        self.found: dict[str, Manifest] = {}  # of the nodes that are hits
        self.bounds: set[Ref] = set()  # outputs whose specs are bounds

    def node(self, node: Node, graph: Graph) -> PlannedNode | None:
        config = self.recipe.stages.get(node.name.partition("@")[0])
        wired = {name for name, port in node.stage.inputs().items() if not port.optional} | set(config.inputs if config else ())
        if wired - set(node.inputs) or any(ref not in self.specs for ref in node.inputs.values()):
            return None  # an input has a problem, which has been noted
        specs: dict[str, Any] = {port: self.specs[ref] for port, ref in node.inputs.items()}
        self.problems += token_problems(node, self.tokenizers)
        unreadable = conversation_problems(node, self.chats, self.specs) + task_problems(node, self.specs)
        unreadable += [located(configured(node, graph), problem) for problem in idle_dtype(node.stage)]
        folder = self.folders.get(worked_on(node.inputs) or NOTHING, Path())
        if folder != Path():  # else a hub model's, which is not here yet
            unreadable += [located(configured(node, graph), problem) for problem in node.stage.refusals(folder)]
        if unreadable:
            self.problems += unreadable
            return None
        try:
            inferred = node.stage.infer(**specs)
        except ValueError as error:
            for problem in error.problems if isinstance(error, InputProblems) else [str(error)]:
                self.problems.append(located(configured(node, graph), problem))
            return None
        ports = list(node.stage.outputs())
        expected = {ports[0]: inferred} if len(ports) == 1 else {port: getattr(inferred, port) for port in ports}
        self._check_scales(node, expected)
        input_keys = {port: self.keys[ref] for port, ref in node.inputs.items()}
        keyed = all(input_keys.values()) and not not_installed(node.stage.libraries)
        key = stage_key(node.stage, input_keys) if keyed else ""
        for port in ports:
            self.specs[Ref(node.name, port)] = expected[port]
            self.tokenizers[Ref(node.name, port)] = next(filter(None, map(self.tokenizers.get, node.inputs.values())), None)
            self.folders[Ref(node.name, port)] = folder
            self.chats[Ref(node.name, port)] = self.chats.get(worked_on(node.inputs) or NOTHING)
            self.keys[Ref(node.name, port)] = output_key(key, port, len(ports)) if key else ""
        status, reason = self._status(node, key, input_keys)
        if status == "miss":
            self.missed.add(node.name)
        bound = not self.bounds.isdisjoint(node.inputs.values()) or any(map(is_open, expected.values()))
        types = {port: graph.types[Ref(node.name, port)] for port in ports}
        if bound and status == "hit":  # what is there says more than a plan can infer
            place = self.store.path(node.stage.name, key)
            expected, bound = outputs_as_made(types, place, self.found[node.name], expected), False
            self.specs |= {Ref(node.name, port): spec for port, spec in expected.items()}
        self.bounds |= {Ref(node.name, port) for port in ports} if bound else set()
        inserted = (f"inserted: {node.why}",) if node.why else ()
        return PlannedNode(
            name=node.name,
            stage=node.stage,
            inputs=node.inputs,
            input_keys=input_keys,
            key=key,
            types=types,
            expected=expected,
            status=status,
            reason=reason,
            notes=(*inserted, *left_dense(node, graph), *node.stage.explain(**specs), *self._slow(node)),
            bound=bound,
            **self._costs(node),
        )

    def _costs(self, node: Node) -> dict[str, Any]:
        """What a node needs and takes, with what spares it work: fields of its PlannedNode."""
        specs: dict[str, Any] = {port: self.specs[ref] for port, ref in (*node.inputs.items(), *node.derived.items())}
        machine, work = self.recipe.machine, node.stage.work(**specs)
        memory, others = node.stage.memory(target=machine, **specs), partial(known_targets, self.resources)
        work = None if work is None else work + Work(overhead=STARTED)
        lasts = None if work is None else seconds(work, machine if node.stage.on_gpu(machine) else machine.without_gpus())
        return {
            "memory": memory,
            "work": work,
            "seconds": lasts,
            "dollars": dollars(lasts, machine),
            "shortage": shortage(node.name, node.stage, specs, machine, others) if lacking(memory, machine) else None,
        }

    def _slow(self, node: Node) -> list[str]:
        """What its dtype costs on the recipe's machine."""
        return slow_sentences(node.stage.compute_dtype, self.recipe.machine, node.stage.on_gpu(self.recipe.machine))

    def without_repeated_passes(self, graph: Graph, nodes: Sequence[PlannedNode]) -> tuple[Graph, list[PlannedNode]]:
        """The graph, and its nodes planned, in which what several nodes would compute of one text is a node of its own."""
        planned = {node.name: node for node in nodes}
        shared = share_passes(graph, self.specs, {node.name for node in nodes if node.status != "hit"})
        found: list[PlannedNode] = []
        for node in shared.nodes:
            if node.name not in planned:
                inserted = self.node(node, shared)
                assert inserted is not None, "what makes a pass can make it, so a stage can store it"
                found.append(inserted)
            elif node.derived:
                found.append(replace(planned[node.name], derived=node.derived, **self._costs(node)))
            else:
                found.append(planned[node.name])
        return shared, found

    def _check_scales(self, node: Node, expected: Mapping[str, Spec]) -> None:
        """Scales of a static cache are those of the weights they were calibrated with."""
        model = self.specs.get(worked_on(node.inputs) or NOTHING)
        made = [spec for spec in expected.values() if isinstance(spec, ModelSpec)]
        if not (isinstance(model, ModelSpec) and model.kv_cache.mode == "static"):
            self.calibrated_by = node.name if any(spec.kv_cache.mode == "static" for spec in made) else self.calibrated_by
        elif made and not node.stage.keeps_weights:
            by = self.calibrated_by
            instead = f"move {by} after {node.name}, or write" if by else f"put a kv_cache stage before {node.name}, with"
            self.problems.append(
                f"order: {node.name} changes the weights that the static KV cache of {by or 'the source model'} was calibrated with; "
                f"{instead} mode: per_token_head"
            )

    def _status(self, node: Node, key: str, input_keys: Mapping[str, str]) -> tuple[Status, str]:
        if absent := not_installed(node.stage.libraries):
            self.unknown.add(node.name)
            return "unknown", absent
        if not key:
            unknown = [ref.node for ref in node.inputs.values() if ref.node in self.unknown]
            if unknown:
                self.unknown.add(node.name)
                return "pending", f"follows {unknown[0]}, which has no key here"
            return "pending", "the digest of what it reads is computed when the recipe runs"
        rebuilt = [ref.node for ref in node.inputs.values() if ref.node in self.missed]
        found = self.store.find(node.stage.name, key)
        if found and not (found.read and rebuilt):
            read = digests_read(input_keys, {port: self.found.get(ref.node) for port, ref in node.inputs.items()})
            if not found.read or found.read == read:
                self.found[node.name] = found
                return "hit", ""
            return "miss", "what it measured was rebuilt and differs"
        return "miss", f"follows {rebuilt[0]}" if rebuilt else explain_miss(self.store, node.stage, input_keys)


def _sum(amounts: Iterable[float | None]) -> float | None:
    """None where one of them is."""
    known = list(amounts)
    return None if None in known else sum(amount for amount in known if amount is not None)
