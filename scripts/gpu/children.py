"""A process for every part: native code crashes, hangs and poisons its CUDA context.

A child that dies costs what it was measuring; its parent loads nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from scripts.gpu.missing import Emit, Json, finite

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "scripts.gpu.main")
LEAST_S = 5.0
"""With less time left than this, nothing new is begun."""
LAST_LINES = 15


class Deadline:
    """How much time is left."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s, self._clock = limit_s, clock
        self._end = clock() + limit_s

    def left(self) -> float:
        return self._end - self._clock()

    def part(self, share: float) -> Deadline:
        """A deadline after this share of the time that is left."""
        return Deadline(max(0.0, self.left()) * share, self._clock)


def child_main(measure: Callable[[Json, Emit], None], job: Json, descriptor: int) -> None:
    """Measure one part; every report goes down the pipe as a line of JSON."""
    with os.fdopen(descriptor, "w") as pipe:

        def send(line: Json) -> None:
            pipe.write(json.dumps(line) + "\n")
            pipe.flush()

        measure(job, lambda value: send({"value": finite(value)}))
        send({"done": True})


def run_child(job: Json, limit_s: float, on_value: Emit, *, command: Sequence[str] = COMMAND) -> str | None:
    """Measure one part in a process of its own; None, or why it did not come to its end.

    What the process and its libraries print is kept only where it dies, its last lines in the reason.
    """
    if limit_s < LEAST_S:
        return "the limit of the run was reached before it began"
    reader, writer = os.pipe()
    job = job | {"limit_s": limit_s * 0.95}
    done = late = False
    with tempfile.TemporaryFile() as printed:
        child = subprocess.Popen(
            [*command, "--child", json.dumps(job), "--pipe", str(writer)],
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            pass_fds=[writer],
            cwd=ROOT,
        )
        os.close(writer)
        try:
            for line in _lines(reader, child, time.monotonic() + limit_s):
                report = json.loads(line)
                done = done or "done" in report
                if "value" in report:
                    on_value(report["value"])
        except TimeoutError:
            late = True
        finally:
            os.close(reader)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0 if late else 5)
            if child.poll() is None:
                _end(child)
        if done:
            return None
        if late:
            return f"stopped at its limit of {limit_s:.0f} s"
        printed.seek(0)
        words = printed.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:]
        return f"its process ended with {_ending(child.returncode)}" + (": " + " | ".join(words) if words else "")


def _lines(reader: int, child: subprocess.Popen[bytes], end: float) -> Iterator[bytes]:
    """What the child writes until it ends; a grandchild may hold the pipe open for longer.

    Raises:
        TimeoutError: at ``end``, by the monotonic clock.
    """
    rest = b""
    while True:
        ended = child.poll() is not None
        left = end - time.monotonic()
        if select.select([reader], [], [], 0 if ended else max(0.0, min(0.5, left)))[0]:
            chunk = os.read(reader, 1 << 20)
            if not chunk:
                return
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
        elif ended:
            return
        elif left <= 0:
            raise TimeoutError


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _ending(code: int) -> str:
    """
    >>> _ending(3), _ending(-11)
    ('exit code 3', 'SIGSEGV')
    """
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
