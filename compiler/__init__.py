"""Turn a PyTorch model into a deployable inference engine, with the evidence that it still works.

Run an engine that ``build-engine`` wrote::

    import compiler

    runner = compiler.load("dist/digits-resnet")
    outputs = runner.run({"image": images})
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compiler.spec import Runner

__all__ = ["load"]


def load(
    folder: str | PathLike[str], engine: str | None = None, *, threads: int = 0, allow_failed: bool = False
) -> Runner:
    """Open an engine of an artifact, having hashed every file first. PyTorch is neither needed nor imported.

    Args:
        folder: ``dist/<name>``.
        engine: its name; default: of those that passed their gates, the fastest at the smallest batch size; where none
            did, the first that was built ahead of time for a machine like this one.
        threads: CPU threads; 0: all that this process may use.
        allow_failed: also take an engine that missed a gate.

    Returns:
        A runner: ``run({input: array}) -> {output: array}``, ``inputs`` and ``outputs``, ``close()``.

    Raises:
        ArtifactError: a file is not what was written, there is no such engine, or it is for another platform.
        GateFailedError: the engine, or every engine, missed a gate.
        BackendUnavailableError: the engine's runtime cannot be used on this machine.
        BuildError: the runtime refuses the engine.
    """
    from pathlib import Path

    from compiler import artifact, backends
    from compiler.errors import BackendUnavailableError

    path = Path(folder)

    def open_verified() -> Runner:
        chosen = artifact.choose(path, artifact.verify(path), engine, allow_failed=allow_failed)
        backend = backends.get(chosen.backend)
        if reason := backend.cannot_run():
            raise BackendUnavailableError(f"{chosen.path}: engine '{chosen.name}' needs {chosen.backend}: {reason}.")
        artifact.check_platform(chosen, backend.platform())
        return backend.open(chosen, threads=threads)

    return artifact.while_unchanged(path, open_verified)
