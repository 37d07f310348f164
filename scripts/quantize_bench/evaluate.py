"""The answers of files to the evaluation samples, one sample at a time (scales that are chosen at run time depend on what
else is in the batch): ``python -m quantize_bench.evaluate job.json result.json``.

The job: ``samples``, ``limit``, ``threads``, ``candidates`` (name, path, runtime, options, out). Answers go to ``out``, an .npz.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .runners import open_runner
from .samples import Samples


def evaluate(job: dict[str, Any], candidate: dict[str, Any]) -> None:
    import numpy as np

    call = open_runner(candidate["path"], candidate["runtime"], threads=job["threads"], options=candidate["options"])
    answers: dict[str, list[Any]] = {}
    for feeds in Samples(job["samples"], job.get("limit")):
        for name, value in call(feeds).items():
            answers.setdefault(name, []).append(np.array(value, copy=True))
    arrays: dict[str, Any] = {name: np.concatenate(values) for name, values in answers.items()}
    np.savez(candidate["out"], **arrays)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    found: dict[str, str | None] = {}
    for candidate in job["candidates"]:
        try:
            evaluate(job, candidate)
            found[candidate["name"]] = None
        except Exception as exc:
            found[candidate["name"]] = f"{type(exc).__name__}: {str(exc).strip().splitlines()[0][:200]}"
        Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
