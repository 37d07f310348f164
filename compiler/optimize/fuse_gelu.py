"""Gelu, from the nodes that compute it, from opset 20 on: one kernel, and one tensor to quantise instead of five.

Exact: ``x * 0.5 * (1 + erf(x / sqrt(2)))``. Approximate: ``x * 0.5 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))``
(https://onnx.ai/onnx/operators/onnx__Gelu.html).
"""

from __future__ import annotations

import math
from typing import TypeGuard

import onnx_ir as ir

from compiler.optimize import edit
from compiler.optimize.contract import Pass

_GELU_OPSET = 20
_TOLERANCE = 1e-6
"""How far a constant may be from its exact value, relatively: exporters write float32."""


def _run(model: ir.Model, limit_bytes: int) -> int:
    del limit_bytes
    if edit.opset(model) < _GELU_OPSET:
        return 0
    editor = edit.Editor(model)
    changed = 0
    for graph in edit.graphs(model):
        for node in graph:
            if (found := _gelu(node)) is None:
                continue
            x, approximate = found
            attributes = [ir.AttrString("approximate", approximate)]
            output = node.outputs[0]
            fused = editor.node("Gelu", (x,), attributes, before=node, like=output)
            edit.replace(output, fused)
            edit.remove(node)
            changed += 1
    return changed


def _gelu(node: ir.Node) -> tuple[ir.Value, str] | None:
    """``(x, approximate)`` where ``node`` is the last multiplication of a Gelu of float32 ``x``."""
    values, factor = _factors(node)
    if len(values) == 1:
        values, _ = _factors(values[0].producer())
    if len(values) != 2 or not _is(factor, 0.5):
        return None
    for x, bracket in (values, values[::-1]):
        # A constant may be of rank 1, which a scalar x would take over.
        if x.dtype != ir.DataType.FLOAT or not edit.dims(x):
            continue
        inner = _one_plus(bracket)
        if inner is not None and edit.is_op(inner, "Erf") and _is_multiple(inner.inputs[0], x, 1 / math.sqrt(2)):
            return x, "none"
        if inner is not None and edit.is_op(inner, "Tanh") and _is_cubic(inner.inputs[0], x):
            return x, "tanh"
    return None


def _factors(node: ir.Node | None) -> tuple[list[ir.Value], float]:
    """The values and the constant that a tree of Mul, and of Div by constants, multiplies."""
    if not edit.is_op(node, "Mul", "Div") or len(node.inputs) != 2:
        return [], 1.0
    values: list[ir.Value] = []
    factor = 1.0
    for index, value in enumerate(node.inputs):
        number = edit.constant_scalar(value)
        divides = index == 1 and node.op_type == "Div"
        if number is not None:
            factor = factor / number if divides and number != 0 else factor * number
            continue
        inner = value.producer() if value is not None else None
        if value is None or divides:
            return [], 1.0
        if edit.is_op(inner, "Mul", "Div") and _has_constant(inner):
            more, other = _factors(inner)
            values += more
            factor *= other
        else:
            values.append(value)
    return values, factor


def _has_constant(node: ir.Node | None) -> bool:
    return node is not None and any(edit.constant_scalar(value) is not None for value in node.inputs)


def _one_plus(value: ir.Value) -> ir.Node | None:
    """What makes ``z`` where ``value`` is ``1 + z``."""
    node = value.producer()
    if not _is_addition(node):
        return None
    for one, other in (node.inputs, node.inputs[::-1]):
        number = edit.constant_scalar(one)
        if number == 1 and other is not None:
            return other.producer()
    return None


def _is_addition(node: ir.Node | None) -> TypeGuard[ir.Node]:
    return edit.is_op(node, "Add", "Sum") and len(node.inputs) == 2


def _is_multiple(value: ir.Value | None, x: ir.Value, expected: float) -> bool:
    values, factor = _factors(value.producer() if value is not None else None)
    return len(values) == 1 and values[0] is x and _is(factor, expected)


def _is_cubic(value: ir.Value | None, x: ir.Value) -> bool:
    """Whether ``value`` is ``sqrt(2 / pi) * (x + 0.044715 * x^3)``."""
    values, factor = _factors(value.producer() if value is not None else None)
    total = values[0].producer() if len(values) == 1 and _is(factor, math.sqrt(2 / math.pi)) else None
    if not _is_addition(total):
        return False
    for plain, cubed in (total.inputs, total.inputs[::-1]):
        if plain is not x or cubed is None:
            continue
        cubes, small = _factors(cubed.producer())
        if len(cubes) == 1 and _is(small, 0.044715) and _is_cube(cubes[0], x):
            return True
    return False


def _is_cube(value: ir.Value, x: ir.Value) -> bool:
    node = value.producer()
    if edit.is_op(node, "Pow"):
        return node.inputs[0] is x and edit.constant_scalar(node.inputs[1]) == 3
    if not edit.is_op(node, "Mul"):
        return False
    for one, other in (node.inputs, node.inputs[::-1]):
        square = other.producer() if other is not None else None
        if one is x and square is not None and edit.is_op(square, "Mul") and list(square.inputs) == [x, x]:
            return True
    return False


def _is(number: float, expected: float) -> bool:
    return math.isclose(number, expected, rel_tol=_TOLERANCE)


FUSE_GELU = Pass(
    name="fuse_gelu",
    does="makes one Gelu of the nodes that compute it, from opset 20 on",
    counts="node",
    run=_run,
    rounds=True,
)
