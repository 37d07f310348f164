"""From what was observed of a tensor to the largest magnitude that symmetric INT8 shall represent.

A threshold ``t`` gives the scale ``t / 127``: a value ``x`` becomes ``clip(round(x / scale), -128, 127) * scale``. The
methods differ in how much of the tail they give up for finer steps. Where values lie inside a bin of the histogram
is unknown: they are taken to be spread evenly over it.
"""

from __future__ import annotations

import numpy as np

from compiler.quantize.formats import SMALLEST_SCALE
from compiler.quantize.observe import FINITE_BINS, TensorStatistics, edges
from compiler.spec import Array

LEVELS = 127
"""Steps from zero to the threshold."""

MASK_BELOW = -1e30
ORDINARY_BELOW = 1e15

_ENTROPY_BINS = 2048
_ENTROPY_STRIDE = 8
_EMPTY = 1e-4


def scale(statistics: TensorStatistics, *, method: str, percentile: float) -> np.float32:
    """The scale of a tensor: finite and at least `SMALLEST_SCALE`. Of a tensor that was always zero: 1 / 127.

    Args:
        method: ``minmax``, ``percentile``, ``entropy`` or ``mse``.
        percentile: of the magnitudes, for that method.
    """
    if statistics.peak == 0.0:
        return np.float32(1.0 / LEVELS)
    if method == "minmax":
        threshold = minmax(statistics)
    elif method == "percentile":
        threshold = from_percentile(statistics, percentile)
    elif method == "entropy":
        threshold = entropy(statistics)
    else:
        threshold = mse(statistics)
    return scale_of(threshold)


def scale_of(threshold: float) -> np.float32:
    """
    >>> float(scale_of(127.0)), float(scale_of(0.0)) == float(SMALLEST_SCALE)
    (1.0, True)
    """
    return max(np.float32(threshold / LEVELS), SMALLEST_SCALE)


def holds_mask(statistics: TensorStatistics) -> bool:
    """Whether the tensor holds the lowest values of a mask (-3.4e38, -inf) beside ordinary ones: no range fits both."""
    return statistics.low <= MASK_BELOW and statistics.high < ORDINARY_BELOW


def minmax(statistics: TensorStatistics) -> float:
    """The largest magnitude seen: nothing is clipped."""
    return statistics.peak


def from_percentile(statistics: TensorStatistics, percentile: float) -> float:
    """The magnitude that ``percentile`` % of the values do not exceed.

    Source: Wu et al. 2020, Integer Quantization for Deep Learning Inference, section 3.3 (arXiv:2004.09602).
    """
    assert statistics.bins is not None, "a tensor to be rounded is counted"
    cumulative = np.concatenate([[0], np.cumsum(statistics.bins[:FINITE_BINS])])
    wanted = cumulative[-1] * percentile / 100
    place = min(int(np.searchsorted(cumulative, wanted, side="left")), FINITE_BINS) or 1
    low, high = edges()[place - 1 : place + 1]
    inside = (wanted - cumulative[place - 1]) / max(cumulative[place] - cumulative[place - 1], 1)
    threshold = min(low + (high - low) * inside, statistics.peak) if place > 1 else 0.0
    return float(threshold) or statistics.peak


def entropy(statistics: TensorStatistics) -> float:
    """The threshold whose 128 levels tell least about the values to those who do not see them: minimal
    Kullback-Leibler divergence of the distribution, clipped, from its rounded form.

    Source: Migacz 2017, 8-bit Inference with TensorRT, GTC; on 2048 even bins, with every 8th bin a candidate. Exact
    zeros are left out: every scale represents them, and after a Relu they would outweigh all else.
    """
    assert statistics.bins is not None, "a tensor to be rounded is counted"
    counts = statistics.bins[:FINITE_BINS].copy()
    counts[0] = 0
    if not counts.any():
        return statistics.peak
    cumulative = np.concatenate([[0], np.cumsum(counts)])
    borders = np.linspace(0.0, statistics.peak, _ENTROPY_BINS + 1)
    known = np.minimum(edges(), statistics.peak)
    even = np.diff(np.interp(borders, known, cumulative))
    even[-1] += cumulative[-1] - even.sum()
    best = (np.inf, _ENTROPY_BINS)
    for size in range(_ENTROPY_BINS, LEVELS, -_ENTROPY_STRIDE):
        best = min(best, (_divergence(even, size), size))
    return float(borders[best[1]])


def _divergence(counts: Array, size: int) -> float:
    """KL(P || Q) in nats of the first ``size`` of ``counts`` [bins], all above clipped into the last, from 128 levels."""
    inside = counts[:size]
    level = np.arange(size) * (LEVELS + 1) // size
    used = inside > 0
    sums = np.bincount(level, inside, LEVELS + 1)
    widths = np.bincount(level, used, LEVELS + 1)
    q = np.where(used, (sums / np.maximum(widths, 1))[level], 0.0)
    p = inside.copy()
    p[-1] += counts[size:].sum()
    filled = p > 0
    p, q = p[filled] / p.sum(), q[filled] / (q.sum() or 1.0)
    # Values may be clipped into a bin that was empty, where Q has nothing. As in MXNet's calibration, it has a little.
    return float(np.sum(p * np.log(p / np.where(q > 0, q, _EMPTY))))


def mse(statistics: TensorStatistics) -> float:
    """The threshold with the least expected squared error, of rounding inside it and of clipping outside.

    Source: Nagel et al. 2021, A White Paper on Neural Network Quantization, section 3.3.1 (arXiv:2106.08295). The
    error is integrated over each bin, not taken at its centre: near the peak a bin is half a step wide.
    """
    assert statistics.bins is not None, "a tensor to be rounded is counted"
    peak = statistics.peak
    place = np.flatnonzero(statistics.bins[1:FINITE_BINS]) + 1
    if not place.size:
        return peak
    counts = statistics.bins[place].astype(np.float64)
    # Relative to the peak: squares of 1e37 are still numbers then, and so are those of 1e-37.
    low, high = edges()[place] / peak, np.minimum(edges()[place + 1] / peak, 1.0)
    coarse = 2.0 ** (-np.arange(41) / 2)
    best = int(np.argmin(_squared_error(coarse, counts, low, high)))
    fine = np.linspace(coarse[max(best - 1, 0)], coarse[min(best + 1, coarse.size - 1)], 65)
    return peak * float(fine[np.argmin(_squared_error(fine, counts, low, high))])


def _squared_error(thresholds: Array, counts: Array, low: Array, high: Array) -> Array:
    """Sum of squared errors [T] of values of which ``counts`` [B] lie between ``low`` and ``high`` [B].

    With u = x / scale and k the level nearest to u, at most 127, the error is scale^2 * (u - k)^2, whose integral over
    u is F(u) = k / 12 + (u - k)^3 / 3: a twelfth for every whole level passed.
    """
    scales = thresholds[:, None] / LEVELS
    below, above = low / scales, high / scales

    def integral(u: Array) -> Array:
        level = np.minimum(np.rint(u), LEVELS)
        return level / 12 + (u - level) ** 3 / 3

    width = above - below
    point = (below - np.minimum(np.rint(below), LEVELS)) ** 2
    mean = np.where(width > 0, (integral(above) - integral(below)) / np.where(width > 0, width, 1), point)
    errors: Array = (mean * scales**2) @ counts
    return errors
