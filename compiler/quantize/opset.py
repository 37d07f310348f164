"""Declare a later opset than the one that a model was exported with, where no operator of it changes its meaning."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from compiler.errors import CalibrationError

OLDEST_RAISED = 18
"""Before, reductions took their axes as attributes, and much else changed."""

CHANGED: Mapping[int, frozenset[str]] = {
    19: frozenset({"AveragePool", "Resize"}),
    20: frozenset({"DFT", "GridSample"}),
    21: frozenset({"GroupNormalization"}),
}
"""By opset: operators that are spelt or computed otherwise from there on. All others took more types, or an attribute
whose default is what they did before. Source: https://onnx.ai/onnx/operators/, their "Differences"."""


_IR_VERSION: Mapping[int, int] = {13: 7, 19: 9, 21: 10, 22: 10}
"""By opset: the IR version with which it came, which defines the types of its tensors."""


def obstacle(model: ir.Model, wanted: int) -> str | None:
    """Why ``model`` cannot be declared to be of opset ``wanted``, in words; None where it can, or is."""
    opset = model.opset_imports.get("", 0)
    if opset >= wanted:
        return None
    if opset < OLDEST_RAISED:
        return f"only {OLDEST_RAISED} or later can be raised"
    if model.functions:
        return "it has local functions, which have opsets of their own"
    changed = frozenset().union(*(CHANGED.get(version, ()) for version in range(opset + 1, wanted + 1)))
    for node in model.graph.all_nodes():
        if node.domain == "" and node.op_type in changed:
            return f"{node.op_type} '{node.name}' has changed its meaning since"
    return None


def require(model: ir.Model, wanted: int, what: str) -> list[str]:
    """Raise the opset of ``model`` to ``wanted`` if it is older, in place; returns a note if so.

    Raises:
        CalibrationError: it cannot be raised without changing what the model computes.
    """
    opset = model.opset_imports.get("", 0)
    reason = obstacle(model, wanted)
    if reason is not None:
        raise CalibrationError(
            f"model: its opset is {opset}; {what} needs {wanted} or later, and {reason}. "
            "Export it again with a newer opset."
        )
    model.ir_version = max(model.ir_version, _IR_VERSION[wanted])
    if opset >= wanted:
        return []
    model.opset_imports[""] = wanted
    return [f"opset raised from {opset} to {wanted}, the first that defines {what}"]
