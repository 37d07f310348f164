"""Running a TensorRT plan: buffers that stay, pinned host memory, streams of its own, CUDA graphs; no PyTorch.

A *lane* is what one call at a time runs on: three streams (copies in, work, copies out), an execution context for each
optimisation profile, one block of memory for intermediate results that these contexts share, and *slots*. A slot holds
the inputs and outputs of one call. `PlanRunner.run` takes a lane and a slot; `PlanRunner.run_many` keeps three slots in
flight, so that one call is copied in while another computes and a third is copied out.

Why a context of its own for every CUDA graph: a graph keeps what its context held when it was captured, so the context
must never be given other shapes. NVIDIA's advice is the same, and to let such contexts share their memory:
https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/best-practices.html

Every exit code and every None of TensorRT becomes a `BuildError` that ends in TensorRT's own words.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from compiler.backends.feeds import FeedCheck, listed, shape_fits
from compiler.backends.tensorrt.cuda import Cuda, CudaLike, Pinned
from compiler.backends.tensorrt.log import shorten
from compiler.errors import BuildError, suggest
from compiler.spec import Array, DimRange, Engine, Feeds, TensorSpec, dtype_of

Shape: TypeAlias = tuple[int, ...]

_IN_FLIGHT = 3
_MAX_GRAPHS = 16
_MAX_SEEN = 256
_MAX_SHAPES = 256
_MAX_ERRORS = 50
_HOST_BYTES = 4096
"""Enough for any shape tensor."""
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


def open_plan(
    engine: Engine, trt: Any, *, contexts: int = 1, graphs: bool = True, cuda: CudaLike | None = None
) -> PlanRunner:
    """Open ``engine`` through the module ``trt`` (``tensorrt`` or ``tensorrt_rtx``).

    ``contexts`` calls may run at once; ``graphs=False`` never captures a CUDA graph.

    Raises:
        BuildError: the plan is missing or is not the one that was built, or it cannot run on this machine.
    """
    where = engine.path.name
    plan_bytes = _read(engine)
    if cuda is None:
        cuda = Cuda(where)
    log = _Log(trt)
    try:
        runtime = trt.Runtime(log.logger)
        if engine.options.get("version_compatible") == "on":  # such a plan brings its own runtime as host code
            runtime.engine_host_code_allowed = True
        plan = runtime.deserialize_cuda_engine(plan_bytes)
    except Exception as exc:
        raise _not_opened(where, trt, log, str(exc)) from exc
    if plan is None:
        raise _not_opened(where, trt, log)
    del plan_bytes
    _stream_weights(engine, plan, log)
    return PlanRunner(engine, plan, trt, cuda, log=log, runtime=runtime, contexts=contexts, graphs=graphs)


def _read(engine: Engine) -> bytes:
    """The plan, which is what was built: what was hashed is what is opened, since the bytes are read once."""
    where = engine.path.name
    try:
        plan = engine.path.read_bytes()
        found = _sha256(engine.path, plan, engine.external_data)
    except OSError as exc:
        raise BuildError(
            f"{where}: cannot be read ({exc.strerror or exc}); the plan that was built was expected. "
            "Build the engine again."
        ) from exc
    if found != engine.sha256:
        raise BuildError(
            f"{where}: its SHA-256 is {found}; {engine.sha256} was expected. It was not opened, since deserialising a plan "
            "runs native code. Build the engine again, or fetch the file again."
        )
    return plan


def _sha256(path: Path, plan: bytes, external_data: Sequence[Path]) -> str:
    if not external_data:
        return hashlib.sha256(plan).hexdigest()
    from compiler.onnx_files import sha256_of

    return sha256_of(path, external_data)


def _stream_weights(engine: Engine, plan: Any, log: _Log) -> None:
    """Say how many bytes of weights stay on the GPU; contexts, made after this, depend on it."""
    asked = engine.options.get("weight_streaming_mib")
    if asked is None:
        return
    log.take()
    try:
        plan.weight_streaming_budget_v2 = int(asked) << 20
        errors = log.take()
    except Exception as exc:
        errors = [*log.take(), str(exc)]
    if errors:
        raise BuildError(
            f"{engine.path.name}: weights cannot be streamed with {asked} MiB of them on the GPU; a budget that TensorRT "
            f"takes was expected. Change weight_streaming_mib, or leave it out. Its own words: {shorten(errors)}"
        )


_ADVICE = (
    (("CUDA driver version", "cudaError 35"), "Install an NVIDIA driver that is new enough for this TensorRT."),
    (("no CUDA-capable device", "cudaError 100"), "Run it where an NVIDIA GPU can be seen."),
    (
        ("incompatible device", "compute capability", "hardware compatib"),
        "Build the engine on this GPU, or with hardware compatibility.",
    ),
    (
        (
            "serialization version",
            "Version tag",
            "stdVersionRead",
            "kEXPECTED_MAGIC_TAG",
            "not compatible with this version",
        ),
        "Build the engine with the {module} installed here ({version}), or install the one that built it.",
    ),
    (("out of memory", "OutOfMemory", "insufficient memory"), "End other programs on the GPU."),
)


def _not_opened(where: str, trt: Any, log: _Log, *more: str) -> BuildError:
    errors = [*log.take(), *more]
    text = "\n".join(errors)
    advice = next(
        (advice for marks, advice in _ADVICE if any(mark in text for mark in marks)),
        "Build the engine again on this machine.",
    )
    advice = advice.format(module=trt.__name__, version=getattr(trt, "__version__", "version unknown"))
    return BuildError(
        f"{where}: {trt.__name__} cannot open it; a plan for this machine was expected. {advice} "
        f"Its own words: {shorten(errors)}"
    )


class _Log:
    """TensorRT's error lines since they were last taken. Lives as long as whatever was made with its ``logger``."""

    def __init__(self, trt: Any) -> None:
        errors: deque[str] = deque(maxlen=_MAX_ERRORS)

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity.name in ("ERROR", "INTERNAL_ERROR"):
                    errors.append(msg)

        self._errors = errors
        self.logger = Logger()

    def take(self) -> list[str]:
        taken = list(self._errors)
        self._errors.clear()
        return taken


# --- profiles -------------------------------------------------------------------------------------------------------


def choose_profile(where: str, profiles: Sequence[Mapping[str, DimRange]], sizes: Mapping[str, int]) -> int:
    """The index of the profile that contains every size.

    Of several, the one whose optimum is nearest: the least sum over the axes of ``|log2(size / opt)|``, so that twice and
    half the optimum are equally far (sizes below 1 count as 1); of equally near ones the first.

    >>> short, long = {"n": DimRange(min=1, opt=2, max=16)}, {"n": DimRange(min=1, opt=64, max=64)}
    >>> choose_profile("engine.plan", [short, long], {"n": 8}), choose_profile("engine.plan", [short, long], {"n": 13})
    (0, 1)

    Raises:
        BuildError: no profile contains them all.
    """
    fitting = [
        index for index, ranges in enumerate(profiles) if all(_contains(ranges, *item) for item in sizes.items())
    ]
    if not fitting:
        raise _outside(where, profiles, sizes)

    def distance(index: int) -> float:
        ranges = profiles[index]
        return sum(
            abs(math.log2(max(size, 1) / max(ranges[axis].opt, 1))) for axis, size in sizes.items() if axis in ranges
        )

    return min(fitting, key=distance)


def _contains(ranges: Mapping[str, DimRange], axis: str, size: int) -> bool:
    return axis not in ranges or ranges[axis].min <= size <= ranges[axis].max


def _outside(where: str, profiles: Sequence[Mapping[str, DimRange]], sizes: Mapping[str, int]) -> BuildError:
    for axis, size in sizes.items():
        if not any(_contains(ranges, axis, size) for ranges in profiles):
            first, *others = (
                (f"{ranges[axis].min} to {ranges[axis].max}", f"(profile {index})")
                for index, ranges in enumerate(profiles, start=1)
            )
            expected = ", ".join([f"{first[0]} was expected {first[1]}", *(" ".join(other) for other in others)])
            return BuildError(f"{where}: axis '{axis}' is {size}; {expected}. Build with a wider profile.")
    shown = {axis: size for axis, size in sizes.items() if any(axis in ranges for ranges in profiles)}
    offered = "; ".join(
        ", ".join(f"'{axis}' {ranges[axis].min} to {ranges[axis].max}" for axis in shown if axis in ranges)
        + f" (profile {index})"
        for index, ranges in enumerate(profiles, start=1)
    )
    found = ", ".join(f"'{axis}' is {size}" for axis, size in shown.items())
    return BuildError(
        f"{where}: {found}; sizes inside one and the same profile were expected: {offered}. Build with a wider profile."
    )


def _at(spec: TensorSpec, ranges: Mapping[str, DimRange], end: str) -> Shape | None:
    """The shape of an input at one end of a profile; None where an axis has no range."""
    if any(isinstance(dim, str) and dim not in ranges for dim in spec.shape):
        return None
    return tuple(dim if isinstance(dim, int) else int(getattr(ranges[dim], end)) for dim in spec.shape)


# --- memory ---------------------------------------------------------------------------------------------------------


class _Buffer:
    """Memory of one tensor: on the device, pinned on the host, or both; it grows by doubling and never shrinks."""

    def __init__(self, cuda: CudaLike, *, on_device: bool, on_host: bool) -> None:
        self._cuda = cuda
        self._on_device, self._on_host = on_device, on_host
        self._host: Pinned | None = None
        self._device: int | None = None
        self.capacity = 0

    @property
    def device(self) -> int:
        assert self._device is not None
        return self._device

    @property
    def host(self) -> Pinned:
        assert self._host is not None
        return self._host

    @property
    def address(self) -> int:
        """Where TensorRT finds the tensor."""
        return self.device if self._on_device else self.host.address

    def reserve(self, size: int, limit: int = 0) -> None:
        """Hold at least ``size`` bytes; growing stops at ``limit``, where there is one, unless ``size`` is more. Where this
        grows, what was held is lost; nothing in flight may use it."""
        size = max(1, size)  # an empty tensor has an address too
        if size <= self.capacity:
            return
        grown = 2 * self.capacity
        size = max(size, min(grown, limit) if limit else grown)
        self.close()
        if self._on_device:
            self._device = self._cuda.malloc(size)
        if self._on_host:
            self._host = self._cuda.malloc_host(size)
        self.capacity = size

    def close(self) -> None:
        self.capacity = 0
        device, host = self._device, self._host
        self._device = self._host = None
        if device is not None:
            self._cuda.free(device)
        if host is not None:
            self._cuda.free_host(host)

    def write(self, value: Array) -> None:
        np.copyto(np.ndarray(value.shape, value.dtype, self.host.view), value)

    def read(self, shape: Shape, dtype: np.dtype[Any]) -> Array:
        return np.ndarray(shape, dtype, self.host.view).copy()


class _Slot:
    """Inputs and outputs of one call, by tensor name; an output that TensorRT writes in place shares its input's."""

    def __init__(self, core: _Core) -> None:
        self._cuda = core.cuda
        self.memory: dict[str, _Buffer] = {}
        self._events: list[int] = []
        for name in (*core.inputs, *core.outputs):
            shared = core.aliases.get(name)
            self.memory[name] = (
                self.memory[shared]
                if shared is not None
                else _Buffer(self._cuda, on_device=name not in core.on_host, on_host=True)
            )

    @property
    def events(self) -> tuple[int, int, int]:
        """Fed, computed, done."""
        while len(self._events) < 3:
            self._events.append(self._cuda.create_event())
        fed, computed, done = self._events
        return fed, computed, done

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for buffer in self.memory.values():
                stack.callback(buffer.close)
            for event in self._events:
                stack.callback(self._cuda.destroy_event, event)
            self._events = []


# --- what all lanes share -------------------------------------------------------------------------------------------


class _Core:
    """A deserialised plan, and what is asked of it once."""

    def __init__(self, engine: Engine, plan: Any, trt: Any, cuda: CudaLike, log: _Log | None, graphs: bool) -> None:
        self.where = engine.path.name
        self.plan, self.trt, self.cuda, self.log = plan, trt, cuda, log
        self.graphs = graphs
        self.notes: list[str] = []
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

    def _limits(self) -> dict[str, int]:
        limits = {}
        for name in self.inputs:
            shapes = [_at(self.specs[name], ranges, "max") for ranges in self.profiles]
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
            self.buffer: _Buffer | None = None
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


# --- contexts -------------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """One call: its shapes and where its tensors lie. The shape of an output is None until it is computed where it
    depends on data."""

    profile: int
    shapes: tuple[tuple[str, Shape], ...]
    values: tuple[bytes, ...]
    """Of shape tensors, on which other shapes depend."""
    memory: Mapping[str, _Buffer]
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


class _Context:
    """An execution context at one profile; remembers what it was told last."""

    def __init__(self, core: _Core, profile: int, workspace: int, workspace_size: int, stream: int) -> None:
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

    def enqueue(self, call: _Call, stream: int) -> None:
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

    def _allocate_late(self, name: str, buffer: _Buffer) -> None:
        if name not in self._allocators:
            allocator = self._core.allocator()
            if not self._context.set_output_allocator(name, allocator):
                raise self._core.failed(f"output '{name}': TensorRT refuses an allocator", "an output")
            self._allocators[name] = allocator
        allocator = self._allocators[name]
        allocator.buffer, allocator.shape, allocator.failure = buffer, None, None


# --- lanes ----------------------------------------------------------------------------------------------------------


class _Lane:
    """What one call at a time runs on."""

    def __init__(self, core: _Core) -> None:
        self._core = core
        cuda = core.cuda
        self._stack = contextlib.ExitStack()
        self._contexts: list[_Context] = []
        self._graphs: OrderedDict[tuple[Any, ...], tuple[int, _Context]] = OrderedDict()
        self._seen: OrderedDict[tuple[Any, ...], None] = OrderedDict()
        self._inferred: OrderedDict[tuple[Any, ...], dict[str, Shape | None]] = OrderedDict()
        self._free: deque[_Slot] = deque()
        self._slots: list[_Slot] = []
        self._streams: list[int] = []
        try:
            self.incoming, self.work, self.outgoing = (self._stream() for _ in range(3))
            # The streams wait for one another; whoever frees anything first waits for all.
            self._stack.callback(self._free_all)
            self._workspace_size = max(256, core.plan.device_memory_size_v2)
            self._workspace = cuda.malloc(self._workspace_size)
            self._stack.callback(cuda.free, self._workspace)
            self._stack.callback(self._drop_contexts)
            self._contexts = [self._context(profile) for profile in range(len(core.profiles))]
            slot = self._new_slot()
            self._reserve(slot)
            self.give_slot(slot)
            cuda.synchronize(self.work)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with contextlib.suppress(BuildError):
            self.settle()
        self._stack.close()

    def settle(self) -> None:
        """Wait for everything that was put on the lane."""
        for stream in self._streams:
            self._core.cuda.synchronize(stream)

    def _stream(self) -> int:
        stream = self._core.cuda.create_stream()
        self._stack.callback(self._core.cuda.destroy_stream, stream)
        self._streams.append(stream)
        return stream

    def _context(self, profile: int) -> _Context:
        return _Context(self._core, profile, self._workspace, self._workspace_size, self.work)

    def _free_all(self) -> None:
        with contextlib.ExitStack() as stack:
            for slot in self._slots:
                stack.callback(slot.close)
            self._slots = []

    def _drop_contexts(self) -> None:
        with contextlib.ExitStack() as stack:
            for executable, _ in self._graphs.values():
                stack.callback(self._core.cuda.destroy_executable, executable)
            self._graphs.clear()
            self._contexts.clear()

    # --- slots ---

    @contextlib.contextmanager
    def slot(self) -> Iterator[_Slot]:
        """A slot for one call that is over when this ends; what failed is waited for."""
        slot = self.take_slot()
        try:
            yield slot
        except BaseException:
            with contextlib.suppress(BuildError):
                self.settle()
            raise
        finally:
            self.give_slot(slot)

    def take_slot(self) -> _Slot:
        try:
            return self._free.pop()
        except IndexError:
            return self._new_slot()

    def give_slot(self, slot: _Slot) -> None:
        self._free.append(slot)

    def _new_slot(self) -> _Slot:
        slot = _Slot(self._core)
        self._slots.append(slot)
        return slot

    def _reserve(self, slot: _Slot) -> None:
        """Give the slot what every profile needs at its optimum."""
        core = self._core
        for profile, ranges in enumerate(core.profiles):
            shapes = {name: _at(core.specs[name], ranges, "opt") for name in core.inputs}
            known = tuple((name, shape) for name, shape in shapes.items() if shape is not None)
            for name, shape in known:
                slot.memory[name].reserve(core.size(name, shape), core.limits.get(name, 0))
            if len(known) == len(shapes) and not core.on_host.intersection(core.inputs):
                for name, output in self._outputs(_Call(profile, known, (), slot.memory)).items():
                    most = self._contexts[profile].at_most(name)
                    core.limits[name] = max(core.limits.get(name, 0), most)
                    if output is not None:
                        slot.memory[name].reserve(core.size(name, output), core.limits[name])

    # --- a call, step by step ---

    def prepare(
        self, profile: int, feeds: Feeds, memory: Mapping[str, _Buffer], carried: Mapping[str, Shape] | None = None
    ) -> _Call:
        """Memory and output shapes for a call; ``carried`` inputs lie in memory already. Values of shape tensors are
        written here, since shapes depend on them."""
        core, carried = self._core, carried or {}
        shapes = tuple((name, carried[name] if name in carried else feeds[name].shape) for name in core.inputs)
        values = []
        for name, shape in shapes:
            if name not in carried:
                memory[name].reserve(core.size(name, shape), core.limits.get(name, 0))
                if name in core.on_host:
                    memory[name].reserve(_HOST_BYTES)
                    memory[name].write(feeds[name])
                    values.append(feeds[name].tobytes())
        call = _Call(profile, shapes, tuple(values), memory)
        call.outputs = dict(self._outputs(call))
        for name, output in call.outputs.items():
            size = core.size(name, output) if output is not None else 0
            if name in core.aliases and size > memory[name].capacity:
                raise BuildError(
                    f"{core.where}: output '{name}' takes {size} bytes in the place of input '{core.aliases[name]}', which "
                    f"has {memory[name].capacity}; the same shape was expected. Build the engine again."
                )
            memory[name].reserve(size, core.limits.get(name, 0))
        return call

    def _outputs(self, call: _Call) -> dict[str, Shape | None]:
        key = (call.profile, call.shapes, call.values)
        found = self._inferred.get(key)
        if found is None:
            told = self._contexts[call.profile]
            told.set_shapes(call.shapes)
            for name in self._core.on_host:
                # Outputs too: inferring writes them, and must not write where another call's lie.
                call.memory[name].reserve(_HOST_BYTES)
                told.set_address(name, call.memory[name].address)
            found = told.infer()
            _remember(self._inferred, key, found, _MAX_SHAPES)
        else:
            self._inferred.move_to_end(key)
        return found

    def put(self, call: _Call, feeds: Feeds, stream: int) -> None:
        """Copy ``feeds`` to the device."""
        core = self._core
        for name, shape in call.shapes:
            size = core.size(name, shape)
            if name in feeds and name not in core.on_host and size:
                call.memory[name].write(feeds[name])
                core.cuda.copy_in(call.memory[name].device, call.memory[name].host.address, size, stream)

    def enqueue(self, call: _Call) -> None:
        """Put the call's work on the lane's stream: by a CUDA graph where it was seen twice before."""
        core = self._core
        key = call.signature()
        if (graph := self._graphs.get(key)) is not None:
            self._graphs.move_to_end(key)
            core.cuda.launch(graph[0], self.work)
            return
        unknown = [name for name, shape in call.outputs.items() if shape is None]
        if core.graphs and unknown:
            core.note(f"no CUDA graphs: the shape of {listed(unknown)} depends on data")
        if core.graphs and not unknown:
            if key in self._seen:
                del self._seen[key]
                self._capture(key, call)
                return
            _remember(self._seen, key, None, _MAX_SEEN)
        self._contexts[call.profile].enqueue(call, self.work)

    def _capture(self, key: tuple[Any, ...], call: _Call) -> None:
        """Run the call in a context of its own, as TensorRT wants it before a capture, then capture it for next time."""
        cuda = self._core.cuda
        try:
            own = self._context(call.profile)
        except BuildError as exc:
            self._give_up_graphs("there is no room for a context", exc)
            self._contexts[call.profile].enqueue(call, self.work)
            return
        own.enqueue(call, self.work)
        try:
            graph = _captured(cuda, self.work, lambda: own.enqueue(call, self.work))
            try:
                executable = cuda.instantiate(graph)
            finally:
                cuda.destroy_graph(graph)
        except BuildError as exc:
            self._give_up_graphs("capturing failed", exc)
            return
        for old, _ in _remember(self._graphs, key, (executable, own), _MAX_GRAPHS):
            self.settle()
            cuda.destroy_executable(old)

    def _give_up_graphs(self, why: str, exc: BuildError) -> None:
        self._core.graphs = False
        self._core.note(f"no more CUDA graphs: {why}. {exc.message}")

    def get(self, call: _Call, names: Iterable[str], stream: int) -> None:
        """Copy outputs to pinned memory."""
        core = self._core
        for name in names:
            shape = call.outputs[name]
            assert shape is not None
            size = core.size(name, shape)
            if name not in core.on_host and size:
                core.cuda.copy_out(call.memory[name].host.address, call.memory[name].device, size, stream)

    def read(self, call: _Call, names: Iterable[str]) -> dict[str, Array]:
        """What `get` copied, once that is over, in arrays of its own."""
        found = {}
        for name in names:
            shape = call.outputs[name]
            assert shape is not None
            found[name] = call.memory[name].read(shape, self._core.dtypes[name])
        return found


def _captured(cuda: CudaLike, stream: int, work: Callable[[], None]) -> int:
    """The graph of ``work``; the stream is out of capture whatever happens."""
    cuda.begin_capture(stream)
    try:
        work()
    except BaseException:
        with contextlib.suppress(BuildError):
            cuda.destroy_graph(cuda.end_capture(stream))
        raise
    return cuda.end_capture(stream)


def _remember(cache: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> list[Any]:
    """Put the newest last; what is thrown out for it."""
    cache[key] = value
    return [cache.popitem(last=False)[1] for _ in range(len(cache) - most)]


# --- the runner -----------------------------------------------------------------------------------------------------


@dataclass
class _Flight:
    """A call of `PlanRunner.run_many` that is not over."""

    lane: _Lane
    slot: _Slot
    call: _Call


class PlanRunner:
    """Runs a plan; satisfies `compiler.spec.Runner`. As many calls run at once as there are ``contexts``; more wait.

    Buffers are made at opening for the optimum of every profile, and grow where a call needs more.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Any,
        trt: Any,
        cuda: CudaLike,
        *,
        log: Any = None,
        runtime: Any = None,
        contexts: int = 1,
        graphs: bool = True,
    ) -> None:
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self._where = engine.path.name
        self._check = FeedCheck(self._where, engine.inputs)
        self._idle = threading.Condition()
        self._working_now = 0
        self._closed = False
        self._kept: list[Any] = [log, runtime]
        """What must outlive the plan: first the logger, then the runtime."""
        self._core = _Core(engine, plan, trt, cuda, log, graphs)
        self._steppers: list[Stepper] = []
        self._lanes: list[_Lane] = []
        self._free: queue.LifoQueue[_Lane] = queue.LifoQueue()
        try:
            cuda.use()
            for _ in range(max(1, contexts)):
                self._lanes.append(_Lane(self._core))
        except BaseException:
            self.close()
            raise
        for lane in self._lanes:
            self._free.put(lane)

    @property
    def notes(self) -> tuple[str, ...]:
        """What did not go as it should: CUDA graphs that cannot be captured, inputs that the plan does not use."""
        return tuple(self._core.notes)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        with self._working():
            profile = self._profile(feeds)
            with self._lane() as lane, lane.slot() as slot:
                return self._run(lane, slot, profile, feeds)

    def time(self, feeds: Feeds, repeats: int) -> list[float]:
        with self._working():
            profile = self._profile(feeds)
            taken = []
            with self._lane() as lane, lane.slot() as slot:
                for _ in range(repeats):
                    started = time.perf_counter()
                    self._run(lane, slot, profile, feeds)
                    taken.append(time.perf_counter() - started)
            return taken

    def time_device(self, feeds: Feeds, repeats: int) -> list[float]:
        """Seconds of each of ``repeats`` calls between two CUDA events around it: no copies, inputs on the device, after
        calls enough to capture a CUDA graph."""
        cuda = self._core.cuda
        with self._working():
            profile = self._profile(feeds)
            with contextlib.ExitStack() as stack:
                lane = stack.enter_context(self._lane())
                slot = stack.enter_context(lane.slot())
                start = cuda.create_event(timing=True)
                stack.callback(cuda.destroy_event, start)
                end = cuda.create_event(timing=True)
                stack.callback(cuda.destroy_event, end)
                call = lane.prepare(profile, feeds, slot.memory)
                lane.put(call, feeds, lane.work)
                for _ in range(3):
                    lane.enqueue(call)
                cuda.synchronize(lane.work)
                taken = []
                for _ in range(repeats):
                    cuda.record(start, lane.work)
                    lane.enqueue(call)
                    cuda.record(end, lane.work)
                    cuda.synchronize(lane.work)
                    taken.append(cuda.elapsed_ms(start, end) / 1000)
                return taken

    def run_many(self, feeds: Iterable[Feeds]) -> Iterator[dict[str, Array]]:
        """Outputs of each of ``feeds`` in their order. While one call computes, the next is copied in and the one before
        is copied out. What goes wrong with one is raised in its place, after the results of those before it."""
        flying: deque[_Flight] = deque()
        coming = iter(feeds)
        failure: Exception | None = None
        try:
            while failure is None:
                try:
                    fed = next(coming)
                    flying.append(self._launch(fed))
                except StopIteration:
                    break
                except Exception as exc:
                    failure = exc
                else:
                    if len(flying) == _IN_FLIGHT:
                        yield self._land(flying)
            while flying:
                yield self._land(flying)
            if failure is not None:
                raise failure
        finally:
            self._abandon(flying)

    def stepper(self, carry: Mapping[str, str]) -> Stepper:
        """Steps in which outputs become inputs of the next step without leaving the device: ``carry`` names the input
        for each such output."""
        with self._working():
            stepper = Stepper(self, carry)
            self._steppers.append(stepper)
            return stepper

    def inspect(self) -> str:
        """What TensorRT's inspector says of the engine's layers, as JSON."""
        with self._working():
            core = self._core
            with core.lock:
                inspector = core.plan.create_engine_inspector()
                return str(inspector.get_engine_information(core.trt.LayerInformationFormat.JSON))

    def close(self) -> None:
        """Free everything, once the calls that are under way are over."""
        with self._idle:
            if self._closed:
                return
            self._closed = True
            while self._working_now:
                self._idle.wait()
        with contextlib.suppress(BuildError):
            self._core.cuda.use()
        with contextlib.ExitStack() as stack:
            stack.callback(self._kept.clear)
            stack.callback(self._forget_plan)
            for lane in self._lanes:
                stack.callback(lane.close)
            for stepper in self._steppers:
                stack.callback(stepper._free)
            for lane in self._lanes:
                stack.callback(_settle_quietly, lane)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _forget_plan(self) -> None:
        self._core.plan = None

    def _closed_error(self) -> BuildError:
        return BuildError(f"{self._where}: closed; an open model was expected. Open it again.")

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        with self._idle:
            if self._closed:
                raise self._closed_error()
            self._working_now += 1
        try:
            self._core.cuda.use()
            yield
        finally:
            with self._idle:
                self._working_now -= 1
                self._idle.notify_all()

    @contextlib.contextmanager
    def _lane(self) -> Iterator[_Lane]:
        """A lane to oneself. The one used last comes first: it has the graphs."""
        lane = self._free.get()
        try:
            yield lane
        finally:
            self._free.put(lane)

    def _profile(self, feeds: Feeds) -> int:
        return choose_profile(self._where, self._core.profiles, self._check(feeds))

    def _run(self, lane: _Lane, slot: _Slot, profile: int, feeds: Feeds) -> dict[str, Array]:
        names = self._core.outputs
        call = lane.prepare(profile, feeds, slot.memory)
        lane.put(call, feeds, lane.work)
        lane.enqueue(call)
        lane.get(call, names, lane.work)
        self._core.cuda.synchronize(lane.work)
        return lane.read(call, names)

    def _launch(self, feeds: Feeds) -> _Flight:
        cuda = self._core.cuda
        with self._working():
            profile = self._profile(feeds)
            with self._lane() as lane:
                slot = lane.take_slot()
                try:
                    fed, computed, done = slot.events
                    call = lane.prepare(profile, feeds, slot.memory)
                    lane.put(call, feeds, lane.incoming)
                    cuda.record(fed, lane.incoming)
                    cuda.wait(lane.work, fed)
                    lane.enqueue(call)
                    cuda.record(computed, lane.work)
                    cuda.wait(lane.outgoing, computed)
                    lane.get(call, self._core.outputs, lane.outgoing)
                    cuda.record(done, lane.outgoing)
                except BaseException:
                    with contextlib.suppress(BuildError):
                        lane.settle()
                    lane.give_slot(slot)
                    raise
                return _Flight(lane, slot, call)

    def _land(self, flying: deque[_Flight]) -> dict[str, Array]:
        with self._working():
            flight = flying.popleft()
            try:
                self._core.cuda.synchronize_event(flight.slot.events[2])
                return flight.lane.read(flight.call, self._core.outputs)
            finally:
                flight.lane.give_slot(flight.slot)

    def _abandon(self, flying: deque[_Flight]) -> None:
        """Wait for what nobody will fetch; a closed runner has waited already."""
        while flying:
            with contextlib.suppress(BuildError):
                self._land(flying)
                continue
            flying.clear()


def _settle_quietly(lane: _Lane) -> None:
    with contextlib.suppress(BuildError):
        lane.settle()


# --- state on the device --------------------------------------------------------------------------------------------


class _State:
    """A tensor that stays on the device from step to step: in two buffers in turn, or in one that TensorRT updates."""

    def __init__(self, core: _Core, given: TensorSpec, taken: TensorSpec) -> None:
        self.given, self.taken = given, taken
        """The output, and the input that it becomes."""
        self.in_place = core.aliases.get(given.name) == taken.name
        self.buffers = [_Buffer(core.cuda, on_device=True, on_host=False) for _ in range(1 if self.in_place else 2)]
        self.shape: Shape | None = None
        """None: nothing to go on from."""


class Stepper:
    """Steps with state on the device; made by `PlanRunner.stepper`. Steppers of one runner know nothing of each other.

    One thread at a time steps; more wait.
    """

    def __init__(self, runner: PlanRunner, carry: Mapping[str, str]) -> None:
        core = runner._core
        self._runner, self._core = runner, core
        self._lock = threading.Lock()
        self._freed = False
        self._states = [
            _State(core, _known(core, "output", given, core.outputs), _known(core, "input", taken, core.inputs))
            for given, taken in carry.items()
        ]
        self._refuse_what_cannot_be_carried(carry)
        carried = set(carry.values())
        self._kept = tuple(name for name in core.outputs if name not in carry)
        """Outputs that a step returns."""
        self._check = FeedCheck(core.where, [spec for spec in runner.inputs if spec.name not in carried])
        self._check_state = FeedCheck(core.where, [state.taken for state in self._states])
        self._staging = _Buffer(core.cuda, on_device=False, on_host=True)

    def reset(self, initial: Mapping[str, Array]) -> None:
        """Begin anew: a value for every carried input, by its name."""
        core = self._core
        with self._working():
            self._check_state(initial)
            for state in self._states:
                state.shape = None
            with self._runner._lane() as lane:
                for state in self._states:
                    value = initial[state.taken.name]
                    size = core.size(state.taken.name, value.shape)
                    state.buffers[0].reserve(size, core.limits.get(state.taken.name, 0))
                    self._staging.reserve(size)
                    self._staging.write(value)
                    if size:
                        core.cuda.copy_in(state.buffers[0].device, self._staging.host.address, size, lane.work)
                        core.cuda.synchronize(lane.work)
            for state in self._states:
                state.shape = initial[state.taken.name].shape

    def step(self, feeds: Feeds) -> dict[str, Array]:
        """The outputs that are not carried. Where this raises before TensorRT ran, the state is what it was."""
        core = self._core
        with self._working():
            shapes, sizes = self._shapes()
            profile = choose_profile(core.where, core.profiles, self._check(feeds, sizes))
            with self._runner._lane() as lane, lane.slot() as slot:
                memory = dict(slot.memory)
                for state in self._states:
                    memory[state.taken.name] = state.buffers[0]
                    memory[state.given.name] = state.buffers[-1]
                call = lane.prepare(profile, feeds, memory, shapes)
                for state in self._states:
                    if state.in_place:  # half done, it is neither the old nor the new
                        state.shape = None
                lane.put(call, feeds, lane.work)
                lane.enqueue(call)
                lane.get(call, self._kept, lane.work)
                core.cuda.synchronize(lane.work)
                for state in self._states:
                    state.shape = call.outputs[state.given.name]
                    state.buffers.reverse()
                return lane.read(call, self._kept)

    def fetch(self, output: str) -> Array:
        """A copy of what is carried from ``output``: what the last step computed, or what `reset` gave."""
        core = self._core
        with self._working():
            by_name = {state.given.name: state for state in self._states}
            if output not in by_name:
                raise BuildError(
                    f"{core.where}: output '{output}' is not carried; {listed(by_name) if by_name else 'none'} was "
                    "expected. Carry it, or take it from what a step returns."
                )
            self._shapes()
            state = by_name[output]
            assert state.shape is not None
            size = core.size(output, state.shape)
            self._staging.reserve(size)
            if size:
                with self._runner._lane() as lane:
                    core.cuda.copy_out(self._staging.host.address, state.buffers[0].device, size, lane.work)
                    core.cuda.synchronize(lane.work)
            return self._staging.read(state.shape, core.dtypes[output])

    def close(self) -> None:
        """Free the state; the runner does so too when it is closed."""
        with contextlib.suppress(BuildError), self._working():
            self._runner._steppers.remove(self)
            self._free()

    def _free(self) -> None:
        if self._freed:
            return
        self._freed = True
        with contextlib.ExitStack() as stack:
            stack.callback(self._staging.close)
            for state in self._states:
                for buffer in state.buffers:
                    stack.callback(buffer.close)

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        with self._runner._working(), self._lock:
            if self._freed:
                raise self._runner._closed_error()
            yield

    def _shapes(self) -> tuple[dict[str, Shape], dict[str, int]]:
        """The carried inputs' shapes, and what they make of the named axes."""
        sizes: dict[str, int] = {}
        shapes = {}
        for state in self._states:
            spec = state.taken
            if state.shape is None:
                raise BuildError(
                    f"{self._core.where}: input '{spec.name}' is carried and has no value; one was expected. "
                    "Reset the stepper first."
                )
            if len(state.shape) != len(spec.shape) or not shape_fits(spec, state.shape, sizes):
                declared = "[" + ", ".join(str(dim) for dim in spec.shape) + "]"
                raise BuildError(
                    f"{self._core.where}: input '{spec.name}' is carried and has become {list(state.shape)}; {declared} "
                    "was expected. Reset the stepper."
                )
            shapes[spec.name] = state.shape
        return shapes, sizes

    def _refuse_what_cannot_be_carried(self, carry: Mapping[str, str]) -> None:
        core = self._core
        for state in self._states:
            given, taken = state.given, state.taken
            if given.dtype != taken.dtype or len(given.shape) != len(taken.shape):
                raise BuildError(
                    f"{core.where}: output '{given.name}' is {given.dtype} with {len(given.shape)} axes; {taken.dtype} with "
                    f"{len(taken.shape)} was expected for input '{taken.name}'. Carry it to another input."
                )
            if sum(other.taken.name == taken.name for other in self._states) > 1:
                raise BuildError(
                    f"{core.where}: input '{taken.name}' is carried from two outputs; one was expected. Drop one."
                )
            if core.on_host & {given.name, taken.name}:
                raise BuildError(
                    f"{core.where}: '{given.name}' -> '{taken.name}' is a shape tensor, which lives on the host; a tensor on "
                    "the device was expected. Feed it at every step."
                )
        for given_name, taken_name in core.aliases.items():
            carried = given_name in carry or taken_name in carry.values()
            if carried and carry.get(given_name) != taken_name:
                raise BuildError(
                    f"{core.where}: TensorRT writes output '{given_name}' in the place of input '{taken_name}'; the one "
                    "carried to the other was expected. Carry it so, or carry neither."
                )


def _known(core: _Core, kind: str, name: str, names: Sequence[str]) -> TensorSpec:
    if name not in names:
        raise BuildError(f"{core.where}: no {kind} is named '{name}'; {suggest(name, names)}")
    return core.specs[name]
