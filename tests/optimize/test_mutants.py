"""Graphs that were changed at random until they mean nothing: the passes run or decline, and never fail or crash.

``BUILD_ENGINE_MUTANTS`` sets how many (default 800), ``BUILD_ENGINE_SEED`` where they start.
"""

from __future__ import annotations

import multiprocessing
import os
import random
from typing import Any

import onnx
import onnx_ir as ir
from onnx import AttributeProto, TensorProto

from compiler.errors import GraphError
from compiler.optimize import PASSES
from compiler.optimize.driver import limit_bytes_for, run_passes

from . import random_graphs

MUTANTS = int(os.environ.get("BUILD_ENGINE_MUTANTS", "800"))
SEED = int(os.environ.get("BUILD_ENGINE_SEED", "0"))

OPERATORS = [
    "Add",
    "BatchNormalization",
    "Cast",
    "CastLike",
    "Concat",
    "Conv",
    "Dropout",
    "Expand",
    "Flatten",
    "Gather",
    "Gemm",
    "Identity",
    "LayerNormalization",
    "MatMul",
    "Mul",
    "Pad",
    "Range",
    "ReduceMean",
    "Reshape",
    "Shape",
    "Slice",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
    "Where",
]
NUMBERS = [-(2**63), -3, -1, 0, 1, 2, 7, 100, 2**31, 2**40, 2**63 - 1]


def mutate(model: onnx.ModelProto, rng: random.Random) -> None:
    """One to four of: rewire, retype, reshape, rename, extreme attributes, operands and outputs too many or too few."""
    graph = model.graph
    for _ in range(rng.randint(1, 4)):
        node = rng.choice(graph.node)
        names = [value.name for value in (*graph.input, *graph.initializer)] + [o for n in graph.node for o in n.output]
        match rng.randrange(9):
            case 0 if node.input:
                node.input[rng.randrange(len(node.input))] = rng.choice(names)
            case 1 if node.attribute:
                _disturb(rng.choice(node.attribute), rng)
            case 2 if node.attribute:
                del node.attribute[rng.randrange(len(node.attribute))]
            case 3 if node.input:
                del node.input[-1]
            case 4:
                node.input.append(rng.choice(["", *names]))
            case 5:
                node.output.append(f"extra{rng.randrange(10**9)}")
            case 6:
                node.op_type = rng.choice(OPERATORS)
            case 7:
                tensor = rng.choice([*graph.input, *graph.output]).type.tensor_type
                tensor.elem_type = rng.choice(
                    [TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT8E5M2]
                )
            case 8:
                tensor = rng.choice([*graph.input, *graph.output]).type.tensor_type
                if tensor.shape.dim:
                    rng.choice(tensor.shape.dim).dim_value = rng.choice([0, 1, 2, 7, 2**40])


def _disturb(attribute: AttributeProto, rng: random.Random) -> None:
    if attribute.type == AttributeProto.INT:
        attribute.i = rng.choice(NUMBERS)
    elif attribute.type == AttributeProto.FLOAT:
        attribute.f = rng.choice([float("nan"), float("inf"), -1.0, 0.0])
    elif attribute.type == AttributeProto.INTS:
        attribute.ints.append(rng.choice(NUMBERS))


def _run_mutants(result: Any) -> None:
    problems, ran = [], 0
    for seed in range(SEED, SEED + MUTANTS):
        model = random_graphs.Graph(seed, 6).model()
        mutate(model, random.Random(seed))
        try:
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError:
            continue
        ran += 1
        graph = ir.from_proto(model)
        try:
            run_passes(PASSES, graph, limit_bytes_for(graph))
            onnx.checker.check_model(ir.to_proto(graph))
        except (GraphError, onnx.checker.ValidationError) as exc:
            problems.append(f"seed {seed}: {exc}")
    result.send((ran, problems))


def test_no_mutant_makes_a_pass_fail_or_crash() -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_run_mutants, args=(theirs,))
    child.start()
    theirs.close()
    try:
        ran, problems = ours.recv()
    except EOFError:
        child.join()
        raise AssertionError(f"the child ended with {child.exitcode}") from None
    child.join()
    assert problems == []
    assert ran > MUTANTS // 4
