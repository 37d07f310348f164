"""One set of records, several readers: `assemble` for machines (``report.json``), `markdown` for people, `table` for both.

Everything shown is a value of the records; nothing is computed here but formatting, so that no two readers disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from compiler.spec import DataSets, Engine, Latencies, Outcome, Platform, Scores, Speed, Verdict

SCHEMA = 1
HEADINGS = (
    "engine",
    "MiB",
    "metric",
    "drop or bounds",
    "batch",
    "p50 ms",
    "p99 ms",
    "speed-up",
    "verdict",
)


def assemble(
    *,
    name: str,
    run_key: str,
    outcome: Outcome,
    finished: str,
    engines: Sequence[Engine],
    original: Mapping[str, Any],
    scores: Mapping[str, Scores],
    latencies: Latencies | None,
    speeds: Sequence[Speed],
    verdicts: Sequence[Verdict],
    data: DataSets,
    platform: Platform,
    steps: Sequence[Mapping[str, Any]],
    failures: Mapping[str, str],
) -> dict[str, Any]:
    """Plain values for ``report.json``.

    Args:
        name: the recipe's.
        run_key: `compiler.pipeline.plan.Plan.run_key`.
        outcome: the worst of the verdicts.
        finished: ISO 8601, UTC.
        engines: those that were built.
        original: what is known of the original: ``onnx_bytes``, ``opset``, ``notes``.
        scores: by engine name.
        latencies: raw samples of the one interleaved run.
        speeds: their summaries, original and control included.
        verdicts: one per engine.
        data: the two sets.
        platform: where all this ran.
        steps: what each step cost.
        failures: engine name -> why it was not built, with ``--keep-going``.
    """
    by_engine = {verdict.engine: verdict for verdict in verdicts}
    return {
        "schema": SCHEMA,
        "name": name,
        "outcome": outcome.value,
        "run_key": run_key,
        "finished": finished,
        "platform": _plain(platform),
        "original": {
            **original,
            "speeds": [_plain(s) for s in speeds if s.candidate in ("eager", "compile", "control")],
        },
        "data": {
            "calibration": _set(data.calibration),
            "validation": _set(data.validation),
            "notes": list(data.notes),
        },
        "engines": [
            {
                "name": engine.name,
                "precision": engine.precision.value,
                "backend": engine.backend,
                "backend_reason": engine.backend_reason,
                "sha256": engine.sha256,
                "size_bytes": engine.size_bytes,
                "build_s": engine.build_s,
                "options": dict(engine.options),
                "notes": list(engine.notes),
                "outcome": by_engine[engine.name].outcome.value,
                "gates": [_plain(gate) for gate in by_engine[engine.name].gates],
                "scores": [_plain(score) for score in scores[engine.name].scores],
                "bad_samples": list(scores[engine.name].bad_samples),
                "speeds": [_plain(speed) for speed in speeds if speed.candidate == engine.name],
            }
            for engine in engines
        ],
        "latency": None if latencies is None else _plain(latencies),
        "steps": [dict(step) for step in steps],
        "failures": [{"engine": engine, "message": message} for engine, message in failures.items()],
    }


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value, enc_hook=lambda path: Path(path).name)


def _set(data: Any) -> dict[str, Any] | None:
    return None if data is None else {"samples": data.samples, "sha256": data.sha256}


def table(report: Mapping[str, Any], *, separator: str = " ") -> list[list[str]]:
    """Rows under `HEADINGS`: the original first, then every engine; one row per batch size that was timed.

    ``separator`` stands between a value and its bounds.
    """
    original = report["original"]
    size = f"{original['onnx_bytes'] / 2**20:.2f}"
    rows = [
        [f"original ({speed['candidate']})", size, "", "", *_speed_cells(speed, separator), ""]
        for speed in original["speeds"]
        if speed["candidate"] != "control"
    ]
    for engine in report["engines"]:
        label = engine["name"] if engine["name"] == engine["precision"] else f"{engine['name']} ({engine['precision']})"
        lead = [label, f"{engine['size_bytes'] / 2**20:.2f}", *_main_score(engine, separator)]
        speeds = engine["speeds"] or [None]
        for index, speed in enumerate(speeds):
            cells = _speed_cells(speed, separator) if speed else ["", "", "", ""]
            rows.append([*(lead if index == 0 else [""] * len(lead)), *cells, engine["outcome"] if index == 0 else ""])
    return rows


def _speed_cells(speed: Mapping[str, Any], separator: str) -> list[str]:
    ratio = ""
    if speed["speedup"] is not None:
        ratio = f"{speed['speedup']:.2f}x"
        if speed["speedup_low"] is not None:
            ratio += f"{separator}[{speed['speedup_low']:.2f}, {speed['speedup_high']:.2f}]"
    return [str(speed["batch"]), _ms(speed["p50_ms"]), _ms(speed["p99_ms"]), ratio]


def _ms(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _main_score(engine: Mapping[str, Any], separator: str) -> tuple[str, str]:
    """The metric that the first accuracy gate is about, else the first score; and what the gate found, with its bounds."""
    scores = {score["metric"]: score for score in engine["scores"]}
    gate = next((gate for gate in engine["gates"] if gate["metric"] in scores), None)
    name = gate["metric"] if gate else next(iter(scores), None)
    if name is None:
        return "", ""
    metric = f"{name}{separator}{_number(scores[name]['value'])}"
    if gate is None:
        return metric, ""
    drop = f"drop {gate['measured']:.4f}" if scores[name]["change"] is not None and gate["measured"] is not None else ""
    bounds = "" if gate["low"] is None or gate["high"] is None else f"[{_number(gate['low'])}, {_number(gate['high'])}]"
    return metric, separator.join(part for part in (drop, bounds) if part)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown for a pull request; names are escaped."""
    lines = [f"# {_escape(report['name'])}: {report['outcome']}", "", f"Finished {report['finished']}.", ""]
    lines += ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in table(report)]
    lines += ["", "## Gates", "", "| engine | gate | outcome | why |", "|---|---|---|---|"]
    for engine in report["engines"]:
        for gate in engine["gates"]:
            cells = (engine["name"], gate["gate"], gate["outcome"], gate["reason"])
            lines.append("| " + " | ".join(_escape(str(cell)) for cell in cells) + " |")
    for failure in report["failures"]:
        lines += ["", f"**{_escape(failure['engine'])} was not built:** {_escape(failure['message'])}"]
    lines += ["", "## Scores", "", "| engine | metric | engine's | original's | change | lost | gained | samples |"]
    lines.append("|" + "---|" * 8)
    for engine in report["engines"]:
        for score in engine["scores"]:
            paired = score["original"] is not None
            cells = (
                engine["name"],
                score["metric"],
                f"{score['value']:.6g}",
                f"{score['original']:.6g}" if paired else "",
                f"{score['change']:+.4g}" if paired else "",
                str(score["lost"]) if score["binary"] and paired else "",
                str(score["gained"]) if score["binary"] and paired else "",
                str(score["samples"]),
            )
            lines.append("| " + " | ".join(_escape(cell) for cell in cells) + " |")
    lines += ["", "## Evidence", ""]
    validation, calibration = report["data"]["validation"], report["data"]["calibration"]
    lines.append(f"- Validation: {validation['samples']} samples, SHA-256 `{validation['sha256']}`.")
    if calibration:
        lines.append(
            f"- Calibration: {calibration['samples']} samples, SHA-256 `{calibration['sha256']}`; none is shared."
        )
    lines.append(
        "- A fixed validation set bounds the error over samples like these, not over what you will meet later."
    )
    platform = report["platform"]
    packages = ", ".join(f"{name} {version}" for name, version in sorted(platform["packages"].items()))
    gpu = f", {platform['gpu']}" if platform["gpu"] else ", no GPU"
    lines.append(
        f"- Platform: {_escape(platform['cpu'])}, {platform['cores']} cores{gpu}, {platform['os']} {platform['arch']}; {packages}."
    )
    latency = report["latency"]
    if latency:
        lines.append(
            f"- Latency: {latency['boundary']} {latency['threads']} threads; load {latency['load_before']:.1f} before, "
            f"{latency['load_after']:.1f} after; measured {latency['started']}. Raw samples are in report.json."
        )
    lines += [f"- {_escape(note)}" for note in _notes(report)]
    lines += ["", "## Engines", ""]
    for engine in report["engines"]:
        lines.append(
            f"- `{_escape(engine['name'])}`: {engine['backend']} ({_escape(engine['backend_reason'])}), SHA-256 `{engine['sha256']}`"
        )
        lines += [f"  - {_escape(note)}" for note in engine["notes"]]
    lines += ["", "## Steps", "", "| step | seconds | peak MiB | from the store |", "|---|---|---|---|"]
    for step in report["steps"]:
        lines.append(
            f"| {_escape(step['id'])} | {step['seconds']:.1f} | {step['peak_mib'] or ''} | {'yes' if step['hit'] else ''} |"
        )
    return "\n".join(lines) + "\n"


def _notes(report: Mapping[str, Any]) -> list[str]:
    latency = report["latency"] or {"notes": ()}
    return [*report["original"]["notes"], *report["data"]["notes"], *latency["notes"]]


def _escape(text: str) -> str:
    """Text that stays text inside a Markdown table cell."""
    for character, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`")):
        text = text.replace(character, safe)
    return " ".join(text.split())
