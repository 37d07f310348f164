"""Measure engines and PyTorch on this machine's GPU, and name what could not be measured.

    scripts/gpu_report [RECIPE ...] --output results.json [--artifact dist/NAME ...] [--only rtx,recipes] [--limit-s 540]
    scripts/gpu_report --render results.json

In this order: does a TensorRT engine load and run here at all (``rtx``); what memory and arithmetic this card really
gives (``ceilings``); each recipe's original in eager PyTorch and `torch.compile`, in FP32, TF32, FP16 and BF16, with and
without CUDA graphs, and the engines of an artifact, interleaved (``recipes``); their joules per inference (``energy``).
What the machine lacks becomes ``{"missing": "<reason>"}`` in its place, and the rest goes on.

Why a child process for every part: native code crashes, hangs and poisons its CUDA context. A child that dies costs what
it was measuring; this process loads nothing but the standard library, and writes the file anew whenever a child reports.

Why cuDNN's benchmark mode, and eager and compiled PyTorch each in four precisions: an engine is to be compared with the
best that PyTorch does, not with its defaults.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import select
import shlex
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from compiler import durable  # noqa: E402
from compiler.errors import ArtifactError, BuildEngineError, RecipeError  # noqa: E402

SCHEMA = 1
PARTS = ("rtx", "ceilings", "recipes", "energy")
RECIPES = ("recipes/digits.toml", "recipes/minilm.toml", "recipes/resnet50.toml")
FLAVOURS = ("tensorrt_rtx", "tensorrt")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
"""What PyTorch is timed in: FP32 exact, FP32 with TF32 products, the whole model in half precision."""

DEVICE = "cuda"
LIMIT_S = 3600.0
PART_LIMIT_S = {"machine": 60.0, "rtx": 120.0, "ceilings": 180.0}
LEAST_S = 5.0
"""With less time left than this, nothing new is begun."""

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "triton": ("triton",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "cuda-bindings": ("cuda-bindings",),
    "nvidia-ml-py": ("nvidia-ml-py",),
    "numpy": ("numpy",),
    "onnx": ("onnx",),
    "msgspec": ("msgspec",),
    "tomli": ("tomli",),
    "transformers": ("transformers",),
}
"""What is looked for -> the distributions that bring it."""

NEEDED = ("numpy", "msgspec", "tomli", "torch", "onnx", "onnx_ir", "safetensors")
"""Without any of these no recipe can be measured; its model file may need more."""

Json: TypeAlias = dict[str, Any]
Emit: TypeAlias = Callable[[Json], None]


class MissingError(Exception):
    """Something cannot be measured here; the text says why."""


def reason(exc: BaseException, *, whole: bool = False) -> str:
    """Why something failed: this project's message, or the type and first line (``whole``: all lines) of another's."""
    text = str(exc).strip()
    if isinstance(exc, MissingError | BuildEngineError):
        return text
    told = text if whole else next(iter(text.splitlines()), "")
    return f"{type(exc).__name__}: {told}" if told else type(exc).__name__


def guarded(measure: Callable[[], Any]) -> Any:
    """What ``measure`` returns, or ``{"missing": reason}``."""
    try:
        return measure()
    except Exception as exc:
        return {"missing": reason(exc)}


def module(name: str) -> Any:
    """An installed module.

    Raises:
        MissingError: it cannot be imported, in its own words.
    """
    try:
        return importlib.import_module(name)
    except Exception as exc:
        raise MissingError(f"{name} cannot be imported: {reason(exc)}") from exc


class Deadline:
    """How much time is left."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s, self._clock = limit_s, clock
        self._end = clock() + limit_s

    def left(self) -> float:
        return self._end - self._clock()

    def part(self, share: float) -> Deadline:
        """A deadline after this share of the time that is left."""
        return Deadline(max(0.0, self.left()) * share, self._clock)


# --- NVML -----------------------------------------------------------------------------------------------------------

THROTTLE: Mapping[int, str] = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}
"""Bit -> why clocks are below their maximum. Source: nvml.h, nvmlClocksEventReason*."""


def throttle_reasons(bits: int) -> list[str]:
    """
    >>> throttle_reasons(0x44), throttle_reasons(0), throttle_reasons(0x10001)
    (['software power cap', 'hardware thermal'], [], ['idle', '0x10000'])
    """
    unknown = bits & ~sum(THROTTLE)
    return [name for bit, name in THROTTLE.items() if bits & bit] + ([hex(unknown)] if unknown else [])


def open_nvml(uuid: str | None) -> tuple[Any, Any]:
    """NVML, and its handle of the GPU with this UUID, or of the first one.

    Raises:
        MissingError: there is no NVML, or it does not know the GPU.
    """
    nvml = module("pynvml")
    try:
        nvml.nvmlInit()
        return nvml, nvml.nvmlDeviceGetHandleByUUID(uuid) if uuid else nvml.nvmlDeviceGetHandleByIndex(0)
    except Exception as exc:
        raise MissingError(f"NVML cannot be used: {reason(exc)}") from exc


def _power_w(nvml: Any, handle: Any) -> float:
    """Power now, where the driver has it; else NVML's own figure, which is an average over a second on newer cards."""
    with contextlib.suppress(Exception):
        (answer,) = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_POWER_INSTANT])
        if answer.nvmlReturn == 0 and answer.value.uiVal:
            return float(answer.value.uiVal) / 1e3
    return float(nvml.nvmlDeviceGetPowerUsage(handle)) / 1e3


def _throttle(nvml: Any, handle: Any) -> list[str]:
    ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
    return throttle_reasons(int((ask or nvml.nvmlDeviceGetCurrentClocksThrottleReasons)(handle)))


class Gauge:
    """Reads what NVML tells of one GPU while it works. What it does not tell is in ``missing``, and not asked again."""

    def __init__(self, nvml: Any, handle: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.missing: dict[str, str] = {}
        self._ask: dict[str, Callable[[], Any]] = {
            "energy_j": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
            "power_w": lambda: _power_w(nvml, handle),
            "temperature_c": lambda: int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "sm_mhz": lambda: int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "memory_mhz": lambda: int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            "throttle": lambda: _throttle(nvml, handle),
        }

    def read(self) -> Json:
        reading: Json = {"at_s": self._clock()}
        for name, ask in list(self._ask.items()):
            try:
                reading[name] = ask()
            except Exception as exc:
                self.missing[name] = reason(exc)
                del self._ask[name]
        return reading


def sample(read: Callable[[], Json], wait: Callable[[], bool]) -> list[Json]:
    """Readings, one at once and one after every wait, the last one when a wait says that it is over."""
    readings = [read()]
    while True:
        over = wait()
        readings.append(read())
        if over:
            return readings


@contextlib.contextmanager
def sampling(gauge: Gauge, every_s: float) -> Iterator[list[Json]]:
    """Readings taken by a thread while the body runs; the list is filled when it ends."""
    over, readings = threading.Event(), list[Json]()
    thread = threading.Thread(
        target=lambda: readings.extend(sample(gauge.read, lambda: over.wait(every_s))), daemon=True
    )
    thread.start()
    try:
        yield readings
    finally:
        over.set()
        thread.join()


def conditions(readings: Sequence[Json]) -> Json:
    """Least, median and greatest of every reading, and every throttle reason that was seen."""
    found: Json = {}
    for name in ("power_w", "temperature_c", "sm_mhz", "memory_mhz"):
        values = [reading[name] for reading in readings if name in reading]
        if values:
            found[name] = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    seen = dict.fromkeys(cause for reading in readings for cause in reading.get("throttle", ()))
    return found | {"throttle": list(seen), "readings": len(readings)}


# --- energy ---------------------------------------------------------------------------------------------------------

WINDOW_S = 2.5
SETTLE_S = 1.0
"""Work before a window: NVML averages power over up to a second."""
POLL_S = 0.02
CHUNK_S = 0.1
"""Calls between two looks at the clock take about this long, until power has settled."""
MIN_STEPS = 10
"""Changes of the energy counter within a window below which its slope is not trusted."""
PACE = (0.8, 1.5)
"""Time of a call in an energy window over its median when timed, outside of which a note says so: what lies between two
calls is in the first and not in the second."""
MAX_ERROR = 0.05
"""How far the ends of a window may be unsure, as a share of it."""


@dataclass(frozen=True, kw_only=True)
class Power:
    """Mean power over a window."""

    watts: float
    source: str
    error_share: float
    """How far the ends of the window are unsure, as a share of it."""


def counter_power(readings: Sequence[Json], start_s: float, end_s: float) -> Power:
    """Mean power by the energy counter, from its first change in the window to its last.

    Why not the difference between the window's ends: the counter moves in steps of up to 0.1 s; between two of its own
    steps only the polling interval is unsure.

    Raises:
        MissingError: there is no counter, or the window is too short for its steps.
    """
    seen = [(r["at_s"], r["energy_j"]) for r in readings if "energy_j" in r and start_s <= r["at_s"] <= end_s]
    if not seen:
        raise MissingError("the energy counter was not read")
    steps = [(at, joules, at - before) for (before, old), (at, joules) in itertools.pairwise(seen) if joules > old]
    if len(steps) < MIN_STEPS:
        raise MissingError(
            f"the window of {end_s - start_s:.2f} s is too short for the energy counter: it moved {len(steps)} times, "
            f"and {MIN_STEPS} are needed"
        )
    span_s = steps[-1][0] - steps[0][0]
    error = (steps[0][2] + steps[-1][2]) / span_s
    if error > MAX_ERROR:
        raise MissingError(
            f"the window of {end_s - start_s:.2f} s is too short for how often the energy counter was read: its ends "
            f"are unsure by {error:.0%}, and {MAX_ERROR:.0%} is allowed"
        )
    return Power(watts=(steps[-1][1] - steps[0][1]) / span_s, source="energy counter", error_share=error)


def sampled_power(readings: Sequence[Json], start_s: float, end_s: float) -> Power:
    """Mean power by the trapezoid rule over power readings; the ends are interpolated.

    Raises:
        MissingError: power was not read often enough, or not on both sides of the window.
    """
    seen = [(r["at_s"], r["power_w"]) for r in readings if "power_w" in r]
    inside = [(at, watts) for at, watts in seen if start_s < at < end_s]
    if len(inside) < MIN_STEPS:
        raise MissingError(
            f"the window of {end_s - start_s:.2f} s holds {len(inside)} readings of power, and {MIN_STEPS} are needed"
        )
    before = [one for one in seen if one[0] <= start_s] or inside[:1]
    after = [one for one in seen if one[0] >= end_s] or inside[-1:]
    points = [
        (start_s, _between(before[-1], inside[0], start_s)),
        *inside,
        (end_s, _between(inside[-1], after[0], end_s)),
    ]
    pairs = list(itertools.pairwise(points))
    joules = sum((late - early) * (low + high) / 2 for (early, low), (late, high) in pairs)
    widest = max(late - early for (early, _), (late, _) in pairs)
    return Power(watts=joules / (end_s - start_s), source="power readings", error_share=2 * widest / (end_s - start_s))


def _between(one: tuple[float, float], other: tuple[float, float], at: float) -> float:
    (x0, y0), (x1, y1) = one, other
    return y0 if x1 == x0 else y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def mean_power(readings: Sequence[Json], start_s: float, end_s: float) -> Power:
    """By the counter, else by readings of power.

    Raises:
        MissingError: by neither, with both reasons.
    """
    try:
        return counter_power(readings, start_s, end_s)
    except MissingError as by_counter:
        try:
            return sampled_power(readings, start_s, end_s)
        except MissingError as by_readings:
            raise MissingError(f"{by_counter}; {by_readings}") from by_readings


Sampling: TypeAlias = Callable[[Gauge, float], contextlib.AbstractContextManager[list[Json]]]


def measure_idle(
    gauge: Gauge,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.perf_counter,
    sampler: Sampling = sampling,
) -> Json:
    """Power with the CUDA context open and nothing to do.

    Raises:
        MissingError: see `mean_power`.
    """
    sleep(SETTLE_S)
    with sampler(gauge, POLL_S) as readings:
        start = clock()
        sleep(WINDOW_S)
        end = clock()
    power = mean_power(readings, start, end)
    return {
        "watts": power.watts,
        "source": power.source,
        "error_share": power.error_share,
        "conditions": conditions(readings),
    }


def measure_energy(
    call: Callable[[int], Sequence[float]],
    batch: int,
    gauge: Gauge,
    idle: Json,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sampler: Sampling = sampling,
) -> Json:
    """Joules per inference over a window of back-to-back calls.

    Args:
        call: runs a number of synchronised calls; returns seconds of each.
        batch: inferences in one call.
        gauge: see `Gauge`.
        idle: what `measure_idle` found, or why it is missing.
        clock: the same as the gauge's.
        sampler: see `sampling`.

    Raises:
        MissingError: see `mean_power`.
    """
    chunk, began = 1, clock()
    while clock() - began < SETTLE_S:
        before = clock()
        call(chunk)
        per_call_s = max((clock() - before) / chunk, 1e-6)
        chunk = max(1, math.ceil(CHUNK_S / per_call_s))
    # In one go, and a little more: a runner may do more than its calls each time that it is asked.
    many = max(1, math.ceil(1.1 * WINDOW_S / per_call_s))
    with sampler(gauge, POLL_S) as readings:
        start, calls, inside_s = clock(), 0, 0.0
        while clock() - start < WINDOW_S:
            inside_s += sum(call(many))
            calls += many
            many = max(1, math.ceil(CHUNK_S / per_call_s))
        end = clock()
    power = mean_power(readings, start, end)
    inferences = calls * batch
    joules = power.watts * (end - start) / inferences
    above: Any = {"missing": f"idle power: {idle.get('missing')}"}
    if "watts" in idle:
        above = (power.watts - idle["watts"]) * (end - start) / inferences
    return {
        "joules_per_inference": joules,
        "joules_per_inference_above_idle": above,
        "watts": power.watts,
        "source": power.source,
        "error_share": power.error_share,
        "ms_per_call": 1e3 * (end - start) / calls,
        "inside_calls_share": inside_s / (end - start),
        "window_s": end - start,
        "inferences": inferences,
        "conditions": conditions(readings),
    }


# --- roofline -------------------------------------------------------------------------------------------------------

PEAK_OF = {"int4": "fp16"}
"""Weight-only INT4 multiplies in FP16; every other precision has a ceiling of its own."""


def roofline(seconds: float, flops: int, moved_bytes: int, peak_flops: float, peak_bytes: float) -> Json:
    """What was achieved, and the share of the lower of two roofs.

    Source: Williams, Waterman, Patterson (2009), Roofline, CACM 52(4):65.

    Args:
        seconds: of one call.
        flops: multiplications and additions of one call.
        moved_bytes: what must be read and written at least: weights, inputs and outputs once.
        peak_flops: measured ceiling, per second.
        peak_bytes: measured ceiling, per second.

    >>> found = roofline(0.004, 4_000_000_000, 1_000_000_000, 100e12, 1e12)
    >>> found["gb_s"], found["tflops"], found["roof_ms"], found["fraction"], found["binds"]
    (250.0, 1.0, 1.0, 0.25, 'memory')
    """
    by_memory, by_arithmetic = moved_bytes / peak_bytes, flops / peak_flops
    roof_s = max(by_memory, by_arithmetic)
    return {
        "gb_s": moved_bytes / seconds / 1e9,
        "tflops": flops / seconds / 1e12,
        "flops_per_byte": flops / moved_bytes,
        "roof_ms": 1e3 * roof_s,
        "fraction": roof_s / seconds,
        "binds": "memory" if by_memory > by_arithmetic else "arithmetic",
    }


def add_rooflines(content: Json) -> None:
    """Put every candidate below the ceilings that were measured."""
    for recipe in content["recipes"] if isinstance(content["recipes"], list) else ():
        for batch in recipe["batches"]:
            for candidate in batch["candidates"]:
                candidate["roofline"] = guarded(
                    functools.partial(_roofline_of, candidate, batch["work"], content["ceilings"])
                )


def _roofline_of(candidate: Json, work: Json, ceilings: Json) -> Json:
    device = _present(candidate.get("device"), "time on the device")
    flops = _present(work, "work")["flops"]
    precision: str = candidate["precision"]
    precision = PEAK_OF.get(precision, precision)
    bandwidth = bandwidth_ceiling(_present(ceilings, "ceilings"))
    arithmetic = _present(
        _present(ceilings.get("matmul"), "ceilings of arithmetic").get(precision), f"{precision} ceiling"
    )
    moved = candidate.get("bytes")
    if not isinstance(moved, int):
        raise MissingError("the bytes that it moves are not known")
    found = roofline(device["median_ms"] / 1e3, flops, moved, arithmetic["tflops"] * 1e12, bandwidth * 1e9)
    cache = ceilings.get("l2_bytes")
    if isinstance(cache, int) and moved <= cache:
        found["note"] = "all that it moves fits into the L2 cache: the memory roof is too low for it"
    return found


def bandwidth_ceiling(ceilings: Json) -> float:
    """GB/s of device memory: the better of copying and reading.

    Raises:
        MissingError: neither was measured.
    """
    found = [ceilings[name]["gb_s"] for name in ("copy", "read") if "gb_s" in ceilings.get(name, {})]
    if not found:
        raise MissingError("memory bandwidth was not measured")
    return float(max(found))


def _present(value: Any, what: str) -> Json:
    if not isinstance(value, Mapping):
        raise MissingError(f"{what}: not measured")
    if "missing" in value:
        raise MissingError(f"{what}: {value['missing']}")
    return dict(value)


_UNCOUNTED = frozenset(
    (
        *("Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention", "Einsum", "LSTM", "GRU", "RNN"),
        *("MatMulNBits", "FusedConv", "FusedMatMul", "FusedGemm", "QGemm", "DeformConv", "If", "Loop", "Scan"),
    )
)
"""Operators that multiply, or hold graphs that do, and are named rather than counted."""


def count_flops(model: Any, sizes: Mapping[str, int]) -> Json:
    """Multiplications and additions of an ONNX model's convolutions and matrix products, at these sizes of its axes.

    Args:
        model: an `onnx.ModelProto`; it is not changed.
        sizes: axis name -> size.

    Returns:
        ``flops``, ``by_op``, and in ``uncounted`` how many nodes of which operators multiply and are not in it.

    Raises:
        MissingError: a shape cannot be inferred.
    """
    onnx = module("onnx")
    inliner, inference = module("onnx.inliner"), module("onnx.shape_inference")
    sized = inliner.inline_local_functions(model) if len(model.functions) else copy.deepcopy(model)
    for value in sized.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    del sized.graph.value_info[:]
    for value in sized.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = inference.infer_shapes(sized, data_prop=True).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            shapes[node.output[0]] = list(node.attribute[0].t.dims)
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = [dim.dim_value for dim in dims]
    by_op: dict[str, int] = {}
    uncounted: dict[str, int] = {}
    for node in graph.node:
        if node.op_type in _UNCOUNTED:
            uncounted[node.op_type] = uncounted.get(node.op_type, 0) + 1
        elif node.op_type in _PRODUCTS:
            count = 2 * _products(onnx, node, shapes)
            by_op[node.op_type] = by_op.get(node.op_type, 0) + count
    return {"flops": sum(by_op.values()), "by_op": by_op, "uncounted": uncounted}


_PRODUCTS: Mapping[str, int] = {
    "Conv": 1,
    "ConvInteger": 1,
    "QLinearConv": 3,
    "ConvTranspose": 1,
    "MatMul": 1,
    "MatMulInteger": 1,
    "QLinearMatMul": 3,
    "Gemm": 1,
}
"""Operator -> position of its second factor."""


def _products(onnx: Any, node: Any, shapes: Mapping[str, list[int]]) -> int:
    """How many products of two numbers a node takes."""

    def shape(name: str) -> list[int]:
        if name not in shapes:
            raise MissingError(f"node '{node.name}' ({node.op_type}): the shape of '{name}' is not known")
        return shapes[name]

    first, output = shape(node.input[0]), shape(node.output[0])
    if "Conv" in node.op_type:
        # [O, I / groups, k, ...]; of a transposed one [I, O / groups, k, ...], and every *input* element is multiplied.
        elements = math.prod(first if node.op_type == "ConvTranspose" else output)
        return elements * math.prod(shape(node.input[_PRODUCTS[node.op_type]])[1:])
    transposed = any(a.name == "transA" and onnx.helper.get_attribute_value(a) for a in node.attribute)
    return math.prod(output) * (first[-2] if transposed else first[-1])


# --- the machine ----------------------------------------------------------------------------------------------------


def versions() -> dict[str, Any]:
    """Version of every package that matters here, or that it is not installed."""
    found: dict[str, Any] = {}
    for name, distributions in PACKAGES.items():
        found[name] = {"missing": "not installed"}
        for distribution in distributions:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(distribution)
                break
    return found


def cuda_torch() -> Any:
    """torch, where it has a GPU.

    Raises:
        MissingError: it cannot be imported, or sees no GPU, and why.
    """
    torch = module("torch")
    if torch.cuda.is_available():
        return torch
    if torch.version.cuda is None:
        raise MissingError(f"torch {torch.__version__} is built without CUDA")
    try:
        torch.cuda.init()
    except Exception as exc:
        raise MissingError(f"torch {torch.__version__} sees no GPU: {reason(exc)}") from exc
    raise MissingError(f"torch {torch.__version__} sees no GPU")


def uuid_of(torch: Any) -> str | None:
    """NVML's name of the GPU that torch uses; None where torch does not tell."""
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    return None if uuid is None else f"GPU-{uuid}".replace("GPU-GPU-", "GPU-")


def machine_part(job: Json, emit: Emit) -> None:  # noqa: ARG001
    """GPU, driver and packages; nothing is changed on the card."""
    found: Json = {
        "os": f"{platform.system()} {platform.release()}",
        "arch": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": versions(),
    }
    emit(found)
    uuid: str | None = None
    try:
        torch = cuda_torch()
        uuid = uuid_of(torch)
        found["cuda"] = guarded(lambda: cuda_facts(torch))
    except MissingError as exc:
        found["cuda"] = {"missing": reason(exc)}
    emit(found)
    found["gpu"] = guarded(lambda: gpu_facts(*open_nvml(uuid)))
    emit(found)


def cuda_facts(torch: Any) -> Json:
    """What torch tells of the GPU."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": guarded(lambda: int(properties.L2_cache_size)),
        "cuda": torch.version.cuda,
        "cudnn": guarded(torch.backends.cudnn.version),
        "devices": torch.cuda.device_count(),
    }


def gpu_facts(nvml: Any, handle: Any) -> Json:
    """What the driver tells of the GPU, each fact on its own."""

    def text(value: Any) -> str:
        return value.decode() if isinstance(value, bytes) else str(value)

    def cuda_version() -> str:
        number = nvml.nvmlSystemGetCudaDriverVersion_v2()
        return f"{number // 1000}.{number % 1000 // 10}"

    questions: Mapping[str, Callable[[], Any]] = {
        "name": lambda: text(nvml.nvmlDeviceGetName(handle)),
        "compute_capability": lambda: "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        "driver": lambda: text(nvml.nvmlSystemGetDriverVersion()),
        "driver_cuda": cuda_version,
        "memory_bytes": lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        "memory_used_bytes": lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).used),
        "power_limit_w": lambda: nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1e3,
        "enforced_power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
        "max_sm_mhz": lambda: int(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
        "max_memory_mhz": lambda: int(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        "ecc": lambda: bool(nvml.nvmlDeviceGetEccMode(handle)[0]),
        "mig": lambda: bool(nvml.nvmlDeviceGetMigMode(handle)[0]),
        "persistence": lambda: bool(nvml.nvmlDeviceGetPersistenceMode(handle)),
        # Its own among them; in a container their numbers are another's, so that it cannot be told apart.
        "compute_processes": lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
    }
    found = {name: guarded(ask) for name, ask in questions.items()}
    gauge = Gauge(nvml, handle)
    now = gauge.read()
    del now["at_s"]
    return found | {"now": now | {name: {"missing": why} for name, why in gauge.missing.items()}}


# --- TensorRT, for RTX and proper -----------------------------------------------------------------------------------


def _field(number: int, value: int | bytes | str) -> bytes:
    """One field of a protobuf message: an integer, or bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    raw = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(raw)) + raw


def _varint(value: int) -> bytes:
    parts = []
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


TINY_ROWS, TINY_COLUMNS = 4, 16
TINY_WEIGHTS = [((7 * row + 3 * column) % 11 - 5) / 8 for row in range(16) for column in range(16)]
"""Eighths up to 5/8, as are the inputs: the products are exact in FP32 and in TF32."""


def tiny_model() -> bytes:
    """``y = relu(x @ w)`` as ONNX, ``x [4, 16]``, FP32, opset 20; written by hand, as onnx may not be installed.

    Source: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, for the field numbers.
    """

    def tensor(name: str, *shape: int) -> bytes:
        dims = b"".join(_field(1, _field(1, size)) for size in shape)
        return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, dims)))

    def node(op: str, inputs: Sequence[str], output: str) -> bytes:
        return b"".join(_field(1, name) for name in inputs) + _field(2, output) + _field(3, op.lower()) + _field(4, op)

    raw = struct.pack(f"<{len(TINY_WEIGHTS)}f", *TINY_WEIGHTS)
    weights = _field(1, TINY_COLUMNS) + _field(1, TINY_COLUMNS) + _field(2, 1) + _field(8, "w") + _field(9, raw)
    graph = b"".join(
        (
            _field(1, node("MatMul", ["x", "w"], "m")),
            _field(1, node("Relu", ["m"], "y")),
            _field(2, "tiny"),
            _field(5, weights),
            _field(11, tensor("x", TINY_ROWS, TINY_COLUMNS)),
            _field(12, tensor("y", TINY_ROWS, TINY_COLUMNS)),
        )
    )
    return _field(1, 9) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 20))


def tiny_answer() -> tuple[Any, Any]:
    """An input for `tiny_model`, and what numpy says comes out."""
    np = module("numpy")
    x = ((np.arange(TINY_ROWS * TINY_COLUMNS).reshape(TINY_ROWS, TINY_COLUMNS) * 5) % 9 - 4).astype(np.float32) / 8
    w = np.array(TINY_WEIGHTS, np.float32).reshape(TINY_COLUMNS, TINY_COLUMNS)
    return x, np.maximum(x @ w, 0)


class TorchMemory:
    """Device memory through torch."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._kept: list[Any] = []
        self.stream = int(torch.cuda.current_stream().cuda_stream)

    def upload(self, value: Any) -> int:
        self._kept.append(self._torch.from_numpy(value).to(DEVICE))
        return int(self._kept[-1].data_ptr())

    def download(self, pointer: int) -> Any:
        self._torch.cuda.synchronize()
        return next(tensor for tensor in self._kept if tensor.data_ptr() == pointer).cpu().numpy()


class CudaMemory:
    """Device memory through cuda.bindings."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._shapes: dict[int, tuple[tuple[int, ...], Any]] = {}
        self.stream = int(asked(runtime, "cudaStreamCreate"))

    def upload(self, value: Any) -> int:
        pointer = int(asked(self._runtime, "cudaMalloc", value.nbytes))
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        asked(self._runtime, "cudaMemcpy", pointer, value.ctypes.data, value.nbytes, kind)
        self._shapes[pointer] = value.shape, value.dtype
        return pointer

    def download(self, pointer: int) -> Any:
        asked(self._runtime, "cudaDeviceSynchronize")
        value = module("numpy").empty(*self._shapes[pointer])
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        asked(self._runtime, "cudaMemcpy", value.ctypes.data, pointer, value.nbytes, kind)
        return value


def asked(runtime: Any, name: str, *arguments: Any) -> Any:
    """What a function of the CUDA runtime returns after its status.

    Raises:
        MissingError: it failed, in the runtime's own words.
    """
    status, *values = getattr(runtime, name)(*arguments)
    if int(status):
        words = runtime.cudaGetErrorString(status)[1]
        raise MissingError(f"{name}: {words.decode() if isinstance(words, bytes) else words} ({int(status)})")
    return values[0] if len(values) == 1 else tuple(values)


def cuda_runtime() -> Any:
    """cuda.bindings' runtime, where there is a GPU.

    Raises:
        MissingError: it cannot be imported, or there is no GPU.
    """
    runtime = module("cuda.bindings.runtime")
    asked(runtime, "cudaMemGetInfo")
    return runtime


def open_memory() -> Any:
    """Device memory through torch or, without it, through cuda.bindings.

    Raises:
        MissingError: through neither, with both reasons.
    """
    try:
        return TorchMemory(cuda_torch())
    except MissingError as by_torch:
        try:
            return CudaMemory(cuda_runtime())
        except MissingError as by_bindings:
            raise MissingError(f"no device memory: {by_torch}; {by_bindings}") from by_bindings


def rtx_part(job: Json, emit: Emit) -> None:
    """Whether engines of one flavour of TensorRT are built, loaded and run here."""
    try_flavour(job["flavour"], emit)


def try_flavour(
    flavour: str,
    emit: Emit,
    *,
    load: Callable[[str], Any] = importlib.import_module,
    memory: Callable[[], Any] = open_memory,
) -> None:
    """Build a tiny engine, load it, run it, compare it with numpy.

    Every step that was begun is in ``steps``, so that a crash leaves its place; ``log`` holds the library's own lines
    word by word, the verbose ones from loading on.
    """
    found: Json = {"steps": [], "log": [], "worked": False}
    log: list[Json] = found["log"]
    state: dict[str, Any] = {"verbose": False}

    def step(name: str, run: Callable[[], Any]) -> Any:
        entry: Json = {"step": name, "error": "it ended the process"}
        found["steps"].append(entry)
        emit(found)
        began = time.perf_counter()
        try:
            result = run()
        except BaseException as exc:
            entry["error"] = reason(exc, whole=True)
            raise
        entry.pop("error")
        entry["seconds"] = time.perf_counter() - began
        return result

    try:
        trt = step("import", lambda: load(flavour))
        found["version"] = str(trt.__version__)
        logger = _logger(trt, log, state)
        plan = step("build", lambda: _build_tiny(trt, logger))
        found["plan_bytes"] = len(plan)
        state["verbose"] = True
        runtime = step("open the runtime", lambda: _made(trt.Runtime(logger), "Runtime() returned nothing"))
        engine = step(
            "load", lambda: _made(runtime.deserialize_cuda_engine(plan), "deserialize_cuda_engine() returned nothing")
        )
        context = step(
            "make a context",
            lambda: _made(engine.create_execution_context(), "create_execution_context() returned nothing"),
        )
        held = step("take device memory", memory)
        output = step("run", lambda: _run_tiny(context, held))
        found["max_abs_diff"] = step("compare", lambda: _compare_tiny(output))
        found["worked"] = True
    except Exception as exc:  # the step has it already
        errors = [line["text"] for line in log if "ERROR" in line["severity"]]
        found["missing"] = "; ".join([f"{found['steps'][-1]['step']}: {reason(exc, whole=True)}", *errors])
    emit(found)


def _logger(trt: Any, log: list[Json], state: Mapping[str, Any]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # known only when the library is
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            name = str(getattr(severity, "name", severity))
            if name != "VERBOSE" or state["verbose"]:
                log.append({"severity": name, "text": text})

    return Logger()


def _made(value: Any, otherwise: str) -> Any:
    if value is None:
        raise MissingError(f"{otherwise}")
    return value


def _build_tiny(trt: Any, logger: Any) -> bytes:
    builder = _made(trt.Builder(logger), "Builder() returned nothing")
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(tiny_model()):
        told = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise MissingError(f"the parser refused the model: {told}")
    config = builder.create_builder_config()
    return bytes(
        _made(builder.build_serialized_network(network, config), "build_serialized_network() returned nothing")
    )


def _run_tiny(context: Any, memory: Any) -> Any:
    x, expected = tiny_answer()
    addresses = {"x": memory.upload(x), "y": memory.upload(expected * 0 - 1)}
    for name, address in addresses.items():
        if not context.set_tensor_address(name, address):
            raise MissingError(f"set_tensor_address('{name}') returned False")
    if not context.execute_async_v3(memory.stream):
        raise MissingError("execute_async_v3() returned False")
    return memory.download(addresses["y"])


def _compare_tiny(output: Any) -> float:
    _, expected = tiny_answer()
    difference = float(abs(output - expected).max())
    if not difference <= 1e-5:
        raise MissingError(f"the outputs differ from numpy's by {difference:g}; at most 1e-05 was expected")
    return difference


def rtx_answer(flavours: Mapping[str, Json]) -> str:
    """One line a flavour: whether its engines run here."""
    lines = []
    for flavour, found in flavours.items():
        if found.get("worked"):
            lines.append(
                f"{flavour} {found['version']}: yes: an engine of {found['plan_bytes']} bytes was built, loaded and run, "
                f"and differs from numpy by {found['max_abs_diff']:g}"
            )
        else:
            version = f" {found['version']}" if "version" in found else ""
            lines.append(f"{flavour}{version}: no: {found.get('missing', 'it was not tried')}")
    return "\n".join(lines)


# --- ceilings -------------------------------------------------------------------------------------------------------

BUFFER_BYTES = 1 << 30
PINNED_BYTES = 256 << 20
MATMUL_SIZES = (4096, 8192)
MATMULS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")
CEILING_S = 0.5
"""Timed calls of one ceiling take about this long."""
CEILING_CALLS = (5, 50)


def set_precision(torch: Any, precision: str) -> None:
    """Let FP32 products use TF32, or not. By the older switches: torch.compile reads those, and a mix is refused."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def event_times(torch: Any, work: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` calls, by CUDA events on the current stream."""
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in marks]


def repeated(time_calls: Callable[[int], list[float]]) -> list[float]:
    """As many calls as fit into `CEILING_S`, after some to warm up."""
    time_calls(2)
    once = statistics.median(time_calls(3))
    fewest, most = CEILING_CALLS
    return time_calls(max(fewest, min(most, round(CEILING_S / max(once, 1e-9)))))


def rate(samples_s: Sequence[float], amount: float, unit: str) -> Json:
    """``amount`` per second in ``unit`` at the median call, with its bootstrap bounds; the samples are kept."""
    np = module("numpy")
    from compiler.validate.statistics import bootstrap_median

    low, high = bootstrap_median(np.array(samples_s, np.float64), 0.95)
    scale = {"gb_s": 1e9, "tflops": 1e12}[unit]
    return {
        unit: amount / statistics.median(samples_s) / scale,
        "low": amount / high / scale,
        "high": amount / low / scale,
        "samples_s": [round(value, 9) for value in samples_s],
    }


def ceilings_part(job: Json, emit: Emit) -> None:
    """Measured with torch where it has a GPU, else what cuda.bindings can do; see `torch_ceilings`."""
    deadline = Deadline(job["limit_s"])
    try:
        torch = cuda_torch()
    except MissingError as exc:
        memcpy_part(reason(exc), emit)
        return
    gauge = guarded(lambda: Gauge(*open_nvml(uuid_of(torch))))
    torch_ceilings(torch, gauge, deadline, emit)


def torch_ceilings(torch: Any, gauge: Any, deadline: Deadline, emit: Emit) -> None:
    """Device memory (copy, read), pinned copies, and square matrix products of random numbers in every type."""
    properties = torch.cuda.get_device_properties(0)
    found: Json = {
        "method": "CUDA events, median call; random data; matrix products through cuBLAS",
        "l2_bytes": guarded(lambda: int(properties.L2_cache_size)),
    }
    emit(found)
    buffer_bytes = min(BUFFER_BYTES, properties.total_memory // 8)
    work = {
        "copy": lambda: _copy(torch, buffer_bytes),
        "read": lambda: _read(torch, buffer_bytes),
        "h2d": lambda: _pinned(torch, PINNED_BYTES, to_device=True),
        "d2h": lambda: _pinned(torch, PINNED_BYTES, to_device=False),
    }
    for name, measure in work.items():
        found[name] = _ceiling(measure, gauge, deadline)
        emit(found)
    found["matmul"] = {}
    for precision in MATMULS:
        sizes = {
            str(size): _ceiling(functools.partial(_matmul, torch, precision, size), gauge, deadline)
            for size in MATMUL_SIZES
        }
        best = max((one for one in sizes.values() if "tflops" in one), key=lambda one: one["tflops"], default=None)
        top = {name: best[name] for name in ("tflops", "low", "high")} if best else next(iter(sizes.values()))
        found["matmul"][precision] = {**top, "sizes": sizes}
        emit(found)
    set_precision(torch, "fp32")


def _ceiling(measure: Callable[[], Json], gauge: Any, deadline: Deadline) -> Any:
    if deadline.left() < LEAST_S:
        return {"missing": f"the limit of {deadline.limit_s:.0f} s was reached before it began"}
    if not isinstance(gauge, Gauge):
        return guarded(measure)
    with sampling(gauge, 0.1) as readings:
        found = guarded(measure)
    return found | {"conditions": conditions(readings)}


def _copy(torch: Any, size: int) -> Json:
    source = torch.rand(size // 4, device=DEVICE)
    target = torch.empty_like(source)
    times = repeated(lambda repeats: event_times(torch, lambda: target.copy_(source), repeats))
    return rate(times, 2 * size, "gb_s") | {"bytes": 2 * size}


def _read(torch: Any, size: int) -> Json:
    source = torch.rand(size // 4, device=DEVICE)
    times = repeated(lambda repeats: event_times(torch, source.sum, repeats))
    return rate(times, size, "gb_s") | {"bytes": size}


def _pinned(torch: Any, size: int, *, to_device: bool) -> Json:
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target, source = (device, host) if to_device else (host, device)
    times = repeated(lambda repeats: event_times(torch, lambda: target.copy_(source, non_blocking=True), repeats))
    return rate(times, size, "gb_s") | {"bytes": size}


def _matmul(torch: Any, precision: str, size: int) -> Json:
    set_precision(torch, precision)
    work = _product(torch, precision, size)
    times = repeated(lambda repeats: event_times(torch, work, repeats))
    return rate(times, 2 * size**3, "tflops")


def _product(torch: Any, precision: str, size: int) -> Callable[[], Any]:
    """A square matrix product in one type. INT8 and FP8 take the second factor column by column, as cuBLAS wants it."""
    if precision == "int8":
        a, b = (torch.randint(-128, 128, (size, size), dtype=torch.int8, device=DEVICE) for _ in range(2))
        return lambda: torch._int_mm(a, b.t())
    if precision == "fp8":
        a, b = (torch.randn(size, size, device=DEVICE).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), dtype=torch.float32, device=DEVICE)
        return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    return lambda: a @ b


def memcpy_part(without_torch: str, emit: Emit) -> None:
    """Copies only, through cuda.bindings."""
    try:
        runtime = cuda_runtime()
    except MissingError as exc:
        emit({"missing": f"{without_torch}; {reason(exc)}"})
        return
    emit(memcpy_ceilings(runtime) | {"matmul": {"missing": without_torch}, "read": {"missing": without_torch}})


def memcpy_ceilings(runtime: Any) -> Json:
    """Copies within the device and between it and pinned memory."""
    kinds = runtime.cudaMemcpyKind
    free, _ = asked(runtime, "cudaMemGetInfo")
    size = min(PINNED_BYTES, free // 8)
    first, second = (int(asked(runtime, "cudaMalloc", size)) for _ in range(2))
    pinned = int(asked(runtime, "cudaMallocHost", size))
    asked(runtime, "cudaMemset", first, 1, size)
    copies = {
        "copy": (second, first, kinds.cudaMemcpyDeviceToDevice, 2 * size),
        "h2d": (first, pinned, kinds.cudaMemcpyHostToDevice, size),
        "d2h": (pinned, first, kinds.cudaMemcpyDeviceToHost, size),
    }
    found: Json = {"method": "cudaMemcpyAsync and CUDA events, median call"}
    for name, (target, source, kind, moved) in copies.items():
        time_calls = functools.partial(_memcpy_times, runtime, target, source, size, kind)
        found[name] = guarded(
            lambda time_calls=time_calls, moved=moved: rate(repeated(time_calls), moved, "gb_s")  # type: ignore[misc]
        )
    return found


def _memcpy_times(runtime: Any, target: int, source: int, size: int, kind: Any, repeats: int) -> list[float]:
    times = []
    start, end = asked(runtime, "cudaEventCreate"), asked(runtime, "cudaEventCreate")
    for _ in range(repeats):
        asked(runtime, "cudaEventRecord", start, 0)
        asked(runtime, "cudaMemcpyAsync", target, source, size, kind, 0)
        asked(runtime, "cudaEventRecord", end, 0)
        asked(runtime, "cudaEventSynchronize", end)
        times.append(asked(runtime, "cudaEventElapsedTime", start, end) / 1e3)
    return times


# --- candidates -----------------------------------------------------------------------------------------------------

BOUNDARIES: Mapping[str, str] = {
    "host": "one synchronised call, from arrays in host memory to arrays in host memory, copies and casts included",
    "device": "one call between two CUDA events, on a stream with nothing else on it, inputs and outputs in device memory; "
    "no copies, but the casts of half precision",
}
"""The same for PyTorch as for TensorRT's runner, `compiler.backends.tensorrt.run`."""
WARM_CALLS = 3
"""Untimed calls before those on the device, as that runner has them."""
BLOCKS = 20
BLOCK_MS = 10.0
"""Shorter than a build's: on a GPU calls are short, and every raw sample is kept."""
SAMPLES = 16
"""Samples that a batch is made from; repeated to fill a larger one."""
COMPILE_SHARE = 0.5
"""Of a batch size's time, what making candidates may take; `torch.compile` is left out beyond it."""
MEASURE_SHARE = 0.35
"""Of what is left then, what each boundary may take."""


@dataclass(kw_only=True)
class Candidate:
    """Something that can be timed. ``runner`` has ``run``, ``time`` and, for the device boundary, ``time_device``."""

    name: str
    how: str
    """``eager``, ``compile`` or the back end."""
    precision: str
    graph: bool
    runner: Any
    on_gpu: bool = True
    moved_bytes: Any = None
    sha256: str | None = None
    notes: list[str] = field(default_factory=list)

    def record(self) -> Json:
        return {
            "candidate": self.name,
            "how": self.how,
            "precision": self.precision,
            "graph": self.graph,
            "sha256": self.sha256,
            "bytes": self.moved_bytes,
            "notes": self.notes,
        }


class TorchRunner:
    """The original on the GPU at one set of shapes: host arrays in, host arrays out, as an engine's runner has it.

    Inputs lie in buffers of their own, with a CUDA graph and without, so that both copy the same.
    """

    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()

    def __init__(
        self,
        torch: Any,
        call: Callable[..., Any],
        feeds: Mapping[str, Any],
        names: Sequence[str],
        precision: str,
        graph: bool,
    ) -> None:
        self._torch, self._call, self._names, self._precision = torch, call, names, precision
        self._buffers = {name: torch.from_numpy(value).to(DEVICE) for name, value in feeds.items()}
        self._graph: Any = None
        self._held: Any = None
        if graph:
            self._capture()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        set_precision(self._torch, self._precision)
        return self._round_trip(feeds)

    def time(self, feeds: Mapping[str, Any], repeats: int) -> list[float]:
        set_precision(self._torch, self._precision)
        self._torch.cuda.synchronize()
        taken = []
        for _ in range(repeats):
            began = time.perf_counter()
            self._round_trip(feeds)
            taken.append(time.perf_counter() - began)
        return taken

    def time_device(self, feeds: Mapping[str, Any], repeats: int) -> list[float]:
        set_precision(self._torch, self._precision)
        self._fill(feeds)
        for _ in range(WARM_CALLS):
            self._launch()
        self._torch.cuda.synchronize()
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        taken = []
        for _ in range(repeats):
            start.record()
            self._launch()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        return taken

    def close(self) -> None:
        self._graph = self._held = None
        self._buffers = {}

    def _fill(self, feeds: Mapping[str, Any]) -> None:
        for name, buffer in self._buffers.items():
            buffer.copy_(self._torch.from_numpy(feeds[name]))

    def _launch(self) -> Any:
        if self._graph is not None:
            self._graph.replay()
            return self._held
        with self._torch.no_grad():
            return self._call(*self._buffers.values())

    def _round_trip(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self._fill(feeds)
        outputs = self._launch()
        return {name: value.cpu().numpy() for name, value in zip(self._names, outputs, strict=True)}

    def _capture(self) -> None:
        """Source: https://docs.pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs": a side stream warms up first."""
        cuda = self._torch.cuda
        set_precision(self._torch, self._precision)
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(3):
                self._launch()
        cuda.current_stream().wait_stream(side)
        graph = cuda.CUDAGraph()
        with self._torch.no_grad(), cuda.graph(graph):
            held = self._call(*self._buffers.values())
        self._graph, self._held = graph, held


class AtDevice:
    """A runner whose clock is its ``time_device``, for the schedule that asks for ``time``."""

    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def run(self, feeds: Mapping[str, Any]) -> Any:
        return self._runner.run(feeds)

    def time(self, feeds: Mapping[str, Any], repeats: int) -> list[float]:
        return list(self._runner.time_device(feeds, repeats))

    def close(self) -> None: ...


def dtype_for(torch: Any, precision: str) -> Any:
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)


def typed(torch: Any, model: Any, precision: str) -> Callable[..., Any]:
    """The model as a function whose floats go in and come out as FP32, whatever it computes in."""
    dtype = dtype_for(torch, precision)
    if dtype is torch.float32:
        return lambda *tensors: tuple(model(*tensors))

    def call(*tensors: Any) -> Any:
        inside = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
        return tuple(out.float() if out.dtype is dtype else out for out in model(*inside))

    return call


def name_of(how: str, precision: str, graph: bool) -> str:
    """A PyTorch candidate's name; that of the plainest is what the latency schedule calls the original.

    >>> name_of("eager", "fp32", False), name_of("compile", "fp16", True)
    ('eager', 'compile fp16, CUDA graph')
    """
    if (how, precision, graph) == ("eager", "fp32", False):
        return "eager"
    return f"{how} {precision}{', CUDA graph' if graph else ''}"


def torch_candidates(
    torch: Any,
    models: MutableMapping[str, Any],
    feeds: Mapping[str, Any],
    names: Sequence[str],
    work: Json,
    deadline: Deadline,
) -> Iterator[tuple[Candidate, str | None]]:
    """Every form of the original, eager ones first; with it why it cannot be run, or None.

    Args:
        torch: the module.
        models: by precision; ``"fp32"`` must be there, on the GPU, and the others are made from it when they are needed.
        feeds: of the shapes to run.
        names: of the outputs.
        work: see `torch_work`.
        deadline: beyond it nothing is compiled.
    """
    for how in ("eager", "compile"):
        for precision in PRECISIONS:
            call: Any = None
            for graph in (False, True):
                candidate = Candidate(
                    name=name_of(how, precision, graph), how=how, precision=precision, graph=graph, runner=None
                )
                if "float_elements" in work:
                    size = 2 if precision in ("fp16", "bf16") else 4
                    candidate.moved_bytes = work["float_elements"] * size + work["io_bytes"]
                try:
                    if how == "compile" and deadline.left() <= 0:
                        raise MissingError("no time was left to compile it")
                    if call is None:
                        call = _callable(torch, models, how, precision)
                    candidate.runner = TorchRunner(torch, call, feeds, names, precision, graph)
                    yield candidate, None
                except Exception as exc:
                    yield candidate, reason(exc)


def _callable(torch: Any, models: MutableMapping[str, Any], how: str, precision: str) -> Any:
    kind = precision if precision in ("fp16", "bf16") else "fp32"
    if kind not in models:
        models[kind] = copy.deepcopy(models["fp32"]).to(dtype_for(torch, kind))
    call = typed(torch, models[kind], precision)
    return torch.compile(call, dynamic=False) if how == "compile" else call


def torch_work(torch: Any, model: Any, feeds: Mapping[str, Any]) -> Json:
    """What one call of the FP32 model takes at least.

    Returns:
        ``flops``, counted by torch; ``float_elements``, of all parameters and buffers, but of an embedding only the
        rows that were looked up; ``io_bytes``, of inputs and outputs as the host sees them.
    """
    counter = module("torch.utils.flop_counter").FlopCounterMode(display=False)
    looked_up: dict[int, int] = {}

    def note(embedding: Any, arguments: Sequence[Any]) -> None:
        looked_up[id(embedding.weight)] = int(arguments[0].unique().numel()) * embedding.embedding_dim

    hooks = [part.register_forward_pre_hook(note) for part in model.modules() if isinstance(part, torch.nn.Embedding)]
    try:
        with torch.no_grad(), counter:
            outputs = model(*(torch.from_numpy(value).to(DEVICE) for value in feeds.values()))
    finally:
        for hook in hooks:
            hook.remove()
    whole: dict[int, int] = {}
    for part in model.modules():
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            if tensor.is_floating_point() and not (isinstance(part, torch.nn.Embedding) and id(tensor) in looked_up):
                whole[id(tensor)] = tensor.numel()
    return {
        "flops": int(counter.get_total_flops()),
        "flops_source": "torch.utils.flop_counter",
        "float_elements": sum((looked_up | whole).values()),
        "io_bytes": sum(value.nbytes for value in feeds.values())
        + sum(out.numel() * out.element_size() for out in outputs),
    }


def engine_candidates(manifests: Sequence[Any], work: Json) -> Iterator[tuple[Candidate, str | None]]:
    """The engines of artifacts, opened; with each why it cannot be, or None."""
    from compiler import backends

    for engine in itertools.chain.from_iterable(manifest.engines for manifest in manifests):
        provider = engine.options.get("provider", "")
        candidate = Candidate(
            name=engine.name,
            how=f"{engine.backend}, {provider}" if provider else engine.backend,
            on_gpu=provider != "CPUExecutionProvider",
            precision=engine.precision.value,
            graph=False,
            runner=None,
            sha256=engine.sha256,
        )
        weights = engine.proof and (engine.proof.weight_bytes or engine.proof.expected_weight_bytes)
        if not weights:
            weights = engine.size_bytes
            candidate.notes.append("bytes: the size of its file stands for its weights")
        if "io_bytes" in work:
            candidate.moved_bytes = weights + work["io_bytes"]
        try:
            candidate.runner = backends.get(engine.backend).open(engine, threads=0)
            refusal = None
        except Exception as exc:
            refusal = reason(exc)
        yield candidate, refusal


def in_order(
    of_torch: Iterator[tuple[Candidate, str | None]], of_engines: Iterable[tuple[Candidate, str | None]]
) -> Iterator[tuple[Candidate, str | None]]:
    """Eager PyTorch, then engines, then what has to be compiled: what is quick to make comes first."""
    first_compiled = []
    for one in of_torch:
        if one[0].how == "compile":
            first_compiled = [one]
            break
        yield one
    yield from of_engines
    yield from first_compiled
    yield from of_torch


# --- a batch size ---------------------------------------------------------------------------------------------------


def measure_batch(
    found: Json,
    candidates: Iterable[tuple[Candidate, str | None]],
    feeds: Mapping[str, Any],
    *,
    gauge: Any,
    energy: bool,
    deadline: Deadline,
    emit: Callable[[], None],
) -> None:
    """Fill ``found`` with every candidate's difference from the original, both boundaries' latencies, and energy.

    Args:
        found: ``{"batch", "work"}``; ``candidates``, ``samples`` and ``idle`` are added.
        candidates: opened one after the other; the first must be eager PyTorch in FP32, the reference.
        feeds: arrays by name.
        gauge: a `Gauge`, or why there is none.
        energy: whether it was asked for.
        deadline: for all of this.
        emit: called whenever ``found`` has more in it.
    """
    ready: list[tuple[Candidate, Json]] = []
    found["candidates"], found["samples"] = [], {}
    reference: Any = None
    for candidate, refusal in candidates:
        entry = candidate.record()
        found["candidates"].append(entry)
        try:
            if refusal is not None:
                raise MissingError(refusal)
            outputs = candidate.runner.run(feeds)
            entry["difference"] = difference(outputs, reference) if reference is not None else None
            if reference is None:
                if candidate.name != "eager":
                    raise MissingError("the original in eager FP32, to compare with, does not run")
                reference = outputs
            ready.append((candidate, entry))
        except Exception as exc:
            entry["missing"] = reason(exc)
        emit()
    if reference is None:
        return
    for boundary in BOUNDARIES:
        timed = {
            candidate.name: candidate.runner if boundary == "host" else AtDevice(candidate.runner)
            for candidate, _ in ready
            if boundary == "host" or hasattr(candidate.runner, "time_device")
        }
        share = deadline.part(MEASURE_SHARE)
        taken = guarded(functools.partial(_latencies, found["batch"], timed, feeds, gauge, share))
        _enter(found, boundary, taken, ready)
        emit()
    _measure_energies(found, feeds, ready, gauge=gauge, wanted=energy, deadline=deadline, emit=emit)
    for candidate, _ in ready:
        with contextlib.suppress(Exception):
            candidate.runner.close()


def difference(outputs: Mapping[str, Any], reference: Mapping[str, Any]) -> Json:
    """How far outputs are from the reference's: the worst sample's cosine, and the largest absolute difference.

    Raises:
        MissingError: they hold NaN or Inf, or are other outputs.
    """
    np = module("numpy")
    if outputs.keys() != reference.keys():
        raise MissingError(f"its outputs are {', '.join(outputs)}; {', '.join(reference)} were expected")
    floats = [name for name, value in reference.items() if value.dtype.kind == "f"]
    cosine, largest = 1.0, 0.0
    for name in floats:
        new, old = outputs[name].astype(np.float64), reference[name].astype(np.float64)
        if not np.isfinite(new).all():
            raise MissingError(f"its output '{name}' holds NaN or Inf")
        if new.shape != old.shape:
            raise MissingError(f"its output '{name}' is {list(new.shape)}; {list(old.shape)} was expected")
        rows, others = (np.atleast_1d(value).reshape(max(1, len(np.atleast_1d(value))), -1) for value in (new, old))
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
        cosines = np.where(lengths > 0, (rows * others).sum(axis=1) / np.where(lengths > 0, lengths, 1), 0.0)
        cosine, largest = min(cosine, float(cosines.min())), max(largest, float(abs(new - old).max()))
    return {"cosine": cosine, "max_abs_diff": largest}


def _latencies(batch: int, timed: Mapping[str, Any], feeds: Mapping[str, Any], gauge: Any, deadline: Deadline) -> Json:
    from compiler.recipe import LatencySection
    from compiler.spec import Platform
    from compiler.validate import latency

    if deadline.left() < LEAST_S * MEASURE_SHARE:
        raise MissingError("the limit was reached before it began")
    # Recorded nowhere: the machine has a part of its own.
    here = Platform(os="", arch="", cpu="", cores=0, gpu=None, compute_capability=None, driver=None, packages={})
    nobody: contextlib.AbstractContextManager[list[Json]] = contextlib.nullcontext([])
    watched = sampling(gauge, 0.5) if isinstance(gauge, Gauge) else nobody
    with watched as readings:
        taken = latency.measure(
            LatencySection(blocks=BLOCKS, block_ms=BLOCK_MS, limit_s=max(1.0, deadline.left())),
            timed,
            lambda _: feeds,
            [batch],
            engine_sha256={},
            platform=here,
            threads=0,
            undecided=lambda _: False,
        )
    seen = conditions(readings) if isinstance(gauge, Gauge) else gauge
    return {"latencies": taken.latencies, "notes": list(taken.notes), "conditions": seen}


def _enter(found: Json, boundary: str, taken: Json, ready: Sequence[tuple[Candidate, Json]]) -> None:
    """Put what one boundary's run found where it belongs."""
    if "missing" in taken:
        for _, entry in ready:
            entry[boundary] = {"missing": taken["missing"]}
        return
    from compiler.validate import estimates

    batch, latencies = found["batch"], taken["latencies"]
    best = fastest_torch([candidate for candidate, _ in ready], latencies)
    noise = estimates.noise(latencies, batch)
    found["samples"][boundary] = {
        "boundary": BOUNDARIES[boundary],
        "conditions": taken["conditions"],
        "notes": taken["notes"],
        "control": None if noise is None else {"ratio_width": math.expm1(noise)},
        "fastest_torch": None if best is None else best.candidate,
        "latencies": [
            {"candidate": one.candidate, "samples_s": list(one.samples_s), "block_of": list(one.block_of)}
            for one in latencies
        ],
    }
    original = estimates.find(latencies, "eager", batch)
    for candidate, entry in ready:
        own = estimates.find(latencies, candidate.name, batch)
        if own is None:
            entry[boundary] = {"missing": f"{candidate.how}: its runner has no time_device"}
        else:
            entry[boundary] = speed(own, original, best if candidate.how not in ("eager", "compile") else None)


def fastest_torch(candidates: Sequence[Candidate], latencies: Sequence[Any]) -> Any:
    """The latencies of PyTorch's fastest form, in whatever precision; None without one."""
    forms = {candidate.name for candidate in candidates if candidate.how in ("eager", "compile")}
    return min(
        (one for one in latencies if one.candidate in forms),
        key=lambda one: statistics.median(one.samples_s),
        default=None,
    )


def speed(own: Any, original: Any, best: Any) -> Json:
    """A candidate's latencies in a few numbers; ``best`` is what an engine has to beat."""
    from compiler.validate import estimates

    median = estimates.median_ms(own)
    found: Json = {
        "median_ms": median.value,
        "low_ms": median.low,
        "high_ms": median.high,
        "calls": len(own.samples_s),
        "per_s": own.batch / median.value * 1e3,
    }
    for name, other in (("speedup", original), ("over_torch", best)):
        if other is not None:
            ratio = estimates.speedup(other, own)
            found[name] = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
    return found


def _measure_energies(
    found: Json,
    feeds: Mapping[str, Any],
    ready: Sequence[tuple[Candidate, Json]],
    *,
    gauge: Any,
    wanted: bool,
    deadline: Deadline,
    emit: Callable[[], None],
) -> None:
    refusal = None if isinstance(gauge, Gauge) else gauge["missing"]
    if not wanted:
        refusal = "not asked for (--only)"

    def too_late() -> str | None:
        return "the limit was reached before it began" if deadline.left() < SETTLE_S + WINDOW_S else None

    refusal = refusal or too_late()
    if refusal is None:
        found["idle"] = guarded(lambda: measure_idle(gauge))
    for candidate, entry in ready:
        clock = getattr(candidate.runner, "time_device", candidate.runner.time)
        refusal = refusal or too_late()
        why = refusal if candidate.on_gpu else "it runs on the CPU, and only the GPU's energy is measured"
        if why is not None:
            entry["energy"] = {"missing": why}
            continue
        call = functools.partial(clock, feeds)
        entry["energy"] = guarded(functools.partial(measure_energy, call, found["batch"], gauge, found["idle"]))
        _note_other_pace(candidate, entry)
        emit()


def _note_other_pace(candidate: Candidate, entry: Json) -> None:
    """Say where a candidate ran at another pace while its energy was measured than while it was timed."""
    timed = entry["device"] if "median_ms" in entry.get("device", {}) else entry.get("host", {})
    if "ms_per_call" in entry["energy"] and "median_ms" in timed:
        then, before = entry["energy"]["ms_per_call"], timed["median_ms"]
        if not PACE[0] <= then / before <= PACE[1]:
            candidate.notes.append(
                f"energy: a call took {then:.3g} ms while it was measured, and {before:.3g} ms before"
            )


# --- a recipe -------------------------------------------------------------------------------------------------------


def recipe_part(job: Json, emit: Emit) -> None:
    """One recipe, at every batch size it names."""
    path = Path(job["recipe"])
    entry: Json = {"recipe": path.name, "name": path.stem, "batches": []}
    deadline = Deadline(job["limit_s"])
    try:
        _measure_recipe(path, job, entry, deadline, lambda: emit(entry))
    except Exception as exc:
        why = reason(exc)
        for part in ("latency", "energy", "roofline"):
            entry[part] = {"missing": why}
    emit(entry)


def _measure_recipe(path: Path, job: Json, entry: Json, deadline: Deadline, emit: Callable[[], None]) -> None:
    check_installed(NEEDED)
    from compiler import recipe as recipes
    from compiler import source

    recipe = recipes.load(path)
    entry["name"] = recipe.name
    torch = cuda_torch()
    gauge = guarded(lambda: Gauge(*open_nvml(uuid_of(torch))))
    manifests = manifests_of(recipe.name, job["artifacts"], entry)
    sources = source.locate(recipe, path.parent)
    model, names = original_of(recipe, sources)
    samples = module("compiler.data").first_samples(recipe, sources, SAMPLES)
    torch.backends.cudnn.benchmark = True
    models = {"fp32": model.to(DEVICE)}
    batches = recipe.batches
    for position, batch in enumerate(batches):
        dynamo = module("torch._dynamo")
        dynamo.reset()
        if hasattr(dynamo.config, "fail_on_recompile_limit_hit"):  # else what is called compiled may run eagerly
            dynamo.config.fail_on_recompile_limit_hit = True
        found: Json = {"batch": batch, "work": {"missing": "not counted"}, "candidates": []}
        entry["batches"].append(found)
        share = deadline.part(1 / (len(batches) - position))
        try:
            feeds = feeds_at(recipe, samples, batch)
            found["work"] = guarded(lambda feeds=feeds: torch_work(torch, models["fp32"], feeds))  # type: ignore[misc]
            if counted := _onnx_work(recipe, manifests, batch):
                by_torch = {name: value for name, value in found["work"].items() if name != "missing"}
                found["work"] = by_torch | {"torch_flops": by_torch.get("flops")} | counted
            work = found["work"]
            candidates = in_order(
                torch_candidates(torch, models, feeds, names, work, share.part(COMPILE_SHARE)),
                engine_candidates(manifests, work),
            )
            measure_batch(found, candidates, feeds, gauge=gauge, energy=job["energy"], deadline=share, emit=emit)
        except Exception as exc:
            found["missing"] = reason(exc)
        emit()


def check_installed(names: Sequence[str]) -> None:
    """
    Raises:
        MissingError: naming every package that is not installed.
    """
    if lacking := [name for name in names if importlib.util.find_spec(name) is None]:
        raise MissingError(f"not installed, and needed for a recipe: {', '.join(lacking)}")


def manifests_of(recipe_name: str, artifacts: Sequence[str], entry: Json) -> list[Any]:
    """The manifests of those artifacts that are this recipe's and undamaged; why there is none goes into ``entry``."""
    from compiler import artifact

    found = []
    entry["engines"] = {"missing": "no artifact of this recipe was given (--artifact)"}
    for folder in artifacts:
        try:
            manifest = artifact.verify(Path(folder))
        except BuildEngineError as exc:
            entry["engines"] = {"missing": reason(exc)}
            continue
        if manifest.name == recipe_name:
            found.append(manifest)
    if found:
        entry["engines"] = {engine.name: engine.sha256 for manifest in found for engine in manifest.engines}
    return found


def original_of(recipe: Any, sources: Any) -> tuple[Any, tuple[str, ...]]:
    """The original as a module that takes and gives flat tensors, on the CPU, and the names of its outputs.

    Raises:
        MissingError: an ONNX file has no PyTorch original.
        ExportError: it cannot be built.
    """
    export, runtime = module("compiler.export"), module("compiler.backends.onnxruntime")
    runner = export.open_original(recipe, sources, compiled=False, threads=0, open_model=runtime.open_model)
    model = getattr(runner, "original", None)
    if model is None:
        raise MissingError("an ONNX source has no PyTorch original to time")
    return model, tuple(spec.name for spec in runner.outputs)


def feeds_at(recipe: Any, samples: Sequence[Mapping[str, Any]], batch: int) -> dict[str, Any]:
    """Real samples, repeated to fill a batch; arrays are writable and in C order."""
    np = module("numpy")
    from compiler.spec import batch_axis

    axis = batch_axis(recipe.inputs)
    feeds = {}
    for spec in recipe.inputs:
        value = samples[0][spec.name]
        if axis is not None and axis in spec.shape:
            chosen = [samples[index % len(samples)][spec.name] for index in range(batch)]
            value = np.concatenate(chosen, axis=spec.shape.index(axis))
        feeds[spec.name] = np.array(value, order="C")
    return feeds


def _onnx_work(recipe: Any, manifests: Sequence[Any], batch: int) -> Json:
    """The count from an ONNX engine of an artifact, where there is one that says all; it wins over torch's."""
    from compiler.spec import batch_axis

    sizes = {name: axis.opt for name, axis in recipe.axes.items()}
    sizes[batch_axis(recipe.inputs) or ""] = batch
    for engine in itertools.chain.from_iterable(manifest.engines for manifest in manifests):
        if engine.path.suffix == ".onnx":
            load = functools.partial(module("onnx").load, engine.path, load_external_data=False)
            counted = guarded(lambda load=load: count_flops(load(), sizes))  # type: ignore[misc]
            if "flops" in counted and not counted["uncounted"]:
                return {"flops_source": f"ONNX shapes of engine {engine.name}", **counted}
    return {}


# --- children -------------------------------------------------------------------------------------------------------

CHILDREN: Mapping[str, Callable[[Json, Emit], None]] = {
    "machine": machine_part,
    "rtx": rtx_part,
    "ceilings": ceilings_part,
    "recipe": recipe_part,
}
LAST_LINES = 15


def child_main(job: Json, descriptor: int) -> int:
    """Measure one part; every report goes down the pipe as a line of JSON."""
    with os.fdopen(descriptor, "w") as pipe:

        def emit(value: Json) -> None:
            pipe.write(json.dumps({"value": finite(value)}) + "\n")
            pipe.flush()

        CHILDREN[job["part"]](job, emit)
        pipe.write('{"done": true}\n')
        pipe.flush()
    return 0


def finite(value: Any) -> Any:
    """The same with every NaN and Inf replaced, as JSON has none.

    >>> finite({"a": [1.5, float("nan")]})
    {'a': [1.5, {'missing': 'not a number: nan'}]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"missing": f"not a number: {value}"}
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def run_child(job: Json, limit_s: float, on_value: Emit, *, command: Sequence[str] | None = None) -> str | None:
    """Measure one part in a process of its own; None, or why it did not come to its end.

    What the process and its libraries print is kept only where it dies, its last lines in the reason.
    """
    if limit_s < LEAST_S:
        return "the limit of the run was reached before it began"
    reader, writer = os.pipe()
    job = job | {"limit_s": limit_s * 0.95}
    command = command or [sys.executable, str(Path(__file__).resolve())]
    done, late = False, False
    with tempfile.TemporaryFile() as printed:
        child = subprocess.Popen(
            [*command, "--child", json.dumps(job), "--pipe", str(writer)],
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            pass_fds=[writer],
            cwd=ROOT,
        )
        os.close(writer)
        try:
            for line in _lines(reader, child, time.monotonic() + limit_s):
                report = json.loads(line)
                done = done or "done" in report
                if "value" in report:
                    on_value(report["value"])
        except TimeoutError:
            late = True
        finally:
            os.close(reader)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0 if late else 5)
            if child.poll() is None:
                _end(child)
        if done:
            return None
        if late:
            return f"stopped at its limit of {limit_s:.0f} s"
        printed.seek(0)
        words = printed.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:]
        return f"its process ended with {_ending(child.returncode)}" + (": " + " | ".join(words) if words else "")


def _lines(reader: int, child: subprocess.Popen[bytes], end: float) -> Iterator[bytes]:
    """What the child writes until it ends; a grandchild may hold the pipe open for longer.

    Raises:
        TimeoutError: at ``end``, by the monotonic clock.
    """
    rest = b""
    while True:
        ended = child.poll() is not None
        left = end - time.monotonic()
        if select.select([reader], [], [], 0 if ended else max(0.0, min(0.5, left)))[0]:
            chunk = os.read(reader, 1 << 20)
            if not chunk:
                return
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
        elif ended:
            return
        elif left <= 0:
            raise TimeoutError


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _ending(code: int) -> str:
    """
    >>> _ending(3), _ending(-11)
    ('exit code 3', 'SIGSEGV')
    """
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


# --- the report -----------------------------------------------------------------------------------------------------


def missing_of(content: Any, path: tuple[str, ...] = ()) -> Iterator[Json]:
    """Every ``{"missing": reason}`` below a value, with where it stands.

    >>> list(missing_of({"a": {"missing": "no"}, "b": [{"name": "x", "c": {"missing": "none"}}]}))
    [{'part': 'a', 'reason': 'no'}, {'part': 'b / x / c', 'reason': 'none'}]
    """
    if isinstance(content, Mapping):
        if isinstance(content.get("missing"), str):
            yield {"part": " / ".join(path), "reason": content["missing"]}
        for name, value in content.items():
            if name not in ("samples_s", "block_of"):
                yield from missing_of(value, path if name in ("batches", "candidates") else (*path, str(name)))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            if isinstance(value, Mapping):
                label = (
                    value.get("name")
                    or value.get("candidate")
                    or (f"batch {value['batch']}" if "batch" in value else index)
                )
                yield from missing_of(value, (*path, str(label)))


class Report:
    """The results so far, and their file."""

    def __init__(self, path: Path, command: str) -> None:
        self._path = path
        self.content: Json = {
            "schema": SCHEMA,
            "started": _now(),
            "finished": None,
            "command": command,
            "machine": {"missing": "not reached"},
            "rtx": {"missing": "not reached"},
            "ceilings": {"missing": "not reached"},
            "recipes": [],
            "missing": [],
        }

    def take(self, earlier: Json) -> None:
        """Start with the parts of an earlier result; those measured now replace them."""
        for part in ("machine", "rtx", "ceilings", "recipes"):
            self.content[part] = earlier[part]

    def save(self) -> None:
        """Write what there is, whole: a run that is killed leaves the parts done so far.

        Raises:
            ArtifactError: the file cannot be written.
        """
        add_rooflines(self.content)
        parts = {name: self.content[name] for name in ("machine", "rtx", "ceilings", "recipes")}
        self.content["missing"] = list(missing_of(parts))
        data = json.dumps(finite(self.content), indent=1).encode() + b"\n"
        with durable.translating(self._path):
            durable.write_whole(self._path, data, aside=self._path.with_name(self._path.name + ".part"))

    def set(self, part: str, value: Any) -> None:
        self.content[part] = value
        self.save()

    def set_recipe(self, value: Json) -> None:
        """Add a recipe's results, or replace those of the same name."""
        recipes: list[Json] = self.content["recipes"]
        place = next((index for index, one in enumerate(recipes) if one["name"] == value["name"]), len(recipes))
        recipes[place : place + 1] = [value]
        self.save()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_result(path: Path) -> Json:
    """A results file.

    Raises:
        ArtifactError: it is none.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as exc:
        raise ArtifactError(f"{path}: cannot be read: {exc.strerror}. Give a file that this command wrote.") from exc
    except ValueError as exc:
        raise ArtifactError(f"{path}: not JSON; a result of gpu_report was expected. Measure again.") from exc
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or "ceilings" not in content:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ArtifactError(f"{path}: found schema {found}; {SCHEMA} was expected. Measure again with this version.")
    return content


def measure(arguments: argparse.Namespace, report: Report, child: Callable[..., str | None] = run_child) -> None:
    """Every part that was asked for, one after the other; ``report`` is saved after each.

    Raises:
        ArtifactError: the file cannot be written, or the earlier result is another machine's.
    """
    deadline = Deadline(arguments.limit_s)
    content, asked_for = report.content, arguments.only
    earlier = read_result(arguments.earlier) if arguments.earlier else None
    part(report, child, "machine", {}, min(PART_LIMIT_S["machine"], deadline.left()))
    if earlier is not None:
        before, now = gpu_name(earlier["machine"]), gpu_name(content["machine"])
        if before != now:
            raise ArtifactError(
                f"{arguments.earlier}: measured on {before or 'no GPU'}; {now or 'no GPU'} was expected, which is here. "
                "Results of two machines do not mix."
            )
        report.take(earlier | {"machine": content["machine"]})
    if "rtx" in asked_for:
        rtx: Json = {"answer": "", **{flavour: {"missing": "not reached"} for flavour in FLAVOURS}}
        for flavour in FLAVOURS:
            found: Json = {"missing": "not reached"}

            def take(value: Json) -> None:
                nonlocal found
                found = value

            why = child({"part": "rtx", "flavour": flavour}, min(PART_LIMIT_S["rtx"], deadline.left()), take)
            if why is not None:
                at = found["steps"][-1]["step"] + ": " if found.get("steps") else ""
                found = found | {"missing": at + why}
            rtx[flavour] = found
            rtx["answer"] = rtx_answer({one: rtx[one] for one in FLAVOURS})
            report.set("rtx", rtx)
        say(rtx["answer"])
    elif earlier is None:
        report.set("rtx", {"missing": "not asked for (--only)"})
    if "ceilings" in asked_for:
        part(report, child, "ceilings", {}, min(PART_LIMIT_S["ceilings"], deadline.left()))
    elif earlier is None:
        report.set("ceilings", {"missing": "not asked for (--only)"})
    if "recipes" in asked_for:
        for position, path in enumerate(arguments.recipes):
            job = {
                "part": "recipe",
                "recipe": str(path.resolve()),
                "artifacts": [str(folder.resolve()) for folder in arguments.artifact],
                "energy": "energy" in asked_for,
            }
            kept: Json = {"recipe": path.name, "name": path.stem, "batches": []}

            def keep(value: Json) -> None:
                nonlocal kept
                kept = value
                report.set_recipe(value)

            why = child(job, deadline.left() / (len(arguments.recipes) - position), keep)
            if why is not None:
                report.set_recipe(kept | {"interrupted": {"missing": why}})
            say(f"{kept['name']}: " + (why or f"{_measured(kept)} candidates measured"))
    elif earlier is None:
        report.set("recipes", {"missing": "not asked for (--only)"})
    content["finished"] = _now()
    report.save()


def part(report: Report, child: Callable[..., str | None], name: str, job: Json, limit_s: float) -> None:
    """One part whose value stands under its own name."""
    why = child({"part": name, **job}, limit_s, lambda value: report.set(name, value))
    if why is not None:
        reached = "missing" not in report.content[name]
        report.set(name, report.content[name] | {"interrupted": {"missing": why}} if reached else {"missing": why})
    say(f"{name}: " + report.content[name].get("missing", why or "done"))


def _measured(recipe: Json) -> int:
    return sum(
        "median_ms" in one.get("device", one.get("host", {})) for b in recipe["batches"] for one in b["candidates"]
    )


def gpu_name(machine: Json) -> str | None:
    """The GPU's name, by the driver or by torch; None where neither has one."""
    for source in ("gpu", "cuda"):
        name = machine.get(source, {}).get("name")
        if isinstance(name, str):
            return name
    return None


def say(line: str) -> None:
    print(line, flush=True)


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        RecipeError: a file that it names is not there, or a part is unknown.
    """
    parser = argparse.ArgumentParser(
        prog="gpu_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", type=Path, help=f"default: {', '.join(RECIPES)}")
    parser.add_argument("--output", type=Path, default=Path("gpu_report.json"), help="default: gpu_report.json")
    parser.add_argument("--artifact", type=Path, action="append", default=[], help="folder whose engines are measured")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}; default: all")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds for everything; default: 3600")
    parser.add_argument("--earlier", type=Path, help="keep the parts of this result that are not measured now")
    parser.add_argument("--render", type=Path, metavar="RESULT", help="print a result as Markdown, and measure nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--pipe", type=int, help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    found.only = tuple(name.strip() for name in found.only.split(",") if name.strip())
    found.recipes = found.recipes or [ROOT / name for name in RECIPES]
    if unknown := [name for name in found.only if name not in PARTS]:
        raise RecipeError(f"--only: found '{unknown[0]}'; some of {', '.join(PARTS)} were expected. Correct it.")
    if "energy" in found.only and "recipes" not in found.only:
        raise RecipeError("--only: found 'energy' without 'recipes', whose candidates it is about. Add it.")
    for path in found.recipes:
        if not path.is_file():
            raise RecipeError(f"{path}: no such file; a recipe (TOML) was expected. Correct the path.")
    return found


def main(arguments: Sequence[str]) -> int:
    try:
        asked_for = options(arguments)
        if asked_for.child is not None:
            return child_main(json.loads(asked_for.child), asked_for.pipe)
        if asked_for.render is not None:
            content = read_result(asked_for.render)
            try:
                from compiler.report.gpu import markdown
            except ImportError as exc:
                raise RecipeError(f"--render needs a package that is not installed: {exc}. Install it.") from exc
            print(markdown(content), end="")
            return 0
        report = Report(asked_for.output, shlex.join(["gpu_report", *arguments]))
        measure(asked_for, report)
    except BuildEngineError as exc:
        print(exc.message, file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        print("interrupted; the parts that were done are in the file", file=sys.stderr)
        return 130
    say(f"{asked_for.output}: {len(report.content['missing'])} things missing")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the child, too
    sys.exit(main(sys.argv[1:]))
