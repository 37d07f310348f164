"""Our quantisation beside that of other tools, each in an environment of its own, on the same FP32 files and samples.

    .venv/bin/python scripts/bench_quantize.py [--models minilm,digits] [--tools ours,ort,nncf] [--json results.json]

One Markdown table for each model: accuracy against FP32, latency as a ratio to ONNX Runtime's FP32 (all in turns, in one
process), CPU seconds and peak memory of quantising; then each bar with the best peer and ours. What cannot be installed,
fails or takes too much memory is a row with the reason. Peers' results are kept in the work folder by tool version,
arguments and model; latency is always measured again. The first run installs about 5 GB and takes an hour or two; a
run of ``--tools ours`` takes minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import platformdirs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.quantize_bench import environments, table, watch
from scripts.quantize_bench.bench import Bench, Settings
from scripts.quantize_bench.cases import CASES, ROOT

OWN_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnx", "onnx-ir", "numpy", "torch", "transformers")


def main() -> None:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that children are ended, too
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        work=work,
        tools=tuple(arguments.tools.split(",")),
        counts=tuple(int(count) for count in arguments.samples.split(",")) if arguments.samples else (),
        repeats=arguments.repeats,
        rounds=arguments.rounds,
        skip=frozenset(arguments.skip.split(",")),
        evaluation=arguments.evaluation,
        threads=arguments.threads,
        compiler=arguments.compiler.resolve(),
        limit_mib=arguments.limit_gib * 1024,
    )
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.0f} s  {text}", file=sys.stderr, flush=True)

    bench = Bench(settings, say)
    report: dict[str, Any] = {"models": {}}
    for name in arguments.models.split(","):
        case = CASES[name]
        try:
            rows = bench.rows(case)
        except RuntimeError as exc:
            print(f"### {name}\n\nNot measured: {exc}\n", flush=True)
            report["models"][name] = {"reason": str(exc)}
            continue
        found = [table.of_case(case, rows), table.of_bars(case, rows), table.of_stages(rows)]
        report["models"][name] = {"rows": [vars(row) for row in rows]}
        report["models"][name]["facts"] = dict(bench.prepared(case).facts)
        print("\n\n".join(part for part in found if part), end="\n\n", flush=True)
    report |= _circumstances(bench)
    print("\n".join(f"- {line}" for line in _told(report)))
    if arguments.json is not None:
        text = json.dumps(_plain(report), indent=1).replace(str(work), "WORK").replace(str(ROOT), ".")
        arguments.json.write_text(text.replace(str(Path.home()), "~"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default=",".join(CASES), help="default: %(default)s")
    parser.add_argument("--tools", default=",".join(("ours", *environments.RECIPES)), help="default: %(default)s")
    parser.add_argument("--skip", default="", help="methods to leave out, e.g. ort:entropy,modelopt:entropy")
    parser.add_argument("--evaluation", type=int, help="judge on this many evaluation samples only; default: all")
    parser.add_argument("--samples", help="calibration samples, e.g. 32,128; default: each model's own counts")
    parser.add_argument("--repeats", type=int, default=1, help="runs of our cost rows; the median counts")
    parser.add_argument("--rounds", type=int, default=25, help="rounds in which latencies are taken in turns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiler", type=Path, default=ROOT, help="a folder with our package; default: this tree")
    parser.add_argument("--limit-gib", type=float, default=watch.LIMIT_MIB / 1024, help="a worker is ended above this")
    parser.add_argument("--work", type=Path, default=platformdirs.user_cache_path("build-engine") / "bench-quantize")
    parser.add_argument("--json", type=Path, help="write everything there, with exact versions")
    return parser.parse_args()


def _circumstances(bench: Bench) -> dict[str, Any]:
    own = {}
    for name in OWN_PACKAGES:
        try:
            own[name] = version(name)
        except ImportError:
            continue
    own["compiler"] = f"sources {bench.compiler.name}"
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {"ours": own}
        | {
            tool: dict(found.versions) if isinstance(found, environments.Environment) else {"missing": found.reason}
            for tool, found in bench.environments.items()
        },
        "command": " ".join(["python", "scripts/bench_quantize.py", *map(_without_folder, sys.argv[1:])]),
    }


def _told(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{report['date']}; {report['cpu']}, {report['cores']} cores; Python {report['python']}",
        f"ours: {', '.join(f'{name} {value}' for name, value in report['versions']['ours'].items())}",
    ]
    for tool, versions in report["versions"].items():
        if tool == "ours":
            continue
        shown = [name for name in _SHOWN if name in versions]
        lines.append(f"{tool}: " + (versions.get("missing") or ", ".join(f"{name} {versions[name]}" for name in shown)))
    return [*lines, f"`{report['command']}`"]


_SHOWN = (
    *("nncf", "openvino", "nvidia-modelopt", "optimum-onnx", "optimum", "olive-ai"),
    *("onnxruntime", "onnx", "torch", "transformers", "numpy"),
)


def _without_folder(argument: str) -> str:
    """An absolute path tells of this machine, not of the benchmark."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    """``value`` as JSON knows it: no NaN, no infinity."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    main()
