"""TensorRT 11, and TensorRT for RTX, which has the same Python API: one back end in two flavours.

`TENSORRT` builds on the GPU that the engine is for, and times kernels there. `RTX` builds without a GPU, ahead of time,
for RTX cards; kernels are chosen where the engine runs. Heavy imports stand inside functions: choosing a back end must
answer at once.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compiler import source
from compiler.backends import machine
from compiler.backends.tensorrt import options
from compiler.backends.tensorrt.api import drive
from compiler.errors import BuildError
from compiler.recipe import COMPUTE_CAPABILITIES, TensorRTSection
from compiler.spec import (
    DimRange,
    Engine,
    OnnxModel,
    Platform,
    Precision,
    PrecisionProof,
    Progress,
    Runner,
    no_progress,
)

if TYPE_CHECKING:
    from compiler.backends.tensorrt.precision import Asked

OLDEST = 11
_OLDEST_DRIVER = {"cu13": 580, "cu12": 525}
"""By CUDA release of the wheel, the first driver that runs it:
https://docs.nvidia.com/cuda/cuda-toolkit-release-notes/index.html, "minimum required driver version"."""

_INSTALL = "https://docs.nvidia.com/deeplearning/tensorrt/latest/installing-tensorrt/installing.html"


@dataclass(frozen=True)
class TensorRT:
    """A flavour; satisfies `compiler.backends.Backend`."""

    NAME: str
    module: str
    """What is imported."""
    packages: tuple[str, ...]
    """Distributions that make up the builder."""
    PRECISIONS: frozenset[Precision] = frozenset(Precision)
    ZERO_POINTS: bool = False
    SHARED_JOINS: bool = True

    def unavailable(self) -> str | None:
        return self._not_installed() if self.NAME == options.RTX else self.cannot_run()

    def cannot_run(self) -> str | None:
        if reason := self._not_installed():
            return reason
        gpu = machine.gpu()
        if gpu is None:
            return "no NVIDIA GPU was found on this machine (nvidia-smi lists none)"
        release = next(
            (name for name in _OLDEST_DRIVER if any(name in package for package in self._installed())), "cu13"
        )
        if _major(gpu.driver) < _OLDEST_DRIVER[release]:
            return (
                f"the NVIDIA driver is {gpu.driver}; {_OLDEST_DRIVER[release]} or later was expected for CUDA "
                f"{release.removeprefix('cu')}. Update the driver"
            )
        if not source.installed("cuda.bindings"):
            return "the Python package 'cuda-bindings' is not installed. pip install 'build-engine[gpu]'"
        if self.NAME == options.RTX and gpu.compute_capability not in COMPUTE_CAPABILITIES:
            return (
                f"{gpu.name} has compute capability {gpu.compute_capability}; TensorRT for RTX takes "
                f'{", ".join(COMPUTE_CAPABILITIES)}. Use backend = "tensorrt"'
            )
        return None

    def refused(self, section: TensorRTSection) -> Iterator[tuple[str, str]]:
        return options.refused(section, self.NAME, gpu=machine.gpu() is not None)

    def fingerprint(self) -> Mapping[str, str]:
        # Where it runs, kernels are chosen for this GPU, and what is built is tried on it; where not, nothing depends on one.
        gpu = machine.gpu() if self.cannot_run() is None else None
        return {
            **self._installed(),
            **source.versions(("polygraphy", "onnx-ir")),
            **({} if gpu is None else {"gpu": gpu.name, "driver": gpu.driver}),
        }

    def platform(self) -> Platform:
        return machine.describe((*self.packages, "polygraphy", "onnx-ir"))

    def build(
        self,
        model: OnnxModel,
        *,
        name: str,
        reason: str,
        threads: int,  # noqa: ARG002 - the GPU's work, not the CPU's
        out_dir: Path,
        section: TensorRTSection | None = None,
        caches: Path | None = None,
        progress: Progress = no_progress,
    ) -> Engine:
        """
        Raises:
            BuildError: NVIDIA's parser or builder refuses the model; or, unless ``section.departures`` says to report
                it, some layer's precision in the engine is not the one that the model asks for.
        """
        from compiler import onnx_files
        from compiler.backends.tensorrt import build as builds
        from compiler.backends.tensorrt import precision
        from compiler.backends.tensorrt.timing_cache import TimingCache

        section = section or TensorRTSection()
        started = time.perf_counter()
        if self.cannot_run() is not None:
            _check_probe(model, builds.profiles_of(model, section), builds.PLAN)
        drive(self.module)
        wanted, stored_bytes = precision.asked(model.path)
        keeps_timings = self.NAME != options.RTX and caches is not None and section.timing_cache is not False
        built = builds.build(
            model,
            flavour=self.NAME,
            section=section,
            timings=TimingCache(caches, self.fingerprint()) if keeps_timings and caches is not None else None,
            stored_bytes=stored_bytes,
            out_dir=out_dir,
            progress=progress,
        )
        proof = precision.prove_network(
            wanted,
            built.layers,
            # TensorRT proper may hold a weight in the layouts of several kernels: how many bytes it takes proves nothing there.
            weight_bytes=built.weight_bytes if self.NAME == options.RTX else None,
            weight_bytes_alone=built.weight_bytes_alone,
            expected_weight_bytes=stored_bytes,
        )
        beside = _weights_beside(model, out_dir) if section.strip else ()
        engine = Engine(
            name=name,
            path=built.plan,
            sha256=onnx_files.sha256_of(built.plan, beside),
            size_bytes=sum(file.stat().st_size for file in (built.plan, *beside)),
            backend=self.NAME,
            backend_reason=reason,
            precision=model.precision,
            model_sha256=model.sha256,
            platform=self.platform(),
            inputs=model.inputs,
            outputs=model.outputs,
            axes=model.axes,
            build_s=time.perf_counter() - started,
            options=built.options,
            external_data=beside,
            profiles=builds.profiles_of(model, section),
            notes=(
                *model.notes,
                *builds.left_out(model, section),
                *builds.warnings_worth_showing(built.warnings),
            ),
        )
        if self.cannot_run() is None:
            proof = self._try(engine, model, wanted, proof)
        return replace(engine, proof=proof, notes=(*engine.notes, *_judged(proof, model, section)))

    def open(self, engine: Engine, *, threads: int) -> Runner:  # noqa: ARG002
        """
        Raises:
            BuildError: the plan is not the one that was built, or this machine cannot run it.
        """
        from compiler.backends.tensorrt import run

        return run.open_plan(engine, drive(self.module))

    def _try(
        self, engine: Engine, model: OnnxModel, wanted: Sequence[Asked], network: PrecisionProof
    ) -> PrecisionProof:
        """Open what was built, run the model's probe through it, and look inside."""
        import numpy as np

        from compiler.backends.tensorrt import precision, run

        runner = run.open_plan(engine, drive(self.module))
        try:
            if model.probe is not None:
                with np.load(model.probe) as probe:
                    runner.run({name: probe[name] for name in probe.files})
            inspected = json.loads(runner.inspect())
        finally:
            runner.close()
        return precision.prove_engine(wanted, inspected, network)

    def _installed(self) -> dict[str, str]:
        return dict(source.versions(self.packages))

    def _not_installed(self) -> str | None:
        found = source.installed(self.module)
        if self.NAME == options.RTX and not found:
            return (
                "the Python package 'tensorrt_rtx' is not installed. On Linux x86-64 'python scripts/rtx_builder.py' "
                "installs a builder that needs no GPU; for an RTX card, install TensorRT for RTX from NVIDIA"
            )
        if self.NAME == options.RTX:
            return None
        if not found:
            return f"the Python package 'tensorrt' is not installed; it comes from NVIDIA: {_INSTALL}"
        version = next(iter(self._installed().values()), "")
        if not version or _major(version) >= OLDEST:
            return None
        return (
            f"TensorRT {version} is installed; {OLDEST} or later was expected: up to 10 the builder may leave the "
            f"precision of a layer as it likes, from {OLDEST} on the graph decides. Install tensorrt>={OLDEST}"
        )


def _weights_beside(model: OnnxModel, out_dir: Path) -> tuple[Path, ...]:
    """Copies of the model's files: what a plan without weights is refitted from where it is opened."""
    copies = []
    for file in (model.path, *model.external_data):
        copies.append(out_dir / file.relative_to(model.path.parent))
        copies[-1].parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copies[-1])
    return tuple(copies)


def _major(version: str) -> int:
    """The first number of a version; 0 of a text that has none."""
    number = re.match(r"\d+", version)
    return int(number[0]) if number else 0


def _check_probe(model: OnnxModel, profiles: Sequence[Mapping[str, DimRange]], where: str) -> None:
    """What running the probe would find of its names, types and shapes, where it cannot be run."""
    import numpy as np

    from compiler.backends.feeds import FeedCheck
    from compiler.backends.tensorrt.profiles import choose_profile

    if model.probe is not None:
        with np.load(model.probe) as probe:
            sizes = FeedCheck(where, model.inputs)({name: probe[name] for name in probe.files})
        if profiles:
            choose_profile(where, profiles, sizes)


def _judged(proof: PrecisionProof, model: OnnxModel, section: TensorRTSection) -> list[str]:
    """Notes on the proof.

    Raises:
        BuildError: layers depart from what was asked, and ``section`` does not allow it.
    """
    from compiler.backends.tensorrt import precision

    said = precision.summary(proof, model.precision)
    if not precision.covers(proof, model.precision):
        raise BuildError(
            f"{model.path.name}: {said}: none of them is; at least one was expected. "
            + (
                "Build another precision."
                if model.precision is Precision.FP32
                else "Keep fewer layers (engines.keep), or build another precision."
            )
        )
    if not proof.departures:
        return [f"precision: {said}"]
    listed = [
        f"  {item.layer} ({item.op}): asked {item.asked}, got {item.found}; {item.cause}" for item in proof.departures
    ]
    if section.departures == "refuse":
        raise BuildError(
            f"{model.path.name}: {said}; every layer in the precision that the model asks for was expected. "
            + ("Accept" if model.precision is Precision.FP32 else "Keep these layers out (engines.keep), or accept")
            + ' them with [tensorrt] departures = "report".\n'
            + "\n".join(listed)
        )
    return [f"PRECISION DEPARTS: {said}", *(line.strip() for line in listed)]


TENSORRT = TensorRT(
    "tensorrt",
    "tensorrt",
    ("tensorrt", "tensorrt-cu13", "tensorrt-cu13-bindings", "tensorrt-cu12", "tensorrt-cu12-bindings"),
)
RTX = TensorRT(
    options.RTX, "tensorrt_rtx", ("tensorrt-rtx", "onnxruntime-ep-nv-tensorrt-rtx-cu13", "tensorrt-cu13-bindings")
)
