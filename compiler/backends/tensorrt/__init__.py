"""TensorRT's seat: what it takes is known, building with it is not in this version."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compiler.errors import BackendUnavailableError
from compiler.spec import Engine, OnnxModel, Platform, Precision, Runner

NAME = "tensorrt"
PRECISIONS = frozenset({Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8})

_REASON = 'this version of build-engine does not build TensorRT engines yet; use backend = "onnxruntime", or "auto"'


def unavailable() -> str | None:
    return _REASON


def fingerprint() -> Mapping[str, str]:
    raise _error()


def platform() -> Platform:
    raise _error()


def build(model: OnnxModel, *, name: str, reason: str, threads: int, out_dir: Path) -> Engine:  # noqa: ARG001
    raise _error()


def open(engine: Engine, *, threads: int) -> Runner:  # noqa: ARG001
    raise _error()


def _error() -> BackendUnavailableError:
    return BackendUnavailableError(f"backend '{NAME}': {_REASON}.")
