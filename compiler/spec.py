"""The nouns that cross borders: frozen, keyword-only, units in their names; and the protocols of back ends and runners.

A value that a step returns round-trips through JSON (`compiler.pipeline.codec`): fields are plain values, tuples,
mappings, enums, other nouns, and `Path`. Every path inside such a value lies in the step's own folder; it is stored
relative to it and is absolute when a stage sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Feeds: TypeAlias = Mapping[str, Array]
"""Arrays by exact tensor name; never matched by position."""

Dim: TypeAlias = int | str
"""A fixed size, or the name of a dynamic axis."""


class Precision(StrEnum):
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"
    INT4 = "int4"


class Outcome(StrEnum):
    PASS = "pass"  # noqa: S105 - a verdict, not a password
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    DEFERRED = "deferred"
    """What could be checked here passed; the rest is left to ``verify`` on the target, as the recipe says."""


@dataclass(frozen=True, kw_only=True)
class DimRange:
    """Sizes that a dynamic axis may take; ``1 <= min <= opt <= max``."""

    min: int
    opt: int
    max: int

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a model. ``dtype`` is numpy's name of it (``"float32"``, ``"int64"``, ...)."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What running a model file once shows of it."""

    inputs: tuple[TensorSpec, ...]
    axes: Mapping[str, DimRange]
    metrics: tuple[str, ...]
    calibrated: bool
    """Whether the file defines ``calibration()``."""


@dataclass(frozen=True, kw_only=True)
class OnnxModel:
    """An ONNX file. ``sha256`` covers the file and its external data."""

    path: Path
    sha256: str
    precision: Precision
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: Mapping[str, DimRange]
    external_data: tuple[Path, ...] = ()
    probe: Path | None = None
    """An .npz with one real feed at the optimum of every axis, for checks after a graph was changed."""
    notes: tuple[str, ...] = ()
    """What a reader of the report should know: passes that declined, islands kept in FP32, ranges clamped."""

    @property
    def size_bytes(self) -> int:
        """Of the file and its external data."""
        return sum(file.stat().st_size for file in (self.path, *self.external_data))


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """Samples that may set ranges, and never judge. ``path`` is a folder that `compiler.data.Samples` reads."""

    path: Path
    samples: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """Samples that judge, and never set ranges. ``path`` is a folder that `compiler.data.Samples` reads."""

    path: Path
    samples: int
    sha256: str
    labelled: bool


@dataclass(frozen=True, kw_only=True)
class DataSets:
    calibration: CalibrationSet | None
    validation: ValidationSet
    selection: ValidationSet | None = None
    """Samples by which `search` chooses, which are in neither of the others."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What streaming the calibration set through a model left: see `compiler.quantize.observe`."""

    path: Path
    model_sha256: str
    data_sha256: str
    samples: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SearchPoint:
    """One mixture of precisions that a search tried. ``keep`` in the recipe's engine gives it again."""

    precision: Precision
    """FP32 where nothing was rounded."""
    keep: tuple[str, ...]
    kept_layers: int
    layers: int
    measured: Mapping[str, float]
    """By metric of the budget, on the selection samples."""
    sqnr_db: float | None
    """Of the worst float output, against FP32; None where nothing differs."""
    within: bool
    """Whether it keeps within the budget."""
    size_bytes: int
    speedup: Mapping[str, float] = field(default_factory=dict)
    """By batch size, as text: median over blocks of FP32's latency by this one's; empty where it was not timed."""
    p50_ms: Mapping[str, float] = field(default_factory=dict)
    on_front: bool = False
    """Whether no other point that was timed is better in one of error, latency and size, and no worse in the others."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a search for one engine found."""

    engine: str
    points: tuple[SearchPoint, ...]
    """In the order in which they were tried."""
    chosen: int
    """Index of the point that the engine is made of."""
    reason: str
    budget: tuple[str, ...]
    """Each limit in one line."""
    samples: int
    data_sha256: str
    seconds: float
    """Spent on measuring, over all runs of a search that was interrupted."""
    notes: tuple[str, ...] = ()

    @property
    def point(self) -> SearchPoint:
        return self.points[self.chosen]


@dataclass(frozen=True, kw_only=True)
class TensorError:
    """What quantisation does to one tensor; see `compiler.quantize.explain`. Names are those of the FP32 model."""

    name: str
    node: str
    """Name of the node that makes it; empty of an input of the model."""
    op: str
    """Operator that makes it, or ``input``."""
    layer: bool
    """Whether it is made with a rounded weight."""
    rounded: bool
    """Whether who reads it reads it rounded."""
    sqnr_db: float | None
    """In the quantised model against FP32, the errors of all before it included; None where nothing differs."""
    added_db: float | None
    """Of what is rounded here alone, on FP32's own values: its weight, and itself; None where that changes nothing."""
    share: float
    """Part of the noise in the model's outputs that is traced back to what is rounded here; 0 to 1."""
    weight_share: float
    """The part of ``share`` that its weight makes."""
    scale: float | None = None
    threshold: float | None = None
    """The largest magnitude that its scale represents."""
    peak: float | None = None
    """The largest magnitude on the calibration samples."""
    clipped: float = 0.0
    """Part of its values that lie above the threshold; 0 to 1."""
    clipped_by: float = 0.0
    """The largest of those, over the threshold: 2 for a value of twice the threshold."""
    reason: str = ""
    """What makes the error, in words."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A change of the recipe that would help."""

    change: str
    """In words."""
    lines: tuple[str, ...]
    """To paste into the recipe."""
    gain_db: float
    """Estimated rise of the SQNR of the model's outputs."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Where the error of a quantised engine comes from."""

    engine: str
    precision: Precision
    model_sha256: str
    """Of the quantised model."""
    outputs_db: Mapping[str, float | None]
    """SQNR of each float output against FP32; None where nothing differs."""
    tensors: tuple[TensorError, ...]
    """Those with the largest ``share`` first."""
    advice: tuple[Advice, ...]
    """Those with the largest gain first, a search last."""
    samples: int
    fresh: bool
    """Whether these samples set no range."""
    data_sha256: str
    notes: tuple[str, ...] = ()
    failure: str = ""
    """Why nothing could be measured; empty where it was."""


@dataclass(frozen=True, kw_only=True)
class Platform:
    """Where something was built or measured."""

    os: str
    arch: str
    cpu: str
    cores: int
    gpu: str | None
    compute_capability: str | None
    driver: str | None
    packages: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Departure:
    """A layer whose precision in the engine is not the one that its model asks for."""

    layer: str
    """Name of the ONNX node, or of the engine's layer where several nodes were fused."""
    op: str
    asked: str
    found: str
    cause: str


@dataclass(frozen=True, kw_only=True)
class PrecisionProof:
    """What an engine computes in, read back after the build; see `compiler.backends.tensorrt.precision`."""

    method: str
    """What was read, in words."""
    layers: int
    """Layers that multiply: convolutions and matrix products."""
    as_asked: int
    by_precision: Mapping[str, int]
    """Layers by what they compute in: ``int8``, ``fp16``, ...; ``fp16 x int4`` where only weights are quantised."""
    departures: tuple[Departure, ...] = ()
    weight_bytes: int | None = None
    """What the builder says the engine's weights take."""
    weight_bytes_alone: int | None = None
    """The same with one of several profiles alone, where all together took more: some weights are then stored per profile."""
    expected_weight_bytes: int | None = None
    """What the model's weights take in the types in which the model stores them."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A deployable file. ``sha256`` covers the file and its external data: what is scored is what ships."""

    name: str
    path: Path
    sha256: str
    size_bytes: int
    backend: str
    backend_reason: str
    precision: Precision
    model_sha256: str
    platform: Platform
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: Mapping[str, DimRange]
    build_s: float
    options: Mapping[str, str] = field(default_factory=dict)
    external_data: tuple[Path, ...] = ()
    profiles: tuple[Mapping[str, DimRange], ...] = ()
    """Optimisation profiles, each a range per dynamic axis; empty where the back end has none."""
    proof: PrecisionProof | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The outputs of the original model for every sample of a set, a `compiler.data.Samples` folder."""

    path: Path
    sha256: str
    data_sha256: str
    samples: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What engines are compared with: the original's outputs for the samples of `DataSets` that judge or select."""

    validation: Outputs
    selection: Outputs | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one engine, paired with the original's on the same samples.

    ``value`` and ``original`` are means over ``samples``; ``change = value - original`` in the metric's own units.
    For a binary metric (each sample right or wrong), ``lost`` samples were right and became wrong, ``gained`` the
    other way round; for a continuous one ``change_sd`` is the standard deviation (n - 1) of the paired differences.
    An agreement metric (cosine, SQNR, top-1 agreement) has no ``original``: it compares the two outputs directly, and
    ``value_sd`` is the standard deviation of the per-sample values.
    """

    metric: str
    value: float
    original: float | None
    change: float | None
    samples: int
    binary: bool
    higher_is_better: bool
    lost: int = 0
    gained: int = 0
    change_sd: float | None = None
    value_sd: float | None = None
    worst: tuple[int, ...] = ()
    """Validation indices of up to 20 samples that changed most for the worse."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """What was run in an engine's place, where the engine cannot run: another engine of the very same ONNX file."""

    backend: str
    engine_sha256: str
    model_sha256: str
    reason: str
    """Why the engine itself was not run."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    engine: str
    engine_sha256: str
    data_sha256: str
    scores: tuple[Score, ...]
    bad_samples: tuple[int, ...] = ()
    """Validation indices whose outputs hold NaN or Inf where the original's do not; any one fails the engine."""
    stand_in: StandIn | None = None
    """None: the engine itself was run."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds per call of one candidate at one batch size, in measured order.

    ``block_of[i]`` is the interleaved block in which ``samples_s[i]`` was taken.
    """

    candidate: str
    batch: int
    samples_s: tuple[float, ...]
    block_of: tuple[int, ...]
    engine_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """One interleaved run of the original and every engine."""

    latencies: tuple[Latency, ...]
    platform: Platform
    threads: int
    boundary: str
    """What one sample includes, in words."""
    started: str
    """ISO 8601, UTC."""
    load_before: float
    load_after: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A candidate's latencies at one batch size in a few numbers; None where there are too few samples for one."""

    candidate: str
    batch: int
    samples: int
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    per_s: float
    """Samples (not calls) per second at the median."""
    speedup: float | None = None
    """Median over blocks of (the original's p50 / this candidate's p50); the bounds are its 95 % bootstrap interval."""
    speedup_low: float | None = None
    speedup_high: float | None = None


@dataclass(frozen=True, kw_only=True)
class GateResult:
    engine: str
    metric: str = ""
    gate: str
    """The gate as the recipe states it, in one line."""
    outcome: Outcome
    measured: float | None
    low: float | None
    high: float | None
    reason: str
    samples_needed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    engine: str
    engine_sha256: str
    outcome: Outcome
    gates: tuple[GateResult, ...]


class Runner(Protocol):
    """A model that can be run. ``close`` frees what it holds."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Outputs by name. Raises `BuildError` where the feeds do not fit or the runtime fails."""

    def time(self, feeds: Feeds, repeats: int) -> list[float]:
        """Seconds of each of ``repeats`` synchronised calls, from host arrays to host arrays."""

    def close(self) -> None: ...


class OpenModel(Protocol):
    """Opens an ONNX file for running on this machine; how `export`, `optimize` and `quantize` run models.

    Between QuantizeLinear and DequantizeLinear it computes in float numbers, as the file says. ``optimize=False`` turns off
    every graph optimisation of the runtime. ``weights`` is the folder of the external data, where that is not the file's
    own; they are then read where they lie, memory-mapped, and not copied into faster layouts.
    """

    def __call__(
        self, path: Path, *, threads: int = 0, optimize: bool = True, weights: Path | None = None
    ) -> Runner: ...


Progress: TypeAlias = Callable[[int, int], None]
"""Called with (done, total) as long work goes on."""


def no_progress(done: int, total: int) -> None:
    """A `Progress` that nobody watches."""


def dtype_of(spec: TensorSpec) -> np.dtype[Any]:
    """The numpy dtype of a tensor, bfloat16 and float8 included (through ml_dtypes)."""
    try:
        return np.dtype(spec.dtype)
    except TypeError:
        import ml_dtypes

        extended: np.dtype[Any] = np.dtype(getattr(ml_dtypes, spec.dtype))
        return extended


def batch_axis(inputs: Sequence[TensorSpec]) -> str | None:
    """The dynamic axis along which samples are stacked: the first axis of the first input whose first axis is dynamic."""
    return next((spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], str)), None)
