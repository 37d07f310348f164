"""What memory and arithmetic this card really gives."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from scripts.gpu import machine
from scripts.gpu.children import LEAST_S, Deadline
from scripts.gpu.cuda import asked, cuda_runtime
from scripts.gpu.missing import Emit, Json, MissingError, guarded, module
from scripts.gpu.nvml import watched

BUFFER_BYTES = 1 << 30
PINNED_BYTES = 256 << 20
MATMUL_SIZES = (4096, 8192)
MATMULS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")
TIMED_S = 0.5
"""Timed calls of one ceiling take about this long."""
FEWEST, MOST = 5, 50
"""And are this many."""


def part(job: Json, emit: Emit) -> None:
    """With torch where it has a GPU, else what cuda.bindings can do."""
    deadline = Deadline(job["limit_s"])
    try:
        torch = machine.cuda_torch()
    except MissingError as without_torch:
        try:
            found = memcpy_ceilings(cuda_runtime())
        except MissingError as exc:
            emit({"missing": f"{without_torch}; {exc}"})
        else:
            emit(found | {name: {"missing": str(without_torch)} for name in ("matmul", "read")})
        return
    torch_ceilings(torch, machine.gauge_of(torch), deadline, emit)


def set_precision(torch: Any, precision: str) -> None:
    """Let FP32 products use TF32, or not. By the older switches: torch.compile reads those, and a mix is refused."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def dtype_for(torch: Any, precision: str) -> Any:
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)


def repeated(time_calls: Callable[[int], list[float]]) -> list[float]:
    """Seconds of as many calls as fit into `TIMED_S`, after some to warm up."""
    time_calls(2)
    once = statistics.median(time_calls(3))
    return time_calls(max(FEWEST, min(MOST, round(TIMED_S / max(once, 1e-9)))))


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


# --- through torch --------------------------------------------------------------------------------------------------


def torch_ceilings(torch: Any, gauge: Any, deadline: Deadline, emit: Emit) -> None:
    """Device memory (copy, read), pinned copies, and square matrix products of random numbers in every type."""
    found: Json = {
        "method": "CUDA events, median call; random data; matrix products through cuBLAS",
        "l2_bytes": machine.l2_bytes(torch),
    }
    emit(found)

    def ceiling(measure: Callable[..., Json], *arguments: Any) -> Any:
        if deadline.left() < LEAST_S:
            return {"missing": f"the limit of {deadline.limit_s:.0f} s was reached before it began"}
        one, seen = watched(gauge, 0.1, lambda: guarded(lambda: measure(torch, *arguments)))
        return one if "missing" in seen else one | {"conditions": seen}

    size = min(BUFFER_BYTES, torch.cuda.get_device_properties(0).total_memory // 8)
    memory: dict[str, tuple[Any, ...]] = {
        "copy": (_copy, size),
        "read": (_read, size),
        "h2d": (_pinned, PINNED_BYTES, True),
        "d2h": (_pinned, PINNED_BYTES, False),
    }
    for name, what in memory.items():
        found[name] = ceiling(*what)
        emit(found)
    found["matmul"] = {}
    for precision in MATMULS:
        sizes = {str(side): ceiling(_matmul, precision, side) for side in MATMUL_SIZES}
        best = max((one for one in sizes.values() if "tflops" in one), key=lambda one: one["tflops"], default=None)
        top = {name: best[name] for name in ("tflops", "low", "high")} if best else next(iter(sizes.values()))
        found["matmul"][precision] = {**top, "sizes": sizes}
        emit(found)
    set_precision(torch, "fp32")


def _times(torch: Any, work: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each call, by CUDA events on the current stream."""
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in marks]


def _moved(torch: Any, work: Callable[[], Any], size: int) -> Json:
    return rate(repeated(functools.partial(_times, torch, work)), size, "gb_s") | {"bytes": size}


def _copy(torch: Any, size: int) -> Json:
    source = torch.rand(size // 4, device=machine.DEVICE)
    target = torch.empty_like(source)
    return _moved(torch, lambda: target.copy_(source), 2 * size)


def _read(torch: Any, size: int) -> Json:
    return _moved(torch, torch.rand(size // 4, device=machine.DEVICE).sum, size)


def _pinned(torch: Any, size: int, to_device: bool) -> Json:
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device=machine.DEVICE)
    target, source = (device, host) if to_device else (host, device)
    return _moved(torch, lambda: target.copy_(source, non_blocking=True), size)


def _matmul(torch: Any, precision: str, size: int) -> Json:
    set_precision(torch, precision)
    work = product(torch, precision, size)
    return rate(repeated(functools.partial(_times, torch, work)), 2 * size**3, "tflops")


def product(torch: Any, precision: str, size: int) -> Callable[[], Any]:
    """A square matrix product in one type. INT8 and FP8 take the second factor column by column, as cuBLAS wants it."""
    device = machine.DEVICE
    if precision == "int8":
        a, b = (torch.randint(-128, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2))
        return lambda: torch._int_mm(a, b.t())
    if precision == "fp8":
        a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), dtype=torch.float32, device=device)
        return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    a, b = (torch.randn(size, size, device=device, dtype=dtype_for(torch, precision)) for _ in range(2))
    return lambda: a @ b


# --- through cuda.bindings ------------------------------------------------------------------------------------------


def memcpy_ceilings(runtime: Any) -> Json:
    """Copies within the device and between it and pinned memory."""
    kinds = runtime.cudaMemcpyKind
    free, _ = asked(runtime, "cudaMemGetInfo")
    size = min(PINNED_BYTES, free // 8)
    first, second = (int(asked(runtime, "cudaMalloc", size)) for _ in range(2))
    pinned = int(asked(runtime, "cudaMallocHost", size))
    asked(runtime, "cudaMemset", first, 1, size)
    copies = {
        "copy": ((second, first, size, kinds.cudaMemcpyDeviceToDevice), 2 * size),
        "h2d": ((first, pinned, size, kinds.cudaMemcpyHostToDevice), size),
        "d2h": ((pinned, first, size, kinds.cudaMemcpyDeviceToHost), size),
    }

    def measure(copy: tuple[Any, ...], moved: int) -> Json:
        return rate(repeated(functools.partial(_memcpy_times, runtime, copy)), moved, "gb_s")

    return {"method": "cudaMemcpyAsync and CUDA events, median call"} | {
        name: guarded(functools.partial(measure, *what)) for name, what in copies.items()
    }


def _memcpy_times(runtime: Any, copy: tuple[Any, ...], repeats: int) -> list[float]:
    times = []
    start, end = asked(runtime, "cudaEventCreate"), asked(runtime, "cudaEventCreate")
    for _ in range(repeats):
        asked(runtime, "cudaEventRecord", start, 0)
        asked(runtime, "cudaMemcpyAsync", *copy, 0)
        asked(runtime, "cudaEventRecord", end, 0)
        asked(runtime, "cudaEventSynchronize", end)
        times.append(asked(runtime, "cudaEventElapsedTime", start, end) / 1e3)
    return times
