"""Run a child and end it where it takes too much memory or time: a reason instead of a dead machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT_MIB = 12 * 1024
POLL_S = 0.1
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a child ended; ``reason`` is None where it ended by itself with exit code 0."""

    reason: str | None
    peak_mib: float
    """The most resident memory of the child and its descendants together that was seen, every `POLL_S`."""


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    log: Path,
    limit_mib: float = LIMIT_MIB,
    limit_s: float = 1800.0,
) -> Ended:
    """Run ``command``, its output in ``log``, in a process group of its own."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
        )
        peak, reason = 0.0, None
        ends = time.monotonic() + limit_s
        try:
            while child.poll() is None:
                peak = max(peak, tree_mib(child.pid))
                if peak > limit_mib:
                    reason = f"out of memory: more than {limit_mib / 1024:.3g} GiB"
                    break
                if time.monotonic() > ends:
                    reason = f"took longer than {limit_s:.0f} s"
                    break
                time.sleep(POLL_S)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    if reason is None and child.returncode:
        reason = f"died with exit code {child.returncode}: {_last_line(log)}"
    return Ended(reason=reason, peak_mib=peak)


def tree_mib(pid: int) -> float:
    """Resident memory of a process and its descendants, shared pages counted for each."""
    total, waiting = 0, [pid]
    while waiting:
        process = Path("/proc") / str(waiting.pop())
        try:
            total += int((process / "statm").read_text().split()[1]) * _PAGE
            for task in (process / "task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except (OSError, IndexError):  # it has just ended
            continue
    return total / 2**20


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "no output"
