"""A plan for people (a table for the terminal) and for scripts (plan.json)."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from pipeline.artifact_spec import AdapterSpec, LogitsSpec, Spec, StatesSpec
from pipeline.plan import Plan, PlannedNode
from pipeline.roofline import usual_utilisation
from pipeline.spec import ModelSpec
from pipeline.target import Target, format_seconds, format_size

PLAN_SCHEMA = 1
HEADERS = {"bits": "bits/w", "cache": "KV/tok", "ram": "RAM", "vram": "VRAM", "cost": "$", "status": ""}
MOST_COLUMNS = 1000
STATUS = {"hit": "[green]hit[/green]", "miss": "to run", "pending": "pending", "unknown": "unknown"}


def plan_json(plan: Plan) -> dict[str, Any]:
    """`plan.json`: the recipe's digest, the source, and per node its key, types, expected bytes, memory and status."""
    return {
        "schema_version": PLAN_SCHEMA,
        "recipe": plan.recipe.name,
        "digest": plan.digest,
        "order": list(plan.recipe.order),
        "target": plan.recipe.target.model_dump(),
        "compute": plan.recipe.machine.model_dump(),
        "source": {"key": plan.source.key, **_model_facts(plan.source.model_spec)},
        "final": str(plan.final),
        "serving": plan.served.model_dump(mode="json") if plan.served else None,
        "to_run": {"starting": plan.starting, "seconds": plan.seconds, "dollars": plan.dollars, "disk": plan.disk},
        "environments": [{"name": e.name, "digest": e.digest, "nodes": list(e.nodes), "built": e.built} for e in plan.environments],
        "problems": [lacking.model_dump(mode="json") for lacking in plan.shortages],
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
        "derived": {port: str(ref) for port, ref in node.derived.items()},
        "bound": node.bound,
        "outputs": {port: {"type": kind.__name__, **_facts(node.expected[port])} for port, kind in node.types.items()},
        "memory": node.memory.model_dump(),
        "work": node.work.model_dump() if node.work else None,
        "seconds": node.seconds,
        "dollars": node.dollars,
    }


def _facts(spec: Spec) -> dict[str, Any]:
    """What is known of an output before it is made."""
    if isinstance(spec, ModelSpec):
        return _model_facts(spec)
    if isinstance(spec, AdapterSpec):
        return {"bytes": spec.nbytes, "parameters": spec.num_parameters, "rank": spec.rank}
    if isinstance(spec, LogitsSpec | StatesSpec):
        return {"bytes": spec.nbytes, **spec.model_dump(exclude={"nbytes", "data"})}
    return {}


def _model_facts(spec: ModelSpec) -> dict[str, Any]:
    return {
        "bytes": spec.nbytes,
        "parameters": spec.num_parameters,
        "bits_per_weight": round(spec.bits_per_weight, 4),
        "kv_bytes_per_token": spec.kv_cache.bytes_per_token,
    } | ({"sparsity": spec.sparsity.model_dump()} if spec.sparsity else {})


def print_plan(plan: Plan, console: Console) -> None:
    """One look: how large what each node makes is, what that needs and costs, and whether it is already done."""
    rows = [_Row("source", *_sizes(plan.source.model_spec)), *(_row(node, plan.recipe.machine) for node in plan.nodes), _totals(plan)]
    target, machine = plan.recipe.target.name, plan.recipe.machine.name
    where = f"on {machine}" if machine == target else f"on {machine}, for {target}"
    console.print(f"[bold]{plan.recipe.name}[/bold]: {' > '.join(plan.recipe.order)}   ({where})\n", soft_wrap=True)
    _print_table(rows, console)
    console.print("\n" + "\n".join(f"  {line}" for line in _lines(plan)), highlight=False, markup=False, soft_wrap=True)


def _print_table(rows: Sequence["_Row"], console: Console) -> None:
    """As wide as it is: narrower gaps where it is wider than the console, never a cell cut short."""
    columns = [name for name in _Row._fields if name == "stage" or any(getattr(row, name) for row in rows)]
    if len({row.status for row in rows if row.status}) == 1 and columns[-1] == "status":
        columns.pop()  # it says the same of every node
    for gap in (2, 1):
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, gap, 0, 0))
        for name in columns:
            table.add_column(HEADERS.get(name, name), justify="left" if name in ("stage", "status") else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(getattr(row, name) for name in columns))
        needed = console.measure(table, options=console.options.update(max_width=MOST_COLUMNS)).maximum
        if needed <= console.width:
            break
    width, console.width = console.width, max(console.width, needed)
    console.print(table)
    console.width = width


class _Row(NamedTuple):
    """Cells; a column that no row fills is left out."""

    stage: str
    size: str = ""
    bits: str = ""
    cache: str = ""
    ram: str = ""
    vram: str = ""
    disk: str = ""
    time: str = ""
    cost: str = ""
    status: str = ""


def _row(node: PlannedNode, machine: Target) -> _Row:
    spec = next((s for s in node.expected.values() if isinstance(s, ModelSpec)), None)
    sizes = _sizes(spec, "<=" if node.bound else "") if spec else (_size_of_other(node), "", "")
    peaks = [format_size(node.memory.totals[place]) if node.memory.totals[place] else "" for place in ("ram", "vram", "disk")]
    short = node.shortage.place if node.shortage else ""
    peaks = [f"[bold red]{peak}[/bold red]" if place == short else peak for place, peak in zip(("ram", "vram", "disk"), peaks, strict=True)]
    ram, vram, disk = peaks
    return _Row(node.name, *sizes, ram, vram, disk, estimate(node.seconds), _dollars(node.dollars), STATUS[node.status])


def _totals(plan: Plan) -> _Row:
    """Of what is to run; its disk is what is taken at the fullest."""
    disk = format_size(plan.disk) if plan.disk else ""
    return _Row("all to run" if plan.to_run else "", disk=disk, time=estimate(plan.seconds), cost=_dollars(plan.dollars))


def estimate(seconds: float | None) -> str:
    """A time in one or two figures: `40 s`, `12 min`, `3.2 h`."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{max(seconds, 1):.0f} s" if seconds else ""
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _dollars(amount: float | None) -> str:
    return f"${amount:.2f}" if amount else ""


def _lines(plan: Plan) -> Iterator[str]:
    """What stands below the table."""
    for node in plan.nodes:
        yield from (f"{node.name}: {note}" for note in node.notes)
    reasons: dict[str, list[str]] = {}
    for node in plan.nodes:
        if node.status == "miss":
            reasons.setdefault(f"to run ({node.reason})", []).append(node.name)
        elif node.status == "unknown":
            reasons.setdefault(f"unknown: {node.reason}", []).append(node.name)
    for reason, names in reasons.items():
        yield f"{reason}: {', '.join(names)}"
    computed = {dtype: None for node in plan.nodes if (dtype := node.stage.compute_dtype)}
    if computed:
        yield f"computed in {' and '.join(computed)}: stages.<name>.compute_dtype says otherwise"
    yield from (environment.sentence for environment in plan.environments)
    if not all(artifact.key for artifact in plan.sources.values()):
        yield "digest of a model or dataset pending: hit or miss is known once it has been computed (it is when the recipe runs)"
    if plan.seconds is not None and plan.seconds:
        machine = plan.recipe.machine
        share, disk = f"{usual_utilisation(machine):.0%}", f"{format_size(machine.disk_bandwidth)}/s of disk"
        if machine.core_speed:  # as measured
            whole = f"about {format_seconds(plan.seconds)} in all, {format_seconds(plan.starting)} of it to start"
            yield f"time: {whole}; at {share} of what {machine.name} was measured to compute and {disk}"
        else:
            yield f"time: at {share} of {machine.name}'s peak and {disk}"
    if plan.served is not None:
        yield from plan.served.sentences()


def _size_of_other(node: PlannedNode) -> str:
    """Of adapters and stored logits."""
    sizes = [spec.nbytes for spec in node.expected.values() if isinstance(spec, AdapterSpec | LogitsSpec)]
    return format_size(sum(sizes)) if sizes else ""


def _sizes(spec: ModelSpec, most: str = "") -> tuple[str, str, str]:
    """`most` stands before what is a bound."""
    return f"{most}{format_size(spec.nbytes)}", f"{most}{spec.bits_per_weight:.2f}", format_size(spec.kv_cache.bytes_per_token)
