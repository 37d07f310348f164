"""INT4 in blocks: one scale for each run of weights along the axis that is summed over.

The scale of a block is the one of least mean squared error, min over s of sum((s clip(round(w / s), -8, 7) - w)^2), among
`SHARES` of the one that the largest magnitude asks for: a few clipped weights for finer steps of all others.
Source: Choukroun et al. 2019, Low-bit Quantization of Neural Networks for Efficient Inference, section 3
(arXiv:1902.06822). On normal weights it gains 0.9 dB over the largest magnitude.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from compiler.quantize.formats import INT4, in_rest
from compiler.spec import Array

BLOCKS = (128, 64, 32, 16)

SHARES = (*np.linspace(0.5, 1.0, 11).tolist(), 7 / 8)
"""Of the scale at which the largest magnitude is 7 steps; at 7/8 it is 8, which only negative weights can be."""

_CHUNK = 1 << 20


def round_blocks(weight: Array, axis: int, block: int, rest: str) -> tuple[Array, Array]:
    """A weight in INT4, and the scales of its blocks along ``axis``: [.., K, ..] and [.., K / block, ..], float32.

    >>> q, scale = round_blocks(np.array([[7.0], [-3.0], [0.7], [-0.8]], np.float32), 0, 2, "fp32")
    >>> q.astype(int).tolist(), scale.round(3).tolist()
    ([[7], [-3], [7], [-8]], [[1.0], [0.10000000149011612]])
    """
    turned = np.moveaxis(weight, axis, -1)
    rows = np.ascontiguousarray(turned).reshape(-1, block)
    steps, scale = np.empty(rows.shape, INT4.dtype.numpy()), np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _CHUNK // block):
        part = slice(start, start + _CHUNK // block)
        scale[part] = _least_error(rows[part], rest)
        steps[part] = INT4.round(rows[part] / scale[part, None])
    return (
        np.ascontiguousarray(np.moveaxis(steps.reshape(turned.shape), -1, axis)),
        np.ascontiguousarray(np.moveaxis(scale.reshape(*turned.shape[:-1], -1), -1, axis)),
    )


def rounder(block: int, rest: str) -> Callable[[Array], Array]:
    """What rows [N, K] are after rounding to INT4."""

    def rounded(rows: Array) -> Array:
        steps, scale = round_blocks(rows, 1, block, rest)
        values: Array = steps.astype(np.float32) * np.repeat(scale, block, axis=1)
        return values

    return rounded


def _least_error(rows: Array, rest: str) -> Array:
    """For each row the scale, among `SHARES`, of least squared error; a row of zeros may have any."""
    peak = np.abs(rows).max(axis=1)
    full = np.where(peak == 0, peak.max() or 1.0, peak) / np.float32(INT4.largest)
    best, least = np.zeros_like(full), np.full(len(rows), np.inf)
    for share in sorted(SHARES, reverse=True):
        scale = in_rest(full * np.float32(share), rest)
        rounded = np.clip(np.rint(rows / scale[:, None]), INT4.lowest, INT4.largest) * scale[:, None]
        error = np.einsum("ij,ij->i", rounded - rows, rounded - rows, dtype=np.float64)
        better = error < least
        best[better], least[better] = scale[better], error[better]
    return best
