"""From token scores to a report: documents encoded, losses added up by document, metrics over all of them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.artifact import Dataset
from stages.runtime.scoring import TokenScores
from stages.runtime.text import encode_documents, load_tokenizer


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
    """Sums over each document's scored tokens, in float64, and every token's KL divergence for its percentile."""

    def __init__(self, documents: Sequence[Document], with_reference: bool) -> None:
        self.documents = documents
        fields = ("tokens", "nll", *(("reference_nll", "kl", "top1_matches") if with_reference else ()))
        self.sums = {field: torch.zeros(len(documents), dtype=torch.float64) for field in fields}
        self.kl_by_token: list[torch.Tensor] = []

    def add(self, scores: TokenScores) -> None:
        """ValueError names the document whose loss is nan or infinite."""
        found = {"nll": scores.nll, "reference_nll": scores.reference_nll, "kl": scores.kl, "top1_matches": scores.top1}
        self.sums["tokens"] += torch.bincount(scores.document, minlength=len(self.documents))
        for field, values in found.items():
            if values is None:
                continue
            broken = scores.document[~values.double().isfinite()]
            if len(broken):
                raise ValueError(
                    f"document {self.documents[int(broken[0])].name}: {field} is nan or infinite; the model's weights are damaged"
                )
            self.sums[field].index_add_(0, scores.document, values.double())
        if scores.kl is not None:
            self.kl_by_token.append(scores.kl)

    def metrics(self) -> dict[str, float]:
        total = {field: values.sum().item() for field, values in self.sums.items()}
        nll = total["nll"] / total["tokens"]
        metrics = {
            "perplexity": math.exp(nll),
            "nll_per_token": nll,
            "bits_per_byte": total["nll"] / math.log(2) / sum(document.nbytes for document in self.documents),
            "tokens": total["tokens"],
            "documents": float(len(self.documents)),
        }
        if "kl" not in total:
            return metrics
        reference_nll = total["reference_nll"] / total["tokens"]
        kl = torch.cat(self.kl_by_token)
        return metrics | {
            "reference_perplexity": math.exp(reference_nll),
            "perplexity_change_pct": 100 * math.expm1(nll - reference_nll),
            "kl_divergence": total["kl"] / total["tokens"],
            "kl_divergence_p99": kl.kthvalue(math.ceil(0.99 * len(kl))).values.item(),  # nearest rank
            "top1_agreement": total["top1_matches"] / total["tokens"],
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row for each document in file order, as in report.json."""
        sums = {field: values.tolist() for field, values in self.sums.items()}
        return [
            {
                "id": document.name,
                "tokens": int(sums["tokens"][n]),
                "bytes": document.nbytes,
                "nll": sums["nll"][n],
                "reference_nll": sums["reference_nll"][n] if "reference_nll" in sums else None,
                "kl": sums["kl"][n] if "kl" in sums else None,
                "top1_matches": int(sums["top1_matches"][n]) if "top1_matches" in sums else None,
            }
            for n, document in enumerate(self.documents)
        ]


def write_report(folder: Path, metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report = {"metrics": dict(metrics), "documents": list(rows)}
    (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
