"""Back ends: what satisfies `Backend`, in one dict. A new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from compiler.backends import onnxruntime, tensorrt
from compiler.errors import BackendUnavailableError, RecipeError
from compiler.recipe import EngineSection, QuantizeSection, TensorRTSection
from compiler.spec import Engine, OnnxModel, Platform, Precision, Progress, Runner, no_progress


class Backend(Protocol):
    """What a member of `NAMES` offers. The first seven load nothing heavy; what is in capitals is a constant there."""

    @property
    def NAME(self) -> str: ...  # noqa: N802

    @property
    def PRECISIONS(self) -> frozenset[Precision]: ...  # noqa: N802

    @property
    def ZERO_POINTS(self) -> bool:  # noqa: N802
        """Whether it takes activations whose zero point is not 0."""

    @property
    def SHARED_JOINS(self) -> bool:  # noqa: N802
        """Whether its kernels gain where both operands of an addition have one scale."""

    def unavailable(self) -> str | None:
        """Why this back end cannot build here and what to do, or None where it can. Never raises."""

    def cannot_run(self) -> str | None:
        """Why what it builds cannot run here, or None where it can. Never raises."""

    def refused(self, section: TensorRTSection) -> Iterable[tuple[str, str]]:
        """Keys of ``[tensorrt]`` that this back end does not take, each with the reason."""

    def fingerprint(self) -> Mapping[str, str]:
        """What an engine built here depends on besides its model: versions, GPU, driver."""

    def platform(self) -> Platform: ...

    def build(
        self,
        model: OnnxModel,
        *,
        name: str,
        reason: str,
        threads: int,
        out_dir: Path,
        section: TensorRTSection | None = None,
        caches: Path | None = None,
        progress: Progress = no_progress,
    ) -> Engine:
        """Build ``model`` into ``out_dir``.

        Args:
            model: what to build.
            name: the engine's.
            reason: why this back end was chosen; goes into the engine.
            threads: CPU threads that the engine will have.
            out_dir: an empty folder.
            section: ``[tensorrt]``; nothing to a back end that refuses none of its keys.
            caches: where a back end may keep what speeds up its next build; None: nowhere.
            progress: told how far the build is.
        """

    def open(self, engine: Engine, *, threads: int) -> Runner: ...


NAMES: Mapping[str, Backend] = {
    "onnxruntime": onnxruntime,
    "tensorrt": tensorrt.TENSORRT,
    "tensorrt_rtx": tensorrt.RTX,
}
"""By the name that a recipe uses."""

PREFERRED = ("tensorrt", "tensorrt_rtx", "onnxruntime")
"""What ``auto`` tries, in this order; it takes the first whose engines run here, since only those can be proved here."""


def get(name: str) -> Backend:
    """The back end of that name; whether it can be used here is for `choose` to say."""
    return NAMES[name]


def choose(engine: EngineSection, section: TensorRTSection | None = None) -> tuple[str, str]:
    """The name of the back end that builds ``engine``, and why, in words.

    Args:
        engine: what to build.
        section: ``[tensorrt]``, every key of which the back end must take.

    Raises:
        BackendUnavailableError: the recipe names one that cannot be used here, or that does not take the precision.
        RecipeError: the recipe names one that does not take an option of ``section``.
    """
    section = section or TensorRTSection()
    if engine.backend != "auto":
        refusal = _refusal(engine, engine.backend)
        if refusal is not None:
            raise BackendUnavailableError(f"engine '{engine.label}': backend '{engine.backend}': {refusal}.")
        problems = [
            f"[tensorrt] {key}: engine '{engine.label}', backend '{engine.backend}', does not take it: {reason}."
            for key, reason in get(engine.backend).refused(section)
        ]
        if problems:
            raise RecipeError("\n".join(problems))
        return engine.backend, "named in the recipe"
    refusals: list[str] = []
    for name in PREFERRED:
        refusal = _refusal(engine, name) or get(name).cannot_run()
        if refusal is None:
            key, why = next(iter(get(name).refused(section)), ("", ""))
            refusal = f"does not take [tensorrt] {key}: {why}" if key else None
        if refusal is None:
            return name, "; ".join([f"{name}: the first whose engines run here", *refusals])
        refusals.append(f"{name}: {refusal}")
    raise BackendUnavailableError(f"engine '{engine.label}': no back end can be used: {'; '.join(refusals)}.")


def decided(section: QuantizeSection, engine: EngineSection, name: str) -> QuantizeSection:
    """``section`` without ``activations`` and ``joins`` as ``auto``: decided for ``engine``, which the back end of that name
    builds.

    Raises:
        RecipeError: it asks for ranges that this back end does not take.
    """
    if not engine.ranged:
        return section
    backend = get(name)
    takes = backend.ZERO_POINTS
    if section.activations == "asymmetric" and not takes:
        raise RecipeError(
            f"quantize.activations: engine '{engine.label}', backend '{name}', does not take \"asymmetric\": zero points must "
            'be 0. Write "auto", or "symmetric".'
        )
    auto = {"activations": "asymmetric" if takes else "symmetric", "joins": "shared" if backend.SHARED_JOINS else "own"}
    return msgspec.structs.replace(
        section, **{key: how for key, how in auto.items() if getattr(section, key) == "auto"}
    )


def _refusal(engine: EngineSection, name: str) -> str | None:
    backend = get(name)
    if engine.precision not in backend.PRECISIONS:
        return f"does not take {engine.precision}; it takes {', '.join(sorted(backend.PRECISIONS))}"
    return backend.unavailable()
