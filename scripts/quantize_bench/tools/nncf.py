"""NNCF: the ONNX model for ONNX Runtime, or an OpenVINO IR of the same for OpenVINO; its transformer scheme on request."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..jobs import Job, Meter
from ..samples import Samples


def load() -> None:
    importlib.import_module("onnx")
    importlib.import_module("openvino")
    importlib.import_module("nncf")


def run(job: Job, meter: Meter) -> dict[str, Any]:
    """Methods: ``onnx`` and ``openvino`` (INT8), ``onnx-int4`` and ``openvino-int4`` (weights alone)."""
    nncf, onnx, openvino = (importlib.import_module(name) for name in ("nncf", "onnx", "openvino"))
    runtime, _, kind = job.method.partition("-")
    into_onnx = runtime == "onnx"
    out = Path(job.out) / (f"{job.method}.onnx" if into_onnx else f"{job.method}.xml")
    with meter.stage("read"):
        model = onnx.load(job.model) if into_onnx else openvino.Core().read_model(job.model)
    with meter.stage("quantize"):
        if kind == "int4":
            modes = nncf.CompressWeightsMode
            changed = nncf.compress_weights(model, mode=modes.INT4_SYM, group_size=32, all_layers=True)
        else:
            data = nncf.Dataset(Samples(job.samples, job.count))
            transformer = nncf.ModelType.TRANSFORMER if job.options.get("transformer") else None
            changed = nncf.quantize(model, data, subset_size=job.count, model_type=transformer)
    with meter.stage("write"):
        if into_onnx:
            size = sum(len(tensor.raw_data) for tensor in changed.graph.initializer)
            if size > 2_000_000_000:
                onnx.save(changed, str(out), save_as_external_data=True, location=f"{out.name}.data")
            else:
                onnx.save(changed, str(out))
        else:
            openvino.save_model(changed, str(out), compress_to_fp16=False)
    return {"files": {job.method: str(out)}, "runtime": "onnxruntime" if into_onnx else "openvino"}
