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
from compiler.spec import Explanation

_TITLES = {
    "data": "read the data",
    "export": "export to ONNX",
    "reference": "run the original",
    "search": "search for the best mix",
    "optimize": "optimise the graph",
    "observe": "calibrate",
    "quantize": "convert",
    "explain": "explain",
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
    for search in content.get("searches", ()):
        _show_search(console, search)
    for engine in content["engines"]:
        for gate in engine["gates"]:
            if gate["outcome"] != "pass":
                style = STYLES[gate["outcome"]]
                console.print(Text.assemble((f"{gate['outcome']}: ", style), f"{engine['name']}: {gate['reason']}"))
    for failure in content["failures"]:
        console.print(Text.assemble(("failed: ", "bold red"), f"{failure['engine']}: {failure['message']}"))


def _show_search(console: Console, search: Mapping[str, Any]) -> None:
    """The points of a search that no other beats, what was chosen and why."""
    headings, rows = report.search_table(search)
    table = Table(
        box=None, pad_edge=False, header_style="bold", title=f"search for {search['engine']}", title_justify="left"
    )
    for heading in headings:
        table.add_column(heading, overflow="fold", justify="left" if heading in ("precision", "found") else "right")
    for row in rows:
        table.add_row(*row, style="bold" if row[-1].startswith("chosen") else "")
    console.print()
    console.print(table)
    for line in report.search_lines(search):
        console.print(line)
    console.print()


_EXPLAINED_WIDTH = 110
"""Columns that an explanation takes at most."""
_EXPLAINED_ROWS = 15
_NAME_WIDTH = 28


def show_explanation(console: Console, explanation: Explanation) -> None:
    """The tensors that add most of the error, what is left of them in a line, and the changes that would help most."""
    name = explanation.engine
    label = name if name == explanation.precision else f"{name} ({explanation.precision})"

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), width=min(console.width, _EXPLAINED_WIDTH), soft_wrap=False)

    if explanation.failure:
        say(f"{label}: not explained: {explanation.failure}", "yellow")
        return
    which = "calibration samples that set no range" if explanation.fresh else "calibration samples"
    outputs = ", ".join(f"{output} {_db(db)}" for output, db in explanation.outputs_db.items())
    say(f"{label}: SQNR against FP32 on {explanation.samples} {which}: {outputs or 'no float output'}", "bold")
    for note in explanation.notes:
        say(f"note: {note}", "dim")
    adding = [tensor for tensor in explanation.tensors if tensor.share > 0]
    if not adding:
        rounded = any(tensor.rounded or tensor.layer for tensor in explanation.tensors)
        say("Lossless: " + ("what is rounded changes no output." if rounded else "nothing is rounded."), "green")
        return
    table = Table(box=None, pad_edge=False, header_style="bold", width=min(console.width, _EXPLAINED_WIDTH))
    table.add_column("tensor", max_width=_NAME_WIDTH, overflow="fold")
    table.add_column("made by", max_width=14, overflow="fold")
    for heading in ("share", "SQNR dB", "added dB", "clipped"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold", ratio=1)
    for tensor in adding[:_EXPLAINED_ROWS]:
        clipped = f"{100 * tensor.clipped:.2g} %" if tensor.clipped else ""
        decibels = [f"{db:.1f}" if db is not None else "exact" for db in (tensor.sqnr_db, tensor.added_db)]
        table.add_row(tensor.name, tensor.op, f"{100 * tensor.share:.1f} %", *decibels, clipped, tensor.reason)
    console.print(table)
    others = adding[_EXPLAINED_ROWS:]
    rest = f"{len(others)} more tensors add {100 * sum(tensor.share for tensor in others):.1f} %; " if others else ""
    clipping = sum(tensor.clipped > 0 for tensor in explanation.tensors)
    activations = sum(tensor.rounded for tensor in explanation.tensors)
    layers = sum(tensor.layer for tensor in explanation.tensors)
    say(f"{rest}{layers} layers with rounded weights, {activations} rounded activations, {clipping} of them clip.")
    say(
        "share: of the outputs' noise; SQNR: with the errors of all before; added: by what is rounded here alone.",
        "dim",
    )
    if not explanation.advice:
        say("No single change of the recipe would help by 0.1 dB or more.")
    for place, advice in enumerate(explanation.advice, start=1):
        say(f"\n{place}. {advice.change}: about {advice.gain_db:+.1f} dB")
        for line in advice.lines:
            # Lines to paste are not broken.
            console.print(Text(f"     {line}", style="cyan"), soft_wrap=True)
    console.print()


def _db(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"
