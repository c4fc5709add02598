"""What the pipeline costs on top of an isolated backend: a stage through the executor, against a plain script that calls the library.

    python bench/backends.py [--repeats 2] [--outputs outputs] [auto_gptq gptqmodel autoawq]

Both quantize the small model on the same 32 windows of 128 tokens with the same settings, in the same environment, built before the clock
starts; they alternate in one run. The script is what one writes by hand for that library: imports, load, quantize, save. It is given token
ids and a config.json that it can read. The stage is timed from its start to its artifact: it also tokenizes, repacks what was saved, loads
that and compares it, and hashes and publishes it. The first round of each warms up the fork server and the caches, and is not counted.
Limit: 5 % or 2 s more than the script, whichever is more.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from pipeline import compose
from pipeline.artifact import Dataset, DenseCheckpoint
from pipeline.envs import Environments
from pipeline.executor import execute
from pipeline.library_defaults import set_library_defaults
from pipeline.plan import make_plan
from pipeline.process import ForkServer
from pipeline.recipe import read_config
from pipeline.stage import find_stage
from pipeline.store import Store
from stages.runtime.isolated_quantization import link_source
from stages.runtime.text import calibration_windows, load_tokenizer

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SETTINGS = {"num_bits": 4, "group_size": 64, "num_samples": 32, "max_length": 128}
LIMIT_SHARE, LIMIT_SECONDS = 0.05, 2.0
SCRIPTS = {
    "auto_gptq": """
import json, sys
import torch
import auto_gptq.modeling._base as base
from auto_gptq import BaseQuantizeConfig
from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP
from transformers import AutoModelForCausalLM
source, windows, output = sys.argv[1:]
if not torch.cuda.is_available():
    base.CUDA_0, torch.cuda.synchronize = torch.device("cpu"), lambda *_: None
config = BaseQuantizeConfig(bits=4, group_size=64, damp_percent=0.01, desc_act=True, static_groups=True, sym=True)
model = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.float32)
quantizer = GPTQ_CAUSAL_LM_MODEL_MAP[model.config.model_type](model, False, config)
ids = [torch.tensor([window]) for window in json.load(open(windows))]
quantizer.quantize([{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids], batch_size=8, cache_examples_on_gpu=False)
quantizer.save_quantized(output, use_safetensors=True)
""",
    "gptqmodel": """
import json, os, sys
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization import FORMAT
from gptqmodel.quantization.config import GPTQConfig
source, windows, output = sys.argv[1:]
config = GPTQConfig(bits=4, group_size=64, sym=True, desc_act=True, static_groups=True, act_group_aware=False, damp_percent=0.01,
                    format=FORMAT.GPTQ_V2, fallback=None, offload_to_disk=False, pack_impl="original")
model = GPTQModel.load(source, config)
data = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in json.load(open(windows))]
model.quantize(data, batch_size=8, backend=BACKEND.GPTQ_TORCH, calibration_sort=None, calibration_data_min_length=0)
model.save(output)
""",
    "autoawq": """
import json, sys
import torch
from awq import AutoAWQForCausalLM
source, windows, output = sys.argv[1:]
ids = json.load(open(windows))
model = AutoAWQForCausalLM.from_pretrained(source, torch_dtype=torch.float32, device_map="cpu", use_cache=False)
config = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
model.quantize(None, quant_config=config, calib_data=ids, n_parallel_calib_samples=8, max_calib_samples=len(ids), max_calib_seq_len=128)
model.save_quantized(output)
""",
}


def script_seconds(python: Path, backend: str, folder: Path) -> float:
    """Wall time of the plain script. What it is given is made before."""
    folder.mkdir()
    model = DenseCheckpoint(ASSETS / "small-llama")
    link_source(model, folder / "source")
    text = Dataset(ASSETS / "data" / "calibration.jsonl")
    windows = calibration_windows(text, load_tokenizer(model.path), SETTINGS["num_samples"], SETTINGS["max_length"])
    (folder / "windows.json").write_text(json.dumps(windows.tolist()))
    command = [str(python), "-c", SCRIPTS[backend], "source", "windows.json", "saved"]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - started


def stage_seconds(backend: str, outputs: Path, environments: Path, server: ForkServer) -> float:
    """From the node's start to its published artifact, in a store that holds nothing."""
    stage = "awq" if backend == "autoawq" else "gptq"
    outputs.mkdir()
    (outputs / "envs").symlink_to(environments)
    config = {
        "order": ["quantize"],
        "stages": {"quantize": {"stage": stage, "backend": backend, **SETTINGS}},
        "model": {"path": str(ASSETS / "small-llama")},
        "data": {"format": "text", "splits": {"calibration": str(ASSETS / "data" / "calibration.jsonl")}},
        "target": {"name": "host"},
        "data_check": None,
    }
    recipe, _ = read_config(config, "bench")
    store, times = Store(outputs), {}
    plan = make_plan(recipe, store, compose.resources(), execute=True)
    execute(plan, store, outputs / "run", [lambda event: times.update({event["event"]: event["time"]})], server)
    return float(times["node_finished"] - times["node_started"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backends", nargs="*", default=["auto_gptq", "gptqmodel"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where the environments are, or will be")
    args = parser.parse_args()
    set_library_defaults()  # for the script too: without HF_HUB_OFFLINE it would wait for a hub that may not be there
    environments = Environments(args.outputs.resolve())
    with tempfile.TemporaryDirectory() as folder, ForkServer(Path(folder) / "server.log") as server:
        for backend in args.backends:
            name = find_stage("awq" if backend == "autoawq" else "gptq").from_dict({"backend": backend}).env
            python, plain, piped = environments.python(name, print), list[float](), list[float]()
            for repeat in range(args.repeats + 1):
                plain.append(script_seconds(python, backend, Path(folder) / f"{backend}-{repeat}"))
                piped.append(stage_seconds(backend, Path(folder) / f"{backend}-{repeat}-outputs", environments.root / "envs", server))
                counted = "" if repeat else "   (not counted)"
                print(f"{backend} {repeat}: script {plain[-1]:.1f} s, stage {piped[-1]:.1f} s{counted}", flush=True)
            base, full = statistics.median(plain[1:]), statistics.median(piped[1:])
            allowed = max(LIMIT_SECONDS, LIMIT_SHARE * base)
            verdict = "within" if full - base <= allowed else "over"
            print(
                f"{backend}: median {base:.1f} s and {full:.1f} s, {full - base:+.1f} s ({full / base - 1:+.1%}), {verdict} {allowed:.1f} s"
            )


if __name__ == "__main__":
    main()
