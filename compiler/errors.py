"""The whole exception tree: one class per way to fail, one exit code per class, one wording.

Every message reads ``<where>: <what was found>; <what was expected>. <What to do.>`` and stands alone: it is printed
without a traceback. Anything else that escapes is a bug in this package (exit code 1).
"""

from __future__ import annotations

import difflib
import errno
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar


class BuildEngineError(Exception):
    """Something that the user can act on. Never raised itself; see the subclasses."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RecipeError(BuildEngineError):
    """The recipe, the command line, or a file that they name is wrong."""

    exit_code = 2


class ExportError(BuildEngineError):
    """The model could not be built or exported, or its ONNX form does not compute what the original computes."""

    exit_code = 3


class GraphError(BuildEngineError):
    """A graph pass failed, or broke what it promised to keep."""

    exit_code = 4


class CalibrationError(BuildEngineError):
    """The calibration or validation data, or what was observed on them, cannot be used."""

    exit_code = 5


class BackendUnavailableError(BuildEngineError):
    """The back end that the recipe names cannot be used on this machine."""

    exit_code = 6


class BuildError(BuildEngineError):
    """A back end refused to build an engine, or the engine cannot run."""

    exit_code = 7


class GateFailedError(BuildEngineError):
    """Every step worked, and an engine missed a gate."""

    exit_code = 8


class ArtifactError(BuildEngineError):
    """The artifact or the store could not be written, or what was read back is not what was written."""

    exit_code = 9


class InconclusiveError(BuildEngineError):
    """Every step worked, and the evidence is too thin to decide a gate."""

    exit_code = 10


EXIT_INTERRUPTED = 130

BY_NAME: dict[str, type[BuildEngineError]] = {
    error.__name__: error
    for error in (
        RecipeError,
        ExportError,
        GraphError,
        CalibrationError,
        BackendUnavailableError,
        BuildError,
        GateFailedError,
        ArtifactError,
        InconclusiveError,
    )
}


def suggest(word: str, choices: Iterable[str]) -> str:
    """The end of a message about a wrong name.

    >>> suggest("imge", ["image", "mask"]), suggest("x", ["image", "mask"])
    ("did you mean 'image'?", 'expected one of image, mask.')
    """
    known = list(choices)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"expected one of {', '.join(known)}."


def from_os_error(error: OSError, path: Path) -> ArtifactError:
    """An `OSError` met while writing below ``path``, in the project's wording."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        free_mib = shutil.disk_usage(existing).free >> 20
        return ArtifactError(f"{path}: the disk is full ({free_mib} MiB free). Free some space and run again.")
    return ArtifactError(f"{path}: cannot write: {error.strerror or error}. Choose a folder that you may write to.")
