"""A network in which every layer of a quantised model stands beside the FP32 model and reads FP32's own values.

The error that one layer adds cannot be seen in the quantised model, where it comes on top of all before it. Here each
node that reads something rounded is there twice more: once with its weights rounded, once with its activations, too.
Once more, as the FP32 model has it, it reads what the quantised model makes: that is the noise which it only passes on.
The first two are taken from the quantised graph as it is, back to where a tensor has a name that the FP32 model knows; nothing
else is asked of how it was made, so that scales moved by SmoothQuant, or by whatever comes next, need no bookkeeping.

Where a pass before the rounding has rescaled channels, tensors of one name differ by a factor per channel
(`compiler.quantize.moved`); the FP32 values that copies read are multiplied by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from compiler.onnx_files import FreeNames
from compiler.quantize import graphs, placement
from compiler.spec import Array


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """One QuantizeLinear and DequantizeLinear of an activation."""

    site: str
    """The FP32 model's tensor that is rounded, or that what is rounded was made of."""
    seen_as: str | None
    """The tensor of the quantised model that holds the rounded values of ``site``; None where they are of something else."""
    value: str
    """In the network made here: the values before."""
    rounded: str
    """In the network made here: the values after."""
    scale: float | None
    """Of QuantizeLinear; None where there are several."""
    scale_back: float | None
    """Of DequantizeLinear."""
    zero_point: int | None
    """Of QuantizeLinear; None where there are several."""
    zero_point_back: int | None
    """Of DequantizeLinear."""
    levels: float
    """How many scales the largest magnitude is."""

    @property
    def broken(self) -> bool:
        """Whether values are read on another grid than they were written on."""
        return (self.scale, self.zero_point) != (self.scale_back, self.zero_point_back)


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A tensor of the FP32 model, made once more from FP32's values by what makes it in the quantised model."""

    alone: str
    """With weights and activations rounded."""
    weights: str | None
    """With weights alone rounded; None where there are none."""
    reads: tuple[str, ...]
    """Sites of the roundings between the FP32 model's tensors and this one."""
    passed: str | None
    """With nothing rounded, from the quantised model's values; None where it reads none of them."""


@dataclass(kw_only=True)
class Beside:
    """What `build` made."""

    copies: dict[str, Copy] = field(default_factory=dict)
    """By tensor of the FP32 model, those whose makers read something rounded."""
    roundings: dict[str, Rounding] = field(default_factory=dict)
    """By site."""
    root: dict[str, str] = field(default_factory=dict)
    """By site, the site whose rounded values it only moves."""
    theirs: dict[str, str] = field(default_factory=dict)
    """By float tensor of the quantised model, the input of the network made here that takes its values."""
    reference: dict[str, str] = field(default_factory=dict)
    """By float tensor that both models have: what to compare the quantised one's with, in the network made here."""


def prepared(network: ir.Model) -> ir.Model:
    """``network`` with its constants as initialisers and the types of its tensors known."""
    LiftConstantsToInitializersPass(lift_all_constants=True)(network)
    if any(output.dtype is None for node in network.graph for output in node.outputs):
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(network)
    return network


def made(graph: ir.Graph) -> dict[str, ir.Value]:
    """Activations of ``graph`` by name: its inputs and what its nodes make."""
    inputs = [value for value in graph.inputs if not value.is_initializer()]
    return {str(value.name): value for value in (*inputs, *(v for node in graph for v in node.outputs)) if value.name}


def is_rounding(node: ir.Node | None) -> bool:
    """Whether ``node`` gives back an activation that a QuantizeLinear has rounded."""
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return False
    quantize = node.inputs[0].producer()
    return (
        quantize is not None and quantize.op_type == "QuantizeLinear" and not placement.is_constant(quantize.inputs[0])
    )


def build(network: ir.Model, quantised: ir.Graph, rescaled: Mapping[str, Array]) -> Beside:
    """Put copies of nodes of ``quantised`` into ``network``, the FP32 model, in place, and show what is to be compared.

    Args:
        network: as `prepared`; its outputs are replaced.
        quantised: as `prepared`; its weights are shared.
        rescaled: as of `moved.factors`.
    """
    return _Builder(network.graph, quantised, rescaled).build()


class _Builder:
    def __init__(self, graph: ir.Graph, quantised: ir.Graph, rescaled: Mapping[str, Array]) -> None:
        self._graph, self._quantised, self._rescaled = graph, quantised, rescaled
        self._known = made(graph)
        self._free = FreeNames(graph).free
        self._copied: dict[tuple[ir.Value, bool], ir.Value] = {}
        self._scaled: dict[str, ir.Value] = {}
        self._read_from: dict[str, ir.Value] = {}
        self._passed: dict[ir.Node, list[ir.Value]] = {}
        self._beside = Beside()

    def build(self) -> Beside:
        beside, shown = self._beside, []
        theirs = made(self._quantised)
        for name, value in theirs.items():
            if name in self._known and graphs.is_float(value) and graphs.is_float(self._known[name]):
                reference = self._source(name)
                beside.reference[name] = str(reference.name)
                shown += [reference, self._known[name]]
        for name in tuple(beside.reference):
            value = theirs[name]
            maker, found = value.producer(), self._trace(value)
            if maker is None or found.encloses or not (found.weights or found.roundings):
                continue
            reads = [self._rounding(node) for node in found.roundings]
            alone = self._copy_of(value, rounded=True)
            weights = self._copy_of(value, rounded=False) if found.weights else None
            passed = self._pass_on(self._known[name])
            shown += [copy for copy in (alone, weights, passed) if copy is not None]
            beside.copies[name] = Copy(
                alone=str(alone.name),
                weights=None if weights is None else str(weights.name),
                reads=tuple(dict.fromkeys(reads)),
                passed=None if passed is None else str(passed.name),
            )
        ours = made(self._graph)
        for rounding in beside.roundings.values():
            shown += [ours[rounding.value], ours[rounding.rounded]]
        self._graph.outputs.clear()
        for value in dict.fromkeys(shown):
            if not value.is_graph_input():
                value.dtype = ir.DataType.FLOAT
                self._graph.outputs.append(value)
        return beside

    def _source(self, name: str) -> ir.Value:
        """The FP32 model's tensor, on the quantised model's scale."""
        if name not in self._rescaled:
            return self._known[name]
        if name not in self._scaled:
            factor = graphs.register(self._graph, self._free(f"{name}_factors"), self._rescaled[name])
            scaled = ir.Value(name=self._free(f"{name}_rescaled"), type=ir.TensorType(ir.DataType.FLOAT))
            self._graph.append(ir.node("Mul", [self._known[name], factor], outputs=[scaled], name=scaled.name))
            self._scaled[name] = scaled
        return self._scaled[name]

    def _pass_on(self, value: ir.Value) -> ir.Value | None:
        """``value`` as the FP32 model's node makes it of the quantised model's tensors."""
        node = value.producer()
        assert node is not None, "made by a node"
        passed = self._remade(node)[value.index() or 0]
        return None if passed is value else passed

    def _remade(self, node: ir.Node) -> list[ir.Value]:
        """What the FP32 model's ``node`` makes of the quantised model's tensors; its own outputs where it reads none of them."""
        if node not in self._passed:
            inputs = [None if read is None else self._theirs(read) for read in node.inputs]
            same = inputs == list(node.inputs)
            self._passed[node] = list(node.outputs) if same else self._duplicate(node, inputs)
        return self._passed[node]

    def _theirs(self, value: ir.Value) -> ir.Value:
        """The quantised model's tensor, on the FP32 model's scale, or what the FP32 model makes of such where the quantised one has
        none of that name; an input of the model, a constant, or what is not float, as it is."""
        name, node = str(value.name), value.producer()
        if (
            name not in self._beside.reference
            and node is not None
            and graphs.is_float(value)
            and not graphs.encloses(node)
        ):
            return self._remade(node)[value.index() or 0]
        if name not in self._beside.reference or value.is_graph_input() or value.shape is None:
            return value
        if name not in self._read_from:
            free = self._free(f"{name}_theirs")
            shape = ir.Shape([f"{free}_{place}" for place in range(len(value.shape))])
            theirs = ir.Value(name=free, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
            self._graph.inputs.append(theirs)
            self._beside.theirs[name] = free
            if name in self._rescaled:
                inverse = graphs.register(self._graph, self._free(f"{free}_inverse"), 1 / self._rescaled[name])
                scaled = ir.Value(name=self._free(f"{free}_rescaled"), type=ir.TensorType(ir.DataType.FLOAT))
                self._graph.append(ir.node("Mul", [theirs, inverse], outputs=[scaled], name=scaled.name))
                theirs = scaled
            self._read_from[name] = theirs
        return self._read_from[name]

    def _trace(self, value: ir.Value) -> _Trace:
        """What is rounded between the FP32 model's tensors and ``value``."""
        found, left, head = _Trace(), [value], True
        while left:
            value = left.pop()
            node = value.producer()
            if node is None or (str(value.name) in self._known and not head):
                continue
            head = False
            found.encloses |= graphs.encloses(node)
            if is_rounding(node):
                found.roundings.append(node)
                left.append(_input(_input(node).producer()))
            elif node.op_type == "DequantizeLinear":
                found.weights = True
            else:
                left.extend(read for read in node.inputs if read is not None)
        return found

    def _copy_of(self, value: ir.Value, *, rounded: bool) -> ir.Value:
        """``value``, though the FP32 model knows it, by the quantised model's node."""
        node = value.producer()
        assert node is not None, "made by a node"
        if is_rounding(node) and not rounded:
            return self._read(_input(_input(node).producer()), rounded=rounded)
        return self._copy(node, rounded=rounded)[value.index() or 0]

    def _read(self, value: ir.Value, *, rounded: bool) -> ir.Value:
        """``value`` as made of the FP32 model's tensors."""
        if value.is_initializer() or value.const_value is not None:
            return self._constant(value)
        if str(value.name) in self._known:
            return self._source(str(value.name))
        key = (value, rounded)
        if key not in self._copied:
            node = value.producer()
            assert node is not None, "neither an input nor a constant"
            if is_rounding(node) and not rounded:
                self._copied[key] = self._read(_input(_input(node).producer()), rounded=rounded)
            else:
                for output, copy in zip(node.outputs, self._copy(node, rounded=rounded), strict=True):
                    self._copied[output, rounded] = copy
        return self._copied[key]

    def _copy(self, node: ir.Node, *, rounded: bool) -> list[ir.Value]:
        return self._duplicate(
            node, [None if value is None else self._read(value, rounded=rounded) for value in node.inputs]
        )

    def _duplicate(self, node: ir.Node, inputs: list[ir.Value | None]) -> list[ir.Value]:
        outputs = [
            ir.Value(name=self._free(f"{value.name}_beside"), type=value.type) if value.name else ir.Value(name="")
            for value in node.outputs
        ]
        name = self._free(f"{node.name}_beside")
        self._graph.append(
            ir.node(node.op_type, inputs, node.attributes, domain=node.domain, outputs=outputs, name=name)
        )
        return outputs

    def _constant(self, value: ir.Value) -> ir.Value:
        key = (value, False)
        if key not in self._copied:
            tensor = value.const_value
            assert tensor is not None, "a constant"
            copy = ir.Value(
                name=self._free(f"{value.name}_beside"), type=ir.TensorType(tensor.dtype), shape=value.shape, const_value=tensor
            )  # fmt: skip
            self._graph.register_initializer(copy)
            self._copied[key] = copy
        return self._copied[key]

    def _rounding(self, node: ir.Node) -> str:
        """The site of one DequantizeLinear, after entering it."""
        quantize = _input(node).producer()
        assert quantize is not None, "rounded"
        before, after = _input(quantize), node.outputs[0]
        site, own = str(before.name), True
        if site not in self._known:
            own = str(after.name) in self._known
            site = str(after.name) if own else self._origin(before)
        (scale, zero_point), (back, zero_point_back) = _grid(quantize), _grid(node)
        known = self._beside.roundings.get(site)
        broken = (scale, zero_point) != (back, zero_point_back)
        if known is None or (broken and not known.broken):
            value = self._source(site) if own else self._read(before, rounded=False)
            pair = _Pair(self, quantize, node).on(value)
            self._beside.roundings[site] = Rounding(
                site=site,
                seen_as=str(after.name) if own else None,
                value=str(value.name),
                rounded=str(pair.name),
                scale=scale,
                scale_back=back,
                zero_point=zero_point,
                zero_point_back=zero_point_back,
                levels=_levels(_input(node)) + abs(zero_point or 0),
            )
        self._beside.root[site] = self._root(site, before, scale)
        return site

    def _origin(self, value: ir.Value) -> str:
        """The FP32 model's tensor that ``value`` was made of."""
        while str(value.name) not in self._known:
            node = value.producer()
            assert node is not None, "every chain starts at a tensor that both models have"
            value = next(read for read in node.inputs if read is not None and not placement.is_constant(read))
        return str(value.name)

    def _root(self, site: str, value: ir.Value, scale: float | None) -> str:
        """Follow operators that only move values of eight bits."""
        node = value.producer()
        while node is not None and node.op_type in placement.ADOPTS_SCALE and scale is not None:
            rounding = _input(node).producer()
            if rounding is None or not is_rounding(rounding) or _scalar(rounding.inputs[1]) != scale:
                break
            value = _input(_input(rounding).producer())
            site, node = str(value.name), value.producer()
        return site


@dataclass(kw_only=True)
class _Trace:
    weights: bool = False
    encloses: bool = False
    """Whether a node holds a graph of its own, which is not copied."""
    roundings: list[ir.Node] = field(default_factory=list)


@dataclass(frozen=True)
class _Pair:
    """A QuantizeLinear and its DequantizeLinear, to be put on another value."""

    builder: _Builder
    quantize: ir.Node
    dequantize: ir.Node

    def on(self, value: ir.Value) -> ir.Value:
        for node in (self.quantize, self.dequantize):
            parameters = [None if read is None else self.builder._constant(read) for read in node.inputs[1:]]
            output = ir.Value(name=self.builder._free(f"{value.name}_beside"), type=node.outputs[0].type)
            self.builder._graph.append(
                ir.node(node.op_type, [value, *parameters], node.attributes, outputs=[output], name=output.name)
            )
            value = output
        return value


def _input(node: ir.Node | None) -> ir.Value:
    assert node is not None and node.inputs[0] is not None, "has an input"
    return node.inputs[0]


def _scalar(value: ir.Value | None) -> float | None:
    array = placement.constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def _grid(node: ir.Node) -> tuple[float | None, int | None]:
    """Scale and zero point of a QuantizeLinear or a DequantizeLinear; None where there are several."""
    zero_point = _scalar(node.inputs[2]) if len(node.inputs) > 2 else 0.0
    return _scalar(node.inputs[1]), None if zero_point is None else int(zero_point)


def _levels(steps: ir.Value) -> float:
    dtype = steps.dtype.numpy() if steps.dtype is not None else np.dtype(np.int8)
    return float(np.iinfo(dtype).max) if np.issubdtype(dtype, np.integer) else float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


def show(graph: ir.Graph, names: Iterable[str]) -> None:
    """Make activations outputs of ``graph``, in the place of its own."""
    values = made(graph)
    graph.outputs.clear()
    for value in dict.fromkeys(values[name] for name in names):
        if not value.is_graph_input():
            value.dtype = ir.DataType.FLOAT
            graph.outputs.append(value)
