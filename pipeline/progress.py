"""The run on a terminal: one line for each stage, a bar in the running one, elapsed and remaining time, of the whole run too.

A listener to the executor's events. It draws on standard error, so that standard output stays free for results. Where that is
no terminal, it prints plain lines instead: when a stage starts and ends, and how far it is every `PLAIN_INTERVAL` seconds.

What is left of the run is what the plan says of the stages to come, as much longer or shorter as those were that have run, and the rest of
the running one: by its own rate once it tells one, as if it were through when its bar is. It is told where the plan has hours.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from pipeline.target import format_seconds, format_size

PLAIN_INTERVAL = 10.0  # seconds
BAR_WIDTH = 16
REFRESHES = 8  # a second
PLAN_WEIGHT = 0.1  # of a whole plan, as if so much of it had run and taken what it says: a short stage alone tells little
STYLES = {"hit": "cyan", "done": "green", "failed": "bold red", "stopped": "yellow", "running": "bold", "waiting": "yellow"}


@dataclass
class Bar:
    """A long loop inside a stage. Its rate counts from its first report, so what came before does not slow it."""

    label: str
    first: int
    since: float
    done: int
    total: int

    def remaining(self, now: float) -> float | None:
        """Seconds left at the mean rate so far; None before there is a rate."""
        gained = self.done - self.first
        return (now - self.since) * (self.total - self.done) / gained if gained > 0 else None

    @property
    def telling(self) -> bool:
        """Whether its rate says when it is through: a tenth of it has been counted, and its end is to come."""
        return 10 * (self.done - self.first) >= self.total and self.done < self.total


@dataclass
class Row:
    """One stage. `state` is open, waiting, running, hit, done, failed or stopped."""

    state: str = "open"
    started: float = 0.0
    bar: Bar | None = None
    seconds: float = 0.0
    nbytes: int = 0
    plain_next: float = 0.0
    planned: float | None = None  # seconds; None: not known

    def advance(self, label: str, done: int, total: int, now: float) -> None:
        if self.bar is None or self.bar.label != label or done < self.bar.done:
            self.bar = Bar(label, done, now, done, total)
        self.bar.done, self.bar.total = done, total

    def remaining(self, now: float, pace: float) -> float | None:
        """Seconds until it ends, where stages take `pace` times as long as planned."""
        if self.state in ("hit", "done", "failed", "stopped"):
            return 0.0
        planned = None if self.planned is None else self.planned * pace
        if self.state == "open":
            return planned
        if self.bar and self.bar.telling:
            return self.bar.remaining(now)
        return None if planned is None else max(planned - (now - self.started), 0.0)


class Display:
    """Shows a run while it goes on. `console` is standard error unless given.

    With a `label` other runs print at the same time: plain lines, each begun by it.
    """

    def __init__(self, console: Console | None = None, label: str = "") -> None:
        self.console = console or Console(stderr=True)
        self.label = f"{label} " if label else ""
        self.rows: dict[str, Row] = {}
        self.started = time.time()
        self.over = False
        self._live: Live | None = None

    def __call__(self, event: Mapping[str, Any]) -> None:
        kind, node, now = event["event"], event.get("node", ""), event["time"]
        if kind == "run_started":
            self._start(event)
        elif kind == "run_finished":
            self._finish(event)
        elif kind in ("warning", "environment"):
            self._say(kind, event["text"], now)
        elif node:
            self._of_stage(kind, node, event)

    def _start(self, event: Mapping[str, Any]) -> None:
        self.started = event["time"]
        self.rows = {node["node"]: Row(planned=0.0 if node.get("status") == "hit" else node.get("planned")) for node in event["nodes"]}
        first = next((row for row in self.rows.values() if row.planned), None)
        if first is not None and first.planned is not None:
            first.planned += event.get("starting", 0.0)  # it waits for the imports that all share
        if self.console.is_terminal and not self.console.is_dumb_terminal and not self.label:
            # Standard output is left alone: what is printed there may be on its way to another program.
            live = Live(get_renderable=self.render, console=self.console, refresh_per_second=REFRESHES, redirect_stdout=False)
            live.start()
            self._live = live

    def _finish(self, event: Mapping[str, Any]) -> None:
        for row in self.rows.values():
            if row.state in ("running", "waiting"):
                row.state, row.seconds = "stopped", event["time"] - row.started
        self.over = True
        if self._live is not None:
            self._live.stop()
            self._live = None
        else:
            self._say("run", f"{event['status']} after {format_seconds(event['seconds'])}", event["time"])

    def _of_stage(self, kind: str, node: str, event: Mapping[str, Any]) -> None:
        row, now = self.rows.setdefault(node, Row()), event["time"]
        if kind == "waiting":
            row.state, row.started = "waiting", now
            self._plain(node, "waits for another run that is computing it", now)
        elif kind == "node_started":
            row.state, row.started, row.plain_next = "running", now, now + PLAIN_INTERVAL
            self._plain(node, "started" + (f", {left} of the run" if (left := self._left(now)) else ""), now)
        elif kind == "progress":
            row.advance(event["label"], event["done"], event["total"], now)
            if now >= row.plain_next and row.bar:
                row.plain_next = now + PLAIN_INTERVAL
                self._plain(node, _progress_line(row.bar, now), now)
        elif kind == "note":
            self._say(node, event["text"], now)
        elif kind == "resumed":
            self._say(node, f"continues an interrupted attempt from {event['text']}", now)
        elif kind == "gate":
            self._say(node, event["sentence"], now)
        elif kind in ("node_hit", "node_finished"):
            row.state = "hit" if kind == "node_hit" else "done"
            row.seconds, row.nbytes = now - row.started if kind == "node_finished" else 0.0, event["nbytes"]
            took = f"done in {format_seconds(row.seconds)}" if kind == "node_finished" else "hit"
            self._plain(node, f"{took}, {format_size(row.nbytes)}", now)
        elif kind == "node_failed":
            row.state, row.seconds = "failed", now - (row.started or now)
            self._plain(node, "failed", now)  # why is the last thing the command says

    def remaining(self, now: float) -> float | None:
        """Seconds until the run ends; None where that of a stage to come is not known."""
        planned = took = PLAN_WEIGHT * sum(row.planned or 0.0 for row in self.rows.values())
        for row in self.rows.values():
            if row.state == "done" and row.planned:
                planned, took = planned + row.planned, took + row.seconds
        left = [row.remaining(now, took / planned if planned else 1.0) for row in self.rows.values()]
        return None if None in left else sum(seconds for seconds in left if seconds is not None)

    def _left(self, now: float) -> str:
        """`about 1:20 left`; empty where it is not known, or over."""
        seconds = None if self.over else self.remaining(now)
        return f"about {format_seconds(seconds)} left" if seconds else ""

    def _plain(self, node: str, text: str, now: float) -> None:
        if self._live is None:
            self._say(node, text, now)

    def _say(self, subject: str, text: str, now: float) -> None:
        """A line of its own, above the live display where there is one."""
        stamp = "" if self._live else f"[{format_seconds(now - self.started):>7}] "
        self.console.print(Text(f"{self.label}{stamp}{subject}: {text}"), soft_wrap=self._live is None)

    def render(self) -> RenderableType:
        now = time.time()
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, max_width=24, overflow="ellipsis")
        table.add_column(no_wrap=True, min_width=len("waiting"))
        table.add_column(no_wrap=True, overflow="ellipsis")
        for name, row in self.rows.items():
            dim = "dim" if row.state == "open" else ""
            state = Text("" if row.state == "open" else row.state, style=STYLES.get(row.state, ""))
            table.add_row(Text(name, style=dim), state, _detail(row, now))
        settled = sum(row.state in ("hit", "done") for row in self.rows.values())
        total = Text.assemble(_seconds(now - self.started), (f"  {left}" if (left := self._left(now)) else "", "bold"))
        table.add_row(Text("total", style="dim"), Text(f"{settled} of {len(self.rows)}", style="dim"), total)
        return table


def _detail(row: Row, now: float) -> RenderableType:
    if row.state == "hit":
        return Text(f"{'':>7}  {format_size(row.nbytes):>8}", style="dim")
    if row.state == "done":
        return Text(f"{format_seconds(row.seconds):>7}  {format_size(row.nbytes):>8}")
    if row.state not in ("running", "waiting"):
        return _seconds(row.seconds) if row.seconds else Text("")
    if row.state == "waiting":
        return Text(f"{format_seconds(now - row.started):>7}  another run is computing it")
    if row.bar is None:
        cells = Table.grid(padding=(0, 1))
        cells.add_row(_seconds(now - row.started), Spinner("line"))
        return cells
    bar = row.bar
    left = bar.remaining(now)
    cells = Table.grid(padding=(0, 1))
    for _ in range(4):
        cells.add_column(no_wrap=True, overflow="ellipsis")
    cells.add_row(
        _seconds(now - row.started),
        ProgressBar(total=max(bar.total, 1), completed=bar.done, width=BAR_WIDTH),
        Text("" if left is None or bar.done >= bar.total else f"{format_seconds(left)} left"),
        Text(f"{bar.label} {bar.done} of {bar.total}", style="dim"),
    )
    return cells


def _seconds(seconds: float) -> Text:
    return Text(f"{format_seconds(seconds):>7}", style="dim")


def _progress_line(bar: Bar, now: float) -> str:
    left = bar.remaining(now)
    return f"{bar.label} {bar.done} of {bar.total}" + (f", about {format_seconds(left)} left" if left is not None else "")
