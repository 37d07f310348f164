"""Rows as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .accuracy import MEASURES
from .cases import Bar, Case
from .rows import GB_PER_MIB, Row

_COLUMNS: Mapping[str, tuple[str, str]] = {
    "cosine": ("cosine", "{:.5f}"),
    "retrieval_top1": ("top-1 retrieval", "{:.1%}"),
    "sqnr_db": ("SQNR dB", "{:.1f}"),
    "top1_agreement": ("top-1 agree", "{:.1%}"),
    "ratio_b1": ("x FP32 b1", "{:.3f}"),
    "ratio_b8": ("x FP32 b8", "{:.3f}"),
    "best_ratio_b1": ("shortest b1", "{:.3f}"),
    "best_ratio_b8": ("shortest b8", "{:.3f}"),
    "own_ratio_b1": ("x our FP32 b1", "{:.3f}"),
    "own_ratio_b8": ("x our FP32 b8", "{:.3f}"),
    "cpu_s": ("CPU s", "{:.1f}"),
    "wall_s": ("wall s", "{:.1f}"),
    "import_cpu_s": ("import s", "{:.1f}"),
    "plain_cpu_s": ("plain infer CPU s", "{:.1f}"),
    "peak_gb": ("peak GB", "{:.2f}"),
    "rss_before_gb": ("before GB", "{:.2f}"),
    "size_ratio": ("size x", "{:.2f}"),
}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are as wide as they must be.

    >>> print(markdown(["a", "bb"], [["1", "2"], ["x | y", ""]]))
    | a      | bb |
    |--------|----|
    | 1      | 2  |
    | x \\| y |    |
    """
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def of_case(case: Case, rows: Sequence[Row]) -> str:
    """Every row of a model: the columns that any row has a number for, and why numbers are missing."""
    used = {key for row in rows for key, value in row.numbers.items() if not math.isnan(value)}
    used -= MEASURES.keys() - set(case.accuracy)
    columns = {key: column for key, column in _COLUMNS.items() if key in used}
    reasons = any(row.reason for row in rows)
    header = ["tool", "method", "N", *(title for title, _ in columns.values()), *(["what failed"] if reasons else [])]
    ordered = sorted(rows, key=lambda row: (row.tool != "ours", row.tool, row.method, row.count))
    body = [
        [
            f"{row.tool} {row.version}".strip(),
            row.method,
            str(row.count),
            *(shown(row.numbers.get(key), form) for key, (_, form) in columns.items()),
            *([row.reason or ""] if reasons else []),
        ]
        for row in ordered
    ]
    return f"### {case.name}: {case.what}\n\n" + markdown(header, body)


def of_stages(rows: Sequence[Row]) -> str:
    """Where our own time and memory go: CPU seconds, and the peak, of each stage of each row."""
    body = [
        [
            row.method,
            str(row.count),
            name.partition(":")[0],
            f"{stage['cpu_s']:.1f}",
            f"{stage['wall_s']:.1f}",
            shown(stage["peak_mib"] * GB_PER_MIB if "peak_mib" in stage else None, "{:.2f}"),
        ]
        for row in sorted(rows, key=lambda row: (row.method, row.count))
        if row.tool == "ours" and row.method in ("auto", "mse", "int8", "int4")
        for name, stage in row.stages.items()
        if name != "source"
    ]
    return markdown(["ours", "N", "stage", "CPU s", "wall s", "peak GB"], body) if body else ""


def of_bars(case: Case, rows: Sequence[Row]) -> str:
    """Each bar with the best peer at the same number of samples, ours, and whether ours meets it."""
    body = []
    for bar in case.bars:
        ours = _ours(bar, case, rows)
        value = ours.numbers.get(bar.number) if ours is not None else None
        verdict = "not measured" if value is None or math.isnan(value) else "met" if bar.met(value) else "**missed**"
        body.append([bar.text, best_peer(bar, case, rows), shown(value, _form(bar.number)), verdict])
    return markdown(["bar", "best peer", "ours", ""], body) if body else ""


def best_peer(bar: Bar, case: Case, rows: Sequence[Row]) -> str:
    """``value (tool method; its accuracy)``: speed that costs the accuracy is no feat, so both are shown."""
    count = bar.count or _main_count(case, rows)
    peers = [
        row
        for row in rows
        if row.tool != "ours" and row.count == count and not math.isnan(row.numbers.get(bar.number, math.nan))
    ]
    if not peers:
        return "none"
    pick = max if bar.at_least else min
    best = pick(peers, key=lambda row: row.numbers[bar.number])
    first = case.accuracy[0]
    beside = (
        "" if bar.number == first else f"; {_COLUMNS[first][0]} {shown(best.numbers.get(first), _COLUMNS[first][1])}"
    )
    return f"{shown(best.numbers[bar.number], _form(bar.number))} ({best.name}{beside})"


def _ours(bar: Bar, case: Case, rows: Sequence[Row]) -> Row | None:
    count = bar.count or _main_count(case, rows)
    return next((row for row in rows if row.tool == "ours" and row.method == bar.method and row.count == count), None)


def _main_count(case: Case, rows: Sequence[Row]) -> int:
    """The case's own, or, where that was not asked for, the largest that was."""
    counts = {row.count for row in rows}
    return case.main_count if case.main_count in counts or not counts else max(counts)


def _form(number: str) -> str:
    return _COLUMNS[number][1] if number in _COLUMNS else "{:.1%}" if number == "peak_growth" else "{:.2f}"


def shown(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None or math.isnan(value) else form.format(value)
