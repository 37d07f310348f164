"""What is timed: forms of the original in PyTorch, and engines.

Why cuDNN's benchmark mode, and eager and compiled PyTorch each in four precisions: an engine is to be compared with the
best that PyTorch does, not with its defaults.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

from scripts.gpu import machine
from scripts.gpu.ceilings import dtype_for, set_precision
from scripts.gpu.children import Deadline
from scripts.gpu.missing import Json, MissingError, reason

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
"""What PyTorch is timed in: FP32 exact, FP32 with TF32 products, the whole model in half precision."""
ORIGINAL = "eager"
"""The plainest form, eager FP32: what the latency schedule calls the original."""
WARM_CALLS = 3
"""Untimed calls before those on the device, as TensorRT's runner has them."""


TORCH = ("eager", "compile")
"""Forms of the original in PyTorch."""

Opened: TypeAlias = tuple[Json, Any]
"""What is told of a candidate, ``missing`` where it cannot be run, and its runner: ``run``, ``time``, ``close`` and, for
the device boundary, ``time_device``."""


def described(name: str, how: str, precision: str, *, graph: bool = False, sha256: str | None = None) -> Json:
    """A candidate as it stands in the results. ``how``: one of `TORCH`, or the back end."""
    return {
        "candidate": name,
        "how": how,
        "precision": precision,
        "graph": graph,
        "sha256": sha256,
        "bytes": None,
        "notes": [],
    }


class TorchRunner:
    """The original on the GPU at one set of shapes: host arrays in, host arrays out, as an engine's runner has it.

    Inputs lie in buffers of their own, with a CUDA graph and without, so that both copy the same.
    """

    def __init__(
        self,
        torch: Any,
        call: Callable[..., Any],
        feeds: Mapping[str, Any],
        names: Sequence[str],
        precision: str,
        graph: bool,
    ) -> None:
        self._torch, self._call, self._names, self._precision = torch, call, names, precision
        self._buffers = {name: torch.from_numpy(value).to(machine.DEVICE) for name, value in feeds.items()}
        self._graph: Any = None
        self._held: Any = None
        if graph:
            self._capture()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        set_precision(self._torch, self._precision)
        return self._round_trip(feeds)

    def time(self, feeds: Mapping[str, Any], repeats: int) -> list[float]:
        set_precision(self._torch, self._precision)
        self._torch.cuda.synchronize()
        taken = []
        for _ in range(repeats):
            began = time.perf_counter()
            self._round_trip(feeds)
            taken.append(time.perf_counter() - began)
        return taken

    def time_device(self, feeds: Mapping[str, Any], repeats: int) -> list[float]:
        set_precision(self._torch, self._precision)
        self._fill(feeds)
        for _ in range(WARM_CALLS):
            self._launch()
        self._torch.cuda.synchronize()
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        taken = []
        for _ in range(repeats):
            start.record()
            self._launch()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        return taken

    def close(self) -> None:
        self._graph = self._held = None
        self._buffers = {}

    def _fill(self, feeds: Mapping[str, Any]) -> None:
        for name, buffer in self._buffers.items():
            buffer.copy_(self._torch.from_numpy(feeds[name]))

    def _launch(self) -> Any:
        if self._graph is not None:
            self._graph.replay()
            return self._held
        with self._torch.no_grad():
            return self._call(*self._buffers.values())

    def _round_trip(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self._fill(feeds)
        return {name: value.cpu().numpy() for name, value in zip(self._names, self._launch(), strict=True)}

    def _capture(self) -> None:
        """Source: https://docs.pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs": a side stream warms up first."""
        cuda = self._torch.cuda
        set_precision(self._torch, self._precision)
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(3):
                self._launch()
        cuda.current_stream().wait_stream(side)
        graph = cuda.CUDAGraph()
        with self._torch.no_grad(), cuda.graph(graph):
            self._held = self._call(*self._buffers.values())
        self._graph = graph


def typed(torch: Any, model: Any, precision: str) -> Callable[..., Any]:
    """The model as a function whose floats go in and come out as FP32, whatever it computes in."""
    dtype = dtype_for(torch, precision)
    if dtype is torch.float32:
        return lambda *tensors: tuple(model(*tensors))

    def call(*tensors: Any) -> Any:
        inside = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
        return tuple(out.float() if out.dtype is dtype else out for out in model(*inside))

    return call


def torch_candidates(
    how: str,
    torch: Any,
    models: MutableMapping[str, Any],
    feeds: Mapping[str, Any],
    names: Sequence[str],
    work: Json,
    deadline: Deadline,
) -> Iterator[Opened]:
    """The original in every precision, without a CUDA graph and with one.

    Args:
        how: ``eager`` or ``compile``.
        torch: the module.
        models: by precision; ``"fp32"`` must be there, on the GPU, and the others are made from it when they are needed.
        feeds: of the shapes to run.
        names: of the outputs.
        work: see `work.of_torch`.
        deadline: beyond it nothing is compiled.
    """
    call: Any = None
    for precision, graph in itertools.product(PRECISIONS, (False, True)):
        half = precision in ("fp16", "bf16")
        name = f"{how} {precision}{', CUDA graph' if graph else ''}"
        entry = described(ORIGINAL if name == "eager fp32" else name, how, precision, graph=graph)
        if "float_elements" in work:
            entry["bytes"] = work["float_elements"] * (2 if half else 4) + work["io_bytes"]
        call, runner = call if graph else None, None
        try:
            if how == "compile" and deadline.left() <= 0:
                raise MissingError("no time was left to compile it")
            if call is None:
                kind = precision if half else "fp32"
                if kind not in models:
                    models[kind] = copy.deepcopy(models["fp32"]).to(dtype_for(torch, kind))
                function = typed(torch, models[kind], precision)
                call = torch.compile(function, dynamic=False) if how == "compile" else function
            runner = TorchRunner(torch, call, feeds, names, precision, graph)
        except Exception as exc:
            entry["missing"] = reason(exc)
        yield entry, runner


def engine_candidates(manifests: Sequence[Any], work: Json) -> Iterator[Opened]:
    """The engines of artifacts, opened."""
    from compiler import backends

    for engine in itertools.chain.from_iterable(manifest.engines for manifest in manifests):
        provider = engine.options.get("provider", "")
        how = f"{engine.backend}, {provider}" if provider else engine.backend
        entry = described(engine.name, how, engine.precision.value, sha256=engine.sha256)
        weights = engine.proof and (engine.proof.weight_bytes or engine.proof.expected_weight_bytes)
        if not weights:
            weights = engine.size_bytes
            entry["notes"].append("bytes: the size of its file stands for its weights")
        if "io_bytes" in work:
            entry["bytes"] = weights + work["io_bytes"]
        runner = None
        try:
            runner = backends.get(engine.backend).open(engine, threads=0)
        except Exception as exc:
            entry["missing"] = reason(exc)
        yield entry, runner
