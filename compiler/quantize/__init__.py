"""Calibration and precision: what a tensor's values are, and what FP16, BF16, INT8, FP8 and INT4 make of them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from compiler import onnx_files
from compiler.errors import CalibrationError
from compiler.quantize import auto, biases, fidelity, fp8, groups, half, int8, weights
from compiler.quantize.formats import Grid
from compiler.quantize.gram import Source
from compiler.quantize.observe import Observed, chosen, load, observe
from compiler.quantize.qdq import Quantised
from compiler.quantize.rounding import Learning
from compiler.recipe import QUANTIZED, EngineSection, QuantizeSection
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
    checked: bool = True,
    learning: Learning | None = None,
    progress: Progress = no_progress,
) -> OnnxModel:
    """``model`` in the precision of ``engine``; a quantised one is compared with the original before it is handed on. FP32 is
    the model as it is.

    Args:
        checked: whether it is compared: a search measures better than that.
        learning: on this model, by as many samples as ``statistics``; what is learnt is added to it. Default: forgotten at the
            end.

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
    divided: frozenset[str] = frozenset()
    least_db = -math.inf
    if engine.precision in QUANTIZED:
        known = learning or Learning(
            source=Source(
                model=model,
                data=data,
                samples=statistics.samples,
                open_model=open_model,
                threads=threads,
                out_dir=out_dir,
            )
        )
        trials = auto.Trials(model, data, open_model, threads=threads, out_dir=out_dir)
        quantised = _round(network, engine, section, observed, model, statistics, trials, known)
        if learning is None:
            known.source.forget()
        notes, seen_as, observed = list(quantised.notes), quantised.seen_as, quantised.observed
        divided = quantised.divided
        least_db = section.min_sqnr_db
    elif engine.precision is Precision.FP32:
        notes, checked = [], False
    else:
        notes = half.convert(network, to=engine.precision, statistics=observed, keep=engine.keep)
    _, external = onnx_files.write(network, path)
    if checked and engine.precision is not Precision.BF16:  # which ONNX Runtime cannot run on a CPU
        notes.append(
            fidelity.check(
                model,
                path,
                data,
                calibrated_on=chosen(data.samples, statistics.samples),
                min_sqnr_db=least_db,
                seen_as=seen_as,
                divided=divided,
                hints=statistics.notes,
                open_model=open_model,
                threads=threads,
                out_dir=out_dir,
                progress=progress,
            )
        )
    if engine.precision in QUANTIZED and engine.rest != "fp32":
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


def _round(
    network: ir.Model,
    engine: EngineSection,
    section: QuantizeSection,
    observed: Observed,
    model: OnnxModel,
    statistics: Statistics,
    trials: auto.Trials,
    learning: Learning,
) -> Quantised:
    """Round ``network``, which is ``model``, in place, as `engine` asks."""
    LiftConstantsToInitializersPass(lift_all_constants=True)(network)
    if engine.weights_only or engine.precision is Precision.INT4:
        return weights.convert(network, engine, section, observed, learning)
    if engine.precision is Precision.FP8:
        return fp8.convert(network, engine, section, observed)

    def choose(prepared: int8.Prepared) -> tuple[dict[str, Grid], list[str]]:
        proposed = auto.proposals(
            prepared.placed,
            prepared.observed,
            percentile=section.percentile,
            symmetric=section.activations != "asymmetric",
        )
        if not proposed:
            return {}, []
        if model.size_bytes > auto.LARGEST_BYTES:
            return {}, [
                f"ranges by least squared error: trying others on a model of {model.size_bytes >> 20} MiB takes too much"
            ]
        copy = onnx_files.read(model.path)
        LiftConstantsToInitializersPass(lift_all_constants=True)(copy)
        again = int8.prepare(copy.graph, engine, section, observed)
        macs = sum(group.macs for group in groups.groups(model, statistics))
        centred = biases.wanted(again.placed.nodes, section.correct_bias)
        methods, notes = auto.choose(copy, again.placed, again.grid_of, proposed, trials, macs=macs, centred=centred)
        return {root: proposed[root][method] for root, method in methods.items()}, notes

    return int8.convert(
        network, engine, section, observed, choose=choose if section.method == "auto" else None, learning=learning
    )
