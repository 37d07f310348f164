"""How near a model's answers come to those of the FP32 model, over the evaluation samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]


def cosine(found: Floats, expected: Floats) -> float:
    """Mean over samples of the cosine of the flattened answers. NaN where one is not finite.

    >>> cosine(np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    0.5
    """
    found, expected = found.reshape(len(found), -1), expected.reshape(len(expected), -1)
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.mean((found * expected).sum(axis=1) / norms))


def sqnr_db(found: Floats, expected: Floats) -> float:
    """10 log10 of the power of the expected answers by that of the difference, over all samples.

    >>> round(sqnr_db(np.array([[1.1, 1.0]]), np.array([[1.0, 1.0]])), 2)
    23.01
    """
    noise = float(np.sum((found - expected) ** 2))
    if not math.isfinite(noise):
        return math.nan
    return math.inf if noise == 0 else 10 * math.log10(float(np.sum(expected**2)) / noise)


def top1_agreement(found: Floats, expected: Floats) -> float:
    """Share of rows along the last axis whose largest value is at the same place; a row with NaN agrees with nothing."""
    whole = np.isfinite(found).all(axis=-1)
    return float(np.mean((found.argmax(axis=-1) == expected.argmax(axis=-1)) & whole))


def retrieval_top1(found: Floats, expected: Floats) -> float:
    """Share of samples ``[N, D]`` whose nearest other sample, by cosine, is the same one as among the expected answers.

    >>> retrieval_top1(np.array([[1.0, 0], [0.6, 0.8], [0, 1]]), np.array([[1.0, 0], [0.9, 0.1], [0, 1]]))
    0.6666666666666666
    """

    def nearest(answers: Floats) -> NDArray[np.int64]:
        unit = answers / np.linalg.norm(answers, axis=1, keepdims=True)
        similar = unit @ unit.T
        np.fill_diagonal(similar, -np.inf)
        found_at: NDArray[np.int64] = similar.argmax(axis=1)
        return found_at

    if not np.isfinite(found).all():
        return 0.0
    return float(np.mean(nearest(found) == nearest(expected)))


MEASURES: Mapping[str, Callable[[Floats, Floats], float]] = {
    measure.__name__: measure for measure in (cosine, sqnr_db, top1_agreement, retrieval_top1)
}
"""All: higher is better."""


def compare(found: Mapping[str, NDArray[np.float32]], expected: Mapping[str, NDArray[np.float32]]) -> dict[str, float]:
    """Every measure that applies, of the first output. Answers are matched by name, or, where a tool renamed them, by
    place."""
    name = next(iter(expected))
    old = expected[name].astype(np.float64)
    new = found[name if name in found else next(iter(found))].astype(np.float64)
    if new.shape != old.shape:
        return dict.fromkeys(MEASURES, math.nan)
    names = [key for key in MEASURES if key != "retrieval_top1" or old.ndim == 2]
    return {key: MEASURES[key](new, old) for key in names}
