"""Hugging Face Optimum's ``ORTQuantizer`` with its preset for CPUs with VNNI (ONNX Runtime underneath)."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

from ..jobs import Job, Meter
from ..samples import Samples


def load() -> None:
    importlib.import_module("datasets")
    importlib.import_module("optimum.onnxruntime")
    importlib.import_module("optimum.onnxruntime.configuration")


def run(job: Job, meter: Meter) -> dict[str, Any]:
    """Methods: ``minmax``, ``percentiles``, ``entropy``, ``dynamic``."""
    datasets, optimum = importlib.import_module("datasets"), importlib.import_module("optimum.onnxruntime")
    configuration = importlib.import_module("optimum.onnxruntime.configuration")
    folder, out = Path(job.out) / "source", Path(job.out) / "quantised"
    with meter.stage("read"):
        folder.mkdir()
        shutil.copyfile(job.model, folder / "model.onnx")
        quantizer = optimum.ORTQuantizer.from_pretrained(str(folder), file_name="model.onnx")
    static = job.method != "dynamic"
    scheme = configuration.AutoQuantizationConfig.avx512_vnni(is_static=static, per_channel=True)
    ranges = None
    if static:
        samples = Samples(job.samples, job.count)
        with meter.stage("data set"):
            rows = [{name: value[0] for name, value in feeds.items()} for feeds in samples]
            data = datasets.Dataset.from_list(rows)
        presets = configuration.AutoCalibrationConfig
        with meter.stage("calibrate"):
            ranges = quantizer.fit(
                dataset=data,
                calibration_config=getattr(presets, job.method)(data),
                operators_to_quantize=scheme.operators_to_quantize,
            )
    with meter.stage("quantize"):
        quantizer.quantize(save_dir=str(out), quantization_config=scheme, calibration_tensors_range=ranges)
    return {"files": {job.method: str(next(out.glob("*.onnx")))}}
