"""GPTQ: round a matrix one input after the other, and let the inputs to come make up for what each rounding does.

Source: Frantar et al. 2023, GPTQ (arXiv:2210.17323), algorithm 1. With ``H = U^-1 U^-T`` for upper triangular ``U`` (the
Cholesky factor of the inverse, section 3.3), rounding input i by an error e_i costs e_i^2 / U_ii^2, and is best made up
for by e_i U_ij / U_ii at every later input j. Of `LAZY` inputs at a
time only the next of them are corrected at once, all later ones by one matrix product.

Inputs are taken in the order of falling activations (``act_order`` of the authors' code, github.com/IST-DASLab/gptq), so
that the errors of those that matter most can still be made up for. That needs scales of blocks before anything is
compensated: they are those of rounding to nearest. Measured on 7 layers of all-MiniLM-L6-v2 in INT4, on samples held out:
3.6 dB less error than with nearest, against 3.4 dB in the order of the inputs with scales chosen on the way.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import lapack

from compiler.quantize.formats import Steps
from compiler.spec import Array

LAZY = 32
"""Inputs between two corrections of the rest."""


def round_layer(weight: Array, gram: Array, steps: Steps, scale: Array) -> Array:
    """Round ``weight`` for a small ``tr((W - Q)^T G (W - Q))``.

    Args:
        weight: float32 [N, K], one row for each output channel.
        gram: float32 [K, K], positive definite: see `compiler.quantize.gram.damped`.
        steps: what a value divided by its scale becomes.
        scale: [N, K / block], or [N, 1] for one per output channel.

    Returns:
        Steps, float32 [N, K].

    Raises:
        numpy.linalg.LinAlgError: ``gram`` is not positive definite.

    >>> from compiler.quantize.formats import INT8
    >>> weight, gram = np.array([[0.4, 0.4]], np.float32), np.array([[1.0, 0.9], [0.9, 1.0]], np.float32)
    >>> round_layer(weight, gram, INT8, np.array([[1.0]], np.float32)).tolist()  # 0.8 in all is nearer to 1 than to 0
    [[0.0, 1.0]]
    """
    inputs = weight.shape[1]
    order = np.argsort(-np.diagonal(gram), kind="stable")
    factor = inverse_factor(gram[np.ix_(order, order)])
    left = np.ascontiguousarray(weight.T[order], np.float32)  # [K, N]: an input's weights side by side
    spread = np.repeat(scale, inputs // scale.shape[1], axis=1).T[order].astype(np.float32)
    rounded = np.empty_like(left)
    for start in range(0, inputs, LAZY):
        end = min(start + LAZY, inputs)
        part, own = left[start:end], factor[start:end, start:end]
        errors = np.empty_like(part)
        for row in range(end - start):
            place = start + row
            rounded[place] = nearest(part[row] / spread[place], steps)
            errors[row] = (part[row] - rounded[place] * spread[place]) / own[row, row]
            part[row + 1 :] -= own[row, row + 1 :, None] * errors[row]
        left[end:] -= factor[start:end, end:].T @ errors
    found = np.empty_like(rounded)
    found[order] = rounded
    return np.ascontiguousarray(found.T)


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
