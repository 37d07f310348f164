"""What a worker is asked and what it answers, as JSON; and how a worker's cost is measured.

Why /proc and not ``ru_maxrss`` alone: right after a process starts, that still holds the size of the process it was
forked from; and /proc's peak can be set back, which gives the peak of each stage.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call of one tool."""

    tool: str
    """Name of a module of ``tools``."""
    method: str
    model: str
    """The FP32 ONNX file."""
    samples: str
    """A folder that `samples.Samples` reads."""
    count: int
    """How many samples, from the first."""
    out: str
    """An empty folder."""
    batch: int = 1
    threads: int = 2
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Job:
        return cls(**json.loads(path.read_text()))


class Meter:
    """CPU seconds (user and system, of this process and the children it waited for), wall seconds and peak memory of
    each stage of a job."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self.peak_mib = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._note_peak()
        resettable, children = _reset_peak(), children_mib()
        cpu, wall = cpu_s(), time.perf_counter()
        try:
            yield
        finally:
            spent = {"cpu_s": cpu_s() - cpu, "wall_s": time.perf_counter() - wall}
            peak = self._note_peak()
            if children_mib() > children:  # that peak cannot be set back
                peak = max(peak, children_mib())
            self.stages[name] = spent | ({"peak_mib": peak} if resettable else {})

    def result(self) -> dict[str, Any]:
        self._note_peak()
        return {"stages": self.stages, "peak_mib": max(self.peak_mib, children_mib())}

    def _note_peak(self) -> float:
        peak = peak_mib()
        self.peak_mib = max(self.peak_mib, peak)
        return peak


def cpu_s() -> float:
    """Of this process and of those it has waited for, since they began."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def peak_mib() -> float:
    """The most resident memory of this process since its start or the last `_reset_peak`."""
    return _status_mib("VmHWM")


def children_mib() -> float:
    """The most resident memory of any one child that has ended and was waited for."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def rss_mib() -> float:
    return _status_mib("VmRSS")


def _status_mib(key: str) -> float:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _reset_peak() -> bool:
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True
