"""Measured records to the few numbers that people read and gates compare, each with its bounds. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compiler.spec import Latencies, Latency, Score, Speed
from compiler.validate import statistics

Floats = NDArray[np.float64]

MIN_BLOCKS = 5
"""Interleaved blocks below which no bound of a latency or a speed-up is given."""

EAGER, COMPILED, CONTROL = "eager", "compile", "control"
"""Candidates that are no engines: the original, the original compiled, the original once more as A/A control."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A measured value and its bounds; a bound is None where there are too few samples for one."""

    value: float
    low: float | None
    high: float | None


def drop(score: Score, confidence: float = 0.95) -> Estimate | None:
    """How much worse than the original a metric became, in its own units; None for an agreement, which has no original."""
    if score.change is None:
        return None
    if score.binary:
        low, high = statistics.paired_bounds(score.lost, score.gained, score.samples, confidence)
        return Estimate(value=(score.lost - score.gained) / score.samples, low=-high, high=-low)
    worse = 0.0 - score.change if score.higher_is_better else score.change
    return _mean(worse, score.change_sd, score.samples, confidence)


def value(score: Score, confidence: float = 0.95) -> Estimate:
    """The metric itself, without regard to the original's."""
    if score.binary:
        low, high = statistics.share_bounds(score.value * score.samples, score.samples, confidence)
        return Estimate(value=score.value, low=low, high=high)
    return _mean(score.value, score.value_sd, score.samples, confidence)


def _mean(mean: float, sd: float | None, samples: int, confidence: float) -> Estimate:
    if samples < statistics.MIN_CONTINUOUS or sd is None:
        return Estimate(value=mean, low=None, high=None)
    low, high = statistics.mean_bounds(mean, sd, samples, confidence)
    return Estimate(value=mean, low=low, high=high)


def find(latencies: Sequence[Latency], candidate: str, batch: int) -> Latency | None:
    return next((entry for entry in latencies if entry.candidate == candidate and entry.batch == batch), None)


def fastest_original(latencies: Sequence[Latency], batch: int) -> Latency | None:
    """The original as a user would deploy it: eager or compiled, whichever has the lower median."""
    forms = [entry for name in (EAGER, COMPILED) if (entry := find(latencies, name, batch))]
    return min(forms, key=lambda entry: float(np.median(entry.samples_s)), default=None)


def block_medians_s(latency: Latency) -> dict[int, float]:
    """Median call of each interleaved block, in seconds."""
    blocks, samples = np.asarray(latency.block_of), np.asarray(latency.samples_s, np.float64)
    return {int(block): float(np.median(samples[blocks == block])) for block in np.unique(blocks)}


def log_speedups(baseline: Latency, candidate: Latency) -> Floats:
    """``ln(median baseline / median candidate)`` of each block that both ran in, [K]."""
    before, after = block_medians_s(baseline), block_medians_s(candidate)
    return np.array([math.log(before[block] / after[block]) for block in before if block in after], np.float64)


def speedup(baseline: Latency, candidate: Latency, confidence: float = 0.95) -> Estimate:
    """How many times faster than the baseline a candidate is: the median of block ratios, and its bootstrap bounds.

    Why blocks: a shared machine drifts by tens of per cent within a run; neighbours in time drift together, and their
    ratio does not.
    """
    logs = log_speedups(baseline, candidate)
    if len(logs) < MIN_BLOCKS:
        ratio = float(np.median(baseline.samples_s) / np.median(candidate.samples_s))
        return Estimate(value=ratio, low=None, high=None)
    low, high = statistics.bootstrap_median(logs, confidence)
    return Estimate(value=math.exp(float(np.median(logs))), low=math.exp(low), high=math.exp(high))


def median_ms(latency: Latency, confidence: float = 0.95) -> Estimate:
    """Milliseconds per call: the median of block medians, and its bootstrap bounds."""
    medians = 1e3 * np.array(list(block_medians_s(latency).values()), np.float64)
    if len(medians) < MIN_BLOCKS:
        return Estimate(value=float(np.median(medians)), low=None, high=None)
    low, high = statistics.bootstrap_median(medians, confidence)
    return Estimate(value=float(np.median(medians)), low=low, high=high)


def noise(latencies: Sequence[Latency], batch: int, confidence: float = 0.95) -> float | None:
    """How far apart the original and its own control may look, as a log ratio: 0.01 is about 1 %. None without a control.

    The width of the interval of their ratio, stretched to take in 1: both its spread and its bias count.
    """
    original, control = find(latencies, EAGER, batch), find(latencies, CONTROL, batch)
    if original is None or control is None:
        return None
    ratio = speedup(original, control, confidence)
    if ratio.low is None or ratio.high is None:
        return None
    return math.log(max(ratio.high, 1.0)) - math.log(min(ratio.low, 1.0))


def speeds(latencies: Latencies) -> tuple[Speed, ...]:
    """Every candidate at every batch size, in measured order; an engine's speed-up is over `fastest_original`."""
    return tuple(_speed(entry, latencies.latencies) for entry in latencies.latencies)


def _speed(entry: Latency, everything: Sequence[Latency]) -> Speed:
    samples_ms = 1e3 * np.asarray(entry.samples_s, np.float64)
    original = fastest_original(everything, entry.batch)
    ratio = None
    if original is not None and entry.candidate not in (EAGER, COMPILED, CONTROL):
        ratio = speedup(original, entry)
    return Speed(
        candidate=entry.candidate,
        batch=entry.batch,
        samples=len(samples_ms),
        p50_ms=statistics.percentile(samples_ms, 0.5),
        p90_ms=statistics.percentile(samples_ms, 0.9),
        p99_ms=statistics.percentile(samples_ms, 0.99),
        per_s=entry.batch / float(np.median(entry.samples_s)),
        speedup=ratio.value if ratio else None,
        speedup_low=ratio.low if ratio else None,
        speedup_high=ratio.high if ratio else None,
    )
