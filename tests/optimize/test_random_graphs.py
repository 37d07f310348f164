"""The passes on random graphs, and deliberately broken passes on the same graphs.

``BUILD_ENGINE_GRAPHS`` sets how many graphs (default 300), ``BUILD_ENGINE_SEED`` where they start.
"""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from compiler.optimize import PASSES
from compiler.optimize.contract import Pass, apply
from compiler.optimize.driver import interface_of, limit_bytes_for, run_passes

from . import planted, random_graphs

GRAPHS = int(os.environ.get("BUILD_ENGINE_GRAPHS", "300"))
SEED = int(os.environ.get("BUILD_ENGINE_SEED", "0"))
OPERATORS = 12

Outputs = list[NDArray[Any]]


def _run(model: bytes, feeds: dict[str, NDArray[Any]]) -> Outputs:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, feeds)]


@functools.cache
def _graph(seed: int) -> tuple[bytes, list[dict[str, NDArray[Any]]], list[Outputs]] | None:
    """A model, feeds (plain, with NaN and infinity, with huge numbers), and what they give; None for the one in some
    thousands that ONNX Runtime cannot run."""
    graph = random_graphs.Graph(seed, OPERATORS)
    model = graph.model().SerializeToString()
    onnx.checker.check_model(model)
    feeds = [graph.feeds(), graph.feeds(random_graphs.SPECIAL), graph.feeds(random_graphs.HUGE)]
    try:
        return model, feeds, [_run(model, each) for each in feeds]
    except Exception:
        return None


def _difference(seed: int, passes: Sequence[Pass], hits: Counter[str]) -> str | None:
    """What a pipeline breaks in one graph. Where passes round, huge numbers may overflow elsewhere and are left out."""
    if (made := _graph(seed)) is None:
        return None
    original, feeds, expected = made
    model = ir.from_proto(onnx.ModelProto.FromString(original))
    interface = interface_of(model)
    if len(passes) == 1:
        hits[passes[0].name] += bool(apply(passes[0], model, limit_bytes_for(model)))
    else:
        hits.update({entry.step.name for entry in run_passes(passes, model, limit_bytes_for(model))})
    if interface_of(model) != interface:
        return "the interface changed"
    optimised = ir.to_proto(model).SerializeToString()
    if optimised == original:
        return None
    rounds = any(step.rounds for step in passes)
    try:
        onnx.checker.check_model(optimised)
        got = [_run(optimised, each) for each in (feeds[:2] if rounds else feeds)]
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    names = [value.name for value in model.graph.outputs]
    for kind, (old, new) in enumerate(zip(expected, got, strict=False)):
        for name, one, two in zip(names, old, new, strict=True):
            if not _same(one, two):
                return f"feed {kind}, output {name}: {one.reshape(-1)[:5]} became {two.reshape(-1)[:5]}"
    return None


def _same(one: NDArray[Any], two: NDArray[Any]) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, two))
    finite = one[np.isfinite(one)]
    scale = float(np.abs(finite).max(initial=1e-3))
    return bool(np.allclose(one, two, rtol=1e-3, atol=1e-5 * scale, equal_nan=True))


def test_every_pipeline_keeps_the_outputs_of_random_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    """All passes, and those that promise not to round, on ordinary numbers, NaN, infinities, -0.0, and sizes of 0."""
    hits: Counter[str] = Counter()
    exact = [step for step in PASSES if not step.rounds]
    broken = {
        f"seed {seed}, {len(passes)} passes": problem
        for seed in range(SEED, SEED + GRAPHS)
        for passes in (PASSES, exact)
        if (problem := _difference(seed, passes, hits)) is not None
    }
    with capsys.disabled():
        sys.stdout.write(f"\n{GRAPHS} random graphs, {len(broken)} broken; changed by {dict(hits.most_common())}\n")
    assert not broken
    assert sum(_graph(seed) is None for seed in range(SEED, SEED + GRAPHS)) <= GRAPHS // 100
    assert GRAPHS < 300 or {step.name for step in PASSES} - set(hits) == {"inline_functions"}


@pytest.mark.parametrize("fault", [*planted.WRONG_NUMBERS, *planted.WRONG_GRAPHS], ids=lambda fault: fault.name)
def test_the_random_graphs_find_a_broken_pass(fault: Pass) -> None:
    hits: Counter[str] = Counter()
    for seed in range(SEED, SEED + max(GRAPHS, 300)):
        if _difference(seed, [fault], hits) is not None:
            return
    pytest.fail(f"not found in {max(GRAPHS, 300)} graphs, {hits[fault.name]} of which it changed")
