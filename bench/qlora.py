"""What QLoRA recovers of a pruned model, by learning rate and rank, at equal tokens; and how fast NF4 trains here.

    python bench/qlora.py [--mlp-ratio 0.333] [--tokens 131072] [--learning-rates 1e-3 3e-3] [--ranks 16] [--seeds 0]

Prunes the small model, trains on assets/data/train.jsonl, evaluates on assets/data/eval.jsonl beside the source. Runs the stages
themselves, without store or workers, in a temporary folder.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact, Checkpoint, Dataset, DenseCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.compute_dtype import processor_dtype
from pipeline.spec import ModelSpec
from pipeline.stage import Context, find_stage

ASSETS = Path(__file__).parent.parent / "assets"
ROW = "{:<10} {:>5} {:>8} {:>5} {:>11} {:>9} {:>8} {:>9}"


def run_stage(name: str, output: Path, params: dict[str, Any], **inputs: Artifact) -> Any:
    output.mkdir(parents=True, exist_ok=True)
    return find_stage(name).from_dict(params).run(Context(output, lambda event: None), **inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "small-llama")
    parser.add_argument("--mlp-ratio", type=float, default=0.333)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument("--alphas", type=float, nargs="+", default=[2.0], help="lora_alpha as a multiple of the rank")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--dtype", default=processor_dtype())
    options = parser.parse_args()
    spec = ModelSpec.from_config(json.loads((options.model / "config.json").read_text()))
    source, text, train = DenseCheckpoint(options.model, spec), Dataset(ASSETS / "data/eval.jsonl"), ASSETS / "data/train.jsonl"
    data = Dataset(train, DatasetSpec(split="train", file_format="jsonl", digest="0", nbytes=train.stat().st_size))
    print(ROW.format("model", "rank", "lr", "seed", "perplexity", "KL", "loss", "tokens/s"), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def score(label: str, model: Checkpoint, *settings: Any, loss: float = 0.0, speed: float = 0.0) -> None:
            metrics = run_stage("evaluate", folder / "report", {}, model=model, eval=text, reference=source).metrics
            quality = f"{metrics['perplexity']:.3f}", f"{metrics['kl_divergence']:.4f}"
            print(ROW.format(label, *settings, *quality, f"{loss:.3f}", f"{speed:.0f}"), flush=True)

        pruned = run_stage("structured_prune", folder / "pruned", {"mlp_ratio": options.mlp_ratio}, model=source)
        score("source", source, "", "", "")
        score("pruned", pruned, "", "", "")
        for rank, alpha, rate, seed in itertools.product(options.ranks, options.alphas, options.learning_rates, options.seeds):
            params = {"num_samples": options.tokens // options.max_length, "max_length": options.max_length, "compute_dtype": options.dtype}
            params |= {"rank": rank, "lora_alpha": alpha * rank, "learning_rate": rate, "seed": seed, "global_batch_size": options.batch}
            made = run_stage("qlora", folder / f"{rank}-{alpha}-{rate}-{seed}", params, model=pruned, train=data)
            found = made.adapter.metrics
            settings = rank, f"{rate:g}", seed
            score(f"alpha {alpha:g}r", made.model, *settings, loss=found["train_loss"], speed=found["tokens_per_second"])


if __name__ == "__main__":
    main()
