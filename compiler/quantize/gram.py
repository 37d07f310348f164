"""Gram matrices of what layers read: what an error of their weights does to their outputs, exactly.

A layer that computes ``Y = X W`` with ``W + D`` instead is wrong by ``X D``, of mean square ``tr(D^T G D)`` for ``G = X^T X
/ rows``: K by K numbers stand for all samples. Every rounding in `gptq`, `adaround` and `awq` is chosen by it, and judged
by it. A convolution multiplies patches of what it reads, so its X has a row for each place of its output.

One sample is run at a time, in the order of the set, and the float32 matrix of every `TOGETHER` rows or so is added to
float32 sums: the result does not depend on how a caller would batch samples. Of the samples, every `HELD_OUT`-th goes to a
matrix of its own, so that a choice can be judged on samples that it was not made on. What a mask hides, padding above all,
is left out.

Memory: at most `GRAM_BYTES` of matrices at a time, and one sample's activations. What does not fit is gathered in
further passes over the samples, in the order of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.lib.stride_tricks import sliding_window_view
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from compiler import onnx_files
from compiler.data import Samples
from compiler.quantize import placement
from compiler.quantize.observe import chosen
from compiler.spec import Array, CalibrationSet, Feeds, OnnxModel, OpenModel, Progress, no_progress

SAMPLES = 128
"""At most this many samples, evenly spaced. A layer of K inputs wants some multiple of K rows, and a sample of a sequence
or an image gives tens to hundreds."""

HELD_OUT = 4
"""Every so many-th sample is held out."""

ROWS = 4096
"""Rows of one sample, evenly spaced over all it has, that are looked at: enough of an image of any size."""

TOGETHER = 512
"""Rows that are multiplied at once: adding a matrix of K by K numbers for each sample of a few rows took most of the time."""

GRAM_BYTES = 1 << 30
"""Matrices that are held at a time; a layer whose own take more, from K = 11585 on, has none."""

LARGEST_PATCH = 4608
"""Of a convolution, K = channels / group * kernel elements, beyond which it has none: 3 x 3 over 512 channels."""

DAMPING = 0.03
"""Of the mean diagonal, added to the diagonal. Frantar et al. 2023, GPTQ (arXiv:2210.17323), section 3.3, step 3, add 0.01
to the matrices of 262144 rows; a calibration set here gives some thousand, to which less fits the weights too closely.
Measured on all-MiniLM-L6-v2 in INT4 (128 samples), the embedding of other samples against FP32: 16.6 dB for 0.03, 16.3 dB
for 0.1, 15.6 dB for 0.3, and 11.5 dB with nearest."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """How a convolution cuts patches; a tuple has one number for each spatial axis, ``pads`` two, begins before ends."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | None
    """None: as many as ``same`` asks."""
    same: str = ""
    """``SAME_UPPER`` or ``SAME_LOWER``."""


@dataclass(frozen=True, kw_only=True)
class Reads:
    """The rows that a weight is multiplied by: layers with equal ones share a Gram matrix."""

    tensor: str
    width: int
    """K: how many numbers a row has."""
    groups: int = 1
    window: Window | None = None
    """None of a matrix product, whose rows are the tensor's last axis."""

    @property
    def nbytes(self) -> int:
        """Of both matrices."""
        return 2 * 4 * self.groups * self.width**2


@dataclass(frozen=True, kw_only=True, eq=False)
class Gram:
    """``X^T X / rows`` over the samples that fit, and over those held out; with less than `HELD_OUT` samples, the same."""

    fit: Array
    """float32 [groups, K, K]."""
    held: Array
    """float32 [groups, K, K]."""
    magnitude: Array
    """float32 [groups, K]: mean of abs(X) over the samples that fit."""
    share: float = 0.0
    """Of rows that are held out, among all."""

    @property
    def finite(self) -> bool:
        """Whether there is anything to go by: no mask, no overflow, and a row that is not zero."""
        with np.errstate(invalid="ignore"):
            sums = float(self.fit.sum(dtype=np.float64)), float(self.held.sum(dtype=np.float64))
        return bool(np.isfinite(sums).all() and self.fit.any() and self.held.any())

    @property
    def all(self) -> Array:
        """Over all samples: float32 [groups, K, K]."""
        if not self.share:
            return self.fit
        found: Array = self.fit * np.float32(1 - self.share) + self.held * np.float32(self.share)
        return found

    def divided(self, factors: Array) -> Gram:
        """That of ``X / factors``; ``factors`` [K] are positive.

        >>> gram = Gram(fit=np.full((1, 2, 2), 8.0), held=np.full((1, 2, 2), 8.0), magnitude=np.array([[2.0, 2.0]]))
        >>> gram.divided(np.array([1.0, 2.0])).fit.tolist()
        [[[8.0, 4.0], [4.0, 2.0]]]
        """
        pairs = (factors[:, None] * factors).astype(np.float32)
        return replace(self, fit=self.fit / pairs, held=self.held / pairs, magnitude=self.magnitude / factors)


def error(weight: Array, rounded: Array, gram: Array) -> float:
    """``tr((W - Q)^T G (W - Q))``: mean square error of a row of outputs, summed over them.

    Args:
        weight: [N, K], one row for each output channel.
        rounded: [N, K], what it becomes.
        gram: [K, K].

    >>> error(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]), np.array([[2.0, 1.0], [1.0, 3.0]]))
    3.0
    """
    off = weight - rounded
    return float(np.einsum("nk,nk->", off @ gram, off, dtype=np.float64))


def mean(grams: Sequence[Gram]) -> Gram:
    """That of several layers that share a weight."""
    if len(grams) == 1:
        return grams[0]
    share = np.float32(1 / len(grams))
    return Gram(
        fit=np.sum([gram.fit for gram in grams], axis=0) * share,
        held=np.sum([gram.held for gram in grams], axis=0) * share,
        magnitude=np.sum([gram.magnitude for gram in grams], axis=0) * share,
        share=float(np.mean([gram.share for gram in grams])),
    )


def damped(gram: Array) -> Array:
    """``gram`` [K, K] plus `DAMPING` of its mean diagonal, and of an input that was always zero the mean itself: positive
    definite, and not led astray by what few samples happen to have in common.

    >>> damped(np.array([[2.0, 0.0], [0.0, 0.0]])).round(2).tolist()
    [[2.03, 0.0], [0.0, 1.03]]
    """
    found = gram.copy()
    diagonal = found.reshape(-1)[:: len(found) + 1]
    mean = diagonal.mean(dtype=np.float64)
    diagonal[diagonal == 0] = mean
    diagonal += DAMPING * mean
    return found


def reads_of(node: ir.Node, width: int, *, axes: int = 2) -> Reads | None:
    """What the constant of ``node`` is multiplied by, if its Gram matrix can be had.

    Args:
        node: a convolution or matrix product, with a constant as its second input.
        width: length of the constant's axis that a product sums over.
        axes: how many the constant has.
    """
    activation = node.inputs[0]
    if activation is None or not activation.name:
        return None
    name, attributes = activation.name, node.attributes
    if node.op_type == "Conv":
        found = _patches(node, name)
    else:
        turned = node.op_type == "Gemm" and "transA" in attributes and attributes["transA"].as_int() != 0
        if node.op_type not in placement.PRODUCTS or axes != 2 or turned:
            return None
        found = Reads(tensor=name, width=width)
    return found if found is not None and found.nbytes <= GRAM_BYTES else None


def _patches(node: ir.Node, name: str) -> Reads | None:
    weight = node.inputs[1]
    shape = tuple(weight.const_value.shape.numpy()) if weight is not None and weight.const_value is not None else ()
    kernel = shape[2:]
    if not kernel:
        return None

    def ints(attribute: str, default: int, count: int) -> tuple[int, ...]:
        found = node.attributes.get(attribute)
        return tuple(found.as_ints()) if found is not None else (default,) * count

    auto = node.attributes.get("auto_pad")
    same = auto.as_string() if auto is not None and auto.as_string().startswith("SAME") else ""
    group = node.attributes.get("group")
    width = int(np.prod(shape[1:]))
    if width > LARGEST_PATCH:
        return None
    window = Window(
        kernel=kernel,
        strides=ints("strides", 1, len(kernel)),
        dilations=ints("dilations", 1, len(kernel)),
        pads=None if same else ints("pads", 0, 2 * len(kernel)),
        same=same,
    )
    return Reads(tensor=name, width=width, groups=group.as_int() if group is not None else 1, window=window)


# --- gathering ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Source:
    """Runs ``model`` on calibration samples for the Gram matrices that somebody asks for."""

    model: OnnxModel
    data: CalibrationSet
    open_model: OpenModel
    threads: int
    out_dir: Path
    """Where a model that shows its tensors is kept while it runs."""
    samples: int = SAMPLES
    progress: Progress = no_progress
    _kept: dict[Reads, Gram] = field(default_factory=dict)

    def stream(self, wanted: Sequence[Sequence[Reads]]) -> Iterator[Mapping[Reads, Gram]]:
        """For each of ``wanted``, in their order, the Gram matrices of what it reads; those that are not finite are left
        out. Only the last ones stay: ask for them again and nothing runs.

        Raises:
            BuildError: the model cannot be run.
        """
        place = 0
        while place < len(wanted):
            group: dict[Reads, None] = {}
            end = place
            while end < len(wanted):
                more = {**group, **dict.fromkeys(wanted[end])}
                if end > place and sum(reads.nbytes for reads in more) > GRAM_BYTES:
                    break
                group, end = more, end + 1
            if missing := group.keys() - self._kept.keys():
                self._kept = {reads: gram for reads, gram in self._kept.items() if reads in group}
                self._kept |= self._gather([reads for reads in group if reads in missing])
            for asked in wanted[place:end]:
                yield {reads: self._kept[reads] for reads in asked if self._kept[reads].finite}
            place = end

    def forget(self) -> None:
        """Free what is kept."""
        self._kept = {}

    def _gather(self, wanted: Sequence[Reads]) -> dict[Reads, Gram]:
        stored = Samples(self.data.path)
        indices = chosen(len(stored), min(self.samples, SAMPLES))
        sums = {reads: (_Sums(reads), _Sums(reads)) for reads in wanted}
        path, weights = self._shown(sorted({reads.tensor for reads in wanted}))
        try:
            with closing(self.open_model(path, threads=self.threads, weights=weights)) as runner:
                for done, index in enumerate(indices, start=1):
                    feeds: Feeds = stored.feeds(index)
                    seen = {**feeds, **runner.run(feeds)}
                    held = done % HELD_OUT == 0
                    for reads in wanted:
                        sums[reads][held].add(_without_padding(seen[reads.tensor], feeds, reads))
                    self.progress(done, len(indices))
        finally:
            path.unlink(missing_ok=True)
        return {reads: _means(*both) for reads, both in sums.items()}

    def _shown(self, names: Sequence[str]) -> tuple[Path, Path | None]:
        """A model whose outputs are the tensors ``names``, as far as it does not read them itself; the folder of its weights."""
        network = onnx_files.read(self.model.path)
        LiftConstantsToInitializersPass(lift_all_constants=True)(network)
        graph = network.graph
        if any(output.dtype is None for node in graph for output in node.outputs):
            ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(network)
        made = {output.name: output for node in graph for output in node.outputs}
        shown = [made[name] for name in names if name in made]
        for value in shown:
            value.dtype = ir.DataType.FLOAT
        if shown:
            graph.outputs[:] = shown
        path = self.out_dir / "gram.onnx"
        return path, onnx_files.write_graph(network, path)


def _without_padding(tensor: Array, feeds: Feeds, reads: Reads) -> Array:
    """The rows of a product's input that no mask hides, [.., K] or [rows, K].

    A mask is an input named so, of zeros and ones, of the shape of the rows: what it hides is of no account to the model,
    and in a set of padded samples it is most of the rows.
    """
    if reads.window is not None:
        return tensor
    for name, mask in feeds.items():
        if name.lower().endswith("mask") and mask.shape == tensor.shape[:-1] and np.isin(mask, (0, 1)).all():
            kept: Array = tensor[mask != 0]
            return kept
    return tensor


class _Sums:
    """Of the rows so far."""

    def __init__(self, reads: Reads) -> None:
        self.rows = 0
        self.squares = np.zeros((reads.groups, reads.width, reads.width), np.float32)
        self.magnitudes = np.zeros((reads.groups, reads.width), np.float64)
        self._reads = reads
        self._waiting: list[Array] = []

    def add(self, tensor: Array) -> None:
        rows = rows_of(tensor, self._reads)
        if not rows.shape[1]:
            return
        self.rows += rows.shape[1]
        self._waiting.append(rows)
        if sum(more.shape[1] for more in self._waiting) >= TOGETHER:
            self.settle()

    def settle(self) -> None:
        """Add what waits for company."""
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting, axis=1)
        self._waiting.clear()
        with np.errstate(over="ignore", invalid="ignore"):
            for group, of_group in enumerate(rows):
                self.squares[group] += of_group.T @ of_group
            self.magnitudes += np.abs(rows).sum(axis=1, dtype=np.float64)


def _means(fit: _Sums, held: _Sums) -> Gram:
    for sums in (fit, held):
        sums.settle()
    fit.squares /= np.float32(max(fit.rows, 1))
    if held.rows:
        held.squares /= np.float32(held.rows)
    return Gram(
        fit=fit.squares,
        held=held.squares if held.rows else fit.squares,
        magnitude=(fit.magnitudes / max(fit.rows, 1)).astype(np.float32),
        share=held.rows / max(fit.rows + held.rows, 1),
    )


def rows_of(tensor: Array, reads: Reads) -> Array:
    """What a layer multiplies its weight by, of one sample: float32 [groups, rows, K], at most `ROWS` of the rows.

    Of a convolution, a row is a patch: channels of the group, then the axes of the kernel, as its weight has them.

    >>> rows_of(np.arange(6.0).reshape(1, 2, 3), Reads(tensor="x", width=3)).shape
    (1, 2, 3)
    >>> window = Window(kernel=(2,), strides=(1,), dilations=(1,), pads=(1, 0))
    >>> rows_of(np.arange(1.0, 4.0).reshape(1, 1, 3), Reads(tensor="x", width=2, window=window))[0].tolist()
    [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]
    """
    values = np.asarray(tensor, np.float32)
    if reads.window is None:
        rows = values.reshape(-1, reads.width)
        return np.ascontiguousarray(rows[_spaced(len(rows))])[None]
    window = reads.window
    spans = tuple((k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True))
    sizes = values.shape[2:]
    padded = np.pad(values, ((0, 0), (0, 0), *_pads(window, spans, sizes)))
    if any(size < span for size, span in zip(padded.shape[2:], spans, strict=True)):
        return np.zeros((reads.groups, 0, reads.width), np.float32)
    patches = sliding_window_view(padded, spans, axis=tuple(range(2, values.ndim)))
    every: list[slice] = [slice(None)] * 2
    every += [slice(None, None, step) for step in (*window.strides, *window.dilations)]
    patches = patches[tuple(every)]
    places = (patches.shape[0], *patches.shape[2 : values.ndim])
    batch, *at = np.unravel_index(_spaced(int(np.prod(places))), places)
    picked = np.moveaxis(patches, 1, values.ndim - 1)[(batch, *at)]  # [rows, C, kernel]
    by_group = picked.reshape(len(batch), reads.groups, reads.width)
    return np.ascontiguousarray(by_group.transpose(1, 0, 2))


def _spaced(rows: int) -> Array:
    return np.arange(min(rows, ROWS)) * rows // max(min(rows, ROWS), 1)


def _pads(window: Window, spans: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Zeros before and after each spatial axis. Source: https://onnx.ai/onnx/operators/onnx__Conv.html, ``auto_pad``."""
    if window.pads is not None:
        return list(zip(window.pads[: len(sizes)], window.pads[len(sizes) :], strict=True))
    found = []
    for size, span, stride in zip(sizes, spans, window.strides, strict=True):
        total = max((-(-size // stride) - 1) * stride + span - size, 0)
        less, more = total // 2, total - total // 2
        found.append((less, more) if window.same == "SAME_UPPER" else (more, less))
    return found
