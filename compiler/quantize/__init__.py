"""Calibration and precision: what a tensor's values are, and what FP16, BF16 and INT8 make of them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from compiler import onnx_files
from compiler.errors import CalibrationError
from compiler.quantize import fidelity, half, placement, qdq, smooth
from compiler.quantize.observe import Observed, TensorStatistics, chosen, load, observe
from compiler.quantize.thresholds import holds_mask
from compiler.recipe import EngineSection, QuantizeSection
from compiler.spec import (
    CalibrationSet,
    OnnxModel,
    OpenModel,
    Precision,
    Progress,
    Statistics,
    no_progress,
)

__all__ = ["observe", "quantize"]


def quantize(
    engine: EngineSection,
    section: QuantizeSection,
    model: OnnxModel,
    statistics: Statistics,
    data: CalibrationSet,
    *,
    open_model: OpenModel,
    threads: int,
    out_dir: Path,
    progress: Progress = no_progress,
) -> OnnxModel:
    """``model`` in the precision of ``engine``; for INT8 it is compared with the original before it is handed on.

    Raises:
        CalibrationError: the statistics are another model's; there is nothing to round; a weight is not finite; or the
            outputs differ from the original's by more than ``section.min_sqnr_db`` allows.
        RecipeError: a pattern of ``keep`` matches nothing.
    """
    if statistics.model_sha256 != model.sha256:
        raise CalibrationError(
            f"{statistics.path}: observed on model {statistics.model_sha256[:12]}; statistics of {model.sha256[:12]} "
            "were expected. Run again without the cache: --no-cache."
        )
    network = onnx_files.read(model.path)
    observed = load(statistics.path)
    path = out_dir / "model.onnx"
    seen_as: Mapping[str, str] = {}
    least_db = -math.inf
    if engine.precision is Precision.INT8:
        notes, seen_as, observed = _to_int8(network, engine, section, observed)
        least_db = section.min_sqnr_db
    else:
        notes = half.convert(network, to=engine.precision, statistics=observed, keep=engine.keep)
    _, external = onnx_files.write(network, path)
    if engine.precision is not Precision.BF16:  # which ONNX Runtime cannot run on a CPU
        notes.append(
            fidelity.check(
                model.path,
                path,
                data,
                calibrated_on=chosen(data.samples, statistics.samples),
                min_sqnr_db=least_db,
                seen_as=seen_as,
                hints=statistics.notes,
                open_model=open_model,
                threads=threads,
                out_dir=out_dir,
                progress=progress,
            )
        )
    if engine.precision is Precision.INT8 and engine.rest != "fp32":
        # After the check: what it would find then is the rest's rounding too, and BF16 does not run here.
        notes += half.convert(network, to=Precision(engine.rest), statistics=observed, keep=())
        for file in external:
            file.unlink()
        onnx_files.write(network, path)
    probe = None
    if model.probe is not None:
        probe = out_dir / model.probe.name
        shutil.copyfile(model.probe, probe)
    return onnx_files.describe(
        path, precision=engine.precision, axes=model.axes, probe=probe, notes=(*statistics.notes, *notes)
    )


def _to_int8(
    network: ir.Model, engine: EngineSection, section: QuantizeSection, observed: Observed
) -> tuple[list[str], Mapping[str, str], Observed]:
    """Round ``network`` in place.

    Returns:
        Notes; by rounded activation the tensor in which it is read; and ``observed`` with the tensors that were added.
    """
    graph, rest = network.graph, engine.rest.upper()
    LiftConstantsToInitializersPass(lift_all_constants=True)(network)
    keep = placement.match(graph, (*section.keep, *engine.keep))
    masked = frozenset(name for name, found in observed.items() if found.bins is not None and holds_mask(found))
    everything = placement.place(graph)
    placed = placement.place(graph, keep=keep, barred=masked)
    if not placed.weights:
        raise CalibrationError(
            f"model: {len(everything.weights)} layers could be rounded to INT8, and none is left of them; at least one "
            "Conv, ConvTranspose, Gemm or MatMul with a constant weight, not kept by engines.keep or quantize.keep, was "
            "expected. Keep fewer layers, or build another precision."
        )
    smoothed = smooth.smooth(graph, placed, observed)
    if smoothed.peaks:
        placed = placement.place(graph, keep=keep, barred=masked)
    count = f"{len(placed.nodes)} of {len(everything.nodes)} layers with constant weights and "
    notes = [f"INT8: {count}{len(placed.activations)} activations ({section.method}); the rest stays {rest}"]
    if smoothed.gains_db:
        gains = sorted({f"{gain:.0f}" for gain in (min(smoothed.gains_db), max(smoothed.gains_db))}, key=float)
        notes.append(
            f"smoothed for their outlying channels, whole range kept: {len(smoothed.gains_db)} of "
            f"{len(placed.activations)} activations, expected error {' to '.join(gains)} dB lower"
        )
    products = sum(node.op_type == "MatMul" and node.domain == "" for node in graph)
    products -= sum(node.op_type == "MatMul" for node in everything.nodes)
    if products:
        notes.append(f"{products} products of two activations stay {rest}")
    notes += [
        f"tensor '{name}' holds mask values ({observed[name].low:.3g}): what reads it is not rounded"
        for name in sorted(masked & {str(value.name) for value in everything.activations})
    ]
    scale_of = qdq.scales(placed, observed, method=section.method, percentile=section.percentile, peaks=smoothed.peaks)
    rounded = qdq.insert(network, placed, scale_of)
    known = {**observed, **{name: TensorStatistics(low=-peak, high=peak) for name, peak in smoothed.peaks.items()}}
    known |= {name: known[source] for name, source in rounded.source.items()}
    return [*notes, *rounded.notes], rounded.seen_as, known
