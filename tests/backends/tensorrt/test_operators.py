"""The table of operators that NVIDIA's parser accepts is what the parser says now, and a loss in it is seen."""

from __future__ import annotations

import doctest
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT)]

from scripts import tensorrt_operators, tensorrt_stubs  # noqa: E402
from scripts.tensorrt_operators import Case, Verdict, changes, read_table, summary, with_constants, write_table  # noqa: E402

SCRIPT = ROOT / "scripts" / "tensorrt_operators.py"
installed = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is missing (scripts/rtx_builder.py makes it)"
)


@installed
def test_the_parser_accepts_what_the_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    with capsys.disabled():
        sys.stdout.write(f"\nTensorRT's parser: {done.stdout.splitlines()[-1]}\n")


TWO_CASES = """
import sys
from pathlib import Path
from onnx import TensorProto, helper
from scripts import tensorrt_operators as script

def case(operator):
    square, any = (helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in (("x", [2, 2]), ("y", None)))
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "graph", [square], [any])
    return script.Case("test_" + operator.lower(), operator, helper.make_model(graph, ir_version=10), {{}})

script.TABLE = Path({table!r})
script.TABLE.write_text("test_abs Abs refused\\ntest_det Det accepted\\n")
script.load_cases = lambda: [case("Abs"), case("Det")]
sys.argv[1:] = []
sys.exit(script.main())
"""


@installed
def test_a_table_that_says_otherwise_fails(tmp_path: Path) -> None:
    code = TWO_CASES.format(table=str(tmp_path / "operators.txt"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.splitlines()[-3:]) == (
        1,
        [
            "test_abs: was refused, is accepted",
            "test_det: was accepted, is refused (UNSUPPORTED_NODE checkDet: false)",
            "2 outcomes differ from operators.txt. If that is meant, write it again: --write",
        ],
    ), done.stderr


def test_changes_are_losses_gains_and_cases_that_come_and_go() -> None:
    before = {name: Verdict("Op", outcome) for name, outcome in zip("abcd", ("accepted", "refused") * 2, strict=True)}
    now = {
        "a": Verdict("Op", "crashed", "SIGSEGV"),
        "b": Verdict("Op", "constant", "axes"),
        "d": Verdict("Op", "refused", "in other words"),
        "e": Verdict("Op", "accepted"),
    }
    assert changes(before, now) == [
        "a: was accepted, is crashed (SIGSEGV)",
        "b: was refused, is constant (axes)",
        "c: was accepted, is not there",
        "e: was not there, is accepted",
    ]


def test_a_table_reads_back_as_it_was_written() -> None:
    verdicts = {"one": Verdict("Add", "accepted"), "two": Verdict("Det", "refused", "UNSUPPORTED_NODE f: a > b")}
    assert read_table(write_table(verdicts, "where it comes from")) == verdicts
    assert summary(verdicts) == "2 cases: 1 accepted, 0 constant, 1 refused, 0 crashed"


CRASHES = """
import os, signal
from scripts import tensorrt_operators as script
from scripts.tensorrt_operators import Case, Verdict, run_all

script._TIMEOUT_S = 1

def judge(case):
    if case.name == "segfault":
        signal.raise_signal(signal.SIGSEGV)
    if case.name == "hang":
        signal.pause()
    if case.name == "leave":
        os._exit(3)
    if case.name == "raise":
        raise KeyError("x")
    return Verdict(case.operator, "accepted")

names = ["first", "segfault", "between", "hang", "leave", "raise", "last"]
verdicts = run_all([Case(name, "Op", None, {}) for name in names], lambda: judge, WORKERS)
for name in names:
    print(name, verdicts[name].outcome, verdicts[name].reason)
"""


@pytest.mark.parametrize("workers", [1, 20])
def test_a_crash_costs_its_own_case_only(workers: int) -> None:
    code = CRASHES.replace("WORKERS", str(workers))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert [line.rstrip() for line in done.stdout.splitlines()] == [
        "first accepted",
        "segfault crashed SIGSEGV",
        "between accepted",
        "hang crashed SIGALRM",
        "leave crashed exit code 3",
        "raise crashed KeyError: 'x'",
        "last accepted",
    ], done.stderr


def test_only_small_integer_inputs_become_constants() -> None:
    values = [
        helper.make_tensor_value_info("data", TensorProto.FLOAT, [2, 3]),
        helper.make_tensor_value_info("axes", TensorProto.INT64, [1]),
        helper.make_tensor_value_info("table", TensorProto.INT64, [2, 2]),
    ]
    node = helper.make_node("ReduceSum", ["data", "axes"], ["sum"])
    output = helper.make_tensor_value_info("sum", TensorProto.FLOAT, None)
    model = helper.make_model(helper.make_graph([node], "graph", values, [output]))
    inputs = {"data": np.ones((2, 3), np.float32), "axes": np.array([1]), "table": np.ones((2, 2), np.int64)}
    constant = with_constants(Case("case", "ReduceSum", model, inputs))
    assert constant is not None
    assert [value.name for value in constant.graph.input] == ["data", "table"]
    (axes,) = constant.graph.initializer
    assert (axes.name, numpy_helper.to_array(axes).tolist()) == ("axes", [1])
    assert len(model.graph.input) == 3, "the case's own model was changed"
    assert with_constants(Case("case", "ReduceSum", model, {})) is None


@pytest.mark.parametrize("script", [tensorrt_operators, tensorrt_stubs])
def test_the_examples_in_the_scripts_hold(script: object) -> None:
    failed, attempted = doctest.testmod(script)  # type: ignore[arg-type]
    assert (failed, attempted > 0) == (0, True)
