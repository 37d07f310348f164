"""Weights alone in INT8, FP8 or INT4; activations and sums stay in high precision.

INT8 and FP8 have one scale per output channel; INT4 has one for each block of weights (see `blocks`) along the axis that is
summed over, of a MatMul or Gemm.

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
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compiler import onnx_files
from compiler.onnx_files import FreeNames
from compiler.quantize import awq, gram, graphs, opset, placement, qdq, rounding
from compiler.quantize.blocks import BLOCKS, round_blocks, rounder
from compiler.quantize.formats import FP8, INT4, INT8, Steps
from compiler.quantize.gram import Gram, Reads, Source
from compiler.quantize.observe import Observed, TensorStatistics
from compiler.quantize.qdq import Quantised
from compiler.quantize.rounding import Layout, Learning, Outcome, Rounding
from compiler.quantize.uses import Form, Use, form_of, notes_on_blocks, reads_all, uses_of
from compiler.recipe import EngineSection, QuantizeSection
from compiler.spec import Array, Precision

MOST_SWEPT, MOST_SOLVED = 3e11, 1e12
"""Weights times the inputs of their layers, in all, up to which ``rounding = "auto"`` takes AdaRound after GPTQ (some
minutes of two cores), and up to which GPTQ alone; nearest above."""

_FORMATS: Mapping[Precision, Steps] = {Precision.INT8: INT8, Precision.FP8: FP8, Precision.INT4: INT4}


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
    everything = uses_of(graph)
    uses = uses_of(graph, keep=keep)
    tables = {use.weight for use in uses if use.looks_up and reads_all(use.weight, uses)}
    forms = {use: form for use in uses if (form := form_of(use, use.weight in tables, steps, engine.block)) is not None}
    layers = [use for use in forms if not use.looks_up]
    possible = [use for use in everything if not use.looks_up]
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
    notes += notes_on_blocks(uses, forms, engine)
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


def gains_of_learning(graph: ir.Graph, names: Sequence[str], engine: EngineSection, source: Source) -> list[float]:
    """How much less the outputs of the layers that make the tensors ``names`` err, in dB, on samples that nothing was learnt
    from, where the rounding of their weights is learnt (GPTQ); 0 where it cannot be.

    Args:
        graph: of the model of ``source``.
        names: of the tensors.
        engine: in whose format the weights would be.
        source: of what the layers read.

    Raises:
        BuildError: the model cannot be run.
    """
    by_name = {str(use.layer.outputs[0].name): use for use in uses_of(graph)}
    stores = []
    for name in names:
        use = by_name.get(name)
        form = form_of(use, False, _FORMATS[engine.precision], engine.block) if use is not None else None
        stores.append(_stores({use: form}, learned=True)[0] if use is not None and form is not None else None)
    gains = []
    wanted = [() if store is None else store.reads for store in stores]
    for store, grams in zip(stores, source.stream(wanted), strict=True):
        found = grams.get(store.reads[0]) if store is not None and store.reads else None
        outcome = _round_one(store, found, engine.rest, "gptq") if store is not None else None
        gains.append(outcome.gain_db or 0.0 if outcome is not None else 0.0)
    return gains


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


# --- rounding -------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Store:
    """A weight in one of its forms, and who reads it so."""

    weight: ir.Value
    form: Form
    uses: list[Use]
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
        if method != "nearest" and not any(use.looks_up for use in store.uses):
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


def _stores(forms: Mapping[Use, Form], *, learned: bool) -> list[_Store]:
    wanted: dict[tuple[ir.Value, Form], _Store] = {}
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


def _reads(use: Use) -> Reads | None:
    """What ``use`` multiplies its weight by; None of a table's rows, and of what has no Gram matrix."""
    if use.looks_up:
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
            block = min(store.form.block or 1 for store in readable)
            learning.factors[key] = awq.choose_factors(weights, grams[reads], rounder(block, rest))
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
