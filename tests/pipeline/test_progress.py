"""What a person sees of a run, on a terminal and in a log file."""

import io
import time
from typing import Any

import pytest
from rich.console import Console

from pipeline.progress import Bar, Display
from pipeline.target import format_seconds

FINISHED = {"key": "k", "path": "p", "nbytes": 9_970_000, "metrics": {}, "peak_rss": 1, "notes": [], "seconds": 1.0}


def show(terminal: bool, *events: dict[str, Any]) -> tuple[Display, str]:
    """Events are a second apart; the last ones lie about now."""
    stream = io.StringIO()
    display = Display(Console(file=stream, force_terminal=terminal, width=80, color_system=None, _environ={"TERM": "xterm"}))
    start = time.time() - len(events)
    for number, event in enumerate(events):
        display({"time": start + number, **event})
    return display, stream.getvalue()


def rendered(display: Display) -> str:
    stream = io.StringIO()
    Console(file=stream, width=80, color_system=None).print(display.render())
    return stream.getvalue()


STARTED = {"event": "run_started", "nodes": [{"node": name} for name in ("evaluate@source", "prune", "quantize", "evaluate")]}
UNTIL_HALFWAY = (
    STARTED,
    {"event": "node_hit", "node": "evaluate@source", **FINISHED},
    {"event": "node_started", "node": "prune"},
    {"event": "node_finished", "node": "prune", **FINISHED},
    {"event": "node_started", "node": "quantize"},
    {"event": "progress", "node": "quantize", "label": "layer", "done": 0, "total": 4},
    {"event": "progress", "node": "quantize", "label": "layer", "done": 2, "total": 4},
)


def test_a_terminal_shows_every_stage_with_its_state() -> None:
    display, _ = show(True, *UNTIL_HALFWAY)
    lines = rendered(display).splitlines()
    display({"event": "run_finished", "time": time.time(), "status": "finished", "seconds": 1.0})
    assert [line.split()[:2] for line in lines] == [
        ["evaluate@source", "hit"], ["prune", "done"], ["quantize", "running"], ["evaluate"], ["total", "2"],
    ]  # fmt: skip
    assert "1.0 s" in lines[1] and "9.97 MB" in lines[1]
    assert "layer 2 of 4" in lines[2] and "s left" in lines[2]
    assert all(len(line) <= 80 for line in lines)


def test_what_was_running_at_the_end_is_shown_as_stopped() -> None:
    display, _ = show(True, *UNTIL_HALFWAY, {"event": "run_finished", "status": "interrupted", "seconds": 6.0})
    assert "stopped" in rendered(display)


def test_a_failed_stage_is_shown_as_failed() -> None:
    display, _ = show(True, *UNTIL_HALFWAY, {"event": "node_failed", "node": "quantize", "reason": "r"})
    text = rendered(display)
    display({"event": "run_finished", "time": time.time(), "status": "failed", "seconds": 1.0})
    assert "failed" in text


def test_a_log_file_gets_plain_lines() -> None:
    ending = ({"event": "node_finished", "node": "quantize", **FINISHED}, {"event": "run_finished", "status": "finished", "seconds": 8.0})
    _, text = show(False, *UNTIL_HALFWAY, *ending)
    assert text.splitlines() == [
        "[  1.0 s] evaluate@source: hit, 9.97 MB",
        "[  2.0 s] prune: started",
        "[  3.0 s] prune: done in 1.0 s, 9.97 MB",
        "[  4.0 s] quantize: started",
        "[  7.0 s] quantize: done in 3.0 s, 9.97 MB",
        "[  8.0 s] run: finished after 8.0 s",
    ]


def test_a_log_file_hears_of_progress_every_ten_seconds() -> None:
    progress = [{"event": "progress", "node": "quantize", "label": "layer", "done": done, "total": 40} for done in range(30)]
    _, text = show(False, STARTED, {"event": "node_started", "node": "quantize"}, *progress)
    assert [line.partition("] ")[2] for line in text.splitlines()[1:]] == [
        "quantize: layer 9 of 40, about 31.0 s left",
        "quantize: layer 19 of 40, about 21.0 s left",
        "quantize: layer 29 of 40, about 11.0 s left",
    ]


def planned(**hours: float | None) -> dict[str, Any]:
    """Of `name=seconds`; a first stage waits for imports of 2 s too."""
    nodes = [{"node": name, "stage": name, "status": "miss", "planned": seconds} for name, seconds in hours.items()]
    return {"event": "run_started", "starting": 2.0, "nodes": nodes}


def test_what_is_left_of_a_run_is_what_is_planned() -> None:
    display, _ = show(False, planned(prune=8.0, distill=80.0, evaluate=10.0))
    assert display.remaining(time.time()) == pytest.approx(100)


def test_a_run_that_takes_longer_than_planned_takes_longer_to_its_end() -> None:
    """Of 100 planned seconds 10 took 20, beside a tenth of the plan that is believed: 1.5 times as long."""
    ended = {"event": "node_finished", "node": "prune", **FINISHED}
    display, _ = show(False, planned(prune=8.0, distill=80.0, evaluate=10.0))
    began = time.time()
    display({"event": "node_started", "node": "prune", "time": began})
    display({**ended, "time": began + 20})
    assert display.remaining(began + 20) == pytest.approx(1.5 * 90)
    display({"event": "node_started", "node": "distill", "time": began + 20})
    assert display.remaining(began + 30) == pytest.approx(1.5 * 90 - 10)
    assert display.remaining(began + 1000) == pytest.approx(1.5 * 10), "what takes longer than thought is about to end"


def test_a_stage_that_counts_says_itself_when_it_is_through() -> None:
    display, _ = show(False, planned(distill=80.0, evaluate=10.0), {"event": "node_started", "node": "distill"})
    began = display.rows["distill"].started
    for done in (0, 2, 5):
        display({"event": "progress", "node": "distill", "label": "training", "done": done, "total": 40, "time": began + 2 * done})
    assert display.remaining(began + 10) == pytest.approx(2 * 35 + 10)


def test_hits_cost_nothing_and_what_is_not_known_is_not_told() -> None:
    start = planned(prune=8.0, distill=None)
    display, text = show(False, start, {"event": "node_started", "node": "prune"})
    assert display.remaining(time.time()) is None and text.splitlines()[-1].endswith("prune: started")
    start["nodes"][1]["status"] = "hit"
    display, text = show(False, start, {"event": "node_started", "node": "prune"})
    assert text.splitlines()[-1].endswith("prune: started, about 10.0 s left of the run")


def test_the_last_line_of_a_terminal_tells_the_rest_of_the_run() -> None:
    display, _ = show(True, planned(prune=8.0, distill=8000.0), {"event": "node_started", "node": "prune"})
    (total,) = (line for line in rendered(display).splitlines() if line.startswith("total"))
    display({"event": "run_finished", "time": time.time(), "status": "interrupted", "seconds": 1.0})
    assert "left" in total and len(total) <= 80
    assert "left" not in rendered(display)


def test_markup_in_a_message_is_text() -> None:
    _, text = show(False, STARTED, {"event": "warning", "text": "[red]model.layers[0][/red]"})
    assert "warning: [red]model.layers[0][/red]" in text


def test_a_new_loop_starts_a_new_estimate() -> None:
    progress = [{"event": "progress", "node": "prune", "label": label, "done": 1, "total": 4} for label in ("scores", "layer")]
    display, _ = show(False, STARTED, {"event": "node_started", "node": "prune"}, *progress)
    bar = display.rows["prune"].bar
    assert bar and bar.label == "layer" and bar.remaining(time.time()) is None


def test_remaining_time_follows_the_rate() -> None:
    assert Bar("layer", first=2, since=100.0, done=6, total=10).remaining(now=108.0) == 8.0


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (4.2, "4.2 s"), (59.97, "1:00"), (62, "1:02"), (3723, "1:02:03")])
def test_durations_are_short(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
