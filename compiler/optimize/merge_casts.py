"""Two Casts in a row, where the first loses nothing: one Cast. CastLike, where the dtype is known: Cast.

Why not onnxscript's rule: it drops float32 between float64 or int64 and float16, where rounding twice and rounding
once differ.
"""

from __future__ import annotations

import onnx_ir as ir

from compiler.optimize import edit
from compiler.optimize.contract import Pass

_D = ir.DataType

_FLOATS = {_D.FLOAT16: (11, 5), _D.BFLOAT16: (8, 8), _D.FLOAT: (24, 8), _D.DOUBLE: (53, 11)}
"""Bits of significand (the hidden one included) and of exponent."""

_INTEGERS = {
    _D.BOOL: (0, 1),
    _D.UINT8: (0, 8),
    _D.UINT16: (0, 16),
    _D.UINT32: (0, 32),
    _D.UINT64: (0, 64),
    _D.INT8: (1, 7),
    _D.INT16: (1, 15),
    _D.INT32: (1, 31),
    _D.INT64: (1, 63),
}
"""Whether there is a sign, and the bits beside it."""


def loses_nothing(source: ir.DataType, middle: ir.DataType, target: ir.DataType) -> bool:
    """Whether ``target(middle(x)) == target(x)`` for every ``x`` of ``source``, bit for bit, in every runtime.

    >>> loses_nothing(ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.BFLOAT16)
    True
    >>> loses_nothing(ir.DataType.DOUBLE, ir.DataType.FLOAT, ir.DataType.FLOAT16)
    False
    """
    if source in _FLOATS and middle in _FLOATS and target in _FLOATS:
        return all(wide >= narrow for wide, narrow in zip(_FLOATS[middle], _FLOATS[source], strict=True))
    if source in _INTEGERS and middle in _INTEGERS and (target in _INTEGERS or target in (_D.FLOAT, _D.DOUBLE)):
        return all(wide >= narrow for wide, narrow in zip(_INTEGERS[middle], _INTEGERS[source], strict=True))
    return source == _D.BOOL and middle in _FLOATS and (target in _FLOATS or target in _INTEGERS)


def _run(model: ir.Model, limit_bytes: int) -> int:
    del limit_bytes
    changed = 0
    if edit.opset(model) < 6:
        return 0
    for graph in edit.graphs(model):
        for node in graph:
            changed += _name_target(node)
            middle = edit.input_at(node, 0)
            inner = middle.producer() if middle is not None else None
            if inner is None or not edit.is_op(node, "Cast") or not edit.is_op(inner, "Cast"):
                continue
            source, between, target = edit.input_at(inner, 0), _target(inner), _target(node)
            if source is None or source.dtype is None or between is None or target is None:
                continue
            if loses_nothing(source.dtype, between, target):
                node.replace_input_with(0, source)
                changed += 1
    return changed


def _target(cast: ir.Node) -> ir.DataType | None:
    to = cast.attributes.get("to")
    known = to is not None and to.type == ir.AttributeType.INT and not to.is_ref()
    return next((dtype for dtype in (*_FLOATS, *_INTEGERS) if known and to is not None and dtype == to.as_int()), None)


def _name_target(node: ir.Node) -> int:
    """Make a CastLike to a dtype that is known a Cast: fewer back ends know CastLike, and what it is like can go."""
    if not edit.is_op(node, "CastLike") or node.attributes or len(node.inputs) != 2 or node.inputs[1] is None:
        return 0
    target = node.inputs[1].dtype
    if target not in _FLOATS and target not in _INTEGERS:
        return 0
    assert target is not None
    node.op_type = "Cast"
    node.resize_inputs(1)
    node.attributes["to"] = ir.AttrInt64("to", int(target))
    return 1


MERGE_CASTS = Pass(
    name="merge_casts",
    does="skips a Cast to a wider type in front of another Cast, and gives CastLike its dtype",
    counts="node",
    run=_run,
)
