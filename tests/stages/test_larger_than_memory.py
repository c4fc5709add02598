"""A model that is larger than the memory it is given, evaluated layer by layer; and that an evaluation can be had again."""

import ctypes
import gc
import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.artifact import Dataset, DenseCheckpoint
from pipeline.stage import Context
from pipeline.worker import explain
from stages.evaluate import Evaluate
from stages.rtn import RTN
from tests.stages.models import make_checkpoint, write_documents


@contextmanager
def memory_limit(nbytes: int) -> Iterator[None]:
    """That many more bytes of private memory than there are now; a worker limits itself alike (`execution.memory_limit`)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # a heap that earlier tests left would be room
    used = next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private maps on Linux only")
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_under_a_limit_that_the_resident_model_dies_of_layerwise_writes_its_report(tmp_path: Path, packed: bool) -> None:
    source = DenseCheckpoint(make_checkpoint(tmp_path / "source", num_hidden_layers=8, hidden_size=256, intermediate_size=4096))
    model = RTN.from_dict({"group_size": 64}).run(Context(tmp_path / "packed", lambda event: None), source) if packed else source
    text = Dataset(write_documents(tmp_path / "eval.jsonl", count=1))

    def evaluate(name: str, mode: str) -> bytes:
        stage = Evaluate.from_dict({"max_length": 20}, {"mode": mode, "batch_size": 2, "device": "cpu"})
        return (stage.run(Context(tmp_path / name, lambda event: None), model, text, source).path / "report.json").read_bytes()

    expected = evaluate("unlimited", "resident")
    with memory_limit(source.model_spec.nbytes // 2):
        assert evaluate("layerwise", "layerwise") == expected
        with pytest.raises((RuntimeError, OSError, MemoryError)) as died:
            evaluate("resident", "resident")
    assert explain(died.value)[0] == "memory"
    assert json.loads(expected)["metrics"]["kl_divergence"] > 0 or not packed
