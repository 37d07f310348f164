"""A model in INT8, activations and weights: smoothed, rounded where `placement` says, scaled as `thresholds` chose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from compiler.quantize import biases, equalize, gram, groups, placement, qdq, rounding, smooth
from compiler.quantize.formats import INT8, Grid
from compiler.quantize.gram import Reads
from compiler.quantize.observe import Observed
from compiler.quantize.placement import Edge, Placement
from compiler.quantize.qdq import Quantised
from compiler.quantize.rounding import Learning
from compiler.recipe import EngineSection, QuantizeSection
from compiler.spec import Array

SMALL_SHARE_OF_MACS, SMALL_SHARE_OF_WEIGHTS = 1e-3, 1e-2
"""Of the whole model's: a matrix product with less of both stays in high precision."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model that is ready to be rounded: nothing of it is rounded yet, its outliers are taken care of."""

    placed: Placement
    grid_of: Mapping[str, Grid]
    """The grid of every activation of ``placed``, by name."""
    notes: tuple[str, ...]
    observed: Observed
    """The statistics, with those of activations that were made."""
    factors: Mapping[str, Array]
    """By name of a tensor that was made, or changed: what each channel of the original was divided by."""


ChooseMethods: TypeAlias = Callable[["Prepared"], tuple[dict[str, Grid], list[str]]]
"""Grids by activation (its root, as of `Placement.root`) that measuring the outputs asks for, and notes; see `auto`."""


def convert(
    model: ir.Model,
    engine: EngineSection,
    section: QuantizeSection,
    observed: Observed,
    *,
    choose: ChooseMethods | None = None,
    learning: Learning,
) -> Quantised:
    """Round ``model`` in place.

    Args:
        choose: what finds better grids for ``prepare``'s.
        learning: on ``model`` as it is now, of the rounding of weights, and by its samples of the correction of biases.
            ``rounding = "auto"`` is to nearest: beside the rounding of activations that of weights in 8 bits hardly counts
            (digits: 4 to 9 dB less at every layer's output, 0.1 to 0.4 dB at the model's).

    Raises:
        CalibrationError: nothing is left to round, a weight is not finite, or the opset is too old.
        RecipeError: a pattern of ``keep`` matches nothing.
    """
    reads = _reads(model.graph)
    source = learning.source
    macs = sum(groups.macs(node, observed, source.samples) for node, _ in placement.layers(model.graph))
    prepared = prepare(model.graph, engine, section, observed)
    grid_of, notes = dict(prepared.grid_of), list(prepared.notes)
    if choose is not None:
        chosen, more = choose(prepared)
        notes += more
        roots = {str(value.name): str(prepared.placed.root[value].name) for value in prepared.placed.activations}
        grid_of |= {name: chosen[root] for name, root in roots.items() if root in chosen}
    learner = None
    if section.rounding not in ("auto", "nearest"):
        learner = Learner(prepared, section.rounding, reads, learning)
    rounded = qdq.insert(model, prepared.placed, grid_of, rest=engine.rest, improve=learner)
    notes += rounding.summary(learner.outcomes) if learner is not None else []
    notes += biases.correct(
        model, prepared.placed.nodes, source, how=section.correct_bias, macs=macs, divided=prepared.factors
    )
    known = {**prepared.observed, **{name: prepared.observed[source] for name, source in rounded.source.items()}}
    return Quantised(
        notes=(*notes, *rounded.notes), seen_as=rounded.seen_as, observed=known, divided=frozenset(prepared.factors)
    )


def prepare(graph: ir.Graph, engine: EngineSection, section: QuantizeSection, observed: Observed) -> Prepared:
    """Take outliers out of the activations of ``graph``, in place, and decide what to round to which grid.

    Args:
        section: in which ``activations`` and ``joins`` are decided; ``auto``: symmetric, and scales of their own.

    Raises:
        CalibrationError: nothing is left to round, or a tensor was not observed.
        RecipeError: a pattern of ``keep`` matches nothing.
    """
    attention, one_scale = section.attention == "on", section.joins == "shared"
    everything = placement.place(graph, attention=attention)
    small = _small_products(everything, observed)
    keep = (*placement.match(graph, (*section.keep, *engine.keep)), *small)
    masked = qdq.masked(observed)
    placed = placement.place(graph, keep=keep, barred=masked, attention=attention, one_scale=one_scale)
    if not placed.weights:
        raise placement.none_left(
            len(everything.weights), "INT8", "Conv, ConvTranspose, Gemm or MatMul with a constant weight"
        )
    rest = qdq.notes_on_the_rest(graph, engine.rest, everything, placed, observed)
    symmetric = section.activations != "asymmetric"
    equalised = equalize.equalize(graph, placed, observed, how=section.equalize, symmetric=symmetric)
    smoothed = smooth.NOTHING
    if section.smooth != "off" or section.split != "off":
        smoothed = smooth.smooth(graph, placed, observed, smoothing=section.smooth, splitting=section.split)
    if smoothed.made:
        keep = (*keep, *smoothed.apart)
        placed = placement.place(graph, keep=keep, barred=masked, attention=attention, one_scale=one_scale)
    count = f"{len(placed.nodes)} of {len(everything.nodes)} layers with constant weights and "
    notes = [
        f"INT8: {count}{len(placed.activations)} activations ({section.method}); the rest stays {engine.rest.upper()}"
    ]
    if equalised.gains_db:
        notes.append(
            f"channels evened out between convolutions, whole range kept: {len(equalised.gains_db)} activations, expected "
            f"error {_between(equalised.gains_db)} dB lower"
        )
    if smoothed.gains_db:
        apart = f" ({smoothed.split} of them with channels in high precision)" if smoothed.split else ""
        notes.append(
            f"smoothed for their outlying channels, whole range kept: {len(smoothed.gains_db)} of "
            f"{len(placed.activations)} activations{apart}, expected error {_between(smoothed.gains_db)} dB lower"
        )
    if placed.lookups:
        notes.append(f"embedding tables in INT8, one scale per row: {len({node.inputs[0] for node in placed.lookups})}")
    if small:
        notes.append(
            f"products too small to gain by INT8, in {engine.rest.upper()}: "
            + ", ".join(str(node.outputs[0].name) for node in small[:5])
            + (", ..." if len(small) > 5 else "")
        )
    notes += rest
    if placed.shared:
        together = sum(len(values) for values in placed.shared.values())
        notes.append(f"one scale for what is added: {together} activations have {len(placed.shared)} scales")
    known = {**observed, **equalised.known, **smoothed.made}
    grid_of = qdq.grids(
        placed,
        known,
        method=section.method,
        percentile=section.percentile,
        symmetric=symmetric,
        whole={*equalised.factors, *smoothed.made},
    )
    if shifted := sum(grid_of[str(value.name)].zero_point != 0 for value in placed.activations):
        notes.append(f"ranges that are not centred on zero: {shifted} of {len(placed.activations)} activations")
    return Prepared(
        placed=placed,
        grid_of=grid_of,
        notes=tuple(notes),
        observed=known,
        factors={**equalised.factors, **smoothed.factors},
    )


def _between(gains_db: Sequence[float]) -> str:
    return " to ".join(sorted({f"{gain:.0f}" for gain in (min(gains_db), max(gains_db))}, key=float))


def _small_products(everything: Placement, observed: Observed) -> list[ir.Node]:
    """Matrix products that cost next to nothing: INT8 could only lose."""
    macs = {node: groups.macs(node, observed, samples=1) for node in everything.nodes}
    sizes = {node: groups.weight_bytes(node) for node in everything.nodes}
    least_macs, least_bytes = SMALL_SHARE_OF_MACS * sum(macs.values()), SMALL_SHARE_OF_WEIGHTS * sum(sizes.values())
    return [
        node
        for node in everything.nodes
        if node.op_type in placement.PRODUCTS and macs[node] < least_macs and sizes[node] < least_bytes
    ]


def _reads(graph: ir.Graph) -> dict[ir.Node, Reads]:
    """What the weights of each layer are multiplied by, where its Gram matrix can be had."""
    found = {}
    for node, index in placement.layers(graph):
        if placement.reader((node, index)) != (node, index):
            continue
        rows = placement.input_rows(node)
        reads = gram.reads_of(node, 0 if rows is None else len(rows), axes=2 if rows is not None else 0)
        if reads is not None:
            found[node] = reads
    return found


class Learner:
    """Rounds weights, asked for in the order of a placement, by the Gram matrices of what they are multiplied by."""

    def __init__(
        self,
        prepared: Prepared,
        how: rounding.Rounding,
        reads: Mapping[ir.Node, Reads],
        learning: Learning,
    ) -> None:
        nodes = [node for node, _ in prepared.placed.weights if node in reads]
        self.outcomes: list[rounding.Outcome] = []
        self._how, self._reads, self._factors = how, reads, prepared.factors
        self._known = learning.outcomes
        self._grams = zip(nodes, learning.source.stream([[reads[node]] for node in nodes]), strict=True)

    def __call__(self, edge: Edge, weight: Array, nearest: tuple[Array, Array], axis: int | None) -> Array:
        node = edge[0]
        activation = node.inputs[0]
        factors = self._factors.get(str(activation.name)) if activation is not None else None
        changed = [sha256(array.tobytes()).digest() for array in (weight, nearest[1], factors) if array is not None]
        key = (self._how, node.name, axis, *changed)
        if key not in self._known:
            self._known[key] = self._learn(node, weight, nearest, axis, factors)
        self.outcomes.append(self._known[key])
        return self._known[key].steps

    def _learn(
        self, node: ir.Node, weight: Array, nearest: tuple[Array, Array], axis: int | None, factors: Array | None
    ) -> rounding.Outcome:
        found = None
        if node in self._reads:
            found = next(grams for other, grams in self._grams if other is node).get(self._reads[node])
        if found is not None and factors is not None:
            # Of a convolution a row has every channel once for each position of the kernel.
            found = found.divided(np.repeat(factors, self._reads[node].width // len(factors)))
        layout = rounding.Layout(channels=axis or 0, groups=self._reads[node].groups if node in self._reads else 1)
        return rounding.round_layer(
            weight, nearest, layout, INT8, found if axis is not None else None, rounding=self._how
        )
