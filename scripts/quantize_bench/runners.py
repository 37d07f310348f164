"""A file opened for running, by ONNX Runtime or by OpenVINO, called with ``{name: array}``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from .sessions import open_session

Call = Callable[[Mapping[str, Any]], dict[str, Any]]


def open_runner(path: str, runtime: str, *, threads: int, options: Mapping[str, Any]) -> Call:
    """``runtime``: ``onnxruntime``, or ``openvino`` with ``options["precision"]``, a hint: ``f32`` or ``default``."""
    return {"onnxruntime": _onnxruntime, "openvino": _openvino}[runtime](path, threads, options)


def _onnxruntime(path: str, threads: int, options: Mapping[str, Any]) -> Call:
    session = open_session(path, threads=threads, options=options)
    names = [output.name for output in session.get_outputs()]
    wanted = {entry.name for entry in session.get_inputs()}

    def call(feeds: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in feeds.items() if name in wanted}
        return dict(zip(names, session.run(names, given), strict=True))

    return call


def _openvino(path: str, threads: int, options: Mapping[str, Any]) -> Call:
    openvino = importlib.import_module("openvino")
    config = {"INFERENCE_NUM_THREADS": str(threads), "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
    if options.get("precision") == "f32":
        config["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(path, "CPU", config)
    request = compiled.create_infer_request()
    names = [output.get_any_name() for output in compiled.outputs]

    def call(feeds: Mapping[str, Any]) -> dict[str, Any]:
        found = request.infer(dict(feeds), share_inputs=True)
        return {name: found[place] for place, name in enumerate(names)}

    return call
