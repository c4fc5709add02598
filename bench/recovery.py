"""What each stage costs and what training wins back, on the small model: every figure with its interval.

    python bench/recovery.py [--outputs outputs] [--settings distill.num_samples=1024 ...]

Variants of one recipe are run through the store, so that what they share is computed once and an interrupted bench goes on. Each
final model is measured on the same documents; intervals are 95 % paired bootstrap over documents, and a difference whose interval
holds 0 is a tie. `recovered` is the share of what pruning cost, in nats per token, that a variant has won back.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from pipeline.executor import NodeResult, execute
from pipeline.plan import make_plan
from pipeline.process import ForkServer
from pipeline.progress import Display
from pipeline.recipe import read_config
from pipeline.store import Store
from stages.functional.bootstrap import Interval, paired_bootstrap

ROOT = Path(__file__).parent.parent
ROW = "{:<34} {:>9} {:>9} {:>28} {:>10} {:>8}"
TRAINED = ("prune", "distill", "recover")
QUANTIZERS = {"awq": {"symmetric": False}, "gptq": {}, "rtn": {}}


def variants() -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Name -> (order without the final evaluate, changes of stages)."""
    table: dict[str, tuple[list[str], dict[str, Any]]] = {
        "prune": (["prune"], {}),
        "prune, cross-entropy": (["prune", "text"], {}),
        "prune, distill": (["prune", "distill"], {}),
        "prune, qlora": (["prune", "recover"], {}),
        "prune, distill, qlora": (list(TRAINED), {}),
    }
    for bits in (4, 3):
        for name, own in QUANTIZERS.items():
            table[f"all, {name} {bits} bits"] = ([*TRAINED, "quantize"], {"quantize": {"stage": name, "num_bits": bits, **own}})
    awq = {"quantize": {"stage": "awq", "num_bits": 4}}
    table["all, awq 4 bits, kv_cache"] = ([*TRAINED, "quantize", "kv_cache"], awq)
    table["all, awq 4 bits, static kv_cache"] = (
        [*TRAINED, "quantize", "kv_cache"],
        {**awq, "kv_cache": {"stage": "kv_cache", "mode": "static"}},
    )
    return table


def stages_of(recipe: Path) -> dict[str, Any]:
    """The quickstart's stages, and `text`: its distill without a teacher, on the same tokens."""
    content = OmegaConf.to_container(OmegaConf.load(recipe), resolve=True)
    assert isinstance(content, dict)
    stages = {"evaluate": {"stage": "evaluate"}, "kv_cache": {"stage": "kv_cache"}}
    for row in content["defaults"]:
        for key, name in row.items() if isinstance(row, dict) else ():
            if key.startswith("/stage@stages."):
                node = key.rpartition(".")[2]
                stages[node] = {"stage": name, **content["stages"].get(node, {})}
    alone = {key: value for key, value in stages["distill"].items() if key not in ("inputs", "alpha", "temperature")}
    return stages | {"text": alone | {"alpha": 0.0}}


def losses_of(results: list[NodeResult]) -> dict[str, torch.Tensor]:
    """[documents] float64 by column of the final report."""
    rows = json.loads((results[-1].path / "report.json").read_text())["documents"]
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in ("nll", "reference_nll", "tokens")}


def percent(interval: Interval) -> str:
    found = interval.perplexity_change_pct
    return f"{found.estimate:+.2f} [{found.low:+.2f}, {found.high:+.2f}] %{' tie' if interval.is_tie else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "quickstart.yaml")
    parser.add_argument("--settings", nargs="*", default=[], help="changes of the recipe's stages, such as distill.num_samples=1024")
    options = parser.parse_args()
    base = stages_of(options.recipe)
    changed = OmegaConf.to_container(OmegaConf.merge(base, OmegaConf.from_dotlist(options.settings)))
    assert isinstance(changed, dict)
    changed["text"] |= {name: value for name, value in changed["distill"].items() if name in changed["text"] and name != "alpha"}
    data = {"splits": {split: f"assets:data/{split}.jsonl" for split in ("train", "calibration", "eval")}}
    shared = {"model": {"path": "assets:small-llama"}, "data": data, "target": {"name": "host"}}
    print(ROW.format("variant", "size", "ppl", "against the source", "KL", "recovered"))
    found: dict[str, Mapping[str, torch.Tensor]] = {}
    with ForkServer(options.outputs / "bench.log") as server:
        for name, (order, changes) in variants().items():
            stages = changed | {node: base[node] | change if "stage" not in change else change for node, change in changes.items()}
            if "quantize" in changes and changes["quantize"]["stage"] != "rtn":
                stages["quantize"] = {**changed["quantize"], **changes["quantize"]}
            config = {**shared, "order": [*order, "evaluate"], "stages": {n: stages[n] for n in {*order, "evaluate"}}}
            plan = make_plan(read_config(config, "recovery")[0], Store(options.outputs), ROOT, execute=True)
            results = execute(plan, Store(options.outputs), options.outputs / "runs" / "recovery" / plan.digest[:12], [Display()], server)
            losses, metrics = losses_of(results), results[-1].manifest.metrics
            found[name] = losses
            cost = losses["nll"].sum() - losses["reference_nll"].sum()
            pruned = found["prune"]["nll"].sum() - found["prune"]["reference_nll"].sum()
            change = paired_bootstrap(losses["nll"], losses["reference_nll"], losses["tokens"])
            recovered = f"{100 * (1 - cost / pruned):.0f} %" if len(order) > 1 and set(order) <= {*TRAINED, "text"} else ""
            size = f"{metrics['nbytes'] / 1e6:.2f} MB"
            print(
                ROW.format(name, size, f"{metrics['perplexity']:.3f}", percent(change), f"{metrics['kl_divergence']:.4f}", recovered),
                flush=True,
            )
    pairs = [("prune, distill", "prune"), ("prune, cross-entropy", "prune"), ("prune, distill", "prune, cross-entropy"), ("prune, qlora", "prune"),
             ("prune, distill, qlora", "prune, distill")]  # fmt: skip
    pairs += [
        (f"all, {a} {bits} bits", f"all, {b} {bits} bits") for bits in (4, 3) for a, b in (("gptq", "rtn"), ("awq", "rtn"), ("awq", "gptq"))
    ]
    pairs += [(f"all, awq 4 bits, {kind}kv_cache", "all, awq 4 bits") for kind in ("", "static ")]
    print("\nchange of perplexity, paired by document")
    for one, other in pairs:
        difference = paired_bootstrap(found[one]["nll"], found[other]["nll"], found[other]["tokens"])
        print(f"  {one:<34} against {other:<22} {percent(difference)}")


if __name__ == "__main__":
    main()
