"""build-engine's own stages, called as the pipeline calls them, and like there each in a process of its own.

``job.options["stage"]`` is ``source`` (describe the model and convert the samples to the project's own format: the
benchmark's cost, not counted), ``optimize``, ``observe``, ``quantize:<name>`` or ``build:<name>``. Results go from stage to
stage as files in ``job.out``; ``base`` is a folder above all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..jobs import Job, Meter
from ..samples import Samples

PLAIN = "fp32"
"""The name under which the optimised model is built as it is."""


def load() -> None:
    import compiler.backends.onnxruntime
    import compiler.optimize.driver
    import compiler.quantize  # noqa: F401


def run(job: Job, meter: Meter) -> dict[str, Any]:
    stage: str = job.options["stage"]
    kind, _, name = stage.partition(":")
    out = Path(job.out) / stage.replace(":", "-")
    out.mkdir()
    if kind == "build":
        return _build(job, meter, name, out)
    inputs = () if kind == "source" else _inputs(job, kind)
    stages: dict[str, Callable[..., tuple[Any, ...]]] = {
        "source": _source,
        "optimize": _optimize,
        "observe": _observe,
        "quantize": _quantize,
    }
    with meter.stage(stage):
        made = stages[kind](job, name, out, *inputs)
    _store(job, out, made)
    return {"files": {}}


def _inputs(job: Job, kind: str) -> tuple[Any, ...]:
    """What a stage needs of those before it."""
    from compiler.spec import CalibrationSet, OnnxModel, Statistics

    source = (OnnxModel, "source"), (CalibrationSet, "source")
    needs: dict[str, tuple[tuple[Any, str], ...]] = {
        "optimize": source[:1],
        "observe": ((OnnxModel, "optimize"), source[1]),
        "quantize": ((OnnxModel, "optimize"), source[1], (Statistics, "observe")),
    }
    return tuple(_load(job, stage, noun) for noun, stage in needs[kind])


def _source(job: Job, _: str, out: Path) -> tuple[Any, ...]:
    from compiler import onnx_files
    from compiler.data import Samples as Stored
    from compiler.data import SampleWriter
    from compiler.spec import CalibrationSet, DimRange, Precision

    with SampleWriter(out / "calibration") as writer:
        for feeds in Samples(job.samples, job.count):
            writer.append(feeds)
    stored = Stored(out / "calibration")
    axes = {name: DimRange(**sizes) for name, sizes in job.options["axes"].items()}
    probe = Path(job.options["probe"])
    return (
        onnx_files.describe(Path(job.model), precision=Precision.FP32, axes=axes, probe=probe),
        CalibrationSet(path=stored.path, samples=len(stored), sha256=stored.sha256),
    )


def _optimize(_job: Job, _: str, out: Path, model: Any) -> tuple[Any, ...]:
    from compiler.backends.onnxruntime import open_model
    from compiler.optimize.driver import optimize
    from compiler.recipe import OptimizeSection

    return (optimize(OptimizeSection(), model, open_model=open_model, out_dir=out),)


def _observe(job: Job, _: str, out: Path, model: Any, data: Any) -> tuple[Any, ...]:
    from compiler.backends.onnxruntime import open_model
    from compiler.quantize import observe

    statistics = observe(
        model,
        data,
        samples=job.count,
        min_samples=1,
        open_model=open_model,
        threads=job.threads,
        out_dir=out,
        extremes=False,
    )
    return (statistics,)


def _quantize(job: Job, name: str, out: Path, model: Any, data: Any, statistics: Any) -> tuple[Any, ...]:
    from compiler import backends
    from compiler.backends.onnxruntime import open_model
    from compiler.quantize import quantize
    from compiler.recipe import EngineSection, QuantizeSection
    from compiler.spec import Precision

    fields: dict[str, Any] = dict(job.options["engines"][name])
    asked = QuantizeSection(**fields.pop("quantize", {}))
    engine = EngineSection(**{**fields, "precision": Precision(fields["precision"])})
    section = backends.decided(asked, engine, "onnxruntime")
    quantised = quantize(
        engine, section, model, statistics, data, open_model=open_model, threads=job.threads, out_dir=out
    )
    return (quantised,)


def _build(job: Job, meter: Meter, name: str, out: Path) -> dict[str, Any]:
    from compiler.backends.onnxruntime import build
    from compiler.spec import OnnxModel

    model = _load(job, "optimize" if name == PLAIN else f"quantize:{name}", OnnxModel)
    with meter.stage(f"build:{name}"):
        engine = build(model, name=name, reason="", threads=job.threads, out_dir=out)
    return {
        "files": {name: str(engine.path)},
        "notes": {name: list(engine.notes)},
        "sessions": {name: _session_of(engine, job.threads)},
    }


# --- results as files -----------------------------------------------------------------------------------------------


def _store(job: Job, out: Path, made: tuple[Any, ...]) -> None:
    from compiler import codec

    for noun in made:
        (out / f"{type(noun).__name__}.json").write_bytes(codec.dump(noun, Path(job.options["base"])))


def _load(job: Job, stage: str, noun: Any) -> Any:
    from compiler import codec

    path = Path(job.out) / stage.replace(":", "-") / f"{noun.__name__}.json"
    return codec.load(path.read_bytes(), noun, Path(job.options["base"]))


def _session_of(engine: Any, threads: int) -> dict[str, Any]:
    """What our back end sets when it opens ``engine``, overheard, so that the benchmark opens the file likewise."""
    import onnxruntime as ort

    from compiler.backends import onnxruntime as backend

    config: dict[str, str] = {}
    disabled: list[str] = []
    plain_options, plain_session = ort.SessionOptions, ort.InferenceSession

    class Overheard(plain_options):  # type: ignore[misc, valid-type]
        def add_session_config_entry(self, key: str, value: str) -> None:
            config[key] = value
            super().add_session_config_entry(key, value)

    def overheard(*args: Any, disabled_optimizers: Any = (), **others: Any) -> Any:
        disabled.extend(disabled_optimizers or ())
        return plain_session(*args, disabled_optimizers=disabled_optimizers, **others)

    try:
        ort.SessionOptions, ort.InferenceSession = Overheard, overheard
        backend.open(engine, threads=threads).close()
    finally:
        ort.SessionOptions, ort.InferenceSession = plain_options, plain_session
    return {"config": config, "disabled": sorted(set(disabled))}
