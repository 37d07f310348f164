"""Every candidate at one batch size: how far it is from the original, how fast, and what it costs."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from scripts.gpu import energy as energies
from scripts.gpu.candidates import ORIGINAL, TORCH, Opened
from scripts.gpu.children import LEAST_S, Deadline
from scripts.gpu.missing import Json, MissingError, guarded, module, reason
from scripts.gpu.nvml import Gauge, watched

BOUNDARIES: Mapping[str, str] = {
    "host": "one synchronised call, from arrays in host memory to arrays in host memory, copies and casts included",
    "device": "one call between two CUDA events, on a stream with nothing else on it, inputs and outputs in device memory; "
    "no copies, but the casts of half precision",
}
"""The same for PyTorch as for TensorRT's runner, `compiler.backends.tensorrt.run`."""
BLOCKS = 20
BLOCK_MS = 10.0
"""Shorter than a build's: on a GPU calls are short, and every raw sample is kept."""
MEASURE_SHARE = 0.35
"""Of the time that is left once candidates are made, what each boundary may take."""
PACE = (0.8, 1.5)
"""Time of a call in an energy window over its median when timed, outside of which a note says so: what lies between two
calls is in the first and not in the second."""


def measure_batch(
    found: Json,
    candidates: Iterable[Opened],
    feeds: Mapping[str, Any],
    *,
    gauge: Any,
    energy: bool,
    deadline: Deadline,
    emit: Callable[[], None],
) -> None:
    """Fill ``found`` with every candidate's difference from the original, both boundaries' latencies, and energy.

    Args:
        found: ``{"batch", "work"}``; ``candidates``, ``samples`` and ``idle`` are added.
        candidates: opened one after the other; the first must be eager PyTorch in FP32, the reference.
        feeds: arrays by name.
        gauge: a `Gauge`, or why there is none.
        energy: whether it was asked for.
        deadline: for all of this.
        emit: called whenever ``found`` has more in it.
    """
    ready: list[Opened] = []
    found["candidates"], found["samples"] = [], {}
    reference: Any = None
    for entry, runner in candidates:
        found["candidates"].append(entry)
        if "missing" not in entry:
            try:
                outputs = runner.run(feeds)
                entry["difference"] = difference(outputs, reference) if reference is not None else None
                if reference is None:
                    if entry["candidate"] != ORIGINAL:
                        raise MissingError("the original in eager FP32, to compare with, does not run")
                    reference = outputs
                ready.append((entry, runner))
            except Exception as exc:
                entry["missing"] = reason(exc)
        emit()
    if reference is None:
        return
    for boundary in BOUNDARIES:
        runners = {entry["candidate"]: runner for entry, runner in ready}
        if boundary == "device":
            clocks = {name: getattr(runner, "time_device", None) for name, runner in runners.items()}
            runners = {name: SimpleNamespace(time=clock) for name, clock in clocks.items() if clock is not None}
        share = deadline.part(MEASURE_SHARE)
        taken = guarded(functools.partial(_latencies, found["batch"], runners, feeds, gauge, share))
        _enter(found, boundary, taken, ready)
        emit()
    measure_energies(found, feeds, ready, gauge=gauge, wanted=energy, deadline=deadline, emit=emit)
    for _, runner in ready:
        with contextlib.suppress(Exception):
            runner.close()


def difference(outputs: Mapping[str, Any], reference: Mapping[str, Any]) -> Json:
    """How far outputs are from the reference's: the worst sample's cosine, and the largest absolute difference.

    Raises:
        MissingError: they hold NaN or Inf, or are other outputs.
    """
    np = module("numpy")
    if outputs.keys() != reference.keys():
        raise MissingError(f"its outputs are {', '.join(outputs)}; {', '.join(reference)} were expected")
    cosine, largest = 1.0, 0.0
    for name in (name for name, value in reference.items() if value.dtype.kind == "f"):
        new, old = outputs[name].astype(np.float64), reference[name].astype(np.float64)
        if not np.isfinite(new).all():
            raise MissingError(f"its output '{name}' holds NaN or Inf")
        if new.shape != old.shape:
            raise MissingError(f"its output '{name}' is {list(new.shape)}; {list(old.shape)} was expected")
        rows, others = (np.atleast_1d(value).reshape(max(1, len(np.atleast_1d(value))), -1) for value in (new, old))
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
        cosines = np.where(lengths > 0, (rows * others).sum(axis=1) / np.where(lengths > 0, lengths, 1), 0.0)
        cosine, largest = min(cosine, float(cosines.min())), max(largest, float(abs(new - old).max()))
    return {"cosine": cosine, "max_abs_diff": largest}


# --- latencies ------------------------------------------------------------------------------------------------------


def _latencies(
    batch: int, runners: Mapping[str, Any], feeds: Mapping[str, Any], gauge: Any, deadline: Deadline
) -> Json:
    from compiler.recipe import LatencySection
    from compiler.spec import Platform
    from compiler.validate import latency

    if deadline.left() < LEAST_S * MEASURE_SHARE:
        raise MissingError("the limit was reached before it began")
    # Recorded nowhere: the machine has a part of its own.
    here = Platform(os="", arch="", cpu="", cores=0, gpu=None, compute_capability=None, driver=None, packages={})
    measure = functools.partial(
        latency.measure,
        LatencySection(blocks=BLOCKS, block_ms=BLOCK_MS, limit_s=max(1.0, deadline.left())),
        runners,
        lambda _: feeds,
        [batch],
        engine_sha256={},
        platform=here,
        threads=0,
        undecided=lambda _: False,
    )
    taken, seen = watched(gauge, 0.5, measure)
    return {"latencies": taken.latencies, "notes": list(taken.notes), "conditions": seen}


def _enter(found: Json, boundary: str, taken: Json, ready: Sequence[Opened]) -> None:
    """Put what one boundary's run found where it belongs."""
    if "missing" in taken:
        for entry, _ in ready:
            entry[boundary] = {"missing": taken["missing"]}
        return
    from compiler.validate import estimates

    batch, latencies = found["batch"], taken["latencies"]
    forms = {entry["candidate"] for entry, _ in ready if entry["how"] in TORCH}
    best = min(
        (one for one in latencies if one.candidate in forms),
        key=lambda one: statistics.median(one.samples_s),
        default=None,
    )
    noise = estimates.noise(latencies, batch)
    found["samples"][boundary] = {
        "boundary": BOUNDARIES[boundary],
        "conditions": taken["conditions"],
        "notes": taken["notes"],
        "control": None if noise is None else {"ratio_width": math.expm1(noise)},
        "fastest_torch": None if best is None else best.candidate,
        "latencies": [
            {"candidate": one.candidate, "samples_s": list(one.samples_s), "block_of": list(one.block_of)}
            for one in latencies
        ],
    }
    original = estimates.find(latencies, ORIGINAL, batch)
    for entry, _ in ready:
        own = estimates.find(latencies, entry["candidate"], batch)
        if own is None:
            entry[boundary] = {"missing": f"{entry['how']}: its runner has no time_device"}
        else:
            entry[boundary] = _speed(own, original, None if entry["how"] in TORCH else best)


def _speed(own: Any, original: Any, best: Any) -> Json:
    """A candidate's latencies in a few numbers; ``best``, PyTorch's fastest form, is what an engine has to beat."""
    from compiler.validate import estimates

    median = estimates.median_ms(own)
    found: Json = {
        "median_ms": median.value,
        "low_ms": median.low,
        "high_ms": median.high,
        "calls": len(own.samples_s),
        "per_s": own.batch / median.value * 1e3,
    }
    for name, other in (("speedup", original), ("over_torch", best)):
        if other is not None:
            ratio = estimates.speedup(other, own)
            found[name] = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
    return found


# --- energy ---------------------------------------------------------------------------------------------------------


def measure_energies(
    found: Json,
    feeds: Mapping[str, Any],
    ready: Sequence[Opened],
    *,
    gauge: Any,
    wanted: bool,
    deadline: Deadline,
    emit: Callable[[], None],
) -> None:
    """Every candidate's energy, or why it was not measured."""

    def refusal() -> str | None:
        if not wanted:
            return "not asked for (--only)"
        if not isinstance(gauge, Gauge):
            return str(gauge["missing"])
        if deadline.left() < energies.SETTLE_S + energies.WINDOW_S:
            return "the limit was reached before it began"
        return None

    if refusal() is None:
        found["idle"] = guarded(lambda: energies.measure_idle(gauge))
    for entry, runner in ready:
        on_cpu = "CPUExecutionProvider" in entry["how"]
        why = "it runs on the CPU, and only the GPU's energy is measured" if on_cpu else refusal()
        if why is not None:
            entry["energy"] = {"missing": why}
            continue
        clock = getattr(runner, "time_device", runner.time)
        entry["energy"] = guarded(
            functools.partial(
                energies.measure_energy, functools.partial(clock, feeds), found["batch"], gauge, found["idle"]
            )
        )
        _note_other_pace(entry)
        emit()


def _note_other_pace(entry: Json) -> None:
    """Say where a candidate ran at another pace while its energy was measured than while it was timed."""
    timed = entry["device"] if "median_ms" in entry.get("device", {}) else entry.get("host", {})
    if "ms_per_call" in entry["energy"] and "median_ms" in timed:
        then, before = entry["energy"]["ms_per_call"], timed["median_ms"]
        if not PACE[0] <= then / before <= PACE[1]:
            entry["notes"].append(
                f"energy: a call took {then:.3g} ms while it was measured, and {before:.3g} ms before"
            )
