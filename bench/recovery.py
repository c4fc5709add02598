"""What each stage costs and what training wins back, on the small model: every figure with its interval.

    python bench/recovery.py [--outputs outputs]

Variants of the recipe whole_pipeline are run through the store, so that what they share is computed once and an interrupted bench goes
on. Each final model is measured on the same documents; intervals are 95 % paired bootstrap over documents, and a difference whose
interval holds 0 is called a tie. `recovered` is the share of what pruning cost, in nats per token, that a variant has won back.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from pipeline.executor import execute
from pipeline.plan import make_plan
from pipeline.process import ForkServer
from pipeline.progress import Display
from pipeline.recipe import read_config
from pipeline.store import Store
from stages.functional.bootstrap import Interval, paired_bootstrap

ROOT = Path(__file__).parent.parent
ROW = "{:<32} {:>8} {:>7} {:>28} {:>7} {:>9}"
TEXT_RATE = 6e-4  # the best learning rate for cross-entropy of 3e-4, 6e-4 and 1e-3; distill's own is 1e-3
TRAINED = ["prune", "distill", "recover"]
Losses = dict[str, torch.Tensor]  # [documents] float64 by column of report.json


def variants(stages: dict[str, Any]) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Name -> (order without the final evaluate, stages that differ from the recipe's)."""
    table: dict[str, tuple[list[str], dict[str, Any]]] = {
        "prune": (["prune"], {}),
        "prune, cross-entropy": (["prune", "text"], {}),
        "prune, distill": (["prune", "distill"], {}),
        "prune, qlora": (["prune", "tune"], {}),
        "prune, distill, qlora": (TRAINED, {}),
    }
    samples = {name: stages["quantize"][name] for name in ("num_samples", "max_length")}
    for bits in (4, 3):
        for name in ("awq", "gptq", "rtn"):
            quantize = {"stage": name, "num_bits": bits, "group_size": 128, **(samples if name != "rtn" else {})}
            table[f"all, {name} {bits} bits"] = ([*TRAINED, "quantize"], {"quantize": quantize})
    for name in ("per_token_head", "static"):
        cache = {"kv_cache": {"stage": "kv_cache", "mode": name}}
        table[f"all, awq 4 bits, {name}"] = ([*TRAINED, "quantize", "kv_cache"], cache)
    return table


def pairs() -> list[tuple[str, str]]:
    """Which differences are tested."""
    chosen = [("prune, distill", "prune"), ("prune, cross-entropy", "prune"), ("prune, distill", "prune, cross-entropy")]
    chosen += [("prune, qlora", "prune"), ("prune, distill, qlora", "prune, distill")]
    for bits in (4, 3):
        chosen += [(f"all, {a} {bits} bits", f"all, {b} {bits} bits") for a, b in (("gptq", "rtn"), ("awq", "rtn"), ("awq", "gptq"))]
    return chosen + [(f"all, awq 4 bits, {mode}", "all, awq 4 bits") for mode in ("per_token_head", "static")]


def whole_pipeline() -> dict[str, Any]:
    """Its stages; `text`, its distill without a teacher, on the same tokens; `tune`, its qlora on that text and as many tokens."""
    content = OmegaConf.to_container(OmegaConf.load(ROOT / "recipes" / "whole_pipeline.yaml"))
    assert isinstance(content, dict)
    rows = [row for row in content["defaults"] if isinstance(row, dict)]
    chosen = {key.rpartition(".")[2]: stage for row in rows for key, stage in row.items()}
    stages = {node: {"stage": stage, **content["stages"].get(node, {})} for node, stage in chosen.items()}
    shared = {name: stages["distill"][name] for name in ("num_samples", "global_batch_size")}
    stages["text"] = {"stage": "distill", "alpha": 0.0, "learning_rate": TEXT_RATE, **shared}
    stages["tune"] = {"stage": "qlora", "learning_rate": 2e-3, **shared}
    return stages


def percent(interval: Interval) -> str:
    found = interval.perplexity_change_pct
    return f"{found.estimate:+.2f} [{found.low:+.2f}, {found.high:+.2f}] %{' tie' if interval.is_tie else ''}"


def measure(order: list[str], stages: dict[str, Any], outputs: Path, server: ForkServer) -> tuple[Losses, dict[str, float]]:
    """Run one variant and read its final report: losses by document, and the metrics."""
    data = {"splits": {split: f"assets:data/{split}.jsonl" for split in ("train", "calibration", "eval")}}
    config = {"model": {"path": "assets:small-llama"}, "data": data, "target": {"name": "host"}, "order": [*order, "evaluate"]}
    recipe, _ = read_config({**config, "stages": {node: stages[node] for node in (*order, "evaluate")}}, "recovery")
    plan = make_plan(recipe, Store(outputs), ROOT, execute=True)
    result = execute(plan, Store(outputs), outputs / "runs" / "recovery" / plan.digest[:12], [Display()], server)[-1]
    rows = json.loads((result.path / "report.json").read_text())["documents"]
    losses = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in ("nll", "reference_nll", "tokens")}
    return losses, result.manifest.metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs")
    outputs, base = parser.parse_args().outputs.absolute(), whole_pipeline()
    table, found = [ROW.format("variant", "size", "ppl", "against the source", "KL", "recovered")], {}
    with ForkServer(outputs / "bench.log") as server:
        for name, (order, changes) in variants(base).items():
            losses, metrics = measure(order, base | changes, outputs, server)
            found[name], cost = losses, (losses["nll"] - losses["reference_nll"]).sum()
            pruned = (found["prune"]["nll"] - found["prune"]["reference_nll"]).sum()
            change = percent(paired_bootstrap(losses["nll"], losses["reference_nll"], losses["tokens"]))
            share = f"{100 * (1 - cost / pruned):.0f} %" if len(order) > 1 and not name.startswith("all") else ""
            size, quality = f"{metrics['nbytes'] / 1e6:.2f} MB", (f"{metrics['perplexity']:.3f}", change, f"{metrics['kl_divergence']:.4f}")
            table.append(ROW.format(name, size, *quality, share))
    print("\n".join(table), "\n\nchange of perplexity, paired by document")
    for one, other in pairs():
        difference = paired_bootstrap(found[one]["nll"], found[other]["nll"], found[other]["tokens"])
        print(f"  {one:<32} against {other:<24} {percent(difference)}")


if __name__ == "__main__":
    main()
