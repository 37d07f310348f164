"""A recipe to an ordered list of steps, each with its key; the only place that knows the order and what a key covers.

All keys are known before anything runs, from text and hashes alone: no user code, no heavy library. A key covers the
stage's own source files, so a changed line in this package is a miss and never a stale hit.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from compiler import backends, codec, source
from compiler.backends.machine import usable_cores
from compiler.data import PROBE_SAMPLES
from compiler.recipe import QUANTIZED, EngineSection, Recipe, TensorRTSection
from compiler.spec import (
    DataSets,
    Engine,
    Explanation,
    Interface,
    Latencies,
    OnnxModel,
    Precision,
    Reference,
    Scores,
    Search,
    Statistics,
)

STAND_IN = "onnxruntime"
"""The back end that runs the same ONNX file where an engine cannot run."""

_BUILD_KEYS = tuple(
    key for key in TensorRTSection.__struct_fields__ if key not in ("limit_s", "limit_mib", "ahead_of_time")
)
"""Keys of ``[tensorrt]`` that change what is built."""

_MAKING = ("export", "optimize", "observe", "search", "quantize", "explain", "stand_in")
"""Stages that engine files which exist already do without."""

_SHARED = ("spec.py", "source.py", "data.py", "onnx_files.py", "pipeline/steps.py")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What every step of one kind has in common."""

    result: type
    sources: tuple[str, ...]
    """Files and folders of this package whose text is part of the key."""
    packages: tuple[str, ...]
    """Distributions whose version is part of the key."""
    error: str
    """Class in `compiler.errors` for a child that dies."""


_ORT = ("onnxruntime-gpu", "onnxruntime")
_GRAPH = ("onnx", "onnx-ir", "onnxscript")

STAGES: Mapping[str, Stage] = {
    "data": Stage(result=DataSets, sources=("data.py",), packages=("numpy",), error="CalibrationError"),
    "export": Stage(
        result=OnnxModel,
        sources=("export.py", "original.py", "backends/onnxruntime.py"),
        packages=("torch", "transformers", *_GRAPH, *_ORT),
        error="ExportError",
    ),
    "reference": Stage(
        result=Reference,
        sources=("original.py", "backends/onnxruntime.py"),
        packages=("torch", "transformers", *_GRAPH, *_ORT),
        error="ExportError",
    ),
    "optimize": Stage(
        result=OnnxModel,
        sources=("optimize", "backends/onnxruntime.py"),
        packages=(*_GRAPH, *_ORT),
        error="GraphError",
    ),
    "observe": Stage(
        result=Statistics,
        sources=("quantize/observe.py", "quantize/placement.py", "backends/onnxruntime.py"),
        packages=(*_GRAPH, *_ORT),
        error="CalibrationError",
    ),
    "search": Stage(
        result=Search,
        sources=("quantize", "validate", "metrics.py", "backends", "pipeline/search.py", "pipeline/workshop.py"),
        packages=(*_GRAPH, *_ORT, "numpy"),
        error="CalibrationError",
    ),
    "quantize": Stage(
        result=OnnxModel,
        sources=("quantize", "backends/onnxruntime.py"),
        packages=(*_GRAPH, *_ORT),
        error="CalibrationError",
    ),
    "explain": Stage(
        result=Explanation,
        sources=("quantize", "backends/onnxruntime.py"),
        packages=(*_GRAPH, *_ORT),
        error="CalibrationError",
    ),
    "build": Stage(result=Engine, sources=("backends",), packages=_GRAPH, error="BuildError"),
    "stand_in": Stage(result=Engine, sources=("backends",), packages=_GRAPH, error="BuildError"),
    "accuracy": Stage(
        result=Scores,
        sources=("validate/accuracy.py", "validate/statistics.py", "metrics.py", "backends"),
        packages=("numpy",),
        error="BuildError",
    ),
    "inspect": Stage(result=Interface, sources=("starter.py",), packages=(), error="ExportError"),
    "latency": Stage(
        result=Latencies,
        sources=("validate", "original.py", "backends"),
        packages=("torch",),
        error="BuildError",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One call of one stage."""

    id: str
    stage: str
    key: str
    needs: Mapping[str, str]
    """Name of the input -> id of the step that makes it."""
    engine: str | None = None
    """The engine whose branch this step is in; None: every engine needs it."""
    backend: str | None = None
    backend_reason: str = ""
    limit_s: int | None = None
    """Seconds after which the step is ended."""
    limit_mib: int | None = None
    """Resident memory above which the step is ended."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Steps in an order in which every step follows what it needs."""

    steps: tuple[Step, ...]
    run_key: str
    """Covers every step, the gates and the name: an artifact with this key answers the same question."""

    def step(self, id: str) -> Step:
        return next(step for step in self.steps if step.id == id)


def make(
    recipe: Recipe,
    sources: source.Sources,
    *,
    machine: Mapping[str, str],
    memo: MutableMapping[str, Any] | None = None,
) -> Plan:
    """Lay out the steps of a recipe.

    Args:
        recipe: what is asked.
        sources: the user's files, located.
        machine: what a latency depends on beside the engines; see `compiler.pipeline.machine`.
        memo: hashes of files that have not changed since they were last read.

    Raises:
        BackendUnavailableError: an engine names a back end that this machine lacks.
        RecipeError: an engine names one that does not take an option of ``[tensorrt]``, or the ranges of ``[quantize]``.
    """
    chosen = {engine.label: backends.choose(engine, recipe.tensorrt) for engine in recipe.engines}
    files = source.fingerprint(sources, memo=memo)
    steps: list[Step] = []

    def add(
        stage: str,
        needs: Mapping[str, str],
        parts: Mapping[str, Any],
        engine: EngineSection | None = None,
        *,
        beside: Mapping[str, str] = MappingProxyType({}),
    ) -> str:
        """
        Args:
            beside: what is needed, too, though the key does not cover it: ``parts`` say all that is taken of it.
        """
        label = engine.label if engine else None
        keys = {step.id: step.key for step in steps}
        declared = STAGES[stage]
        backend, reason = chosen[engine.label] if engine else (None, "")
        if stage == "stand_in":
            backend, reason = STAND_IN, f"stands in for {backend}, which cannot run here"
        limited = stage == "build" and backend != STAND_IN
        key = codec.key(
            {
                "stage": stage,
                "code": _code(declared.sources + _SHARED),
                "python": platform.python_version(),
                "packages": source.versions(declared.packages),
                "inputs": {name: keys[id] for name, id in needs.items()},
                "parts": parts,
            }
        )
        id = f"{stage}:{label}" if label else stage
        steps.append(
            Step(
                id=id,
                stage=stage,
                key=key,
                needs={**needs, **beside},
                engine=label,
                backend=backend,
                backend_reason=reason,
                limit_s=recipe.tensorrt.limit_s if limited else None,
                limit_mib=(recipe.tensorrt.limit_mib or None) if limited else None,
            )
        )
        return id

    plain = recipe.to_dict()
    interface = {"model": plain["model"], "axes": plain["axes"], "files": files}
    searched = [engine for engine in recipe.engines if recipe.searched(engine)]
    calibrated = any(engine.precision is not Precision.FP32 for engine in recipe.engines)
    data = add(
        "data",
        {},
        {
            "inputs": plain["model"]["inputs"],
            "axes": plain["axes"],
            "data": plain["data"],
            "files": files,
            "calibrate": [recipe.quantize.samples, recipe.quantize.min_samples] if calibrated else None,
            "select": recipe.search.samples if recipe.search and searched else None,
        },
    )
    # It takes the first few samples, which are the same however many follow.
    limit = recipe.quantize.samples if calibrated else recipe.data.validation_samples
    traced = {
        "of": "calibration" if calibrated else "validation",
        "samples": min(limit or PROBE_SAMPLES, PROBE_SAMPLES),
    }
    export = add("export", {}, {**interface, "export": plain["export"], "traced": traced}, beside={"data": data})
    reference = add("reference", {"data": data}, interface)
    model = add("optimize", {"model": export}, {"section": plain["optimize"]})
    observe = ""
    if calibrated:
        sizes = {
            "samples": recipe.quantize.samples,
            "min_samples": recipe.quantize.min_samples,
            "extremes": recipe.halved,
            "attention": recipe.quantize.attention,
        }
        observe = add("observe", {"model": model, "data": data}, sizes)
    built: dict[str, str] = {}
    stand_ins: dict[str, str] = {}
    threads = threads_of(recipe)
    for engine in recipe.engines:
        ready = model
        name, reason = chosen[engine.label]
        if engine.precision is not Precision.FP32:
            needs = {"model": model, "data": data, "statistics": observe}
            asked = {"section": _quantize_section(recipe, engine, name), "engine": msgspec.to_builtins(engine)}
            if engine in searched:
                assert recipe.search is not None, "searched"
                how = {
                    **asked,
                    "search": plain["search"],
                    "budget": msgspec.to_builtins(recipe.search.budget_of(engine.label, recipe.gates)),
                    "batches": recipe.batches,
                    "backend": [name, backends.get(name).fingerprint(), backends.get(STAND_IN).fingerprint()],
                    "tensorrt": {key: plain["tensorrt"][key] for key in _BUILD_KEYS},
                    "files": files,
                    "threads": threads,
                }
                needs["search"] = add("search", {**needs, "original": reference}, how, engine)
            ready = add("quantize", needs, asked, engine)
            if engine.precision in QUANTIZED:
                add("explain", {**needs, "quantised": ready}, asked, engine)
        # An engine carries its name and the reason for its back end.
        parts: dict[str, Any] = {
            "name": engine.label,
            "reason": reason,
            "backend": name,
            **backends.get(name).fingerprint(),
        }
        if name == STAND_IN:
            parts["threads"] = threads
        else:
            parts["section"] = {key: plain["tensorrt"][key] for key in _BUILD_KEYS}
        built[engine.label] = add("build", {"model": ready}, parts, engine)
        if backends.get(name).cannot_run() is not None:
            parts = {"name": engine.label, "for": name, "threads": threads, **backends.get(STAND_IN).fingerprint()}
            stand_ins[engine.label] = add("stand_in", {"model": ready}, parts, engine)
    for engine in recipe.engines:
        needs = {"engine": built[engine.label], "data": data, "original": reference}
        runs = chosen[engine.label][0]
        if engine.label in stand_ins:
            needs["stand_in"], runs = stand_ins[engine.label], STAND_IN
        add("accuracy", needs, {"files": files, "backend": backends.get(runs).fingerprint()}, engine)
    timed = {f"engine:{label}": id for label, id in built.items() if label not in stand_ins}
    if timed:
        add("latency", {"data": data, **timed}, {**interface, "section": plain["latency"], "machine": machine})
    run_key = codec.key(
        {
            "steps": {step.id: step.key for step in steps},
            "gates": plain["gates"],
            "ahead_of_time": recipe.tensorrt.ahead_of_time,
            "name": recipe.name,
        }
    )
    return Plan(steps=tuple(steps), run_key=run_key)


def for_engines(plan: Plan, engines: Mapping[str, Engine]) -> Plan:
    """The part of a plan that validates engine files which exist already; their ``build`` steps are to be adopted."""
    keys: dict[str, str] = {}
    steps = []
    for step in plan.steps:
        if step.stage in _MAKING:
            continue
        if step.stage == "build":
            step = replace(step, key=codec.key({"adopted": engines[step.engine or ""].sha256}), needs={})
        elif step.stage in ("accuracy", "latency"):
            needs = {name: id for name, id in step.needs.items() if name != "stand_in"}
            inputs = {name: keys[id] for name, id in needs.items()}
            step = replace(step, key=codec.key({"validated": step.key, "inputs": inputs}), needs=needs)
        keys[step.id] = step.key
        steps.append(step)
    return Plan(steps=tuple(steps), run_key=plan.run_key)


def threads_of(recipe: Recipe) -> int:
    """CPU threads that a step may use."""
    return recipe.latency.threads or usable_cores()


def _quantize_section(recipe: Recipe, engine: EngineSection, backend: str) -> Mapping[str, Any]:
    """The keys of ``[quantize]`` that this engine's numbers depend on."""
    section: dict[str, Any] = msgspec.to_builtins(backends.decided(recipe.quantize, engine, backend))
    if engine.precision not in QUANTIZED:
        return {}
    if not engine.ranged:
        for key in ("method", "activations", "joins", "smooth", "split", "equalize", "correct_bias"):
            del section[key]
    if not engine.ranged or recipe.quantize.method != "percentile":
        del section["percentile"]
    return section


@functools.cache
def _code(parts: tuple[str, ...]) -> str:
    """SHA-256 over the text of files of this package."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for part in sorted(parts):
        path = root / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
