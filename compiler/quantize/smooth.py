"""Take outliers out of activations: into weights, where a scale per channel can hold them, or past the rounding.

A few channels of a transformer's activations are many times the others (after a LayerNormalization, after a GELU); one
scale for all leaves the others a handful of levels. Two remedies, for each activation the one that is expected to pay:

- *Smooth.* ``X W = (X / s) (s W)`` for any positive ``s`` per channel: divided by ``s = peak(X)^a / peak(W)^(1 - a)`` the
  channels of X come close to each other, and the rows of W pay for it. Source: Xiao et al. 2023, SmoothQuant
  (arXiv:2211.10438). There, ``a`` is one setting for the model; here it is chosen for each activation by the error that is
  to be expected, and nothing is done where that gains less than `LEAST_GAIN_DB`.
- *Split.* ``X W = X' W + X_o W_o``, where the few channels ``o`` are multiplied in high precision and X' has zeros there.
  Source: Dettmers et al. 2022, LLM.int8() (arXiv:2208.07339); there the channels are looked for in every call, here they
  are known from calibration. It costs a small product and a sum, so it must gain `LEAST_GAIN_OF_SPLIT_DB` over smoothing.

Measured on all-MiniLM-L6-v2 (36 layers, cosine of the embedding to FP32's): 0.979 without, 0.998 smoothed, 0.999 with
the products that the feed-forward layers end in split as well.

Why a Mul of its own and not folded into the LayerNormalization before: its output also feeds the residual sum.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compiler import onnx_files
from compiler.onnx_files import FreeNames
from compiler.quantize import graphs, placement, thresholds
from compiler.quantize.observe import Observed, TensorStatistics
from compiler.quantize.placement import Placement
from compiler.recipe import Switch
from compiler.spec import Array

STRENGTHS = tuple(round(0.5 + 0.05 * step, 2) for step in range(11))
"""The values of ``a`` that are tried: 0.5 to 1."""

LEAST_GAIN_DB = 3.0

SPLITS = (8, 16, 32)
"""How many channels may be multiplied in high precision; at most `MOST_SPLIT` of all."""

MOST_SPLIT = 1 / 16

LEAST_GAIN_OF_SPLIT_DB = 3.0
"""Beyond the best that smoothing does; and for each doubling of the channels beyond the first 1 dB more."""

COLUMNS = 512
"""Of a weight: by so many, evenly spaced, remedies are compared."""

ANY_GAIN_DB = 0.01

_FLOOR = 1e-4
"""Channels count as at least this share of the largest, so that a dead one gets a factor that is a number."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Remedy:
    """What to do to one activation."""

    factors: Array
    """float32 [K]: what channels are divided by; infinity for those that are split off."""
    gain_db: float
    """Expected fall of the error of its products."""

    @property
    def split(self) -> Array:
        """Which channels are multiplied in high precision: int64 [M]."""
        return np.flatnonzero(np.isinf(self.factors))


@dataclass(frozen=True, kw_only=True)
class Smoothed:
    """What `smooth` did."""

    made: Observed
    """What is known of each activation that it made, by name: bounds of its extremes."""
    gains_db: tuple[float, ...]
    """Expected fall of the error of the products of each."""
    split: int
    """How many of them have channels that are multiplied in high precision."""
    apart: tuple[ir.Node, ...]
    """The products of those channels, which nobody is to round."""
    factors: Mapping[str, Array]
    """By name of what was made, as of `Remedy`."""


NOTHING = Smoothed(made={}, gains_db=(), split=0, apart=(), factors={})


def smooth(
    graph: ir.Graph, placed: Placement, observed: Observed, *, smoothing: Switch = "auto", splitting: Switch = "auto"
) -> Smoothed:
    """Apply both remedies to activations of ``placed`` where that pays, in place; ``placed`` is void after it.

    Only to activations that are rounded for matrix products alone: others have a place in a chain of integers.
    """
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node, index in placed.edges:
        value = node.inputs[index]
        if value is not None and node.op_type in placement.PRODUCTS:
            readers.setdefault(value, []).append(node)
    made: dict[str, TensorStatistics] = {}
    gains, split, factors = [], 0, dict[str, Array]()
    apart: list[ir.Node] = []
    for value, nodes in readers.items():
        found = observed[str(value.name)]
        weights = [rows for node in nodes if (rows := placement.input_rows(node)) is not None]
        shared = any(len(stored.uses()) > 1 for node in nodes if (stored := placement.stored((node, 1))) is not None)
        if found.channels is None or len(weights) < len(nodes) or shared:  # what is tied stays tied
            continue
        peaks_of = found.channels.peaks
        mean_squares = found.channels.squares * (peaks_of.size / max(found.count, 1))
        remedy = choose(
            peaks_of, mean_squares, np.concatenate(weights, axis=1), smoothing=smoothing, splitting=splitting
        )
        for node in nodes:
            if (stored := placement.stored((node, 1))) is not None:
                onnx_files.release(stored)
        if remedy is None:
            continue
        name = _apply(graph, value, nodes, remedy, apart)
        made[name] = divided(found, remedy.factors)
        factors[name] = remedy.factors
        gains.append(remedy.gain_db)
        split += remedy.split.size > 0
    return Smoothed(made=made, gains_db=tuple(gains), split=split, apart=tuple(apart), factors=factors)


def divided(statistics: TensorStatistics, factors: Array) -> TensorStatistics:
    """Bounds of the extremes of a tensor whose channels are divided by ``factors`` [K].

    >>> from compiler.quantize.observe import Channels
    >>> channels = Channels(peaks=np.array([1.0, 8.0]), squares=np.ones(2))
    >>> found = divided(TensorStatistics(low=-2.0, high=8.0, channels=channels), np.array([1.0, 4.0]))
    >>> found.low, found.high
    (-1.0, 2.0)
    """
    assert statistics.channels is not None, "measured by channel"
    peaks = statistics.channels.peaks
    low, high = (
        float((np.minimum(peaks, max(reach, 0.0)) / factors).max()) for reach in (-statistics.low, statistics.high)
    )
    return TensorStatistics(low=-low, high=high)


def choose(
    peaks: Array, mean_squares: Array, weight: Array, *, smoothing: Switch = "auto", splitting: Switch = "auto"
) -> Remedy | None:
    """The remedy with the least expected error that is worth what it costs; None if there is none.

    Args:
        peaks: largest magnitude of each channel of the activation, [K].
        mean_squares: mean of its squares, [K].
        weight: the matrices that it is multiplied by, side by side, [K, N].
        smoothing: whether channels may be divided: never, where it is worth a Mul, or wherever the error falls at all.
        splitting: likewise, whether channels may be multiplied in high precision.

    >>> peaks, weight = np.array([1.0, 1.0, 50.0]), np.array([[1.0], [1.0], [0.02]])
    >>> found = choose(peaks, peaks**2 / 3, weight)
    >>> (found.factors / found.factors[0]).round().tolist(), found.gain_db > 20
    ([1.0, 1.0, 50.0], True)
    """
    ones = np.ones(len(peaks))
    products = Products(peaks, mean_squares, np.abs(weight).astype(np.float32))
    before = products.error(ones)
    if not before > 0:
        return None
    smooths, splits = smoothing != "off", splitting != "off"
    factors, error = products.best(STRENGTHS) if smooths else (ones, before)
    least_db = LEAST_GAIN_DB if smoothing == "auto" else ANY_GAIN_DB
    best = (factors, error) if before / error >= _ratio(least_db) else (ones, before)
    reach = peaks * products.rows
    least_db = LEAST_GAIN_OF_SPLIT_DB if splitting == "auto" else ANY_GAIN_DB
    for count in SPLITS if splits else ():
        if count > MOST_SPLIT * len(peaks):
            break
        # By what one scale must span for them, and by what they mean for the products.
        sets = {tuple(np.sort(np.argsort(-order, kind="stable")[count:])) for order in (reach, peaks)}
        for kept in sorted(sets):
            rest = np.array(kept)
            if not peaks[rest].any():
                continue
            part = products.of(rest)
            some, error = part.best(STRENGTHS[::2]) if smooths else (ones[rest], part.error(ones[rest]))
            if error > 0 and best[1] / error >= _ratio(least_db):
                factors = np.full(len(peaks), np.inf)
                factors[rest] = some
                best, least_db = (factors, error), 1.0
    if best[1] == before:
        return None
    return Remedy(factors=best[0].astype(np.float32), gain_db=float(10 * np.log10(before / best[1])))


def _ratio(db: float) -> float:
    return float(10 ** (db / 10))


class Products:
    """What one activation [.., K] is multiplied by, as far as the expected error depends on it.

    What depends on the largest of a column after every division is estimated from `COLUMNS` of them.
    """

    def __init__(
        self,
        peaks: Array,
        mean_squares: Array,
        sizes: Array,
        *,
        row_squares: Array | None = None,
        positions: Array | None = None,
        levels: float = thresholds.LEVELS,
    ) -> None:
        """
        Args:
            peaks: as of `choose`.
            mean_squares: as of `choose`.
            sizes: magnitudes of the weight, float32 [K, N]; of a convolution, the largest over the positions of its kernel.
            row_squares: [K], over all positions; default: of ``sizes``.
            positions: [N]; default: one.
            levels: how many steps of the activation its peak is.
        """
        self._peaks, self._squares, self._levels = peaks.astype(np.float64), mean_squares, levels
        self.rows: Array = sizes.max(axis=1).astype(np.float64)
        """[K]: the largest magnitude of each row of the weight."""
        self._row_squares = (
            np.einsum("kn,kn->k", sizes, sizes, dtype=np.float64) if row_squares is None else row_squares
        )
        every = -(-sizes.shape[1] // COLUMNS)
        self._sizes = np.ascontiguousarray(sizes[:, ::every])
        self._positions = 1 if positions is None else positions[::every]
        self._columns = sizes.shape[1] / self._sizes.shape[1]

    def of(self, channels: Array) -> Products:
        part = copy.copy(self)
        part._peaks, part._squares = self._peaks[channels], self._squares[channels]
        part.rows, part._row_squares, part._sizes = (
            self.rows[channels],
            self._row_squares[channels],
            self._sizes[channels],
        )
        return part

    def error(self, factors: Array) -> float:
        """See `expected_error`."""
        activation_step = (self._peaks / factors).max() / self._levels
        weight_steps = (self._sizes * factors[:, None].astype(np.float32)).max(axis=0) / thresholds.LEVELS
        of_activation = activation_step**2 * np.sum(self._row_squares * factors**2)
        of_weight = (
            self._columns
            * np.sum(self._positions * weight_steps**2, dtype=np.float64)
            * np.sum(self._squares / factors**2)
        )
        return float(of_activation + of_weight) / 12

    def best(self, strengths: Sequence[float]) -> tuple[Array, float]:
        """Factors [K] to divide channels by, of those for ``strengths`` the best, or ones; and the error expected then."""
        channel = np.maximum(self._peaks, self._peaks.max() * _FLOOR)
        row = np.maximum(self.rows, self.rows.max() * _FLOOR)
        factors = np.ones_like(channel)
        least = self.error(factors)
        for strength in strengths if least > 0 else ():
            tried = channel**strength / row ** (1 - strength)
            tried /= np.exp(np.log(tried).mean())
            error = self.error(tried)
            if error < least:
                least, factors = error, tried
        return factors, least


def expected_error(peaks: Array, mean_squares: Array, weight: Array, factors: Array) -> float:
    """Mean square error of one row of products, summed over its columns, if ``X / factors`` and ``factors W`` are rounded.

    Rounding to steps of size d is noise of variance d^2 / 12. That of an activation reaches column n by way of
    W[k, n] factors[k], that of a weight by way of x[k] / factors[k].
    """
    return Products(peaks, mean_squares, np.abs(weight).astype(np.float32)).error(factors)


def _apply(graph: ir.Graph, value: ir.Value, nodes: Sequence[ir.Node], remedy: Remedy, apart: list[ir.Node]) -> str:
    """Let ``nodes`` read ``value / factors``, with weights that make up for it, and add what is split off."""
    names = FreeNames(graph)
    name = names.free(f"{value.name}_smoothed")
    inverse = graphs.register(graph, names.free(f"{name}_factors"), (1 / remedy.factors).astype(np.float32))
    divided = graphs.like(value, name, ir.DataType.FLOAT)
    added = [ir.node("Mul", [value, inverse], outputs=[divided], name=name)]
    split, outliers = remedy.split, None
    if split.size:
        outliers = ir.Value(name=names.free(f"{value.name}_outliers"), type=ir.TensorType(ir.DataType.FLOAT))
        if value.shape is not None:
            outliers.shape = ir.Shape([*value.shape[:-1], int(split.size)])
        places = graphs.register(graph, names.free(f"{outliers.name}_channels"), split.astype(np.int64))
        added.append(ir.node("Gather", [value, places], {"axis": -1}, outputs=[outliers], name=outliers.name))
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, added)
    else:
        graph.insert_before(graph[0], added)
    factors = np.where(np.isinf(remedy.factors), 0, remedy.factors)
    for number, node in enumerate(nodes):
        reader, place = placement.reader((node, 1))
        weight = reader.inputs[place]
        assert weight is not None and weight.const_value is not None, "only constants are placed as weights"
        matrix = weight.const_value.numpy()
        rows_last = placement.weight_axis((node, 1)) == 0
        if outliers is not None:
            rows = (matrix.T if rows_last else matrix)[split] * _alpha(node)
            apart.append(_add_product(graph, names, node, outliers, np.ascontiguousarray(rows, np.float32)))
        scaled = matrix * (factors if rows_last else factors[:, None])
        node.replace_input_with(0, divided)
        made = graphs.register(graph, names.free(f"{weight.name}_{name}_{number}"), scaled.astype(np.float32))
        reader.replace_input_with(place, made)
        graphs.forget_unused(graph, weight)
    return name


def _alpha(node: ir.Node) -> np.float32:
    alpha = node.attributes.get("alpha")
    return np.float32(alpha.as_float() if alpha is not None else 1.0)


def _add_product(graph: ir.Graph, names: FreeNames, node: ir.Node, outliers: ir.Value, rows: Array) -> ir.Node:
    """Add ``outliers rows`` to what ``node`` makes, after the bias that follows it, under the name that this has."""
    product = node.outputs[0]
    last = node
    uses = list(product.uses())
    if node.op_type == "MatMul" and len(uses) == 1 and not product.is_graph_output():
        add, index = uses[0]
        if add.domain == "" and add.op_type == "Add" and graphs.weight(add.inputs[1 - index]) is not None:
            last = add
            product.name = names.free(f"{product.name}_narrow")
    output = last.outputs[0]
    name = str(output.name)
    weight = graphs.register(graph, names.free(f"{node.name}_outliers_weight"), rows)
    wide = graphs.like(output, names.free(f"{name}_outliers"), ir.DataType.FLOAT)
    total = graphs.like(output, name, ir.DataType.FLOAT)
    output.replace_all_uses_with(total, replace_graph_outputs=True)
    output.name = names.free(f"{name}_narrow")
    multiply = ir.node("MatMul", [outliers, weight], outputs=[wide], name=wide.name)
    add = ir.node("Add", [output, wide], outputs=[total], name=names.free(f"{name}_total"))
    graph.insert_after(last, [multiply, add])
    return multiply
