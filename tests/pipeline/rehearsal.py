"""A run rehearsed: real plans, real manifests in a real store and the executor's events, without computing anything."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifact import EvalReport, FileRecord, Manifest
from pipeline.plan import Plan, PlannedNode, make_plan
from pipeline.recipe import read_config
from pipeline.spec import ModelSpec
from pipeline.store import Store
from tests.stages.models import make_checkpoint

Listener = Callable[[dict[str, Any]], None]


def small_model(folder: Path) -> Path:
    return make_checkpoint(
        folder, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        vocab_size=300,
    )  # fmt: skip


def plan_of(model: Path, outputs: Path, **changes: Any) -> Plan:
    """prune, rtn, evaluate by default; `changes` replace entries of the config, `num_bits` that of quantize."""
    outputs.mkdir(parents=True, exist_ok=True)
    text = outputs / "eval.txt"
    text.write_text("some text to evaluate on")
    config: dict[str, Any] = {
        "order": ["prune", "quantize", "evaluate"],
        "stages": {
            "prune": {"stage": "structured_prune", "mlp_ratio": 0.5},
            "quantize": {"stage": "rtn", "group_size": 64, "num_bits": changes.pop("num_bits", 4)},
            "evaluate": {"stage": "evaluate"},
        },
        "model": {"path": str(model)},
        "data": {"splits": {"eval": str(text)}},
        "target": {"name": "host"},
    }
    recipe, _ = read_config(config | changes, "rehearsed")
    return make_plan(recipe, Store(outputs), outputs, execute=True)


def rehearse(plan: Plan, outputs: Path, listeners: Sequence[Listener], *, fail: str = "", stop: str = "", perplexity: float = 8.0) -> None:
    """Send the events of a run that fails, or is interrupted, at that node. Events and manifests are as the executor's."""

    def send(event: str, **content: Any) -> None:
        for listener in listeners:
            listener({"event": event, "time": time.time(), **content})

    send("run_started", run_dir="", nodes=[])
    store = Store(outputs)
    for node in plan.nodes:
        found = store.find(node.stage.name, node.key)
        if found is None:
            send("node_started", node=node.name, key=node.key)
            send("progress", node=node.name, label="working", done=1, total=2)
            for step in (1, 2, 3):
                send("curve", node=node.name, step=step, metrics={"loss": 4.0 / step})
            if node.name == fail:
                send("node_failed", node=node.name, reason="out of memory: 9 GB needed, 8 GB there", log=f"/logs/{fail}/log.txt")
            if node.name in (fail, stop):
                break
            manifest = publish(store, node, perplexity)
        else:
            manifest = found
        path = str(store.path(node.stage.name, node.key))
        told = {"seconds": manifest.seconds, "key": node.key, "path": path, "metrics": manifest.metrics, "notes": list(manifest.notes)}
        send("node_hit" if found else "node_finished", node=node.name, **told)
    send("run_finished", status="finished", seconds=1.0)


def publish(store: Store, node: PlannedNode, perplexity: float = 8.0) -> Manifest:
    """An artifact with a true manifest and one small file."""
    scratch = store.scratch(node.key)
    (scratch / "content.bin").write_bytes(b"x" * 1000)
    spec = next((spec for spec in node.expected.values() if isinstance(spec, ModelSpec)), None)
    manifest = Manifest(
        type=next(iter(node.types.values())).__name__,
        key=node.key,
        stage=node.stage.name,
        version=node.stage.version,
        params=node.stage.params.model_dump(mode="json"),
        inputs=dict(node.input_keys),
        backend={},
        spec=spec,
        metrics=_metrics(node, perplexity),
        files={"content.bin": FileRecord(nbytes=1000, sha256="0" * 64)},
        environment={},
        execution={},
        fingerprint="f",
        seconds=12.5,
        peak_rss=600_000_000,
        floor_rss=350_000_000,
        tensor_bytes=spec.nbytes if spec else None,
        created="2026-01-01T00:00:00+00:00",
    )
    store.publish(scratch, manifest)
    return manifest


def _metrics(node: PlannedNode, perplexity: float) -> dict[str, float]:
    if EvalReport not in node.types.values() or node.stage.name == "lm_eval":
        return {}
    if "reference" not in node.inputs:
        return {"perplexity": 5.0, "bits_per_byte": 1.5}
    change = 100 * (perplexity / 5.0 - 1)
    against = {"reference_perplexity": 5.0, "perplexity_change_pct": change, "kl_divergence": change / 200, "top1_agreement": 0.85}
    return {"perplexity": perplexity, "bits_per_byte": 2.0, **against}
