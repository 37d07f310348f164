"""Calls of local functions, replaced with their bodies.

`onnx_ir`'s inliner does the work. Models with what it gets wrong are left as they are: functions of another opset than
the model, graphs as arguments, outputs that are inputs or that appear twice. `compiler.onnx_files` has bounded the
size of the result when the model was read.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, NameFixPass

from compiler.optimize import edit
from compiler.optimize.contract import Pass


def _run(model: ir.Model, limit_bytes: int) -> int:
    del limit_bytes
    calls = [node for graph in edit.graphs(model) for node in graph if node.op_identifier() in model.functions]
    inner = [
        node
        for function in model.functions.values()
        for node in function.all_nodes()
        if node.op_identifier() in model.functions
    ]
    fits = all(_is_plain(function, model) for function in model.functions.values())
    if not calls or not fits or not all(_fits(call, model) for call in (*calls, *inner)):
        return 0
    domains = {domain for domain, _, _ in model.functions}
    InlinePass()(model)
    NameFixPass()(model)
    edit.forget_domains(model, domains)
    return len(calls)


def _is_plain(function: ir.Function, model: ir.Model) -> bool:
    same_opset = all(
        model.opset_imports.get(domain, version) == version for domain, version in function.opset_imports.items()
    )
    return (
        same_opset
        and not set(function.inputs) & set(function.outputs)
        and len(set(function.outputs)) == len(function.outputs)
    )


def _fits(call: ir.Node, model: ir.Model) -> bool:
    function = model.functions[call.op_identifier()]
    return (
        not edit.direct_subgraphs(call)
        and len(call.inputs) <= len(function.inputs)
        and len(call.outputs) == len(function.outputs)
        and all(output.name for output in call.outputs)
    )


INLINE_FUNCTIONS = Pass(
    name="inline_functions",
    does="replaces calls of local functions with their bodies",
    counts="call",
    run=_run,
)
