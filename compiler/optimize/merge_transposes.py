"""Two Transposes in a row: one."""

from __future__ import annotations

import onnx_ir as ir

from compiler.optimize import edit
from compiler.optimize.contract import Pass


def _run(model: ir.Model, limit_bytes: int) -> int:
    del limit_bytes
    changed = 0
    for graph in edit.graphs(model):
        for node in graph:
            middle = edit.input_at(node, 0)
            inner = middle.producer() if middle is not None else None
            if inner is None or not edit.is_op(node, "Transpose") or not edit.is_op(inner, "Transpose"):
                continue
            first, second = _perm(inner), _perm(node)
            if first is not None and second is not None and len(first) == len(second):
                # y[i] = m[second[i]] and m[j] = x[first[j]], axis by axis.
                node.attributes["perm"] = ir.AttrInt64s("perm", [first[axis] for axis in second])
                node.replace_input_with(0, inner.inputs[0])
                changed += 1
    return changed


def _perm(node: ir.Node) -> list[int] | None:
    perm = node.attributes.get("perm")
    if perm is None:
        shape = edit.dims(edit.input_at(node, 0))
        return list(range(len(shape)))[::-1] if shape is not None else None
    return None if perm.is_ref() else list(perm.as_ints())


MERGE_TRANSPOSES = Pass(
    name="merge_transposes",
    does="makes one Transpose of two in a row",
    counts="node",
    run=_run,
)
