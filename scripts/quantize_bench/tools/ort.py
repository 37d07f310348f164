"""ONNX Runtime's own quantisation: ``quantize_static`` after its pre-processing, ``quantize_dynamic``, and 4-bit weights."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..jobs import Job, Meter
from ..readers import data_reader
from ..samples import Samples

LARGE_BYTES = 1 << 31
_PRODUCTS = ["MatMul", "Gemm"]


def load() -> None:
    importlib.import_module("onnxruntime.quantization")
    importlib.import_module("onnxruntime.quantization.shape_inference")


def run(job: Job, meter: Meter) -> dict[str, Any]:
    quantization = importlib.import_module("onnxruntime.quantization")
    out = Path(job.out) / f"{job.method}.onnx"
    large = sum(file.stat().st_size for file in Path(job.model).parent.glob(Path(job.model).name + "*")) > LARGE_BYTES
    if job.method == "int4":
        _int4(job, out, meter)
        return {"files": {job.method: str(out)}}
    with meter.stage("pre-process"):
        ready = _pre_process(job, large)
    with meter.stage("quantize"):
        if job.method == "dynamic":
            quantization.quantize_dynamic(ready, str(out), use_external_data_format=large)
        else:
            calibration, _, variant = job.method.partition("-")
            reader = data_reader(quantization.CalibrationDataReader, Samples(job.samples, job.count))
            methods = quantization.CalibrationMethod
            quantization.quantize_static(
                ready,
                str(out),
                reader,
                calibrate_method={
                    "minmax": methods.MinMax,
                    "percentile": methods.Percentile,
                    "entropy": methods.Entropy,
                }[calibration],
                use_external_data_format=large,
                **_variant(quantization, variant),
            )
    return {"files": {job.method: str(out)}}


def _variant(quantization: Any, name: str) -> dict[str, Any]:
    """``""``: all defaults (INT8 activations, one scale per tensor); ``u8s8``: what runs fast on x86, scales per channel;
    ``u8s8-products``: the same for inputs of matrix products alone."""
    if not name:
        return {}
    options: dict[str, Any] = {"activation_type": quantization.QuantType.QUInt8, "per_channel": True}
    if name == "u8s8-products":
        options["op_types_to_quantize"] = _PRODUCTS
        options["extra_options"] = {"OpTypesToExcludeOutputQuantization": _PRODUCTS}
    return options


def _pre_process(job: Job, large: bool) -> str:
    """The path of the pre-processed model; without symbolic shapes where they cannot be inferred."""
    pre_process = importlib.import_module("onnxruntime.quantization.shape_inference").quant_pre_process
    ready = Path(job.out) / "pre-processed.onnx"
    if large:  # shape inference of more than 2 GiB goes by files, and needs them in one piece
        pre_process(
            job.model,
            str(ready),
            skip_symbolic_shape=True,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            external_data_location=f"{ready.name}.data",
        )
        return str(ready)
    try:
        pre_process(job.model, str(ready))
    except Exception as exc:
        print(f"symbolic shape inference failed: {exc}")
        pre_process(job.model, str(ready), skip_symbolic_shape=True)
    return str(ready)


def _int4(job: Job, out: Path, meter: Meter) -> None:
    """Weights alone, in blocks of 32, symmetric: round to nearest."""
    with meter.stage("import 4 bits"):
        nbits = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
        onnx = importlib.import_module("onnx")
    with meter.stage("quantize"):
        quantizer = nbits.MatMulNBitsQuantizer(onnx.load(job.model), block_size=32, is_symmetric=True, bits=4)
        quantizer.process()
        quantizer.model.save_model_to_file(str(out), True)
