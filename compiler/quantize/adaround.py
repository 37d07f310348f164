"""Rounding up or down as the layer's outputs ask for it, by coordinate descent.

AdaRound's objective (Nagel et al. 2020, arXiv:2004.10568, equation 7) is a quadratic unconstrained binary problem: a bit
for each weight says whether it is rounded up, and ``tr((W - Q)^T G (W - Q))`` is what that costs. There it is relaxed and
solved by stochastic gradients. Here each bit is set to its best value while all others stand still, input after input,
until nothing changes: every step lowers the objective itself, no draw and no learning rate is in it, and a sweep costs
two matrix products. Source of cyclic descent on this objective, whose one-dimensional optimum is the nearest level to
what the others leave: Behdin et al. 2023, QuantEase (arXiv:2309.01885), section 3.
"""

from __future__ import annotations

import numpy as np

from compiler.quantize.formats import Steps
from compiler.spec import Array

SWEEPS = 4
"""At most so often over all inputs: four gain all but 0.1 dB of what sixteen do."""

ENOUGH = 1e-4
"""Stop once a sweep changes no more than this share of the weights."""

_LAZY = 32


def round_layer(weight: Array, gram: Array, steps: Steps, scale: Array, *, start: Array | None = None) -> Array:
    """Round ``weight`` up or down, for a small ``tr((W - Q)^T G (W - Q))`` that is never above that of ``start``.

    Args:
        weight: float32 [N, K], one row for each output channel.
        gram: float32 [K, K], positive semi-definite, with no zero on its diagonal: see `compiler.quantize.gram.damped`.
        steps: INT8 or INT4.
        scale: [N, K / block], or [N, 1] for one per output channel.
        start: whole steps [N, K] to begin with, from where a weight moves by one step at most; None: to nearest, and a
            weight stays one of the two levels that it lies between.

    Returns:
        Whole steps, float32 [N, K].

    >>> from compiler.quantize.formats import INT8
    >>> weight, gram = np.array([[0.4, 0.4]], np.float32), np.array([[1.0, 0.9], [0.9, 1.0]], np.float32)
    >>> round_layer(weight, gram, INT8, np.array([[1.0]], np.float32)).tolist()  # 0.8 in all is nearer to 1 than to 0
    [[1.0, 0.0]]
    """
    outputs, inputs = weight.shape
    spread = np.ascontiguousarray(np.repeat(scale, inputs // scale.shape[1], axis=1).T, np.float32)  # [K, N]
    target = weight.T / spread
    if start is None:
        now = np.clip(np.rint(target), steps.lowest, steps.largest).astype(np.float32)
        low, high = np.floor(target), np.ceil(target)
    else:
        now = np.array(start.T, np.float32, order="C")
        low, high = now - 1, now + 1
    low, high = np.clip(low, steps.lowest, steps.largest), np.clip(high, steps.lowest, steps.largest)
    diagonal = np.diagonal(gram).astype(np.float32)
    for _ in range(SWEEPS):
        slope = gram @ (
            (target - now) * spread
        )  # G D, of the error D that is left; made anew, so that it does not drift
        changed = 0
        for first in range(0, inputs, _LAZY):
            part = slice(first, min(first + _LAZY, inputs))
            moved = np.empty((part.stop - first, outputs), np.float32)
            for row in range(part.stop - first):
                place = first + row
                ahead = slope[place] / (diagonal[place] * spread[place])
                best = np.clip(np.rint(now[place] + ahead), low[place], high[place])
                # A step of rounding errors' size is no reason to move, and could go back and forth for ever.
                best = np.where(np.abs(ahead) > _TIE * np.abs(best - now[place]), best, now[place])
                moved[row] = (best - now[place]) * spread[place]
                changed += int(np.count_nonzero(moved[row]))
                now[place] = best
                if moved[row].any():
                    slope[place + 1 : part.stop] -= gram[place + 1 : part.stop, place, None] * moved[row]
            slope[part.stop :] -= gram[part.stop :, part] @ moved
        if changed <= ENOUGH * weight.size:
            break
    return np.ascontiguousarray(now.T)


_TIE = 0.5 + 1e-4
"""A move by n steps pays if the optimum is more than n / 2 away."""
