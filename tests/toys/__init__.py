"""Real plans over toy stages: what the tests of execution run, in real processes, on a real (random, tiny) checkpoint."""

import json
import math
import os
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.headers import ITEM_BYTES
from pipeline.plan import Plan, make_plan
from pipeline.process import ForkServer
from pipeline.recipe import DataSource, ModelSource, Recipe, StageConfig
from pipeline.spec import ModelSpec
from pipeline.stage import find_stage, plugin_paths
from pipeline.store import Store
from pipeline.target import Target

ROOT = Path(__file__).parent.parent.parent
STAGES = {"toy": "Toy", "toy_copy": "ToyCopy", "toy_pair": "ToyPair", "toy_resume": "ToyResume"}
CONFIG = {
    "model_type": "llama",
    "dtype": "float32",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def install(site: Path) -> str:
    """Lay out `site` as pip would for a package with an entry point. Returns the PYTHONPATH on which the toys are installed."""
    info = site / "llmpress_toys-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llmpress-toys\nVersion: 1.0\n")
    points = [f"{name} = llmpress_toys:{attribute}" for name, attribute in STAGES.items()]
    (info / "entry_points.txt").write_text("\n".join(["[llmpress.stages]", *points]) + "\n")
    return os.pathsep.join((str(site), str(Path(__file__).parent / "plugin"), str(ROOT)))


def use(python_path: str) -> None:
    """Find the toys in this process too."""
    sys.path[:0] = python_path.split(os.pathsep)
    plugin_paths.cache_clear()


def write_model(folder: Path) -> Path:
    """A dense checkpoint of 1 layer, every weight 0."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    table, end = {}, 0
    for name, (dtype, shape) in ModelSpec.from_config(CONFIG).tensors().items():
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(table).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(end))
    return folder


def plan_of(store: Store, model: Path, stages: Mapping[str, Mapping[str, Any]]) -> Plan:
    """The plan that runs `stages` in order. Each is the name of a toy (`toy`, `toy.second` ...) with its params and execution."""
    configs = {}
    for name, content in stages.items():
        params = {key: value for key, value in content.items() if key != "execution"}
        stage = find_stage(name.partition(".")[0]).from_dict(params, content.get("execution"))
        configs[name.replace(".", "_")] = StageConfig(stage, {})
    recipe = Recipe(
        name="toys",
        order=tuple(configs),
        stages=configs,
        model=ModelSource(path=str(model)),
        data=DataSource(),
        target=Target.host(),
        serve=None,
        convert="auto",
    )
    return make_plan(recipe, store, ROOT, execute=True)


def spawning(log: Path) -> ForkServer:
    """Starts each job in a fresh interpreter, as where forking is not safe: quicker for a single job that needs no torch."""
    server = ForkServer(log)
    server.reason = "the test says so"
    return server


def is_alive(pid: int) -> bool:
    """Whether the process runs. In a container whose first process does not reap, the dead may stay as zombies."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(condition: Any, seconds: float = 300.0) -> None:
    """Returns as soon as it happens: the limit only ends a test that would wait for ever, on the slowest machine."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
