"""What the executor's events said of a run while it went on: the measured half of a report."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.artifact import Manifest

StageStatus = Literal["hit", "ran", "failed", "interrupted", "not reached"]


@dataclass
class NodeRecord:
    """What the events said about one node."""

    status: StageStatus = "not reached"
    key: str = ""
    path: Path | None = None
    manifest: Manifest | None = None
    reason: str = ""
    log: str | None = None
    notes: list[str] = field(default_factory=list)


class RunRecord:
    """A listener: remembers what a report needs. `run_dir` is the run's folder, where `model` links to the final artifact."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.started = time.time()
        self.finished: float | None = None
        self.nodes: dict[str, NodeRecord] = {}
        self.warnings: list[str] = []

    def __call__(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "run_started":
            self.started = event["time"]
        elif kind == "run_finished":
            self.finished = event["time"]
        elif kind == "warning":
            self.warnings.append(event["text"])
        if event.get("node"):
            self._of_node(kind, self.nodes.setdefault(event["node"], NodeRecord()), event)

    def _of_node(self, kind: str, node: NodeRecord, event: Mapping[str, Any]) -> None:
        if kind == "node_started":
            node.status = "interrupted"  # until it is heard of again
        elif kind == "note":
            node.notes.append(event["text"])
        elif kind == "resumed":
            node.notes.append(f"continued an interrupted attempt from {event['text']}")
        elif kind in ("node_hit", "node_finished"):
            node.status = "hit" if kind == "node_hit" else "ran"
            node.key, node.path = event["key"], Path(event["path"])
            node.manifest = Manifest.load(node.path)
            node.notes += event.get("notes", [])
        elif kind == "node_failed":
            node.status, node.reason, node.log = "failed", event["reason"], event.get("log") or None

    @property
    def manifests(self) -> dict[str, Manifest]:
        """Of the nodes that ended well, by name."""
        return {name: node.manifest for name, node in self.nodes.items() if node.manifest is not None}

    @property
    def folders(self) -> dict[str, Path]:
        """Of the nodes that ended well, by name."""
        return {name: node.path for name, node in self.nodes.items() if node.path is not None}
