"""What each stage is called with. Runs in a child process, one step per process; imports only what its stage needs.

Here and only here the stages, which are strangers to one another, are handed each other's results and the functions
that they may not import (`open_model`, the user's metrics, a runner of the original).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from compiler import backends, source
from compiler.errors import BuildEngineError
from compiler.pipeline.measures import user_measures
from compiler.recipe import QUANTIZED, EngineSection, QuantizeSection, Recipe
from compiler.spec import (
    CalibrationSet,
    DataSets,
    Engine,
    Explanation,
    Feeds,
    Interface,
    Latencies,
    Latency,
    OnnxModel,
    Progress,
    Reference,
    Runner,
    Scores,
    Search,
    StandIn,
    Statistics,
    batch_axis,
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One step, ready to run. ``inputs`` holds the results of the steps it needs, by the names in `plan.Step.needs`."""

    stage: str
    key: str
    recipe: Recipe
    base: Path
    """The recipe's folder; relative paths in the recipe start here."""
    engine: EngineSection | None
    backend: str | None
    backend_reason: str
    inputs: Mapping[str, Any]
    out_dir: Path
    caches: Path
    """Where a back end may keep what speeds up its next build."""
    threads: int
    progress: Progress

    @property
    def sources(self) -> source.Sources:
        return source.locate(self.recipe, self.base)

    @property
    def section(self) -> EngineSection:
        assert self.engine is not None, f"step of stage {self.stage} without an engine"
        return self.engine

    @property
    def quantize(self) -> QuantizeSection:
        """``[quantize]`` as the back end of this engine has it."""
        assert self.backend is not None, "an engine has a back end"
        return backends.decided(self.recipe.quantize, self.section, self.backend)


def _data(job: Job) -> DataSets:
    from compiler import data

    return data.collect(job.recipe, job.sources, out_dir=job.out_dir, progress=job.progress)


def _export(job: Job) -> OnnxModel:
    from compiler import export
    from compiler.backends.onnxruntime import open_model
    from compiler.data import PROBE_SAMPLES, Samples

    sets: DataSets = job.inputs["data"]
    samples = Samples((sets.calibration or sets.validation).path)
    return export.export(
        job.recipe,
        job.sources,
        opset=export.choose_opset(job.recipe),
        open_model=open_model,
        out_dir=job.out_dir,
        samples=[samples.feeds(index) for index in range(min(len(samples), PROBE_SAMPLES))],
        progress=job.progress,
    )


def _reference(job: Job) -> Reference:
    from compiler import original
    from compiler.backends.onnxruntime import open_model

    return original.reference(
        job.recipe,
        job.sources,
        job.inputs["data"],
        threads=job.threads,
        open_model=open_model,
        out_dir=job.out_dir,
        progress=job.progress,
    )


def _optimize(job: Job) -> OnnxModel:
    from compiler.backends.onnxruntime import open_model
    from compiler.optimize.driver import optimize

    return optimize(
        job.recipe.optimize, job.inputs["model"], open_model=open_model, out_dir=job.out_dir, progress=job.progress
    )


def _observe(job: Job) -> Statistics:
    from compiler.backends.onnxruntime import open_model
    from compiler.quantize import observe

    return observe(
        job.inputs["model"],
        _calibration(job),
        samples=job.recipe.quantize.samples,
        min_samples=job.recipe.quantize.min_samples,
        open_model=open_model,
        threads=job.threads,
        out_dir=job.out_dir,
        extremes=job.recipe.halved,
        attention=job.recipe.quantize.attention == "on",
        progress=job.progress,
    )


def _search(job: Job) -> Search:
    from compiler.pipeline import search
    from compiler.pipeline.workshop import Workshop
    from compiler.quantize.groups import groups

    section, engine = job.recipe.search, job.section
    assert section is not None, "the plan asks for a search where the recipe does"
    budget = section.budget_of(engine.label, job.recipe.gates)
    workshop = Workshop(job, budget)
    return search.search(
        engine.label,
        section,
        budget,
        groups(job.inputs["model"], job.inputs["statistics"], keep=(*job.recipe.quantize.keep, *engine.keep)),
        workshop.data,
        workshop,
        rivals=workshop.rivals,
        journal=job.caches / "search" / f"{job.key}.jsonl",
        out_dir=job.out_dir,
        progress=job.progress,
    )


def _quantize(job: Job) -> OnnxModel:
    from compiler.backends.onnxruntime import open_model
    from compiler.quantize import quantize

    engine = job.section
    found: Search | None = job.inputs.get("search")
    if found is not None:
        engine = msgspec.structs.replace(
            engine, precision=found.point.precision, keep=(*engine.keep, *found.point.keep)
        )
    return quantize(
        engine,
        job.quantize,
        job.inputs["model"],
        job.inputs["statistics"],
        _calibration(job),
        open_model=open_model,
        threads=job.threads,
        out_dir=job.out_dir,
        progress=job.progress,
    )


def _explain(job: Job) -> Explanation:
    from compiler.backends.onnxruntime import open_model
    from compiler.quantize import explain, quantize

    engine, model, statistics = job.section, job.inputs["model"], job.inputs["statistics"]
    quantised: OnnxModel = job.inputs["quantised"]
    found: Search | None = job.inputs.get("search")
    scratch = job.out_dir / "scratch"
    scratch.mkdir()
    if engine.rest != "fp32" and quantised.precision in QUANTIZED:
        # What is to be seen is what eight or four bits do; and the rest in BF16 does not run here.
        keep = (*engine.keep, *(found.point.keep if found is not None else ()))
        quantised = quantize(
            msgspec.structs.replace(engine, rest="fp32", keep=keep),
            job.quantize,
            model,
            statistics,
            _calibration(job),
            open_model=open_model,
            threads=job.threads,
            out_dir=scratch,
            checked=False,
        )
    explanation = explain.explain(
        engine,
        job.quantize,
        model,
        quantised,
        statistics,
        _calibration(job),
        searched=found is not None,
        open_model=open_model,
        threads=job.threads,
        out_dir=scratch,
        progress=job.progress,
    )
    shutil.rmtree(scratch)
    return explanation


def _calibration(job: Job) -> CalibrationSet:
    calibration: CalibrationSet | None = job.inputs["data"].calibration
    assert calibration is not None, "the plan asks for a calibration set where an engine needs one"
    return calibration


def _build(job: Job) -> Engine:
    return backends.get(job.backend or "").build(
        job.inputs["model"],
        name=job.section.label,
        reason=job.backend_reason,
        threads=job.threads,
        out_dir=job.out_dir,
        section=job.recipe.tensorrt,
        caches=job.caches,
        progress=job.progress,
    )


def _accuracy(job: Job) -> Scores:
    from compiler.validate import accuracy

    engine: Engine = job.inputs["engine"]
    runs: Engine = job.inputs.get("stand_in", engine)
    measures = user_measures(job.sources)
    runner = backends.get(runs.backend).open(runs, threads=job.threads)
    try:
        scores = accuracy.score(
            engine,
            runner,
            job.inputs["data"].validation,
            job.inputs["original"].validation,
            **measures,
            progress=job.progress,
        )
    finally:
        runner.close()
    if runs is engine:
        return scores
    assert runs.model_sha256 == engine.model_sha256, "a stand-in is built from the very same file"
    why = backends.get(engine.backend).cannot_run() or "it could not run where the plan was made"
    stand_in = StandIn(backend=runs.backend, engine_sha256=runs.sha256, model_sha256=runs.model_sha256, reason=why)
    return replace(scores, stand_in=stand_in)


def _latency(job: Job) -> Latencies:
    from compiler import original
    from compiler.backends.onnxruntime import open_model
    from compiler.data import Samples
    from compiler.validate import judge, latency

    engines: dict[str, Engine] = {
        name.removeprefix("engine:"): value for name, value in job.inputs.items() if name.startswith("engine:")
    }
    candidates: dict[str, Runner] = {}
    notes: list[str] = []
    samples = Samples(job.inputs["data"].validation.path)

    eager = original.open_original(
        job.recipe, job.sources, threads=job.threads, open_model=open_model, sample=samples.feeds(0)
    )
    candidates["eager"] = eager
    axis = batch_axis(job.recipe.inputs)

    def feeds_at(batch: int) -> Feeds:
        return samples.batch([index % len(samples) for index in range(batch)]) if axis else samples.feeds(0)

    batches = job.recipe.batches
    if job.recipe.latency.compile:
        try:
            compiled = original.compiled(eager, job.sources)
            for batch in batches:
                compiled.run(feeds_at(batch))
            candidates["compile"] = compiled
        except BuildEngineError as exc:
            notes.append(f"torch.compile is not timed: {exc.message}")
    for name, engine in engines.items():
        candidates[name] = backends.get(engine.backend).open(engine, threads=job.threads)

    def undecided(taken: Sequence[Latency]) -> bool:
        return judge.latency_undecided(job.recipe.gates, tuple(engines.values()), taken)

    return latency.measure(
        job.recipe.latency,
        candidates,
        feeds_at,
        batches,
        engine_sha256={name: engine.sha256 for name, engine in engines.items()},
        platform=backends.get("onnxruntime").platform(),
        threads=job.threads,
        undecided=undecided,
        progress=job.progress,
        notes=tuple(notes),
    )


def _inspect(job: Job) -> Interface:
    from compiler import starter

    assert job.sources.model_path is not None
    return starter.inspect(job.sources.model_path)


RUN: Mapping[str, Callable[[Job], Any]] = {
    "data": _data,
    "export": _export,
    "reference": _reference,
    "optimize": _optimize,
    "observe": _observe,
    "search": _search,
    "quantize": _quantize,
    "explain": _explain,
    "build": _build,
    "stand_in": _build,
    "accuracy": _accuracy,
    "latency": _latency,
    "inspect": _inspect,
}
