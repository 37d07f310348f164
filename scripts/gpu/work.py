"""What one call of a model takes at least: products, weights, inputs and outputs."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.gpu import machine
from scripts.gpu.missing import Json, MissingError, guarded, module

_PRODUCTS: Mapping[str, int] = {
    "Conv": 1,
    "ConvInteger": 1,
    "QLinearConv": 3,
    "ConvTranspose": 1,
    "MatMul": 1,
    "MatMulInteger": 1,
    "QLinearMatMul": 3,
    "Gemm": 1,
}
"""Operator -> position of its second factor."""

_UNCOUNTED = frozenset(
    (
        *("Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention", "Einsum", "LSTM", "GRU", "RNN"),
        *("MatMulNBits", "FusedConv", "FusedMatMul", "FusedGemm", "QGemm", "DeformConv", "If", "Loop", "Scan"),
    )
)
"""Operators that multiply, or hold graphs that do, and are named rather than counted."""


def count_flops(model: Any, sizes: Mapping[str, int]) -> Json:
    """Multiplications and additions of an ONNX model's convolutions and matrix products, at these sizes of its axes.

    Args:
        model: an `onnx.ModelProto`; it is not changed.
        sizes: axis name -> size.

    Returns:
        ``flops``, ``by_op``, and in ``uncounted`` how many nodes of which operators multiply and are not in it.

    Raises:
        MissingError: a shape cannot be inferred.
    """
    onnx = module("onnx")
    inliner, inference = module("onnx.inliner"), module("onnx.shape_inference")
    sized = inliner.inline_local_functions(model) if len(model.functions) else copy.deepcopy(model)
    for value in sized.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    del sized.graph.value_info[:]
    for value in sized.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = inference.infer_shapes(sized, data_prop=True).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            shapes[node.output[0]] = list(node.attribute[0].t.dims)
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = [dim.dim_value for dim in dims]
    by_op: dict[str, int] = {}
    uncounted: dict[str, int] = {}
    for node in graph.node:
        if node.op_type in _UNCOUNTED:
            uncounted[node.op_type] = uncounted.get(node.op_type, 0) + 1
        elif node.op_type in _PRODUCTS:
            by_op[node.op_type] = by_op.get(node.op_type, 0) + 2 * _products(onnx, node, shapes)
    return {"flops": sum(by_op.values()), "by_op": by_op, "uncounted": uncounted}


def _products(onnx: Any, node: Any, shapes: Mapping[str, list[int]]) -> int:
    """How many products of two numbers a node takes."""

    def shape(name: str) -> list[int]:
        if name not in shapes:
            raise MissingError(f"node '{node.name}' ({node.op_type}): the shape of '{name}' is not known")
        return shapes[name]

    first, output = shape(node.input[0]), shape(node.output[0])
    if "Conv" in node.op_type:
        # [O, I / groups, k, ...]; of a transposed one [I, O / groups, k, ...], and every *input* element is multiplied.
        elements = math.prod(first if node.op_type == "ConvTranspose" else output)
        return elements * math.prod(shape(node.input[_PRODUCTS[node.op_type]])[1:])
    transposed = any(a.name == "transA" and onnx.helper.get_attribute_value(a) for a in node.attribute)
    return math.prod(output) * (first[-2] if transposed else first[-1])


def of_torch(torch: Any, model: Any, feeds: Mapping[str, Any]) -> Json:
    """What one call of the FP32 model takes.

    Returns:
        ``flops``, counted by torch; ``float_elements``, of all parameters and buffers, but of an embedding only the
        rows that were looked up; ``io_bytes``, of inputs and outputs as the host sees them.
    """
    counter = module("torch.utils.flop_counter").FlopCounterMode(display=False)
    looked_up: dict[int, int] = {}

    def note(embedding: Any, arguments: Sequence[Any]) -> None:
        looked_up[id(embedding.weight)] = int(arguments[0].unique().numel()) * embedding.embedding_dim

    hooks = [part.register_forward_pre_hook(note) for part in model.modules() if isinstance(part, torch.nn.Embedding)]
    try:
        with torch.no_grad(), counter:
            outputs = model(*(torch.from_numpy(value).to(machine.DEVICE) for value in feeds.values()))
    finally:
        for hook in hooks:
            hook.remove()
    whole: dict[int, int] = {}
    for part in model.modules():
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            if tensor.is_floating_point() and not (isinstance(part, torch.nn.Embedding) and id(tensor) in looked_up):
                whole[id(tensor)] = tensor.numel()
    return {
        "flops": int(counter.get_total_flops()),
        "flops_source": "torch.utils.flop_counter",
        "float_elements": sum((looked_up | whole).values()),
        "io_bytes": sum(value.nbytes for value in feeds.values())
        + sum(out.numel() * out.element_size() for out in outputs),
    }


def of_onnx(recipe: Any, manifests: Sequence[Any], batch: int) -> Json:
    """The count from an ONNX engine of an artifact, where there is one that says all; else nothing."""
    from compiler.spec import batch_axis

    sizes = {name: axis.opt for name, axis in recipe.axes.items()}
    sizes[batch_axis(recipe.inputs) or ""] = batch

    def count(engine: Any) -> Json:
        return count_flops(module("onnx").load(engine.path, load_external_data=False), sizes)

    for engine in itertools.chain.from_iterable(manifest.engines for manifest in manifests):
        if engine.path.suffix == ".onnx":
            counted = guarded(functools.partial(count, engine))
            if "flops" in counted and not counted["uncounted"]:
                return {"flops_source": f"ONNX shapes of engine {engine.name}", **counted}
    return {}
