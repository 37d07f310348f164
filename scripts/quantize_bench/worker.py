"""One call of one tool in a process of its own: ``python -m quantize_bench.worker job.json result.json``.

The answer: cost of each stage, peak memory, memory before the call, the files made, or the error.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from .jobs import Job, Meter, rss_mib


def main() -> None:
    job, answer = Job.read(Path(sys.argv[1])), Path(sys.argv[2])
    meter = Meter()
    result: dict[str, Any] = {}
    try:
        with meter.stage("import"):
            tool = importlib.import_module(f"{__package__}.tools.{job.tool}")
            tool.load()
        result["rss_before_mib"] = rss_mib()
        result |= tool.run(job, meter)
    except Exception as exc:
        traceback.print_exc()
        result["error"] = _one_line(exc)
    answer.write_text(json.dumps(result | meter.result()))


def _one_line(exc: BaseException) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return f"{type(exc).__name__}: {lines[0][:200] if lines else ''}"


if __name__ == "__main__":
    main()
