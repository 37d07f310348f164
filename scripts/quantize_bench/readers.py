"""Samples as ONNX Runtime's calibrators want them, and with them the tools that are built on it."""

from __future__ import annotations

from typing import Any

from .samples import Samples


def data_reader(base: Any, samples: Samples) -> Any:
    """A ``CalibrationDataReader`` (``base``) of ``samples``, one by one; it can be read again from the start."""

    class Reader(base):  # type: ignore[misc]  # the base class is imported at run time
        def __init__(self) -> None:
            self.rewind()

        def get_next(self) -> Any:
            return next(self._left, None)

        def rewind(self) -> None:
            self._left = iter(samples)

        def get_first(self) -> Any:
            return samples.feeds(0)

    return Reader()
