"""A model in INT8, activations and weights: smoothed, rounded where `placement` says, scaled as `thresholds` chose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from compiler.quantize import placement, qdq, smooth
from compiler.quantize.observe import Observed, TensorStatistics
from compiler.quantize.placement import Placement
from compiler.quantize.qdq import Quantised
from compiler.recipe import EngineSection, QuantizeSection


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model that is ready to be rounded: nothing of it is rounded yet, its outliers are taken care of."""

    placed: Placement
    scale_of: Mapping[str, np.float32]
    """The scale of every activation of ``placed``, by name."""
    notes: tuple[str, ...]
    observed: Observed
    """The statistics, with those of activations that were made."""


ChooseMethods: TypeAlias = Callable[["Prepared"], tuple[dict[str, np.float32], list[str]]]
"""Scales by activation (its root, as of `Placement.root`) that measuring the outputs asks for, and notes; see `auto`."""


def convert(
    model: ir.Model,
    engine: EngineSection,
    section: QuantizeSection,
    observed: Observed,
    choose: ChooseMethods | None = None,
) -> Quantised:
    """Round ``model`` in place.

    Raises:
        CalibrationError: nothing is left to round, a weight is not finite, or the opset is too old.
        RecipeError: a pattern of ``keep`` matches nothing.
    """
    prepared = prepare(model.graph, engine, section, observed)
    scale_of, notes = dict(prepared.scale_of), list(prepared.notes)
    if choose is not None:
        chosen, more = choose(prepared)
        notes += more
        roots = {str(value.name): str(prepared.placed.root[value].name) for value in prepared.placed.activations}
        scale_of |= {name: chosen[root] for name, root in roots.items() if root in chosen}
    rounded = qdq.insert(model, prepared.placed, scale_of, rest=engine.rest)
    known = {**prepared.observed, **{name: prepared.observed[source] for name, source in rounded.source.items()}}
    return Quantised(notes=(*notes, *rounded.notes), seen_as=rounded.seen_as, observed=known)


def prepare(graph: ir.Graph, engine: EngineSection, section: QuantizeSection, observed: Observed) -> Prepared:
    """Take outliers out of the activations of ``graph``, in place, and decide what to round at which scale.

    Raises:
        CalibrationError: nothing is left to round, or a tensor was not observed.
        RecipeError: a pattern of ``keep`` matches nothing.
    """
    keep = placement.match(graph, (*section.keep, *engine.keep))
    masked = qdq.masked(observed)
    everything = placement.place(graph)
    placed = placement.place(graph, keep=keep, barred=masked)
    if not placed.weights:
        raise placement.none_left(
            len(everything.weights), "INT8", "Conv, ConvTranspose, Gemm or MatMul with a constant weight"
        )
    rest = qdq.notes_on_the_rest(graph, engine.rest, everything, observed)
    smoothed = smooth.NOTHING
    smoothing, splitting = section.smooth != "off", section.split != "off"
    if smoothing or splitting:
        smoothed = smooth.smooth(graph, placed, observed, smoothing=smoothing, splitting=splitting)
    if smoothed.peaks:
        placed = placement.place(graph, keep=(*keep, *smoothed.apart), barred=masked)
    count = f"{len(placed.nodes)} of {len(everything.nodes)} layers with constant weights and "
    notes = [
        f"INT8: {count}{len(placed.activations)} activations ({section.method}); the rest stays {engine.rest.upper()}"
    ]
    if smoothed.gains_db:
        gains = sorted({f"{gain:.0f}" for gain in (min(smoothed.gains_db), max(smoothed.gains_db))}, key=float)
        apart = f" ({smoothed.split} of them with channels in high precision)" if smoothed.split else ""
        notes.append(
            f"smoothed for their outlying channels, whole range kept: {len(smoothed.gains_db)} of "
            f"{len(placed.activations)} activations{apart}, expected error {' to '.join(gains)} dB lower"
        )
    if placed.lookups:
        notes.append(f"embedding tables in INT8, one scale per row: {len({node.inputs[0] for node in placed.lookups})}")
    notes += rest
    scale_of = qdq.scales(placed, observed, method=section.method, percentile=section.percentile, peaks=smoothed.peaks)
    known = {**observed, **{name: TensorStatistics(low=-peak, high=peak) for name, peak in smoothed.peaks.items()}}
    return Prepared(placed=placed, scale_of=scale_of, notes=tuple(notes), observed=known)
