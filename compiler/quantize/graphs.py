"""What the modules that change precision ask of a graph, and the small changes that they all make to it."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from compiler.onnx_files import FreeNames
from compiler.quantize import placement
from compiler.quantize.observe import Observed
from compiler.spec import Array

MOVERS = frozenset(
    {"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "DepthToSpace", "SpaceToDepth"}
    | {"Concat", "Split", "Slice", "Pad", "Expand", "Tile", "Trilu", "ReverseSequence"}
    | {"Gather", "GatherElements", "GatherND", "Compress"}
)
"""Operators that compute nothing: they take over the precision around them."""

COPIED_BYTES = 1 << 30
"""Of a model, for a second copy of its weights in memory to be no trouble."""


def is_float(value: ir.Value | None) -> bool:
    return value is not None and isinstance(value.type, ir.TensorType) and value.dtype == ir.DataType.FLOAT


def weight(value: ir.Value | None) -> Array | None:
    """The values of an FP32 constant."""
    return placement.constant(value) if is_float(value) else None


def filler(node: ir.Node) -> Array | None:
    """What a ConstantOfShape fills with."""
    attribute = node.attributes.get("value")
    return attribute.as_tensor().numpy() if attribute is not None else None


def bounds(value: ir.Value | None, statistics: Observed) -> tuple[float, float] | None:
    """The finite extremes of a tensor, as far as known; 0 stands for an infinite one, which half holds, too."""
    constant = weight(value)
    if constant is not None:
        finite = constant[np.isfinite(constant)]
        return float(finite.min(initial=0.0)), float(finite.max(initial=0.0))
    found = statistics.get(str(value.name)) if value is not None else None
    if found is None:
        return None
    return found.low if math.isfinite(found.low) else 0.0, found.high if math.isfinite(found.high) else 0.0


def peak(value: ir.Value | None, statistics: Observed) -> float:
    found = bounds(value, statistics)
    return 0.0 if found is None else max(-found[0], found[1])


def register(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def forget_unused(graph: ir.Graph, value: ir.Value) -> bool:
    """Remove an initialiser that nobody reads. Returns whether it did."""
    if value.uses() or value.is_graph_output() or value in enclosed_outputs(graph):
        return False
    del graph.initializers[str(value.name)]
    return True


def like(value: ir.Value, name: str, dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=None if value.shape is None else value.shape.copy())


def cast(value: ir.Value, output: ir.Value, names: FreeNames) -> ir.Node:
    assert output.dtype is not None, "a cast has a type"
    return ir.node("Cast", [value], {"to": output.dtype}, outputs=[output], name=names.free(f"{output.name}_cast"))


def enclosed(graph: ir.Graph) -> set[ir.Value]:
    """Values that a subgraph reads."""
    return {v for g in graph.subgraphs() for node in g for v in node.inputs if v is not None} | enclosed_outputs(graph)


def encloses(node: ir.Node) -> bool:
    """Whether ``node`` holds a graph of its own."""
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def enclosed_outputs(graph: ir.Graph) -> set[ir.Value]:
    """Values that a subgraph returns, its own among them."""
    return {value for inner in graph.subgraphs() for value in inner.outputs}
