"""Mask values that half precision cannot hold, made smaller where they can only reach a Softmax: see `half`."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from compiler.onnx_files import FreeNames
from compiler.quantize import graphs
from compiler.quantize.formats import MARGIN, Half
from compiler.quantize.observe import Observed
from compiler.quantize.placement import Edge
from compiler.spec import Array

_MASK_WAYS = graphs.MOVERS | {"Add", "Mul", "Where", "Max"}


def clamp(
    graph: ir.Graph, statistics: Observed, number: Half, names: FreeNames
) -> tuple[dict[ir.Value, float], list[str]]:
    """Replace mask values that only reach a Softmax: see the top. Returns magnitudes of what they reach, and notes."""
    candidates = set()
    for node in graph:
        if node.domain == "" and node.op_type == "ConstantOfShape" and _holds_mask(graphs.filler(node), number):
            candidates.add((node, -1))
        candidates.update((node, i) for i, value in enumerate(node.inputs) if _holds_mask(graphs.weight(value), number))
    while True:
        reached, escaped = _reach(graph, candidates, statistics, number)
        if not escaped:
            break
        candidates -= escaped
    notes: dict[str, None] = {}
    clamped: dict[ir.Value, ir.Value] = {}
    for node, index in sorted(candidates, key=lambda edge: (str(edge[0].outputs[0].name), edge[1])):
        source = node.outputs[0] if index < 0 else node.inputs[index]
        assert source is not None, "a candidate holds a mask"
        array = graphs.filler(node) if index < 0 else graphs.weight(source)
        assert array is not None, "a candidate holds a mask"
        lowest, changed = float(array.min()), _clamped(array, number)
        notes[f"mask value {lowest:.3g} of '{source.name}' becomes {number.mask:g}: its exponential stays 0"] = None
        if index < 0:
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(changed))
            continue
        if source not in clamped:
            clamped[source] = graphs.register(graph, names.free(f"{source.name}_clamped"), changed)
        node.replace_input_with(index, clamped[source])
        graphs.forget_unused(graph, source)
    return reached, list(notes)


def _holds_mask(array: Array | None, number: Half) -> bool:
    """Whether an FP32 constant holds values so low that half has no room for them, and none so high."""
    if array is None or array.dtype != np.float32 or not array.size:
        return False
    finite = array[np.isfinite(array)]
    limit = number.largest / MARGIN
    return bool(finite.size) and float(finite.min()) < -limit and float(finite.max()) <= limit


def _clamped(array: Array, number: Half) -> Array:
    low = np.isfinite(array) & (array < -number.largest / MARGIN)
    return np.where(low, np.float32(number.mask), array)


def _reach(
    graph: ir.Graph, candidates: Collection[Edge], statistics: Observed, number: Half
) -> tuple[dict[ir.Value, float], set[Edge]]:
    """Follow mask values to where they end.

    Returns:
        The magnitude that each tensor on their way may have once they are clamped; and those that reach what is no
        Softmax, or something too large to stay finite.
    """
    enclosed = graphs.enclosed(graph)
    size: dict[ir.Value, float] = {}
    origin: dict[ir.Value, set[Edge]] = {}
    escaped: set[Edge] = set()
    lowest = abs(number.mask)
    for node in graph:
        hot = {i: size[value] for i, value in enumerate(node.inputs) if value is not None and value in size}
        hot |= {i: lowest for i in range(-1, len(node.inputs)) if (node, i) in candidates}
        sources = {(node, i) for i in hot if (node, i) in candidates}
        sources = sources.union(*(origin[value] for value in node.inputs if value is not None and value in origin))
        if not hot or (node.domain == "" and _is_sink(node, hot)):
            continue
        after = _after(node, hot, statistics)
        if after is None or after > number.largest or any(o.is_graph_output() or o in enclosed for o in node.outputs):
            escaped |= sources
        else:
            size.update((output, after) for output in node.outputs)
            origin.update((output, sources) for output in node.outputs)
    return size, escaped


def _is_sink(node: ir.Node, hot: Collection[int]) -> bool:
    """Whether mask values end here: the mask of Attention is added to its scores, inside."""
    return node.op_type == "Softmax" or (node.op_type == "Attention" and set(hot) == {3})


def _after(node: ir.Node, hot: Mapping[int, float], statistics: Observed) -> float | None:
    """The magnitude of what ``node`` makes of clamped mask values at the inputs ``hot``; None if it is a mask no more."""
    if node.domain != "" or not (node.op_type in _MASK_WAYS or _is_float_cast(node) or -1 in hot):
        return None
    others = [value for i, value in enumerate(node.inputs) if i not in hot]
    if node.op_type == "Add":
        return sum(hot.values()) + MARGIN * sum(graphs.peak(value, statistics) for value in others)
    if node.op_type == "Mul":
        bounds = [graphs.bounds(value, statistics) for value in others]
        return max(hot.values()) if bounds and all(b is not None and 0 <= b[0] <= b[1] <= 1 for b in bounds) else None
    return max(hot.values())


def _is_float_cast(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.domain == "" and node.attributes["to"].as_int() == ir.DataType.FLOAT
