"""One row of the benchmark: a tool's method on a model with a number of samples, with what was measured, or why not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

UNCOUNTED = ("import", "source", "open")
"""Stages that are the benchmark's or the interpreter's, not the tool's."""

GB_PER_MIB = 2**20 / 1e9


@dataclass(kw_only=True)
class Row:
    tool: str
    method: str
    count: int
    version: str = ""
    reason: str | None = None
    """Why there are no numbers, or not all of them."""
    file: str | None = None
    runtime: str = "onnxruntime"
    options: dict[str, Any] = field(default_factory=dict)
    """How ``runtime`` opens the file."""
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.tool} {self.method}"


def cost(outcome: Mapping[str, Any], method: str) -> dict[str, float]:
    """CPU and wall seconds, and peak memory, of one method of an outcome; stages of other methods (``quantize:other``)
    are left out.

    >>> stages = {"import": {"cpu_s": 9, "wall_s": 9}, "observe": {"cpu_s": 2, "wall_s": 1, "peak_mib": 1000},
    ...           "quantize:auto": {"cpu_s": 1, "wall_s": 1, "peak_mib": 500}, "quantize:mse": {"cpu_s": 7, "wall_s": 7}}
    >>> found = cost({"stages": stages, "peak_mib": 4000}, "auto")
    >>> found["cpu_s"], found["wall_s"], found["import_cpu_s"], round(found["peak_gb"], 2)
    (3, 2, 9, 1.05)
    """
    own = stages_of(outcome, method)
    counted = [stage for name, stage in own.items() if name not in UNCOUNTED]
    measured = {
        "cpu_s": sum(stage["cpu_s"] for stage in counted),
        "wall_s": sum(stage["wall_s"] for stage in counted),
        "import_cpu_s": outcome.get("stages", {}).get("import", {}).get("cpu_s", math.nan),
        "calibrate_cpu_s": sum(
            stage["cpu_s"]
            for name, stage in own.items()
            if name not in UNCOUNTED and name.partition(":")[0] not in ("optimize", "build")
        ),
    }
    peaks = [stage["peak_mib"] for name, stage in own.items() if name != "source" and "peak_mib" in stage]
    # Where the kernel lets no peak be set back, only that of the whole process is known.
    measured["peak_gb"] = (max(peaks) if peaks else outcome.get("peak_mib", math.nan)) * GB_PER_MIB
    measured["rss_before_gb"] = outcome.get("rss_before_mib", math.nan) * GB_PER_MIB
    return {key: value for key, value in measured.items() if not math.isnan(value)}


def stages_of(outcome: Mapping[str, Any], method: str) -> dict[str, dict[str, float]]:
    stages: Mapping[str, dict[str, float]] = outcome.get("stages", {})
    own = {name: stage for name, stage in stages.items() if ":" not in name or name.partition(":")[2] == method}
    if f"quantize:{method}" not in own and f"build:{method}" in own:
        own.pop("observe", None)  # built as it is: nothing was calibrated
    return own


def derive(row: Row, *, plain_cpu_s: float, model_bytes: int) -> None:
    """What follows from a row's numbers and plain inference of the same samples."""
    numbers = row.numbers
    for factor in (1, 1.5):
        numbers[f"beyond_{factor:g}x_s"] = numbers.get("calibrate_cpu_s", math.nan) - factor * plain_cpu_s
    numbers["plain_cpu_s"] = plain_cpu_s
    peak_gb = numbers.get("peak_gb", math.nan)
    numbers["peak_over_model_gb"] = peak_gb - model_bytes / 1e9
    numbers["peak_over_weights"] = peak_gb / (model_bytes / 1e9)
    if "size_bytes" in numbers:
        numbers["size_ratio"] = numbers["size_bytes"] / model_bytes


def grow(rows: Iterable[Row]) -> None:
    """``peak_growth``: the peak of a row against that of the same method with the fewest samples, less 1. The row with
    the fewest has none: against itself nothing grows."""
    least: dict[str, Row] = {}
    rows = [row for row in rows if "peak_gb" in row.numbers]
    for row in sorted(rows, key=lambda row: row.count):
        first = least.setdefault(row.name, row)
        if row is not first:
            row.numbers["peak_growth"] = row.numbers["peak_gb"] / first.numbers["peak_gb"] - 1
