"""Weights alone in INT8, FP8 or INT4; activations and sums stay in high precision.

INT8 and FP8 have one scale per output channel. INT4 has one for each block of weights along the axis that is summed
over, of a MatMul or Gemm; convolutions keep their precision, since TensorRT takes blocks along the last two axes only.
Where a block does not divide that axis, the next smaller one that does is taken, since TensorRT wants whole blocks.

The scale of an INT4 block is the one of least mean squared error, min over s of sum((s clip(round(w / s), -8, 7) - w)^2),
among `SHARES` of the one that the largest magnitude asks for: a few clipped weights for finer steps of all others.
Source: Choukroun et al. 2019, Low-bit Quantization of Neural Networks for Efficient Inference, section 3
(arXiv:1902.06822). On normal weights it gains 0.9 dB over the largest magnitude.

Embedding tables (a Gather of whole rows from more than `placement.TABLE_ROWS`) are INT8 with a scale per row in each of these
formats: rows are where scales differ, INT8 is 11 dB finer than FP8 at the same size, and the table is often most of a
small model. The DequantizeLinear stands before the Gather: TensorRT refuses any other reader of an INT8 constant, and
fuses the two, so that only the rows looked up are scaled. A head tied to its table, Gemm or Transpose and MatMul, reads
the same INT8 table.

INT4 is rounded by what its layers read, see `rounding`; INT8 and FP8, whose errors are 25 dB and 12 dB smaller, only where
the recipe names a method: for nearest nothing has to be gathered. Tables are rounded to nearest.

There is no zero point, and one DequantizeLinear for all readers of a weight that can share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compiler import onnx_files
from compiler.onnx_files import FreeNames
from compiler.quantize import awq, gram, graphs, opset, placement, qdq, rounding
from compiler.quantize.formats import FP8, INT4, INT8, Steps, in_rest
from compiler.quantize.gram import Gram, Reads, Source
from compiler.quantize.observe import Observed, TensorStatistics
from compiler.quantize.placement import Edge
from compiler.quantize.qdq import Quantised
from compiler.quantize.rounding import Layout, Learning, Outcome, Rounding
from compiler.recipe import EngineSection, QuantizeSection
from compiler.spec import Array, Precision

BLOCKS = (128, 64, 32, 16)

SHARES = (*np.linspace(0.5, 1.0, 11).tolist(), 7 / 8)
"""Of the scale at which the largest magnitude is 7 steps; at 7/8 it is 8, which only negative weights can be."""

MOST_SWEPT, MOST_SOLVED = 3e11, 1e12
"""Weights times the inputs of their layers, in all, up to which ``rounding = "auto"`` takes AdaRound after GPTQ (some
minutes of two cores), and up to which GPTQ alone; nearest above."""

_CHUNK = 1 << 20

_FORMATS: Mapping[Precision, Steps] = {Precision.INT8: INT8, Precision.FP8: FP8, Precision.INT4: INT4}


@dataclass(frozen=True, kw_only=True)
class _Use:
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


@dataclass(frozen=True, kw_only=True)
class _Form:
    """How a weight is to be stored; ``block`` is None where a scale serves all of a channel."""

    steps: Steps
    axis: int
    block: int | None = None


def convert(
    model: ir.Model,
    engine: EngineSection,
    section: QuantizeSection,
    observed: Observed,
    learning: Learning,
) -> Quantised:
    """Round weights of ``model`` in place.

    Args:
        model: the one of ``learning``, as it is there.
        engine: what is asked.
        section: how.
        observed: the statistics of its tensors.
        learning: of the rounding of its weights.

    Raises:
        CalibrationError: nothing is left to round, a weight is not finite, or the opset is too old.
        RecipeError: a pattern of ``keep`` matches nothing.
    """
    graph, steps = model.graph, _FORMATS[engine.precision]
    keep = placement.match(graph, (*section.keep, *engine.keep))
    everything = _uses(graph)
    uses = _uses(graph, keep=keep)
    tables = {use.weight for use in uses if _is_lookup(use) and _reads_all(use.weight, uses)}
    forms = {use: form for use in uses if (form := _form(use, use.weight in tables, steps, engine.block)) is not None}
    layers = [use for use in forms if not _is_lookup(use)]
    possible = [use for use in everything if not _is_lookup(use)]
    if not any(forms[use].steps is steps for use in layers):
        kinds = "Conv, ConvTranspose, Gemm or MatMul with a constant weight"
        if steps is INT4:
            kinds = f"MatMul or Gemm with a constant weight of a multiple of {BLOCKS[-1]} input channels"
        raise placement.none_left(len(possible), steps.label, kinds)
    for use in forms:
        placement.check_finite(use.weight, use.layer)
    raised = opset.require(model, steps.since, steps.label)
    per = f"block {engine.block}" if steps is INT4 else "one scale per output channel"
    count = f"{len(layers)} of {len(possible)} layers with constant weights"
    notes = [f"{steps.label} weights: {count}, {per}; the rest stays {engine.rest.upper()}"]
    notes += _notes_on_blocks(uses, forms, engine)
    if tables:
        heads = sum(use.weight in tables and forms[use].steps is INT8 for use in layers)
        tied = f" (layers that share one: {heads})" if heads else ""
        notes.append(f"embedding tables in INT8, one scale per row: {len(tables)}{tied}")
    method, why = _method(section.rounding, steps)
    stores, known = _stores(forms, learned=method != "nearest"), dict(observed)
    if method == "auto":
        sizes = [math.prod(store.shape) * store.reads[0].width for store in stores if store.reads]
        method, more = _affordable(sum(sizes))
        why += more
    notes += why
    if method == "awq":
        notes += _scale_inputs(graph, stores, engine.rest, learning, known)
    notes += _round(graph, stores, engine.rest, method, learning)
    return Quantised(notes=(*notes, *raised), seen_as={}, observed=known)


def _method(asked: Rounding, steps: Steps) -> tuple[Rounding, list[str]]:
    """What to do about a format, and a note where that is not what was named: for eight bits ``auto`` gathers nothing.

    >>> _method("auto", INT8), _method("awq", INT8)
    (('nearest', []), ('nearest', ['AWQ is for INT4 alone: INT8 weights are rounded to nearest']))
    """
    if asked == "auto" and steps is not INT4:
        return "nearest", []
    if asked == "awq" and steps is not INT4:
        return "nearest", [f"AWQ is for INT4 alone: {steps.label} weights are rounded to nearest"]
    if asked == "adaround" and not steps.dtype.is_integer():
        return "nearest", [f"AdaRound is for integers alone: {steps.label} weights are rounded to nearest"]
    return asked, []


def _affordable(products: float) -> tuple[Rounding, list[str]]:
    """What ``auto`` comes to where one sweep over all weights takes so many multiplications, and a note on what it leaves out.

    >>> _affordable(1e10), _affordable(1e14)[0]
    (('auto', []), 'nearest')
    """
    if products <= MOST_SWEPT:
        return "auto", []
    if products <= MOST_SOLVED:
        return "gptq", ["weights rounded by GPTQ alone: AdaRound after it would take long on a model of this size"]
    return "nearest", [
        "weights rounded to nearest: GPTQ would take long on a model of this size; rounding = 'gptq' insists"
    ]


def _uses(graph: ir.Graph, *, keep: Collection[ir.Node] = ()) -> list[_Use]:
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
            found.append(_Use(layer=node, reader=(node, 0), channels=0, summed=None))
    return found


def _use(node: ir.Node, reader: Edge, rank: int, *, turned: bool) -> _Use:
    channels = placement.channel_axis(node, rank)
    summed = None
    if node.op_type in placement.PRODUCTS:
        summed = 2 * rank - 3 - channels  # the other one of the last two
    if turned:
        channels, summed = 1 - channels, channels
    return _Use(layer=node, reader=reader, channels=channels, summed=summed)


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


def _reads_all(weight: ir.Value, uses: Iterable[_Use]) -> bool:
    """Whether ``uses`` are all that read ``weight``: a table of which others need the floats grows if it is rounded."""
    return set(weight.uses()) <= {use.reader for use in uses} and not weight.is_graph_output()


def _is_lookup(use: _Use) -> bool:
    return use.layer.op_type == "Gather"


def _form(use: _Use, in_table: bool, steps: Steps, block: int) -> _Form | None:
    """How what ``use`` reads is to be stored; None where it keeps its precision."""
    if in_table and use.channels == 0:
        return _Form(steps=INT8, axis=0)
    if _is_lookup(use):
        return None
    if steps is not INT4:
        return _Form(steps=steps, axis=use.channels)
    if use.summed is None:
        return None
    fitting = _fitting(use, block)
    return None if fitting is None else _Form(steps=steps, axis=use.summed, block=fitting)


def _fitting(use: _Use, block: int) -> int | None:
    """The largest block, not above ``block``, that divides the axis which ``use`` sums over."""
    tensor = use.weight.const_value
    assert tensor is not None and use.summed is not None, "a matrix product by a constant"
    size = tensor.numpy().shape[use.summed]
    return next((fitting for fitting in BLOCKS if fitting <= block and size % fitting == 0), None)


def _notes_on_blocks(uses: Iterable[_Use], forms: Mapping[_Use, _Form], engine: EngineSection) -> list[str]:
    if engine.precision is not Precision.INT4:
        return []
    rest, notes = engine.rest.upper(), []
    convolutions = sum(use.summed is None and not _is_lookup(use) for use in uses)
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


def _named(uses: Sequence[_Use]) -> str:
    """
    >>> node = ir.node("MatMul", [], name="up")
    >>> _named([_Use(layer=node, reader=(node, 1), channels=1, summed=0)])
    "'up'"
    """
    shown = ", ".join(f"'{use.layer.name}'" for use in uses[:3])
    return shown + (f", and {len(uses) - 3} more" if len(uses) > 3 else "")


# --- rounding -------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Store:
    """A weight in one of its forms, and who reads it so."""

    weight: ir.Value
    form: _Form
    uses: list[_Use]
    reads: tuple[Reads, ...] = ()
    """What they multiply it by; none where that is not known of all of them. Names are those of the original model."""
    factors: Array | None = None
    """What its inputs are multiplied by before it is rounded, [K]."""

    @property
    def key(self) -> Hashable:
        """What its rounding follows from, in one model."""
        factors = None if self.factors is None else self.factors.tobytes()
        return self.weight.name, self.form, self.reads, factors

    @property
    def layout(self) -> Layout:
        groups = self.reads[0].groups if self.reads else 1
        return Layout(channels=self.uses[0].channels, block=self.form.block, groups=groups)

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.weight.const_value is not None, "a weight is a constant"
        return tuple(self.weight.const_value.shape.numpy())

    def values(self) -> Array:
        assert self.weight.const_value is not None, "a weight is a constant"
        return self.weight.const_value.numpy()

    def nearest(self, array: Array, rest: str) -> tuple[Array, Array]:
        """Steps and scales of ``array``."""
        if self.form.block is None:
            return qdq.round_weight(array, self.form.axis, steps=self.form.steps, rest=rest)[:2]
        return round_blocks(array, self.form.axis, self.form.block, rest)


def _round(graph: ir.Graph, stores: Sequence[_Store], rest: str, method: Rounding, learning: Learning) -> list[str]:
    """Store each weight in each of its forms once, and let its readers read it dequantised."""
    names, notes = FreeNames(graph), []
    order = {node: place for place, node in enumerate(graph)}
    outcomes = []
    for store, outcome in _outcomes(stores, rest, method, learning.source, learning.outcomes):
        weight, form = store.weight, store.form
        if method != "nearest" and not any(_is_lookup(use) for use in store.uses):
            outcomes.append(outcome)
        if form.block is None and (zeros := _zeros(store.values(), form.axis)):
            notes.append(f"weight '{weight.name}': {zeros} of {outcome.scale.size} channels are all zero")
        name, label = str(weight.name), form.steps.label.lower()
        output = graphs.like(weight, names.free(f"{name}_dequantized"), ir.DataType.FLOAT)
        inputs = [
            graphs.register(graph, names.free(f"{name}_{label}"), outcome.steps),
            graphs.register(graph, names.free(f"{output.name}_scale"), outcome.scale),
        ]
        attributes = {"axis": form.axis} | ({} if form.block is None else {"block_size": form.block})
        dequantize = ir.node("DequantizeLinear", inputs, attributes, outputs=[output], name=output.name)
        readers = [use.reader for use in store.uses]
        graph.insert_before(min((node for node, _ in readers), key=order.__getitem__), dequantize)
        for node, index in dict.fromkeys(readers):
            node.replace_input_with(index, output)
        onnx_files.release(weight)
    for weight in dict.fromkeys(store.weight for store in stores):
        graphs.forget_unused(graph, weight)
    return [*notes, *rounding.summary(outcomes)]


def _stores(forms: Mapping[_Use, _Form], *, learned: bool) -> list[_Store]:
    wanted: dict[tuple[ir.Value, _Form], _Store] = {}
    for use, form in forms.items():
        key = (use.weight, form)
        wanted.setdefault(key, _Store(weight=use.weight, form=form, uses=[])).uses.append(use)
    for store in wanted.values() if learned else ():
        found = [_reads(use) for use in store.uses]
        known = [reads for reads in found if reads is not None]
        # One weight in convolutions of other groups, or products along other axes, is several problems in one.
        alike = {(reads.width, reads.groups) for reads in known}, {use.channels for use in store.uses}
        if len(known) == len(found) and len(alike[0]) == len(alike[1]) == 1:
            store.reads = tuple(known)
    return list(wanted.values())


def _reads(use: _Use) -> Reads | None:
    """What ``use`` multiplies its weight by; None of a table's rows, and of what has no Gram matrix."""
    if _is_lookup(use):
        return None
    tensor = use.weight.const_value
    assert tensor is not None, "a weight is a constant"
    shape = tuple(tensor.shape.numpy())
    return gram.reads_of(use.layer, shape[use.summed] if use.summed is not None else 0, axes=len(shape))


def _outcomes(
    stores: Sequence[_Store], rest: str, method: Rounding, source: Source, known: dict[Hashable, Outcome]
) -> Iterator[tuple[_Store, Outcome]]:
    """Each of ``stores``, in their order, rounded; what is not ``known`` is added, if anything was learnt for it."""
    keys = [(method, rest, store.key) for store in stores]
    missing = [store.reads if key not in known else () for store, key in zip(stores, keys, strict=True)]
    for store, key, grams in zip(stores, keys, source.stream(missing), strict=True):
        outcome = known.get(key)
        if outcome is None:
            complete = store.reads and all(reads in grams for reads in store.reads)
            found = gram.mean([grams[reads] for reads in store.reads]) if complete else None
            outcome = _round_one(store, found, rest, method)
            if store.reads:
                known[key] = outcome
        yield store, outcome


def _round_one(store: _Store, found: Gram | None, rest: str, method: Rounding) -> Outcome:
    array, layout, before = store.values(), store.layout, None
    if store.factors is not None:
        if found is not None:
            before = rounding.held_error(array, store.nearest(array, rest), layout, found)
            found = found.divided(store.factors)
        array = array * (store.factors if layout.channels == 0 else store.factors[:, None])
    return rounding.round_layer(
        array,
        store.nearest(array, rest),
        layout,
        store.form.steps,
        found,
        rounding=method,
        error_before=before,
    )


def _zeros(array: Array, axis: int) -> int:
    others = tuple(i for i in range(array.ndim) if i != axis)
    return int(np.count_nonzero(~array.any(axis=others)))


def _scale_inputs(
    graph: ir.Graph, stores: Sequence[_Store], rest: str, learning: Learning, known: dict[str, TensorStatistics]
) -> list[str]:
    """Divide activations as AWQ says, where that pays, in place, and note the factors of each weight; returns notes.

    Args:
        known: statistics, to which those of what it changes are added.
    """
    readers: dict[Reads, list[_Store]] = {}
    for store in stores:
        if len(store.uses) == 1 and len(store.reads) == 1 and store.form.block is not None:
            readers.setdefault(store.reads[0], []).append(store)
    names, folded, multiplied = FreeNames(graph), list[float](), list[float]()
    keys = [(reads, rest, *(store.key for store in readable)) for reads, readable in readers.items()]
    missing = [[] if key in learning.factors else [reads] for key, reads in zip(keys, readers, strict=True)]
    found = zip(readers.items(), keys, learning.source.stream(missing), strict=True)
    for (reads, readable), key, grams in found:
        layers = list(dict.fromkeys(store.uses[0].layer for store in readable))
        value = layers[0].inputs[0]
        if value is None or not (key in learning.factors or reads in grams):
            continue
        if key not in learning.factors:
            weights = [store.layout.rows(store.values()) for store in readable]
            blocks = [store.form.block or 1 for store in readable]
            learning.factors[key] = awq.choose_factors(weights, grams[reads], _by_blocks(min(blocks), rest))
        factors, gain_db = learning.factors[key]
        folds = awq.can_fold(graph, value, layers)
        if gain_db < (awq.FOLD_GAIN_DB if folds else awq.MUL_GAIN_DB):
            continue
        (folded if folds else multiplied).append(gain_db)
        made = awq.divide(graph, value, layers, factors, names)
        statistics = known.get(reads.tensor)
        if statistics is not None:
            peak = statistics.peak * float((1 / factors).max())
            if statistics.channels is not None:
                peak = float((statistics.channels.peaks / factors).max())
            known[str(made.name)] = TensorStatistics(low=-peak, high=peak, count=statistics.count)
        for store in readable:
            store.factors = factors
    notes = []
    for gains, how in ((folded, "folded into normalisations"), (multiplied, "one Mul each")):
        if gains:
            notes.append(
                f"inputs scaled by AWQ, {how}: {len(gains)} of {len(readers)}, "
                f"output errors {min(gains):.1f} to {max(gains):.1f} dB lower"
            )
    return notes or [f"inputs scaled by AWQ: 0 of {len(readers)}, none gains enough"]


def _by_blocks(block: int, rest: str) -> Callable[[Array], Array]:
    """What rows [N, K] are after rounding to INT4."""

    def rounded(rows: Array) -> Array:
        steps, scale = round_blocks(rows, 1, block, rest)
        values: Array = steps.astype(np.float32) * np.repeat(scale, block, axis=1)
        return values

    return rounded


def round_blocks(weight: Array, axis: int, block: int, rest: str) -> tuple[Array, Array]:
    """A weight in INT4, and the scales of its blocks along ``axis``: [.., K, ..] and [.., K / block, ..], float32.

    >>> q, scale = round_blocks(np.array([[7.0], [-3.0], [0.7], [-0.8]], np.float32), 0, 2, "fp32")
    >>> q.astype(int).tolist(), scale.round(3).tolist()
    ([[7], [-3], [7], [-8]], [[1.0], [0.10000000149011612]])
    """
    turned = np.moveaxis(weight, axis, -1)
    rows = np.ascontiguousarray(turned).reshape(-1, block)
    steps, scale = np.empty(rows.shape, INT4.dtype.numpy()), np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _CHUNK // block):
        part = slice(start, start + _CHUNK // block)
        scale[part] = _least_error(rows[part], rest)
        steps[part] = INT4.round(rows[part] / scale[part, None])
    return (
        np.ascontiguousarray(np.moveaxis(steps.reshape(turned.shape), -1, axis)),
        np.ascontiguousarray(np.moveaxis(scale.reshape(*turned.shape[:-1], -1), -1, axis)),
    )


def _least_error(rows: Array, rest: str) -> Array:
    """For each row the scale, among `SHARES`, of least squared error; a row of zeros may have any."""
    peak = np.abs(rows).max(axis=1)
    full = np.where(peak == 0, peak.max() or 1.0, peak) / np.float32(INT4.largest)
    best, least = np.zeros_like(full), np.full(len(rows), np.inf)
    for share in sorted(SHARES, reverse=True):
        scale = in_rest(full * np.float32(share), rest)
        rounded = np.clip(np.rint(rows / scale[:, None]), INT4.lowest, INT4.largest) * scale[:, None]
        error = np.einsum("ij,ij->i", rounded - rows, rounded - rows, dtype=np.float64)
        better = error < least
        best[better], least[better] = scale[better], error[better]
    return best
