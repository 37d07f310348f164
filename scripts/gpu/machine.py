"""The machine: GPU, driver and packages."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import platform
from collections.abc import Callable, Mapping
from typing import Any

from scripts.gpu.missing import Emit, Json, MissingError, guarded, module, reason
from scripts.gpu.nvml import Gauge, open_nvml

DEVICE = "cuda"
PACKAGES = (
    *("torch", "triton", "tensorrt", "tensorrt_rtx", "onnxruntime", "cuda-bindings", "nvidia-ml-py"),
    *("numpy", "onnx", "msgspec", "tomli", "transformers"),
)


def part(job: Json, emit: Emit) -> None:  # noqa: ARG001
    found: Json = {
        "os": f"{platform.system()} {platform.release()}",
        "arch": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": versions(),
    }
    emit(found)
    uuid = None
    try:
        torch = cuda_torch()
        uuid = uuid_of(torch)
        found["cuda"] = guarded(lambda: cuda_facts(torch))
    except MissingError as exc:
        found["cuda"] = {"missing": reason(exc)}
    emit(found)
    found["gpu"] = guarded(lambda: gpu_facts(*open_nvml(uuid)))
    emit(found)


def versions() -> Json:
    """Version of every package that matters here, or that it is not installed."""
    found: Json = {name: {"missing": "not installed"} for name in PACKAGES}
    for name, suffix in itertools.product(PACKAGES, ("-cu12", "-cu13", "", "-gpu")):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name + suffix)
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
    why = ""
    try:
        torch.cuda.init()
    except Exception as exc:
        why = f": {reason(exc)}"
    raise MissingError(f"torch {torch.__version__} sees no GPU{why}")


def uuid_of(torch: Any) -> str | None:
    """NVML's name of the GPU that torch uses; None where torch does not tell."""
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    return None if uuid is None else f"GPU-{uuid}".replace("GPU-GPU-", "GPU-")


def gauge_of(torch: Any) -> Any:
    """A `Gauge` of the GPU that torch uses, or why there is none."""
    return guarded(lambda: Gauge(*open_nvml(uuid_of(torch))))


def l2_bytes(torch: Any) -> Any:
    return guarded(lambda: int(torch.cuda.get_device_properties(0).L2_cache_size))


def cuda_facts(torch: Any) -> Json:
    """What torch tells of the GPU."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": l2_bytes(torch),
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
