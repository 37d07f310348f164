"""What would help a quantised model most: each change with the rise of the outputs' SQNR that the noise sums predict.

Taking away a part p of the noise raises the ratio by -10 log10(1 - p) dB. What a change takes away is the part that was
traced back to what it concerns (`compiler.quantize.explain`): all of it where layers are kept in high precision; where a
range is chosen otherwise, or outliers are moved into weights, the part by which the expected error falls; where the rounding
of weights is learnt, of what weights add the part that learning takes away from those layers which add most.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from compiler.quantize import beside, placement, smooth, thresholds
from compiler.quantize.beside import Beside
from compiler.quantize.observe import FINITE_BINS, Observed, edges
from compiler.recipe import EngineSection, QuantizeSection
from compiler.spec import Advice, Array, Precision, TensorError

CHANGES = 3

LEAST_DB = 0.1
"""A change that gains less is not worth a line."""

OUTLYING = 8.0
"""A channel whose peak is this many times the median one's leaves the others three bits less."""

ENOUGH = 0.8
"""Of the gain of a list of layers: a shorter list that reaches this much is named instead."""

DOMINANT_DB = 3.0
"""Where keeping one layer gains less, the noise has many sources."""

LEARNT = 3
"""Layers whose rounding is learnt to see what it gains; the others are taken to gain no more than any of these."""

_MOST_DB = 30.0
"""Larger gains are not told apart: what is left then is what was not traced."""


LearntDb: TypeAlias = Callable[[Sequence[str]], Sequence[float]]
"""Of layers, by the tensors that they make: how much less their outputs err where the rounding of their weights is learnt, in dB; 0
where it cannot be."""


@dataclass(kw_only=True)
class Flow:
    """Parts of the noise in the outputs, by where they come from."""

    weights: dict[str, float] = field(default_factory=dict)
    """By tensor made with a rounded weight."""
    roundings: dict[tuple[str, str], float] = field(default_factory=dict)
    """By site and by the tensor made by its reader."""

    def of(self, name: str) -> tuple[float, float]:
        """Of the weight that makes tensor ``name``, and of its own rounding."""
        return self.weights.get(name, 0.0), sum(part for (site, _), part in self.roundings.items() if site == name)

    def by_maker(self) -> dict[str, float]:
        """By tensor, the part that its maker adds, by its weight and by reading what is rounded."""
        found = dict(self.weights)
        for (_, name), part in self.roundings.items():
            found[name] = found.get(name, 0.0) + part
        return found

    def largest(self, count: int) -> list[str]:
        """Tensors whose makers add most, at most ``count``."""
        parts = self.by_maker()
        return sorted((name for name in parts if parts[name] > 0), key=lambda name: -parts[name])[:count]

    def as_measured(self, shares: Mapping[str, float]) -> Flow:
        """The same, but what the makers in ``shares`` add together divided among them in that proportion.

        >>> flow = Flow(weights={"a": 0.3, "b": 0.3}, roundings={("x", "a"): 0.1, ("b", "c"): 0.3})
        >>> found = flow.as_measured({"a": 0.1, "b": 0.6})
        >>> {name: round(part, 3) for name, part in found.by_maker().items()}, round(found.weights["a"], 3)
        ({'a': 0.1, 'b': 0.6, 'c': 0.3}, 0.075)
        """
        parts, total = self.by_maker(), sum(shares.values())
        if not total > 0:
            return self
        together = sum(parts[name] for name in shares)

        def times(name: str) -> float:
            return together * shares[name] / total / parts[name] if name in shares else 1.0

        return Flow(
            weights={name: part * times(name) for name, part in self.weights.items()},
            roundings={(site, name): part * times(name) for (site, name), part in self.roundings.items()},
        )


def _multiplies(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type in placement.CONVOLUTIONS | placement.PRODUCTS


@dataclass(frozen=True)
class Sources:
    """Who makes and reads what is rounded."""

    beside: Beside
    graph: ir.Graph
    """The FP32 model."""

    @cached_property
    def _made(self) -> dict[str, ir.Value]:
        return beside.made(self.graph)

    def in_order(self, names: Collection[str]) -> list[str]:
        return [name for name in self._made if name in names]

    def products(self, site: str) -> list[Array]:
        """The matrices, rows by channel of ``site``, that it is multiplied by; none where something else reads it rounded."""
        found = []
        for name, copy in self.beside.copies.items():
            if site not in copy.reads:
                continue
            node = self._made[self.layer_of(name) or name].producer()
            rows = placement.input_rows(node) if node is not None else None
            if rows is None:
                return []
            found.append(rows)
        return found

    def layer_of(self, name: str) -> str | None:
        """The tensor made by the convolution or matrix product with a rounded weight that makes tensor ``name``.

        It is ``name`` itself, or what a bias is added to, where the quantised model has nothing of that name: of a product whose
        outlying channels are multiplied apart, for instance.
        """
        copy, value = self.beside.copies.get(name), self._made.get(name)
        if copy is None or copy.weights is None or value is None:
            return None
        if _multiplies(value):
            return name
        node = value.producer()
        made = [read for read in node.inputs if read is not None and _multiplies(read)] if node is not None else []
        return str(made[0].name) if len(made) == 1 and made[0].name not in self.beside.reference else None

    @cached_property
    def layers(self) -> frozenset[str]:
        return frozenset(layer for name in self.beside.copies if (layer := self.layer_of(name)) is not None)

    def by_layer(self, flow: Flow) -> Flow:
        """``flow`` with layers where it has the tensors that they are part of."""
        found = Flow()
        for name, part in flow.weights.items():
            layer = self.layer_of(name) or name
            found.weights[layer] = found.weights.get(layer, 0.0) + part
        for (site, reader), part in flow.roundings.items():
            key = (site, self.layer_of(reader) or reader)
            found.roundings[key] = found.roundings.get(key, 0.0) + part
        return found

    def rounding_maker(self, site: str) -> str | None:
        """What, if kept, leaves ``site`` unrounded for all: the tensor of the node that rounds what it makes; None where
        it is rounded for each reader.
        """
        value = self._made.get(site)
        node = value.producer() if value is not None else None
        while node is not None and node.op_type in ("Relu", "Clip") and node.inputs[0] is not None:
            previous = node.inputs[0].producer()
            if previous is None:
                break
            node = previous
        name = str(node.outputs[0].name) if node is not None else ""
        layer = self._made.get(self.layer_of(name) or name)
        maker = layer.producer() if layer is not None else None
        if maker is None or maker.op_type in placement.PRODUCTS:
            return None
        copy = self.beside.copies.get(name)
        return name if copy is not None and copy.reads else None


def changes(
    engine: EngineSection,
    section: QuantizeSection,
    tensors: Sequence[TensorError],
    flow: Flow,
    sources: Sources,
    observed: Observed,
    *,
    searched: bool,
    learnt_db: LearntDb,
) -> tuple[Advice, ...]:
    """At most `CHANGES`, those with the largest gain first, a search last; arguments as of `compiler.quantize.explain.explain`.

    Args:
        learnt_db: measures what learning gains.
    """
    flow = sources.by_layer(flow)
    kept = list(_kept(engine, flow, sources))
    found = [*kept[:CHANGES], *_learnt(engine, section, flow, sources, learnt_db)]
    if engine.ranged:
        found += _smoothed(section, flow, sources, observed)
        found += _ranged(section, tensors, flow, sources, observed)
    worthwhile = [change for change in found if change.gain_db >= LEAST_DB]
    best = sorted(worthwhile, key=lambda change: -change.gain_db)[:CHANGES]
    # The gain of a search is that of many changes at once: it stands last, whatever it is.
    shared = [] if searched or (kept and kept[0].gain_db >= DOMINANT_DB) else _searched(flow, sources)
    return (*best[: CHANGES - len(shared)], *shared)


def gain_db(part: float) -> float:
    """What taking away ``part`` of the noise raises a ratio by.

    >>> round(gain_db(0.5), 2), gain_db(1.0)
    (3.01, 30.0)
    """
    return min(-10 * math.log10(max(1 - part, 1e-9)), _MOST_DB)


# --- layers in high precision ---------------------------------------------------------------------------------------


def removed(keep: Collection[str], flow: Flow, sources: Sources) -> float:
    """The part of the noise that goes when the layers that make the tensors ``keep`` stay in high precision.

    A rounding goes where nobody asks for it any more: neither who makes the tensor, nor who reads it.
    """
    part = sum(share for name, share in flow.weights.items() if name in keep)
    for (site, reader), share in flow.roundings.items():
        maker = sources.rounding_maker(site)
        read = reader not in keep and (reader in sources.layers or maker is None)
        if not read and (maker is None or maker in keep):
            part += share
    return part


def _kept(engine: EngineSection, flow: Flow, sources: Sources) -> Iterator[Advice]:
    """Lists of layers to keep, those with the largest gain first; none has a layer of another."""
    sets = {frozenset({name}) for name in sources.layers}
    for site in {site for site, _ in flow.roundings}:
        maker = sources.rounding_maker(site)
        readers = {reader for read, reader in flow.roundings if read == site and reader in sources.layers}
        sets.add(frozenset(readers | ({maker} if maker is not None else set())))
    gains = {keep: gain_db(removed(keep, flow, sources)) for keep in sets if keep and not keep >= sources.layers}
    used: set[str] = set()
    for keep in sorted(gains, key=lambda keep: (-gains[keep], len(keep), sorted(keep))):
        least = min(
            (other for other in gains if other < keep and gains[other] >= ENOUGH * gains[keep]), key=len, default=keep
        )
        if used & least or gains[least] < LEAST_DB:
            continue
        used |= least
        names = sources.in_order(least)
        listed = ", ".join(f"'{name}'" for name in names)
        yield Advice(change=f"keep {listed} in high precision", lines=_keep_lines(engine, names), gain_db=gains[least])


def _keep_lines(engine: EngineSection, names: Sequence[str]) -> tuple[str, ...]:
    lines = ["[[engines]]", f'precision = "{engine.precision.value}"']
    if engine.name is not None:
        lines.append(f"name = {json.dumps(engine.name)}")
    return (*lines, f"keep = {json.dumps([*engine.keep, *names])}")


def _searched(flow: Flow, sources: Sources) -> list[Advice]:
    """`[search]`, where several layers share the noise."""
    alone = {name: removed({name}, flow, sources) for name in sources.layers}
    for (_, reader), part in flow.roundings.items():
        if reader in alone:
            alone[reader] = max(alone[reader], part)
    keep: set[str] = set()
    part = 0.0
    # More than half of the layers in high precision is no longer the engine that was asked for.
    for name in sorted(alone, key=lambda name: (-alone[name], name))[: len(sources.layers) // 2]:
        keep.add(name)
        part = removed(keep, flow, sources)
        if part >= ENOUGH:
            break
    if len(keep) < 3:
        return []
    change = (
        f"let [search] choose what stays in high precision: {len(keep)} of {len(sources.layers)} layers share "
        f"{100 * part:.0f} % of the noise"
    )
    return [Advice(change=change, lines=("[search]",), gain_db=gain_db(part))]


def _learnt(
    engine: EngineSection,
    section: QuantizeSection,
    flow: Flow,
    sources: Sources,
    learnt_db: LearntDb,
) -> list[Advice]:
    """Roundings of weights that are learnt, where they are to nearest. In FP8 beside rounded activations none is."""
    by_itself = engine.precision is Precision.INT4
    if section.rounding != "nearest" and (by_itself or section.rounding != "auto"):
        return []
    if engine.precision is Precision.FP8 and not engine.weights_only:
        return []
    shares = {name: share for name, share in flow.weights.items() if name in sources.layers and share > 0}
    if gain_db(sum(shares.values())) < LEAST_DB:
        return []
    ranked = sorted(shares, key=shares.__getitem__, reverse=True)
    gains = dict(zip(ranked, learnt_db(ranked[:LEARNT]), strict=False))
    least = min(gains.values())
    part = sum(share * (1 - 10 ** (-gains.get(name, least) / 10)) for name, share in shares.items())
    change = "learn how to round weights, from what they are multiplied by"
    lines = ("[quantize]", f'rounding = "{"auto" if by_itself else "gptq"}"')
    return [Advice(change=change, lines=lines, gain_db=gain_db(part))]


# --- ranges ---------------------------------------------------------------------------------------------------------


def _smoothed(section: QuantizeSection, flow: Flow, sources: Sources, observed: Observed) -> list[Advice]:
    """SmoothQuant, where outlying channels make most of the noise of what matrix products read."""
    part, names = 0.0, []
    for site in {site for site, _ in flow.roundings}:
        found, rounding = observed.get(site), sources.beside.roundings[site]
        readers = sources.products(site)
        # The expected error is that of the products, to which the rounding of the weight belongs.
        share = sum(share for (read, _), share in flow.roundings.items() if read == site)
        share += sum(flow.weights.get(reader, 0.0) for read, reader in flow.roundings if read == site)
        if found is None or found.channels is None or rounding.seen_as is None or not readers:
            continue
        if outlying(found.channels.peaks) < OUTLYING:
            continue
        mean_squares = found.channels.squares * (found.channels.peaks.size / max(found.count, 1))
        remedy = smooth.choose(found.channels.peaks, mean_squares, np.concatenate(readers, axis=1), splitting="off")
        if remedy is not None:
            part += share * (1 - 10 ** (-remedy.gain_db / 10))
            names.append(site)
    if not names or section.smooth == "on":
        return []
    count = f"'{names[0]}'" if len(names) == 1 else f"{len(names)} tensors"
    change = f"move the outlier channels of {count} into the weights (SmoothQuant)"
    return [Advice(change=change, lines=("[quantize]", 'smooth = "on"'), gain_db=gain_db(part))]


def _ranged(
    section: QuantizeSection, tensors: Sequence[TensorError], flow: Flow, sources: Sources, observed: Observed
) -> list[Advice]:
    """The method, of the two at the ends, that makes the expected error of all ranges together smaller."""
    fallen = {"minmax": 0.0, "mse": 0.0}
    for tensor in tensors:
        found = observed.get(tensor.name)
        share = flow.of(tensor.name)[1]
        if not share or tensor.threshold is None or found is None or found.bins is None or not found.peak:
            continue
        rounding = sources.beside.roundings[tensor.name]
        if rounding.seen_as is None or rounding.broken:
            continue
        now = expected_error(found.bins, found.peak, tensor.threshold, tensor.threshold / rounding.levels)
        tried = found.peak * 2.0 ** (-np.arange(33) / 4)
        steps = thresholds.steps(tried, found, symmetric=section.activations != "asymmetric")
        errors = [
            expected_error(found.bins, found.peak, float(threshold), float(step))
            for threshold, step in zip(tried, steps, strict=True)
        ]
        whole, best = errors[0], min(errors)
        if now > 0:
            fallen["minmax"] += share * (1 - whole / now)
            fallen["mse"] += share * (1 - min(best / now, 1.0))
    fallen.pop(section.method, None)
    method = max(fallen, key=lambda name: fallen[name])
    if fallen[method] <= 0:
        return []
    why = "clips nothing" if method == "minmax" else "gives up tails for finer steps"
    return [
        Advice(
            change=f"choose ranges by {method}, which {why}",
            lines=("[quantize]", f'method = "{method}"'),
            gain_db=gain_db(fallen[method]),
        )
    ]


def expected_error(bins: Array, peak: float, threshold: float, step: float) -> float:
    """Mean square error of values, of which ``bins`` counts magnitudes, rounded in steps of ``step`` up to ``threshold``.

    A step of size d leaves d^2 / 12, and of a value below half a step its square; a clipped value leaves what is cut off.
    """
    place = np.flatnonzero(bins[:FINITE_BINS])
    counts = bins[place].astype(np.float64)
    middle = (edges()[place] + np.minimum(edges()[place + 1], peak)) / 2
    inside = np.minimum(middle**2, step**2 / 12)
    return float(np.where(middle > threshold, (middle - threshold) ** 2, inside) @ counts / max(counts.sum(), 1.0))


def outlying(peaks: Array) -> float:
    """The largest of the peaks of channels over the median one; 1 where all are zero.

    >>> outlying(np.array([1.0, 2.0, 60.0], np.float32))
    30.0
    """
    used = peaks[peaks > 0]
    return float(used.max() / np.median(used)) if used.size else 1.0
