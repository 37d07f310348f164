"""Nodes that hand their input on: Identity, inference Dropout, and any node whose parameters make it one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from compiler.optimize import edit
from compiler.optimize.contract import Pass
from compiler.spec import Array

_FARTHEST = 2**31 - 1
"""A Slice that ends here or later ends at the end: exporters write the largest int32 or int64 for "all"."""


def _run(model: ir.Model, limit_bytes: int) -> int:
    del limit_bytes
    version = edit.opset(model)
    changed = 0
    for graph in edit.graphs(model):
        for node in graph:
            check = _CHECKS.get(node.op_type) if node.domain == "" else None
            source = check(node, version) if check is not None else None
            output = edit.only_output(node)
            if source is not None and output is not None and edit.replace(output, source):
                edit.remove(node)
                changed += 1
    return changed


def _first(node: ir.Node) -> ir.Value | None:
    return edit.input_at(node, 0)


def _identity(node: ir.Node, version: int) -> ir.Value | None:
    del version
    return _first(node)


def _dropout(node: ir.Node, version: int) -> ir.Value | None:
    """Up to opset 6 Dropout trains unless told not to; from 12 on it infers unless told to train."""
    if version < 7:
        is_test = node.attributes.get("is_test")
        return _first(node) if is_test is not None and not is_test.is_ref() and is_test.as_int() == 1 else None
    training = edit.input_at(node, 2)
    if training is None:
        return _first(node)
    flag = edit.constant_array(training, max_elements=1)
    return _first(node) if flag is not None and not flag.any() else None


def _cast(node: ir.Node, version: int) -> ir.Value | None:
    source, to = _first(node), node.attributes.get("to")
    if source is None or source.dtype is None or to is None or to.type != ir.AttributeType.INT or version < 6:
        return None
    return source if not to.is_ref() and source.dtype == to.as_int() else None


def _cast_like(node: ir.Node, version: int) -> ir.Value | None:
    del version
    source, like = _first(node), edit.input_at(node, 1)
    same = source is not None and like is not None and source.dtype is not None and source.dtype == like.dtype
    return source if same else None


def _transpose(node: ir.Node, version: int) -> ir.Value | None:
    del version
    perm = node.attributes.get("perm")
    if perm is None:
        shape = edit.dims(_first(node))
        return _first(node) if shape is not None and len(shape) < 2 else None
    return _first(node) if not perm.is_ref() and list(perm.as_ints()) == list(range(len(perm.as_ints()))) else None


def _reshape(node: ir.Node, version: int) -> ir.Value | None:
    """Same rank and every axis the same: a size that is known and equal, or copied by a 0, or one axis left over."""
    source, target = _first(node), edit.constant_ints(edit.input_at(node, 1))
    shape = edit.dims(source)
    if version < 5 or shape is None or target is None or len(shape) != len(target):
        return None
    allow_zero = node.attributes.get("allowzero")
    copies = allow_zero is None or (not allow_zero.is_ref() and allow_zero.as_int() == 0)
    same = [size == want or (want == 0 and copies) for size, want in zip(shape, target, strict=True)]
    if all(same):
        return source
    # A -1 comes out as the axis that is left over, unless a size of 0 makes it undetermined.
    left = [index for index, equal in enumerate(same) if not equal]
    others_known = all(
        isinstance(shape[index], int) and shape[index] != 0 for index in range(len(shape)) if index not in left
    )
    return source if len(left) == 1 and target[left[0]] == -1 and others_known else None


def _flatten(node: ir.Node, version: int) -> ir.Value | None:
    del version
    shape, axis = edit.dims(_first(node)), node.attributes.get("axis")
    at = 1 if axis is None else None if axis.is_ref() else axis.as_int()
    return _first(node) if shape is not None and len(shape) == 2 and at in (1, -1) else None


def _expand(node: ir.Node, version: int) -> ir.Value | None:
    """Expand broadcasts both ways, so a target of 1 leaves an axis as it is."""
    del version
    source, target = _first(node), edit.constant_ints(edit.input_at(node, 1))
    shape = edit.dims(source)
    if shape is None or target is None or len(target) > len(shape):
        return None
    tail = shape[len(shape) - len(target) :]
    return source if all(want in (1, size) for size, want in zip(tail, target, strict=True)) else None


def _tile(node: ir.Node, version: int) -> ir.Value | None:
    repeats = edit.constant_ints(edit.input_at(node, 1))
    return _first(node) if version >= 6 and repeats is not None and all(repeat == 1 for repeat in repeats) else None


def _pad(node: ir.Node, version: int) -> ir.Value | None:
    if version < 11:
        pads = node.attributes.get("pads")
        return _first(node) if pads is not None and not pads.is_ref() and not any(pads.as_ints()) else None
    pads_input = edit.constant_ints(edit.input_at(node, 1))
    return _first(node) if pads_input is not None and not any(pads_input) else None


def _slice(node: ir.Node, version: int) -> ir.Value | None:
    if version < 10:
        return None
    starts, ends = (edit.constant_ints(edit.input_at(node, index)) for index in (1, 2))
    steps = edit.input_at(node, 4)
    if starts is None or ends is None or any(starts) or any(end < _FARTHEST for end in ends):
        return None
    return _first(node) if steps is None or set(edit.constant_ints(steps) or [0]) == {1} else None


def _one_input(node: ir.Node, version: int) -> ir.Value | None:
    del version
    return _first(node) if len(node.inputs) == 1 else None


def _neutral(right: Callable[[Array], bool], *, commutes: bool) -> _Check:
    """For a binary operator: the side that is left when the other is a constant that changes no bit of it."""

    def check(node: ir.Node, version: int) -> ir.Value | None:
        if version < 7 or len(node.inputs) != 2:
            return None
        sides = [(0, 1), (1, 0)] if commutes else [(0, 1)]
        for keep, drop in sides:
            kept, shape = node.inputs[keep], edit.dims(node.inputs[keep])
            other = edit.constant_array(node.inputs[drop], max_elements=1)
            if other is None or other.size != 1 or other.dtype.kind not in "iufb" or edit.constant(kept) is not None:
                continue
            if (shape is not None or other.ndim == 0) and other.ndim <= len(shape or ()) and right(other):
                return kept
        return None

    return check


_Check = Callable[[ir.Node, int], ir.Value | None]

_CHECKS: dict[str, _Check] = {
    # x + 0.0 turns -0.0 into 0.0; x + -0.0 and x - 0.0 keep every bit.
    "Add": _neutral(lambda c: bool(c == 0 and (c.dtype.kind in "iu" or np.signbit(c).all())), commutes=True),
    "Sub": _neutral(lambda c: bool(c == 0 and (c.dtype.kind in "iu" or not np.signbit(c).any())), commutes=False),
    "Mul": _neutral(lambda c: bool(c == 1), commutes=True),
    "Div": _neutral(lambda c: bool(c == 1), commutes=False),
    "And": _neutral(lambda c: bool(c.all()), commutes=True),
    "Or": _neutral(lambda c: not c.any(), commutes=True),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Concat": _one_input,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "Identity": _identity,
    "Max": _one_input,
    "Mean": _one_input,
    "Min": _one_input,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "Sum": _one_input,
    "Tile": _tile,
    "Transpose": _transpose,
}

REMOVE_IDENTITIES = Pass(
    name="remove_identities",
    does="removes nodes that hand on their input unchanged",
    counts="node",
    run=_run,
)
