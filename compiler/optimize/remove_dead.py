"""Nodes, weights, local functions and optional outputs that nothing uses."""

from __future__ import annotations

import onnx_ir as ir

from compiler.optimize import edit
from compiler.optimize.contract import Pass

_OPTIONAL_OUTPUTS = ("Dropout", "LayerNormalization", "MaxPool")
"""Operators whose first output does not depend on how many of the others are asked for. BatchNormalization is none: up
to opset 13 the number of outputs chooses between training and inference."""


def _run(model: ir.Model, limit_bytes: int) -> int:
    del limit_bytes
    changed = _remove_nodes(model.graph)
    for graph in edit.graphs(model):
        for name, value in list(graph.initializers.items()):
            if not edit.is_used(value) and not value.is_graph_input():
                del graph.initializers[name]
                changed += 1
    return changed + _remove_functions(model)


def _remove_nodes(graph: ir.Graph) -> int:
    changed = 0
    for node in reversed(graph):
        if not any(edit.is_used(output) for output in node.outputs):
            edit.remove(node)
            changed += 1
            continue
        if edit.is_op(node, *_OPTIONAL_OUTPUTS):
            wanted = max(index for index, output in enumerate(node.outputs) if edit.is_used(output)) + 1
            changed += wanted < len(node.outputs)
            node.resize_outputs(wanted)
        for inner in edit.direct_subgraphs(node):
            changed += _remove_nodes(inner)
    return changed


def _remove_functions(model: ir.Model) -> int:
    used: set[ir.OperatorIdentifier] = set()
    pending = [node.op_identifier() for graph in edit.graphs(model) for node in graph]
    while pending:
        identifier = pending.pop()
        if identifier in model.functions and identifier not in used:
            used.add(identifier)
            pending.extend(node.op_identifier() for node in model.functions[identifier].all_nodes())
    unused = [identifier for identifier in model.functions if identifier not in used]
    for identifier in unused:
        del model.functions[identifier]
    return len(unused) + edit.forget_domains(model, {domain for domain, _, _ in unused})


REMOVE_DEAD = Pass(
    name="remove_dead",
    does="removes nodes, weights, local functions and optional outputs that no output depends on",
    counts="unused part",
    run=_run,
)
