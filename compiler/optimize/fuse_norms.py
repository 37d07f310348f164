"""LayerNormalization and RMSNormalization, from the dozen nodes that exporters write where the opset has the operator.

One node keeps its sums in float32 whatever precision surrounds it, and back ends have one kernel for it. Only float32
over the last axis, with a scale of exactly that axis, is fused: there the formulas are the same.

Why not onnxscript's rules: they check neither the opset nor the shapes of scale and bias, which broadcast in the nodes
and may not in the operator.
"""

from __future__ import annotations

import onnx_ir as ir

from compiler.optimize import edit
from compiler.optimize.contract import Pass

_LAYER_NORM_OPSET = 17
_RMS_NORM_OPSET = 23


def _fuse_layer_norm(model: ir.Model, limit_bytes: int) -> int:
    """``(x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) * scale + bias``."""
    del limit_bytes
    if edit.opset(model) < _LAYER_NORM_OPSET:
        return 0
    editor = edit.Editor(model)
    changed = 0
    for graph in edit.graphs(model):
        for node in graph:
            changed += _make_layer_norm(node, editor) or _add_bias(node)
    return changed


def _make_layer_norm(node: ir.Node, editor: edit.Editor) -> bool:
    for centred_scaled, scale in _both_ways(node, "Mul"):
        centred, epsilon = _normalised(centred_scaled)
        subtraction = _made_by(centred, "Sub")
        if centred is None or epsilon is None or subtraction is None:
            continue
        x, mean = subtraction.inputs
        averaged = _averaged(mean)
        if averaged is x and _fits(x, scale):
            return _become(node, "LayerNormalization", x, scale, epsilon, editor)
    return False


def _add_bias(node: ir.Node) -> bool:
    """Take an Add of a vector into the LayerNormalization in front of it."""
    for value, bias in _both_ways(node, "Add"):
        norm = _made_by(value, "LayerNormalization")
        if norm is None or value is None or edit.input_at(norm, 2) is not None or len(norm.outputs) != 1:
            continue
        if not edit.feeds_only(value, node) or not _fits(norm.inputs[0], bias) or not _last_axis(norm):
            continue
        is_there = bias is not None and (bias.is_initializer() or bias.is_graph_input())
        if not is_there or not edit.can_replace(node.outputs[0], value):
            continue
        norm.resize_inputs(3)
        norm.replace_input_with(2, bias)
        edit.replace(node.outputs[0], value)
        edit.remove(node)
        return True
    return False


def _fuse_rms_norm(model: ir.Model, limit_bytes: int) -> int:
    """``x / sqrt(mean(x^2) + epsilon) * scale``."""
    del limit_bytes
    if edit.opset(model) < _RMS_NORM_OPSET:
        return 0
    editor = edit.Editor(model)
    changed = 0
    for graph in edit.graphs(model):
        for node in graph:
            for scaled, scale in _both_ways(node, "Mul"):
                x, epsilon = _normalised(scaled)
                if x is not None and epsilon is not None and _fits(x, scale):
                    changed += _become(node, "RMSNormalization", x, scale, epsilon, editor)
                    break
    return changed


# --- the pieces -----------------------------------------------------------------------------------------------------


def _both_ways(node: ir.Node, op_type: str) -> list[tuple[ir.Value | None, ir.Value | None]]:
    """The two inputs of a commutative node, in both orders."""
    if not edit.is_op(node, op_type) or len(node.inputs) != 2:
        return []
    left, right = node.inputs
    return [(left, right), (right, left)]


def _made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if edit.is_op(node, *op_types) else None


def _normalised(value: ir.Value | None) -> tuple[ir.Value | None, float | None]:
    """``(d, epsilon)`` where ``value`` is ``d / sqrt(mean(d^2) + epsilon)``, by division or by reciprocal."""
    division = _made_by(value, "Div")
    if division is not None:
        epsilon = _root(division.inputs[1], division.inputs[0])
        return (division.inputs[0], epsilon) if epsilon is not None else (None, None)
    product = _made_by(value, "Mul")
    for d, inverse in _both_ways(product, "Mul") if product is not None else []:
        reciprocal = _made_by(inverse, "Reciprocal")
        epsilon = _root(reciprocal.inputs[0], d) if reciprocal is not None else None
        if epsilon is not None:
            return d, epsilon
        quotient = _made_by(inverse, "Div")
        if quotient is not None and edit.constant_scalar(quotient.inputs[0]) == 1:
            epsilon = _root(quotient.inputs[1], d)
            if epsilon is not None:
                return d, epsilon
    return None, None


def _root(value: ir.Value | None, d: ir.Value | None) -> float | None:
    """``epsilon`` where ``value`` is ``sqrt(mean(d^2) + epsilon)``."""
    root = _made_by(value, "Sqrt")
    total = _made_by(root.inputs[0], "Add") if root is not None else None
    for mean, epsilon in _both_ways(total, "Add") if total is not None else []:
        number = edit.constant_scalar(epsilon)
        square = _averaged(mean)
        if number is not None and number >= 0 and square is not None and _squared(square) is d:
            return number
    return None


def _squared(value: ir.Value) -> ir.Value | None:
    product = _made_by(value, "Mul")
    if product is not None and product.inputs[0] is product.inputs[1]:
        return product.inputs[0]
    power = _made_by(value, "Pow")
    return power.inputs[0] if power is not None and edit.constant_scalar(power.inputs[1]) == 2 else None


def _averaged(value: ir.Value | None) -> ir.Value | None:
    """What ``value`` is the mean of over the last axis, which it keeps."""
    mean = _made_by(value, "ReduceMean")
    if mean is None or any(attribute.is_ref() for attribute in mean.attributes.values()):
        return None
    keeps = mean.attributes.get("keepdims")
    shape = edit.dims(mean.inputs[0])
    attribute = mean.attributes.get("axes")
    axes = list(attribute.as_ints()) if attribute is not None else edit.constant_ints(edit.input_at(mean, 1))
    last = axes == [-1] or (shape is not None and axes == [len(shape) - 1])
    return mean.inputs[0] if last and (keeps is None or keeps.as_int() == 1) else None


def _last_axis(norm: ir.Node) -> bool:
    axis, shape = norm.attributes.get("axis"), edit.dims(norm.inputs[0])
    if axis is None:
        return True
    return not axis.is_ref() and (axis.as_int() == -1 or (shape is not None and axis.as_int() == len(shape) - 1))


def _fits(x: ir.Value | None, vector: ir.Value | None) -> bool:
    """Whether ``vector`` is float32 and exactly as long as the last axis of ``x``, float32 too."""
    shape, length = edit.dims(x), edit.static(vector)
    if x is None or vector is None or not shape or length is None or x.dtype != ir.DataType.FLOAT:
        return False
    return _dtype(vector) == ir.DataType.FLOAT and length == (shape[-1],)


def _dtype(value: ir.Value) -> ir.DataType | None:
    tensor = edit.constant(value)
    return tensor.dtype if tensor is not None else value.dtype


def _become(
    node: ir.Node, op_type: str, x: ir.Value | None, scale: ir.Value | None, epsilon: float, editor: edit.Editor
) -> bool:
    attributes = [ir.AttrInt64("axis", -1), ir.AttrFloat32("epsilon", epsilon)]
    fused = editor.node(op_type, (x, scale), attributes, before=node, like=node.outputs[0])
    edit.replace(node.outputs[0], fused)
    edit.remove(node)
    return True


FUSE_LAYER_NORM = Pass(
    name="fuse_layer_norm",
    does="makes one LayerNormalization of the nodes that compute it, from opset 17 on",
    counts="node",
    run=_fuse_layer_norm,
    rounds=True,
)

FUSE_RMS_NORM = Pass(
    name="fuse_rms_norm",
    does="makes one RMSNormalization of the nodes that compute it, from opset 23 on",
    counts="node",
    run=_fuse_rms_norm,
    rounds=True,
)
