"""Joules per inference: mean power over a window of back-to-back calls, by the driver's counter or its power readings."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from scripts.gpu.missing import Json, MissingError, module
from scripts.gpu.nvml import Gauge, conditions, sampling

WINDOW_S = 2.5
SETTLE_S = 1.0
"""Work before a window: NVML averages power over up to a second."""
POLL_S = 0.02
CHUNK_S = 0.1
"""Calls between two looks at the clock take about this long, until power has settled."""
MIN_STEPS = 10
"""Changes of the energy counter within a window below which its slope is not trusted."""
MAX_ERROR = 0.05
"""How far the ends of a window may be unsure, as a share of it."""

Sampling: TypeAlias = Callable[[Gauge, float], contextlib.AbstractContextManager[list[Json]]]


def counter_power(readings: Sequence[Json], start_s: float, end_s: float) -> Json:
    """Mean power by the energy counter, from its first change in the window to its last.

    Why not the difference between the window's ends: the counter moves in steps of up to 0.1 s; between two of its own
    steps only the polling interval is unsure.

    Raises:
        MissingError: there is no counter, or the window is too short for its steps.
    """
    seen = [(r["at_s"], r["energy_j"]) for r in readings if "energy_j" in r and start_s <= r["at_s"] <= end_s]
    if not seen:
        raise MissingError("the energy counter was not read")
    steps = [(at, joules, at - before) for (before, old), (at, joules) in itertools.pairwise(seen) if joules > old]
    if len(steps) < MIN_STEPS:
        raise MissingError(
            f"the window of {end_s - start_s:.2f} s is too short for the energy counter: it moved {len(steps)} times, "
            f"and {MIN_STEPS} are needed"
        )
    (first_s, first_j, first_gap), (last_s, last_j, last_gap) = steps[0], steps[-1]
    error = (first_gap + last_gap) / (last_s - first_s)
    if error > MAX_ERROR:
        raise MissingError(
            f"the window of {end_s - start_s:.2f} s is too short for how often the energy counter was read: its ends "
            f"are unsure by {error:.0%}, and {MAX_ERROR:.0%} is allowed"
        )
    return {"watts": (last_j - first_j) / (last_s - first_s), "source": "energy counter", "error_share": error}


def sampled_power(readings: Sequence[Json], start_s: float, end_s: float) -> Json:
    """Mean power by the trapezoid rule over power readings; the ends are interpolated.

    Raises:
        MissingError: power was not read often enough.
    """
    seen = [(r["at_s"], r["power_w"]) for r in readings if "power_w" in r]
    inside = [at for at, _ in seen if start_s < at < end_s]
    if len(inside) < MIN_STEPS:
        raise MissingError(
            f"the window of {end_s - start_s:.2f} s holds {len(inside)} readings of power, and {MIN_STEPS} are needed"
        )
    np, span_s = module("numpy"), end_s - start_s
    at = np.array([start_s, *inside, end_s])
    joules = np.trapezoid(np.interp(at, *zip(*seen, strict=True)), at)
    error = 2 * np.diff(at).max() / span_s
    return {"watts": float(joules / span_s), "source": "power readings", "error_share": float(error)}


def mean_power(readings: Sequence[Json], start_s: float, end_s: float) -> Json:
    """``watts``; their ``source``: the counter, else readings of power; ``error_share``: how far the ends are unsure.

    Raises:
        MissingError: by neither, with both reasons.
    """
    try:
        return counter_power(readings, start_s, end_s)
    except MissingError as by_counter:
        try:
            return sampled_power(readings, start_s, end_s)
        except MissingError as by_readings:
            raise MissingError(f"{by_counter}; {by_readings}") from by_readings


def measure_idle(
    gauge: Gauge,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.perf_counter,
    sampler: Sampling = sampling,
) -> Json:
    """Power with the CUDA context open and nothing to do.

    Raises:
        MissingError: see `mean_power`.
    """
    sleep(SETTLE_S)
    with sampler(gauge, POLL_S) as readings:
        start = clock()
        sleep(WINDOW_S)
        end = clock()
    return mean_power(readings, start, end) | {"conditions": conditions(readings)}


def measure_energy(
    call: Callable[[int], Sequence[float]],
    batch: int,
    gauge: Gauge,
    idle: Json,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sampler: Sampling = sampling,
) -> Json:
    """Joules per inference over a window of back-to-back calls.

    Args:
        call: runs a number of synchronised calls; returns seconds of each.
        batch: inferences in one call.
        gauge: see `Gauge`.
        idle: what `measure_idle` found, or why it is missing.
        clock: the same as the gauge's.
        sampler: see `sampling`.

    Raises:
        MissingError: see `mean_power`.
    """
    chunk, began = 1, clock()
    while clock() - began < SETTLE_S:
        before = clock()
        call(chunk)
        per_call_s = max((clock() - before) / chunk, 1e-6)
        chunk = max(1, math.ceil(CHUNK_S / per_call_s))
    # In one go, and a little more: a runner may do more than its calls each time that it is asked.
    many = max(1, math.ceil(1.1 * WINDOW_S / per_call_s))
    with sampler(gauge, POLL_S) as readings:
        start, calls, inside_s = clock(), 0, 0.0
        while clock() - start < WINDOW_S:
            inside_s += sum(call(many))
            calls += many
            many = max(1, math.ceil(CHUNK_S / per_call_s))
        end = clock()
    power = mean_power(readings, start, end)
    inferences = calls * batch
    above: Any = {"missing": f"idle power: {idle.get('missing')}"}
    if "watts" in idle:
        above = (power["watts"] - idle["watts"]) * (end - start) / inferences
    return power | {
        "joules_per_inference": power["watts"] * (end - start) / inferences,
        "joules_per_inference_above_idle": above,
        "ms_per_call": 1e3 * (end - start) / calls,
        "inside_calls_share": inside_s / (end - start),
        "window_s": end - start,
        "inferences": inferences,
        "conditions": conditions(readings),
    }
