"""Memory that calls use again and again: on the device, and pinned on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from compiler.backends.tensorrt.cuda import CudaLike, Pinned
from compiler.spec import Array


class Buffer:
    """Memory of one tensor: on the device, pinned on the host, or both; it grows by doubling and never shrinks."""

    def __init__(self, cuda: CudaLike, *, on_device: bool, on_host: bool) -> None:
        self._cuda = cuda
        self._on_device, self._on_host = on_device, on_host
        self._host: Pinned | None = None
        self._device: int | None = None
        self.capacity = 0

    @property
    def device(self) -> int:
        assert self._device is not None
        return self._device

    @property
    def host(self) -> Pinned:
        assert self._host is not None
        return self._host

    @property
    def address(self) -> int:
        """Where TensorRT finds the tensor."""
        return self.device if self._on_device else self.host.address

    def reserve(self, size: int, limit: int = 0) -> None:
        """Hold at least ``size`` bytes; growing stops at ``limit``, where there is one, unless ``size`` is more. Where this
        grows, what was held is lost; nothing in flight may use it."""
        size = max(1, size)  # an empty tensor has an address too
        if size <= self.capacity:
            return
        grown = 2 * self.capacity
        size = max(size, min(grown, limit) if limit else grown)
        self.close()
        if self._on_device:
            self._device = self._cuda.malloc(size)
        if self._on_host:
            self._host = self._cuda.malloc_host(size)
        self.capacity = size

    def close(self) -> None:
        self.capacity = 0
        device, host = self._device, self._host
        self._device = self._host = None
        if device is not None:
            self._cuda.free(device)
        if host is not None:
            self._cuda.free_host(host)

    def write(self, value: Array) -> None:
        np.copyto(np.ndarray(value.shape, value.dtype, self.host.view), value)

    def read(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
        return np.ndarray(shape, dtype, self.host.view).copy()


class Slot:
    """Inputs and outputs of one call, by tensor name; an output that TensorRT writes in place shares its input's."""

    def __init__(
        self, cuda: CudaLike, names: Sequence[str], *, on_host: Collection[str], aliases: Mapping[str, str]
    ) -> None:
        """``names`` of ``on_host`` have no memory on the device; ``aliases`` names the input by output."""
        self._cuda = cuda
        self.memory: dict[str, Buffer] = {}
        self._events: list[int] = []
        for name in names:
            shared = aliases.get(name)
            self.memory[name] = (
                self.memory[shared] if shared is not None else Buffer(cuda, on_device=name not in on_host, on_host=True)
            )

    @property
    def events(self) -> tuple[int, int, int]:
        """Fed, computed, done."""
        while len(self._events) < 3:
            self._events.append(self._cuda.create_event())
        fed, computed, done = self._events
        return fed, computed, done

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for buffer in self.memory.values():
                stack.callback(buffer.close)
            for event in self._events:
                stack.callback(self._cuda.destroy_event, event)
            self._events = []
