"""A deserialised plan: what it takes and gives, and execution contexts that run it.

A context remembers what it was told last, so that only what changed from call to call is told again.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from compiler.backends.feeds import listed
from compiler.backends.tensorrt.cuda import CudaLike
from compiler.backends.tensorrt.log import ERRORS, listener, shorten
from compiler.backends.tensorrt.memory import Buffer
from compiler.backends.tensorrt.options import RTX
from compiler.backends.tensorrt.profiles import at
from compiler.errors import BuildError
from compiler.spec import DimRange, Engine, dtype_of

Shape: TypeAlias = tuple[int, ...]

_MAX_ERRORS = 50
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
    "FP8": "float8_e4m3fn",
}
"""By TensorRT's name."""


class Log:
    """TensorRT's error lines since they were last taken. Lives as long as whatever was made with its ``logger``."""

    def __init__(self, trt: Any) -> None:
        self._errors = errors = deque[str](maxlen=_MAX_ERRORS)

        def add(severity: str, message: str) -> None:
            if severity in ERRORS:
                errors.append(message)

        self.logger = listener(trt, add)

    def take(self) -> list[str]:
        taken = list(self._errors)
        self._errors.clear()
        return taken


class Core:
    """A deserialised plan, and what is asked of it once.

    Where nobody asks for CUDA graphs or against them, they are captured, except for TensorRT for RTX with dynamic axes: it
    runs slower kernels at first, and those that it compiles for a shape in the background would never get into a graph
    that exists:
    https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/work-with-cuda-graphs.html
    """

    def __init__(
        self,
        engine: Engine,
        plan: Any,
        trt: Any,
        cuda: CudaLike,
        *,
        log: Log | None = None,
        runtime: Any = None,
        graphs: bool | None = None,
    ) -> None:
        self.where = engine.path.name
        self.plan, self.trt, self.cuda, self.log = plan, trt, cuda, log
        self._runtime = runtime
        self.notes: list[str] = []
        self.graphs = graphs is not False
        dynamic = any(isinstance(dim, str) for spec in engine.inputs for dim in spec.shape)
        if graphs is None and engine.backend == RTX and dynamic:
            self.graphs = False
            self.notes.append(
                "no CUDA graphs: TensorRT for RTX compiles faster kernels for a shape while it runs; a graph would keep the "
                "slow ones"
            )
        self.lock = threading.Lock()
        """Held while something is made from the plan, which may not happen twice at once."""
        self.profiles: tuple[Mapping[str, DimRange], ...] = engine.profiles or (engine.axes,)
        self.specs = {spec.name: spec for spec in (*engine.inputs, *engine.outputs)}
        self.dtypes = {name: dtype_of(spec) for name, spec in self.specs.items()}
        self._hold_against(engine)
        self.on_host = frozenset(
            name for name in (*self.inputs, *self.outputs) if plan.get_tensor_location(name) == trt.TensorLocation.HOST
        )
        """Shape tensors, which TensorRT reads and writes in host memory."""
        self.aliases: dict[str, str] = {}
        """The input that TensorRT overwrites, by output."""
        for name in self.outputs:
            if shared := plan.get_aliased_input_tensor(name):
                self.aliases[name] = shared
        self.allocator = _allocator_class(trt)
        self.limits = self._limits()
        """Bytes of a tensor at the largest that any profile takes, where that is known."""
        if on_host := sorted(self.on_host.intersection(self.outputs)):
            self.graphs = False  # replaying one would not write them again
            self.notes.append(f"no CUDA graphs: TensorRT computes {listed(on_host)} on the host")

    def close(self) -> None:
        """Let TensorRT's part go: the plan before the runtime that made it; the logger outlives both."""
        self.plan = None
        self._runtime = None

    def _limits(self) -> dict[str, int]:
        limits = {}
        for name in self.inputs:
            shapes = [at(self.specs[name], ranges, "max") for ranges in self.profiles]
            known = [self.size(name, shape) for shape in shapes if shape is not None]
            if len(known) == len(shapes):
                limits[name] = max(known)
        return limits

    def _hold_against(self, engine: Engine) -> None:
        """Refuse a plan that is not what the engine's description says."""
        plan, trt = self.plan, self.trt
        names = [plan.get_tensor_name(index) for index in range(plan.num_io_tensors)]
        takes = {name for name in names if plan.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        gives = set(names) - takes
        self.inputs = tuple(spec.name for spec in engine.inputs if spec.name in takes)
        self.outputs = tuple(spec.name for spec in engine.outputs)
        if takes != set(self.inputs) or gives != set(self.outputs):
            declared = f"{listed(spec.name for spec in engine.inputs)} -> {listed(self.outputs)}"
            raise self._is_other(f"computes {listed(sorted(takes))} -> {listed(sorted(gives))}", f"{declared} was")
        if unused := [spec.name for spec in engine.inputs if spec.name not in takes]:
            self.notes.append(f"the plan does not use {listed(unused)}: what is fed there is checked and left")
        for name in names:
            found = plan.get_tensor_dtype(name).name
            if _DTYPES.get(found) != self.specs[name].dtype:
                raise self._is_other(f"tensor '{name}' is {found}", f"{self.specs[name].dtype} was")
        if plan.num_optimization_profiles != len(self.profiles):
            raise self._is_other(
                f"has {plan.num_optimization_profiles} optimisation profiles", f"{len(self.profiles)} were"
            )

    def _is_other(self, found: str, expected: str) -> BuildError:
        return BuildError(f"{self.where}: {found}; {expected} expected. Build the engine again.")

    def failed(self, found: str, expected: str) -> BuildError:
        words = shorten(self.log.take() if self.log is not None else [])
        return BuildError(f"{self.where}: {found}; {expected} was expected. Its own words: {words}")

    def note(self, text: str) -> None:
        with self.lock:
            if text not in self.notes:
                self.notes.append(text)

    def size(self, name: str, shape: Shape) -> int:
        return math.prod(shape) * self.dtypes[name].itemsize


def _allocator_class(trt: Any) -> Any:
    """How TensorRT asks for the memory of an output whose shape it learns while it runs."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.buffer: Buffer | None = None
            self.shape: Shape | None = None
            self.failure: BuildError | None = None

        def reallocate_output_async(
            self,
            tensor_name: str,  # noqa: ARG002
            memory: int,  # noqa: ARG002
            size: int,
            alignment: int,  # noqa: ARG002 - cudaMalloc aligns to 256 bytes, and TensorRT asks for no more
            stream: int,  # noqa: ARG002
        ) -> int:
            assert self.buffer is not None
            try:
                self.buffer.reserve(size)
            except BuildError as exc:  # it must not pass through TensorRT, which takes 0 as a refusal
                self.failure = exc
                return 0
            return self.buffer.address

        def notify_shape(self, tensor_name: str, shape: Any) -> None:  # noqa: ARG002
            self.shape = tuple(shape)

    return Allocator


@dataclass
class Call:
    """One call: its shapes and where its tensors lie. The shape of an output is None until it is computed where it
    depends on data."""

    profile: int
    shapes: tuple[tuple[str, Shape], ...]
    values: tuple[bytes, ...]
    """Of shape tensors, on which other shapes depend."""
    memory: Mapping[str, Buffer]
    outputs: dict[str, Shape | None] = field(default_factory=dict)

    def signature(self) -> tuple[Any, ...]:
        """What a CUDA graph depends on."""
        return (
            self.profile,
            self.shapes,
            self.values,
            tuple(self.memory[name].address for name, _ in self.shapes),
            tuple(self.memory[name].address for name in self.outputs),
        )


class Context:
    """An execution context at one profile; remembers what it was told last."""

    def __init__(self, core: Core, profile: int, workspace: int, workspace_size: int, stream: int) -> None:
        self._core = core
        trt = core.trt
        with core.lock:
            context = core.plan.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise core.failed("TensorRT makes no execution context", "one more")
        context.set_device_memory(workspace, workspace_size)
        if not context.set_optimization_profile_async(profile, stream):
            raise core.failed(f"TensorRT refuses profile {profile + 1}", "a profile that it was built with")
        self._context = context
        self._shapes: tuple[tuple[str, Shape], ...] = ()
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}

    def set_shapes(self, shapes: tuple[tuple[str, Shape], ...]) -> None:
        if shapes == self._shapes:
            return
        self._shapes = ()
        for name, shape in shapes:
            if not self._context.set_input_shape(name, shape):
                raise self._core.failed(
                    f"input '{name}': TensorRT refuses the shape {list(shape)}", "one inside a profile"
                )
        self._shapes = shapes

    def set_address(self, name: str, address: int) -> None:
        if self._addresses.get(name) == address:
            return
        if not self._context.set_tensor_address(name, address):
            raise self._core.failed(f"tensor '{name}': TensorRT refuses its memory", "an address that it takes")
        self._addresses[name] = address

    def at_most(self, name: str) -> int:
        """Bytes of an output at the largest that the profile takes; 0 where TensorRT does not say."""
        return max(0, int(self._context.get_max_output_size(name)))

    def infer(self) -> dict[str, Shape | None]:
        """The shapes of the outputs, of the inputs' shapes and of the values of shape tensors."""
        core = self._core
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as exc:
            raise core.failed(f"TensorRT cannot infer shapes ({exc})", "inputs whose shapes fit together") from exc
        if missing:
            raise core.failed(f"TensorRT lacks the shape of {listed(missing)}", "every shape")
        shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in core.outputs}
        return {name: None if any(dim < 0 for dim in shape) else shape for name, shape in shapes.items()}

    def enqueue(self, call: Call, stream: int) -> None:
        """Put the call on ``stream``; fills in the shapes that depend on data, for which TensorRT waits by itself."""
        core = self._core
        self.set_shapes(call.shapes)
        for name, _ in call.shapes:
            self.set_address(name, call.memory[name].address)
        unknown = [name for name, shape in call.outputs.items() if shape is None]
        for name, buffer in ((name, call.memory[name]) for name in call.outputs):
            if name in unknown:
                self._allocate_late(name, buffer)
            else:
                self.set_address(name, buffer.address)
        started = self._context.execute_async_v3(stream)
        failures = [self._allocators[name].failure for name in unknown]
        if failure := next((failure for failure in failures if failure is not None), None):
            raise failure
        if not started:
            raise core.failed("TensorRT cannot run it", "a call that it runs")
        for name in unknown:
            call.outputs[name] = self._allocators[name].shape
            if call.outputs[name] is None:
                raise core.failed(f"output '{name}': TensorRT did not say its shape", "a shape")

    def _allocate_late(self, name: str, buffer: Buffer) -> None:
        if name not in self._allocators:
            allocator = self._core.allocator()
            if not self._context.set_output_allocator(name, allocator):
                raise self._core.failed(f"output '{name}': TensorRT refuses an allocator", "an output")
            self._allocators[name] = allocator
        allocator = self._allocators[name]
        allocator.buffer, allocator.shape, allocator.failure = buffer, None, None
