"""A model larger than memory: resident it dies under a limit, layer by layer it finishes with the report it would have had.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python bench/larger_than_memory.py [--limit 1500MB] [--characters 4000]

A random Llama of 1 billion weights, in bf16 and packed to 4 bits (rtn), which transformers multiplies out to bf16 again; the packed one
also beside the dense one, for the divergence. Each is evaluated three times, by the worker that a run would start and one at a time:
resident, resident with `execution.memory_limit`, layer by layer with the same limit. The limit is on the worker's data segment,
libraries included; files mapped to be read count too, since safetensors maps them privately. Reports are compared byte by byte.

`peak` is the highest resident memory above what the worker had before its stage; the libraries that it then imports are in it, and in the
limit (0.44 GB). Needs 3 GB of disk and 6 GB of RAM. The model is random: this shows equality and memory, not quality.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.memory import ASSETS, ROOT, config, make_checkpoint
from pipeline.artifact import Checkpoint, Dataset
from pipeline.artifact_spec import DatasetSpec
from pipeline.stage import find_stage, input_ports, output_ports
from pipeline.target import format_size, parse_size
from pipeline.worker import RESPONSE, Failure, InputArtifact, Request, Success

WINDOW = 256  # tokens
ROW = "{:<27} {:<10} {:>8} {:>8} {:>6} {:<50}"


def artifact(path: Path) -> InputArtifact:
    if path.is_file():
        return InputArtifact(type="Dataset", path=path, key="", spec=DatasetSpec(split="eval", digest="", nbytes=path.stat().st_size))
    spec = Checkpoint(path).model_spec
    return InputArtifact(type="DenseCheckpoint" if spec.is_dense else "QuantizedCheckpoint", path=path, key="", spec=spec)


def in_worker(
    name: str, output: Path, inputs: Mapping[str, Path], params: Mapping[str, Any] | None = None, execution: Mapping[str, Any] | None = None
) -> tuple[Success | Failure, float]:
    """One stage in a process of its own, as a run starts it: what it answered, and its wall-clock seconds."""
    stage, job = find_stage(name).from_dict(params or {}, execution), output.with_suffix(".job")
    given = {port: artifact(inputs[port]) if port in inputs else None for port in input_ports(type(stage))}
    made = stage.infer(**{port: one.spec for port, one in given.items() if one is not None})
    request = Request(
        node=name, stage=name, params=dict(params or {}), execution=dict(execution or {}), key="", output=output, inputs=given,
        expected={port: made for port in output_ports(type(stage)) if made is not None},
        types={port: one.accepts[0].__name__ for port, one in output_ports(type(stage)).items()},
    )  # fmt: skip
    for folder in (output, job):
        folder.mkdir()
    (job / "request.json").write_text(request.model_dump_json())
    started = time.perf_counter()
    with open(job / "log.txt", "w") as log:
        subprocess.run([sys.executable, "-m", "pipeline.worker", str(job)], cwd=ROOT, stdout=log, stderr=log)
    if not (job / "response.json").exists():
        raise SystemExit((job / "log.txt").read_text()[-3000:])
    return RESPONSE.validate_json((job / "response.json").read_bytes()), time.perf_counter() - started


def told(response: Success | Failure, expected: bytes, output: Path) -> str:
    if isinstance(response, Failure):
        return f"{response.kind}: {response.message.partition(' from file')[0][:80]}"
    if not expected:
        return f"perplexity {json.loads((output / 'report.json').read_bytes())['metrics']['perplexity']:.4f}"
    return "the same report" if (output / "report.json").read_bytes() == expected else "ANOTHER REPORT"


def evaluate(what: str, scratch: Path, inputs: Mapping[str, Path], limit: int) -> bool:
    """Whether it was as promised: dead, and the same."""
    ends, expected = [], b""
    for mode, bound in (("resident", None), ("resident", limit), ("layerwise", limit)):
        output = scratch / f"{what}, {mode}, {bound}"
        execution = {"mode": mode, "batch_size": 4, "device": "cpu", "memory_limit": bound}
        response, seconds = in_worker("evaluate", output, inputs, {"max_length": WINDOW}, execution)
        peak = "" if isinstance(response, Failure) else format_size(response.peak_rss - (response.floor_rss or 0))
        said = told(response, expected, output)
        print(ROW.format(what, mode, format_size(bound) if bound else "", peak, f"{seconds:.0f} s", said), flush=True)
        ends.append(said.partition(":")[0])
        expected = expected or (output / "report.json").read_bytes()
    return ends[1:] == ["memory", "the same report"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=parse_size, default=1_500_000_000)
    parser.add_argument("--size", choices=["300M", "1B"], default="1B")
    parser.add_argument("--characters", type=int, default=4000, help="of held-out text, some 3.4 a token")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        dense, packed, text = scratch / "dense", scratch / "packed", scratch / "eval.txt"
        make_checkpoint(dense, config(options.size, 4096))
        response, _ = in_worker("rtn", packed, {"model": dense})
        assert isinstance(response, Success), response.message
        sizes = {path.name: format_size(Checkpoint(path).model_spec.nbytes) for path in (dense, packed)}
        held_out = "".join(document for _, document in Dataset(ASSETS / "data/eval.jsonl").documents())
        text.write_text(held_out[: options.characters])
        print(f"dense {sizes['dense']}, packed {sizes['packed']}")
        print(ROW.format("model", "mode", "limit", "peak", "", "").rstrip())
        ways = {"dense": {"model": dense}, "packed": {"model": packed}, "packed, beside the dense": {"model": packed, "reference": dense}}
        kept = [evaluate(what, scratch, inputs | {"eval": text}, options.limit) for what, inputs in ways.items()]
    if not all(kept):
        raise SystemExit("not as promised: the resident model must end of memory, and layer by layer make the same report")


if __name__ == "__main__":
    main()
