#!/usr/bin/env python3
"""Show every operator test of onnx's own backend suite to NVIDIA's parser, and keep a table of what it accepts.

Nothing is computed: the parser makes a strongly typed network of a case, or refuses it and says why. Four outcomes:

accepted   as the case is
constant   once its small integer inputs (axes, shapes, counts) are constants, as they are in exported models
refused    even then
crashed    the process ended

The table is ``tests/backends/tensorrt/operators.txt``. Without options the parser's answers are compared with it: an
operator that is lost, or won, shows there. Cases run in child processes: one that crashes costs that case, not the run.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.backend.test.loader
from onnx import numpy_helper

TABLE = Path(__file__).resolve().parent.parent / "tests" / "backends" / "tensorrt" / "operators.txt"
ACCEPTED, CONSTANT, REFUSED, CRASHED = "accepted", "constant", "refused", "crashed"
OUTCOMES = (ACCEPTED, CONSTANT, REFUSED, CRASHED)
_TIMEOUT_S = 60
_REASON_CHARS = 110


@dataclass(frozen=True)
class Case:
    name: str
    operator: str
    model: onnx.ModelProto
    inputs: Mapping[str, Any]
    """What the suite feeds: an array, or another thing where the input is no tensor."""


@dataclass(frozen=True)
class Verdict:
    operator: str
    outcome: str
    reason: str = ""


# --- the cases ------------------------------------------------------------------------------------------------------


def load_cases() -> list[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tests: list[Any] = onnx.backend.test.loader.load_model_tests(kind="node")
    models = {test.name: test.model for test in tests}
    return [
        Case(
            name=test.name,
            operator=operator_of(test.name, models),
            model=test.model,
            inputs=dict(zip((value.name for value in test.model.graph.input), test.data_sets[0][0], strict=False)),
        )
        for test in tests
    ]


def operator_of(name: str, models: Mapping[str, onnx.ModelProto]) -> str:
    """The operator that a case is about. One whose name says "expanded" shows the body of another case's operator."""
    base = models.get(name.partition("_expanded")[0], models[name])
    kinds = list(dict.fromkeys(node.op_type for node in base.graph.node if node.op_type != "Constant"))
    return "+".join(kinds[:3]) + ("+..." if len(kinds) > 3 else "") or "Constant"


def with_constants(case: Case) -> onnx.ModelProto | None:
    """The model with its integer inputs of at most one dimension as constants; None where it has none."""
    small = {
        value.name: case.inputs[value.name]
        for value in case.model.graph.input
        if value.type.tensor_type.elem_type in (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
        and getattr(case.inputs.get(value.name), "ndim", 9) <= 1
    }
    if not small:
        return None
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    left = [value for value in model.graph.input if value.name not in small]
    del model.graph.input[:]
    model.graph.input.extend(left)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in small.items())
    model.ir_version = max(model.ir_version, 4)
    return model


# --- one case -------------------------------------------------------------------------------------------------------


class Judge:
    """The parser, and the builder where cases are to be built too."""

    def __init__(self, *, build: bool) -> None:
        import tensorrt_rtx as trt

        self._trt: Any = trt
        self._build = build
        self._log: list[str] = []
        self._logger = _logger(trt, self._log)
        self._builder = trt.Builder(self._logger)

    def __call__(self, case: Case) -> Verdict:
        reason = self._refusal(case, case.model)
        if reason is None:
            return Verdict(case.operator, ACCEPTED)
        model = with_constants(case)
        if model is not None and self._refusal(case, model) is None:
            return Verdict(case.operator, CONSTANT, reason)
        return Verdict(case.operator, REFUSED, reason)

    def _refusal(self, case: Case, model: onnx.ModelProto) -> str | None:
        """Why the parser does not take the model, in its own words; None where it does."""
        trt = self._trt
        del self._log[:]
        network = self._builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._logger)
        if not parser.parse(model.SerializeToString()):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            said = [f"{error.code().name} {error.func()}: {error.desc()}" for error in errors]
            return shorten((said or self._log or ["no reason given"])[0])
        if not self._build:
            return None
        config = self._builder.create_builder_config()
        profile = self._builder.create_optimization_profile()
        given = {tensor.name for tensor in model.graph.initializer}
        names = [value.name for value in model.graph.input if value.name not in given]
        for index, name in enumerate(names):  # by position: a Loop renames an input that it hands to its body
            tensor, value = network.get_input(index), case.inputs[name]
            if tensor.is_shape_tensor:
                profile.set_shape_input(tensor.name, *[value.reshape(-1).tolist()] * 3)
            elif -1 in tuple(tensor.shape):
                profile.set_shape(tensor.name, *[value.shape] * 3)
        config.add_optimization_profile(profile)
        for index in range(network.num_layers):
            layer: Any = network.get_layer(index)
            if layer.type == trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = trt.IAttentionInputLayer
                layer.attention.decomposable = True  # as the back end does
        if self._builder.build_serialized_network(network, config) is None:
            said = [line for line in self._log if "cudaError" not in line]
            return shorten("BUILD " + (said or ["no reason given"])[0])
        return None


def _logger(trt: Any, log: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                log.append(message)

    return Logger()


def shorten(text: str) -> str:
    """One line, without places in NVIDIA's sources and words that say nothing.

    >>> shorten('INVALID_NODE importX: [x.cpp::f::12] Error Code 4: API Usage Error (Assertion failed:\\n a > b)')
    'INVALID_NODE importX: Error Code 4: (a > b)'
    """
    text = " ".join(text.split())
    text = re.sub(
        r"Assertion failed: |Invalid Node - \S+ |IBuilder::buildSerializedNetwork: |API Usage Error ", "", text
    )
    text = re.sub(r"\[[\w./]+\.(cpp|h)\S*\] ?|\[[\w./]+\.(cpp|h):\d+: ", "", text)
    return text if len(text) <= _REASON_CHARS else text[: _REASON_CHARS - 3] + "..."


# --- many cases, in children ----------------------------------------------------------------------------------------


def run_all(
    cases: Sequence[Case], make_judge: Callable[[], Callable[[Case], Verdict]], workers: int
) -> dict[str, Verdict]:
    """Verdicts by name. A child that dies or hangs costs the case that it was at."""
    verdicts: dict[str, Verdict] = {}
    pending = [list(cases[worker::workers]) for worker in range(workers)]
    context = multiprocessing.get_context("fork")
    children: dict[Any, tuple[Any, list[Case]]] = {}

    def start(work: list[Case]) -> None:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(work, make_judge, theirs), daemon=True)
        child.start()
        theirs.close()
        children[ours] = (child, work)

    for work in filter(None, pending):
        start(work)
    while children:
        ready: list[Any] = multiprocessing.connection.wait(list(children))
        for connection in ready:
            child, work = children[connection]
            try:
                verdict = connection.recv()
            except EOFError:
                child.join()
                del children[connection]
                if work:
                    case = work.pop(0)
                    verdicts[case.name] = Verdict(case.operator, CRASHED, _ended(child.exitcode))
                if work:
                    start(work)
            else:
                verdicts[work.pop(0).name] = verdict
    return verdicts


def _work(cases: Sequence[Case], make_judge: Callable[[], Callable[[Case], Verdict]], connection: Any) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)  # the parser also writes there, of types that it does not know
    judge = make_judge()
    for case in list(cases):
        signal.alarm(_TIMEOUT_S)
        try:
            verdict = judge(case)
        except Exception as exc:
            verdict = Verdict(case.operator, CRASHED, shorten(f"{type(exc).__name__}: {exc}"))
        connection.send(verdict)
    connection.close()


def _ended(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


# --- the table ------------------------------------------------------------------------------------------------------


def write_table(verdicts: Mapping[str, Verdict], source: str) -> str:
    """One line for each case: name, operator, outcome, reason."""
    lines = [f"# {source}", f"# {summary(verdicts)}"]
    for name, verdict in sorted(verdicts.items()):
        lines.append(f"{name} {verdict.operator} {verdict.outcome} {verdict.reason}".rstrip())
    return "\n".join(lines) + "\n"


def _source() -> str:
    import tensorrt_rtx

    return f"The parser of TensorRT for RTX {tensorrt_rtx.__version__} on the operator tests of onnx {onnx.__version__}"


def read_table(text: str) -> dict[str, Verdict]:
    """
    >>> read_table("# a comment\\ntest_abs Abs accepted\\n")
    {'test_abs': Verdict(operator='Abs', outcome='accepted', reason='')}
    """
    rows = [line.split(" ", 3) for line in text.splitlines() if line and not line.startswith("#")]
    return {name: Verdict(operator, outcome, *reason) for name, operator, outcome, *reason in rows}


def changes(before: Mapping[str, Verdict], now: Mapping[str, Verdict]) -> list[str]:
    """What differs in the outcomes, one line each; reasons may differ."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        was, is_ = (table[name].outcome if name in table else "not there" for table in (before, now))
        if was != is_:
            reason = now[name].reason if name in now else ""
            found.append(f"{name}: was {was}, is {is_}" + (f" ({reason})" if reason else ""))
    return found


def summary(verdicts: Mapping[str, Verdict]) -> str:
    counts = Counter(verdict.outcome for verdict in verdicts.values())
    return f"{len(verdicts):,} cases: " + ", ".join(f"{counts[outcome]:,} {outcome}" for outcome in OUTCOMES)


def by_operator(verdicts: Iterable[Verdict]) -> str:
    """Each operator with its counts, by how well it does: all of its cases, some, none."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for verdict in verdicts:
        counts[verdict.operator][verdict.outcome] += 1
    groups: dict[str, list[str]] = {"all": [], "some": [], "none": []}
    for operator, mine in sorted(counts.items()):
        good, total = mine[ACCEPTED] + mine[CONSTANT], mine.total()
        group = "all" if good == total else "some" if good else "none"
        crashes = f", {mine[CRASHED]} crashed" if mine[CRASHED] else ""
        groups[group].append(f"{operator} {good}/{total}{crashes}")
    titles = {"all": "every case accepted", "some": "some cases accepted", "none": "no case accepted"}
    return "\n".join(f"{titles[group]} ({len(names)}): {'; '.join(names)}" for group, names in groups.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table again")
    parser.add_argument("--build", action="store_true", help="build what the parser accepts, too; compares nothing")
    parser.add_argument("--only", default="", help="only the cases whose name contains this; compares nothing")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    started = time.monotonic()
    cases = [case for case in load_cases() if arguments.only in case.name]
    verdicts = run_all(cases, functools.partial(Judge, build=arguments.build), arguments.workers)
    print(by_operator(verdicts.values()))
    print(f"{summary(verdicts)}; {time.monotonic() - started:.0f} s")
    if arguments.only or arguments.build:
        bad = {name: verdict for name, verdict in sorted(verdicts.items()) if verdict.outcome in (REFUSED, CRASHED)}
        shown = {n: v for n, v in bad.items() if arguments.only or v.outcome == CRASHED or v.reason.startswith("BUILD")}
        print(*(f"{name}: {verdict.outcome}: {verdict.reason}" for name, verdict in shown.items()), sep="\n")
        return 0
    if arguments.write:
        TABLE.write_text(write_table(verdicts, _source()))
        return 0
    different = changes(read_table(TABLE.read_text()), verdicts)
    if different:
        print(*different, sep="\n")
        print(f"{len(different)} outcomes differ from {TABLE.name}. If that is meant, write it again: --write")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
