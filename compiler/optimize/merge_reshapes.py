"""Nodes that only regroup axes, in front of a Reshape whose target says everything: the Reshape alone. Two Unsqueezes
in a row: one. Squeeze and Unsqueeze that undo each other: neither.

Why not onnxscript's rule: it turns a 0 of the target into -1, which a tensor without elements leaves undetermined.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compiler.optimize import edit
from compiler.optimize.contract import Pass

_REGROUPING = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")


def _run(model: ir.Model, limit_bytes: int) -> int:
    del limit_bytes
    editor = edit.Editor(model)
    changed = 0
    for graph in edit.graphs(model):
        for node in graph:
            middle = edit.input_at(node, 0)
            inner = middle.producer() if middle is not None else None
            if inner is None or not edit.is_op(inner, *_REGROUPING) or not inner.inputs or inner.inputs[0] is None:
                continue
            if _is_absolute(node, edit.opset(model)):
                node.replace_input_with(0, inner.inputs[0])
                changed += 1
            elif (axes := _combined(node, inner)) is not None:
                _set_axes(node, axes, editor)
                node.replace_input_with(0, inner.inputs[0])
                changed += 1
            elif _undoes(node, inner) and edit.replace(node.outputs[0], inner.inputs[0]):
                edit.remove(node)
                changed += 1
    return changed


def _is_absolute(node: ir.Node, version: int) -> bool:
    """Whether ``node`` is a Reshape whose target copies no axis of its input."""
    if not edit.is_op(node, "Reshape") or version < 5:
        return False
    target, allow_zero = edit.constant_ints(edit.input_at(node, 1)), node.attributes.get("allowzero")
    if target is None or (allow_zero is not None and allow_zero.is_ref()):
        return False
    return 0 not in target or (allow_zero is not None and allow_zero.as_int() == 1)


def _undoes(node: ir.Node, inner: ir.Node) -> bool:
    """Whether one of the two adds the axes of size 1 that the other takes away."""
    if {node.op_type, inner.op_type} != {"Squeeze", "Unsqueeze"} or node.domain != "" or inner.domain != "":
        return False
    ours, theirs = _axes(node), _axes(inner)
    return ours is not None and theirs is not None and min([0, *ours, *theirs]) == 0 and sorted(ours) == sorted(theirs)


def _combined(node: ir.Node, inner: ir.Node) -> list[int] | None:
    """The axes of one Unsqueeze that does what two in a row do.

    The outer axes are places in the result; the inner ones fill the places that are left, in order.
    """
    if not edit.is_op(node, "Unsqueeze") or not edit.is_op(inner, "Unsqueeze"):
        return None
    ours, theirs = _axes(node), _axes(inner)
    if ours is None or theirs is None or min([0, *ours, *theirs]) < 0 or not edit.feeds_only(inner.outputs[0], node):
        return None
    left = [place for place in range(len(ours) + max(theirs, default=0) + 1) if place not in ours]
    return sorted([*ours, *(left[axis] for axis in theirs)])


def _set_axes(node: ir.Node, axes: list[int], editor: edit.Editor) -> None:
    if "axes" in node.attributes:
        node.attributes["axes"] = ir.AttrInt64s("axes", axes)
    else:
        value = editor.weight(np.array(axes, np.int64), wish=f"{node.outputs[0].name}_axes", before=node)
        node.replace_input_with(1, value)


def _axes(node: ir.Node) -> list[int] | None:
    attribute = node.attributes.get("axes")
    if attribute is not None:
        return None if attribute.is_ref() else list(attribute.as_ints())
    return edit.constant_ints(edit.input_at(node, 1))


MERGE_RESHAPES = Pass(
    name="merge_reshapes",
    does="skips nodes that regroup axes in front of a Reshape to a constant shape, and merges Squeeze and Unsqueeze",
    counts="node",
    run=_run,
)
