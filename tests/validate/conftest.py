"""Records as the steps would leave them, with only what a test is about filled in by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from compiler.spec import DimRange, Engine, Latency, Platform, Precision, Score, TensorSpec

PLATFORM = Platform(
    os="linux", arch="x86_64", cpu="test", cores=2, gpu=None, compute_capability=None, driver=None, packages={}
)


@pytest.fixture
def platform() -> Platform:
    return PLATFORM


@pytest.fixture
def engine() -> Callable[..., Engine]:
    """An engine of two-class logits over a dynamic batch; any field by keyword."""

    def make(name: str = "int8", **fields: Any) -> Engine:
        values: dict[str, Any] = {
            "name": name,
            "path": Path("engine.onnx"),
            "sha256": f"sha-of-{name}",
            "size_bytes": 1 << 20,
            "backend": "onnxruntime",
            "backend_reason": "test",
            "precision": Precision.INT8,
            "model_sha256": "model",
            "platform": PLATFORM,
            "inputs": (TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
            "outputs": (TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
            "axes": {"batch": DimRange(min=1, opt=4, max=8)},
            "build_s": 0.0,
        }
        return Engine(**{**values, **fields})

    return make


@pytest.fixture
def binary() -> Callable[..., Score]:
    """A right-or-wrong metric of which 90 % of the original's samples were right."""

    def make(lost: int, gained: int, samples: int, metric: str = "top1") -> Score:
        right = round(0.9 * samples)
        return Score(
            metric=metric,
            value=(right - lost + gained) / samples,
            original=right / samples,
            change=(gained - lost) / samples,
            samples=samples,
            binary=True,
            higher_is_better=True,
            lost=lost,
            gained=gained,
        )

    return make


@pytest.fixture
def latency() -> Callable[..., Latency]:
    """A candidate with one median per block; ``calls`` calls in each, all equal."""

    def make(candidate: str, block_ms: Sequence[float], batch: int = 1, calls: int = 3) -> Latency:
        return Latency(
            candidate=candidate,
            batch=batch,
            samples_s=tuple(ms / 1e3 for ms in block_ms for _ in range(calls)),
            block_of=tuple(block for block in range(len(block_ms)) for _ in range(calls)),
            engine_sha256=None if candidate in ("eager", "compile", "control") else f"sha-of-{candidate}",
        )

    return make
