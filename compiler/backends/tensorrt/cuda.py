"""CUDA's runtime, as little of it as a plan needs; every return code is checked and put into words.

Streams, events, graphs and device addresses are plain integers. Nothing is loaded before a `Cuda` is made.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compiler.errors import BuildError


@dataclass(frozen=True)
class Pinned:
    """Page-locked host memory. ``view`` must not be used after it is freed."""

    address: int
    view: NDArray[np.uint8]


class CudaLike(Protocol):
    """What the runner asks of CUDA. Every method may raise `BuildError`."""

    def use(self) -> None:
        """Make the device current for the calling thread."""

    def malloc(self, size: int) -> int: ...

    def free(self, address: int) -> None: ...

    def malloc_host(self, size: int) -> Pinned: ...

    def free_host(self, memory: Pinned) -> None: ...

    def create_stream(self) -> int: ...

    def destroy_stream(self, stream: int) -> None: ...

    def synchronize(self, stream: int) -> None: ...

    def copy_in(self, device: int, host: int, size: int, stream: int) -> None:
        """Asynchronous; ``host`` is pinned and stays untouched until ``stream`` has come this far."""

    def copy_out(self, host: int, device: int, size: int, stream: int) -> None: ...

    def create_event(self, *, timing: bool = False) -> int: ...

    def destroy_event(self, event: int) -> None: ...

    def record(self, event: int, stream: int) -> None: ...

    def wait(self, stream: int, event: int) -> None:
        """What is put on ``stream`` from now on waits for ``event`` as it was last recorded."""

    def synchronize_event(self, event: int) -> None: ...

    def elapsed_ms(self, start: int, end: int) -> float: ...

    def begin_capture(self, stream: int) -> None: ...

    def end_capture(self, stream: int) -> int:
        """The graph of what was put on ``stream``. The stream is out of capture whether or not this raises."""

    def instantiate(self, graph: int) -> int: ...

    def launch(self, executable: int, stream: int) -> None: ...

    def destroy_graph(self, graph: int) -> None: ...

    def destroy_executable(self, executable: int) -> None: ...


class Cuda:
    """The current device of the thread that makes it. ``where`` begins every message.

    Raises:
        BuildError: cuda-python, a driver or a GPU is missing.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        try:
            from cuda.bindings import runtime
        except ImportError as exc:
            raise BuildError(
                f"{where}: CUDA's Python bindings cannot be loaded ({exc}); they were expected. Install cuda-bindings."
            ) from exc
        self._runtime = runtime
        self._device: int = self._call("cudaGetDevice")
        self.use()

    def use(self) -> None:
        self._call("cudaSetDevice", self._device)

    # --- memory -----------------------------------------------------------------------------------------------------

    def malloc(self, size: int) -> int:
        return int(self._call("cudaMalloc", max(1, size)))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def malloc_host(self, size: int) -> Pinned:
        size = max(1, size)
        address = int(self._call("cudaHostAlloc", size, self._runtime.cudaHostAllocDefault))
        return Pinned(address, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)))

    def free_host(self, memory: Pinned) -> None:
        self._call("cudaFreeHost", memory.address)

    def copy_in(self, device: int, host: int, size: int, stream: int) -> None:
        self._copy(device, host, size, self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)

    def copy_out(self, host: int, device: int, size: int, stream: int) -> None:
        self._copy(host, device, size, self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)

    def copy_within(self, to: int, source: int, size: int, stream: int) -> None:
        self._copy(to, source, size, self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice, stream)

    def fill(self, device: int, value: int, size: int, stream: int) -> None:
        self._call("cudaMemsetAsync", device, value, size, stream)

    def _copy(self, to: int, source: int, size: int, kind: Any, stream: int) -> None:
        self._call("cudaMemcpyAsync", to, source, size, kind, stream)

    # --- streams and events -----------------------------------------------------------------------------------------

    def create_stream(self) -> int:
        return int(self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def create_event(self, *, timing: bool = False) -> int:
        flags = self._runtime.cudaEventDefault if timing else self._runtime.cudaEventDisableTiming
        return int(self._call("cudaEventCreateWithFlags", flags))

    def destroy_event(self, event: int) -> None:
        self._call("cudaEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        self._call("cudaEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        self._call("cudaStreamWaitEvent", stream, event, self._runtime.cudaEventWaitDefault)

    def synchronize_event(self, event: int) -> None:
        self._call("cudaEventSynchronize", event)

    def elapsed_ms(self, start: int, end: int) -> float:
        return float(self._call("cudaEventElapsedTime", start, end))

    # --- graphs -----------------------------------------------------------------------------------------------------

    def begin_capture(self, stream: int) -> None:
        # Of this thread alone: other lanes go on allocating and copying meanwhile.
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        return int(self._call("cudaStreamEndCapture", stream))

    def instantiate(self, graph: int) -> int:
        return int(self._call("cudaGraphInstantiate", graph, 0))

    def launch(self, executable: int, stream: int) -> None:
        self._call("cudaGraphLaunch", executable, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cudaGraphDestroy", graph)

    def destroy_executable(self, executable: int) -> None:
        self._call("cudaGraphExecDestroy", executable)

    # --- errors -----------------------------------------------------------------------------------------------------

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the runtime; what it returns besides its code."""
        code, *found = getattr(self._runtime, name)(*arguments)
        if int(code) != 0:
            self._runtime.cudaGetLastError()  # else the next call that looks finds it again
            raise self._error(name, code, arguments)
        return found[0] if found else None

    def _error(self, name: str, code: Any, arguments: tuple[Any, ...]) -> BuildError:
        error = code.name
        if error == "cudaErrorMemoryAllocation" and name == "cudaMalloc":
            return BuildError(
                f"{self._where}: the GPU cannot give {arguments[0]:,} bytes{self._free_bytes()}; that much was expected. "
                "Open fewer contexts, end other programs on the GPU, or build with smaller profiles."
            )
        if error == "cudaErrorMemoryAllocation" and name == "cudaHostAlloc":
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            return BuildError(
                f"{self._where}: this machine cannot lock {arguments[0]:,} bytes of host memory ({free:,} free); that "
                "much was expected. Open fewer contexts, end other programs, or build with smaller profiles."
            )
        words = self._runtime.cudaGetErrorString(code)[1].decode()
        return BuildError(
            f"{self._where}: CUDA's {name} gave {error} ({words}); success was expected. {_advice(error)}"
        )

    def _free_bytes(self) -> str:
        code, free, total = self._runtime.cudaMemGetInfo()
        return f" ({free:,} of {total:,} are free)" if int(code) == 0 else ""


_NO_DRIVER = ("cudaErrorInsufficientDriver", "cudaErrorSystemDriverMismatch", "cudaErrorCompatNotSupportedOnDevice")
_NO_GPU = ("cudaErrorNoDevice", "cudaErrorInvalidDevice", "cudaErrorDevicesUnavailable")
_LOST = (
    "cudaErrorIllegalAddress",
    "cudaErrorLaunchFailure",
    "cudaErrorLaunchTimeout",
    "cudaErrorMisalignedAddress",
    "cudaErrorInvalidAddressSpace",
    "cudaErrorInvalidPc",
    "cudaErrorIllegalInstruction",
    "cudaErrorHardwareStackError",
    "cudaErrorAssert",
    "cudaErrorECCUncorrectable",
    "cudaErrorMpsConnectionFailed",
    "cudaErrorContained",
    "cudaErrorTensorMemoryLeak",
)
"""Errors after which CUDA does nothing more in this process."""


def _advice(error: str) -> str:
    if error in _NO_DRIVER:
        return "Install an NVIDIA driver at least as new as the CUDA bindings."
    if error in _NO_GPU:
        return "Run it where an NVIDIA GPU can be seen (nvidia-smi lists it, CUDA_VISIBLE_DEVICES does not hide it)."
    if error in _LOST:
        return (
            "The GPU's state is lost: start the program again, and if it comes back, build the engine on this machine."
        )
    return "Run it again, and if it comes back, build the engine on this machine."
