"""What a search makes and measures engines with: the stages, called for one candidate after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from compiler import backends, quantize
from compiler.backends.onnxruntime import NAME as ONNXRUNTIME
from compiler.backends.onnxruntime import open_model
from compiler.data import Samples
from compiler.errors import RecipeError
from compiler.pipeline.measures import user_measures
from compiler.quantize import switches
from compiler.quantize.gram import Source
from compiler.quantize.groups import Group
from compiler.quantize.rounding import Learning
from compiler.recipe import EngineSection, GateSection, LatencySection
from compiler.spec import (
    Array,
    Engine,
    Feeds,
    OnnxModel,
    Outputs,
    Precision,
    Runner,
    Scores,
    ValidationSet,
    Verdict,
    batch_axis,
)
from compiler.validate import accuracy, estimates, judge, latency

if TYPE_CHECKING:
    from compiler.pipeline.steps import Job

_TIMING = LatencySection(blocks=12, block_ms=40.0, limit_s=10.0, compile=False)
"""How candidates are timed, where so much time is left; batch sizes are the recipe's."""


class _Fed:
    """A runner with some of its inputs given."""

    def __init__(self, runner: Runner, given: Feeds) -> None:
        self.inputs = tuple(spec for spec in runner.inputs if spec.name not in given)
        self.outputs = runner.outputs
        self._runner, self._given = runner, given

    def run(self, feeds: Feeds) -> dict[str, Array]:
        return self._runner.run({**feeds, **self._given})

    def time(self, feeds: Feeds, repeats: int) -> list[float]:
        return self._runner.time({**feeds, **self._given}, repeats)

    def close(self) -> None:
        self._runner.close()


class Workshop:
    """A `compiler.pipeline.search.Workshop` for the engine of one job."""

    def __init__(self, job: Job, budget: Sequence[GateSection]) -> None:
        selection, original = job.inputs["data"].selection, job.inputs["original"].selection
        assert selection is not None and original is not None, "a search has samples to select by"
        self.data: ValidationSet = selection
        self._original: Outputs = original
        self._job = job
        self._budget = budget
        self._runs_here = backends.get(job.backend or "").cannot_run() is None
        self._backend = backends.get((job.backend or "") if self._runs_here else ONNXRUNTIME)
        self._measures = self._named_measures()

    @property
    def rivals(self) -> tuple[Precision, ...]:
        """What a mixture must beat. Half precision has no fast kernels in ONNX Runtime on a CPU."""
        halves = self._runs_here and self._job.backend != ONNXRUNTIME
        return (Precision.FP32, Precision.FP16) if halves else (Precision.FP32,)

    def plain(self, precision: Precision, out_dir: Path) -> OnnxModel:
        return self._quantised(EngineSection(precision=precision), out_dir)

    def mix(self, keep: Sequence[str], out_dir: Path) -> OnnxModel:
        section = self._job.section
        return self._quantised(msgspec.structs.replace(section, keep=(*section.keep, *keep)), out_dir)

    def build(self, model: OnnxModel, out_dir: Path) -> Engine:
        job = self._job
        return self._backend.build(
            model,
            name=job.section.label,
            reason=job.backend_reason,
            threads=job.threads,
            out_dir=out_dir,
            section=job.recipe.tensorrt,
            caches=job.caches,
        )

    def open(self, engine: Engine) -> Runner:
        return self._backend.open(engine, threads=self._job.threads)

    def score(self, engine: Engine, runner: Runner) -> Scores:
        measures = self._measures
        return accuracy.score(
            engine,
            runner,
            self.data,
            self._original,
            metrics=measures["metrics"],
            losses=measures["losses"],
            agreements=measures["agreements"],
        )

    def noise(self, engine: Engine, runner: Runner, samples: int) -> float:
        return accuracy.noise_share(engine, runner, self.data, self._original, samples=samples)

    def noise_of_each(self, groups: Sequence[Group], samples: int) -> list[float] | None:
        job = self._job
        model: OnnxModel = job.inputs["model"]
        with tempfile.TemporaryDirectory(dir=job.out_dir) as folder:
            path = Path(folder) / "switched.onnx"
            names = switches.write(job.section, job.quantize, model, job.inputs["statistics"], groups, path)
            if names is None:
                return None
            engine = Engine(
                name=job.section.label,
                path=path,
                sha256="",
                size_bytes=0,
                backend=ONNXRUNTIME,
                backend_reason="",
                precision=Precision.FP32,
                model_sha256=model.sha256,
                platform=self._backend.platform(),
                inputs=model.inputs,
                outputs=model.outputs,
                axes=model.axes,
                build_s=0.0,
            )
            with closing(open_model(path, threads=job.threads)) as runner:
                return [
                    self.noise(engine, _Fed(runner, switches.feeds(names, place)), samples)
                    for place in range(len(groups))
                ]

    def judge(self, engine: Engine, scores: Scores) -> Verdict:
        return judge.judge(self._budget, [engine], {engine.name: scores}, None, 1)[0]

    def time(self, runners: Mapping[str, Runner], limit_s: float) -> Mapping[str, Mapping[int, tuple[float, float]]]:
        if not self._runs_here:
            return {}
        batches = self._job.recipe.batches
        taken = latency.measure(
            msgspec.structs.replace(_TIMING, limit_s=min(_TIMING.limit_s, limit_s / len(batches))),
            runners,
            self._feeds_at,
            batches,
            engine_sha256={},
            platform=self._backend.platform(),
            threads=self._job.threads,
            undecided=lambda _: False,
        ).latencies
        first = next(iter(runners))
        found: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in runners}
        for name in runners:
            for batch in batches:
                one, other = estimates.find(taken, first, batch), estimates.find(taken, name, batch)
                assert one is not None and other is not None, "everything is timed at every batch size"
                found[name][batch] = estimates.speedup(one, other).value, estimates.median_ms(other).value
        return found

    @cached_property
    def _samples(self) -> Samples:
        return Samples(self.data.path)

    def _feeds_at(self, batch: int) -> Feeds:
        samples = self._samples
        if batch_axis(self._job.recipe.inputs) is None:
            return samples.feeds(0)
        return samples.batch([index % len(samples) for index in range(batch)])

    @cached_property
    def _learning(self) -> Learning:
        job = self._job
        return Learning(
            source=Source(
                model=job.inputs["model"],
                data=job.inputs["data"].calibration,
                samples=job.inputs["statistics"].samples,
                open_model=open_model,
                threads=job.threads,
                out_dir=job.out_dir,
            )
        )

    def _quantised(self, engine: EngineSection, out_dir: Path) -> OnnxModel:
        job = self._job
        return quantize.quantize(
            engine,
            job.quantize,
            job.inputs["model"],
            job.inputs["statistics"],
            job.inputs["data"].calibration,
            open_model=open_model,
            threads=job.threads,
            out_dir=out_dir,
            checked=False,
            learning=self._learning,
        )

    def _named_measures(self) -> dict[str, dict[str, accuracy.Measure]]:
        """Those of the model file's measures that the budget names; the others cost time and decide nothing."""
        named = {gate.metric for gate in self._budget}
        measures = {
            kind: {name: function for name, function in of_kind.items() if name in named}
            for kind, of_kind in user_measures(self._job.sources).items()
        }
        needing = [name for kind in ("metrics", "losses") for name in measures[kind]]
        if needing and not self.data.labelled:
            raise RecipeError(
                f"[search] budget: '{needing[0]}' needs labels, and the selection samples have none: they are what "
                "calibration() yields beyond those that calibrate. Define selection(), written like validation(); or give "
                "the budget an agreement, such as top1_agreement or cosine."
            )
        return measures
