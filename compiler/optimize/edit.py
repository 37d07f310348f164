"""Questions to ask of a graph, and edits that keep it valid.

Why not `onnx_ir`'s own replacing: it renames values across scopes, keeps alive what the subgraphs of a removed node
used, and takes over the shape of whatever replaces a graph output. Here an output keeps its name, dtype and shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, TypeGuard

import numpy as np
import onnx_ir as ir

from compiler.spec import Array, Dim

Dims: TypeAlias = tuple[Dim | None, ...]
"""A shape: sizes, names of dynamic axes, None for an axis of which nothing is known."""

RANDOM_OPS = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


# --- questions ------------------------------------------------------------------------------------------------------


def graphs(model: ir.Model) -> list[ir.Graph]:
    """The main graph and every graph nested in it, outer before inner; not the bodies of local functions."""
    return [model.graph, *model.graph.subgraphs()]


def opset(model: ir.Model) -> int:
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))


def is_op(node: ir.Node | None, *op_types: str) -> TypeGuard[ir.Node]:
    """Whether ``node`` is one of these standard operators."""
    return node is not None and node.domain == "" and node.op_type in op_types


def is_random(node: ir.Node, version: int) -> bool:
    """Whether two runs of a standard operator on the same inputs may differ. Up to opset 6 Dropout trains unasked."""
    if node.op_type == "Dropout" and node.domain == "":
        return version < 7 or len(node.inputs) > 2
    return is_op(node, *RANDOM_OPS)


def is_pure(node: ir.Node, model: ir.Model) -> bool:
    """Whether the outputs of ``node`` are known to depend on its inputs alone."""
    known = node.domain in ("", "ai.onnx.ml") and node.op_identifier() not in model.functions
    return known and not is_random(node, opset(model))


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that ``value`` always holds: a weight that no caller can override, or the output of a Constant."""
    if value is None or value.is_graph_input():
        return None
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is None or not is_op(node, "Constant") or len(node.attributes) != 1:
        return None
    name, attribute = next(iter(node.attributes.items()))
    if attribute.is_ref():
        return None
    if name == "value":
        return attribute.as_tensor()
    if name in ("value_int", "value_ints"):
        return ir.tensor(np.array(attribute.value, dtype=np.int64))
    if name in ("value_float", "value_floats"):
        return ir.tensor(np.array(attribute.value, dtype=np.float32))
    return None


def constant_array(value: ir.Value | None, *, max_elements: int | None = None) -> Array | None:
    """`constant` as an array of its own dtype (bfloat16 and the small floats through ml_dtypes); strings are None."""
    tensor = constant(value)
    if (
        tensor is None
        or tensor.dtype == ir.DataType.STRING
        or (max_elements is not None and tensor.size > max_elements)
    ):
        return None
    array: Array = tensor.numpy()
    return array


def constant_ints(value: ir.Value | None) -> list[int] | None:
    """A constant tensor of integers, flattened."""
    array = constant_array(value, max_elements=1024)
    return [int(x) for x in array.reshape(-1)] if array is not None and array.dtype.kind in "iu" else None


def constant_scalar(value: ir.Value | None) -> float | None:
    """A constant number of one element, of rank 0 or 1."""
    array = constant_array(value, max_elements=1)
    if array is None or array.size != 1 or array.ndim > 1 or array.dtype.kind not in "fi":
        return None
    return float(array.reshape(()))


def dims(value: ir.Value | None) -> Dims | None:
    """What is known of the shape; None where not even the rank is."""
    if value is None or value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def static(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape where every axis has a fixed size."""
    shape = dims(value)
    if shape is None:
        return None
    sizes = tuple(dim for dim in shape if isinstance(dim, int))
    return sizes if len(sizes) == len(shape) else None


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def only_output(node: ir.Node) -> ir.Value | None:
    """The output of a node of which nothing but the first output is used."""
    if any(is_used(output) for output in node.outputs[1:]):
        return None
    return node.outputs[0]


def is_used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def feeds_only(value: ir.Value, node: ir.Node) -> bool:
    """Whether ``node``, in the same graph, is all that ever sees ``value``."""
    producer = value.producer()
    return (
        not value.is_graph_output()
        and all(use.node is node for use in value.uses())
        and producer is not None
        and producer.graph is node.graph
    )


def value_names(model: ir.Model) -> set[str]:
    """Every name of a value, of any scope."""
    names: set[str] = set()
    for graph in graphs(model):
        names.update(graph.initializers)
        names.update(value.name or "" for value in graph.inputs)
        names.update(value.name or "" for node in graph for value in node.outputs)
    return names


def weights_bytes(model: ir.Model) -> int:
    """Bytes of all constant tensors, of nodes and of graphs."""
    total = 0
    for graph in graphs(model):
        total += sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
        total += sum(
            tensor.nbytes
            for node in graph
            if (tensor := constant(node.outputs[0] if node.outputs else None)) is not None
        )
    return total


# --- edits ----------------------------------------------------------------------------------------------------------


def can_replace(old: ir.Value, new: ir.Value) -> bool:
    """Whether `replace` would succeed."""
    if old is new:
        return False
    if not old.is_graph_output():
        return True
    node, other = old.producer(), new.producer()
    return (
        node is not None
        and other is not None
        and other.graph is node.graph
        and old.graph is node.graph
        and not new.is_graph_output()
    )


def replace(old: ir.Value, new: ir.Value) -> bool:
    """Let everything that uses ``old`` use ``new``, which must hold the same and be visible wherever ``old`` is.

    An output of a graph keeps its name, dtype and shape; ``new`` takes them over. Where that cannot be (``new`` is an
    input, a weight, of another scope, or an output itself) nothing is changed. Returns whether it was done.
    """
    if not can_replace(old, new):
        return False
    is_output = old.is_graph_output()
    name, type_, shape = old.name, old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if is_output:
        new.name, new.type, new.shape = name, type_, shape
    else:
        new.type = new.type or type_
    return True


def remove(node: ir.Node) -> None:
    """Take out a node whose outputs nobody uses, with the subgraphs in it."""
    for graph in direct_subgraphs(node):
        for inner in graph.all_nodes():
            for index in range(len(inner.inputs)):
                inner.replace_input_with(index, None)
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def forget_domains(model: ir.Model, domains: set[str]) -> int:
    """Drop the imports of those of ``domains`` that nothing uses any more. Returns how many."""
    used = {node.domain for graph in graphs(model) for node in graph} | {"", "ai.onnx"}
    for function in model.functions.values():
        used |= {function.domain, *(node.domain for node in function.all_nodes())}
    return sum(model.opset_imports.pop(domain, None) is not None for domain in domains - used)


def direct_subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs among the attributes of ``node``."""
    inner: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            inner.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            inner.extend(attribute.as_graphs())
    return inner


class Editor:
    """Adds nodes and weights to a model under names that are free."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._names: set[str] | None = None

    def name(self, wish: str) -> str:
        """``wish``, or ``wish_1``, ``wish_2``, ... where it is taken."""
        if self._names is None:
            self._names = value_names(self._model)
        name, number = wish, 0
        while name in self._names:
            number += 1
            name = f"{wish}_{number}"
        self._names.add(name)
        return name

    def weight(self, array: Array, *, wish: str, before: ir.Node) -> ir.Value:
        """A constant that ``before`` and what follows it can use.

        Up to IR version 3 every initialiser is an input too; there it is the output of a Constant node.
        """
        name = self.name(wish)
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        graph = before.graph
        assert isinstance(graph, ir.Graph)
        if self._model.ir_version < 4:
            attribute = ir.AttrTensor("value", tensor)
            graph.insert_before(
                before, ir.Node("", "Constant", (), (attribute,), outputs=(value,), name=f"{name}_node")
            )
        else:
            value.const_value = tensor
            graph.register_initializer(value)
        return value

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Sequence[ir.Attr] = (),
        *,
        before: ir.Node,
        like: ir.Value,
    ) -> ir.Value:
        """The output of a new standard node in front of ``before``, of the dtype and shape of ``like``."""
        name = self.name(f"{like.name}_{op_type}")
        output = ir.Value(name=name, type=like.type, shape=like.shape)
        assert before.graph is not None
        node = ir.Node("", op_type, inputs, attributes, outputs=(output,), name=f"{name}_node")
        before.graph.insert_before(before, node)
        return output
