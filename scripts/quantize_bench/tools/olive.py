"""Microsoft Olive's pass ``OnnxStaticQuantization`` with its defaults (ONNX Runtime underneath)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..jobs import Job, Meter
from ..samples import Samples


def load() -> None:
    importlib.import_module("olive.model")
    importlib.import_module("olive.passes.olive_pass")
    importlib.import_module("olive.passes.onnx.quantization")


def run(job: Job, meter: Meter) -> dict[str, Any]:
    """Methods: ``minmax``, ``percentile``, ``entropy``, ``dynamic``."""
    handler = importlib.import_module("olive.model").ONNXModelHandler
    passes = importlib.import_module("olive.passes.onnx.quantization")
    create = importlib.import_module("olive.passes.olive_pass").create_pass_from_dict
    registry = importlib.import_module("olive.data.registry").Registry
    configs = importlib.import_module("olive.data.config")
    samples = Samples(job.samples, job.count)
    config: dict[str, Any] = {}
    if job.method == "dynamic":
        kind = passes.OnnxDynamicQuantization
    else:
        kind = passes.OnnxStaticQuantization

        def bench_samples(**_: Any) -> Any:
            return _Labelled(samples)

        registry.register_dataset("bench_samples")(bench_samples)
        component = configs.DataComponentConfig
        config = {
            "calibrate_method": {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}[job.method],
            "data_config": configs.DataConfig(
                name="bench",
                type="DummyDataContainer",
                load_dataset_config=component(type="bench_samples"),
                pre_process_data_config=component(type="skip_pre_process"),
                post_process_data_config=component(type="skip_post_process"),
                dataloader_config=component(type="default_dataloader", params={"batch_size": 1}),
            ),
        }
    with meter.stage("quantize"):
        made = create(kind, config, disable_search=True).run(handler(model_path=job.model), job.out)
    return {"files": {job.method: str(Path(made.model_path))}}


class _Labelled:
    """Samples without their batch axis, each with a label that nobody reads."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        if index >= len(self._samples):
            raise IndexError(index)
        return {name: value[0] for name, value in self._samples.feeds(index).items()}, 0
