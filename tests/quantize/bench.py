"""A model on the bench: quantised as a recipe would have it, run, and looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compiler.backends.onnxruntime import open_model
from compiler.errors import BuildEngineError, CalibrationError
from compiler.quantize import observe, quantize
from compiler.recipe import EngineSection, QuantizeSection
from compiler.spec import Array, CalibrationSet, OnnxModel, Precision, Statistics
from tests.quantize import networks

NONE = -1000.0
"""A limit in dB that everything meets."""


class Bench:
    """One model with its calibration set, observed."""

    def __init__(
        self, folder: Path, proto: onnx.ModelProto, samples: Sequence[Mapping[str, Array]], *, attention: bool = False
    ) -> None:
        self.folder, self.proto, self.samples = folder, proto, samples
        self.model: OnnxModel = networks.save(proto, folder / "model.onnx", probe=samples[0])
        self.data: CalibrationSet = networks.calibration(folder / "data", samples)
        (folder / "observed").mkdir()
        self.statistics: Statistics = observe(
            self.model,
            self.data,
            samples=512,
            min_samples=1,
            open_model=open_model,
            threads=1,
            out_dir=folder / "observed",
            attention=attention,
        )

    def quantize(
        self,
        *,
        precision: Precision = Precision.INT8,
        keep: Sequence[str] = (),
        rest: Any = "fp32",
        weights_only: bool = False,
        block: Any = 32,
        **section: Any,
    ) -> OnnxModel:
        out_dir = self.folder / f"out{len(list(self.folder.iterdir()))}"
        out_dir.mkdir()
        return quantize(
            EngineSection(precision=precision, keep=tuple(keep), rest=rest, weights_only=weights_only, block=block),
            QuantizeSection(
                **{"method": "minmax", "rounding": "nearest", "correct_bias": "off", "equalize": "off", **section}
            ),
            self.model,
            self.statistics,
            self.data,
            open_model=open_model,
            threads=1,
            out_dir=out_dir,
        )

    def refusal(self, kind: type[BuildEngineError] = CalibrationError, **changes: Any) -> str:
        with pytest.raises(kind) as caught:
            self.quantize(**changes)
        return caught.value.message


def outputs(model: OnnxModel, feeds: Mapping[str, Array], *, optimize: bool = False) -> Array:
    return open_model(model.path, threads=1, optimize=optimize).run(feeds)["y"]


def graph(model: OnnxModel) -> onnx.GraphProto:
    onnx.checker.check_model(str(model.path), full_check=True)
    return onnx.load(model.path).graph


def constants(model: OnnxModel) -> dict[str, Array]:
    return {weight.name: numpy_helper.to_array(weight) for weight in graph(model).initializer}


def readers(model: OnnxModel, kind: str) -> list[str]:
    """Of each node of this kind: whether each of its inputs comes from a DequantizeLinear, as 'DD', 'D-', ..."""
    made_by = {name: node for node in graph(model).node for name in node.output}
    return [
        "".join("D" if name in made_by and made_by[name].op_type == "DequantizeLinear" else "-" for name in node.input)
        for node in graph(model).node
        if node.op_type == kind
    ]


def sqnr(expected: Array, found: Array) -> float:
    return float(10 * np.log10(np.sum(expected**2) / np.sum((expected - found) ** 2)))
