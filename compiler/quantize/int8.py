"""A model in INT8, activations and weights: smoothed, rounded where `placement` says, scaled as `thresholds` chose."""

from __future__ import annotations

import onnx_ir as ir

from compiler.quantize import placement, qdq, smooth
from compiler.quantize.observe import Observed, TensorStatistics
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
    notes += rest
    scale_of = qdq.scales(placed, observed, method=section.method, percentile=section.percentile, peaks=smoothed.peaks)
    rounded = qdq.insert(model, placed, scale_of, rest=engine.rest)
    known = {**observed, **{name: TensorStatistics(low=-peak, high=peak) for name, peak in smoothed.peaks.items()}}
    known |= {name: known[source] for name, source in rounded.source.items()}
    return Quantised(notes=(*notes, *rounded.notes), seen_as=rounded.seen_as, observed=known)
