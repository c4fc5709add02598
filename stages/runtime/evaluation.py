"""From token scores to a report: documents encoded, losses added up by document, metrics over all of them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.artifact import Dataset
from pipeline.layout import KVCacheSpec
from stages.functional.bootstrap import paired_bootstrap
from stages.runtime.scoring import CacheBytes, TokenScores
from stages.runtime.text import encode_documents, load_tokenizer
from stages.runtime.windows import position_buckets

REFERENCE_COLUMNS = ("reference_nll", "kl", "top1_matches")  # of report.json; null without a reference
CACHE_COLUMNS = ("plain_cache_nll", "plain_cache_kl")  # of report.json, where the model has an INT8 cache
COUNTS = ("tokens", "top1_matches")


@dataclass(frozen=True)
class Document:
    name: str
    nbytes: int  # of its UTF-8
    ids: list[int]


def encode(dataset: Dataset, tokenizer_folder: Path, vocab_size: int, limit: int | None) -> list[Document]:
    """The first `limit` documents of two or more tokens. ValueError: there is none, or an id the model has no embedding for."""
    encoded = encode_documents(dataset, load_tokenizer(tokenizer_folder))[:limit]
    if not encoded:
        raise ValueError(f"{dataset.path.name} holds no document of two or more tokens; give held-out text to score")
    documents = [Document(name, len(text.encode()), ids) for name, text, ids in encoded]
    for document in documents:
        if max(document.ids) >= vocab_size:
            raise ValueError(
                f"document {document.name} encodes to token id {max(document.ids)}, but the model's vocabulary has {vocab_size} tokens; "
                "the folder's tokenizer is another model's"
            )
    return documents


class Tally:
    """Sums over scored tokens by document and by position in the window, in float64, and every token's KL divergence for its percentile."""

    def __init__(self, documents: Sequence[Document], window: int, with_reference: bool, with_cache: bool = False) -> None:
        """`window`: the most tokens that a window may have."""
        self.documents, self.buckets = documents, position_buckets(window)
        self._ends = torch.tensor([end for _, end in self.buckets])
        columns = ["tokens", "nll", *(REFERENCE_COLUMNS if with_reference else ()), *(CACHE_COLUMNS if with_cache else ())]
        self.sums = {column: torch.zeros(len(documents), dtype=torch.float64) for column in columns}
        self.by_position = {column: torch.zeros(len(self.buckets), dtype=torch.float64) for column in columns}
        self.kl_by_token: list[torch.Tensor] = []

    def add(self, scores: TokenScores) -> None:
        """ValueError names the document whose loss is nan or infinite."""
        found = {"tokens": torch.ones_like(scores.nll), "nll": scores.nll}
        if other := scores.reference:
            found |= {"reference_nll": other.nll, "kl": other.kl, "top1_matches": other.top1}
            self.kl_by_token.append(other.kl)
        if plain := scores.plain_cache:
            found |= {"plain_cache_nll": plain.nll, "plain_cache_kl": plain.kl}
        bucket = torch.bucketize(scores.position, self._ends, right=True)
        for column, values in found.items():
            broken = scores.document[~values.double().isfinite()]
            if len(broken):
                raise ValueError(
                    f"document {self.documents[int(broken[0])].name}: {column} is nan or infinite; the model's weights are damaged"
                )
            self.sums[column].index_add_(0, scores.document, values.double())
            self.by_position[column].index_add_(0, bucket, values.double())

    def metrics(self) -> dict[str, float]:
        total = {column: values.sum().item() for column, values in self.sums.items()}
        tokens = total["tokens"]
        nll = total["nll"] / tokens
        metrics = {
            "perplexity": math.exp(nll),
            "nll_per_token": nll,
            "bits_per_byte": total["nll"] / math.log(2) / sum(document.nbytes for document in self.documents),
            "tokens": tokens,
            "documents": float(len(self.documents)),
        }
        if "kl" in total:
            reference_nll, kl = total["reference_nll"] / tokens, torch.cat(self.kl_by_token)
            metrics |= {
                "reference_perplexity": math.exp(reference_nll),
                "perplexity_change_pct": 100 * math.expm1(nll - reference_nll),
                "kl_divergence": total["kl"] / tokens,
                "kl_divergence_p99": kl.kthvalue(math.ceil(0.99 * len(kl))).values.item(),  # nearest rank
                "top1_agreement": total["top1_matches"] / tokens,
            }
            metrics |= self._interval() if len(self.documents) > 1 else {}
        if "plain_cache_kl" in total:
            metrics |= {
                "kv_cache_perplexity_change_pct": 100 * math.expm1(nll - total["plain_cache_nll"] / tokens),
                "kv_cache_kl_divergence": total["plain_cache_kl"] / tokens,
            }
        return metrics

    def _interval(self) -> dict[str, float]:
        """Of the change of perplexity, 95 %: a paired bootstrap over the documents."""
        found = paired_bootstrap(self.sums["nll"], self.sums["reference_nll"], self.sums["tokens"]).perplexity_change_pct
        return {"perplexity_change_pct_low": found.low, "perplexity_change_pct_high": found.high}

    def rows(self) -> list[dict[str, Any]]:
        """One row for each document in file order, as in report.json."""
        sums = _rows(self.sums)
        return [{"id": document.name, "bytes": document.nbytes, **row} for document, row in zip(self.documents, sums, strict=True)]

    def positions(self) -> list[dict[str, Any]]:
        """One row for each bucket of positions in which a token was scored, as in report.json."""
        rows = zip(self.buckets, _rows(self.by_position), strict=True)
        return [{"from": first, "to": end, **row} for (first, end), row in rows if row["tokens"]]


def _rows(sums: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Sums by column as one row for each group."""
    columns = {column: [int(value) if column in COUNTS else value for value in values.tolist()] for column, values in sums.items()}
    absent = dict.fromkeys(column for column in REFERENCE_COLUMNS if column not in sums)
    return [dict(zip(columns, row, strict=True)) | absent for row in zip(*columns.values(), strict=True)]


def cache_bytes(held: CacheBytes, layout: KVCacheSpec) -> float:
    """Measured bytes of the cache for one sequence of the longest length.

    ValueError where they are not those that the spec promises for each token: then a plan's fit would be wrong.
    """
    if held.per_token != layout.bytes_per_token:
        raise ValueError(
            f"the INT8 cache takes {held.per_token:g} bytes per token, the spec says {layout.bytes_per_token}; "
            "its kv_cache.json and its config.json do not belong together"
        )
    return held.per_sequence


def write_report(folder: Path, metrics: Mapping[str, float], tally: Tally) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report = {"metrics": dict(metrics), "documents": tally.rows(), "positions": tally.positions()}
    (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
