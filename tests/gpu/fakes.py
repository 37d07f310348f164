"""Machines that are made up: a clock, a driver, a CUDA runtime and a torch with a GPU of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from compiler.spec import DimRange, Engine, Platform, Precision, TensorSpec
from scripts.gpu import nvml


class Clock:
    """A clock that goes on when it is told to, and a card whose power is a function of it."""

    def __init__(self, power_w: Callable[[float], float] = lambda at: 300.0, step_s: float = 0.1) -> None:
        self.now, self.power_w, self.step_s = 0.0, power_w, step_s

    def __call__(self) -> float:
        return self.now

    def energy_j(self) -> float:
        """What a counter that moves every ``step_s`` shows, at constant power."""
        return self.power_w(0.0) * self.step_s * int(self.now / self.step_s + 1e-9)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Nvml:
    """As much of pynvml as is asked for; ``without`` names what this card does not tell."""

    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1, 2

    def __init__(self, clock: Clock, without: Sequence[str] = ()) -> None:
        self.clock, self.without, self.asked = clock, without, list[str]()

    def __getattr__(self, name: str) -> Any:
        answers: Mapping[str, Callable[..., Any]] = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetHandleByIndex": lambda index: f"GPU {index}",
            "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
            "nvmlDeviceGetTotalEnergyConsumption": lambda handle: int(self.clock.energy_j() * 1e3),
            "nvmlDeviceGetPowerUsage": lambda handle: int(self.clock.power_w(self.clock.now) * 1e3),
            "nvmlDeviceGetTemperature": lambda handle, sensor: 55,
            "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1980, 2: 2619}[kind],
            "nvmlDeviceGetMaxClockInfo": lambda handle, kind: {1: 1980, 2: 2619}[kind],
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0x4,
            "nvmlDeviceGetName": lambda handle: b"NVIDIA Test",
            "nvmlDeviceGetCudaComputeCapability": lambda handle: (9, 0),
            "nvmlSystemGetDriverVersion": lambda: "580.1",
            "nvmlSystemGetCudaDriverVersion_v2": lambda: 13020,
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=80 << 30, used=1 << 30),
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
            "nvmlDeviceGetPowerManagementLimit": lambda handle: 700_000,
            "nvmlDeviceGetEccMode": lambda handle: [1, 1],
            "nvmlDeviceGetPersistenceMode": lambda handle: 0,
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: [1],
        }
        self.asked.append(name)
        if name not in answers:
            raise AttributeError(name)
        if name in self.without:
            return refuse
        return answers[name]


def refuse(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("Not Supported")


@contextlib.contextmanager
def polled(gauge: nvml.Gauge, every_s: float) -> Iterator[list[Any]]:
    """`nvml.sampling` on a `Clock`: a reading for every ``every_s`` that the body made it go on."""
    clock = gauge._clock
    assert isinstance(clock, Clock)
    readings, sleep, due = [gauge.read()], clock.sleep, clock.now + every_s

    def watched(seconds: float) -> None:
        nonlocal due
        end = clock.now + seconds
        while due < end:
            clock.now = due
            readings.append(gauge.read())
            due += every_s
        clock.now = end

    clock.sleep = watched  # type: ignore[method-assign]
    try:
        yield readings
    finally:
        clock.sleep = sleep  # type: ignore[method-assign]
        readings.append(gauge.read())


def timed(clock: Clock, call_s: float) -> Callable[[int], list[float]]:
    def call(repeats: int) -> list[float]:
        clock.sleep(call_s * repeats)
        return [call_s] * repeats

    return call


def readings_of(clock: Clock, until_s: float, every_s: float = 0.02, **without: bool) -> list[Any]:
    found = []
    for index in range(round(until_s / every_s) + 1):
        clock.now = index * every_s
        reading = {"at_s": clock.now, "energy_j": clock.energy_j(), "power_w": clock.power_w(clock.now)}
        found.append({name: value for name, value in reading.items() if name not in without})
    return found


def graph_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    constants: Mapping[str, Sequence[int]],
    outputs: Sequence[str] = ("y",),
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model whose constants hold zeros."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(name, kind, list(shape)) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [
            helper.make_tensor(name, kind, list(shape), b"\0" * int(np.prod(shape)) * (4 if kind == 1 else 1), raw=True)
            for name, shape in constants.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


class FakeRuntime:
    """cuda.bindings.runtime on host memory; a copy of a byte takes a nanosecond."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)

    def __init__(self, fails: str = "") -> None:
        self.fails, self.now, self.held = fails, 0.0, list[Any]()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            if name == self.fails:
                return (35, None)
            return (0, *self.answer(name, *arguments))

        return call

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, b"driver is too old"

    def answer(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        if name in ("cudaMalloc", "cudaMallocHost"):
            self.held.append(np.zeros(arguments[0], np.uint8))
            return (self.held[-1].ctypes.data,)
        if name == "cudaMemGetInfo":
            return 1 << 20, 1 << 21
        if name in ("cudaMemcpy", "cudaMemcpyAsync"):
            import ctypes

            ctypes.memmove(arguments[0], arguments[1], arguments[2])
            self.now += arguments[2] * 1e-9
        if name == "cudaEventCreate":
            return (SimpleNamespace(at=0.0),)
        if name == "cudaEventRecord":
            arguments[0].at = self.now
        if name == "cudaEventElapsedTime":
            return ((arguments[1].at - arguments[0].at) * 1e3,)
        return (7,) if name == "cudaStreamCreate" else ()


class Tiny(torch.nn.Module):
    """One convolution without a bias, one linear map: 4 * 27 + 4 * 5 + 5 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.head = torch.nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.head(self.conv(x).mean(dim=(2, 3))),)


class Event:
    """Its clock goes on by ``FakeCuda.call_ms`` with every look at it."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeCuda.now_ms += FakeCuda.call_ms
        self.at = FakeCuda.now_ms

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return float(end.at - self.at)


class Stream:
    cuda_stream = 11

    def wait_stream(self, other: Stream) -> None: ...


class Graph:
    """A graph that remembers how often it was replayed; the outputs of its capture stay what they were."""

    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


class FakeCuda:
    now_ms, call_ms, capturing = 0.0, 2.0, False
    Event, Stream, CUDAGraph = Event, Stream, Graph

    def is_available(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def device_count(self) -> int:
        return 1

    def current_stream(self) -> Any:
        return Stream()

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph: Graph) -> Iterator[None]:
        FakeCuda.capturing = True
        yield
        FakeCuda.capturing = False

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(
            total_memory=1 << 20, L2_cache_size=1 << 10, name="NVIDIA Test", major=9, minor=0, multi_processor_count=4,
            uuid="12-34",
        )  # fmt: skip


class FakeTorch:
    """torch on the CPU, with a ``cuda`` of its own, and `compile` that does nothing or fails."""

    def __init__(self) -> None:
        self.cuda = FakeCuda()
        self.version = SimpleNamespace(cuda="13.0")
        self.compiled = 0
        self.refusal: str | None = None
        self.precisions: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def set_float32_matmul_precision(self, precision: str) -> None:
        self.precisions.append(precision)

    def compile(self, call: Any, *, dynamic: bool) -> Any:
        assert dynamic is False
        self.compiled += 1
        if self.refusal:
            raise RuntimeError(self.refusal)
        return call


HERE = Platform(os="", arch="", cpu="", cores=1, gpu=None, compute_capability=None, driver=None, packages={})


ENGINE = Engine(
    name="int8",
    path=Path("engine.plan"),
    sha256="sha-of-int8",
    size_bytes=1000,
    backend="tensorrt",
    backend_reason="test",
    precision=Precision.INT8,
    model_sha256="m",
    platform=HERE,
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
    outputs=(),
    axes={"batch": DimRange(min=1, opt=4, max=8)},
    build_s=0.0,
)


FEEDS = {"x": np.ones((2, 3, 8, 8), np.float32)}


CEILINGS = {
    "copy": {"gb_s": 1000.0},
    "read": {"gb_s": 800.0},
    "matmul": {"fp16": {"tflops": 100.0}, "tf32": {"missing": "too old"}},
    "l2_bytes": 50_000_000,
}
