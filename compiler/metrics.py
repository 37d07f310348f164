"""Per-sample measures of what a model answers; numpy only, for this package and for users' model files.

``outputs`` and ``original`` are mappings from output name to an array ``[N, ...]`` (N samples stacked along the first
axis) or, where samples differ in shape, to a list of N arrays ``[...]``; ``outputs[name][i]`` is sample i either way.
Every measure returns one value per sample, ``[N]``: bool for right or wrong, float otherwise.

A model file offers measures to the accuracy gates in three dicts::

    metrics = {"top1": top1}                        # f(outputs, labels), higher is better
    losses = {"nll": nll}                           # f(outputs, labels), lower is better
    agreements = {"retrieval_top10": retrieval(10)} # f(outputs, original), higher is better

Two rules hold throughout. NaN never looks like agreement: it is wrong, worst, or NaN again. And where several outputs
are compared, a sample gets the value of its worst output.

Why per sample: a mean of each side loses the pairing, and pairing is worth 7 to 37 times as many samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from compiler.errors import RecipeError
from compiler.spec import Array

Batch: TypeAlias = Mapping[str, Array | list[Array]]
PerSample: TypeAlias = NDArray[Any]
Bools: TypeAlias = NDArray[np.bool_]
Floats: TypeAlias = NDArray[np.float64]

SQNR_CEILING_DB = 150.0
"""SQNR of an error of zero: just above what float32 can tell (24 bits, 144.5 dB). The floor is its negative."""

_SAME_SIMILARITY = 1e-6
"""Cosines closer than this are a tie: float32 embeddings of one text in two batches differ by about 1e-7."""

_PIECE = 1 << 20
"""Values that are compared at a time."""

_QUERIES = 256
"""Queries that `retrieval` compares with all samples at a time."""


# --- against labels -------------------------------------------------------------------------------------------------


def top1(outputs: Batch, labels: Any, *, ignore_index: int = -100) -> PerSample:
    """Whether the largest value along the last axis of the first float output is at the label's index.

    Logits ``[N, C]`` with labels ``[N]`` give bool ``[N]``. Logits ``[N, ..., C]`` with labels ``[N, ...]`` give the
    share of right positions of each sample, without those labelled ``ignore_index``. Of equal values the first counts,
    as in `numpy.argmax`; a position that holds NaN is wrong.

    Raises:
        RecipeError: labels that do not fit the output, or a sample whose labels are all ignored.

    >>> top1({"logits": np.array([[0.1, 0.9], [0.8, 0.2]])}, np.array([1, 1]))
    array([ True, False])
    """
    return _ranked_within(outputs, labels, 1, ignore_index)


def top_k(k: int) -> Callable[[Batch, Any], PerSample]:
    """A measure like `top1`: whether the label is among the ``k`` largest.

    >>> top_k(2)({"logits": np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])}, np.array([1, 2]))
    array([ True, False])
    """
    if k < 1:
        raise RecipeError(f"top_k: found k = {k}; at least 1 was expected.")

    def measure(outputs: Batch, labels: Any) -> PerSample:
        return _ranked_within(outputs, labels, k, -100)

    measure.__name__ = f"top{k}"
    return measure


def nll(outputs: Batch, labels: Any, *, ignore_index: int = -100) -> Floats:
    """Negative log-likelihood of the labels, in nats: the mean over a sample's positions, ``[N]``.

    The first float output holds logits ``[N, ..., C]``; labels are ``[N, ...]``. For a language model, shift the labels
    first: ``labels[:, t]`` is the token that position t should predict. Positions labelled ``ignore_index`` are left
    out. Raise its mean to e for the perplexity (`perplexity`); gate the mean, whose pairing is sound.

    Raises:
        RecipeError: labels that do not fit the output, or a sample whose labels are all ignored.

    >>> nll({"logits": np.zeros((1, 4))}, np.array([2])).round(6)
    array([1.386294])
    """
    rows = []
    for logits, label, valid in _labelled(outputs, labels, ignore_index, "nll"):
        values = logits[valid].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            shifted = values - values.max(axis=-1, keepdims=True)
            log_sum = np.log(np.exp(shifted).sum(axis=-1))
            rows.append(np.mean(log_sum - np.take_along_axis(shifted, label[valid][..., None], axis=-1)[..., 0]))
    return np.array(rows, np.float64)


def perplexity(nlls: Any) -> float:
    """``exp`` of the mean of negative log-likelihoods in nats. NaN for none.

    >>> round(perplexity([np.log(2.0), np.log(8.0)]), 6)
    4.0
    """
    values = np.asarray(nlls, np.float64)
    return float(np.exp(values.mean())) if values.size else float("nan")


def _ranked_within(outputs: Batch, labels: Any, k: int, ignore_index: int) -> PerSample:
    rows = []
    single = True
    for logits, label, valid in _labelled(outputs, labels, ignore_index, "top1" if k == 1 else f"top{k}"):
        single &= label.ndim == 0
        own = np.take_along_axis(logits, np.where(valid, label, 0)[..., None], axis=-1)
        before = np.arange(logits.shape[-1]) < np.where(valid, label, 0)[..., None]
        with np.errstate(invalid="ignore"):
            rank = ((logits > own) | ((logits == own) & before)).sum(axis=-1)
        right = (rank < k) & ~np.isnan(logits).any(axis=-1)
        rows.append(right[valid].mean())
    shares = np.array(rows, np.float64)
    return shares == 1.0 if single else shares


def _labelled(
    outputs: Batch, labels: Any, ignore_index: int, measure: str
) -> Iterator[tuple[Array, NDArray[np.int64], Bools]]:
    """For every sample: logits ``[..., C]``, labels ``[...]``, and which of the labels count."""
    floats = _float_names(outputs)
    if not floats:
        raise RecipeError(f"{measure}: found no float output among {_listed(outputs)}; logits were expected.")
    rows = outputs[floats[0]]
    if labels is None or len(labels) != len(rows):
        found = "no labels" if labels is None else f"{len(labels)} labels"
        raise RecipeError(f"{measure}: found {found} for {len(rows)} samples; one per sample was expected.")
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        logits, wanted = np.asarray(row), np.asarray(label)
        if wanted.dtype.kind not in "iub" or logits.ndim == 0 or wanted.shape != logits.shape[:-1]:
            raise RecipeError(
                f"{measure}: sample {index}: found labels {wanted.dtype}{list(wanted.shape)} for output '{floats[0]}' "
                f"{list(logits.shape)}; integers {list(logits.shape[:-1])} were expected."
            )
        valid = np.asarray(wanted != ignore_index)
        if not valid.any():
            raise RecipeError(
                f"{measure}: sample {index}: found no label but {ignore_index}, which is ignored; at least one was "
                "expected. Leave the sample out."
            )
        outside = valid & ((wanted < 0) | (wanted >= logits.shape[-1]))
        if outside.any():
            raise RecipeError(
                f"{measure}: sample {index}: found label {wanted[outside].flat[0]}; "
                f"output '{floats[0]}' has classes 0 to {logits.shape[-1] - 1}."
            )
        yield logits, wanted.astype(np.int64), valid


# --- against the original's outputs ---------------------------------------------------------------------------------


def cosine(outputs: Batch, original: Batch) -> Floats:
    """Cosine of the angle between each sample's output and the original's, both flattened, ``[N]`` in [-1, 1].

    Blind to scale: an output that is twice too large has cosine 1; see `sqnr_db`. Two outputs that are all zero have
    cosine 1, one that is has 0. For what is compared see `sqnr_db`.

    >>> cosine({"y": np.array([[0.0, 2.0]])}, {"y": np.array([[1.0, 1.0]])}).round(6)
    array([0.707107])
    """
    return distances(outputs, original).cosine


def sqnr_db(outputs: Batch, original: Batch) -> Floats:
    """Signal to quantisation noise ratio of each sample, ``10 log10(sum original^2 / sum (output - original)^2)``, [N].

    Clipped to +-`SQNR_CEILING_DB`: the ceiling is no error at all, the floor an error where the original is all zero.

    Compared are the float outputs, and of them the values that are finite in the original: a masked logit of -inf has
    no distance. A value that is NaN or Inf where the original's differs gives the floor. Where shapes differ (as many
    boxes as were found), a missing value counts as 0.

    >>> sqnr_db({"y": np.array([[1.1]])}, {"y": np.array([[1.0]])}).round(6)
    array([20.])
    """
    return distances(outputs, original).sqnr_db


def max_abs_diff(outputs: Batch, original: Batch) -> Floats:
    """Largest absolute difference between each sample's output and the original's, [N], in the output's units.

    Lower is better. Infinite where the output is NaN or Inf and the original's is not. See `sqnr_db` for the rest.

    >>> max_abs_diff({"y": np.array([[1.0, 2.5]])}, {"y": np.array([[1.0, 2.0]])})
    array([0.5])
    """
    return distances(outputs, original).max_abs_diff


class Distances(NamedTuple):
    """`cosine`, `sqnr_db` and `max_abs_diff` of every sample, each [N]."""

    cosine: Floats
    sqnr_db: Floats
    max_abs_diff: Floats


def distances(outputs: Batch, original: Batch) -> Distances:
    """All three in one go.

    Raises:
        RecipeError: an output is missing, there is no float output, or a sample has another number of axes.
    """
    _check_names(outputs, original)
    floats = _float_names(original)
    if not floats:
        raise RecipeError(
            f"found no float output among {_listed(original)}; at least one was expected. Use top1_agreement."
        )
    found = [_by_sample(outputs[name], original[name], f"output '{name}'") for name in floats]
    return Distances(
        cosine=np.minimum.reduce([one.cosine for one in found]),
        sqnr_db=np.minimum.reduce([one.sqnr_db for one in found]),
        max_abs_diff=np.maximum.reduce([one.max_abs_diff for one in found]),
    )


def top1_agreement(outputs: Batch, original: Batch, *, over: Sequence[str] | None = None) -> PerSample:
    """Whether the output makes the decision that the original makes.

    Along the last axis of the first float output the largest value must be at the same index: bool ``[N]`` for
    ``[N, C]``; the share of agreeing positions of each sample, float ``[N]``, for ``[N, ..., C]``. Of equal values the
    first counts; a position that holds NaN on either side disagrees. Integer and bool outputs (class or token ids) must
    be equal: the share of equal values. A position or value that only one side has disagrees. ``over`` names the
    outputs to compare; by default those two kinds, as `decisions` finds them.

    Raises:
        RecipeError: there is no decision in the outputs: no integers, and fewer than two floats along the last axis.

    >>> top1_agreement({"y": np.array([[1.0, 2.0], [2.0, 1.0]])}, {"y": np.array([[0.0, 9.0], [0.0, 9.0]])})
    array([ True, False])
    """
    _check_names(outputs, original)
    shares: list[Floats] = []
    single = True
    for name in decisions(original) if over is None else over:
        rows = []
        for row, wanted in zip(_rows(outputs[name]), _rows(original[name]), strict=True):
            # No decision on one side is not the same as none on the other.
            answer, expected = (_decide(row, -1), _decide(wanted, -2)) if is_float(wanted) else (row, wanted)
            rows.append(_equal_share(answer, expected))
            single &= answer.size == expected.size == 1
        shares.append(np.array(rows, np.float64))
    if not shares:
        raise RecipeError(
            f"top1_agreement: found no decision in the outputs {_listed(original)}; integers, or at least two floats "
            "along the last axis, were expected. Use cosine, sqnr_db or max_abs_diff."
        )
    worst: PerSample = np.minimum.reduce(shares)
    return np.equal(worst, 1.0) if single else worst


def retrieval(k: int, output: str | None = None) -> Callable[[Batch, Batch], PerSample]:
    """A measure of how well embeddings keep each other's neighbours, for search and clustering.

    Every sample in turn is the query. Its value is the share of its ``k`` nearest other samples, by cosine among the
    new embeddings, that are also among the ``k`` nearest by cosine among the original ones; bool for ``k = 1``. Samples
    that tie with the original's k-th neighbour (within 1e-6) count as kept. Embeddings are ``[N, D]``: ``output``, or
    the first float output. Takes ``O(N^2)`` time and ``O(N)`` memory.

    >>> new, old = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    >>> retrieval(1)({"e": new}, {"e": old})
    array([ True, False,  True])
    """
    if k < 1:
        raise RecipeError(f"retrieval: found k = {k}; at least 1 was expected.")

    def measure(outputs: Batch, original: Batch) -> PerSample:
        _check_names(outputs, original)
        name = output or next(iter(_float_names(original)), "")
        if name not in original:
            raise RecipeError(
                f"retrieval: found no output '{name}' among {_listed(original)}; embeddings were expected."
            )
        new, old = _unit_vectors(outputs[name], name), _unit_vectors(original[name], name)
        count = len(old)
        if count <= k:
            raise RecipeError(f"retrieval: found {count} samples; more than k = {k} were expected.")
        kept = np.empty((count, k), bool)
        for start in range(0, count, _QUERIES):
            queries = slice(start, start + _QUERIES)
            near_new, near_old = _similarity(new, queries), _similarity(old, queries)
            # A stable order, so that of equal neighbours the same ones are chosen on every machine.
            chosen = np.argsort(-near_new, axis=1, kind="stable")[:, :k]
            limit = np.partition(near_old, count - k, axis=1)[:, count - k, None]
            by_old, by_new = (np.take_along_axis(near, chosen, axis=1) for near in (near_old, near_new))
            kept[queries] = (by_old >= limit - _SAME_SIMILARITY) & np.isfinite(by_old) & np.isfinite(by_new)
        shares: PerSample = kept[:, 0] if k == 1 else kept.mean(axis=1)
        return shares

    measure.__name__ = f"retrieval_top{k}"
    return measure


def decisions(outputs: Batch) -> tuple[str, ...]:
    """Outputs that `top1_agreement` compares: the first float one, if it has a choice to make, and the integer ones."""
    floats = _float_names(outputs)
    first = tuple(name for name in floats[:1] if any(shape[-1:] > (1,) for shape in _shapes(outputs[name])))
    return first + tuple(name for name in outputs if name not in floats)


def is_float(array: Array) -> bool:
    """Whether values are floating-point, bfloat16 and float8 (of ml_dtypes) included."""
    return array.dtype.kind == "f" or array.dtype.name.startswith(("bfloat", "float"))


def unmatched(output: Array, original: Array) -> Bools:
    """Where an output is NaN or Inf and the original is not NaN and not the same infinity; equal shapes."""
    new, old = _native(output), _native(original)
    broken: Bools = ~np.isfinite(new) & ~np.isnan(old) & (new != old)
    return broken


def _float_names(outputs: Batch) -> tuple[str, ...]:
    return tuple(
        name
        for name, rows in outputs.items()
        if (is_float(rows) if isinstance(rows, np.ndarray) else all(is_float(np.asarray(row)) for row in rows))
    )


def _rows(rows: Array | Sequence[Array]) -> Array | list[Array]:
    return rows if isinstance(rows, np.ndarray) else [np.asarray(row) for row in rows]


def _shapes(rows: Array | Sequence[Array]) -> set[tuple[int, ...]]:
    """Shapes of samples."""
    return {rows.shape[1:]} if isinstance(rows, np.ndarray) else {np.shape(row) for row in rows}


def _native(array: Array) -> Array:
    """Values of a dtype that numpy itself knows: bfloat16 and float8 as float32, in which they are exact."""
    return array.astype(np.float32) if is_float(array) and array.dtype.kind != "f" else array


def _listed(outputs: Batch) -> str:
    return ", ".join(f"'{name}'" for name in outputs) or "none"


def _check_names(outputs: Batch, original: Batch) -> None:
    for name, rows in original.items():
        if name not in outputs:
            raise RecipeError(f"found outputs {_listed(outputs)}; the original's {_listed(original)} were expected.")
        if len(rows) != len(outputs[name]):
            raise RecipeError(
                f"output '{name}': found {len(outputs[name])} samples; the original's {len(rows)} were expected."
            )


def _by_sample(new: Array | list[Array], old: Array | list[Array], where: str) -> Distances:
    if isinstance(new, np.ndarray) and isinstance(old, np.ndarray) and new.shape == old.shape:
        width = int(np.prod(new.shape[1:], dtype=np.int64))
        return _distances(new.reshape(len(new), width), old.reshape(len(old), width))
    rows = []
    for index, pair in enumerate(zip(new, old, strict=True)):
        x, y = _same_shape(np.asarray(pair[0]), np.asarray(pair[1]), f"{where}: sample {index}")
        rows.append(_distances(x.reshape(1, -1), y.reshape(1, -1)))
    return Distances(*(np.array([row[column][0] for row in rows], np.float64) for column in range(3)))


def _same_shape(new: Array, old: Array, where: str) -> tuple[Array, Array]:
    """Both padded with zeros to the larger size of each axis."""
    if new.shape == old.shape:
        return new, old
    if new.ndim != old.ndim:
        raise RecipeError(f"{where}: found shape {list(new.shape)}; as many axes as {list(old.shape)} were expected.")
    size = [max(pair) for pair in zip(new.shape, old.shape, strict=True)]
    padded = [
        np.pad(array, [(0, wide - have) for wide, have in zip(size, array.shape, strict=True)]) for array in (new, old)
    ]
    return padded[0], padded[1]


def _distances(new: Array, old: Array) -> Distances:
    """Of rows [N, M]. In pieces, so that large outputs are never held in float64 as a whole."""
    count, width = new.shape
    step = max(1, _PIECE // max(count, 1))
    pieces = [slice(start, start + step) for start in range(0, width, step)]
    broken, differs, finite = (np.zeros(count, bool) for _ in range(3))
    size_x, size_y, largest = (np.zeros(count) for _ in range(3))
    for piece in pieces:
        x, y, both = _comparable(new[:, piece], old[:, piece])
        broken |= unmatched(new[:, piece], old[:, piece]).any(axis=1)
        differs |= (new[:, piece] != old[:, piece]).any(axis=1)
        finite |= both.any(axis=1)
        size_x, size_y = np.maximum(size_x, _largest(x)), np.maximum(size_y, _largest(y))
        with np.errstate(over="ignore"):
            largest = np.maximum(largest, np.minimum(_largest(x - y), np.finfo(np.float64).max))
    # Where nothing can be compared, only the same infinities agree.
    broken |= differs & ~finite
    # Scaled, so that squares neither overflow nor vanish, and before the difference is taken: 1e308 - -1e308 overflows.
    unit_x, unit_y, unit = (
        np.where(size > 0, size, 1.0)[:, None] for size in (size_x, size_y, np.maximum(size_x, size_y))
    )
    xx, yy, xy, signal, noise = (np.zeros(count) for _ in range(5))
    for piece in pieces:
        x, y, _ = _comparable(new[:, piece], old[:, piece])
        u, v = x / unit_x, y / unit_y
        xx, yy, xy = xx + (u * u).sum(axis=1), yy + (v * v).sum(axis=1), xy + (u * v).sum(axis=1)
        v = y / unit
        signal, noise = signal + (v * v).sum(axis=1), noise + ((x / unit - v) ** 2).sum(axis=1)
    norms = np.sqrt(xx * yy)
    cosines = np.where(
        norms > 0, np.clip(xy / np.where(norms > 0, norms, 1.0), -1.0, 1.0), (xx == yy).astype(np.float64)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(noise == 0, SQNR_CEILING_DB, 10.0 * np.log10(signal / noise))
    return Distances(
        cosine=np.where(broken, -1.0, cosines),
        sqnr_db=np.where(broken, -SQNR_CEILING_DB, np.clip(ratios, -SQNR_CEILING_DB, SQNR_CEILING_DB)),
        max_abs_diff=np.where(broken, np.inf, largest),
    )


def _comparable(new: Array, old: Array) -> tuple[Floats, Floats, Bools]:
    """Both with zeros where there is nothing to compare, and where there is."""
    x, y = new.astype(np.float64), old.astype(np.float64)
    both = np.isfinite(x) & np.isfinite(y)
    return np.where(both, x, 0.0), np.where(both, y, 0.0), both


def _largest(array: Floats) -> Floats:
    largest: Floats = np.abs(array).max(axis=1, initial=0.0)
    return largest


def _decide(row: Array, undecided: int) -> NDArray[np.int64]:
    """Index of the largest value along the last axis; ``undecided`` where there is none, or a NaN."""
    if row.ndim == 0 or row.shape[-1] == 0:
        return np.full(row.shape[:-1], undecided, np.int64)
    values = _native(row)
    choice: NDArray[np.int64] = np.where(np.isnan(values).any(axis=-1), undecided, values.argmax(axis=-1))
    return choice


def _equal_share(answer: Array, expected: Array) -> float:
    """Share of values that are equal, of all those that either side has."""
    if answer.ndim != expected.ndim:
        return 0.0
    common = tuple(slice(0, min(pair)) for pair in zip(answer.shape, expected.shape, strict=True))
    size = int(np.prod([max(pair) for pair in zip(answer.shape, expected.shape, strict=True)], dtype=np.int64))
    if not size:
        return 1.0
    return float((answer[common] == expected[common]).sum() / size)


def _similarity(vectors: Floats, queries: slice) -> Floats:
    """Cosine of some vectors with all [Q, N]; of each with itself, and with NaN, -inf."""
    near = vectors[queries] @ vectors.T
    rows = np.arange(len(near))
    near[rows, rows + queries.start] = -np.inf
    near[np.isnan(near)] = -np.inf
    return near


def _unit_vectors(rows: Array | list[Array], name: str) -> Floats:
    shapes = _shapes(rows)
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        found = ", ".join(str(list(shape)) for shape in sorted(shapes)[:3]) or "no samples"
        raise RecipeError(f"retrieval: output '{name}': found {found}; one embedding [D] per sample was expected.")
    vectors = np.stack([np.asarray(row) for row in rows]).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(norms == 0, 1.0, norms)
