"""The arithmetic of evidence: bounds, the sample sizes they need, and their verdicts. Plain numbers in and out.

``confidence`` is that of each bound alone: at 0.95 the truth lies below the lower bound, or above the upper bound, with
5 % each. A verdict uses one of the two.

Why a score test for right-or-wrong metrics: with 100 samples and a true loss of 1 %, a bootstrap sees no change at all
in 37 % of runs and reports 0 +/- 0; "McNemar is not significant" passes a loss of exactly the limit up to 80 % of the
time; a comparison of two measured numbers, half of the time. The score test passes it in 4 to 5 %.

Why numpy and the standard library do most of it: `scipy.stats` takes longer to import than everything here to run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compiler.spec import Outcome

Floats = NDArray[np.float64]

MIN_CONTINUOUS = 30
"""Samples below which the mean of a continuous score is not taken for normally distributed."""

POWER = 0.9
"""Chance that an engine which truly is as measured passes at the sample size that is named."""

RESAMPLES = 10_000
SEED = 0


def z_value(confidence: float) -> float:
    """The standard normal quantile.

    >>> round(z_value(0.95), 4)
    1.6449
    """
    return NormalDist().inv_cdf(confidence)


# --- right or wrong, paired -----------------------------------------------------------------------------------------


def paired_z(lost: Any, gained: Any, samples: Any, difference: Any) -> Floats:
    """Score statistic of H0: share(new right) - share(original right) = ``difference``, for paired samples.

    ``lost`` samples were right and became wrong, ``gained`` the other way round; fractions are allowed. Arguments
    broadcast. The statistic falls as ``difference`` rises. 0 where nothing speaks either way.

    Source: Tango (1998), Equivalence test and confidence interval for the difference in proportions for the paired-
    sample design, Statistics in Medicine 17:891, with the constrained maximum likelihood estimate in closed form.
    McNemar's test is ``difference = 0``.
    """
    lost, gained, n, d = (np.asarray(value, np.float64) for value in (lost, gained, samples, difference))
    surplus = gained - lost - n * d
    with np.errstate(divide="ignore", invalid="ignore"):
        z = surplus / np.sqrt(n * _variance(lost / n, gained / n, d))
    return np.where(np.abs(surplus) <= 1e-12 * n, 0.0, z)


def _variance(lost: Any, gained: Any, difference: Any) -> Any:
    """Of one sample's change under H0: ``2q + d(1 - d)``, q the most likely share of lost samples. Arguments are shares."""
    b = -(gained + lost) + (2 - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    # The larger root of 2 q^2 + b q + c, without cancellation where b > 0.
    root = np.sqrt(np.maximum(b * b - 8 * c, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(b > 0, -2 * c / (b + root), (root - b) / 4)
    return np.maximum(2 * q + difference * (1 - difference), 0.0)


def paired_verdict(lost: float, gained: float, samples: int, margin: float, confidence: float) -> Outcome:
    """Whether the new share of right samples is less than ``margin`` below the original's."""
    z, needed = float(paired_z(lost, gained, samples, -margin)), z_value(confidence)
    return Outcome.PASS if z > needed else Outcome.FAIL if z < -needed else Outcome.INCONCLUSIVE


def paired_bounds(lost: float, gained: float, samples: int, confidence: float) -> tuple[float, float]:
    """Lower and upper bound of share(new right) - share(original right), by inversion of `paired_z`.

    >>> low, high = paired_bounds(lost=7, gained=1, samples=21, confidence=0.975)
    >>> round(low, 4), round(high, 4)
    (-0.5172, -0.026)
    """
    z = z_value(confidence)
    estimate = (gained - lost) / samples
    return (
        _root(lambda d: paired_z(lost, gained, samples, d) - z, -1.0, estimate),
        _root(lambda d: paired_z(lost, gained, samples, d) + z, estimate, 1.0),
    )


def paired_floor(margin: float, confidence: float) -> int:
    """Fewest samples with which a paired verdict can pass: those needed when not a single sample changes.

    Without a change the lower bound is ``-z^2 / (n + z^2)``.

    >>> paired_floor(0.01, 0.95), paired_floor(0.005, 0.95), paired_floor(0.001, 0.95)
    (268, 539, 2703)
    """
    return math.floor(z_value(confidence) ** 2 * (1 - margin) / margin) + 1


def paired_samples(flips: float, change: float, margin: float, confidence: float) -> int | None:
    """Samples at which a paired verdict passes in about 90 % of runs; None where no number is enough.

    Args:
        flips: the share of samples whose rightness changes, either way.
        change: share(new right) - share(original right), in truth; not above 0.

    Source: Tango (1998), section 4, with the variance under H0 that `paired_z` will estimate. The short form of it,
    ``flips - margin^2``, names too few where flips are hardly more than the margin: 852 instead of 1132 below, with an
    exact power of 84 %, and of 61 % at half as many flips.

    >>> paired_samples(0.01, 0.0, 0.01, 0.95)
    1132
    """
    if margin + change <= 0:
        return None
    null = float(_variance((flips - change) / 2, (flips + change) / 2, -margin))
    spread = z_value(confidence) * math.sqrt(null) + z_value(POWER) * _sqrt(flips - change**2)
    return max(math.ceil((spread / (margin + change)) ** 2), paired_floor(margin, confidence))


def paired_allowance(flips: int, samples: int, margin: float, confidence: float) -> int | None:
    """Most net losses with which a paired verdict passes, when ``flips`` samples change; None where not even 0 does.

    >>> paired_allowance(40, 2000, 0.01, 0.95)
    9
    """
    net = np.arange(int(margin * samples) + 2)
    changed = np.maximum(net, flips)
    passed = paired_z((changed + net) / 2, (changed - net) / 2, samples, -margin) > z_value(confidence)
    return int(net[passed].max()) if passed.any() else None


# --- a share, a mean ------------------------------------------------------------------------------------------------


def share_bounds(right: float, samples: int, confidence: float) -> tuple[float, float]:
    """Lower and upper score bound of a share.

    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference, JASA 22:209.

    >>> low, high = share_bounds(right=133, samples=133, confidence=0.95)
    >>> round(low, 4), round(high, 4)
    (0.9801, 1.0)
    """
    z2 = z_value(confidence) ** 2
    centre = (right + z2 / 2) / (samples + z2)
    spread = math.sqrt(z2 * (right * (samples - right) / samples + z2 / 4)) / (samples + z2)
    low = 0.0 if right <= 0 else centre - spread
    return low, 1.0 if right >= samples else centre + spread


def share_samples(share: float, limit: float, confidence: float) -> int | None:
    """Samples at which the bound of a true ``share`` is on its side of ``limit`` in 90 % of runs; None where they are equal."""
    if share == limit:
        return None
    spread = z_value(confidence) * _sqrt(limit * (1 - limit)) + z_value(POWER) * _sqrt(share * (1 - share))
    return math.floor((spread / (share - limit)) ** 2) + 1


def mean_bounds(mean: float, sd: float, samples: int, confidence: float) -> tuple[float, float]:
    """Lower and upper bound of a mean by Student's t; equal where every sample has the same value.

    ``sd`` is the standard deviation of the samples (n - 1). At least two samples.

    >>> [round(bound, 3) for bound in mean_bounds(0.0, 1.0, 30, 0.95)]
    [-0.31, 0.31]
    """
    from scipy.special import stdtrit

    spread = float(stdtrit(samples - 1, confidence)) * sd / math.sqrt(samples)
    return mean - spread, mean + spread


def mean_samples(distance: float, sd: float, confidence: float) -> int | None:
    """Samples at which the bound of a mean that is ``distance`` inside its limit passes in 90 % of runs.

    None where the mean is not inside its limit.
    """
    if distance <= 0:
        return None
    return max(MIN_CONTINUOUS, math.ceil(((z_value(confidence) + z_value(POWER)) * sd / distance) ** 2))


def skew_share(values: Floats, confidence: float = 0.95) -> float:
    """How far skewness moves the bound of a mean, as a share of the width of the interval; 0 without spread.

    Source: Hall (1992), On the removal of skewness by transformation, JRSS B 54:221; the first-order term.
    """
    sd = float(values.std())
    if sd == 0:
        return 0.0
    skewness = float(np.mean(((values - values.mean()) / sd) ** 3))
    z = z_value(confidence)
    return abs(skewness) * (1 + 2 * z * z) / (6 * math.sqrt(len(values))) / (2 * z)


# --- time -----------------------------------------------------------------------------------------------------------


def bootstrap_median(values: Floats, confidence: float) -> tuple[float, float]:
    """Lower and upper bound of the median of few continuous values (blocks), by percentile bootstrap with a fixed seed.

    ``confidence`` is that of both bounds together here, so each is stricter than the bounds above: blocks are few, their
    neighbours resemble one another, and a resampled median is a little too sure of itself.

    Never for right-or-wrong samples; see the top of this module.
    """
    assert values.dtype.kind == "f" and len(values), "a bootstrap is for continuous values"
    rng = np.random.default_rng(SEED)
    medians = np.median(values[rng.integers(0, len(values), (RESAMPLES, len(values)))], axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians, (tail, 1 - tail))
    return float(low), float(high)


@cache
def percentile_floor(share: float) -> int:
    """Fewest calls from which a percentile of latency is given.

    Source: MLPerf LoadGen's early stopping (``early_stopping.cc``) at one call above the percentile: the least n for
    which ``BinomCDF(1; n, 1 - share) <= 0.01``.

    >>> [percentile_floor(share) for share in (0.5, 0.9, 0.95, 0.99, 0.999)]
    [11, 64, 130, 662, 6636]
    """
    calls = 1
    while share**calls + calls * (1 - share) * share ** (calls - 1) > 0.01:
        calls += 1
    return calls


def percentile(samples: Floats, share: float) -> float | None:
    """The percentile of measured latencies; None where there are fewer than `percentile_floor` of them."""
    return float(np.quantile(samples, share)) if len(samples) >= percentile_floor(share) else None


def percentile_bounds(samples: Floats, share: float, confidence: float) -> tuple[float | None, float | None]:
    """Lower and upper bound of a percentile from order statistics, without any assumption about the distribution.

    None where there are too few samples for a bound.
    """
    from scipy.special import bdtr

    ordered = np.sort(samples)
    n = len(ordered)
    # P(at most k samples lie below the percentile), k = 0 .. n.
    below = bdtr(np.arange(n + 1), n, share)
    at_least = 1.0 - np.concatenate(([0.0], below[:-1]))
    high = int(np.argmax(below >= confidence)) if below[n - 1] >= confidence else None
    low = int(np.flatnonzero(at_least >= confidence).max()) - 1
    return float(ordered[low]) if low >= 0 else None, float(ordered[high]) if high is not None else None


def _sqrt(value: float) -> float:
    return math.sqrt(max(value, 0.0))


def _root(function: Callable[[Floats], Floats], low: float, high: float) -> float:
    """Where a falling function crosses 0 between two points; the nearer end where it does not."""
    for _ in range(10):  # each divides the distance by 64: 60 bits
        points = np.linspace(low, high, 65)
        above = int((function(points) > 0).sum())
        low, high = float(points[max(above - 1, 0)]), float(points[min(above, 64)])
    return (low + high) / 2
