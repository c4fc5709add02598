"""Evaluate against a plain loop over tokens, and what it refuses to give a number for."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.artifact import Checkpoint, Dataset, DenseCheckpoint, EvalReport
from pipeline.artifact_spec import DatasetSpec
from pipeline.kv_sidecar import CacheSettings, write_cache
from pipeline.stage import Context
from pipeline.target import Target
from stages.evaluate import Evaluate
from stages.functional.bootstrap import paired_bootstrap
from stages.kv_cache import KVCache
from stages.rtn import RTN
from stages.runtime import windows
from stages.runtime.evaluation import cache_bytes
from stages.runtime.int8_cache import Int8Cache, load_cache
from stages.runtime.loading import load_model, resolve_device
from stages.runtime.scoring import CacheBytes
from stages.runtime.windows import cut_windows
from tests.stages.models import make_checkpoint, save_tokenizer, write_documents

LENGTH = 20


def evaluate(
    folder: Path, model: Checkpoint, text: Dataset, reference: Checkpoint | None = None, batch_size: int = 8, **params: object
) -> EvalReport:
    stage = Evaluate.from_dict({"max_length": LENGTH, **params}, {"batch_size": batch_size, "device": "cpu"})
    return stage.run(Context(folder, lambda event: None), model, text, reference)


def quantized(source: DenseCheckpoint, folder: Path, **params: object) -> Checkpoint:
    return RTN.from_dict({"group_size": 32, **params}).run(Context(folder, lambda event: None), source)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DenseCheckpoint:
    return DenseCheckpoint(make_checkpoint(tmp_path_factory.mktemp("source"), num_hidden_layers=2, dtype=torch.float32))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset(write_documents(tmp_path_factory.mktemp("data") / "eval.jsonl", count=7))


def test_every_number_equals_a_plain_loop_over_windows(tmp_path: Path, source: DenseCheckpoint, text: Dataset) -> None:
    model = quantized(source, tmp_path / "q", num_bits=2)
    report = evaluate(tmp_path / "report", model, text, source)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(c.path, dtype="auto") for c in (model, source))
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    nll, reference_nll, kl, top1, sizes = [], [], [], [], []
    for _, document in text.documents():
        ids = tokenizer(document)["input_ids"]
        sizes.append(len(document.encode()))
        scored = 0
        while scored < len(ids) - 1:  # one window at a time; its last token opens the next
            window = torch.tensor([ids[scored : scored + LENGTH]])
            with torch.no_grad():
                p, q = (m(window).logits[0, :-1].double().log_softmax(-1) for m in (theirs, ours))
            target = window[0, 1:, None]
            nll += (-q.gather(1, target)).flatten().tolist()
            reference_nll += (-p.gather(1, target)).flatten().tolist()
            kl += (p.exp() * (p - q)).sum(1).tolist()
            top1 += (p.argmax(1) == q.argmax(1)).tolist()
            scored += len(target)
        assert scored == len(ids) - 1
    mean = sum(nll) / len(nll)
    expected = {
        "perplexity": math.exp(mean),
        "nll_per_token": mean,
        "bits_per_byte": sum(nll) / math.log(2) / sum(sizes),
        "tokens": len(nll),
        "documents": 7,
        "nbytes": sum(t.nbytes for t in load_file(model.path / "model.safetensors").values()),
        "bits_per_weight": model.model_spec.bits_per_weight,
        "kv_bytes_per_token": 2 * 2 * 2 * 16 * 2,  # key and value, layers, KV heads, head_dim, bytes
        "reference_perplexity": math.exp(sum(reference_nll) / len(nll)),
        "perplexity_change_pct": 100 * (math.exp(mean - sum(reference_nll) / len(nll)) - 1),
        "kl_divergence": sum(kl) / len(kl),
        "kl_divergence_p99": sorted(kl)[math.ceil(0.99 * len(kl)) - 1],
        "top1_agreement": sum(top1) / len(top1),
    }
    saved = json.loads((report.path / "report.json").read_text())
    columns = [torch.tensor([row[column] for row in saved["documents"]]) for column in ("nll", "reference_nll", "tokens")]
    interval = paired_bootstrap(*columns).perplexity_change_pct
    expected |= {"perplexity_change_pct_low": interval.low, "perplexity_change_pct_high": interval.high}
    assert interval.low < expected["perplexity_change_pct"] < interval.high
    assert report.metrics == pytest.approx(expected, rel=1e-4)
    assert all(type(value) is float for value in report.metrics.values())
    assert saved["metrics"] == report.metrics
    assert [row["id"] for row in saved["documents"]] == [name for name, _ in text.documents()]
    assert [row["bytes"] for row in saved["documents"]] == sizes
    for field, total in {
        "tokens": len(nll),
        "nll": sum(nll),
        "reference_nll": sum(reference_nll),
        "kl": sum(kl),
        "top1_matches": sum(top1),
    }.items():
        assert sum(row[field] for row in saved["documents"]) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("mode", ["per_token_head", "static"])
def test_an_int8_cache_is_scored_as_it_serves_and_its_own_cost_is_told(
    tmp_path: Path, source: DenseCheckpoint, text: Dataset, mode: str
) -> None:
    """Against the ordinary way to decode with a cache: token by token."""
    calibration = {"num_samples": 4, "max_length": 32} if mode == "static" else {}
    packed = quantized(source, tmp_path / "q", num_bits=8)
    cached = KVCache.from_dict({"mode": mode, **calibration}).run(Context(tmp_path / "c", lambda event: None), packed, text)
    report = evaluate(tmp_path / "report", cached, text, source, max_documents=2)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(c.path, dtype="auto").eval() for c in (packed, source))
    tokenizer, rows = AutoTokenizer.from_pretrained(source.path), []
    for _, document in list(text.documents())[:2]:
        ids, sums = tokenizer(document, return_tensors="pt")["input_ids"], torch.zeros(4, dtype=torch.float64)
        for start in range(0, ids.shape[1] - 1, LENGTH - 1):
            window, cache = ids[:, start : start + LENGTH], load_cache(cached.path, ours.config)
            with torch.no_grad():
                steps = [ours(token, past_key_values=cache, use_cache=True).logits[0] for token in window[:, :-1].split(1, 1)]
                views = torch.cat(steps), ours(window).logits[0, :-1], theirs(window).logits[0, :-1]
            q, plain, p = (logits.double().log_softmax(-1) for logits in views)
            nll = [-view.gather(1, window[0, 1:, None]).sum() for view in (q, plain)]
            sums += torch.stack([*nll, (p.exp() * (p - q)).sum(), (plain.exp() * (plain - q)).sum()])
        rows.append(sums.tolist())
    saved = json.loads((report.path / "report.json").read_text())["documents"]
    for number, (column, tolerance) in enumerate({"nll": 1e-5, "plain_cache_nll": 1e-5, "kl": 1e-2, "plain_cache_kl": 1e-2}.items()):
        assert [row[column] for row in saved] == pytest.approx([row[number] for row in rows], rel=tolerance)
    nll, plain_nll, _, plain_kl = torch.tensor(rows, dtype=torch.float64).sum(0).div(report.metrics["tokens"]).tolist()
    per_token = 2 * 2 * 2 * (16 + (4 if mode == "per_token_head" else 0))
    expected = {
        "perplexity": math.exp(nll),
        "kv_cache_kl_divergence": plain_kl,
        "kv_bytes_per_token": per_token,
        "kv_cache_nbytes": LENGTH * per_token,
    }
    single = evaluate(tmp_path / "single", cached, text, source, batch_size=1, max_documents=2)
    changes = [found.metrics.pop("kv_cache_perplexity_change_pct") for found in (report, single)]
    # A small difference of two large sums: their tolerance is its own, whatever its size.
    assert changes == pytest.approx([100 * math.expm1(nll - plain_nll)] * 2, abs=100 * 1e-5 * nll) and 0 not in changes
    assert {name: report.metrics[name] for name in expected} == pytest.approx(expected, rel=1e-2) and plain_kl > 0
    assert single.metrics == pytest.approx(report.metrics, rel=1e-2)


@pytest.mark.parametrize("mode", [None, "per_token_head", "static"])
def test_layer_by_layer_gives_the_same_report(tmp_path: Path, source: DenseCheckpoint, text: Dataset, mode: str | None) -> None:
    """Of a packed model, in groups so small that every batch is one."""
    model = quantized(source, tmp_path / "q", num_bits=4)
    if mode:
        calibration = {"num_samples": 4, "max_length": 32} if mode == "static" else {}
        model = KVCache.from_dict({"mode": mode, **calibration}).run(Context(tmp_path / "c", lambda event: None), model, text)
    resident = evaluate(tmp_path / "resident", model, text, source, batch_size=4)
    for hidden_states in (1, "1GiB"):
        events: list[dict[str, object]] = []
        stage = Evaluate.from_dict(
            {"max_length": LENGTH}, {"mode": "layerwise", "hidden_states": hidden_states, "batch_size": 4, "device": "cpu"}
        )
        layerwise = stage.run(Context(tmp_path / str(hidden_states), events.append), model, text, source)
        assert (layerwise.path / "report.json").read_bytes() == (resident.path / "report.json").read_bytes()
        last = [event for event in events if event["event"] == "progress"][-1]
        assert last["done"] == last["total"]


def test_hidden_states_are_bounded_only_where_there_are_any() -> None:
    with pytest.raises(ValueError, match="it has an effect only with mode: layerwise"):
        Evaluate.from_dict({}, {"hidden_states": "1GiB"})


def test_without_an_int8_cache_nothing_is_said_of_one(tmp_path: Path, source: DenseCheckpoint, text: Dataset) -> None:
    report = evaluate(tmp_path, source, text, source)
    rows = json.loads((tmp_path / "report.json").read_text())["documents"]
    assert not [name for name in (*report.metrics, *rows[0]) if "cache" in name]


def test_a_reference_too_is_scored_with_the_cache_it_serves_with(tmp_path: Path, source: DenseCheckpoint, text: Dataset) -> None:
    cached = KVCache().run(Context(tmp_path / "cached", lambda event: None), source)
    against_itself = evaluate(tmp_path / "a", cached, text, cached).metrics
    assert against_itself["kl_divergence"] == 0.0 < against_itself["kv_cache_kl_divergence"]
    against_plain = evaluate(tmp_path / "b", cached, text, source).metrics
    assert against_plain["kl_divergence"] == against_plain["kv_cache_kl_divergence"]
    assert against_plain["perplexity_change_pct"] == against_plain["kv_cache_perplexity_change_pct"] != 0.0


def test_a_cache_of_other_bytes_than_its_spec_is_refused(source: DenseCheckpoint) -> None:
    cache, states = Int8Cache(load_model(source.path).config, CacheSettings(mode="per_token_head")), torch.ones(3, 2, 7, 16)
    for layer in range(2):
        cache.update(states, states, layer)
    layout = source.model_spec.with_cache("per_token_head").kv_cache
    held = CacheBytes()
    held.see(cache.bytes_per_sequence, cache.bytes_per_token)
    assert cache_bytes(held, layout) == 7 * layout.bytes_per_token
    with pytest.raises(ValueError, match="takes 160 bytes per token, the spec says 128"):
        cache_bytes(held, source.model_spec.with_cache("static").kv_cache)


def test_a_damaged_cache_file_is_refused(tmp_path: Path, text: Dataset) -> None:
    model = DenseCheckpoint(make_checkpoint(tmp_path / "model"))
    write_cache(model.path, CacheSettings(mode="static"))
    with pytest.raises(ValueError, match=r"kv_cache\.safetensors is missing; write it with the stage kv_cache"):
        evaluate(tmp_path / "report", model, text)


def test_without_a_reference_there_is_nothing_to_compare(tmp_path: Path, source: DenseCheckpoint, text: Dataset) -> None:
    report = evaluate(tmp_path, source, text)
    assert not {"kl_divergence", "perplexity_change_pct_low"} & report.metrics.keys()
    rows = json.loads((tmp_path / "report.json").read_text())["documents"]
    assert {(row["reference_nll"], row["kl"], row["top1_matches"]) for row in rows} == {(None, None, None)}


def test_a_model_agrees_entirely_with_itself(tmp_path: Path, source: DenseCheckpoint, text: Dataset) -> None:
    metrics = evaluate(tmp_path, source, text, source).metrics
    assert metrics["kl_divergence"] == metrics["kl_divergence_p99"] == metrics["perplexity_change_pct"] == 0.0
    assert metrics["top1_agreement"] == 1.0


def test_neither_batches_nor_chunks_of_logits_change_the_result(
    tmp_path: Path, source: DenseCheckpoint, text: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(source, tmp_path / "q")
    whole = evaluate(tmp_path / "whole", model, text, source).metrics
    single = evaluate(tmp_path / "single", model, text, source, batch_size=1).metrics
    monkeypatch.setattr(windows, "LOGITS_BYTES", 4 * 307 * 5)
    assert windows.chunk_tokens(307) == 5
    chunks = evaluate(tmp_path / "chunks", model, text, source).metrics
    assert single == pytest.approx(whole, rel=1e-5)
    assert chunks == pytest.approx(whole, rel=1e-5)


def test_windows_overlap_by_one_token_and_score_each_token_once() -> None:
    cut = cut_windows([list("abcdefg"), list("xy"), list("z")], 4)
    assert [(w.document, "".join(w.ids)) for w in cut] == [(0, "abcd"), (0, "defg"), (1, "xy")]
    assert [w.ids for w in cut_windows([list("abcde")], 4)] == [list("abcd"), list("de")]


def test_max_documents_takes_the_first(tmp_path: Path, source: DenseCheckpoint, text: Dataset) -> None:
    evaluate(tmp_path, source, text, max_documents=2)
    assert [row["id"] for row in json.loads((tmp_path / "report.json").read_text())["documents"]] == ["doc0", "doc1"]


def test_a_window_is_never_longer_than_the_models_positions(tmp_path: Path, source: DenseCheckpoint) -> None:
    stage, data = Evaluate(), DatasetSpec(split="eval", digest="0", nbytes=1000)
    assert stage.window(source.model_spec) == 256
    assert stage.explain(source.model_spec, data) == ["max_length 512: windows are 256 tokens, all the positions this model has"]


def test_a_model_that_gives_nan_is_refused_with_the_documents_name(tmp_path: Path, source: DenseCheckpoint, text: Dataset) -> None:
    broken = DenseCheckpoint(make_checkpoint(tmp_path / "broken", num_hidden_layers=2, dtype=torch.float32))
    weights = load_file(broken.path / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, broken.path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"document doc[0-6]: nll is nan or infinite"):
        evaluate(tmp_path / "a", broken, text)
    with pytest.raises(ValueError, match=r"document doc[0-6]: reference_nll is nan or infinite"):
        evaluate(tmp_path / "b", source, text, broken)
    assert not (tmp_path / "a/report.json").exists()


def test_models_that_read_other_tokens_are_not_compared(tmp_path: Path, source: DenseCheckpoint, text: Dataset) -> None:
    other = DenseCheckpoint(make_checkpoint(tmp_path / "other"))
    save_tokenizer(other.path, 280)
    with pytest.raises(ValueError, match="different tokenizers"):
        evaluate(tmp_path / "report", source, text, other)
    larger = DenseCheckpoint(make_checkpoint(tmp_path / "larger", vocab_size=400)).model_spec
    with pytest.raises(ValueError, match="reference has 400 tokens in its vocabulary, the model 307"):
        Evaluate().infer(source.model_spec, DatasetSpec(split="eval", digest="0", nbytes=1), larger)


def test_a_tokenizer_of_another_model_and_an_empty_text_are_refused(tmp_path: Path, source: DenseCheckpoint, text: Dataset) -> None:
    stranger = DenseCheckpoint(make_checkpoint(tmp_path / "stranger", vocab_size=270))
    save_tokenizer(stranger.path, 400)
    with pytest.raises(ValueError, match="the model's vocabulary has 270 tokens"):
        evaluate(tmp_path / "a", stranger, text)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no document"):
        evaluate(tmp_path / "b", source, Dataset(tmp_path / "empty.jsonl"))


def test_loading_is_strict(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    stray = weights.pop("model.norm.weight")
    save_file({**weights, "model.extra.weight": stray}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: model\.norm\.weight.*unexpected keys: model\.extra\.weight"):
        load_model(folder)


def test_a_packed_model_moves_to_another_device_entirely(tmp_path: Path, source: DenseCheckpoint) -> None:
    """Shown with the device every machine has besides the CPU."""
    model = load_model(quantized(source, tmp_path / "q").path, "meta")
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_a_device_that_is_not_there_is_refused() -> None:
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device: 'cuda' is not on this machine; write device: auto or device: cpu"):
        resolve_device("cuda")


def test_memory_counts_both_models_and_follows_the_device(tmp_path: Path, source: DenseCheckpoint) -> None:
    spec, data = source.model_spec, DatasetSpec(split="eval", digest="0", nbytes=1000)
    packed = RTN.from_dict({"group_size": 32}).infer(spec)
    alone = Evaluate().memory(packed, data, Target(name="cpu"))
    both = Evaluate().memory(packed, data, Target(name="cpu"), reference=spec)
    assert both.totals["ram"] - alone.totals["ram"] > spec.nbytes
    assert alone.ram["model, dense"] == spec.nbytes
    assert not Evaluate().memory(packed, data, Target(name="gpu", gpus=1), reference=spec).ram.get("model, dense")
    cached = Evaluate().memory(packed.with_cache("static"), data, Target(name="cpu"))
    assert cached.ram["model, INT8 cache"] == 8 * 256 * 2 * 2 * 2 * 16  # windows, tokens, key and value, layers, heads, head_dim
    assert Evaluate().explain(packed.with_cache("static"), data)[-1].startswith("scored with its INT8 cache (static)")
