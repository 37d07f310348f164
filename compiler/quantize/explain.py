"""Where the error of a quantised model comes from: what each tensor adds, why, and what would help most.

The quantised model, the FP32 model and, beside it, copies of each quantised layer that read FP32's own values
(`compiler.quantize.beside`) run on a few samples, one at a time, and only sums of squares are kept. For each tensor they
give the noise that it has in the quantised model, the noise A that is added where it is made, A_w of it by its weight and
the rest by the rounding of what is read, and the noise P that was there in the inputs and is passed on.

The noise in the outputs is then traced back, from the last node to the first: of the noise of a tensor the part
A_w / (A + P) is booked on its weight, the part (A - A_w) / (A + P) on the roundings of its inputs, and the part
P / (A + P) is handed to the inputs in proportion to their own noise (absolute where they are added, relative elsewhere).
A, A_w and P are measured; differences of noises, which few samples do not show, are not taken, but of A and A_w, where one
contains the other.

How much of a noise reaches the outputs is not seen by that: later layers take back a part of it, or add to it (in MiniLM 4 %
of the noise is the embedding table's, and 26 % are traced back to it). So of the tensors to which most was traced back each
is put into the FP32 model as its layer alone makes it, and the noise in the outputs is its share; how that divides between
weight and inputs is what was traced. That the noises of roundings add up, being independent, is the usual model of
quantisation noise (Widrow and Kollar 2008, Quantization Noise, chapter 4); how nearly they do here is noted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from compiler import onnx_files
from compiler.data import Samples
from compiler.errors import BuildError
from compiler.quantize import advice, alone, beside, graphs, moved, qdq, weights
from compiler.quantize.advice import OUTLYING, Flow, Sources, outlying
from compiler.quantize.beside import Beside, Rounding
from compiler.quantize.fidelity import Power, pick
from compiler.quantize.gram import Source
from compiler.quantize.observe import Observed, chosen, load
from compiler.recipe import EngineSection, QuantizeSection
from compiler.spec import (
    Array,
    CalibrationSet,
    Explanation,
    Feeds,
    OnnxModel,
    OpenModel,
    Progress,
    Runner,
    Statistics,
    TensorError,
    no_progress,
)

SAMPLES = 8

LEARNT_SAMPLES = 64
"""To see what learning the rounding of weights would gain."""

TAIL = 20.0
"""A peak this many times the root of the mean square leaves most values less than a tenth of the steps."""

_ADDS = frozenset({"Add", "Sub", "Sum", "Concat"})
"""Operators in whose output noise stands beside noise, not in proportion to the signal that it came with."""

_NO_SIGNAL_DB = -300.0
"""What stands for a tensor that is nothing but noise."""


def explain(
    engine: EngineSection,
    section: QuantizeSection,
    model: OnnxModel,
    quantised: OnnxModel,
    statistics: Statistics,
    data: CalibrationSet,
    *,
    searched: bool,
    open_model: OpenModel,
    threads: int,
    out_dir: Path,
    progress: Progress = no_progress,
) -> Explanation:
    """Compare ``quantised`` with ``model``, tensor by tensor, on up to `SAMPLES` samples.

    Args:
        engine: whose model ``quantised`` is.
        section: how it was quantised.
        model: in FP32.
        quantised: the same, with QuantizeLinear and DequantizeLinear nodes; what is not rounded is FP32.
        statistics: of ``model``.
        data: samples; those that set no range are taken where there are any.
        searched: whether ``[search]`` chose the mixture already.
        open_model: opens an ONNX file.
        threads: CPU threads.
        out_dir: an empty folder; left empty.
        progress: told how many samples are done.
    """
    stored = Samples(data.path)
    taken, fresh = pick(len(stored), chosen(data.samples, statistics.samples), SAMPLES)
    observed = load(statistics.path)
    noises = alone.Noises(folder=out_dir)
    bench = _Bench(
        model=model,
        quantised=quantised,
        stored=stored,
        noises=noises,
        open_model=open_model,
        threads=threads,
        out_dir=out_dir,
    )
    try:
        measured = bench.measure(taken, progress)
        original = beside.prepared(onnx_files.read(model.path)).graph
        outputs = {spec.name: measured.total[spec.name] for spec in model.outputs if spec.name in measured.total}
        flow = _trace_back(original, measured, alone.shares_of(outputs))
        reaching = alone.measure(
            model,
            stored,
            noises,
            flow.largest(alone.TENSORS),
            outputs,
            open_model=open_model,
            threads=threads,
            progress=lambda done, of: progress(of + done, 2 * of),
        )
        flow = flow.as_measured(reaching)
    except BuildError as exc:
        return Explanation(
            engine=engine.label, precision=quantised.precision, model_sha256=quantised.sha256, outputs_db={}, tensors=(),
            advice=(), samples=0, fresh=fresh, data_sha256=data.sha256, failure=exc.message,
        )  # fmt: skip
    finally:
        bench.clean()
        noises.clean()
    # What calibration saw of a tensor tells nothing about its channels after factors.
    observed = {name: statistics for name, statistics in observed.items() if name not in measured.rescaled}
    tensors = _tensors(original, measured, flow, observed, section)
    source = Source(
        model=model,
        data=data,
        samples=min(statistics.samples, LEARNT_SAMPLES),
        open_model=open_model,
        threads=threads,
        out_dir=out_dir,
    )
    changes = advice.changes(
        engine,
        section,
        tensors,
        flow,
        Sources(measured.beside, original),
        observed,
        searched=searched,
        learnt_db=lambda names: weights.gains_of_learning(original, names, engine, source),
    )
    notes = []
    spoilt = [name for name, power in measured.total.items() if power.spoilt]
    if spoilt:
        listed = ", ".join(f"'{name}'" for name in spoilt[:5])
        notes.append(
            f"values that are finite in one of the two models alone: {listed}{', ...' if len(spoilt) > 5 else ''}"
        )
    if measured.rescaled:
        notes.append(
            f"{len(measured.rescaled)} tensors are compared after a factor per channel, by which the quantised model's differ"
        )
    if reaching:
        notes.append(
            f"rounded one by one, {len(reaching)} of {len(measured.beside.copies)} tensors make {sum(reaching.values()):.0%} of "
            "the noise that all make together"
        )
    return Explanation(
        engine=engine.label,
        precision=quantised.precision,
        model_sha256=quantised.sha256,
        outputs_db={name: _db(power) for name, power in outputs.items()},
        tensors=tensors,
        advice=changes,
        samples=len(taken),
        fresh=fresh,
        data_sha256=data.sha256,
        notes=tuple(notes),
    )


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Clipping:
    """What of one rounded tensor lies above its threshold."""

    values: int = 0
    above: int = 0
    noise: float = 0.0
    largest: float = 0.0
    square: float = 0.0

    def add(self, values: Feeds, rounding: Rounding, threshold: float | None) -> None:
        magnitudes = np.abs(values[rounding.value].astype(np.float64))
        magnitudes = magnitudes[np.isfinite(magnitudes)]
        self.values += magnitudes.size
        self.square += float(np.sum(magnitudes**2))
        self.largest = max(self.largest, float(magnitudes.max(initial=0.0)))
        if threshold is not None and rounding.scale is not None:
            over = magnitudes[magnitudes > threshold + rounding.scale / 2] - threshold
            self.above += over.size
            self.noise += float(np.sum(over**2))


@dataclass(kw_only=True)
class _Measured:
    """Sums over samples, by tensor of the FP32 model."""

    beside: Beside
    rescaled: Mapping[str, Array]
    """By tensor, how many times the FP32 model's each of its channels is."""
    total: dict[str, Power] = field(default_factory=dict)
    """In the quantised model."""
    seen: dict[str, Power] = field(default_factory=dict)
    """Where it is rounded: as its readers see it."""
    alone: dict[str, Power] = field(default_factory=dict)
    weights: dict[str, Power] = field(default_factory=dict)
    passed: dict[str, Power] = field(default_factory=dict)
    rounding: dict[str, Power] = field(default_factory=dict)
    """Of the tensor's own rounding, by site."""
    clipping: dict[str, _Clipping] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """Two models and the files made of them."""

    model: OnnxModel
    quantised: OnnxModel
    stored: Samples
    noises: alone.Noises
    open_model: OpenModel
    threads: int
    out_dir: Path

    def measure(self, taken: Sequence[int], progress: Progress) -> _Measured:
        original = beside.prepared(onnx_files.read(self.model.path))
        theirs = beside.prepared(onnx_files.read(self.quantised.path))
        rescaled = moved.factors(original.graph, theirs.graph)
        # The quantised model is this one, raised where its types ask for a later opset.
        original.opset_imports.update(theirs.opset_imports)
        original.ir_version = theirs.ir_version
        found = beside.build(original, theirs.graph, rescaled)
        seen = {r.site: r.seen_as for r in found.roundings.values() if r.seen_as is not None}
        beside.show(theirs.graph, [*found.reference, *seen.values()])
        sums = _Measured(beside=found, rescaled=rescaled)
        with (
            closing(self._open(original, "beside")) as reference,
            closing(self._open(theirs, "quantised")) as candidate,
        ):
            for done, index in enumerate(taken, start=1):
                feeds = self.stored.feeds(index)
                theirs_seen = {**feeds, **candidate.run(feeds)}
                given = {name: theirs_seen[theirs_name] for theirs_name, name in found.theirs.items()}
                ours = {**feeds, **reference.run({**feeds, **given})}
                self._add(sums, ours, theirs_seen, seen)
                self._store(index, found, rescaled, ours)
                progress(done, 2 * len(taken))
        return sums

    def _store(self, index: int, found: Beside, rescaled: Mapping[str, Array], ours: Feeds) -> None:
        one = np.float32(1)
        pairs = {name: (ours[name], ours[copy.alone] / rescaled.get(name, one)) for name, copy in found.copies.items()}
        self.noises.add(index, pairs)

    def clean(self) -> None:
        for file in self.out_dir.glob("explain-*"):
            file.unlink()

    def _open(self, network: ir.Model, label: str) -> Runner:
        path = self.out_dir / f"explain-{label}.onnx"
        onnx_files.write(network, path)
        # What the files mean, and not what a runtime's fusions make of them.
        return self.open_model(path, threads=self.threads, optimize=False)

    @staticmethod
    def _add(sums: _Measured, ours: Feeds, theirs: Feeds, seen: Mapping[str, str]) -> None:
        found = sums.beside
        for name, reference in found.reference.items():
            expected = ours[reference]
            if expected.dtype.kind != "f":
                continue
            sums.total.setdefault(name, Power()).add(expected, theirs[name])
            if name in seen:
                sums.seen.setdefault(name, Power()).add(expected, theirs[seen[name]])
            copy = found.copies.get(name)
            if copy is not None:
                sums.alone.setdefault(name, Power()).add(expected, ours[copy.alone])
            if copy is not None and copy.weights is not None:
                sums.weights.setdefault(name, Power()).add(expected, ours[copy.weights])
            if copy is not None and copy.passed is not None:
                sums.passed.setdefault(name, Power()).add(ours[name], ours[copy.passed])
        for site, rounding in found.roundings.items():
            sums.rounding.setdefault(site, Power()).add(ours[rounding.value], ours[rounding.rounded])
            sums.clipping.setdefault(site, _Clipping()).add(ours, rounding, _threshold(rounding))


def _threshold(rounding: Rounding) -> float | None:
    return None if rounding.scale is None else rounding.scale * rounding.levels


def _db(power: Power | None) -> float | None:
    """None where there is no noise."""
    if power is None or power.noise == 0.0:
        return None
    return max(power.sqnr_db, _NO_SIGNAL_DB)


# --- tracing back ---------------------------------------------------------------------------------------------------


def _trace_back(graph: ir.Graph, measured: _Measured, outputs: Mapping[str, float]) -> Flow:
    """Where what each of ``outputs`` counts for comes from."""
    flow, weight = Flow(), dict(outputs)
    for node in reversed(graph):
        for output in node.outputs:
            name = str(output.name)
            if weight.get(name):
                _book(node, name, weight.pop(name), measured, flow, weight)
    return flow


def _book(node: ir.Node, name: str, part: float, measured: _Measured, flow: Flow, weight: dict[str, float]) -> None:
    """Distribute ``part`` of the outputs' noise, which came by way of tensor ``name``."""
    added = node.op_type in _ADDS
    own = measured.alone.get(name, Power()).noise
    by_weight = min(measured.weights.get(name, Power()).noise, own)
    copy = measured.beside.copies.get(name)
    sites = {}
    for site in copy.reads if copy is not None else ():
        sites[site] = _strength(measured.rounding.get(site), added)
    before = {}
    for known in _nearest_known(node, measured.total):
        before[known] = _strength(measured.total[known], added)
    passed = measured.passed.get(name, Power()).noise if sum(before.values()) > 0 else 0.0
    shares = [by_weight, (own - by_weight) if sum(sites.values()) > 0 else 0.0, passed]
    if not sum(shares):
        if not sum(before.values()):
            return
        shares = [0.0, 0.0, 1.0]
    of_weight, of_sites, of_before = (part * share / sum(shares) for share in shares)
    if of_weight:
        flow.weights[name] = flow.weights.get(name, 0.0) + of_weight
    for site, strength in sites.items():
        if of_sites and strength:
            key = (measured.beside.root[site], name)
            flow.roundings[key] = flow.roundings.get(key, 0.0) + of_sites * strength / sum(sites.values())
    for before_name, strength in before.items():
        if of_before and strength:
            weight[before_name] = weight.get(before_name, 0.0) + of_before * strength / sum(before.values())


def _nearest_known(node: ir.Node, known: Collection[str]) -> list[str]:
    """Of the tensors that ``node`` reads, those that are ``known``; of other float ones, those that they are made of."""
    found, left, seen = dict[str, None](), list(node.inputs), set[ir.Node]()
    for value in left:  # which grows meanwhile
        if value is None:
            continue
        maker = value.producer()
        if str(value.name) in known:
            found[str(value.name)] = None
        elif maker is not None and maker not in seen and graphs.is_float(value):
            seen.add(maker)
            left += maker.inputs
    return list(found)


def _strength(power: Power | None, absolute: bool) -> float:
    """Noise, in proportion to the signal or as it is."""
    if power is None or power.noise == 0.0:
        return 0.0
    if absolute:
        return power.noise
    return power.noise / power.signal if power.signal > 0 else 1.0


# --- in words -------------------------------------------------------------------------------------------------------


def _tensors(
    graph: ir.Graph, measured: _Measured, flow: Flow, observed: Observed, section: QuantizeSection
) -> tuple[TensorError, ...]:
    values, found = beside.made(graph), []
    masked = qdq.masked(observed)
    for name, value in values.items():
        copy, rounding = measured.beside.copies.get(name), measured.beside.roundings.get(name)
        layer = copy is not None and copy.weights is not None
        if rounding is not None and measured.beside.root[name] != name:
            rounding = None  # it moves what was rounded before
        if not layer and rounding is None and name not in masked:
            continue
        by_weight, by_rounding = flow.of(name)
        node = value.producer()
        clipping = measured.clipping.get(name, _Clipping()) if rounding is not None else _Clipping()
        threshold = _threshold(rounding) if rounding is not None else None
        peak = observed[name].peak if name in observed and math.isfinite(observed[name].peak) else None
        if rounding is not None and (rounding.seen_as is None or name in measured.rescaled):
            peak = clipping.largest  # of what was made of the tensor, which calibration did not see
        noises = [measured.weights.get(name), measured.rounding.get(name) if rounding is not None else None]
        ratios = [1 / 10 ** (db / 10) for power in noises if (db := _db(power)) is not None]
        found.append(
            TensorError(
                name=name,
                node=str(node.name or "") if node is not None else "",
                op=node.op_type if node is not None else "input",
                layer=layer,
                rounded=rounding is not None,
                sqnr_db=_db(measured.seen.get(name) or measured.total.get(name)),
                added_db=-10 * math.log10(sum(ratios)) if ratios else None,
                share=by_weight + by_rounding,
                weight_share=by_weight,
                scale=rounding.scale if rounding is not None else None,
                threshold=threshold,
                peak=peak,
                clipped=clipping.above / clipping.values if clipping.values else 0.0,
                clipped_by=clipping.largest / threshold if clipping.above and threshold else 0.0,
                reason=_reason(name, rounding, measured, observed, section, weighs=by_weight > by_rounding),
            )
        )
    order = {name: place for place, name in enumerate(values)}
    return tuple(sorted(found, key=lambda tensor: (-tensor.share, order[tensor.name])))


def _reason(
    name: str,
    rounding: Rounding | None,
    measured: _Measured,
    observed: Observed,
    section: QuantizeSection,
    *,
    weighs: bool,
) -> str:
    if rounding is None:
        if name in qdq.masked(observed):
            return f"mask: it holds {observed[name].low:.3g}, so what reads it is not rounded"
        return _of_weight(measured.weights.get(name))
    scale, back = rounding.scale, rounding.scale_back
    if scale and back and scale != back:
        return f"broken: written with scale {scale:.3g} and read with {back:.3g}, {_times(back / scale)}"
    if rounding.broken:
        return f"broken: written with zero point {rounding.zero_point} and read with {rounding.zero_point_back}"
    if weighs:
        return _of_weight(measured.weights.get(name))
    return _of_rounding(name, rounding, measured, observed, section)


def _of_weight(power: Power | None) -> str:
    db = _db(power)
    return "its weight: rounding it changes nothing" if db is None else f"its weight: rounded alone, {db:.1f} dB"


def _of_rounding(
    name: str, rounding: Rounding, measured: _Measured, observed: Observed, section: QuantizeSection
) -> str:
    clipping, noise = measured.clipping[name], measured.rounding[name].noise
    threshold, statistics = _threshold(rounding), observed.get(name)
    of_tensor = rounding.seen_as is not None
    peak = max(clipping.largest, statistics.peak if statistics is not None and of_tensor else 0.0)
    if statistics is not None and statistics.low == statistics.high and of_tensor:
        return f"constant: {statistics.low:.3g} on every calibration sample"
    if threshold and clipping.noise > noise / 2:
        return (
            f"threshold {threshold:.3g} of peak {peak:.3g} chosen by {section.method}: "
            f"{_percent(clipping.above / clipping.values)} of the values lie above"
        )
    if threshold and peak and math.isfinite(peak) and threshold > 1.5 * peak:
        return f"threshold {threshold:.3g} is {_times(threshold / peak)} the peak {peak:.3g}: levels are left unused"
    if statistics is not None and statistics.channels is not None and of_tensor:
        ratio = outlying(statistics.channels.peaks)
        if ratio >= OUTLYING:
            return f"outlier channels: the largest channel is {ratio:.0f}x the median one"
    root_mean_square = math.sqrt(clipping.square / clipping.values) if clipping.values else 0.0
    if root_mean_square and threshold and threshold / root_mean_square >= TAIL:
        return f"long tail: the threshold {threshold:.3g} is {threshold / root_mean_square:.0f}x the root mean square"
    return f"its own rounding, in steps of {rounding.scale:.3g}" if rounding.scale else "its own rounding"


def _times(ratio: float) -> str:
    return f"{ratio:.3g} times" if ratio >= 1 else f"1/{1 / ratio:.3g} of"


def _percent(part: float) -> str:
    return f"{100 * part:.2g} %"
