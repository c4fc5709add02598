"""Speed of a checkpoint on this machine: what is timed and counted, what it is held against, and whose speed a hit may serve."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline import identity
from pipeline.artifact import Benchmark, Checkpoint, DenseCheckpoint, Manifest
from pipeline.errors import InputProblems, PlanError
from pipeline.identity import backend, stage_key
from pipeline.installed import check_installed
from pipeline.machine import fingerprint
from pipeline.misses import explain_miss
from pipeline.spec import ModelSpec
from pipeline.stage import Context, find_stage
from pipeline.store import Store
from pipeline.target import Target
from stages.benchmark import BenchmarkStage
from stages.runtime import benchmarking
from stages.runtime.benchmark_report import Timing
from stages.runtime.benchmarking import TransformersEngine, measure
from stages.runtime.loading import load_model
from stages.runtime.speed_bounds import Load, Peaks, bounds
from stages.runtime.vllm_engine import engine_arguments
from tests.stages.models import make_checkpoint

pytestmark = pytest.mark.usefixtures("bf16_units")  # what is planned is planned for a processor that has them

SMALL = {"batch_sizes": [1, 3], "prompt_tokens": 20, "new_tokens": 5, "repeats": 2, "device": "cpu"}
LONGEST = 20 + 5 - 1  # tokens that the cache holds: the last new one is never read
TOKEN_VALUES = 2 * 2 * 2 * 16  # keys and values, layers, KV heads, head_dim


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DenseCheckpoint:
    return DenseCheckpoint(make_checkpoint(tmp_path_factory.mktemp("source"), num_hidden_layers=2))


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller buffers: what they measure is real, and no test's matter."""
    monkeypatch.setattr(benchmarking, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(benchmarking, "CPU_SIDE", 64)


def made(stage: str, source: Checkpoint, folder: Path, **params: Any) -> Checkpoint:
    checkpoint: Checkpoint = find_stage(stage).from_dict(params).run(Context(folder, lambda event: None), source)
    return checkpoint


def benchmark(model: Checkpoint, folder: Path, **params: Any) -> tuple[Benchmark, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    result = BenchmarkStage.from_dict(SMALL | params).run(Context(folder, events.append), model)
    return result, events


def test_every_figure_is_there_and_follows_from_the_repeats(source: DenseCheckpoint, tmp_path: Path) -> None:
    result, events = benchmark(source, tmp_path / "out")
    saved = json.loads((result.path / "benchmark.json").read_text())
    assert saved["metrics"] == result.metrics and saved["machine"] == fingerprint()
    assert (saved["engine"], saved["device"], saved["dtype"], saved["kv_cache"]) == ("transformers", "cpu", "BF16", None)
    of_batch = ("prefill_tokens_per_second", "prefill_spread", "decode_tokens_per_second", "decode_spread", "cache_bytes")
    of_batch += ("prefill_bound_tokens_per_second", "decode_bound_tokens_per_second")
    names = {f"{name}_b{batch}" for name in of_batch for batch in (1, 3)}
    assert set(result.metrics) == names | {"load_seconds", "threads", "bandwidth", "flops", "weights_bytes", "peak_ram"}
    assert all(value > 0 for value in result.metrics.values())
    assert result.metrics["threads"] == torch.get_num_threads()
    for part in saved["batches"]:
        batch, (prefill, decode) = part["load"]["batch"], (part["prefill_seconds"], part["decode_seconds"])
        assert len(prefill) == len(decode) == 2
        assert result.metrics[f"prefill_tokens_per_second_b{batch}"] == pytest.approx(batch * 20 / (sum(prefill) / 2))
        assert result.metrics[f"decode_tokens_per_second_b{batch}"] == pytest.approx(batch * 4 / (sum(decode) / 2))
        assert result.metrics[f"decode_spread_b{batch}"] == pytest.approx(abs(decode[0] - decode[1]) / (sum(decode) / 2))
    (note,) = (event["text"] for event in events if event["event"] == "note")
    assert note.startswith("transformers, on cpu (") and "batch 3 reads" in note


def test_weights_and_cache_are_counted_in_memory(source: DenseCheckpoint, tmp_path: Path) -> None:
    metrics = benchmark(source, tmp_path / "out")[0].metrics
    assert metrics["weights_bytes"] == source.model_spec.nbytes
    assert metrics["cache_bytes_b1"] == LONGEST * TOKEN_VALUES * 2
    assert metrics["cache_bytes_b3"] == 3 * metrics["cache_bytes_b1"]


def test_packed_weights_are_said_to_be_decompressed_and_held_against_dense_ones(source: DenseCheckpoint, tmp_path: Path) -> None:
    packed = made("rtn", source, tmp_path / "packed", group_size=32)
    result, _ = benchmark(packed, tmp_path / "out")
    assert json.loads((result.path / "benchmark.json").read_text())["engine"] == "transformers, decompressed to dense"
    assert packed.model_spec.nbytes < source.model_spec.nbytes < result.metrics["weights_bytes"]  # scales stay attached
    peaks = Peaks(result.metrics["bandwidth"], result.metrics["flops"])
    dense = bounds(source.model_spec, peaks, Load(1, 20, 5))
    assert result.metrics["decode_bound_tokens_per_second_b1"] == dense.decode
    assert BenchmarkStage().explain(packed.model_spec) and not BenchmarkStage().explain(source.model_spec)


def test_a_checkpoint_that_asks_for_an_int8_cache_is_timed_with_it(source: DenseCheckpoint, tmp_path: Path) -> None:
    cached = made("kv_cache", source, tmp_path / "cached", mode="per_token_head")
    result, _ = benchmark(cached, tmp_path / "out")
    assert json.loads((result.path / "benchmark.json").read_text())["kv_cache"] == "per_token_head"
    plain = benchmark(source, tmp_path / "plain")[0].metrics
    room = 64 - 4  # of the INT8 cache: made for 64 tokens at the first one decoded, of which 4 are
    held = (LONGEST + room) * (TOKEN_VALUES + 2 * 2 * 2 * 4)
    assert result.metrics["cache_bytes_b1"] == held != plain["cache_bytes_b1"]


def test_what_is_timed_is_greedy_decoding(source: DenseCheckpoint, tmp_path: Path) -> None:
    """The engine's cache ends as that of `generate` on the same prompt, whose first 24 tokens it has read."""
    engine = TransformersEngine(source.path, "cpu", torch.bfloat16)
    prompt = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(1))
    assert all(seconds > 0 for seconds in engine.run(prompt, 5))
    model = load_model(source.path)
    text = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    expected = model(text[:, :LONGEST], use_cache=True).past_key_values
    for ours, theirs in zip(engine.cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0.02, atol=0.02)


def test_the_first_run_warms_up_and_every_run_reads_the_same_prompt() -> None:
    prompts: list[torch.Tensor] = []

    class Counting:
        def run(self, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
            prompts.append(prompt)
            return 100.0 / len(prompts), 1.0

        def cache_bytes(self) -> None:
            return None

    timing = measure(Counting(), 50, Load(2, 7, 3), 4, lambda done, total: None)  # type: ignore[arg-type]  # all that is used of it
    assert timing.prefill_seconds == (50.0, 100 / 3, 25.0, 20.0)
    assert len(prompts) == 5 and all(torch.equal(prompt, prompts[0]) for prompt in prompts)
    assert prompts[0].shape == (2, 7) and int(prompts[0].max()) < 50
    assert "cache_bytes" not in timing.metrics()


def test_decoding_that_is_lost_in_noise_is_no_speed() -> None:
    with pytest.raises(ValueError, match="new_tokens: decoding 2 tokens takes less time than"):
        Timing(Load(1, 8, 2), (1.0, 1.0, 1.0), (0.1, -0.2, -0.1), None).metrics()


def test_bounds_are_those_of_the_slower_of_reading_and_computing(source: DenseCheckpoint) -> None:
    spec, load = source.model_spec, Load(batch=4, prompt_tokens=20, new_tokens=6)
    table = 307 * 64
    read = spec.nbytes - 2 * table + 4 * 23 * TOKEN_VALUES * 2  # all but the embedding, which is not the head's; the cache at its middle
    assert bounds(spec, Peaks(bandwidth=1e6, flops=1e30), load).decode == pytest.approx(4 * 1e6 / read)
    assert bounds(spec, Peaks(bandwidth=1e6, flops=1e30), load, devices=2).decode == pytest.approx(8 * 1e6 / read)
    body = spec.num_parameters - 2 * table
    attention = 4 * 2 * 4 * 16  # layers, heads, head_dim: of a token and one before it
    flops = 80 * (2 * body + attention * 20 / 2) + 4 * 2 * table
    assert bounds(spec, Peaks(bandwidth=1e30, flops=1e6), load).prefill == pytest.approx(80 * 1e6 / flops)


def test_another_machine_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, other = BenchmarkStage(), find_stage("evaluate")()
    keys = [stage_key(stage, {"model": "11"}), stage_key(stage, {"model": "11"})]
    unmoved = stage_key(other, {"model": "11"})
    monkeypatch.setattr(identity.machine, "fingerprint", lambda: "another machine")
    assert keys[0] == keys[1] != stage_key(stage, {"model": "11"})
    assert stage_key(other, {"model": "11"}) == unmoved


def test_a_hit_on_another_machine_is_a_miss_that_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, store, there = BenchmarkStage(), Store(tmp_path), "AMD EPYC, 64 cores, 252 GiB RAM, NVIDIA H200"
    here = fingerprint()
    with monkeypatch.context() as patched:
        patched.setattr(identity.machine, "fingerprint", lambda: there)
        key, computed_by = stage_key(stage, {"model": "11"}), backend(stage)
    manifest = Manifest(
        type="Benchmark", key=key, stage=stage.name, version=stage.version, params=stage.params.model_dump(mode="json"),
        inputs={"model": "11"}, backend=computed_by, files={}, environment={}, execution={}, fingerprint="", seconds=1, peak_rss=1,
        created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    store.publish(store.scratch(key), manifest)
    assert store.find(stage.name, key) is not None and store.find(stage.name, stage_key(stage, {"model": "11"})) is None
    assert explain_miss(store, stage, {"model": "11"}) == f"machine: {there} -> {here}"


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_vllm_is_refused_in_a_sentence_where_it_is_not_installed() -> None:
    with pytest.raises(PlanError, match=r"stages\.speed: vllm is not installed here, so that it can be planned but not run"):
        check_installed({"speed": BenchmarkStage.from_dict({"engine": "vllm"})})


def test_what_cannot_be_measured_is_refused_all_at_once(source: DenseCheckpoint) -> None:
    spec = source.model_spec
    stage = BenchmarkStage.from_dict({"engine": "vllm", "prompt_tokens": 250, "new_tokens": 7, "tensor_parallel_size": 3})
    with pytest.raises(InputProblems) as refused:
        stage.infer(spec.with_cache("static"))
    assert [problem.partition(":")[0] for problem in refused.value.problems] == ["prompt_tokens", "tensor_parallel_size", "engine"]
    assert BenchmarkStage.from_dict({"prompt_tokens": 249, "new_tokens": 7}).infer(spec) is None


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"batch_sizes": []}, "at least 1 item"),
        ({"batch_sizes": [0, 1]}, "different numbers from 1 on"),
        ({"batch_sizes": [8, 8]}, "different numbers from 1 on"),
        ({"new_tokens": 1}, "greater than or equal to 2"),
        ({"tensor_parallel_size": 2}, "transformers computes on one device"),
        ({"engine": "vllm", "device": "cpu"}, "vllm is measured on GPUs"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(params: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        BenchmarkStage.from_dict(params)


def test_the_order_of_batch_sizes_says_nothing() -> None:
    one, other = (BenchmarkStage.from_dict({"batch_sizes": sizes}) for sizes in ([8, 1], [1, 8]))
    assert stage_key(one, {"model": "11"}) == stage_key(other, {"model": "11"}) == stage_key(BenchmarkStage(), {"model": "11"})


def test_the_plan_counts_weights_cache_and_what_measuring_takes(source: DenseCheckpoint) -> None:
    host, card = Target(name="pc", ram="8GiB"), Target(name="card", gpus=1, memory="8GiB")
    assert sum(BenchmarkStage().memory(source.model_spec, host).ram.values()) == 512 << 20  # of so small a model
    large = ModelSpec.of(source.model_spec.architecture.model_copy(update={"vocab_size": 10_000_000, "max_position": 4096}))
    stage = BenchmarkStage.from_dict({"batch_sizes": [16], "prompt_tokens": 1000, "new_tokens": 24})
    items = stage.memory(large, host).ram
    assert items["KV cache"] == 16 * 1024 * TOKEN_VALUES * 2
    assert large.nbytes in items.values()
    on_card = stage.memory(large, card)
    assert large.nbytes in on_card.vram.values() and not stage.from_dict({"device": "cpu"}).memory(large, card).vram
    work = stage.work(large)
    assert work.nbytes > 6 * 23 * (large.nbytes - 2 * 10_000_000 * 64) and work.flops > 0


def test_vllm_is_given_the_checkpoint_s_dtype_and_cache(source: DenseCheckpoint, tmp_path: Path) -> None:
    arguments = engine_arguments(source, "bf16", max_tokens=288, batch_size=8, tensor_parallel_size=2)
    assert arguments["model"] == str(source.path) and "kv_cache_dtype" not in arguments
    assert (arguments["dtype"], arguments["max_model_len"], arguments["max_num_seqs"]) == ("bfloat16", 288, 8)
    assert arguments["tensor_parallel_size"] == 2 and arguments["enable_prefix_caching"] is arguments["trust_remote_code"] is False
    cached = made("kv_cache", source, tmp_path / "cached", mode="per_token_head")
    assert engine_arguments(cached, "bf16", 288, 8, 1) == arguments | {
        "model": str(cached.path), "tensor_parallel_size": 1, "kv_cache_dtype": "int8_per_token_head",
    }  # fmt: skip


def test_vllm_is_part_of_the_key_only_where_it_computes() -> None:
    assert "vllm" in BenchmarkStage.from_dict({"engine": "vllm"}).libraries
    assert "vllm" not in BenchmarkStage().libraries and "vllm" not in BenchmarkStage.libraries
