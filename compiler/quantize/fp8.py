"""A model in FP8 (E4M3), activations and weights, rounded where convolutions and matrix products read them.

Why the whole range of every activation, whatever `quantize.method` says: a floating-point number keeps its relative
precision down to 2^-14 of the largest, so that clipping the tail buys no finer steps for the others, as it does in
INT8, and only loses the tail. For the same reason nothing is smoothed. Shen et al. 2023, Efficient Post-training
Quantization with FP8 Formats (arXiv:2309.14592), find the largest magnitude sufficient, too.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from compiler.quantize import opset, placement, qdq
from compiler.quantize.formats import FP8, Grid
from compiler.quantize.observe import Observed
from compiler.quantize.placement import Placement
from compiler.quantize.qdq import Quantised
from compiler.recipe import EngineSection, QuantizeSection


def convert(model: ir.Model, engine: EngineSection, section: QuantizeSection, observed: Observed) -> Quantised:
    """Round ``model`` in place.

    Raises:
        CalibrationError: nothing is left to round, a weight is not finite, or the opset is too old.
        RecipeError: a pattern of ``keep`` matches nothing.
    """
    graph = model.graph
    keep = placement.match(graph, (*section.keep, *engine.keep))
    attention = section.attention == "on"
    everything = placement.at_products(graph, attention=attention)
    placed = placement.at_products(graph, keep=keep, barred=qdq.masked(observed), attention=attention)
    if not placed.weights:
        raise placement.none_left(
            len(everything.weights), "FP8", "Conv, ConvTranspose, Gemm or MatMul with a constant weight"
        )
    raised = opset.require(model, FP8.since, "FP8")
    count = f"{len(placed.nodes)} of {len(everything.nodes)} layers with constant weights and "
    notes = [f"FP8: {count}{len(placed.activations)} activations (whole range); the rest stays {engine.rest.upper()}"]
    notes += qdq.notes_on_the_rest(graph, engine.rest, everything, placed, observed)
    rounded = qdq.insert(model, placed, grids(placed, observed, engine.rest), steps=FP8, rest=engine.rest)
    known = {**observed, **{name: observed[source] for name, source in rounded.source.items()}}
    return Quantised(notes=(*notes, *rounded.notes, *raised), seen_as=rounded.seen_as, observed=known)


def grids(placed: Placement, observed: Observed, rest: str) -> Mapping[str, Grid]:
    """By name of an activation the grid on which its largest magnitude becomes 448; of one that was always zero 1.

    Raises:
        CalibrationError: one of them was not observed.
    """
    found = {}
    for value in placed.activations:
        name = str(value.name)
        if name not in observed:
            raise qdq.not_observed(name)
        found[name] = Grid(scale=np.float32(FP8.scale(np.array(observed[name].peak or 1.0), rest)))
    return found
