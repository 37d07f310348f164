"""Nodes that compute the same twice, and weights that are stored twice.

Why not `onnx_ir`'s: its merging of nodes takes -0.0 for 0.0 in attributes, merges Bernoulli and training Dropout, and
gives graph outputs the shape of whatever they are merged with.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from compiler.optimize import edit
from compiler.optimize.contract import Pass

_MAX_ATTRIBUTE_BYTES = 1024
_EDGE_BYTES = 64


def _run(model: ir.Model, limit_bytes: int) -> int:
    del limit_bytes
    return sum(_merge_weights(graph) + _merge_nodes(graph, model) for graph in edit.graphs(model))


def _merge_nodes(graph: ir.Graph, model: ir.Model) -> int:
    changed = 0
    alike: dict[tuple[object, ...], list[ir.Node]] = defaultdict(list)
    for node in graph:
        if not edit.is_pure(node, model) or edit.direct_subgraphs(node):
            continue
        inputs = tuple(None if value is None else id(value) for value in node.inputs)
        candidates = alike[(node.op_type, node.domain, inputs, tuple(sorted(node.attributes)), len(node.outputs))]
        kept = next((other for other in candidates if _same_attributes(node, other)), None)
        if kept is None:
            candidates.append(node)
            continue
        pairs = [(old, new) for old, new in zip(node.outputs, kept.outputs, strict=True) if edit.is_used(old)]
        if all(new.name and edit.can_replace(old, new) for old, new in pairs):
            for old, new in pairs:
                edit.replace(old, new)
            edit.remove(node)
            changed += 1
    return changed


def _same_attributes(one: ir.Node, other: ir.Node) -> bool:
    """Whether every attribute is the same, bit for bit: as bytes 0.0 and -0.0 differ, and NaN equals itself."""
    for name, attribute in one.attributes.items():
        theirs = other.attributes[name]
        if attribute.type == theirs.type == ir.AttributeType.TENSOR and not (attribute.is_ref() or theirs.is_ref()):
            mine, yours = attribute.as_tensor(), theirs.as_tensor()
            if mine.dtype == ir.DataType.STRING or mine.nbytes > _MAX_ATTRIBUTE_BYTES or mine.dtype != yours.dtype:
                return False
            if mine.shape != yours.shape or mine.tobytes() != yours.tobytes():
                return False
        elif _bytes(attribute) != _bytes(theirs):
            return False
    return True


def _bytes(attribute: ir.Attr) -> bytes:
    return bytes(ir.to_proto(attribute).SerializeToString(deterministic=True))


def _merge_weights(graph: ir.Graph) -> int:
    """Compares whole tensors only where dtype, shape, first and last bytes agree, so most weights are hardly read."""
    changed = 0
    alike: dict[tuple[object, ...], list[ir.Value]] = defaultdict(list)
    for name, value in list(graph.initializers.items()):
        tensor = edit.constant(value)
        if tensor is None or tensor.dtype == ir.DataType.STRING or value.is_graph_output():
            continue
        data = _raw(tensor)
        key = (tensor.dtype, tuple(tensor.shape), data[:_EDGE_BYTES].tobytes(), data[-_EDGE_BYTES:].tobytes())
        kept = next((other for other in alike[key] if _same_bytes(other, value)), None)
        if kept is None:
            alike[key].append(value)
        else:
            edit.replace(value, kept)
            del graph.initializers[name]
            changed += 1
    return changed


def _same_bytes(one: ir.Value, other: ir.Value) -> bool:
    left, right = edit.constant(one), edit.constant(other)
    return left is not None and right is not None and bool((_raw(left) == _raw(right)).all())


def _raw(tensor: ir.TensorProtocol) -> NDArray[np.uint8]:
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


MERGE_DUPLICATES = Pass(
    name="merge_duplicates",
    does="keeps one of several nodes that compute the same, and one of several weights that hold the same",
    counts="duplicate",
    run=_run,
)
