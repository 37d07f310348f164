"""The child side of a step: ``python -m compiler.pipeline.worker <job.json>``.

The job file names the stage, the recipe, and the folders of the results it needs. The child reports on the file
descriptor named in the job, one JSON object per line: ``{"done": 3, "total": 8}`` as it goes, at the end either
``{"result": true, "peak_mib": ...}`` (the value is in ``result.json``) or ``{"error": <class>, "message": ...}``.
Standard output and error belong to the user's code and to chatty libraries: the parent sends them to the step's log.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import msgspec

from compiler import codec
from compiler.errors import BuildEngineError, from_os_error
from compiler.recipe import Recipe

RESULT = "result.json"
_PR_SET_PDEATHSIG = 1


def main(job_file: str) -> int:
    job = json.loads(Path(job_file).read_text())
    _die_with_parent(job["parent"])
    out_dir = Path(job["out_dir"])
    with os.fdopen(job["report_fd"], "w", buffering=1) as report:
        try:
            value = _run(job, out_dir, report)
            (out_dir / RESULT).write_bytes(codec.dump(value, out_dir))
        except Exception as exc:
            error = _translated(exc, out_dir)
            # The report first: on a full disk the log is what cannot be written.
            if isinstance(error, BuildEngineError):
                _send(report, error=type(error).__name__, message=error.message)
            else:
                _send(report, error=None, message="".join(traceback.format_exception_only(error)).strip())
            with contextlib.suppress(OSError):
                traceback.print_exc()
            return 1
        _send(report, result=True, peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
    return 0


def _run(job: Mapping[str, Any], out_dir: Path, report: TextIO) -> Any:
    from compiler.pipeline import plan, steps

    recipe = msgspec.convert(job["recipe"], Recipe)
    inputs: dict[str, Any] = {}
    for name, given in job["inputs"].items():
        folder = Path(given["folder"])
        inputs[name] = codec.load((folder / RESULT).read_bytes(), plan.STAGES[given["stage"]].result, folder)
    engine = next((engine for engine in recipe.engines if engine.label == job["engine"]), None)
    return steps.RUN[job["stage"]](
        steps.Job(
            stage=job["stage"],
            key=job["key"],
            recipe=recipe,
            base=Path(job["base"]),
            engine=engine,
            backend=job["backend"],
            backend_reason=job["backend_reason"],
            inputs=inputs,
            out_dir=out_dir,
            caches=Path(job["caches"]),
            threads=job["threads"],
            progress=lambda done, total: _send(report, done=done, total=total),
        )
    )


def _translated(exc: Exception, out_dir: Path) -> Exception:
    """``exc``, or what it comes to where the disk is full or the step's folder cannot be written."""
    seen: BaseException | None = exc
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return from_os_error(seen, out_dir)
        seen = seen.__cause__ or seen.__context__
    if isinstance(exc, OSError) and exc.filename is not None:
        written = Path(os.fsdecode(exc.filename))
        return from_os_error(exc, out_dir) if written.is_relative_to(out_dir) else exc
    return exc


def _send(report: TextIO, **event: Any) -> None:
    report.write(json.dumps(event) + "\n")


def _die_with_parent(parent: int) -> None:
    """A child never outlives a parent that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
