#!/usr/bin/env python3
"""Run every case of onnx's own backend test suite through every graph pass, and count the outputs that are kept.

The `onnx` wheel ships the suite: models, inputs and expected outputs. A case counts where an oracle (ONNX Runtime on
the CPU with optimisation off, onnx's reference evaluator, or both) reproduces the expected output of the model as it
is. Each pass alone, and the whole pipeline, must then keep that output in every such oracle within the case's own
tolerance, leave a valid model with the same interface, change nothing when run again, and say truthfully whether it
changed anything. Where a pass changed nothing the bytes are equal, and nothing is run.

"frozen" is the pipeline on the same model with every input turned into a weight, so that constant folding has to
compute what the case tests.

Cases run in child processes: one that crashes costs that case, not the run.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# ONNX Runtime refuses the newest opsets of the suite unless told that they are meant.
os.environ.setdefault("ALLOW_RELEASED_ONNX_OPSET_ONLY", "0")

import numpy as np
import onnx
import onnx.backend.test.loader
import onnx_ir as ir
import onnxruntime
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from compiler.optimize.contract import Pass, apply
from compiler.optimize.driver import interface_of, limit_bytes_for, run_passes
from compiler.optimize.registry import PASSES

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
PIPELINE = "pipeline"
FROZEN = "frozen"
GOOD = ("same", "kept")
_TIMEOUT_S = 120


@dataclass(frozen=True)
class Case:
    name: str
    model: onnx.ModelProto
    inputs: Mapping[str, Any]
    expected: Sequence[Any]
    rtol: float
    atol: float


# --- the suite ------------------------------------------------------------------------------------------------------


def load_cases() -> list[Case]:
    return [_case(case) for kind in KINDS for case in onnx.backend.test.loader.load_model_tests(kind=kind)]


def _case(case: Any) -> Case:
    if case.model is not None:
        model = case.model
        inputs, expected = case.data_sets[0]
    else:
        folder = Path(case.model_dir)
        model = onnx.load(folder / "model.onnx")
        inputs = [
            _read(folder / f"test_data_set_0/input_{i}.pb", v) for i, v in _given(folder, "input", model.graph.input)
        ]
        expected = [
            _read(folder / f"test_data_set_0/output_{i}.pb", v) for i, v in _given(folder, "output", model.graph.output)
        ]
    names = [value.name for value in model.graph.input]
    feeds = {name: _plain(value) for name, value in zip(names, inputs, strict=False) if name}
    return Case(case.name, model, feeds, [_plain(value) for value in expected], case.rtol, case.atol)


def _given(folder: Path, kind: str, values: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    for index, value in enumerate(values):
        if (folder / f"test_data_set_0/{kind}_{index}.pb").exists():
            yield index, value


def _read(path: Path, value: onnx.ValueInfoProto) -> Any:
    data = path.read_bytes()
    kind = value.type.WhichOneof("value")
    if kind == "sequence_type":
        return numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    if kind == "optional_type":
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return numpy_helper.to_array(onnx.TensorProto.FromString(data))


def _plain(value: Any) -> Any:
    """Arrays, lists of them, and None: what both oracles take and give."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None else np.asarray(value)


# --- the oracles ----------------------------------------------------------------------------------------------------


def _run_onnxruntime(model: bytes, feeds: Mapping[str, Any]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [
        _plain(value)
        for value in session.run(None, {name: value for name, value in feeds.items() if value is not None})
    ]


def _run_reference(model: bytes, feeds: Mapping[str, Any]) -> list[Any]:
    return [_plain(value) for value in ReferenceEvaluator(onnx.ModelProto.FromString(model)).run(None, dict(feeds))]


ORACLES: dict[str, Callable[[bytes, Mapping[str, Any]], list[Any]]] = {
    "onnxruntime": _run_onnxruntime,
    "reference": _run_reference,
}


def _differs(got: Sequence[Any], case: Case) -> str | None:
    """What is wrong with the outputs, or None where they are the expected ones."""
    if len(got) != len(case.expected):
        return f"{len(got)} outputs instead of {len(case.expected)}"
    for index, (mine, theirs) in enumerate(zip(got, case.expected, strict=True)):
        if problem := _value_differs(mine, theirs, case):
            return f"output {index}: {problem}"
    return None


def _value_differs(got: Any, expected: Any, case: Case) -> str | None:
    if isinstance(got, list) or isinstance(expected, list) or got is None or expected is None:
        return _sequence_differs(got, expected, case)
    if got.shape != expected.shape or (got.dtype != expected.dtype and object not in (got.dtype, expected.dtype)):
        return f"{got.dtype}{list(got.shape)} instead of {expected.dtype}{list(expected.shape)}"
    if expected.dtype.kind in "OSU":
        return None if (got == expected).all() else "other strings"
    rtol = max(case.rtol, 2**-6) if expected.dtype.name == "bfloat16" else case.rtol
    if expected.dtype.kind == "V":
        got, expected = got.astype(np.float32), expected.astype(np.float32)
    close = np.isclose(got, expected, rtol=rtol, atol=case.atol, equal_nan=True)
    return None if close.all() else f"{int((~close).sum())} of {close.size} elements differ"


def _sequence_differs(got: Any, expected: Any, case: Case) -> str | None:
    if not isinstance(got, list) or not isinstance(expected, list):
        return None if got is expected else f"{type(got).__name__} instead of {type(expected).__name__}"
    if len(got) != len(expected):
        return f"{len(got)} items instead of {len(expected)}"
    return next((p for one, two in zip(got, expected, strict=True) if (p := _value_differs(one, two, case))), None)


def _ask(oracle: str, model: bytes, case: Case, feeds: Mapping[str, Any]) -> str | None:
    try:
        return _differs(ORACLES[oracle](model, feeds), case)
    except Exception as exc:
        return f"{type(exc).__name__}: {str(exc).strip().splitlines()[0][:200] if str(exc).strip() else ''}"


# --- one case -------------------------------------------------------------------------------------------------------


def judge(case: Case, passes: Sequence[Pass]) -> dict[str, str]:
    """A verdict for each pass, the pipeline and the frozen pipeline; under ``"oracles"`` who can run the case, under
    ``"steps"`` which passes changed something in a pipeline."""
    original = _serialized(case.model)
    oracles = [oracle for oracle in ORACLES if _ask(oracle, original, case, case.inputs) is None]
    trial = _Trial(case, case.model, case.inputs, oracles)
    verdicts = {step.name: trial.verdict(functools.partial(apply, step)) for step in passes}
    steps: set[str] = set()

    def pipeline(model: ir.Model, limit: int) -> int:
        applied = run_passes(passes, model, limit)
        steps.update(entry.step.name for entry in applied)
        return len(applied)

    verdicts[PIPELINE] = trial.verdict(pipeline)
    frozen = _frozen(case)
    if frozen is not None:
        able = [oracle for oracle in oracles if _ask(oracle, _serialized(frozen), case, {}) is None]
        verdicts[FROZEN] = _Trial(case, frozen, {}, able).verdict(pipeline)
    return verdicts | {"oracles": " ".join(oracles), "steps": " ".join(sorted(steps))}


class _Trial:
    """One model before many passes. Models without a change are used again, and equal bytes are judged once."""

    def __init__(self, case: Case, proto: onnx.ModelProto, feeds: Mapping[str, Any], oracles: Sequence[str]) -> None:
        self._case, self._original, self._feeds, self._oracles = case, _serialized(proto), feeds, oracles
        self._model = self._fresh()
        self._before, self._interface = _serialized(ir.to_proto(self._model)), interface_of(self._model)
        self._limit = limit_bytes_for(self._model)
        self._judged: dict[bytes, str] = {}

    def _fresh(self) -> ir.Model:
        # Not from the message at hand: a model shares its tensors with the message that it was made from.
        model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(self._original))
        return model

    def verdict(self, run: Callable[[ir.Model, int], int]) -> str:
        model = self._model
        try:
            changed = run(model, self._limit)
            after = _serialized(ir.to_proto(model))
            if bool(changed) != (self._before != after):
                return f"untruthful: says {changed} changes, bytes {'are equal' if self._before == after else 'differ'}"
            if not changed:
                return "same"
            self._model = self._fresh()
            if run(model, self._limit) or _serialized(ir.to_proto(model)) != after:
                return "not idempotent"
        except Exception as exc:
            self._model = self._fresh()
            return f"raised {type(exc).__name__}: {exc}"
        if interface_of(model) != self._interface:
            return "interface changed"
        if after not in self._judged:
            self._judged[after] = _judge_bytes(self._case, after, self._oracles, self._feeds)
        return self._judged[after]


def _judge_bytes(case: Case, model: bytes, oracles: Sequence[str], feeds: Mapping[str, Any]) -> str:
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as exc:
        return f"invalid: {str(exc).splitlines()[0][:200]}"
    problems = (f"wrong in {oracle}: {problem}" for oracle in oracles if (problem := _ask(oracle, model, case, feeds)))
    return next(problems, "kept")


def _serialized(proto: onnx.ModelProto) -> bytes:
    return bytes(proto.SerializeToString(deterministic=True))


def _frozen(case: Case) -> onnx.ModelProto | None:
    """The model with each input a weight, where all inputs are tensors that onnx can store."""
    if not case.inputs or not all(isinstance(value, np.ndarray) for value in case.inputs.values()):
        return None
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    left = [value for value in model.graph.input if value.name not in case.inputs]
    del model.graph.input[:]
    model.graph.input.extend(left)
    names = {tensor.name for tensor in model.graph.initializer} & set(case.inputs)
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in names]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for name, value in case.inputs.items():
        try:
            tensor = numpy_helper.from_array(value, name)
        except (TypeError, ValueError, KeyError):
            return None
        if tensor.data_type != types[name]:
            return None
        model.graph.initializer.append(tensor)
    model.ir_version = max(model.ir_version, 4)
    return model


# --- many cases, in children ----------------------------------------------------------------------------------------


def run_suite(cases: Sequence[Case], passes: Sequence[Pass], workers: int) -> dict[str, dict[str, str]]:
    """Verdicts by case name. A child that dies or hangs costs the case that it was at."""
    verdicts: dict[str, dict[str, str]] = {}
    pending = {worker: list(range(worker, len(cases), workers)) for worker in range(workers)}
    context = multiprocessing.get_context("fork")
    children: dict[Any, tuple[Any, int]] = {}  # connection: (process, worker)

    def start(worker: int) -> None:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(cases, pending[worker], passes, theirs), daemon=True)
        child.start()
        theirs.close()
        children[ours] = (child, worker)

    for worker in pending:
        start(worker)
    while children:
        ready: list[Any] = multiprocessing.connection.wait(list(children), timeout=_TIMEOUT_S)
        for connection in ready or list(children):
            child, worker = children[connection]
            try:
                result = connection.recv() if ready else None
            except EOFError:
                result = None
            if result is not None:
                at, verdict = result
                verdicts[cases[at].name] = verdict
                pending[worker].remove(at)
                continue
            child.kill()
            child.join()
            del children[connection]
            if pending[worker]:
                at = pending[worker].pop(0)
                how = f"crash: child ended with {child.exitcode}" if ready else f"hang: over {_TIMEOUT_S} s"
                verdicts[cases[at].name] = {"oracles": "", "steps": "", PIPELINE: how}
            if pending[worker]:
                start(worker)
    return verdicts


def _work(cases: Sequence[Case], indices: Sequence[int], passes: Sequence[Pass], connection: Any) -> None:
    warnings.simplefilter("ignore")
    onnxruntime.set_default_logger_severity(4)
    for index in indices:
        connection.send((index, judge(cases[index], passes)))
    connection.close()


# --- the table ------------------------------------------------------------------------------------------------------


def table(verdicts: Mapping[str, Mapping[str, str]], passes: Sequence[Pass]) -> str:
    """Markdown: for each pass, of the cases with an oracle, how many were changed and kept; of all, what went wrong."""
    judged = {name: v for name, v in verdicts.items() if v["oracles"]}
    able = {oracle: sum(oracle in v["oracles"] for v in judged.values()) for oracle in ORACLES}
    lines = [
        f"{len(verdicts):,} cases, {len(judged):,} with an oracle; by oracle: {able}",
        "",
        "| pass | changed alone | in the pipelines | kept | of | problems |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in (*(step.name for step in passes), PIPELINE, FROZEN):
        mine = {case: v[name] for case, v in judged.items() if name in v}
        changed, kept = Counter(mine.values())["kept"], sum(verdict in GOOD for verdict in mine.values())
        bad = sum(v.get(name, "same") not in GOOD for v in verdicts.values())
        among = sum(name in v["steps"].split() for v in judged.values())
        lines.append(f"| {name} | {changed:,} | {among:,} | {kept:,} | {len(mine):,} | {bad} |")
    return "\n".join(lines)


def problems(verdicts: Mapping[str, Mapping[str, str]]) -> list[str]:
    return [
        f"{case}: {name}: {verdict}"
        for case, by_name in sorted(verdicts.items())
        for name, verdict in by_name.items()
        if name not in ("oracles", "steps") and verdict not in GOOD
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="run only the cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write every verdict here")
    arguments = parser.parse_args()
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = [case for case in load_cases() if arguments.only in case.name]
    verdicts = run_suite(cases, PASSES, arguments.workers)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(verdicts, indent=1, sort_keys=True))
    print(table(verdicts, PASSES))
    print(*problems(verdicts), sep="\n")
    judged = [verdict for verdict in verdicts.values() if verdict["oracles"]]
    bad = problems(verdicts)
    broken = {line.partition(":")[0] for line in bad}
    kept = len(judged) - sum(verdicts[name]["oracles"] != "" for name in broken)
    print(f"\nkept {kept:,} of {len(judged):,} in {time.monotonic() - started:.0f} s")
    return 0 if not bad else 1


if __name__ == "__main__":
    sys.exit(main())
