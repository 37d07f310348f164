"""By which factors the quantised model's channels differ from the FP32 model's, told from the weights of both.

Cross-layer equalisation (`compiler.quantize.equalize`) divides what a convolution makes by factors, with which it multiplies the
weights of those that read it. Between the two, tensors of one name differ, and nothing is wrong. Where output channel o has
been multiplied by f_o, and input channel i by g_i, weights W have become ``V[o, i] = f_o W[o, i] / g_i``.

Factors are believed where a maker and who reads it first agree: what one side alone has is an error. Of a convolution whose output is as it
was, V tells g, and with it the f of what makes its input, and so on, up; then each is compared with its own V, from there down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compiler.quantize import placement
from compiler.spec import Array

_LEFT = 0.01
"""Of the square of a weight, more than rounding leaves."""

_ALIKE = 0.05
"""Factors that are all this close to 1 are none."""


@dataclass(kw_only=True, eq=False)
class _Weights:
    """Those of a convolution in both models."""

    ours: Array
    """W [O, I, ...], float64."""
    theirs: Array
    """V, of the same shape."""
    made: Array | None = None
    """f [O], NaN where it cannot be told; None: 1."""
    read: Array | None = None
    """g [I]; None: 1."""

    def expected(self) -> Array:
        """V as W and the factors have it; 0 where they are not known."""
        found = self.ours
        if self.made is not None:
            found = found * placement.along(np.nan_to_num(self.made), 0, found.ndim)
        return found if self.read is None else found / placement.along(self.read, 1, found.ndim)

    def ratio(self, axis: int) -> Array:
        """How many times what is expected V is, at each place of ``axis``; NaN where it cannot be told."""
        others, expected = tuple(place for place in range(self.ours.ndim) if place != axis), self.expected()
        square, product = (expected**2).sum(axis=others), (expected * self.theirs).sum(axis=others)
        known = (square > 0) & (product > 0)
        return np.where(known, product / np.where(known, square, 1), np.nan)

    def fit(self) -> bool:
        return bool(((self.theirs - self.expected()) ** 2).sum() <= _LEFT * (self.theirs**2).sum())


def factors(original: ir.Graph, quantised: ir.Graph) -> dict[str, Array]:
    """By tensor that both have: how many times the FP32 model's its channels are, float32 in a shape that multiplies it.

    Args:
        original: as of `compiler.quantize.beside.prepared`.
        quantised: likewise.
    """
    weights = _weights(original, quantised)
    pairs = [
        pair
        for pair in placement.pairs(original, placement.place(original))
        if pair.maker in weights and all(reader in weights for reader in pair.readers)
    ]
    for pair in reversed(pairs):
        weights[pair.maker].made = 1 / weights[pair.readers[0]].ratio(axis=1)
    found = {}
    for pair in pairs:
        maker = weights[pair.maker]
        told, maker.made = maker.made, None
        assert told is not None, "just set"
        own = maker.ratio(axis=0)
        made = np.where(np.isnan(told), np.where(np.isnan(own), 1, own), told)
        maker.made = made
        if np.isnan(told).all() or (np.abs(made - 1) < _ALIKE).all() or not maker.fit():
            maker.made = None
            continue
        for reader in pair.readers:
            weights[reader].read = made
        for value in (pair.maker.outputs[0], pair.value):
            found[str(value.name)] = placement.along(made, 1, maker.ours.ndim).astype(np.float32)
    return found


def _weights(original: ir.Graph, quantised: ir.Graph) -> dict[ir.Node, _Weights]:
    makers = {str(value.name): node for node in quantised for value in node.outputs}
    found = {}
    for node in original:
        other = makers.get(str(node.outputs[0].name))
        if node.op_type != "Conv" or other is None or other.op_type != "Conv":
            continue
        ours, theirs = placement.constant(node.inputs[1]), placement.dequantised(other.inputs[1])
        if ours is not None and theirs is not None and ours.shape == theirs.shape:
            found[node] = _Weights(ours=ours.astype(np.float64), theirs=theirs.astype(np.float64))
    return found
