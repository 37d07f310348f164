"""The child side of a step: ``python -m compiler.pipeline.worker <job.json>``.

The job file names the stage, the recipe, and the folders of the results it needs. The child reports on the file
descriptor named in the job, one JSON object per line: ``{"done": 3, "total": 8}`` as it goes, at the end either
``{"result": true, "peak_mib": ...}`` (the value is in ``result.json``) or ``{"error": <class>, "message": ...}``.
Standard output and error belong to the user's code and to chatty libraries: the parent sends them to the step's log.
"""

from __future__ import annotations

import ctypes
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
        except BuildEngineError as exc:
            traceback.print_exc()
            _send(report, error=type(exc).__name__, message=exc.message)
            return exc.exit_code
        except OSError as exc:
            traceback.print_exc()
            mine = exc.filename is not None and Path(os.fsdecode(exc.filename)).is_relative_to(out_dir)
            translated = from_os_error(exc, out_dir) if mine or exc.filename is None else None
            message = translated.message if translated else "".join(traceback.format_exception_only(exc)).strip()
            _send(report, error="ArtifactError" if translated else None, message=message)
            return 1
        except Exception as exc:
            traceback.print_exc()
            _send(report, error=None, message="".join(traceback.format_exception_only(exc)).strip())
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
            recipe=recipe,
            base=Path(job["base"]),
            engine=engine,
            backend=job["backend"],
            backend_reason=job["backend_reason"],
            inputs=inputs,
            out_dir=out_dir,
            threads=job["threads"],
            progress=lambda done, total: _send(report, done=done, total=total),
        )
    )


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
