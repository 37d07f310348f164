"""FP16 and BF16 by casts: precision is a property of the graph, as TensorRT 11 and ONNX Runtime both want it.

Weights are stored in half, inputs and outputs of the model stay FP32 and are cast inside, and every operator computes
in half, except where that would change more than the last digits:

- What overflows. A tensor that exceeds half of the largest finite value on the calibration samples (they are a sample:
  a factor of `MARGIN` is left to what they did not show), or that never reaches the smallest normal one, is an island:
  what makes it and what reads it stay in FP32. So does what reads a weight that does not fit.
- Sums and squares of many values (`SUMS`), whose rounding errors add up: the list that PyTorch's autocast keeps in FP32,
  https://docs.pytorch.org/docs/stable/amp.html#cuda-ops-that-can-autocast-to-float32, less what accumulates in FP32
  in every runtime anyway (softmax, normalisations).
- Arithmetic on integers made float (positions of a rotary embedding, sizes, counts): FP16 skips integers above 2048.
- What ONNX does not define for half, or what this module cannot see through: other domains, local functions, control
  flow and what it encloses.

Masks would make islands of all attention: -3.4e38 fits no FP16. Where such a constant can only reach a Softmax, by ways
that leave it a mask, it becomes -30000 (in BF16 -1e30): the exponential of either is exactly 0. (Of a row that is masked
altogether, the result may differ; it is noise in the original, too.) An infinity stays what it is.

Why no list of operators that may be half: the schemas say it, for each parameter of each operator at each opset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from compiler.errors import CalibrationError
from compiler.onnx_files import FreeNames
from compiler.quantize import graphs, masks, opset, placement
from compiler.quantize.formats import HALVES, MARGIN, Half
from compiler.quantize.observe import Observed
from compiler.quantize.placement import Edge
from compiler.spec import Array, Precision

OLDEST_IR = 4
"""The first IR version whose weights need not be inputs."""

BF16_OPSET = 22
"""The first that defines convolutions and pools for BF16."""

_OLDEST_RAISED = 20

SUMS = frozenset(
    {"CumSum", "Pow", "LpNormalization", "LpPool", "GlobalLpPool", "MeanVarianceNormalization"}
    | {"NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"}
    | {f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Mean", "Prod", "Sum", "SumSquare")}
)

_ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Mod", "Neg", "Abs", "Reciprocal", "Sqrt", "Exp", "Log", "Sin", "Cos"}
    | {"Floor", "Ceil", "Round", "Clip", "Max", "Min", "Where"}
)

_NOT_IN_HALF = frozenset({"BitCast", "Cast", "OneHot", "RandomNormalLike", "RandomUniformLike", "EyeLike", "Bernoulli"})
"""Operators whose half form is another operator: an index loses digits, or the output takes another type. Casts are
looked through."""

_TYPED_BY_RULE = frozenset({"ConstantOfShape", "DequantizeLinear"})
"""Operators whose output has a type of its own in the schema, and here that of its filler or of its scale."""

_NOT_IN_BF16 = frozenset({"ConvTranspose"})
"""TensorRT for RTX 1.7.1 refuses to build it ("Could not infer output types")."""

_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})

_NOTED = 5
"""Names in a note before it says how many more there are."""


@dataclass(frozen=True, kw_only=True)
class _Form:
    """Which inputs and outputs of a node are FP32 and may be half: all of them together, or none."""

    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]


def convert(model: ir.Model, *, to: Precision, statistics: Observed, keep: Sequence[str]) -> list[str]:
    """Make ``model`` compute in ``to`` where it can, in place. Its inputs and outputs keep names and types.

    Args:
        model: FP32, in part already INT8 or half.
        to: FP16 or BF16.
        statistics: of its tensors, by name; one that is missing is taken to fit.
        keep: names or shell patterns of nodes or their outputs that stay FP32.

    Returns:
        What a reader of the report should know: how many operators stay FP32 and why, masks changed, digits lost.

    Raises:
        RecipeError: a pattern of ``keep`` matches nothing.
        CalibrationError: no operator is left that could be half.
    """
    number = HALVES[to]
    LiftConstantsToInitializersPass(lift_all_constants=True)(model)
    model.ir_version = max(model.ir_version, OLDEST_IR)
    graph = model.graph
    if any(output.dtype is None for node in graph for output in node.outputs) and not _holds_sequences(graph):
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    kept = placement.match(graph, keep)
    raised = []
    if (
        to is Precision.BF16
        and model.opset_imports.get("", 0) >= _OLDEST_RAISED
        and not opset.obstacle(model, BF16_OPSET)
    ):
        raised = opset.require(model, BF16_OPSET, "all common operators for BF16")
    forms = {node: form for node in graph if (form := _form(node, model, number)) is not None}
    floats = [
        node
        for node in graph
        if node.op_type != "Cast" and any(graphs.is_float(value) for value in (*node.inputs, *node.outputs))
    ]
    names = FreeNames(model.graph)
    tainted, notes = masks.clamp(graph, statistics, number, names)
    full = _full_precision(graph, forms, statistics, number, kept, tainted)
    notes += full.notes
    half = {node: form for node, form in forms.items() if node not in full.reason}
    _follow_neighbours(half)
    if not half:
        raise CalibrationError(
            f"model: none of its {len(floats)} operators on FP32 values can compute in {number.label}; at least one was "
            f"expected. Keep fewer layers, or build an FP32 engine. {_listed(_reasons(floats, half, full.reason))}"
        )
    notes.insert(0, f"{number.label}: {len(half)} of {len(floats)} operators on FP32 values")
    if len(half) < len(floats):
        notes[0] += f"; FP32 stay {_listed(_reasons(floats, half, full.reason))}"
    notes += _lost_digits(half, number) + raised
    _rewrite(graph, half, number, names)
    return notes


def _reasons(floats: Collection[ir.Node], half: Collection[ir.Node], reason: Mapping[ir.Node, str]) -> list[str]:
    """How many operators stay FP32 and why, the most frequent reason first."""
    others = {
        node: "that only pass FP32 on" if node.op_type in graphs.MOVERS else "without a half form" for node in floats
    }
    counts = Counter(reason.get(node, others[node]) for node in floats if node not in half)
    return [f"{count} {why}" for why, count in counts.most_common()]


def _listed(items: Sequence[str], limit: int = _NOTED) -> str:
    more = f", and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _holds_sequences(graph: ir.Graph) -> bool:
    """Whether there is anything but tensors: `ShapeInferencePass` writes down sequences as tensors of their elements."""
    named = any("Sequence" in node.op_type or node.op_type.startswith("Optional") for node in graph.all_nodes())
    return named or not all(isinstance(value.type, ir.TensorType) for value in graph.inputs)


# --- what may be half -----------------------------------------------------------------------------------------------


def _form(node: ir.Node, model: ir.Model, number: Half) -> _Form | None:
    """What of ``node`` may be half by its schema; None where nothing may, or where it must not be touched."""
    if node.domain != "" or node.op_identifier() in model.functions or node.op_type in _NOT_IN_HALF:
        return None
    if graphs.encloses(node):
        return None
    if "output_dtype" in node.attributes and node.attributes["output_dtype"].as_int() != ir.DataType.UNDEFINED:
        return None
    if not all(isinstance(value.type, ir.TensorType) for value in (*node.inputs, *node.outputs) if value is not None):
        return None
    try:
        schema = onnx.defs.get_schema(node.op_type, model.opset_imports.get("", 0), "")
    except onnx.defs.SchemaError:
        return None
    inputs = [None if v is None else _parameter(schema.inputs, i) for i, v in enumerate(node.inputs)]
    outputs = [_parameter(schema.outputs, i) for i in range(len(node.outputs))]
    wanted = f"tensor({number.dtype.name.lower()})"
    allowed = {c.type_param_str for c in schema.type_constraints if wanted in c.allowed_type_strs}
    variables = {p for p, v in zip(inputs, node.inputs, strict=True) if p in allowed and graphs.is_float(v)}
    made = {p for p, v in zip(outputs, node.outputs, strict=True) if p in allowed and graphs.is_float(v)}
    if not made <= variables and node.op_type not in _TYPED_BY_RULE:
        return None  # of what type its output is, only the operator's own rules say
    variables |= made
    return (
        _Form(inputs=tuple(p in variables for p in inputs), outputs=tuple(p in variables for p in outputs))
        if variables
        else None
    )


def _parameter(formal: Sequence[onnx.defs.OpSchema.FormalParameter], index: int) -> str:
    """The type, or type variable, of the parameter at ``index``; the last one may stand for many."""
    return formal[min(index, len(formal) - 1)].type_str


# --- what must stay FP32 --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Full:
    """Nodes that stay FP32 although half forms of them exist, and why."""

    reason: dict[ir.Node, str]
    notes: list[str]


def _full_precision(
    graph: ir.Graph,
    forms: Mapping[ir.Node, _Form],
    statistics: Observed,
    number: Half,
    kept: Collection[ir.Node],
    tainted: Mapping[ir.Value, float],
) -> _Full:
    reason: dict[ir.Node, str] = dict.fromkeys(kept, "that the recipe keeps")
    misfits: list[str] = []
    for value in _activations(graph):
        bounds = graphs.bounds(value, statistics)
        if bounds is None:
            continue
        # What a clamped mask makes of the low side was bounded when it was clamped.
        peak = max(bounds[1], 0.0) if value in tainted else max(-bounds[0], bounds[1])
        if number.smallest <= peak <= number.largest / MARGIN or peak == 0:
            continue
        touched = [node for node, _ in value.uses()]
        touched += [producer] if (producer := value.producer()) is not None else []
        if any(node in forms for node in touched):
            misfits.append(f"'{value.name}' ({peak:.3g})")
            reason |= {node: "beside values that do not fit" for node in touched if node not in reason}
    integers = _from_integers(graph)
    for node, form in forms.items():
        if _accumulates(node):
            reason.setdefault(node, "that sum or square")
        if number.precision is Precision.BF16 and node.op_type in _NOT_IN_BF16:
            reason.setdefault(node, "that TensorRT does not build in BF16")
        if any(output in integers for output in node.outputs):
            reason.setdefault(node, "that compute on integers")
        for weight in (
            value for value, half in zip(node.inputs, form.inputs, strict=True) if half and value is not None
        ):
            array = graphs.weight(weight)
            if array is not None and _is_lost(node, array, number):
                misfits.append(f"'{weight.name}' ({np.abs(array[np.isfinite(array)]).max():.3g})")
                reason.setdefault(node, "beside values that do not fit")
    enclosed = graphs.enclosed_outputs(graph)
    reason |= {node: "that a subgraph returns" for node in forms if enclosed.intersection(node.outputs)}
    notes = []
    if misfits:
        listed = _listed(list(dict.fromkeys(misfits)))
        notes.append(
            f"outside {number.label} ({number.smallest:.2g} to {number.largest:.3g}, "
            f"a factor of {MARGIN:g} left to activations): {listed}; what makes or reads them stays FP32"
        )
    return _Full(reason=reason, notes=notes)


def _accumulates(node: ir.Node) -> bool:
    reduction = node.attributes.get("reduction")
    return node.op_type in SUMS or (reduction is not None and reduction.as_string() != "none")


def _is_lost(node: ir.Node, weight: Array, number: Half) -> bool:
    """Whether a constant of ``node`` becomes something else in half: infinite, zero, or a scale of fewer digits."""
    values = np.abs(weight[np.isfinite(weight) & (weight != 0)])
    if not values.size:
        return False
    if node.op_type in _QUANTIZERS:
        small = values[values < number.smallest]
        return bool((number.round(small).astype(np.float32) != small).any())
    vanishes = weight.size == 1 and not number.round(values).any()
    return bool(np.isinf(number.round(values)).any()) or vanishes


def _from_integers(graph: ir.Graph) -> set[ir.Value]:
    """Float values computed elementwise from integers and constants alone."""
    found: set[ir.Value] = set()
    for node in graph:
        if node.domain != "":
            continue
        if node.op_type == "Cast":
            source = node.inputs[0]
            exact = source is not None and source.dtype is not None and source.dtype.is_integer()
            if exact or (source is not None and (source.dtype == ir.DataType.BOOL or source in found)):
                found.update(node.outputs)
            continue
        floats = [value for value in node.inputs if graphs.is_float(value) and not placement.is_constant(value)]
        if node.op_type == "Range" or (floats and found.issuperset(floats) and _is_pointwise(node)):
            found.update(node.outputs)
    return found


def _is_pointwise(node: ir.Node) -> bool:
    """Whether every value is computed from few others; an outer product, as of positions and frequencies, is."""
    if node.op_type in _ELEMENTWISE | graphs.MOVERS | SUMS:
        return True
    if node.op_type != "MatMul":
        return False
    left, right = (value.shape if value is not None else None for value in node.inputs)
    return (left is not None and len(left) > 1 and left[-1] == 1) or (
        right is not None and len(right) > 1 and right[-2] == 1
    )


def _follow_neighbours(half: dict[ir.Node, _Form]) -> None:
    """Take out of ``half`` what only moves FP32 values from FP32 to FP32."""
    reached = [node for node in half if node.op_type not in graphs.MOVERS]
    kept = set(reached)
    while reached:
        node = reached.pop()
        makers = [producer for value in node.inputs if value is not None and (producer := value.producer()) is not None]
        beside = {*makers, *(user for output in node.outputs for user, _ in output.uses())}
        found = [other for other in beside - kept if other in half]
        kept.update(found)
        reached += found
    for node in half.keys() - kept:
        del half[node]


def _lost_digits(half: Mapping[ir.Node, _Form], number: Half) -> list[str]:
    """Weights of which a tenth or more becomes zero or loses digits."""
    found: dict[str, float] = {}
    for node, form in half.items():
        for value, is_half in zip(node.inputs, form.inputs, strict=True):
            weight = graphs.weight(value) if is_half else None
            if weight is None or value is None or not (used := np.count_nonzero(weight)):
                continue
            small = np.count_nonzero((weight != 0) & (np.abs(weight) < number.smallest))
            if 10 * small >= used:
                found[f"'{value.name}'"] = small / used
    items = [f"{name} ({share:.0%})" for name, share in sorted(found.items(), key=lambda item: (-item[1], item[0]))]
    return (
        [f"weights below {number.smallest:.2g}, which lose digits in {number.label}: {_listed(items)}"] if items else []
    )


def _activations(graph: ir.Graph) -> list[ir.Value]:
    inputs = [value for value in graph.inputs if graphs.is_float(value)]
    return inputs + [output for node in graph for output in node.outputs if graphs.is_float(output)]


# --- rewriting ------------------------------------------------------------------------------------------------------


def _rewrite(graph: ir.Graph, half: Mapping[ir.Node, _Form], number: Half, names: FreeNames) -> None:
    """Give the nodes of ``half`` their types, and cast what passes between them and the others, once per tensor."""
    values = [*graph.inputs, *graph.initializers.values(), *(output for node in graph for output in node.outputs)]
    values = [value for value in dict.fromkeys(values) if graphs.is_float(value)]
    wanted: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    others: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    for value in values:
        for node, index in value.uses():
            if node in half and half[node].inputs[index]:
                wanted.setdefault(value, []).append((node, index))
            elif node.op_type != "Cast" or node.domain != "":  # which reads any type
                others.setdefault(value, []).append((node, index))
    made = {o for node, form in half.items() for o, is_half in zip(node.outputs, form.outputs, strict=True) if is_half}
    for node in half:
        if node.op_type == "ConstantOfShape":
            filler = graphs.filler(node)
            stored = number.round(np.zeros(1, np.float32) if filler is None else filler)
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(stored))
    narrowed: dict[ir.Value, ir.Value] = {}
    for value in values:
        if value in made:
            _widen(graph, value, others.get(value, ()), number, names)
        elif value in wanted and placement.is_constant(value):
            _store_half(graph, value, wanted[value], number, names)
        elif value in wanted:
            _narrow(graph, value, wanted[value], narrowed, number, names)
    _drop_casts(graph)


def _widen(graph: ir.Graph, value: ir.Value, readers: Iterable[Edge], number: Half, names: FreeNames) -> None:
    """``value`` is made in half; let those who need FP32 read it cast."""
    value.dtype = number.dtype
    readers, is_output = list(readers), value.is_graph_output()
    if not readers and not is_output:
        return
    name = str(value.name)
    if is_output:
        value.name = names.free(f"{name}_{number.precision.value}")
    wide = graphs.like(value, name if is_output else names.free(f"{name}_fp32"), ir.DataType.FLOAT)
    for node, index in readers:
        node.replace_input_with(index, wide)
    for place, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[place] = wide
    producer = value.producer()
    assert producer is not None, "what is made has a maker"
    graph.insert_after(producer, graphs.cast(value, wide, names))


def _narrow(
    graph: ir.Graph,
    value: ir.Value,
    readers: Sequence[Edge],
    narrowed: dict[ir.Value, ir.Value],
    number: Half,
    names: FreeNames,
) -> None:
    """``value`` is FP32; let ``readers`` read it cast, from what it was itself cast from, if so."""
    maker = value.producer()
    source = maker.inputs[0] if maker is not None and maker.op_type == "Cast" and maker.domain == "" else value
    assert source is not None, "a cast has an input"
    if source.dtype == number.dtype:
        narrowed[source] = source
    elif source not in narrowed:
        narrowed[source] = graphs.like(source, names.free(f"{source.name}_{number.precision.value}"), number.dtype)
        cast, maker = graphs.cast(source, narrowed[source], names), source.producer()
        if maker is None:
            graph.insert_before(graph[0], cast)
        else:
            graph.insert_after(maker, cast)
    for node, index in readers:
        node.replace_input_with(index, narrowed[source])


def _store_half(graph: ir.Graph, value: ir.Value, readers: Sequence[Edge], number: Half, names: FreeNames) -> None:
    """A weight in half, under its own name unless others still need it in FP32."""
    weight = graphs.weight(value)
    assert weight is not None, "a constant"
    stored = graphs.register(graph, names.free(f"{value.name}_{number.precision.value}"), number.round(weight))
    for node, index in readers:
        node.replace_input_with(index, stored)
    if graphs.forget_unused(graph, value):
        del graph.initializers[str(stored.name)]
        stored.name = value.name
        graph.register_initializer(stored)


def _drop_casts(graph: ir.Graph) -> None:
    """Remove casts that nobody reads any more, and those that became casts to what they read."""
    returned = graphs.enclosed_outputs(graph)
    for node in reversed(list(graph)):
        output = node.outputs[0]
        if node.op_type != "Cast" or node.domain != "" or output.is_graph_output() or output in returned:
            continue
        source = node.inputs[0]
        if source is not None and source.dtype == output.dtype:
            output.replace_all_uses_with(source)
        if not output.uses():
            graph.remove(node, safe=True)
