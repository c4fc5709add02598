"""The abstract evaluation of a recipe: every node's key, spec, memory and whether it is already done, from shapes alone.

A plan needs no weights, no torch and well under a second. The executor takes only a `Plan`, so the plan and the run cannot disagree:
`expected` is what the guard holds each finished artifact to.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from pipeline.artifact import (
    Artifact,
    Checkpoint,
    Dataset,
    DatasetSpec,
    DenseCheckpoint,
    Manifest,
    Spec,
    has_chat_template,
    tokenizer_digest,
)
from pipeline.errors import InputProblems, RecipeError
from pipeline.fit import Fit, fit
from pipeline.graph import LATEST_PORTS, SOURCE_MODEL, Graph, Node, Ref, build
from pipeline.identity import DigestMemo, digest, non_default, output_key, stage_key
from pipeline.misses import explain_miss
from pipeline.recipe import Recipe
from pipeline.roofline import Work, dollars, seconds
from pipeline.source import check_disjoint, open_model, open_split
from pipeline.spec import ModelSpec
from pipeline.stage import Stage
from pipeline.store import Store, digests_read
from pipeline.target import Memory, Target

Status = Literal["hit", "miss", "pending"]


@dataclass(frozen=True)
class PlannedNode:
    """One node, evaluated. `key` is empty while a source's digest is pending."""

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


@dataclass(frozen=True)
class Plan:
    """Nodes in the order they run. `sources` are the artifacts that `model` and `data.<split>` stand for."""

    recipe: Recipe
    graph: Graph
    digest: str  # of the recipe; names the run's folder
    nodes: tuple[PlannedNode, ...]
    sources: Mapping[Ref, Artifact]
    fit: Fit | None = None  # of the final model under the recipe's `serve` load

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
    def source(self) -> Checkpoint:
        model = self.sources[SOURCE_MODEL]
        assert isinstance(model, Checkpoint)
        return model


def make_plan(recipe: Recipe, store: Store, resources: Path, *, execute: bool) -> Plan:
    """Open the sources, wire the graph, evaluate every node. RecipeError with every problem found; reads headers only.

    With `execute`, digests left pending by a plan are computed and a hub model is downloaded.
    """
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
    evaluation = _Evaluation(recipe, store, sources, problems)
    nodes = tuple(planned for node in graph.nodes if (planned := evaluation.node(node, graph)))
    if problems:
        raise RecipeError(problems)
    if execute:
        memo.save()
    plan = Plan(recipe, graph, recipe_digest(recipe, sources), nodes, sources)
    return replace(plan, fit=_fit(plan, resources)) if recipe.serve else plan


def _fit(plan: Plan, resources: Path) -> Fit:
    """RecipeError where the load or the target makes no sense."""
    serve = plan.recipe.serve
    assert serve is not None
    others = {file.stem: Target.model_validate(OmegaConf.to_container(OmegaConf.load(file))) for file in target_files(resources)}
    try:
        return fit(plan.final_spec, plan.recipe.target, serve.context, serve.batch, others)
    except InputProblems as error:
        raise RecipeError(error.problems) from None


def target_files(resources: Path) -> list[Path]:
    """Of the machines that come with llmpress, this one aside."""
    return [file for file in sorted((resources / "conf" / "target").glob("*.yaml")) if file.stem != "host"]


def recipe_digest(recipe: Recipe, sources: Mapping[Ref, Artifact]) -> str:
    """Identity of the recipe and of what it reads: equal ones share a run folder, wherever their files lie and whatever runs them."""
    stages = {
        name: {"stage": config.stage.name, "params": non_default(config.stage.params), "inputs": dict(config.inputs)}
        for name, config in recipe.stages.items()
        if name in recipe.order
    }
    read = {str(ref): artifact.key for ref, artifact in sources.items()}
    return digest("recipe", {"order": recipe.order, "stages": stages, "convert": recipe.convert, "sources": read})


class _Evaluation:
    """Walks the graph once, carrying specs and keys from outputs to inputs."""

    def __init__(self, recipe: Recipe, store: Store, sources: Mapping[Ref, Artifact], problems: list[str]) -> None:
        self.recipe, self.store, self.problems = recipe, store, problems
        self.specs: dict[Ref, Spec] = {ref: artifact.spec for ref, artifact in sources.items()}
        self.tokenizers = {ref: _tokenizer(artifact) for ref, artifact in sources.items()}  # None: not known, or not text
        self.chats = {ref: _reads_chats(artifact) for ref, artifact in sources.items()}  # None: not known, or no model
        self.keys = {ref: artifact.key for ref, artifact in sources.items()}
        self.calibrated_by = ""  # the node whose static cache is in force; the source model's where there is none
        self.missed: set[str] = set()
        self.found: dict[str, Manifest] = {}  # of the nodes that are hits

    def node(self, node: Node, graph: Graph) -> PlannedNode | None:
        config = self.recipe.stages.get(node.name.partition("@")[0])
        wired = {name for name, port in node.stage.inputs().items() if not port.optional} | set(config.inputs if config else ())
        if wired - set(node.inputs) or any(ref not in self.specs for ref in node.inputs.values()):
            return None  # an input has a problem, which has been noted
        specs: dict[str, Any] = {port: self.specs[ref] for port, ref in node.inputs.items()}
        self._check_tokenizers(node)
        chats = self._conversations(node)
        if chats:
            self.problems += chats
            return None
        try:
            inferred = node.stage.infer(**specs)
        except ValueError as error:
            for problem in error.problems if isinstance(error, InputProblems) else [str(error)]:
                self.problems.append(located(node, problem))
            return None
        ports = list(node.stage.outputs())
        expected = {ports[0]: inferred} if len(ports) == 1 else {port: getattr(inferred, port) for port in ports}
        self._check_scales(node, expected)
        input_keys = {port: self.keys[ref] for port, ref in node.inputs.items()}
        key = stage_key(node.stage, input_keys) if all(input_keys.values()) else ""
        for port in ports:
            self.specs[Ref(node.name, port)] = expected[port]
            self.tokenizers[Ref(node.name, port)] = next(filter(None, map(self.tokenizers.get, node.inputs.values())), None)
            self.chats[Ref(node.name, port)] = self.chats.get(self._model(node))
            self.keys[Ref(node.name, port)] = output_key(key, port, len(ports)) if key else ""
        status, reason = self._status(node, key, input_keys)
        if status == "miss":
            self.missed.add(node.name)
        inserted = (f"inserted: {node.why}",) if node.why else ()
        machine, work = self.recipe.machine, node.stage.work(**specs)
        lasts = None if work is None else seconds(work, machine if node.stage.on_gpu(machine) else machine.without_gpus())
        return PlannedNode(
            name=node.name,
            stage=node.stage,
            inputs=node.inputs,
            input_keys=input_keys,
            key=key,
            types={port: graph.types[Ref(node.name, port)] for port in ports},
            expected=expected,
            memory=node.stage.memory(target=machine, **specs),
            status=status,
            reason=reason,
            notes=(*inserted, *node.stage.explain(**specs)),
            work=work,
            seconds=lasts,
            dollars=dollars(lasts, machine),
        )

    @staticmethod
    def _model(node: Node) -> Ref:
        """What the node works on; of a stage that works on no model, a reference to nothing."""
        return next((node.inputs[port] for port in LATEST_PORTS if port in node.inputs), Ref("", ""))

    def _conversations(self, node: Node) -> list[str]:
        """Why the stage, or its model, cannot read the conversations that it is given."""
        told = f"{node.stage.name} reads plain text; name a split of format text"
        if node.stage.reads_conversations:
            if all(self.chats.get(ref) is not False for ref in node.inputs.values()):
                return []
            told = "the model has no chat template; put its chat_template.jinja beside its tokenizer, or name a split of format text"
        specs = {port: self.specs[ref] for port, ref in node.inputs.items()}
        given = [port for port, spec in specs.items() if isinstance(spec, DatasetSpec) and spec.format == "messages"]
        return [f"stages.{node.name}.inputs.{port}: {node.inputs[port]} holds conversations and {told}" for port in given]

    def _check_tokenizers(self, node: Node) -> None:
        """Models that one stage reads together must read the same tokens."""
        known = {port: found for port, ref in node.inputs.items() if (found := self.tokenizers.get(ref))}
        for port, other in list(known.items())[1:]:
            first = next(iter(known))
            if other != known[first]:
                self.problems.append(
                    f"stages.{node.name}.inputs.{port}: {node.inputs[port]} and {node.inputs[first]} ({first}) have different tokenizers; "
                    "only models that read the same tokens can be compared, token by token"
                )

    def _check_scales(self, node: Node, expected: Mapping[str, Spec]) -> None:
        """Scales of a static cache are those of the weights they were calibrated with."""
        model = self.specs.get(self._model(node))
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
        if not key:
            return "pending", "the digest of the source model is computed when the recipe runs"
        rebuilt = [ref.node for ref in node.inputs.values() if ref.node in self.missed]
        found = self.store.find(node.stage.name, key)
        if found and not (found.read and rebuilt):
            read = digests_read(input_keys, {port: self.found.get(ref.node) for port, ref in node.inputs.items()})
            if not found.read or found.read == read:
                self.found[node.name] = found
                return "hit", ""
            return "miss", "what it measured was rebuilt and differs"
        return "miss", f"follows {rebuilt[0]}" if rebuilt else explain_miss(self.store, node.stage, input_keys)


def located(node: Node, problem: str) -> str:
    """A stage's own sentence, `rank: too large`, with the place in the recipe before it."""
    field = problem.partition(":")[0].partition(".")[0]
    if field in type(node.stage.params).model_fields or field == "inputs":
        return f"stages.{node.name}.{problem}"
    return f"stages.{node.name}.inputs.{problem}" if field in node.stage.inputs() else f"stages.{node.name}: {problem}"


def _tokenizer(artifact: Artifact) -> str | None:
    """Of a checkpoint whose files are here."""
    return tokenizer_digest(artifact.path) if isinstance(artifact, Checkpoint) and artifact.path != Path() else None


def _reads_chats(artifact: Artifact) -> bool | None:
    """Of a checkpoint whose files are here."""
    return has_chat_template(artifact.path) if isinstance(artifact, Checkpoint) and artifact.path != Path() else None
