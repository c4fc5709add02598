"""Can an evaluation be trusted? Whether its text is among what the model was made with, and whether both are of one kind."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.artifact import Dataset, EvalReport
from pipeline.artifact_spec import DatasetSpec
from pipeline.errors import InputProblems
from pipeline.roofline import Work
from pipeline.stage import Context, Stage
from pipeline.target import Memory, Target

if TYPE_CHECKING:
    from stages.runtime.overlap import DocumentOverlap

HASHED_TEXT = 8e6  # bytes of text a second and core: 5e6 to 12e6
COMPARED = 0.04  # seconds: sixteen comparisons of samples of 256 KiB
LONGEST_DOCUMENT = 4_000_000  # bytes: what a plan expects of files that mark where documents end
NAMED = 3  # documents in a sentence


class DataCheck(Stage):
    """Overlap of the evaluation text with another one, as n-grams of words, and the distance of their domains.

    Overlap is counted as in the decontamination of GPT-3's training text (Brown et al., 2020, https://arxiv.org/abs/2005.14165, appendix
    C): n-grams of 13 lower-case words without punctuation; exactly what a word is says stages/functional/word_ngrams.py. A document of
    fewer words is one n-gram. Unlike there, n-grams that many documents share (licences, boilerplate) count too. Of conversations the
    messages' contents are compared.

    Metrics: `overlap_share` (of the evaluation text's n-grams, those that also occur in the other text; 0 to 1), `overlap_documents` (with
    any), `identical_documents` (there word for word), `ngrams`, `documents`; and of stages/runtime/domain.py `domain_distance`,
    `domain_baseline` (of halves of the evaluation text), `domain_spread`, `domain_shift`, absent where there is too little text.

    `report.json`: {"metrics": {name: float}, "documents": [{"id", "ngrams", "shared" (counts), "identical"}]} in file order.
    """

    name, version = "data_check", 1
    reads_conversations = True
    libraries = ("numpy",)

    class Params(Stage.Params):
        ngram: int = Field(default=13, ge=1, le=100)  # words
        max_overlap: float | None = Field(default=0.1, ge=0, le=1)  # of overlap_share, above which the run stops; None: never
        seed: int = Field(default=0, ge=0, lt=2**32)  # of the halves and samples whose domains are compared

    params: Params

    def infer(self, eval: DatasetSpec, other: DatasetSpec) -> None:
        problems = [
            f"{port}: {spec.split} holds evaluation tasks; name a split of format text or messages"
            for port, spec in (("eval", eval), ("other", other))
            if spec.format == "tasks"
        ]
        if eval.digest and eval.digest == other.digest:
            problems.append("other: it is the evaluation text itself; name what the model is calibrated or trained on")
        if problems:
            raise InputProblems(problems)

    def memory(self, eval: DatasetSpec, other: DatasetSpec, target: Target) -> Memory:
        longest = max(spec.nbytes if spec.file_format == "txt" else min(spec.nbytes, LONGEST_DOCUMENT) for spec in (eval, other))
        return Memory(
            ram={
                "n-grams of the smaller text": 9 * min(eval.nbytes, other.nbytes),  # 8 bytes for each word, thrice while they are sorted
                "the longest document, its words and n-grams": 11 * longest,
                "words known by heart, samples of both texts": 50_000_000,
            }
        )

    def work(self, eval: DatasetSpec, other: DatasetSpec) -> Work:
        again = eval.nbytes if eval.nbytes <= other.nbytes else 0
        read = eval.nbytes + other.nbytes + again
        return Work(disk=read, cpu=read / HASHED_TEXT + COMPARED)

    def on_gpu(self, target: Target) -> bool:
        return False

    def explain(self, eval: DatasetSpec, other: DatasetSpec) -> list[str]:
        limit = self.params.max_overlap
        if limit is None:
            return []
        return [
            f"stops the run where more than {100 * limit:g} % of the {self.params.ngram}-grams of {eval.split} also stand in {other.split}"
        ]

    def run(self, ctx: Context, eval: Dataset, other: Dataset) -> EvalReport:
        from stages.runtime.domain import TextSample, domain_shift
        from stages.runtime.overlap import Prints, overlaps

        p, names = self.params, (_split(eval), _split(other))
        ours, theirs = TextSample(), TextSample()
        others = theirs.watch(_read(ctx, other))
        if eval.path.stat().st_size <= other.path.stat().st_size:
            there = Prints.of(_read(ctx, eval), p.ngram).also_in(others, p.ngram)
        else:
            there = Prints.of(others, p.ngram)
        rows = list(overlaps(ours.watch(_read(ctx, eval)), there, p.ngram))
        metrics = _overlap_metrics(rows, names[0])
        self._judge_overlap(ctx, rows, metrics, names)
        domain = domain_shift(ours, theirs, p.seed)
        if domain is None:
            ctx.note(f"{names[0]} and {names[1]} hold too little text to tell whether they are of one kind")
        else:
            metrics |= {f"domain_{name}": value for name, value in asdict(domain).items()}
            if domain.far:
                ctx.note(
                    f"{names[1]} looks like another language or domain than {names[0]}: their distance is {domain.distance:.2f}, that of "
                    f"halves of {names[0]} {domain.baseline:.2f} (0: the same, 1: nothing in common); what is measured on {names[0]} will "
                    f"be worse than it could be, so give {names[1]} text of its kind"
                )
        _write(ctx.output / "report.json", metrics, rows)
        return EvalReport(ctx.output, metrics=metrics)

    def _judge_overlap(self, ctx: Context, rows: "Sequence[DocumentOverlap]", metrics: Mapping[str, float], names: tuple[str, str]) -> None:
        """ValueError above the limit; otherwise documents that stand there as a whole are a note."""
        limit, share = self.params.max_overlap, metrics["overlap_share"]
        if limit is not None and share > limit:
            worst = sorted((row for row in rows if row.shared), key=lambda row: -row.share)
            raise ValueError(
                f"max_overlap: {100 * share:.3g} % of the {self.params.ngram}-grams of {names[0]} also stand in {names[1]}, most in "
                f"{_named(worst)}, so that it would measure what was learned by heart; take these documents out of one of them, or write "
                "max_overlap: null to be told only"
            )
        identical = [row for row in rows if row.identical]
        if identical:
            ctx.note(f"{_counted(identical)} of {names[0]} also stands in {names[1]} word for word: {_named(identical)}")


def _overlap_metrics(rows: "Sequence[DocumentOverlap]", name: str) -> dict[str, float]:
    """ValueError where the evaluation text has no words."""
    ngrams = sum(row.ngrams for row in rows)
    if not ngrams:
        raise ValueError(f"eval: there is no word in {name}; give held-out text to score")
    return {
        "overlap_share": sum(row.shared for row in rows) / ngrams,
        "overlap_documents": float(sum(row.shared > 0 for row in rows)),
        "identical_documents": float(sum(row.identical for row in rows)),
        "ngrams": float(ngrams),
        "documents": float(len(rows)),
    }


def _read(ctx: Context, dataset: Dataset) -> Iterator[tuple[str, str]]:
    """(id, text) of each document or conversation."""
    total = dataset.spec.documents if isinstance(dataset.spec, DatasetSpec) else None
    contents = ((name, "\n\n".join(message["content"] for message in messages)) for name, messages in dataset.conversations())
    for number, (name, text) in enumerate(contents if dataset.is_chat else dataset.documents(), 1):
        yield name, text
        if total:
            ctx.progress(f"reading {_split(dataset)}", number, total)


def _split(dataset: Dataset) -> str:
    return dataset.spec.split if isinstance(dataset.spec, DatasetSpec) else dataset.path.name


def _named(rows: "Sequence[DocumentOverlap]") -> str:
    """The first few by name."""
    names = [row.name for row in rows[:NAMED]]
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return ", ".join(names) + more


def _counted(rows: "Sequence[DocumentOverlap]") -> str:
    return f"{len(rows)} document{'s' if len(rows) > 1 else ''}"


def _write(file: Path, metrics: Mapping[str, float], rows: "Sequence[DocumentOverlap]") -> None:
    documents = [{"id": row.name, "ngrams": row.ngrams, "shared": row.shared, "identical": row.identical} for row in rows]
    file.write_text(json.dumps({"metrics": dict(metrics), "documents": documents}, indent=1, allow_nan=False) + "\n", encoding="utf-8")
