"""The numbers that a model can be stored and computed in, beside FP32: two of half its width, three of few levels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compiler.spec import Array, Precision

MARGIN = 2.0
"""How much larger than on the calibration samples a tensor may become before it overflows."""

SMALLEST_SCALE = np.finfo(np.float32).tiny
"""The smallest normal float32: dividing by anything smaller overflows or traps somewhere."""


@dataclass(frozen=True, kw_only=True)
class Half:
    """FP16 or BF16. Source of the numbers: IEEE 754-2019, table 3.5, and FP32 without its lower 16 bits."""

    precision: Precision
    dtype: ir.DataType
    largest: float
    smallest: float
    """The smallest normal number: below it digits are lost."""
    mask: float
    """What a mask value becomes: small enough that its exponential is 0, and far enough from ``largest`` that the
    score which is added does not overflow."""

    @property
    def label(self) -> str:
        return self.precision.value.upper()

    def round(self, array: Array) -> Array:
        """``array`` in half; what is too large becomes infinite."""
        with np.errstate(over="ignore", under="ignore"):
            rounded: Array = array.astype(self.dtype.numpy())
        return rounded

    def not_below(self, scale: Array) -> Array:
        """The smallest numbers of this type that are not below ``scale`` (positive), as float32.

        >>> HALVES[Precision.BF16].not_below(np.array([1.0, 1.001, 2.0**-130], np.float32)).tolist()
        [1.0, 1.0078125, 7.346839692639297e-40]
        """
        rounded = self.round(scale)
        below = rounded.astype(np.float32) < scale
        # Of positive floats, the next one has the next bit pattern.
        return (rounded.view(np.uint16) + below.astype(np.uint16)).view(rounded.dtype).astype(np.float32)


HALVES: Mapping[Precision, Half] = {
    Precision.FP16: Half(
        precision=Precision.FP16, dtype=ir.DataType.FLOAT16, largest=65504.0, smallest=2.0**-14, mask=-3e4
    ),
    Precision.BF16: Half(
        precision=Precision.BF16,
        dtype=ir.DataType.BFLOAT16,
        largest=(2 - 2.0**-7) * 2.0**127,
        smallest=2.0**-126,
        mask=-1e30,
    ),
}


def in_rest(scale: Array, rest: str, *, smallest: float = float(SMALLEST_SCALE)) -> Array:
    """Scales that the type ``rest`` holds exactly, not below ``scale``: what is divided by them is what is multiplied.

    A scale that is too large for the type stays what it is, and what is scaled by it stays FP32.
    """
    scale = np.maximum(scale, smallest).astype(np.float32)
    if rest == "fp32":
        return scale
    stored = HALVES[Precision(rest)].not_below(scale)
    return np.where(np.isfinite(stored), stored, scale)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A number format so narrow that it needs a scale: a value is a number of steps times its scale."""

    label: str
    dtype: ir.DataType
    largest: float
    """What the largest magnitude becomes."""
    lowest: float
    since: int
    """The first opset whose QuantizeLinear and DequantizeLinear take it."""

    def scale(self, peak: Array, rest: str) -> Array:
        """The scales at which magnitudes ``peak`` become the largest, in numbers that ``rest`` holds; float32."""
        smallest = float(SMALLEST_SCALE)
        if rest != "fp32" and not self.dtype.is_integer():
            # Steps that have an exponent lose nothing by a scale of more than is needed, down to 2^-6.
            smallest = HALVES[Precision(rest)].smallest
        return in_rest(peak / np.float32(self.largest), rest, smallest=smallest)

    def round(self, steps: Array) -> Array:
        """The nearest numbers of this format, ties to even; what is too large becomes the largest.

        >>> [format.round(np.array([-9.0, 2.5, 7.6])).astype(float).tolist() for format in (INT4, FP8)]
        [[-8.0, 2.0, 7.0], [-9.0, 2.5, 7.5]]
        """
        if self.dtype.is_integer():
            steps = np.rint(steps)
        # FP8 as ONNX and TensorRT have it has no infinity: unclipped, what is too large would be NaN.
        rounded: Array = np.clip(steps, self.lowest, self.largest).astype(self.dtype.numpy())
        return rounded


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The numbers that an activation is rounded to: ``scale * (step - zero_point)`` for every step of its `Steps`."""

    scale: np.float32
    zero_point: int = 0
    """The step that stands for 0.0; other than 0 in INT8 alone."""


INT8 = Steps(label="INT8", dtype=ir.DataType.INT8, largest=127.0, lowest=-127.0, since=13)
INT4 = Steps(label="INT4", dtype=ir.DataType.INT4, largest=7.0, lowest=-8.0, since=21)
"""From -8 to 7, as TensorRT defines it; a block may be given a scale at which -8 is used, see `weights`.

https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-schemes.html"""
FP8 = Steps(label="FP8", dtype=ir.DataType.FLOAT8E4M3FN, largest=448.0, lowest=-448.0, since=19)
"""E4M3: 4 bits of exponent, 3 of mantissa, no infinity, up to 448: Micikevicius et al. 2022, FP8 Formats for Deep
Learning (arXiv:2209.05433), table 1. (240 is the largest number of its relative with infinities or without -0.)"""
