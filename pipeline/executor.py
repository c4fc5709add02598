"""Walks a plan: what the store holds is taken, what it lacks runs in a worker and is published, node after node.

    find_hit -> lock the key -> find_hit again -> scratch -> worker -> manifest -> publish

What only spares others work (`Artifact.derived`) is read byte by byte before it is taken, and made again where it is damaged: that costs
little beside what it spares.

Everything that happens is told to `listeners` as plain dicts with "event", "time" and, where one is concerned, "node":
    run_started    run_dir, starting, nodes: [{node, stage, status, planned}]    run_finished   status, seconds, hits, ran
                   (planned seconds of each, None: not known, and of starting before the first)
    node_started   key                                           waiting        key: another run is computing it
    progress       label, done, total                            curve          step, metrics
    note           text                                          warning        text
    resumed        text: from where
    node_hit, node_finished   seconds, key, path, nbytes, metrics, peak_rss, notes
    node_failed    reason, log
    environment    text: an isolated backend's is being installed, before the first stage
    gate           outcome, reaction (pass, warn or stop), sentence
Listeners run in this process, in order, and observe only: one that raises is reported once and the run goes on.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.artifact import Artifact, FileRecord, Manifest, Provenance, Verdict
from pipeline.attempt import Attempt
from pipeline.bounds import outputs_as_made
from pipeline.envs import Environments
from pipeline.errors import GateFailed, Interrupted, LlmpressError, PlanError, StoreError
from pipeline.graph import Ref, worked_on
from pipeline.installed import check_installed
from pipeline.job import run_job
from pipeline.plan import Plan, PlannedNode
from pipeline.process import ForkServer
from pipeline.provenance import build_manifest
from pipeline.settled import settled_node
from pipeline.signals import sigterm_interrupts
from pipeline.stage import MAIN, input_ports
from pipeline.stage_code import fingerprint
from pipeline.store import Store, check_writable, digests_read, explain_os_error
from pipeline.target import format_size, free_disk
from pipeline.verdict import VerdictFile
from pipeline.worker import InputArtifact, Request

Event = dict[str, Any]
Listener = Callable[[Event], None]


@dataclass(frozen=True)
class NodeResult:
    """A finished node: its artifact's folder and what is recorded of it."""

    node: PlannedNode
    status: Literal["hit", "ran"]
    path: Path
    manifest: Manifest


def execute(
    plan: Plan, store: Store, run_dir: Path, listeners: Sequence[Listener] = (), server: ForkServer | None = None
) -> list[NodeResult]:
    """Bring every node of `plan` into `store`; logs go below `run_dir`. Runs that pass the same `server` share its imports.

    Raises PlanError for a plan with pending or unknown keys, StageFailed, StoreError and Interrupted; what was published before stays.
    """
    check_installed({node.name: node.stage for node in plan.nodes})
    pending = [f"stages.{node.name}: the key is pending; plan again with `execute`" for node in plan.nodes if not node.key]
    if pending:
        raise PlanError(pending)
    check_writable(store.root)
    run = _Run(plan, store, run_dir.resolve(), _Announcer(listeners), server)
    with ExitStack() as cleanup:
        if server is None:
            run.server = cleanup.enter_context(ForkServer(run.run_dir / "logs" / "forkserver.log"))
        cleanup.enter_context(sigterm_interrupts())
        return run.execute()


class _Announcer:
    """Passes events on to the listeners."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self.listeners = listeners
        self._reported: set[int] = set()

    def __call__(self, event: str, node: str = "", **content: Any) -> None:
        self.send({"event": event, "time": time.time(), **({"node": node} if node else {}), **content})

    def send(self, event: Event) -> None:
        for number, listener in enumerate(self.listeners):
            try:
                listener(event)
            except Exception as error:
                if number not in self._reported:
                    self._reported.add(number)
                    name = getattr(listener, "__qualname__", type(listener).__qualname__)
                    self("warning", text=f"{name} failed at {event['event']}: {type(error).__name__}: {error}; the run goes on")


@dataclass
class _Run:
    """The state of one walk: what is published so far, by output."""

    plan: Plan
    store: Store
    run_dir: Path
    announce: _Announcer
    server: ForkServer | None

    def __post_init__(self) -> None:
        self.artifacts: dict[Ref, Artifact] = dict(self.plan.sources)
        self.manifests: dict[str, Manifest] = {}  # by node
        self.warned = False
        self.environments = Environments(self.store.root.resolve())

    def execute(self) -> list[NodeResult]:
        started = time.monotonic()
        nodes = [{"node": node.name, "stage": node.stage.name, "status": node.status, "planned": node.seconds} for node in self.plan.nodes]
        self.announce("run_started", run_dir=str(self.run_dir), starting=self.plan.starting, nodes=nodes)
        results: list[NodeResult] = []
        status, current = "failed", ""
        try:
            for node in self.plan.to_run:
                current = node.name
                self._interpreter(node)  # what cannot be installed is found before hours of other stages
            for node in self.plan.nodes:
                current = node.name
                results.append(self.node(node))
                self._obey_gate(results[-1])
            status = "finished"
        except GateFailed:
            raise  # the gate itself did its work
        except LlmpressError as error:
            reason = getattr(error, "reason", str(error).removeprefix(f"{current}: "))
            self.announce("node_failed", current, reason=reason, log=getattr(error, "log", ""), tail=getattr(error, "tail", ""))
            raise
        except KeyboardInterrupt:
            status = "interrupted"
            raise Interrupted(
                f"interrupted during {current}; what is finished is kept, and the same command continues from there"
            ) from None
        finally:
            ran = sum(result.status == "ran" for result in results)
            seconds = time.monotonic() - started
            self.announce("run_finished", status=status, seconds=seconds, hits=len(results) - ran, ran=ran)
        return results

    def node(self, node: PlannedNode) -> NodeResult:
        """One node, found or made. Its outputs are inputs of later ones."""
        node = settled_node(self.plan, node, self.artifacts)
        try:
            manifest = self._find(node)
            hit = manifest is not None
            if manifest is None:
                manifest, hit = self._make(node)
        except OSError as error:
            raise StoreError(f"{node.name}: {explain_os_error(error, self.store.root)}") from error
        path = self.store.path(node.stage.name, node.key)
        self.manifests[node.name] = manifest
        if node.bound:
            node = replace(node, expected=outputs_as_made(node.types, path, manifest, node.expected), bound=False)
        for port, kind in node.types.items():
            place = path if len(node.types) == 1 else path / port
            self.artifacts[Ref(node.name, port)] = kind(place, node.expected[port], node.key)
        self._tell(node, manifest, path, hit)
        return NodeResult(node, "hit" if hit else "ran", path, manifest)

    def _obey_gate(self, result: NodeResult) -> None:
        """GateFailed where the node is a gate whose verdict is to end the run."""
        node = result.node
        if Verdict not in node.types.values():
            return
        verdict, reactions = VerdictFile.load(result.path), node.stage.execution.model_dump()
        reaction = "pass" if verdict.outcome == "pass" else reactions[f"on_{verdict.outcome}"]
        self.announce("gate", node.name, outcome=verdict.outcome, reaction=reaction, sentence=verdict.sentence)
        if reaction == "stop":
            raise GateFailed(node.name, f"{verdict.sentence}; the model is kept, and gates[...].on_fail=warn would go on")

    def _find(self, node: PlannedNode) -> Manifest | None:
        found = self.store.find_hit(node.stage.name, node.key, self._digests(node))
        return None if found and node.is_derived and self.store.damage(node.stage.name, node.key) else found

    def _digests(self, node: PlannedNode) -> dict[str, str]:
        return digests_read(node.input_keys, {port: self.manifests.get(ref.node) for port, ref in node.inputs.items()})

    def _make(self, node: PlannedNode) -> tuple[Manifest, bool]:
        """Compute and publish a node; the flag says that another run has done so meanwhile."""
        with ExitStack() as held:
            try:
                held.enter_context(self.store.lock(node.key, timeout=0))
            except TimeoutError:
                self.announce("waiting", node.name, key=node.key)
                if self.server and len(self.plan.to_run) > 1:
                    self.server.start()  # what follows will need it: its imports take seconds
                held.enter_context(self.store.lock(node.key))
            manifest = self._find(node)
            if manifest is not None:
                return manifest, True
            damage = self.store.damage(node.stage.name, node.key) if node.is_derived else ""
            if damage:
                self.store.remove(node.stage.name, node.key)
            self._check_disk(node)
            self.announce("node_started", node.name, key=node.key)
            attempt = Attempt(self.store, node.stage, node.key)
            said = (f"computed again, because what the store held is damaged: {damage}",) if damage else ()
            try:
                manifest = self._compute(node, attempt, said)
                self.store.publish(attempt.folder, manifest)
            except BaseException:
                if not node.stage.resumes:
                    self.store.discard(node.key)
                raise
            self.store.discard(node.key)
        return manifest, False

    def _check_disk(self, node: PlannedNode) -> None:
        needed, free = node.memory.totals["disk"], free_disk(self.store.root)
        if needed > free:
            raise StoreError(
                f"{node.name}: needs {format_size(needed)} of disk and {format_size(free)} are free in {self.store.root}; free some space "
                "(`run mode=gc` removes what no run uses) or choose another folder with `outputs=...`"
            )

    def _compute(self, node: PlannedNode, attempt: Attempt, said: Sequence[str] = ()) -> Manifest:
        """Run the stage in a worker. Returns the manifest of what it left in the attempt's folder; `said` is noted in it."""
        assert self.server
        notes: list[str] = []

        def emit(event: Event) -> None:
            if event["event"] == "note":
                notes.append(event["text"])
            elif event["event"] == "resumed":
                attempt.resumed()
            self.announce.send({"node": node.name, **event})

        for sentence in filter(None, (attempt.note, *said)):
            emit({"event": "note", "time": time.time(), "text": sentence})

        folder = self.run_dir / "logs" / node.name
        made = run_job(
            self.server, self._request(node, attempt.folder), folder, node.memory.totals["ram"] + node.memory.totals["vram"], emit
        )
        if self.server.reason and not self.warned:
            self.warned = True
            self.announce("warning", text=f"stages start in fresh interpreters, which takes seconds each: {self.server.reason}")
        history, read = self._history(node), self._digests(node)
        return build_manifest(node, attempt.folder, made, notes=notes, history=history, read=read, resumes=attempt.resumes)

    def _request(self, node: PlannedNode, scratch: Path) -> Request:
        inputs: dict[str, InputArtifact | None] = dict.fromkeys(input_ports(type(node.stage)))
        for port, ref in (*node.inputs.items(), *node.derived.items()):
            given, key = self.artifacts[ref], node.input_keys.get(port, self.artifacts[ref].key)
            inputs[port] = InputArtifact(
                type=type(given).__name__,
                path=given.path.absolute(),
                key=key,
                spec=given.spec,
                files=self._records(ref),
            )
        return Request(
            node=node.name,
            stage=node.stage.name,
            params=node.stage.params.model_dump(mode="json"),
            execution=node.stage.execution.model_dump(mode="json"),
            key=node.key,
            output=scratch,
            inputs=inputs,
            expected=dict(node.expected),
            types={port: kind.__name__ for port, kind in node.types.items()},
            interpreter=self._interpreter(node),
        )

    def _records(self, ref: Ref) -> dict[str, FileRecord]:
        """Of an output's files, by name below its folder, which is the artifact's or one in it; a source has none."""
        manifest = self.manifests.get(ref.node)
        if manifest is None:
            return {}
        below = f"{ref.port}/" if manifest.outputs else ""
        return {name.removeprefix(below): record for name, record in manifest.files.items() if name.startswith(below)}

    def _history(self, node: PlannedNode) -> tuple[Provenance, ...]:
        """The stages applied to the model that this node is given."""
        model = worked_on(node.inputs)
        manifest = self.manifests.get(model.node) if model else None
        return manifest.history if manifest else ()

    def _interpreter(self, node: PlannedNode) -> Path | None:
        """Of the isolated backend that the stage calls, installed where it is not yet; None: it calls none."""
        if node.stage.env == MAIN:
            return None
        return self.environments.python(node.stage.env, lambda text: self.announce("environment", text=text))

    def _tell(self, node: PlannedNode, manifest: Manifest, path: Path, hit: bool) -> None:
        notes = list(manifest.notes)
        code = fingerprint(type(node.stage).__module__)
        if hit and manifest.fingerprint != code:
            notes.append(
                f"taken from the store, where other code of {node.stage.name} put it ({manifest.fingerprint}, now {code}); "
                f"if the change alters results, raise the stage's `version`"
            )
        self.announce(
            "node_hit" if hit else "node_finished",
            node.name,
            seconds=manifest.seconds,
            key=node.key,
            path=str(path),
            nbytes=sum(record.nbytes for record in manifest.files.values()),
            metrics=dict(manifest.metrics),
            peak_rss=manifest.peak_rss,
            notes=notes,
        )
