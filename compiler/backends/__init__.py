"""Back ends: what satisfies `Backend`, in one dict. A new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from compiler.backends import onnxruntime, tensorrt
from compiler.errors import BackendUnavailableError
from compiler.recipe import EngineSection
from compiler.spec import Engine, OnnxModel, Platform, Precision, Runner


class Backend(Protocol):
    """What a module in `compiler.backends` offers."""

    NAME: str
    PRECISIONS: frozenset[Precision]

    def unavailable(self) -> str | None:
        """Why this back end cannot be used here and what to do, or None where it can. Never raises."""

    def fingerprint(self) -> Mapping[str, str]:
        """What an engine built here depends on besides its model: versions, GPU, driver. Loads nothing heavy."""

    def platform(self) -> Platform: ...

    def build(self, model: OnnxModel, *, name: str, reason: str, threads: int, out_dir: Path) -> Engine: ...

    def open(self, engine: Engine, *, threads: int) -> Runner: ...


NAMES: Mapping[str, Backend] = {
    "onnxruntime": onnxruntime,
    "tensorrt": tensorrt,
    "tensorrt_rtx": tensorrt,
}
"""By the name that a recipe uses."""

PREFERRED = ("tensorrt", "onnxruntime")
"""What ``auto`` tries, in this order."""


def get(name: str) -> Backend:
    """The back end of that name; whether it can be used here is for `choose` to say."""
    return NAMES[name]


def choose(engine: EngineSection) -> tuple[str, str]:
    """The name of the back end that builds ``engine``, and why, in words.

    Raises:
        BackendUnavailableError: the recipe names one that cannot be used here, or that does not take the precision.
    """
    if engine.backend != "auto":
        refusal = _refusal(engine, engine.backend)
        if refusal is not None:
            raise BackendUnavailableError(f"engine '{engine.label}': backend '{engine.backend}': {refusal}.")
        return engine.backend, "named in the recipe"
    refusals: list[str] = []
    for name in PREFERRED:
        refusal = _refusal(engine, name)
        if refusal is None:
            return name, "; ".join([f"{name}: the first that can be used here", *refusals])
        refusals.append(f"{name}: {refusal}")
    raise BackendUnavailableError(f"engine '{engine.label}': no back end can be used: {'; '.join(refusals)}.")


def _refusal(engine: EngineSection, name: str) -> str | None:
    backend = get(name)
    if engine.precision not in backend.PRECISIONS:
        return f"does not take {engine.precision}; it takes {', '.join(sorted(backend.PRECISIONS))}"
    return backend.unavailable()
