"""What the builder says: kept in a file, its errors put into words, its numbers read."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from compiler.backends.tensorrt.api import trt

BUILDER_LOG = "builder.log"
"""In the folder of the step, beside the plan."""

ERRORS = ("ERROR", "INTERNAL_ERROR")
"""Severities."""

_SHOWN = 6
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
_NOISE = re.compile(
    r"^(?:ModelImporter\.cpp:\d+: )?(?:--- (?:Begin|End) node ---|Node name:|input:|output:|name:|op_type:)"
)
_WHERE = re.compile(r"^(?:I\w+::\w+: |\[\w+\.cpp[^\]]*\] ?|\w+\.cpp:\d+: )+")


class BuildLog:
    """Lines of one build. Everything from INFO up goes to a file beside the plan, and to the step's own log, which is kept
    where the step fails; what is VERBOSE is looked through and dropped.

    Use `logger` where TensorRT wants an ``ILogger``; it must live as long as whatever was made with it.
    """

    def __init__(self, path: Path) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.weight_bytes: int | None = None
        """"Total Weights Memory" of the engine, once it is built."""
        self._file: TextIO = path.open("w", buffering=1)
        self.logger = listener(trt, self.add)

    def add(self, severity: str, message: str) -> None:
        if found := _WEIGHTS.search(message):
            self.weight_bytes = int(found[1])
        if severity == "VERBOSE":
            return
        if severity in ERRORS:
            self.errors.append(message)
        elif severity == "WARNING":
            self.warnings.append(message)
        for file in (self._file, sys.stdout):
            file.write(f"[{severity}] {message}\n")

    def close(self) -> None:
        self._file.close()

    def said(self) -> str:
        """The errors in a few lines, each once, without file names and line numbers of the builder's own source."""
        return shorten(self.errors)


def shorten(errors: Sequence[str]) -> str:
    """Error lines as a reader needs them.

    >>> shorten(["IBuilder::buildSerializedNetwork: Error Code 1: no tactics", "Error Code 1: no tactics"])
    'Error Code 1: no tactics'
    """
    lines = [_WHERE.sub("", line).strip() for error in errors if not _NOISE.match(error) for line in error.splitlines()]
    kept = list(dict.fromkeys(line[:400] for line in lines if line))
    return "; ".join(kept[:_SHOWN]) or "it gave no reason"


def listener(module: Any, add: Callable[[str, str], None]) -> trt.ILogger:
    """An ``ILogger`` of ``module`` that calls ``add(severity, message)``."""

    class Logger(module.ILogger):  # type: ignore[misc]  # a real base only at run time
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            add(severity.name, msg)

    return Logger()
