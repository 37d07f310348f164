"""Which tensors INT8 and FP8 touch: read by `observe`, which must see them, and by `qdq`, which rounds them.

A convolution is rounded at its input, its weight and its output after the activation fused to it: ONNX Runtime makes
one integer kernel only of what stands between a DequantizeLinear and a QuantizeLinear. A matrix product is rounded at
its inputs only; its sums stay in high precision. An addition is rounded where it joins two branches of such a chain,
so that the chain stays in eight bits; one that ends in a Softmax or a LayerNormalization is left alone. Operators that
only move or pick values take over the scale of what they read, so rounding them again changes nothing. On request both
operands of an addition have one scale, so that a kernel can add their steps as they are.

FP8 is rounded at the inputs of convolutions and matrix products alone (`at_products`): with 3 bits of mantissa every
rounding costs the same 31 dB, and no kernel asks for one anywhere else.

Why products of two activations (attention scores, probabilities times values) stay in high precision unless a recipe asks for
them: measured with ONNX Runtime on a CPU with VNNI they are slower in INT8 (12 heads of 32, 128 positions: 0.30 ms against 0.22;
of 64, 512 positions: 3.8 against 3.3), since both operands are rounded on the fly, and probabilities suffer most from few levels.
TensorRT has fused kernels for such an attention, for which both operands of both products must be rounded.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from compiler import onnx_files
from compiler.errors import CalibrationError, RecipeError
from compiler.spec import Array

ADOPTS_SCALE = frozenset({"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"})
"""Operators whose outputs are some of their inputs' values: rounding commutes with them."""

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
PRODUCTS = frozenset({"Gemm", "MatMul"})
_AVERAGES = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
_FUSED = frozenset({"Relu", "Clip"})

TABLE_ROWS = 1024
"""A table of fewer rows is not worth a node."""

Edge: TypeAlias = tuple[ir.Node, int]
"""One input of one node."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What to round. Values and nodes belong to the model that was looked at."""

    weights: tuple[Edge, ...]
    """Constant operands, to be stored as INT8; see `reader` for where the constant is read."""
    lookups: tuple[ir.Node, ...] = ()
    """Gather nodes whose tables are to be stored as INT8."""
    outputs: tuple[ir.Value, ...]
    """Activations rounded where they are made: every consumer reads the rounded values."""
    edges: tuple[Edge, ...]
    """Activations rounded for one consumer alone, because others want them as they are."""
    root: dict[ir.Value, ir.Value]
    """The activation whose scale a rounded one takes: itself, what was moved to make it, or what it is added to."""
    shared: Mapping[ir.Value, tuple[ir.Value, ...]] = field(default_factory=dict)
    """By root whose scale is that of several activations, made on their own: all of them, itself the first."""

    @property
    def activations(self) -> tuple[ir.Value, ...]:
        """Every activation to be rounded, in the order of the graph, once."""
        values = [*self.outputs, *(_operand(edge) for edge in self.edges)]
        return tuple(dict.fromkeys(values))

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The nodes that compute on rounded weights."""
        return tuple(dict.fromkeys(node for node, _ in self.weights))


def place(
    graph: ir.Graph,
    *,
    keep: Collection[ir.Node] = (),
    barred: Collection[str] = (),
    attention: bool = False,
    one_scale: bool = False,
) -> Placement:
    """Decide what to round in ``graph`` (not in its subgraphs).

    Args:
        keep: nodes to leave in high precision.
        barred: names of activations that eight bits cannot hold.
        attention: whether to round what products of two activations multiply.
        one_scale: whether both operands of an addition are to have the same scale.
    """
    kept = _with_activations(graph, keep)
    weights = [edge for edge in layers(graph, keep=keep) if not _barred(edge[0], barred)]
    chosen = {node for node, _ in weights}
    joins = {node for node in graph if node not in kept and _is_join(node) and not _barred(node, barred)}
    while True:
        wanted = _wanted(graph, chosen, joins, kept)
        outputs, root = _chain(graph, chosen, joins, wanted, kept)
        alone = {node for node in joins if fused_output(node) not in root}
        if not alone:
            break
        joins -= alone
    edges = [(node, 0) for node, _ in weights if _operand((node, 0)) not in root]
    edges += [(node, i) for node in graph if node in joins for i in (0, 1) if _operand((node, i)) not in root]
    if attention:
        edges += [edge for edge in _attention(graph, kept, barred) if _operand(edge) not in root]
    root.update((_operand(edge), _operand(edge)) for edge in edges)
    shared = _share([node for node in graph if node in joins], root) if one_scale else {}
    return Placement(
        weights=tuple(weights),
        lookups=lookups(graph, weights, keep=keep),
        outputs=tuple(outputs),
        edges=tuple(edges),
        root=root,
        shared=shared,
    )


def at_products(
    graph: ir.Graph, *, keep: Collection[ir.Node] = (), barred: Collection[str] = (), attention: bool = False
) -> Placement:
    """Every constant operand, and every activation that one of them is multiplied by; arguments as of `place`."""
    weights = [edge for edge in layers(graph, keep=keep) if _operand((edge[0], 0)).name not in barred]
    edges = [(node, 0) for node, _ in weights]
    if attention:
        edges += _attention(graph, _with_activations(graph, keep), barred)
    root = {_operand(edge): _operand(edge) for edge in edges}
    return Placement(weights=tuple(weights), outputs=(), edges=tuple(edges), root=root)


def products_of_activations(graph: ir.Graph) -> tuple[ir.Node, ...]:
    """The products of two FP32 activations; what has no type is taken for FP32."""
    return tuple(
        node
        for node in graph
        if _is(node, {"MatMul"})
        and all(
            value is not None and not is_constant(value) and value.dtype in (None, ir.DataType.FLOAT)
            for value in node.inputs
        )
        and not _has_weight(node, stored((node, 1)))
    )


def _attention(graph: ir.Graph, kept: Collection[ir.Node], barred: Collection[str]) -> list[Edge]:
    nodes = [node for node in products_of_activations(graph) if node not in kept and not _barred(node, barred)]
    return [(node, index) for node in nodes for index in (0, 1)]


def layers(graph: ir.Graph, *, keep: Collection[ir.Node] = ()) -> tuple[Edge, ...]:
    """The constant operand of every convolution and matrix product of ``graph`` but those of ``keep``."""
    kept = _with_activations(graph, keep)
    return tuple(
        (node, 1)
        for node in graph
        if node not in kept and _is(node, CONVOLUTIONS | PRODUCTS) and _has_weight(node, stored((node, 1)))
    )


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A convolution and those that alone read what it makes: factors of its channels can pass from it to them."""

    maker: ir.Node
    value: ir.Value
    """What is read: the output, or that of the Relu that alone reads it."""
    readers: tuple[ir.Node, ...]


def pairs(graph: ir.Graph, placed: Placement) -> tuple[Pair, ...]:
    """The pairs of ``graph`` whose value ``placed`` rounds, and whose weights are nobody else's."""
    inside = {value for inner in graph.subgraphs() for node in inner for value in node.inputs}
    inside |= {value for inner in graph.subgraphs() for value in inner.outputs}
    found = []
    for node in graph:
        value = fused_output(node) if _is(node, {"Conv"}) else None
        if value is None or placed.root.get(value) is not value or value.is_graph_output() or value in inside:
            continue
        activation = value.producer()
        users = [user for user, _ in value.uses()]
        if activation is not node and not _is(activation, {"Relu"}):
            continue
        if not users or not _owns(node) or not all(user in placed.nodes and _owns(user) for user in users):
            continue
        if all(_is(user, {"Conv"}) and _integer(user, "group") in (0, 1) for user in users):
            found.append(Pair(maker=node, value=value, readers=tuple(dict.fromkeys(users))))
    return tuple(found)


def _owns(node: ir.Node) -> bool:
    """Whether weight and bias of ``node`` are constants that it alone reads."""
    return is_matrix(node.inputs[1]) and all(
        is_constant(value) and len(value.uses()) == 1 for value in node.inputs[1:] if value is not None
    )


def reader(edge: Edge) -> Edge:
    """Where the constant of a layer is read: by the layer itself, or by the Transpose of a matrix that it alone reads, as
    heads do that are tied to a table."""
    value = edge[0].inputs[edge[1]]
    transpose = value.producer() if value is not None and edge[0].op_type == "MatMul" else None
    if value is None or transpose is None or not _is(transpose, {"Transpose"}) or transpose.graph is not edge[0].graph:
        return edge
    order = transpose.attributes.get("perm")
    matrix = transpose.inputs[0]
    turns = order is None or tuple(order.as_ints()) == (1, 0)
    tensor = matrix.const_value if matrix is not None and is_matrix(matrix) else None
    if not turns or tensor is None or len(tensor.shape) != 2 or len(value.uses()) != 1 or value.is_graph_output():
        return edge
    return transpose, 0


def stored(edge: Edge) -> ir.Value | None:
    """What stands at `reader`."""
    node, index = reader(edge)
    return node.inputs[index]


def lookups(graph: ir.Graph, weights: Sequence[Edge], *, keep: Collection[ir.Node] = ()) -> tuple[ir.Node, ...]:
    """The Gather nodes that pick rows of large constant matrices of which nobody needs the floats: all who read one look
    up in it, or are among ``weights`` and have one scale for each of its rows, too."""
    multiplied = {reader(edge): edge for edge in weights}
    found = []
    for node in graph:
        table = node.inputs[0] if _is(node, {"Gather"}) and node not in keep else None
        tensor = table.const_value if table is not None and is_matrix(table) else None
        if table is None or tensor is None or len(tensor.shape) != 2 or tensor.shape.numpy()[0] <= TABLE_ROWS:
            continue
        by_row = all(
            (_is(user, {"Gather"}) and index == 0 and user not in keep and _integer(user, "axis") in (0, -2))
            or ((user, index) in multiplied and weight_axis(multiplied[user, index]) == 0)
            for user, index in table.uses()
        )
        if by_row and not table.is_graph_output():
            found.append(node)
    return tuple(found)


def none_left(possible: int, label: str, expected: str) -> CalibrationError:
    """The refusal of a model in which there is nothing to round."""
    return CalibrationError(
        f"model: {possible} layers could be rounded to {label}, and none is left of them; at least one {expected}, not "
        "kept by engines.keep or quantize.keep, was expected. Keep fewer layers, or build another precision."
    )


def fused_output(node: ir.Node) -> ir.Value:
    """The output of ``node`` after a Relu or Clip that every runtime computes with it."""
    activation = _fused_activation(node)
    return node.outputs[0] if activation is None else activation.outputs[0]


def is_constant(value: ir.Value | None) -> bool:
    """Whether ``value`` is a weight that no caller can override."""
    return value is not None and value.const_value is not None and not value.is_graph_input()


def constant(value: ir.Value | None) -> Array | None:
    """The values of a weight that no caller can override; None of anything else."""
    return value.const_value.numpy() if is_constant(value) and value and value.const_value is not None else None


def along(factors: Array, axis: int | None, rank: int) -> Array:
    """``factors`` [K] in a shape of ``rank`` axes of which ``axis`` has K places; a single one, [], without an axis."""
    return factors.reshape([-1 if place == axis else 1 for place in range(rank)] if axis is not None else [])


def dequantised(value: ir.Value | None) -> Array | None:
    """The values of a constant, or of one that is stored in few bits."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear":
        return constant(value)
    steps, scale = constant(node.inputs[0]), constant(node.inputs[1])
    if steps is None or scale is None:
        return None
    axis, block = (node.attributes[name].as_int() if name in node.attributes else 0 for name in ("axis", "block_size"))
    if scale.ndim == 1 and steps.ndim > 1:
        scale = along(scale, axis, steps.ndim)
    elif block:
        scale = np.repeat(scale, block, axis=axis)
    values: Array = steps.astype(np.float64) * scale
    return values


def is_matrix(value: ir.Value | None) -> bool:
    """Whether ``value`` is a constant FP32 matrix or kernel that has elements."""
    tensor = value.const_value if value is not None and is_constant(value) else None
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and tensor.size > 0 and len(tensor.shape) >= 2


def weight_axis(edge: Edge) -> int | None:
    """The axis of a weight along which scales differ: its output channels; None where one scale serves all."""
    node, _ = edge
    if reader(edge) != edge:
        return 0
    weight = _operand(edge)
    rank = len(weight.shape or ())
    return channel_axis(node, rank) if node.op_type != "MatMul" or rank == 2 else None


def channel_axis(node: ir.Node, rank: int) -> int:
    """The axis of output channels in the weight, of ``rank`` axes, of a convolution or matrix product."""
    if node.op_type in CONVOLUTIONS:
        return 0 if node.op_type == "Conv" else 1
    if node.op_type == "Gemm":
        return 0 if _integer(node, "transB") else 1
    return rank - 1


def input_rows(node: ir.Node) -> Array | None:
    """The constant matrix of a product, one row for each channel of its activation's last axis; None if it has none."""
    weight = constant(stored((node, 1))) if node.op_type in PRODUCTS else None
    if weight is not None and reader((node, 1)) != (node, 1):
        return weight.T
    if weight is None or weight.ndim != 2 or _integer(node, "transA"):
        return None
    return weight.T if node.op_type == "Gemm" and _integer(node, "transB") else weight


def check_weights(placement: Placement) -> None:
    """
    Raises:
        CalibrationError: a weight that would be rounded holds NaN or Inf.
    """
    for edge in placement.weights:
        check_finite(_operand(reader(edge)), edge[0])


def check_finite(weight: ir.Value, node: ir.Node) -> None:
    """
    Raises:
        CalibrationError: ``weight``, a constant of ``node``, holds NaN or Inf.
    """
    assert weight.const_value is not None, "only constants are placed as weights"
    bad = int(np.count_nonzero(~np.isfinite(weight.const_value.numpy())))
    onnx_files.release(weight)
    if bad:
        raise CalibrationError(
            f"weight '{weight.name}' of {node.op_type} '{node.name}': {bad} of {weight.const_value.size} "
            "values are NaN or Inf; finite weights were expected. Train or export the model again."
        )


def match(graph: ir.Graph, patterns: Sequence[str]) -> tuple[ir.Node, ...]:
    """The nodes whose name, or the name of one of whose outputs, matches one of the shell ``patterns``.

    Raises:
        RecipeError: a pattern matches nothing.
    """
    names: dict[str, list[ir.Node]] = {}
    for node in graph.all_nodes():
        for name in {node.name, *(output.name for output in node.outputs)} - {None, ""}:
            names.setdefault(str(name), []).append(node)
    found: dict[ir.Node, None] = {}
    for pattern in patterns:
        matching = [name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names)[:3]
            nearest = ", ".join(f"'{name}'" for name in near)
            raise RecipeError(
                f"keep: '{pattern}' matches no node and no tensor of the model; the nearest names are {nearest}. "
                "Correct it, or remove it."
            )
        found.update((node, None) for name in matching for node in names[name])
    return tuple(found)


def _is(node: ir.Node | None, kinds: Collection[str]) -> bool:
    return node is not None and node.domain == "" and node.op_type in kinds


def _operand(edge: Edge) -> ir.Value:
    value = edge[0].inputs[edge[1]]
    assert value is not None, "only operands that exist are placed"
    return value


def _integer(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else 0


def _has_weight(node: ir.Node, weight: ir.Value | None) -> bool:
    """Whether ``node`` multiplies an activation, and ``weight`` is a constant matrix or kernel."""
    activation = node.inputs[0]
    return activation is not None and not is_constant(activation) and is_matrix(weight)


def _barred(node: ir.Node, names: Collection[str]) -> bool:
    """Whether ``node`` reads or makes an activation that eight bits cannot hold."""
    touched = [value for value in node.inputs[:2] if value is not None] + [node.outputs[0], fused_output(node)]
    return any(value.name in names for value in touched)


def _is_join(node: ir.Node) -> bool:
    return _is(node, {"Add"}) and not any(value is None or is_constant(value) for value in node.inputs)


def _fused_activation(node: ir.Node) -> ir.Node | None:
    output = node.outputs[0]
    uses = output.uses()
    if len(uses) != 1 or output.is_graph_output():
        return None
    consumer, index = next(iter(uses))
    bounded = index == 0 and all(is_constant(bound) for bound in consumer.inputs[1:] if bound is not None)
    return consumer if _is(consumer, _FUSED) and bounded and consumer.graph is node.graph else None


def _with_activations(graph: ir.Graph, keep: Collection[ir.Node]) -> set[ir.Node]:
    """``keep``, and what the activations among them are fused to: neither is rounded without the other."""
    kept = set(keep)
    return kept | {node for node in graph if _is(node, CONVOLUTIONS | {"Add"}) and _fused_activation(node) in kept}


def _share(joins: Sequence[ir.Node], root: dict[ir.Value, ir.Value]) -> dict[ir.Value, tuple[ir.Value, ...]]:
    """Give the operands of each of ``joins`` one root; returns by root that several have now what their own were."""
    members: dict[ir.Value, tuple[ir.Value, ...]] = {value: (value,) for value in root.values()}
    for node in joins:
        first, second = (root[_operand((node, index))] for index in (0, 1))
        if first is not second:
            members[first] += members.pop(second)
            root.update((value, first) for value, of in root.items() if of is second)
    return {value: of for value, of in members.items() if len(of) > 1}


def _wanted(
    graph: ir.Graph, chosen: Collection[ir.Node], joins: Collection[ir.Node], kept: Collection[ir.Node]
) -> set[ir.Value]:
    """Activations that somebody reads rounded, directly or through operators that can pass eight bits on."""
    wanted: set[ir.Value] = set()
    for node in reversed(graph):
        if node in chosen:
            wanted.add(_operand((node, 0)))
        elif node in joins and fused_output(node) in wanted:
            wanted.update(_operand((node, index)) for index in (0, 1))
        elif _is(node, ADOPTS_SCALE | _AVERAGES) and node not in kept and node.outputs[0] in wanted:
            wanted.add(_operand((node, 0)))
    return wanted


def _chain(
    graph: ir.Graph,
    chosen: Collection[ir.Node],
    joins: Collection[ir.Node],
    wanted: Collection[ir.Value],
    kept: Collection[ir.Node],
) -> tuple[list[ir.Value], dict[ir.Value, ir.Value]]:
    """Activations to round where they are made, from the first to the last, and whose scale each takes."""
    root: dict[ir.Value, ir.Value] = {}
    for node in graph:
        reads = [value in root for value in node.inputs[:2]]
        if node in chosen and node.op_type == "Conv":
            root[fused_output(node)] = fused_output(node)
        elif node in joins:
            if any(reads) and fused_output(node) in wanted:
                root[fused_output(node)] = fused_output(node)
        elif node in kept or reads[:1] != [True] or node.outputs[0] not in wanted:
            continue
        elif _is(node, _AVERAGES):
            root[node.outputs[0]] = node.outputs[0]
        elif _is(node, ADOPTS_SCALE):
            root[node.outputs[0]] = root[_operand((node, 0))]
    return list(root), root
