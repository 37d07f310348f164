"""What a build costs: wall time cold, unchanged and with one gate changed; peak memory; the time until --help and --plan.

    .venv/bin/python scripts/bench_pipeline.py [recipes/digits.toml ...]

Cold is one run into an empty store (an hour of repeats would not make it more useful); the rest are medians of 5.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 5


def run(*args: str, store: str) -> tuple[float, int]:
    """Seconds and exit code of one ``build-engine`` command."""
    began = time.perf_counter()
    done = subprocess.run(
        [str(ROOT / "scripts/build-engine"), *args],
        env={**os.environ, "BUILD_ENGINE_CACHE": store},
        capture_output=True,
    )
    return time.perf_counter() - began, done.returncode


def median(*args: str, store: str) -> float:
    return statistics.median(run(*args, store=store)[0] for _ in range(REPEATS))


def main() -> None:
    recipes = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "recipes").glob("*.toml"))
    print(
        f"{'recipe':<12}{'exit':>5}{'cold s':>9}{'unchanged s':>13}{'new gate s':>12}{'--plan s':>10}{'peak MiB':>10}  in step"
    )
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as scratch:
            store, output = f"{scratch}/store", f"{scratch}/dist"
            asked = [str(recipe), "--output", output]
            cold, code = run(*asked, store=store)
            unchanged = median(*asked, store=store)
            plan = median(*asked, "--plan", store=store)
            judged = run(*asked, "--set", "gates.0.confidence=0.94", store=store)[0]
            report = json.loads(next(Path(output).glob("*/report.json")).read_bytes())
            top = max(report["steps"], key=lambda step: step["peak_mib"] or 0)
            print(
                f"{recipe.stem:<12}{code:>5}{cold:>9.1f}{unchanged:>13.2f}{judged:>12.2f}{plan:>10.2f}"
                f"{top['peak_mib']:>10}  {top['id']}",
                flush=True,
            )
    with tempfile.TemporaryDirectory() as scratch:
        print(f"--help: {median('--help', store=scratch):.2f} s through the script")


if __name__ == "__main__":
    main()
