"""The page that a run leaves: whole, safe, readable without anything else, written only when it would say something new."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import pipeline.report_plots
from pipeline.errors import Interrupted, StageFailed
from pipeline.findings import DataCheckReport, GateReport, PositionReport
from pipeline.layer_bits import LayerBits
from pipeline.pages import PAGE, TEXT, write_pages
from pipeline.plan import Plan
from pipeline.report import Report, build_report
from pipeline.report_html import render
from pipeline.report_plots import COLOURS, draw
from pipeline.run_record import RunRecord
from pipeline.task_findings import FlipExample, TaskMetric, TaskReport
from tests.pipeline.rehearsal import plan_of, rehearse, small_model

SECTIONS = ["verdict", "stages", "memory", "positions", "tasks", "flips", "planned", "serving", "provenance", "notes"]
VOID = {"meta", "link", "br", "wbr", "img", "hr", "input"}
HOSTILE = '<script>alert("1")</script> & $x$'
GATE = GateReport(
    outcome="fail", metric="perplexity", limit_name="max_increase_pct", limit=5.0, value=8.0, source_value=5.0, change=60.0, low=58.0,
    high=62.0, confidence=0.95, samples=55, noun="documents", needed=None, node="gate@quantize", measures="quantize.model",
    report="evaluate", says="gate fails: perplexity changed by +60 %",
)  # fmt: skip


class Page(HTMLParser):
    """Every element in order, with what is inside its opening tag; and the text a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def ids(self) -> list[str]:
        return [attributes["id"] or "" for _, attributes in self.elements if "id" in attributes]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


def run(plan: Plan, outputs: Path, error: BaseException | None = None, **events: Any) -> Report:
    record = RunRecord(outputs / "runs" / "rehearsed" / plan.digest[:12])
    rehearse(plan, outputs, [record], **events)
    return build_report(plan, record, error)


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Without gates, tasks, positions or a load."""
    outputs = tmp_path_factory.mktemp("plain")
    return run(plan_of(model, outputs), outputs)


@pytest.fixture(scope="module")
def full(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """With one of everything."""
    outputs = tmp_path_factory.mktemp("full")
    target = {"name": "card", "gpus": 1, "memory": "8GB", "ram": "64GB", "flops": "1TFLOP/s", "bandwidth": "100GB/s"}
    report = run(plan_of(model, outputs, target=target, serve={"context": 64, "batch": 4}), outputs)
    score = TaskMetric(
        metric="acc", value=0.6, stderr=0.05, higher_is_better=True, source_value=0.7, source_stderr=0.04, flips_to_wrong=7,
        flips_to_right=1,
    )  # fmt: skip
    flip = FlipExample(
        id="item-9", metric="acc", became="wrong", prompt="the prompt", target="right one", source_answer="right one", answer="wrong one"
    )
    task = TaskReport(
        task="quiz", node="tasks", measures="quantize.model", items=100, n_shot=0, unpaired=3, metrics=(score,), examples=(flip,)
    )
    rows = tuple(
        PositionReport(start=start, end=start + 64, tokens=100, perplexity=9.0, source_perplexity=5.0, kl_divergence=0.5)
        for start in (0, 64, 128)
    )
    check = DataCheckReport(
        node="data_check@train", evaluated="data.eval", other="data.train", overlap_share=0.0123, overlap_documents=2,
        identical_documents=1, documents=55, domain_distance=0.44, domain_baseline=0.4, domain_shift=0.05, notes=(),
    )  # fmt: skip
    return report.model_copy(
        update={"gates": (GATE,), "decision": "investigate", "tasks": (task,), "positions": rows, "data_checks": (check,)}
    )


@pytest.mark.parametrize("kind", ["plain", "full"])
def test_the_page_is_whole_with_every_section_in_its_place(kind: str, request: pytest.FixtureRequest) -> None:
    html, problems = render(request.getfixturevalue(kind), "mark")
    page = Page(html)
    assert problems == []
    assert [attributes.get("id") for tag, attributes in page.elements if tag == "section"] == SECTIONS
    assert len(page.ids()) == len(set(page.ids()))
    assert "None" not in page.text.replace("None.", "").replace("None is known", "")


def test_nothing_is_loaded_from_anywhere_and_nothing_runs(full: Report) -> None:
    html, _ = render(full, "mark")
    page = Page(html)
    loading = [(tag, name) for tag, attributes in page.elements for name in attributes if name in ("src", "href", "srcset", "action")]
    assert loading == []
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in page.elements}
    assert all(value and value.startswith("#") for _, attributes in page.elements for name, value in attributes.items() if "href" in name)
    assert "@import" not in html and set(re.findall(r"url\((.)", html)) <= {"#"}
    used = set(re.findall(r"https?://[^\"' ]+", html)) - {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }  # names, not addresses
    assert used == set()


def test_the_verdict_comes_first_with_the_sentences_of_its_gates(full: Report) -> None:
    text = Page(render(full, "")[0]).text
    body = text[text.index("llmpress report") :]
    assert (
        body.index("investigate") < body.index("fails: perplexity changed by +60 %") < body.index("bits per weight") < body.index("Stages")
    )


def test_without_a_gate_the_page_says_how_it_ended_and_that_nothing_decides(plain: Report) -> None:
    text = " ".join(Page(render(plain, "")[0]).text.split())
    assert "complete without a gate, nothing says whether to deploy it" in text
    assert "No task was asked" in text and "The recipe states no load" in text


def test_a_failed_run_has_a_page_with_its_error_and_what_was_reached(model: Path, tmp_path: Path) -> None:
    report = run(plan_of(model, tmp_path), tmp_path, StageFailed("quantize", "out of memory"), fail="quantize")
    text = " ".join(Page(render(report, "")[0]).text.split())
    assert "failed quantize: out of memory" in text
    assert "/logs/quantize/log.txt" in text and "not reached" in text
    assert "There is no final model" in text


def test_an_interrupted_run_has_one_too(model: Path, tmp_path: Path) -> None:
    report = run(plan_of(model, tmp_path), tmp_path, Interrupted("stopped after prune"), stop="prune")
    assert "interrupted stopped after prune" in " ".join(Page(render(report, "")[0]).text.split())


def test_a_gate_that_stopped_the_run_stands_with_the_runs_end(full: Report) -> None:
    stopped = full.model_copy(update={"verdict": "failed", "error": "gate@quantize: gate fails", "final": None, "serving": ()})
    text = " ".join(Page(render(stopped, "")[0]).text.split())
    assert "investigate a gate fails" in text and "failed: gate@quantize: gate fails" in text


def test_text_of_others_stays_text(full: Report) -> None:
    """Paths, answers, notes and names come from files of anybody's."""
    assert full.final is not None
    example = full.tasks[0].examples[0].model_copy(update=dict.fromkeys(("id", "prompt", "target", "answer", "source_answer"), HOSTILE))
    stage = full.stages[-2].model_copy(update={"name": HOSTILE, "notes": (HOSTILE,), "libraries": {HOSTILE: "1"}})
    report = full.model_copy(
        update={
            "recipe": HOSTILE,
            "warnings": (HOSTILE,),
            "error": HOSTILE,
            "final": full.final.model_copy(update={"path": HOSTILE}),
            "stages": (*full.stages[:-2], stage, full.stages[-1]),
            "tasks": (full.tasks[0].model_copy(update={"task": HOSTILE, "examples": (example,)}),),
            "gates": (GATE.model_copy(update={"says": HOSTILE}),),
            "origins": tuple(origin.model_copy(update={"written": HOSTILE}) for origin in full.origins),
        }
    )
    page = Page(render(report, "")[0])
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.text.count(HOSTILE) > 10


def test_commands_survive_a_path_with_spaces(full: Report) -> None:
    assert full.final is not None
    report = full.model_copy(update={"final": full.final.model_copy(update={"path": "/my models/it's"})})
    text = Page(render(report, "")[0]).text
    assert """vllm serve '/my models/it'"'"'s'""" in text
    assert """from_pretrained("/my models/it's")""" in text


def test_every_plot_is_drawn_in_the_pages_own_colours(full: Report) -> None:
    plots, problems = draw(full)
    assert (sorted(plots), problems) == (["memory", "perplexity", "positions", "size", "tasks"], [])
    for name, svg in plots.items():
        assert re.findall(r"#[0-9a-fA-F]{6}\b", svg) == [], name
        assert any(colour in svg for colour in COLOURS.values())
        assert "<text" in svg and "<metadata" not in svg and "DejaVu" not in svg


def test_a_plot_shows_the_figures_of_the_report(full: Report) -> None:
    plots, _ = draw(full)
    assert "8 +60.0 %" in re.sub(r"\s+", " ", plots["perplexity"])
    assert "0-64" in plots["positions"] and "128-192" in plots["positions"]
    assert full.served is not None
    assert "KV cache" in plots["memory"] and "all of card 8 GB" in plots["memory"]


def test_bits_that_differ_by_layer_are_a_map_and_a_table(full: Report) -> None:
    assert "bits" not in draw(full)[0] and "Bits by layer" not in render(full, "")[0]
    rows = (
        LayerBits(kind="self_attn.q_proj", bits=(3, 4, 8)),
        LayerBits(kind="mlp.down_proj", bits=(4, None, 3)),
        LayerBits(kind="lm_head", bits=(8,)),
    )
    mixed = full.model_copy(update={"layer_bits": rows})
    drawn, problems = draw(mixed)
    assert not problems and all(text in drawn["bits"] for text in ("3 bits", "4 bits", "8 bits", "q_proj", "down_proj", "lm_head"))
    page = Page(render(mixed, "")[0])
    assert "Bits by layer, as a table" in page.text and "self_attn.q_proj" in page.text
    many = full.model_copy(update={"layer_bits": (LayerBits(kind="self_attn.q_proj", bits=(3, 4) * 40),)})
    assert drawn["bits"].count("<text") > draw(many)[0]["bits"].count("<text")  # 80 layers are too many to number


def test_a_plot_that_fails_is_told_and_tried_again(full: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(report: Report) -> None:
        raise ValueError("cannot convert float NaN to integer")

    monkeypatch.setitem(pipeline.report_plots.PLOTS, "size", broken)
    page, problems = write_pages(full, tmp_path)
    assert problems == ["the plot of size could not be drawn: cannot convert float NaN to integer"]
    assert problems[0] in Page(page.read_text()).text
    monkeypatch.undo()
    page, problems = write_pages(full, tmp_path)
    assert problems == [] and 'aria-label="plot of size"' in page.read_text()


def test_pages_are_written_again_only_when_they_would_say_something_else(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    plan = plan_of(model, tmp_path)
    write_pages(run(plan, tmp_path), folder)
    first = (folder / PAGE).stat().st_mtime_ns, (folder / TEXT).stat().st_mtime_ns
    hits = run(plan, tmp_path)
    assert hits.metrics["stages_hit"] == 5
    write_pages(hits, folder)
    assert ((folder / PAGE).stat().st_mtime_ns, (folder / TEXT).stat().st_mtime_ns) == first
    write_pages(hits.model_copy(update={"warnings": ("the disk is nearly full",)}), folder)
    assert "the disk is nearly full" in (folder / PAGE).read_text() and "the disk is nearly full" in (folder / TEXT).read_text()


def test_the_markdown_begins_with_the_verdict(full: Report, tmp_path: Path) -> None:
    write_pages(full, tmp_path)
    lines = (tmp_path / TEXT).read_text().splitlines()
    assert lines[0].startswith("**investigate: ") and lines[2].startswith("- gate@quantize: gate fails")
    assert any(line.startswith("- quiz/acc 0.600") for line in lines)


def test_every_field_of_the_report_is_documented(full: Report) -> None:
    """Of every level, by the names in code style."""
    documented = set(re.findall(r"`([A-Za-z0-9_]+)`", (Path(__file__).parents[2] / "docs" / "report.md").read_text()))
    free = {"metrics", "source", "outputs", "libraries", "environment", "planned_peak"}  # their keys are names of others

    def fields(value: Any) -> set[str]:
        if isinstance(value, list):
            return {name for item in value for name in fields(item)}
        if not isinstance(value, dict):
            return set()
        return set(value) | {name for key, item in value.items() if key not in free or isinstance(item, list) for name in fields(item)}

    assert fields(json.loads(full.model_dump_json())) - documented == set()
