"""From what was observed of a tensor to the grid of INT8 that shall represent it.

Each method chooses a threshold ``t``, the largest magnitude that is represented; they differ in how much of the tail they give
up for finer steps. Where values lie inside a bin of the histogram is unknown: they are taken to be spread evenly over it.

- Symmetric: the scale is ``t / 127``, the zero point 0.
- Asymmetric: of a tensor that was seen to reach from ``low`` to ``high``, what is represented reaches from ``max(low, -t)`` to
  ``min(high, t)``, in 255 steps. After a Relu steps are half as wide. Source: Jacob et al. 2018, Quantization and Training of
  Neural Networks for Efficient Integer-Arithmetic-Only Inference, section 2.1 (arXiv:1712.05877). Where that gains less than
  `LEAST_FALL_OF_STEP`, the grid is symmetric all the same.
"""

from __future__ import annotations

import numpy as np

from compiler.quantize.formats import SMALLEST_SCALE, Grid
from compiler.quantize.observe import FINITE_BINS, TensorStatistics, edges
from compiler.spec import Array

LEVELS = 127
"""Steps from zero to the threshold, where the grid is symmetric."""

LEAST_FALL_OF_STEP = 0.05
"""By this share an asymmetric grid must be finer."""

MASK_BELOW = -1e30
ORDINARY_BELOW = 1e15

_ENTROPY_BINS = 2048
_ENTROPY_STRIDE = 8
_EMPTY = 1e-4


def grid(statistics: TensorStatistics, *, method: str, percentile: float, symmetric: bool) -> Grid:
    """The grid of a tensor; its scale is finite and at least `SMALLEST_SCALE`.

    Args:
        statistics: with bins, but for ``minmax``.
        method: ``minmax``, ``percentile``, ``entropy`` or ``mse``.
        percentile: of the magnitudes, for that method.
        symmetric: whether the zero point must be 0.
    """
    if method == "minmax" or statistics.peak == 0.0:
        threshold = minmax(statistics)
    elif method == "percentile":
        threshold = from_percentile(statistics, percentile)
    elif method == "entropy":
        threshold = entropy(statistics, symmetric=symmetric)
    else:
        threshold = mse(statistics, symmetric=symmetric)
    return grid_of(threshold, statistics, symmetric=symmetric)


def grid_of(threshold: float, statistics: TensorStatistics, *, symmetric: bool) -> Grid:
    """The grid that represents magnitudes up to ``threshold``. Of a tensor that was always zero: steps of 1 / 127.

    >>> positive = TensorStatistics(low=0.0, high=510.0)
    >>> [(float(found.scale), found.zero_point) for found in (grid_of(510.0, positive, symmetric=False),
    ...     grid_of(127.0, positive, symmetric=True), grid_of(1.0, TensorStatistics(low=0.0, high=0.0), symmetric=True))]
    [(2.0, -128), (1.0, 0), (0.007874015718698502, 0)]
    """
    if statistics.peak == 0.0:
        return Grid(scale=np.float32(1.0 / LEVELS))
    wanted = float(steps(np.array(threshold), statistics, symmetric=symmetric))
    scale = max(np.float32(wanted), SMALLEST_SCALE)
    if wanted == threshold / LEVELS:
        return Grid(scale=scale)
    below = min(max(-statistics.low, 0.0), threshold)
    return Grid(scale=scale, zero_point=int(np.clip(np.rint(below / scale), 0, 255)) - 128)


def steps(thresholds: Array, statistics: TensorStatistics, *, symmetric: bool) -> Array:
    """How wide steps are, of any shape, for thresholds up to the tensor's peak."""
    around_zero: Array = thresholds / LEVELS
    if symmetric:
        return around_zero
    below = np.minimum(max(-statistics.low, 0.0), thresholds)
    above = np.minimum(max(statistics.high, 0.0), thresholds)
    spanning = (below + above) / (2 * LEVELS + 1)
    return np.where(spanning <= (1 - LEAST_FALL_OF_STEP) * around_zero, spanning, around_zero)


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


def entropy(statistics: TensorStatistics, *, symmetric: bool = True) -> float:
    """The threshold whose levels (128 from zero on, twice as many of a tensor on one side of zero, where the grid is not
    symmetric) tell least about the values to those who do not see them: minimal Kullback-Leibler divergence of the
    distribution, clipped, from its rounded form.

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
    levels = 1 + np.rint(borders[1:] / steps(borders[1:], statistics, symmetric=symmetric)).astype(int)
    for size in range(_ENTROPY_BINS, LEVELS, -_ENTROPY_STRIDE):
        if size >= levels[size - 1]:
            best = min(best, (_divergence(even, size, int(levels[size - 1])), size))
    return float(borders[best[1]])


def _divergence(counts: Array, size: int, levels: int) -> float:
    """KL(P || Q) in nats of the first ``size`` of ``counts`` [bins], all above clipped into the last, from ``levels``."""
    inside = counts[:size]
    level = np.arange(size) * levels // size
    used = inside > 0
    sums = np.bincount(level, inside, levels)
    widths = np.bincount(level, used, levels)
    q = np.where(used, (sums / np.maximum(widths, 1))[level], 0.0)
    p = inside.copy()
    p[-1] += counts[size:].sum()
    filled = p > 0
    p, q = p[filled] / p.sum(), q[filled] / (q.sum() or 1.0)
    # Values may be clipped into a bin that was empty, where Q has nothing. As in MXNet's calibration, it has a little.
    return float(np.sum(p * np.log(p / np.where(q > 0, q, _EMPTY))))


def mse(statistics: TensorStatistics, *, symmetric: bool = True) -> float:
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

    def errors(shares: Array) -> Array:
        return _squared_error(shares, steps(shares * peak, statistics, symmetric=symmetric) / peak, counts, low, high)

    coarse = 2.0 ** (-np.arange(41) / 2)
    best = int(np.argmin(errors(coarse)))
    fine = np.linspace(coarse[max(best - 1, 0)], coarse[min(best + 1, coarse.size - 1)], 65)
    return peak * float(fine[np.argmin(errors(fine))])


def _squared_error(thresholds: Array, steps: Array, counts: Array, low: Array, high: Array) -> Array:
    """Sum of squared errors [T] of values of which ``counts`` [B] have magnitudes between ``low`` and ``high`` [B].

    With u = x / step and k the level nearest to u, at most L = threshold / step, the error is step^2 * (u - k)^2, whose
    integral over u is F(u) = k / 12 + (u - k)^3 / 3: a twelfth for every whole level passed. The side of an asymmetric grid that
    ends below the threshold clips nothing: no value lies there.
    """
    scales = steps[:, None]
    levels = np.rint(thresholds[:, None] / scales)
    below, above = low / scales, high / scales

    def integral(u: Array) -> Array:
        level = np.minimum(np.rint(u), levels)
        return level / 12 + (u - level) ** 3 / 3

    width = above - below
    point = (below - np.minimum(np.rint(below), levels)) ** 2
    mean = np.where(width > 0, (integral(above) - integral(below)) / np.where(width > 0, width, 1), point)
    errors: Array = (mean * scales**2) @ counts
    return errors
