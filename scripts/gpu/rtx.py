"""Does an engine of TensorRT, or of TensorRT for RTX, load and run here at all?"""

from __future__ import annotations

import importlib
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scripts.gpu.cuda import Memory, cuda_runtime
from scripts.gpu.missing import Emit, Json, MissingError, module, reason

FLAVOURS = ("tensorrt_rtx", "tensorrt")
ROWS, COLUMNS = 4, 16
WEIGHTS = [((7 * row + 3 * column) % 11 - 5) / 8 for row in range(COLUMNS) for column in range(COLUMNS)]
"""Eighths up to 5/8, as are the inputs: the products are exact in FP32 and in TF32."""


def part(job: Json, emit: Emit) -> None:
    try_flavour(job["flavour"], emit)


def _field(number: int, value: int | bytes | str) -> bytes:
    """One field of a protobuf message: an integer, or bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    raw = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(raw)) + raw


def _varint(value: int) -> bytes:
    parts = []
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def tiny_model() -> bytes:
    """``y = relu(x @ w)`` as ONNX, ``x [4, 16]``, FP32, opset 20; written by hand, as onnx may not be installed.

    Source: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, for the field numbers.
    """

    def tensor(name: str) -> bytes:
        dims = b"".join(_field(1, _field(1, size)) for size in (ROWS, COLUMNS))
        return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, dims)))

    def node(op: str, inputs: Sequence[str], output: str) -> bytes:
        return b"".join(_field(1, name) for name in inputs) + _field(2, output) + _field(3, op.lower()) + _field(4, op)

    raw = struct.pack(f"<{len(WEIGHTS)}f", *WEIGHTS)
    weights = _field(1, COLUMNS) + _field(1, COLUMNS) + _field(2, 1) + _field(8, "w") + _field(9, raw)
    graph = b"".join(
        (
            _field(1, node("MatMul", ["x", "w"], "m")),
            _field(1, node("Relu", ["m"], "y")),
            _field(2, "tiny"),
            _field(5, weights),
            _field(11, tensor("x")),
            _field(12, tensor("y")),
        )
    )
    return _field(1, 9) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 20))


def tiny_answer() -> tuple[Any, Any]:
    """An input for `tiny_model`, and what numpy says comes out."""
    np = module("numpy")
    x = ((np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) * 5) % 9 - 4).astype(np.float32) / 8
    return x, np.maximum(x @ np.array(WEIGHTS, np.float32).reshape(COLUMNS, COLUMNS), 0)


def try_flavour(
    flavour: str,
    emit: Emit,
    *,
    load: Callable[[str], Any] = importlib.import_module,
    memory: Callable[[], Any] = lambda: Memory(cuda_runtime()),
) -> None:
    """Build a tiny engine, load it, run it, compare it with numpy.

    Every step that was begun is in ``steps``, so that a crash leaves its place; ``log`` holds the library's own lines
    word by word, the verbose ones from loading on.
    """
    found: Json = {"steps": [], "log": [], "worked": False}

    def step(name: str, run: Callable[[], Any]) -> Any:
        entry: Json = {"step": name, "error": "it ended the process"}
        found["steps"].append(entry)
        emit(found)
        began = time.perf_counter()
        try:
            result = run()
        except BaseException as exc:
            entry["error"] = reason(exc, whole=True)
            raise
        del entry["error"]
        entry["seconds"] = time.perf_counter() - began
        return result

    try:
        trt = step("import", lambda: load(flavour))
        found["version"] = str(trt.__version__)
        logger = _logger(trt, found["log"])
        plan = step("build", lambda: _build(trt, logger))
        found["plan_bytes"] = len(plan)
        logger.verbose = True
        runtime = step("open the runtime", lambda: _made(trt.Runtime(logger), "Runtime"))
        engine = step("load", lambda: _made(runtime.deserialize_cuda_engine(plan), "deserialize_cuda_engine"))
        context = step("make a context", lambda: _made(engine.create_execution_context(), "create_execution_context"))
        held = step("take device memory", memory)
        output = step("run", lambda: _run(context, held))
        found["max_abs_diff"] = step("compare", lambda: _compare(output))
        found["worked"] = True
    except Exception as exc:  # the step has it already
        errors = [line["text"] for line in found["log"] if "ERROR" in line["severity"]]
        found["missing"] = "; ".join([f"{found['steps'][-1]['step']}: {reason(exc, whole=True)}", *errors])
    emit(found)


def _logger(trt: Any, log: list[Json]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # known only when the library is
        verbose = False

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            name = str(getattr(severity, "name", severity))
            if name != "VERBOSE" or self.verbose:
                log.append({"severity": name, "text": text})

    return Logger()


def _made(value: Any, call: str) -> Any:
    if value is None:
        raise MissingError(f"{call}() returned nothing")
    return value


def _build(trt: Any, logger: Any) -> bytes:
    builder = _made(trt.Builder(logger), "Builder")
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(tiny_model()):
        told = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise MissingError(f"the parser refused the model: {told}")
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    return bytes(_made(plan, "build_serialized_network"))


def _run(context: Any, memory: Any) -> Any:
    x, expected = tiny_answer()
    addresses = {"x": memory.upload(x), "y": memory.upload(expected * 0 - 1)}
    for name, address in addresses.items():
        if not context.set_tensor_address(name, address):
            raise MissingError(f"set_tensor_address('{name}') returned False")
    if not context.execute_async_v3(memory.stream):
        raise MissingError("execute_async_v3() returned False")
    return memory.download(addresses["y"])


def _compare(output: Any) -> float:
    _, expected = tiny_answer()
    difference = float(abs(output - expected).max())
    if not difference <= 1e-5:
        raise MissingError(f"the outputs differ from numpy's by {difference:g}; at most 1e-05 was expected")
    return difference


def answer(flavours: Mapping[str, Json]) -> str:
    """One line a flavour: whether its engines run here."""
    lines = []
    for flavour, found in flavours.items():
        if found.get("worked"):
            lines.append(
                f"{flavour} {found['version']}: yes: an engine of {found['plan_bytes']} bytes was built, loaded and run, "
                f"and differs from numpy by {found['max_abs_diff']:g}"
            )
        else:
            version = f" {found['version']}" if "version" in found else ""
            lines.append(f"{flavour}{version}: no: {found.get('missing', 'it was not tried')}")
    return "\n".join(lines)
