"""AWQ: make the weights of inputs that matter larger before they are rounded, so that they lose less.

``X W = (X / s) (s W)`` for any positive ``s`` per input. In a block that shares a scale, the weight that is made larger is
rounded to finer steps of its own, and its neighbours to hardly coarser ones: ``s = mean(abs(X))^a``.

Source: Lin et al. 2023, AWQ (arXiv:2306.00978), section 3.2. There ``a`` is searched by running the layer; here by the
Gram matrix of what it reads, which says the same exactly. ``X / s`` is folded into the normalisation that makes X where
nothing else reads it; elsewhere it is a Mul of its own, which costs time at every run and must gain `MUL_GAIN_DB`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from compiler.onnx_files import FreeNames
from compiler.quantize import graphs, placement
from compiler.quantize.gram import Gram, error
from compiler.spec import Array

STRENGTHS = tuple(round(0.1 * step, 1) for step in range(1, 10))
"""The values of ``a`` that are tried, beside 0: the weights as they are."""

FOLD_GAIN_DB = 0.2
"""What factors that cost nothing must gain."""

MUL_GAIN_DB = 1.0
"""What factors that cost a Mul must gain."""

_FLOOR = 1e-4
"""Inputs count as at least this share of the largest, so that a dead one gets a factor that is a number."""

_NORMALISATIONS = frozenset({"LayerNormalization", "RMSNormalization"})


def choose_factors(weights: Sequence[Array], gram: Gram, rounded: Callable[[Array], Array]) -> tuple[Array, float]:
    """Factors [K] by which to divide what the layers read, and how much less their outputs err on samples held out, in dB;
    ones and 0 at worst.

    Args:
        weights: of every layer that reads it, float32 [N, K].
        gram: of what they read, of one group.
        rounded: what [N, K] is after rounding.
    """
    inputs = gram.magnitude[0].astype(np.float64)
    inputs = np.maximum(inputs, inputs.max() * _FLOOR)

    def cost(factors: Array, matrix: Array) -> float:
        return sum(error(weight, rounded(weight * factors) / factors, matrix) for weight in weights)

    best = np.ones(len(inputs), np.float32)
    before = least = cost(best, gram.fit[0])
    for strength in STRENGTHS if before > 0 else ():
        tried = inputs**strength
        tried = (tried / np.sqrt(tried.max() * tried.min())).astype(np.float32)
        found = cost(tried, gram.fit[0])
        if found < least:
            best, least = tried, found
    if least == before:
        return best, 0.0
    held = [cost(factors, gram.held[0]) for factors in (np.ones_like(best), best)]
    return best, float(10 * np.log10(held[0] / held[1])) if min(held) > 0 else 0.0


def can_fold(graph: ir.Graph, value: ir.Value, layers: Sequence[ir.Node]) -> bool:
    """Whether the maker of ``value`` multiplies it by a constant per channel, and nobody but ``layers`` reads it."""
    maker = value.producer()
    if maker is None or maker.graph is not graph or value.is_graph_output() or value in graphs.enclosed(graph):
        return False
    return set(value.uses()) == {(node, 0) for node in layers} and bool(_gains(maker))


def divide(graph: ir.Graph, value: ir.Value, layers: Sequence[ir.Node], factors: Array, names: FreeNames) -> ir.Value:
    """Let ``layers`` read ``value / factors``, by way of the constants of its maker where it can; returns what they read."""
    maker = value.producer()
    if maker is not None and can_fold(graph, value, layers):
        for index in _gains(maker):
            constant = maker.inputs[index]
            array = placement.constant(constant)
            assert constant is not None and array is not None, "a gain is a constant"
            folded = graphs.register(graph, names.free(f"{constant.name}_scaled"), (array / factors).astype(np.float32))
            maker.replace_input_with(index, folded)
            graphs.forget_unused(graph, constant)
        return value
    made = graphs.like(value, names.free(f"{value.name}_scaled"), ir.DataType.FLOAT)
    inverse = graphs.register(graph, names.free(f"{made.name}_factors"), (1 / factors).astype(np.float32))
    multiply = ir.node("Mul", [value, inverse], outputs=[made], name=made.name)
    if maker is not None:
        graph.insert_after(maker, multiply)
    else:
        graph.insert_before(graph[0], multiply)
    for node in layers:
        node.replace_input_with(0, made)
    return made


def _gains(maker: ir.Node) -> tuple[int, ...]:
    """Inputs of ``maker`` that are constants per channel, all of which its output is proportional to; none if it is not."""
    if maker.domain != "" or len(maker.outputs) != 1:
        return ()
    per_channel = tuple(
        index
        for index, value in enumerate(maker.inputs)
        if (array := placement.constant(value)) is not None and array.ndim == 1 and array.dtype == np.float32
    )
    if maker.op_type in _NORMALISATIONS:
        rest = tuple(index for index, value in enumerate(maker.inputs) if index and value is not None)
        return per_channel if per_channel == rest else ()
    return per_channel if maker.op_type == "Mul" and len(per_channel) == 1 else ()
