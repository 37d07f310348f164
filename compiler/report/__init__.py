"""One set of records, several readers: `assemble` for machines (``report.json``), `markdown` for people, `table` for both.

Everything shown is a value of the records; nothing is computed here but formatting, so that no two readers disagree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from compiler.spec import DataSets, Engine, Latencies, Outcome, Platform, Scores, Search, Speed, Verdict

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

UNROUNDED = ("fp32", "fp16", "bf16")
"""Precisions in which a search keeps every layer."""


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
    searches: Sequence[Search] = (),
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
        searches: of engines whose mixture of precisions was searched for.
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
                "profiles": [_plain(profile) for profile in engine.profiles],
                "proof": None if engine.proof is None else _plain(engine.proof),
                "stand_in": _plain(scores[engine.name].stand_in),
                "notes": list(engine.notes),
                "outcome": by_engine[engine.name].outcome.value,
                "gates": [_plain(gate) for gate in by_engine[engine.name].gates],
                "scores": [_plain(score) for score in scores[engine.name].scores],
                "bad_samples": list(scores[engine.name].bad_samples),
                "speeds": [_plain(speed) for speed in speeds if speed.candidate == engine.name],
            }
            for engine in engines
        ],
        "searches": [_plain(search) for search in searches],
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
    on_drop = " drop <= " in gate["gate"] and gate["measured"] is not None
    drop = f"drop {gate['measured']:.4f}" if on_drop else ""
    bounds = "" if gate["low"] is None or gate["high"] is None else f"[{_number(gate['low'])}, {_number(gate['high'])}]"
    return metric, separator.join(part for part in (drop, bounds) if part)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown for a pull request; names are escaped."""
    engines = report["engines"]
    gates = [
        (engine["name"], gate["gate"], gate["outcome"], gate["reason"])
        for engine in engines
        for gate in engine["gates"]
    ]
    steps = [
        (step["id"], f"{step['seconds']:.1f}", step["peak_mib"] or "", "yes" if step["hit"] else "")
        for step in report["steps"]
    ]
    parts = [
        f"# {escape(report['name'])}: {report['outcome']}",
        f"Finished {report['finished']}.",
        grid(HEADINGS, table(report)),
        *(f"**{escape(f['engine'])} was not built:** {escape(f['message'])}" for f in report["failures"]),
        "## Gates",
        grid(("engine", "gate", "outcome", "why"), gates),
        "## Scores",
        grid(
            ("engine", "metric", "engine's", "original's", "change", "lost", "gained", "samples"),
            [_score_cells(engine["name"], score) for engine in engines for score in engine["scores"]],
        ),
        "## Latency",
        grid(
            ("candidate", "batch", "calls", "p50 ms", "p90 ms", "p99 ms", "samples/s", "speed-up"),
            [_latency_cells(speed) for owner in (report["original"], *engines) for speed in owner["speeds"]],
        ),
        "A percentile is n/a where there are too few calls to bound it: 11 for p50, 64 for p90, 662 for p99.",
        *(part for search in report.get("searches", ()) for part in _search_parts(search)),
        "## Evidence",
        "\n".join(f"- {line}" for line in _evidence(report)),
        "## Engines",
        "\n".join(line for engine in engines for line in _engine_lines(engine)),
        "## Steps",
        grid(("step", "seconds", "peak MiB", "from the store"), steps),
    ]
    return "\n\n".join(parts) + "\n"


def grid(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [headings, ["---"] * len(headings), *([escape(str(cell)) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _score_cells(engine: str, score: Mapping[str, Any]) -> list[str]:
    paired = score["original"] is not None
    counted = paired and score["binary"]
    return [
        engine,
        score["metric"],
        f"{score['value']:.6g}",
        f"{score['original']:.6g}" if paired else "",
        f"{score['change']:+.4g}" if paired else "",
        str(score["lost"]) if counted else "",
        str(score["gained"]) if counted else "",
        str(score["samples"]),
    ]


def _latency_cells(speed: Mapping[str, Any]) -> list[str]:
    batch, p50, p99, ratio = _speed_cells(speed, " ")
    calls, p90, per_s = str(speed["samples"]), _ms(speed["p90_ms"]), f"{speed['per_s']:.4g}"
    return [speed["candidate"], batch, calls, p50, p90, p99, per_s, ratio]


def search_table(search: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: the points of a search that no other beats, and the chosen one; all, where none was timed.

    A point's number is its place in ``points`` of report.json, where the names of its kept layers are.
    """
    points = search["points"]
    shown = [place for place, point in enumerate(points) if point["on_front"] or place == search["chosen"]]
    if not any(point["on_front"] for point in points):
        shown = list(range(len(points)))
    metrics = list(dict.fromkeys(name for point in points for name in point["measured"]))
    batches = sorted({batch for point in points for batch in point["p50_ms"]}, key=int)
    headings = ["point", "precision", "kept layers", *metrics, "SQNR dB", "MiB"]
    headings += [heading for batch in batches for heading in (f"p50 ms at {batch}", f"speed-up at {batch}")]
    rows = []
    for place in shown:
        point = points[place]
        timed = [
            cell for batch in batches for cell in (_ms(point["p50_ms"].get(batch)), _ratio(point["speedup"].get(batch)))
        ]
        found = "within the budget" if point["within"] else "outside the budget"
        rows.append(
            [
                str(place),
                point["precision"],
                f"{point['kept_layers']} of {point['layers']}" if point["precision"] not in UNROUNDED else "all",
                *(_number(point["measured"][name]) if name in point["measured"] else "n/a" for name in metrics),
                "n/a" if point["sqnr_db"] is None else f"{point['sqnr_db']:.1f}",
                f"{point['size_bytes'] / 2**20:.2f}",
                *timed,
                f"chosen, {found}" if place == search["chosen"] else found,
            ]
        )
    return [*headings, "found"], rows


def search_lines(search: Mapping[str, Any]) -> list[str]:
    """What a search chose, why, by what, and how to make a point again."""
    points, chosen = search["points"], search["chosen"]
    front = sum(point["on_front"] for point in points)
    return [
        f"Point {chosen} was chosen: {search['reason']}.",
        f"Budget: {'; '.join(search['budget'])}.",
        (
            f"{len(points)} points were measured in {search['seconds']:.0f} s, {front} of them on the Pareto front of error, "
            f"latency and size, on {search['samples']} samples, SHA-256 {search['data_sha256']}, which neither calibrate nor judge."
        ),
        (
            "To make a point again without [search]: its precision and, as engines.keep, its keep; both are in report.json, "
            f"searches, engine {search['engine']}, points."
        ),
        *search["notes"],
    ]


def _search_parts(search: Mapping[str, Any]) -> list[str]:
    headings, rows = search_table(search)
    return [
        f"## Search for {escape(search['engine'])}",
        grid([escape(heading) for heading in headings], rows),
        "\n".join(f"- {escape(line)}" for line in search_lines(search)),
    ]


def _ratio(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}x"


def _evidence(report: Mapping[str, Any]) -> list[str]:
    """What the numbers rest on, a line each."""
    data, platform, latency = report["data"], report["platform"], report["latency"]
    packages = ", ".join(f"{name} {version}" for name, version in sorted(platform["packages"].items()))
    lines = [f"Validation: {data['validation']['samples']} samples, SHA-256 `{data['validation']['sha256']}`."]
    if data["calibration"]:
        calibration = data["calibration"]
        lines.append(
            f"Calibration: {calibration['samples']} samples, SHA-256 `{calibration['sha256']}`; none is in both sets."
        )
    lines += [
        "A fixed validation set bounds the error over samples like these, not over what a deployment meets later.",
        (
            f"Platform: {escape(platform['cpu'])}, {platform['cores']} cores, {platform['gpu'] or 'no GPU'}, "
            f"{platform['os']} {platform['arch']}; {packages}."
        ),
    ]
    if latency:
        lines.append(
            f"Latency: {latency['boundary']}. {latency['threads']} threads; load {latency['load_before']:.1f} before and "
            f"{latency['load_after']:.1f} after; measured {latency['started']}. Every sample is in report.json."
        )
    notes = (*report["original"]["notes"], *data["notes"], *(latency["notes"] if latency else ()))
    return [*lines, *(escape(note) for note in notes)]


def _engine_lines(engine: Mapping[str, Any]) -> list[str]:
    reason = f"{engine['backend']} ({escape(engine['backend_reason'])})"
    options = ", ".join(f"{name} = {value}" for name, value in engine["options"].items())
    lead = f"- {escape(engine['name'])}: {reason}, SHA-256 `{engine['sha256']}`; {escape(options)}"
    notes = [*engine["notes"]]
    if stand_in := engine["stand_in"]:
        notes.insert(
            0,
            f"NOT RUN HERE: {stand_in['reason']}. Its scores are those of the same ONNX file, SHA-256 "
            f"{stand_in['model_sha256']}, run in {stand_in['backend']}.",
        )
    if proof := engine["proof"]:
        read = f"precision read from: {proof['method']}"
        if proof["weight_bytes"] is not None:
            read += f"; weights take {proof['weight_bytes']:,} bytes, {proof['expected_weight_bytes']:,} in the model"
        if proof["weight_bytes_alone"] is not None:
            read += f", {proof['weight_bytes_alone']:,} with one profile alone: some are stored once per profile"
        notes.append(read)
    return [lead, *(f"  - {escape(note)}" for note in notes)]


def escape(text: str) -> str:
    """Text that stays text inside a Markdown table cell: no tag, no entity, no link, no new cell, no new line.

    >>> escape("a <= b | <script>")
    'a <= b \\\\| &lt;script>'
    """
    text = re.sub(r"[\x00-\x1f\x7f\u202a-\u202e\u2066-\u2069]+", " ", text)
    text = re.sub(r"&(?=[#\w])", "&amp;", text)
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    text = re.sub(r"([|`]|(?<=\])\()", r"\\\1", text)
    return " ".join(text.split())
