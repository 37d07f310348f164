"""What a person sees while a build runs and when it ends. Everything here goes to standard error; see `session`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from compiler import report
from compiler.pipeline.plan import Plan, Step
from compiler.pipeline.run import StepRecord

_TITLES = {
    "data": "read the data",
    "export": "export to ONNX",
    "reference": "run the original",
    "reference_to_select": "run the original to select",
    "search": "search for the best mix",
    "optimize": "optimise the graph",
    "observe": "calibrate",
    "quantize": "convert",
    "build": "build",
    "stand_in": "build stand-in",
    "accuracy": "score",
    "latency": "time",
}
STYLES = {"pass": "green", "fail": "bold red", "inconclusive": "yellow", "deferred": "cyan"}


def title(step: Step) -> str:
    """A step in words: ``build int8``."""
    return f"{_TITLES[step.stage]} {step.engine}" if step.engine else _TITLES[step.stage]


class ConsoleWatcher:
    """A bar per running step on a terminal, a line per finished step anywhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[counted]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> ConsoleWatcher:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def started(self, step: Step) -> None:
        self._task = self._bars.add_task(f"{title(step):<24}", total=None, counted="")

    def progressed(self, _step: Step, done: int, total: int) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total, counted=f"{done}/{total}")

    def finished(self, step: Step, record: StepRecord) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        if record.error is not None:
            mark, detail = Text("✗", style="bold red"), "failed"
        elif record.hit:
            mark, detail = Text("=", style="dim"), "from the store"
        else:
            memory = f"  {record.peak_mib:,} MiB" if record.peak_mib else ""
            mark, detail = Text("✓", style="green"), f"{record.seconds:6.1f} s{memory}"
        self._console.print(Text.assemble(mark, f" {title(step):<24} ", (detail, "dim")))

    def waiting(self, holder: str) -> None:
        self._console.print(Text(f"  waiting for another build ({holder}) that runs the same step", style="dim"))


_FULL_WIDTH = 120
"""Columns that the table of engines needs on one line per row; a file or a pipe gets them."""


def make(file: TextIO | None = None) -> Console:
    """A console on standard error, or on ``file``. Brackets in what it prints are brackets, not markup."""
    file = file or sys.stderr
    return Console(file=file, highlight=False, markup=False, width=None if file.isatty() else 2 * _FULL_WIDTH)


def show_plan(console: Console, plan: Plan, hits: Mapping[str, bool]) -> None:
    """Every step with its key and whether the store has it."""
    table = Table(box=None, pad_edge=False)
    for heading in ("step", "store", "key", "needs"):
        table.add_column(heading, overflow="fold")
    for step in plan.steps:
        state = Text("hit", style="green") if hits[step.id] else Text("miss", style="yellow")
        table.add_row(step.id, state, step.key[:16], ", ".join(dict.fromkeys(step.needs.values())))
    console.print(table)


def show_report(console: Console, content: Mapping[str, Any]) -> None:
    """The table of engines, then every gate that did not pass."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    rows = report.table(content, separator=" " if console.width >= _FULL_WIDTH else "\n")
    for heading in report.HEADINGS:
        table.add_column(heading, overflow="fold", justify="left" if heading in ("engine", "verdict") else "right")
    for row in rows:
        *cells, verdict = row
        table.add_row(*cells, Text(verdict, style=STYLES.get(verdict, "")))
    console.print()
    console.print(table)
    for engine in content["engines"]:
        for gate in engine["gates"]:
            if gate["outcome"] != "pass":
                style = STYLES[gate["outcome"]]
                console.print(Text.assemble((f"{gate['outcome']}: ", style), f"{engine['name']}: {gate['reason']}"))
    for failure in content["failures"]:
        console.print(Text.assemble(("failed: ", "bold red"), f"{failure['engine']}: {failure['message']}"))
