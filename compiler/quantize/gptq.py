"""GPTQ: round a matrix one input after the other, and let the inputs to come make up for what each rounding does.

Source: Frantar et al. 2023, GPTQ (arXiv:2210.17323), algorithm 1. With ``H = U^-1 U^-T`` for upper triangular ``U`` (the
Cholesky factor of the inverse, section 3.3), rounding input i by an error e_i costs e_i^2 / U_ii^2, and is best made up
for by e_i U_ij / U_ii at every later input j. Inputs are taken `LAZY` at a time, after which all later ones are
corrected by one matrix product.

Why not in the order of falling activations (``act_order``): with scales by block it needs scales that are chosen before
anything is compensated, which costs more than the order gains; see `rounding` for what was measured.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import lapack

from compiler.quantize.formats import Steps
from compiler.spec import Array

LAZY = 32
"""Inputs between two corrections of the rest; at least a block."""


def round_layer(
    weight: Array, gram: Array, steps: Steps, scale: Array | None, block: int, scale_of: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """Round ``weight`` for a small ``tr((W - Q)^T G (W - Q))``; returns steps and scales, both float32.

    Args:
        weight: float32 [N, K], one row for each output channel.
        gram: float32 [K, K], positive definite: see `compiler.quantize.gram.damped`.
        steps: what a value divided by its scale becomes.
        scale: [N, K / block]; None: each is chosen from the corrected weights, as ``scale_of`` does.
        block: how many inputs share a scale; K of one scale per output channel.
        scale_of: from rows [M, block] to their scales [M].

    Returns:
        steps [N, K], and scales [N, K / block].

    Raises:
        numpy.linalg.LinAlgError: ``gram`` is not positive definite.
    """
    factor = inverse_factor(gram)
    left = np.array(weight.T, np.float32, order="C")  # [K, N]: an input's weights side by side
    inputs, outputs = left.shape
    rounded = np.empty_like(left)
    scales = np.empty((-(-inputs // block), outputs), np.float32) if scale is None else scale.T.astype(np.float32)
    lazy = LAZY if block >= inputs else max(LAZY, block)
    for start in range(0, inputs, lazy):
        end = min(start + lazy, inputs)
        part, own = left[start:end], factor[start:end, start:end]
        errors = np.empty_like(part)
        for row in range(end - start):
            place = start + row
            if scale is None and place % block == 0:
                scales[place // block] = scale_of(np.ascontiguousarray(part[row : row + block].T))
            of_row = scales[place // block]
            rounded[place] = nearest(part[row] / of_row, steps)
            errors[row] = (part[row] - rounded[place] * of_row) / own[row, row]
            part[row + 1 :] -= own[row, row + 1 :, None] * errors[row]
        left[end:] -= factor[start:end, end:].T @ errors
    return np.ascontiguousarray(rounded.T), np.ascontiguousarray(scales.T)


def nearest(levels: Array, steps: Steps) -> Array:
    """The nearest numbers of a format, as float32."""
    if steps.dtype.is_integer():  # without a visit to a type of four bits, which numpy takes its time over
        return np.clip(np.rint(levels), steps.lowest, steps.largest).astype(np.float32)
    return steps.round(levels).astype(np.float32)


def inverse_factor(gram: Array) -> Array:
    """Upper triangular U, float32 [K, K], with ``U^T U`` the inverse of ``gram``.

    The inverse itself is never made: ``gram = R R^T`` for upper triangular R is a Cholesky factorisation from the last
    row to the first, and U is its inverse.

    >>> factor = inverse_factor(np.array([[4.0, 2.0], [2.0, 2.0]]))
    >>> (factor.T @ factor).round(3).tolist()
    [[0.5, -0.5], [-0.5, 1.0]]

    Raises:
        numpy.linalg.LinAlgError: ``gram`` is not positive definite.
    """
    turned = np.array(gram[::-1, ::-1], np.float64, order="F")
    lower, info = lapack.dpotrf(turned, lower=1, clean=1, overwrite_a=1)
    if info == 0:
        lower, info = lapack.dtrtri(lower, lower=1, overwrite_c=1)
    if info != 0:
        raise np.linalg.LinAlgError(f"a Gram matrix of {len(gram)} inputs is not positive definite")
    return np.ascontiguousarray(lower[::-1, ::-1], np.float32)
