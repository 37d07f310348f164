"""Which constants of a model could be stored in fewer bits, who reads them, and in what form each may be.

Where a block of INT4 does not divide the axis that is summed over, the next smaller one that does is taken, since TensorRT
wants whole blocks; convolutions keep their precision in INT4, since it takes blocks along the last two axes only. A head tied to
its embedding table, Gemm or Transpose and MatMul, may read the table as it is stored for the lookup.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from compiler.quantize import placement
from compiler.quantize.blocks import BLOCKS
from compiler.quantize.formats import INT4, INT8, Steps
from compiler.quantize.placement import Edge
from compiler.recipe import EngineSection
from compiler.spec import Precision


@dataclass(frozen=True, kw_only=True)
class Use:
    """A layer that multiplies by a constant, or looks up in one."""

    layer: ir.Node
    reader: Edge
    """Where the constant is read: by the layer itself, or by a Transpose before it."""
    channels: int
    """The axis of the constant along which output channels, or the rows of a table, lie."""
    summed: int | None
    """The axis that a matrix product sums over."""

    @property
    def weight(self) -> ir.Value:
        value = self.reader[0].inputs[self.reader[1]]
        assert value is not None, "a constant is read"
        return value

    @property
    def looks_up(self) -> bool:
        """Whether rows are picked, and nothing is multiplied."""
        return self.layer.op_type == "Gather"


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a weight is to be stored; ``block`` is None where a scale serves all of a channel."""

    steps: Steps
    axis: int
    block: int | None = None


def uses_of(graph: ir.Graph, *, keep: Collection[ir.Node] = ()) -> list[Use]:
    """Every layer whose weights could be stored in fewer bits, but those of ``keep``."""
    found = []
    plain = {node for node, _ in placement.layers(graph, keep=keep)}
    for node in graph:
        if node.domain != "" or node in keep:
            continue
        if node in plain and placement.is_constant(node.inputs[1]):
            weight = node.inputs[1]
            assert weight is not None and weight.const_value is not None, "a layer has a weight"
            found.append(_use(node, (node, 1), len(weight.const_value.shape), turned=False))
        elif node.op_type in placement.PRODUCTS and (transpose := _turned(node)) is not None:
            found.append(_use(node, (transpose, 0), 2, turned=True))
        elif _looks_up(node):
            found.append(Use(layer=node, reader=(node, 0), channels=0, summed=None))
    return found


def _use(node: ir.Node, reader: Edge, rank: int, *, turned: bool) -> Use:
    channels = placement.channel_axis(node, rank)
    summed = None
    if node.op_type in placement.PRODUCTS:
        summed = 2 * rank - 3 - channels  # the other one of the last two
    if turned:
        channels, summed = 1 - channels, channels
    return Use(layer=node, reader=reader, channels=channels, summed=summed)


def _turned(node: ir.Node) -> ir.Node | None:
    """The Transpose of a constant matrix that ``node``, and nobody else, multiplies by."""
    weight = node.inputs[1]
    transpose = weight.producer() if weight is not None else None
    if weight is None or transpose is None or node.inputs[0] is None or placement.is_constant(node.inputs[0]):
        return None
    if transpose.domain != "" or transpose.op_type != "Transpose" or transpose.graph is not node.graph:
        return None
    order = transpose.attributes.get("perm")
    turns = _shape(transpose.inputs[0]) is not None and (order is None or tuple(order.as_ints()) == (1, 0))
    return transpose if turns and len(weight.uses()) == 1 and not weight.is_graph_output() else None


def _looks_up(node: ir.Node) -> bool:
    """Whether ``node`` picks rows of a large constant matrix."""
    axis = node.attributes.get("axis")
    if node.op_type != "Gather" or (axis is not None and axis.as_int() not in (0, -2)):
        return False
    shape = _shape(node.inputs[0])
    return shape is not None and shape[0] > placement.TABLE_ROWS


def _shape(value: ir.Value | None) -> tuple[int, int] | None:
    """The shape of a constant matrix; None of anything else."""
    array = placement.constant(value) if placement.is_matrix(value) else None
    return (array.shape[0], array.shape[1]) if array is not None and array.ndim == 2 else None


def reads_all(weight: ir.Value, uses: Iterable[Use]) -> bool:
    """Whether ``uses`` are all that read ``weight``: a table of which others need the floats grows if it is rounded."""
    return set(weight.uses()) <= {use.reader for use in uses} and not weight.is_graph_output()


def form_of(use: Use, in_table: bool, steps: Steps, block: int) -> Form | None:
    """How what ``use`` reads is to be stored; None where it keeps its precision."""
    if in_table and use.channels == 0:
        return Form(steps=INT8, axis=0)
    if use.looks_up:
        return None
    if steps is not INT4:
        return Form(steps=steps, axis=use.channels)
    if use.summed is None:
        return None
    fitting = _fitting(use, block)
    return None if fitting is None else Form(steps=steps, axis=use.summed, block=fitting)


def _fitting(use: Use, block: int) -> int | None:
    """The largest block, not above ``block``, that divides the axis which ``use`` sums over."""
    tensor = use.weight.const_value
    assert tensor is not None and use.summed is not None, "a matrix product by a constant"
    size = tensor.numpy().shape[use.summed]
    return next((fitting for fitting in BLOCKS if fitting <= block and size % fitting == 0), None)


def notes_on_blocks(uses: Iterable[Use], forms: Mapping[Use, Form], engine: EngineSection) -> list[str]:
    if engine.precision is not Precision.INT4:
        return []
    rest, notes = engine.rest.upper(), []
    convolutions = sum(use.summed is None and not use.looks_up for use in uses)
    if convolutions:
        notes.append(f"{convolutions} convolutions stay {rest}: TensorRT takes INT4 in blocks, of matrices only")
    narrow = [use for use in uses if use.summed is not None and use not in forms]
    if narrow:
        notes.append(f"input channels that no block divides: {_named(narrow)} stay {rest}")
    for block in BLOCKS:
        smaller = [use for use, form in forms.items() if form.block == block != engine.block]
        if smaller:
            notes.append(f"block {block}, since {engine.block} does not divide their input channels: {_named(smaller)}")
    return notes


def _named(uses: Sequence[Use]) -> str:
    """
    >>> node = ir.node("MatMul", [], name="up")
    >>> _named([Use(layer=node, reader=(node, 1), channels=1, summed=0)])
    "'up'"
    """
    shown = ", ".join(f"'{use.layer.name}'" for use in uses[:3])
    return shown + (f", and {len(uses) - 3} more" if len(uses) > 3 else "")
