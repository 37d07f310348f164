"""CUDA's runtime through cuda.bindings.

Why not the back end's: it needs packages that a machine whose GPU is to be tried may lack.
"""

from __future__ import annotations

from typing import Any

from scripts.gpu.missing import MissingError, module


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


class Memory:
    """Device memory that arrays are copied to and from."""

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
