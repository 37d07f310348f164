"""Dtypes and shapes of what lies between inputs and outputs, node by node in order.

Why node by node: `onnx.shape_inference` on a whole model crashes the process on some odd graphs and computes data
without bound; its inference of one operator is given here only the shapes and small constants that the node sees.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from compiler.optimize import edit
from compiler.optimize.contract import Pass

_MAX_DATA_ELEMENTS = 64
"""Constants up to this size are shown to the inference: targets of Reshape, axes, repeats."""


def _run(model: ir.Model, limit_bytes: int) -> int:
    del limit_bytes
    changed = 0
    for graph in edit.graphs(model):
        for node in graph:
            if node.op_identifier() not in model.functions and not edit.direct_subgraphs(node):
                changed += _infer(node, model)
    return changed


def _infer(node: ir.Node, model: ir.Model) -> int:
    outputs = [value for value in node.outputs if value.name and not value.is_graph_output()]
    if all(value.dtype is not None and None not in (edit.dims(value) or (None,)) for value in outputs):
        return 0
    if (tensor := edit.constant(node.outputs[0])) is not None:
        return _refine(outputs[0], ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy()))
    version = model.opset_imports.get(node.domain, edit.opset(model) if node.domain == "" else None)
    inputs = {value.name: value for value in node.inputs if value is not None and value.name}
    types = {name: proto for name, value in inputs.items() if (proto := _type_proto(value)) is not None}
    if version is None or len(types) < len(inputs) or _aborts(node):
        return 0
    data = {
        name: ir.to_proto(tensor)
        for name, value in inputs.items()
        if (tensor := edit.constant(value)) is not None and tensor.size <= _MAX_DATA_ELEMENTS
    }
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        inferred = onnx.shape_inference.infer_node_outputs(schema, ir.to_proto(node), types, data)
    except (
        onnx.checker.ValidationError,
        onnx.defs.SchemaError,
        onnx.shape_inference.InferenceError,
        RuntimeError,
        ValueError,
    ):
        return 0
    changed = 0
    for value in outputs:
        if (proto := inferred.get(value.name or "")) is not None:
            type_ = ir.serde.deserialize_type_proto_for_type(proto)
            changed += _refine(value, type_, ir.serde.deserialize_type_proto_for_shape(proto))
    return changed


def _aborts(node: ir.Node) -> bool:
    """Whether onnx would read past the parts of a Split that has more outputs than it says (1.23 ends the process)."""
    if not edit.is_op(node, "Split"):
        return False
    count, sizes = node.attributes.get("num_outputs"), node.attributes.get("split")
    given = edit.constant_ints(edit.input_at(node, 1))
    parts = (
        count.as_int() if count is not None and not count.is_ref() else None,
        len(sizes.as_ints()) if sizes is not None and not sizes.is_ref() else None,
        len(given) if given is not None else None,
    )
    return any(number is not None and number != len(node.outputs) for number in parts)


def _type_proto(value: ir.Value) -> onnx.TypeProto | None:
    if value.type is None:
        return None
    proto: onnx.TypeProto = ir.serde.serialize_type(value.type)
    if value.shape is not None and not isinstance(value.type, ir.SequenceType | ir.OptionalType):
        ir.serde.serialize_shape_into(proto, value.shape)
    return proto


def _refine(value: ir.Value, type_: ir.TypeProtocol | None, shape: ir.Shape | None) -> int:
    """Add what is not known yet; what the model says already is never contradicted, and a size beats a name."""
    changed = False
    if value.type is None and type_ is not None:
        value.type, changed = type_, True
    known = edit.dims(value)
    if value.type is None or shape is None or not isinstance(value.type, ir.TensorType):
        return int(changed)
    if known is None:
        value.shape, changed = shape, True
    elif len(known) == len(shape):
        new = [dim if isinstance(dim, int) else dim.value for dim in shape]
        better = [
            there
            if isinstance(here, int) is False and (isinstance(there, int) or here is None) and there is not None
            else here
            for here, there in zip(known, new, strict=True)
        ]
        if better != list(known):
            value.shape, changed = ir.Shape(better), True
    return int(changed)


INFER_SHAPES = Pass(
    name="infer_shapes",
    does="notes the dtypes and shapes of values between inputs and outputs",
    counts="value",
    run=_run,
)
