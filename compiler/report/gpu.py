"""What `scripts/gpu_report` measured, as a page: the same numbers, in the order in which they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compiler.report import escape, grid

SPEED_HEADINGS = ("candidate", "host ms", "speed-up", "device ms", "speed-up", "over PyTorch's best", "cosine")
COST_HEADINGS = (
    *("candidate", "mJ per inference", "above idle", "W", "°C", "SM MHz"),
    *("GB/s", "TFLOP/s", "share of the roof", "bound by"),
)
CEILING_NAMES = {
    "copy": "device memory, copy",
    "read": "device memory, read",
    "h2d": "pinned host to device",
    "d2h": "device to pinned host",
}
NOTHING = "n/a"
SHOWN = 6
"""Parts that are named for one reason; the file has all of them."""


def markdown(content: Mapping[str, Any]) -> str:
    """The page; names and the libraries' own words are escaped. What is n/a has its reason in the last section."""
    machine, recipes, finished = content["machine"], content["recipes"], content["finished"]
    ended = "not finished: what follows is what was done until then" if finished is None else f"finished {finished}"
    parts = [
        f"# GPU report: {escape(_gpu_name(machine))}",
        f"Started {content['started']}, {ended}: {escape(content['command'])}",
        _machine_line(machine),
        "## Do TensorRT engines run here?",
        *_rtx(content["rtx"]),
        "## What this card gives",
        *_ceilings(content["ceilings"]),
        *(line for recipe in (recipes if isinstance(recipes, list) else ()) for line in _recipe(recipe)),
        "## Missing on this machine",
        _missing(content["missing"]),
    ]
    return "\n\n".join(parts) + "\n"


# --- the machine ----------------------------------------------------------------------------------------------------


def _gpu_name(machine: Mapping[str, Any]) -> str:
    return _of(machine, "gpu", "name") or _of(machine, "cuda", "name") or "no GPU"


def _of(value: Mapping[str, Any], *path: str) -> Any:
    """What lies at a path; None where it is missing."""
    found: Any = value
    for name in path:
        if not isinstance(found, Mapping) or "missing" in found:
            return None
        found = found.get(name)
    return None if isinstance(found, Mapping) and "missing" in found else found


def _machine_line(machine: Mapping[str, Any]) -> str:
    def either(name: str) -> Any:
        return _of(machine, "gpu", name) or _of(machine, "cuda", name)

    memory = either("memory_bytes")
    facts = [
        ("compute capability {}", either("compute_capability")),
        ("{:.1f} GiB", None if memory is None else memory / 2**30),
        ("driver {}", _of(machine, "gpu", "driver")),
        ("CUDA {}", _of(machine, "cuda", "cuda") or _of(machine, "gpu", "driver_cuda")),
        ("power limit {:.0f} W", _of(machine, "gpu", "enforced_power_limit_w")),
        ("SM clock up to {} MHz", _of(machine, "gpu", "max_sm_mhz")),
        ("memory clock up to {} MHz", _of(machine, "gpu", "max_memory_mhz")),
        ("ECC {}", _switch(_of(machine, "gpu", "ecc"))),
        ("MIG {}", _switch(_of(machine, "gpu", "mig"))),
        ("persistence mode {}", _switch(_of(machine, "gpu", "persistence"))),
        ("compute processes: {}", _of(machine, "gpu", "compute_processes")),
        ("Python {}", _of(machine, "python")),
        *((f"{name} {{}}", _of(machine, "packages", name)) for name in _of(machine, "packages") or ()),
        ("{}", _of(machine, "os")),
        ("{} cores", _of(machine, "cores")),
    ]
    told = [form.format(fact) for form, fact in facts if fact is not None]
    return escape("; ".join([_gpu_name(machine), *told])) + "."


def _switch(value: bool | None) -> str | None:
    return None if value is None else "on" if value else "off"


# --- TensorRT -------------------------------------------------------------------------------------------------------


def _rtx(rtx: Mapping[str, Any]) -> Iterator[str]:
    if "missing" in rtx:
        yield f"Not answered: {escape(rtx['missing'])}."
        return
    yield "\n".join(f"- {escape(line)}" for line in rtx["answer"].splitlines())
    for flavour, found in rtx.items():
        lines = [
            f"- {entry['severity']}: {escape(entry['text'])}"
            for entry in (found.get("log", ()) if isinstance(found, Mapping) else ())
            if entry["severity"] not in ("INFO", "VERBOSE") and entry["text"] not in rtx["answer"]
        ]
        if lines:
            yield f"What else {flavour} said, word by word:"
            yield "\n".join(lines)


# --- ceilings -------------------------------------------------------------------------------------------------------


def _ceilings(ceilings: Mapping[str, Any]) -> Iterator[str]:
    if "missing" in ceilings:
        yield f"Not measured: {escape(ceilings['missing'])}."
        return
    rows = [
        _ceiling(label, ceilings[name], "gb_s", "GB/s") for name, label in CEILING_NAMES.items() if name in ceilings
    ]
    matmul = ceilings.get("matmul", {})
    rows += [
        _ceiling(f"matrix product, {precision.upper()}", found, "tflops", "TFLOP/s")
        for precision, found in matmul.items()
        if isinstance(found, Mapping)
    ]
    yield grid(("ceiling", "measured", "95 % bounds", "W", "SM MHz", "throttled by"), rows)
    yield f"{escape(ceilings['method'])}."


def _ceiling(label: str, found: Mapping[str, Any], key: str, unit: str) -> list[str]:
    if "missing" in found:
        return [label, NOTHING, "", "", "", ""]
    measured = [one for one in found.get("sizes", {}).values() if key in one]
    best: Mapping[str, Any] = max(measured, key=lambda one: float(one[key]), default={})
    seen = found.get("conditions") or best.get("conditions") or {}
    return [
        label,
        f"{_short(found[key])} {unit}",
        f"[{_short(found['low'])}, {_short(found['high'])}]",
        *(f"{seen[name]['median']:.0f}" if name in seen else "" for name in ("power_w", "sm_mhz")),
        ", ".join(seen.get("throttle", ())),
    ]


# --- recipes --------------------------------------------------------------------------------------------------------


def _recipe(recipe: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {escape(recipe['name'])}"
    reasons = dict.fromkeys(
        value["missing"] for value in recipe.values() if isinstance(value, Mapping) and "missing" in value
    )
    if reasons:
        yield "\n".join(f"- {escape(why)}" for why in reasons)
    for batch in recipe["batches"]:
        yield f"### {escape(recipe['name'])}, batch {batch['batch']}"
        if "missing" in batch:
            yield f"Not measured: {escape(batch['missing'])}."
        yield from _batch(batch)


def _batch(batch: Mapping[str, Any]) -> Iterator[str]:
    work, candidates = batch["work"], batch["candidates"]
    if "flops" in work:
        yield f"{work['flops'] / 1e9:.3g} GFLOP a call, counted by {escape(work['flops_source'])}."
    if not candidates:
        return
    yield grid(SPEED_HEADINGS, [_speed_row(candidate) for candidate in candidates])
    yield grid(COST_HEADINGS, [_cost_row(candidate) for candidate in candidates])
    notes = [
        *(line for name, found in batch.get("samples", {}).items() for line in _boundary(name, found)),
        *_idle(batch.get("idle", {})),
        *(
            f"{candidate['candidate']}: {note}"
            for candidate in candidates
            for note in (*candidate["notes"], candidate.get("roofline", {}).get("note"))
            if note is not None
        ),
    ]
    if notes:
        yield "\n".join(f"- {escape(note)}" for note in notes)


def _label(candidate: Mapping[str, Any]) -> str:
    how = {"eager": "PyTorch", "compile": "torch.compile"}.get(candidate["how"])
    if how is None:
        return f"{candidate['candidate']} ({candidate['precision']}, {candidate['how']})"
    return f"{how} {candidate['precision'].upper()}{', CUDA graph' if candidate['graph'] else ''}"


def _speed_row(candidate: Mapping[str, Any]) -> list[str]:
    host, device = candidate.get("host", {}), candidate.get("device", {})
    cosine = _of(candidate, "difference", "cosine")
    reference = candidate["candidate"] == "eager" and "missing" not in candidate
    return [
        _label(candidate),
        _median(host),
        _ratio(host.get("speedup")),
        _median(device),
        _ratio(device.get("speedup")),
        _ratio(device.get("over_torch") or host.get("over_torch"))
        if candidate["how"] not in ("eager", "compile")
        else "",
        "reference" if reference else NOTHING if cosine is None else f"{cosine:.6f}",
    ]


def _median(found: Mapping[str, Any]) -> str:
    if "median_ms" not in found:
        return NOTHING
    bounds = "" if found["low_ms"] is None else f" [{_short(found['low_ms'])}, {_short(found['high_ms'])}]"
    return f"{_short(found['median_ms'])}{bounds}"


def _ratio(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return NOTHING
    bounds = "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
    return f"{found['value']:.2f}x{bounds}"


def _cost_row(candidate: Mapping[str, Any]) -> list[str]:
    energy, roof = candidate.get("energy", {}), candidate.get("roofline", {})
    above = energy.get("joules_per_inference_above_idle")
    seen = energy.get("conditions", {})
    cells = [
        _label(candidate),
        _short(1e3 * energy["joules_per_inference"]) if "watts" in energy else NOTHING,
        _short(1e3 * above) if isinstance(above, float) else NOTHING,
        f"{energy['watts']:.0f}" if "watts" in energy else NOTHING,
        f"{seen['temperature_c']['max']}" if "temperature_c" in seen else NOTHING,
        f"{seen['sm_mhz']['median']:.0f}" if "sm_mhz" in seen else NOTHING,
    ]
    if "fraction" not in roof:
        return [*cells, *[NOTHING] * 4]
    return [*cells, _short(roof["gb_s"]), _short(roof["tflops"]), f"{roof['fraction']:.2%}", roof["binds"]]


def _boundary(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    """What one boundary's numbers rest on, a line each."""
    yield f"{name}: {found['boundary']}"
    control = found["control"]
    yield (
        f"{name}: there is no control; noise is not known"
        if control is None
        else f"{name}: eager FP32 against itself is unsure by {control['ratio_width']:.1%}; less is no difference"
    )
    if "missing" not in found["conditions"]:
        yield f"{name}: {_told(found['conditions'])}"
    yield from (f"{name}: {note}" for note in found["notes"] if not note.startswith("order of candidates"))


def _idle(idle: Mapping[str, Any]) -> Iterator[str]:
    if "watts" in idle:
        yield (
            f"energy: one call after the other, as on the device where it has such a clock; {idle['watts']:.0f} W with nothing to do, "
            f"by the {idle['source']}; the GPU alone, not its host"
        )


def _told(seen: Mapping[str, Any]) -> str:
    names = {"power_w": "W", "temperature_c": "°C", "sm_mhz": "MHz SM clock", "memory_mhz": "MHz memory clock"}
    ranges = [
        f"{seen[name]['min']:.0f} to {seen[name]['max']:.0f} {unit}" for name, unit in names.items() if name in seen
    ]
    throttled = ", ".join(seen["throttle"]) or "nothing"
    return "; ".join([*ranges, f"throttled by: {throttled}"])


# --- what is missing ------------------------------------------------------------------------------------------------


def _missing(missing: Sequence[Mapping[str, str]]) -> str:
    """Reasons, each with the parts that it took."""
    by_reason: dict[str, list[str]] = {}
    for entry in missing:
        by_reason.setdefault(entry["reason"], []).append(entry["part"])
    if not by_reason:
        return "Nothing."
    return grid(("what", "why"), [(_some(parts), reason) for reason, parts in by_reason.items()])


def _some(parts: Sequence[str]) -> str:
    more = len(parts) - SHOWN
    return "; ".join(parts[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _short(value: float) -> str:
    """Three digits that matter, without an exponent where there are no more than six before the point.

    >>> _short(0.012345), _short(3.14159), _short(3001.2)
    ('0.0123', '3.14', '3001')
    """
    return f"{value:.0f}" if 100 <= value < 1e6 else f"{value:.3g}"
