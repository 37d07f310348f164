"""The TensorRT that this process drives: ``tensorrt`` or ``tensorrt_rtx``, which have one API.

``from compiler.backends.tensorrt.api import trt`` is that module, typed, and loaded by the first `drive`. A process drives
one of the two and stays with it: their libraries carry the same names.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorrt as trt
else:

    class _Driven:
        module: ModuleType | None = None

        def __getattr__(self, name: str) -> Any:
            if self.module is None:
                raise AttributeError(f"{name}: drive() comes first")
            return getattr(self.module, name)

    trt = _Driven()

__all__ = ["drive", "trt"]


def drive(module: str) -> ModuleType:
    """Load ``module``, unless it is loaded already, and let `trt` be it."""
    loaded = importlib.import_module(module)
    if not TYPE_CHECKING:
        trt.module = loaded
    return loaded
