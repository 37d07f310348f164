"""NVIDIA's Model Optimizer for ONNX: INT8 with the largest value or by entropy, and INT4 weights."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..jobs import Job, Meter
from ..readers import data_reader
from ..samples import Samples


def load() -> None:
    importlib.import_module("modelopt.onnx.quantization")


def run(job: Job, meter: Meter) -> dict[str, Any]:
    """Methods: ``max``, ``entropy``, ``int4``."""
    quantization = importlib.import_module("modelopt.onnx.quantization")
    base = importlib.import_module("onnxruntime.quantization.calibrate").CalibrationDataReader
    out = Path(job.out) / f"{job.method}.onnx"
    int4 = job.method == "int4"
    with meter.stage("quantize"):
        quantization.quantize(
            job.model,
            quantize_mode="int4" if int4 else "int8",
            calibration_method="rtn_dq" if int4 else job.method,
            calibration_data_reader=data_reader(base, Samples(job.samples, job.count)),
            calibration_eps=["cpu"],
            output_path=str(out),
            high_precision_dtype="fp32",
            use_external_data_format=bool(job.options.get("external")),
        )
    return {"files": {job.method: str(out)}}
