"""A plan for people (a table for the terminal) and for scripts (plan.json)."""

from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.artifact import AdapterSpec, Artifact, Checkpoint, LogitsSpec, Spec
from pipeline.plan import Plan, PlannedNode
from pipeline.spec import ModelSpec
from pipeline.target import format_size

PLAN_SCHEMA = 1
STATUS = {"hit": "[green]hit[/green]", "miss": "to run", "pending": "pending"}


def plan_json(plan: Plan) -> dict[str, Any]:
    """`plan.json`: the recipe's digest, the source, and per node its key, types, expected bytes, memory and status."""
    return {
        "schema_version": PLAN_SCHEMA,
        "recipe": plan.recipe.name,
        "digest": plan.digest,
        "order": list(plan.recipe.order),
        "target": plan.recipe.target.model_dump(),
        "source": {"key": plan.source.key, **_model_facts(plan.source.model_spec)},
        "final": str(plan.final),
        "serving": plan.fit.model_dump(mode="json") if plan.fit else None,
        "nodes": [_node_json(node) for node in plan.nodes],
    }


def _node_json(node: PlannedNode) -> dict[str, Any]:
    return {
        "name": node.name,
        "stage": node.stage.name,
        "version": node.stage.version,
        "key": node.key,
        "status": node.status,
        "reason": node.reason,
        "notes": list(node.notes),
        "params": node.stage.params.model_dump(mode="json"),
        "inputs": {port: str(ref) for port, ref in node.inputs.items()},
        "outputs": {port: {"type": kind.__name__, **_facts(node.expected[port])} for port, kind in node.types.items()},
        "memory": node.memory.model_dump(),
    }


def _facts(spec: Spec) -> dict[str, Any]:
    """What is known of an output before it is made."""
    if isinstance(spec, ModelSpec):
        return _model_facts(spec)
    if isinstance(spec, AdapterSpec):
        return {"bytes": spec.nbytes, "parameters": spec.num_parameters, "rank": spec.rank}
    return {"bytes": spec.nbytes, **spec.model_dump(exclude={"nbytes", "data"})} if isinstance(spec, LogitsSpec) else {}


def _model_facts(spec: ModelSpec) -> dict[str, Any]:
    return {
        "bytes": spec.nbytes,
        "parameters": spec.num_parameters,
        "bits_per_weight": round(spec.bits_per_weight, 4),
        "kv_bytes_per_token": spec.kv_cache.bytes_per_token,
    }


def print_plan(plan: Plan, console: Console) -> None:
    """One look: what each node makes, how large, what it needs, and whether it is already done."""
    vram = plan.recipe.target.gpus > 0
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name, justify in (("stage", "left"), ("makes", "left"), ("size", "right"), ("bits/w", "right"), ("KV/token", "right"),
                          *[(place, "right") for place in (("RAM", "VRAM") if vram else ("peak RAM",))], ("", "left")):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=name in ("stage", ""), overflow="fold")  # type: ignore[arg-type]
    table.add_row("source model", _kind(type(plan.source)), *_sizes(plan.source.model_spec), *[""] * (2 + vram))
    for node in plan.nodes:
        spec = next((s for s in node.expected.values() if isinstance(s, ModelSpec)), None)
        made = ", ".join(_kind(kind) for kind in node.types.values())
        sizes = _sizes(spec) if spec else (_size_of_other(node), "", "")
        peaks = [format_size(node.memory.totals[place]) for place in ("ram", "vram")[: 2 if vram else 1]]
        table.add_row(node.name, made, *sizes, *peaks, STATUS[node.status])
    title = f"[bold]{plan.recipe.name}[/bold]: {' > '.join(plan.recipe.order)}   (on {plan.recipe.target.name})\n"
    console.print(title, soft_wrap=True)
    console.print(table)
    lines = [f"  {node.name}: {note}" for node in plan.nodes for note in node.notes]
    lines += [f"  {node.name}: to run ({node.reason})" for node in plan.nodes if node.status == "miss"]
    if any(node.status == "pending" for node in plan.nodes):
        lines.append("  digest of the source model pending: hit or miss is known once it has been computed (it is when the recipe runs)")
    if plan.fit is not None:
        lines += [f"  {sentence}" for sentence in plan.fit.sentences()]
    if lines:
        console.print("\n" + "\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _size_of_other(node: PlannedNode) -> str:
    """Of adapters and stored logits."""
    sizes = [spec.nbytes for spec in node.expected.values() if isinstance(spec, AdapterSpec | LogitsSpec)]
    return format_size(sum(sizes)) if sizes else ""


def _kind(kind: type[Artifact]) -> str:
    """`dense` or `quantized` of a checkpoint, else what its output is called."""
    return kind.__name__.removesuffix("Checkpoint").lower() if issubclass(kind, Checkpoint) else kind.port


def _sizes(spec: ModelSpec) -> tuple[str, str, str]:
    return format_size(spec.nbytes), f"{spec.bits_per_weight:.2f}", format_size(spec.kv_cache.bytes_per_token)
