"""A GPU, and TensorRT on it, for tests of what runs there: adversarial where the real ones are only sometimes.

Work put on a stream does not begin before something waits for it; then a scheduler with a seed picks, among all streams,
whatever stream order and events allow. Device memory is bytes behind made-up addresses: reading what was never written,
touching what is freed or lies outside, and copying from host memory that is not pinned are faults. Reading the inputs of
an engine and writing its outputs are two steps, with room for other streams between them.

A `Fault` is what a GPU would answer with wrong numbers or not at all: no code under test may catch it, and every wait
after it raises it again.
"""

from __future__ import annotations

import bisect
import contextlib
import enum
import math
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compiler.backends.tensorrt.cuda import Pinned
from compiler.errors import BuildError
from compiler.spec import Array, Feeds, TensorSpec, dtype_of

Shapes = Mapping[str, tuple[int, ...]]


class Fault(BaseException):
    """Not an Exception, so that nothing that handles failures takes it for one."""


class _Token:
    """One recording of an event."""

    def __init__(self) -> None:
        self.done = False
        self.at = 0.0


@dataclass
class _Op:
    what: str
    do: Callable[[], None]
    ready: Callable[[], bool] = lambda: True


@dataclass
class _Stream:
    pending: deque[_Op] = field(default_factory=deque)
    captured: list[_Op] | None = None
    capturing_thread: int = 0
    invalid: bool = False


@dataclass
class _Memory:
    address: int
    data: NDArray[np.uint8]
    written: NDArray[np.bool_]
    freed: bool = False


class FakeCuda:
    """Satisfies `compiler.backends.tensorrt.cuda.CudaLike`.

    ``progress`` is the chance that work goes on at every call, without anybody waiting; ``device_bytes`` is all that can
    be allocated. ``failing`` counts down calls by name; at 0 the call fails.
    """

    def __init__(self, seed: int = 0, *, progress: float = 0.0, device_bytes: int = 1 << 30) -> None:
        self._random = random.Random(seed)
        self._progress = progress
        self._room = device_bytes
        self._lock = threading.RLock()
        self._used = threading.local()
        self._next = 0x7000_0000_0000
        self._addresses: list[int] = []
        self._memory: list[_Memory] = []
        self._pinned: list[tuple[Pinned, list[bool]]] = []
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, _Token | None] = {}
        self._graphs: dict[int, list[_Op]] = {}
        self._executables: dict[int, tuple[list[_Op], list[int]]] = {}
        self._clock = 0.0
        self._fault: Fault | None = None
        self.failing: dict[str, int] = {}
        self.calls: list[str] = []
        self.trace: list[str] = []
        """What was done, in its order."""

    # --- what is checked at every call ---

    @contextlib.contextmanager
    def _call(self, name: str) -> Iterator[None]:
        with self._lock:
            if name != "use" and not getattr(self._used, "yes", False):
                raise Fault(f"{name} in a thread for which no device was made current")
            self.calls.append(name)
            if name in self.failing:
                self.failing[name] -= 1
                if self.failing[name] < 0:
                    del self.failing[name]
                    raise BuildError(f"planted: {name}")
            if self._random.random() < self._progress:
                self._step()
            yield

    def _step(self) -> bool:
        ready = [s for s in self._streams.values() if s.pending and s.pending[0].ready()]
        if not ready:
            return False
        op = self._random.choice(ready).pending.popleft()
        self._clock += 1.0
        self.trace.append(op.what)
        try:
            op.do()
        except Fault as fault:
            self._fault = fault
            raise
        return True

    def _until(self, over: Callable[[], bool]) -> None:
        if self._fault is not None:  # as on a GPU, where nothing works after an illegal access
            raise self._fault
        while not over():
            if not self._step():
                raise Fault("a wait that never ends")

    def put(self, stream: int, what: str, do: Callable[[], None], ready: Callable[[], bool] = lambda: True) -> None:
        found = self._stream(stream)
        (found.pending if found.captured is None else found.captured).append(_Op(what, do, ready))

    def _stream(self, stream: int) -> _Stream:
        if stream not in self._streams:
            raise Fault(f"stream {stream} does not exist")
        return self._streams[stream]

    def _outside_capture(self, name: str) -> None:
        me = threading.get_ident()
        if any(s.captured is not None and s.capturing_thread == me for s in self._streams.values()):
            raise Fault(f"{name} during a capture")

    def _handle(self) -> int:
        self._next += 0x10000
        return self._next

    def use(self) -> None:
        with self._call("use"):
            self._used.yes = True

    # --- memory ---

    def malloc(self, size: int) -> int:
        with self._call("malloc"):
            self._outside_capture("malloc")
            held = sum(m.data.size for m in self._memory if not m.freed)
            if held + size > self._room:
                raise BuildError(f"planted: no room for {size}")
            address = self._handle()
            self._next += -(-size // 0x10000) * 0x10000
            self._addresses.append(address)
            self._memory.append(_Memory(address, np.full(size, 0xCD, np.uint8), np.zeros(size, np.bool_)))
            return address

    def free(self, address: int) -> None:
        with self._call("free"):
            self._outside_capture("free")
            found = self._find(address, 0)
            if found.address != address:
                raise Fault(f"free of {address:#x}, inside an allocation")
            found.freed = True

    def _find(self, address: int, size: int) -> _Memory:
        index = bisect.bisect_right(self._addresses, address) - 1
        if index < 0 or address + size > self._addresses[index] + self._memory[index].data.size:
            raise Fault(f"{size} bytes at {address:#x} lie outside every allocation")
        found = self._memory[index]
        if found.freed:
            raise Fault(f"{address:#x} was freed")
        return found

    def read(self, address: int, size: int) -> bytes:
        found = self._find(address, size)
        start = address - found.address
        if not found.written[start : start + size].all():
            raise Fault(f"read of {size} bytes at {address:#x}, some of which were never written")
        return found.data[start : start + size].tobytes()

    def write(self, address: int, data: bytes) -> None:
        found = self._find(address, len(data))
        start = address - found.address
        found.data[start : start + len(data)] = np.frombuffer(data, np.uint8)
        found.written[start : start + len(data)] = True

    def malloc_host(self, size: int) -> Pinned:
        with self._call("malloc_host"):
            self._outside_capture("malloc_host")
            view = np.full(size, 0xCD, np.uint8)
            memory = Pinned(view.ctypes.data, view)
            self._pinned.append((memory, [True]))
            return memory

    def free_host(self, memory: Pinned) -> None:
        with self._call("free_host"):
            for pinned, alive in self._pinned:
                if pinned is memory:
                    if not alive[0]:
                        raise Fault("pinned memory freed twice")
                    alive[0] = False
                    memory.view[:] = 0xDD
                    return
            raise Fault("free of host memory that is not pinned")

    def host(self, address: int, size: int) -> NDArray[np.uint8]:
        for pinned, alive in self._pinned:
            if alive[0] and pinned.address <= address and address + size <= pinned.address + pinned.view.size:
                return pinned.view[address - pinned.address :][:size]
        raise Fault(f"{size} bytes at {address:#x} are not in pinned host memory")

    def copy_in(self, device: int, host: int, size: int, stream: int) -> None:
        with self._call("copy_in"):
            self.host(host, size)
            self._find(device, size)
            self.put(stream, "copy in", lambda: self.write(device, self.host(host, size).tobytes()))

    def copy_out(self, host: int, device: int, size: int, stream: int) -> None:
        def do() -> None:
            self.host(host, size)[:] = np.frombuffer(self.read(device, size), np.uint8)

        with self._call("copy_out"):
            self.host(host, size)
            self._find(device, size)
            self.put(stream, "copy out", do)

    # --- streams and events ---

    def create_stream(self) -> int:
        with self._call("create_stream"):
            stream = self._handle()
            self._streams[stream] = _Stream()
            return stream

    def destroy_stream(self, stream: int) -> None:
        with self._call("destroy_stream"):
            if self._stream(stream).pending:
                raise Fault("a stream destroyed with work on it")
            del self._streams[stream]

    def synchronize(self, stream: int) -> None:
        with self._call("synchronize"):
            self._outside_capture("synchronize")
            self.drain(stream)

    def drain(self, stream: int) -> None:
        found = self._stream(stream)
        self._until(lambda: not found.pending)

    def create_event(self, *, timing: bool = False) -> int:
        with self._call("create_event"):
            event = self._handle()
            self._events[event] = None
            return event

    def destroy_event(self, event: int) -> None:
        with self._call("destroy_event"):
            if event not in self._events:
                raise Fault("an event destroyed twice")
            del self._events[event]

    def record(self, event: int, stream: int) -> None:
        token = _Token()

        def do() -> None:
            token.done, token.at = True, self._clock

        with self._call("record"):
            if event not in self._events:
                raise Fault("record of an event that does not exist")
            self._events[event] = token
            self.put(stream, "record", do)

    def wait(self, stream: int, event: int) -> None:
        with self._call("wait"):
            token = self._events[event]
            if token is not None:
                self.put(stream, "wait", lambda: None, lambda: token.done)

    def synchronize_event(self, event: int) -> None:
        with self._call("synchronize_event"):
            self._outside_capture("synchronize_event")
            token = self._events[event]
            if token is not None:
                self._until(lambda: token.done)

    def elapsed_ms(self, start: int, end: int) -> float:
        with self._call("elapsed_ms"):
            first, last = self._events[start], self._events[end]
            if first is None or last is None or not (first.done and last.done):
                raise Fault("the time between events that did not happen")
            return last.at - first.at

    # --- graphs ---

    def begin_capture(self, stream: int) -> None:
        with self._call("begin_capture"):
            found = self._stream(stream)
            if found.captured is not None:
                raise Fault("a capture inside a capture")
            found.captured, found.invalid, found.capturing_thread = [], False, threading.get_ident()

    def capturing(self, stream: int) -> bool:
        return self._stream(stream).captured is not None

    def invalidate(self, stream: int) -> None:
        self._stream(stream).invalid = True

    def end_capture(self, stream: int) -> int:
        with self._lock:
            found = self._stream(stream)
            ops, found.captured = found.captured, None
            if ops is None:
                raise Fault("the end of a capture that never began")
            with self._call("end_capture"):
                if found.invalid:
                    raise BuildError("planted: the capture is invalid")
                graph = self._handle()
                self._graphs[graph] = ops
                return graph

    def instantiate(self, graph: int) -> int:
        with self._call("instantiate"):
            executable = self._handle()
            self._executables[executable] = (list(self._graphs[graph]), [0])
            return executable

    def launch(self, executable: int, stream: int) -> None:
        with self._call("launch"):
            if executable not in self._executables:
                raise Fault("launch of a graph that was destroyed")
            ops, flying = self._executables[executable]
            flying[0] += 1

            def land() -> None:
                flying[0] -= 1

            for op in ops:
                self.put(stream, op.what, op.do)
            self.put(stream, "end of graph", land)

    def destroy_graph(self, graph: int) -> None:
        with self._call("destroy_graph"):
            if graph not in self._graphs:
                raise Fault("a graph destroyed twice")
            del self._graphs[graph]

    def destroy_executable(self, executable: int) -> None:
        with self._call("destroy_executable"):
            if executable not in self._executables:
                raise Fault("an executable graph destroyed twice")
            if self._executables[executable][1][0]:
                raise Fault("a graph destroyed while it runs")
            del self._executables[executable]

    # --- in the end ---

    def held(self) -> dict[str, int]:
        """What is not freed, by kind."""
        counts = {
            "device memory": sum(not m.freed for m in self._memory),
            "pinned memory": sum(alive[0] for _, alive in self._pinned),
            "streams": len(self._streams),
            "events": len(self._events),
            "graphs": len(self._graphs),
            "executable graphs": len(self._executables),
        }
        return {kind: count for kind, count in counts.items() if count}


# --- TensorRT -------------------------------------------------------------------------------------------------------


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class IOutputAllocator:
    def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
        raise NotImplementedError

    def notify_shape(self, tensor_name: str, shape: Any) -> None:
        raise NotImplementedError


class DataType(enum.Enum):
    FLOAT = "float32"
    HALF = "float16"
    BF16 = "bfloat16"
    INT8 = "int8"
    INT32 = "int32"
    INT64 = "int64"
    BOOL = "bool"
    UINT8 = "uint8"
    FP8 = "float8_e4m3fn"


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class LayerInformationFormat(enum.Enum):
    ONELINE = 0
    JSON = 1


class FakeTrt:
    """Stands for the module. ``plans`` maps a plan's bytes to its engine; anything else is refused with ``refusal``."""

    __name__ = "tensorrt"
    __version__ = "11.4.0"
    ILogger = ILogger
    IOutputAllocator = IOutputAllocator
    DataType = DataType
    TensorIOMode = TensorIOMode
    TensorLocation = TensorLocation
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    LayerInformationFormat = LayerInformationFormat

    def __init__(self) -> None:
        self.plans: dict[bytes, FakeEngine] = {}
        self.refusal: tuple[str, ...] = ("Error Code 1: magicTag == kEXPECTED_MAGIC_TAG failed.",)
        self.deserialised: list[bytes] = []
        self.runtimes: list[FakeRuntime] = []
        self.gone: list[str] = []
        """Refitters, and parsers for them, in the order in which they went."""

    def Refitter(self, engine: FakeEngine, logger: Any) -> FakeRefitter:
        if engine._fails("Refitter"):
            raise TypeError("factory function returned nullptr")
        made = FakeRefitter(engine, logger)
        weakref.finalize(made, self.gone.append, "refitter")
        return made

    def OnnxParserRefitter(self, refitter: FakeRefitter, logger: Any) -> FakeOnnxParserRefitter:
        made = FakeOnnxParserRefitter(refitter, logger)
        weakref.finalize(made, self.gone.append, "parser")
        return made

    def Runtime(self, logger: Any) -> FakeRuntime:
        made = FakeRuntime(self, logger)
        self.runtimes.append(made)
        return made


class FakeRuntime:
    def __init__(self, trt: FakeTrt, logger: ILogger) -> None:
        self._trt = trt
        self._logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> FakeEngine | None:
        self._trt.deserialised.append(serialized_engine)
        if (engine := self._trt.plans.get(serialized_engine)) is None:
            self._logger.log(Severity.INFO, "Loaded engine size: 0 MiB")
            for line in self._trt.refusal:
                self._logger.log(Severity.ERROR, line)
            return None
        engine._logger = self._logger
        return engine


class FakeRefitter:
    def __init__(self, engine: FakeEngine, logger: ILogger) -> None:
        self._engine, self._logger = engine, logger
        self._holder: weakref.ref[FakeOnnxParserRefitter] | None = None
        """The parser that holds the weights."""

    def refit_cuda_engine(self) -> bool:
        engine = self._engine
        if engine._fails("refit_cuda_engine"):
            return False
        if self._holder is None:
            return engine._say("Error Code 4: weights are missing")
        if self._holder() is None:
            raise Fault("weights of a parser that is gone")
        engine._stripped = None
        return True


class FakeParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class FakeOnnxParserRefitter:
    def __init__(self, refitter: FakeRefitter, logger: ILogger) -> None:
        self._refitter = weakref.ref(refitter)
        self._errors: list[FakeParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> FakeParserError:
        return self._errors[index]

    def refit_from_file(self, model: str) -> bool:
        refitter = self._refitter()
        if refitter is None:
            raise Fault("a parser whose refitter is gone")
        if refitter._engine._fails("refit_from_file"):
            return False
        if Path(model).read_bytes() != refitter._engine._stripped:
            self._errors.append(FakeParserError("weights of 'w' have another count"))
            return False
        refitter._holder = weakref.ref(self)
        return True


Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class FakeEngine:
    """Computes ``function`` when its work is done, from the bytes that lie at the bound addresses.

    ``profiles`` holds (min, opt, max) shapes by input. ``late`` outputs have shapes that depend on data; ``host`` tensors
    live on the host; ``aliases`` names the input in whose place an output is written. ``stripped`` is the content of the
    ONNX file that has the weights, where the plan has none.
    """

    def __init__(
        self,
        cuda: FakeCuda,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        function: Callable[[Feeds], Mapping[str, Array]],
        *,
        profiles: Sequence[Mapping[str, Range]] = ({},),
        late: Sequence[str] = (),
        host: Sequence[str] = (),
        aliases: Mapping[str, str] | None = None,
        capturable: bool = True,
        stripped: bytes | None = None,
    ) -> None:
        self._cuda = cuda
        self._specs = {spec.name: spec for spec in (*inputs, *outputs)}
        self._inputs = [spec.name for spec in inputs]
        self._outputs = [spec.name for spec in outputs]
        self._function = function
        self._profiles = profiles
        self._late, self._host, self._aliases = late, host, dict(aliases or {})
        self._capturable = capturable
        self._stripped = stripped
        self._logger: ILogger | None = None
        self._budget = 0
        self._contexts: weakref.WeakSet[FakeContext] = weakref.WeakSet()
        self.most_contexts: int | None = None
        self.lies: dict[str, int] = {}
        """Methods of contexts and refitters that fail, by how many more calls go well."""

    def _say(self, line: str) -> bool:
        if self._logger is not None:
            self._logger.log(Severity.ERROR, line)
        return False

    def _fails(self, method: str) -> bool:
        if method in self.lies:
            self.lies[method] -= 1
            if self.lies[method] < 0:
                del self.lies[method]
                self._say(f"Error Code 9: planted in {method}")
                return True
        return False

    def _compute(self, feeds: Feeds) -> dict[str, Array]:
        found = self._function(feeds)
        return {name: np.asarray(found[name], dtype_of(self._specs[name])) for name in self._outputs}

    @property
    def num_io_tensors(self) -> int:
        return len(self._specs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def device_memory_size_v2(self) -> int:
        return 1024

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, size: int) -> None:
        if len(self._contexts):
            raise Fault("a budget for weights set after contexts were made")
        if size < 0:
            self._say("Error Code 3: budget is negative")
        self._budget = size

    def get_tensor_name(self, index: int) -> str:
        return list(self._specs)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self._specs[name].dtype)

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self._host else TensorLocation.DEVICE

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._aliases.get(name)

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> FakeContext | None:
        if self._stripped is not None:
            raise Fault("a context for a plan without its weights")
        if self.most_contexts is not None and len(self._contexts) >= self.most_contexts:
            self._say("Error Code 2: no memory for a context")
            return None
        context = FakeContext(self, strategy)
        self._contexts.add(context)
        return context

    def create_engine_inspector(self) -> FakeInspector:
        return FakeInspector()


class FakeInspector:
    def get_engine_information(self, format: LayerInformationFormat) -> str:
        assert format is LayerInformationFormat.JSON
        return '{"Layers": []}'


class FakeContext:
    def __init__(self, engine: FakeEngine, strategy: ExecutionContextAllocationStrategy) -> None:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self._engine = engine
        self._profile: int | None = None
        self._workspace = (0, 0)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, IOutputAllocator] = {}
        self._generation = 0
        self._flushed = -1

    def set_device_memory(self, memory: int, size: int) -> None:
        self._engine._cuda._find(memory, size)
        self._workspace = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if self._engine._fails("set_optimization_profile_async"):
            return False
        assert 0 <= profile_index < len(self._engine._profiles)
        self._profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._engine._fails("set_input_shape"):
            return False
        engine = self._engine
        assert name in engine._inputs and self._profile is not None
        bounds = engine._profiles[self._profile].get(name)
        if bounds is not None:
            low, _, high = bounds
            if len(low) != len(shape) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
                return engine._say(f"Error Code 3: {name} {list(shape)} is not in {list(low)}..{list(high)}")
        self._shapes[name] = tuple(shape)
        self._generation += 1
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self._engine._fails("set_tensor_address"):
            return False
        engine = self._engine
        assert name in engine._specs and memory
        if name in engine._host:
            engine._cuda.host(memory, 1)
        else:
            engine._cuda._find(memory, 1)
        self._addresses[name] = memory
        return True

    def set_output_allocator(self, name: str, output_allocator: IOutputAllocator) -> bool:
        if self._engine._fails("set_output_allocator"):
            return False
        self._allocators[name] = output_allocator
        return True

    def infer_shapes(self) -> list[str]:
        if self._engine._fails("infer_shapes"):
            raise RuntimeError("shapes do not fit")
        engine = self._engine
        missing = [
            name
            for name in engine._inputs
            if name not in self._shapes or (name in engine._host and name not in self._addresses)
        ]
        if not missing:
            self._write_host_outputs()
        return missing

    def _write_host_outputs(self) -> None:
        engine = self._engine
        for name, value in self._try_out().items() if engine._host else ():
            if name in engine._host and name in self._addresses:
                engine._cuda.host(self._addresses[name], value.nbytes)[:] = np.frombuffer(value.tobytes(), np.uint8)

    def _host_values(self) -> dict[str, Array]:
        engine = self._engine
        found = {}
        for name in engine._inputs:
            if name in engine._host:
                dtype, shape = dtype_of(engine._specs[name]), self._shapes[name]
                size = math.prod(shape) * dtype.itemsize
                data = engine._cuda.host(self._addresses[name], size).tobytes()
                found[name] = np.frombuffer(data, dtype).reshape(shape)
        return found

    def _try_out(self) -> dict[str, Array]:
        """What is computed of zeros: its shapes are right, and so are shape tensors."""
        engine = self._engine
        zeros = {name: np.zeros(self._shapes[name], dtype_of(engine._specs[name])) for name in engine._inputs}
        return engine._compute({**zeros, **self._host_values()})

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        engine = self._engine
        if name in engine._inputs:
            return self._shapes[name]
        if name in engine._late:
            return tuple(-1 for _ in engine._specs[name].shape)
        return tuple(self._try_out()[name].shape)

    def get_max_output_size(self, name: str) -> int:
        engine = self._engine
        assert name in engine._outputs and self._profile is not None
        bounds = engine._profiles[self._profile]
        if engine._host or name in engine._late or not all(input_ in bounds for input_ in engine._inputs):
            return -1
        feeds = {input_: np.zeros(bounds[input_][2], dtype_of(engine._specs[input_])) for input_ in engine._inputs}
        return engine._compute(feeds)[name].nbytes

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._engine._fails("execute_async_v3"):
            return False
        engine, cuda = self._engine, self._engine._cuda
        with cuda._lock:
            if self._profile is None or set(self._shapes) != set(engine._inputs):
                return engine._say("Error Code 3: shapes are missing")
            if self._workspace[1] < engine.device_memory_size_v2:
                return engine._say("Error Code 3: too little device memory")
            if missing := [n for n in engine._specs if n not in self._addresses and n not in self._allocators]:
                return engine._say(f"Error Code 3: no address for {missing}")
            for output, input_ in engine._aliases.items():
                if self._addresses[output] != self._addresses[input_]:
                    return engine._say(f"Error Code 3: {output} and {input_} must have the same address")
            if cuda.capturing(stream_handle):
                if self._flushed != self._generation or engine._late or not engine._capturable:
                    cuda.invalidate(stream_handle)
                    return engine._say("Error Code 1: operation not permitted when stream is capturing")
            else:
                self._flushed = self._generation
            return self._enqueue(stream_handle)

    def _enqueue(self, stream: int) -> bool:
        engine, cuda = self._engine, self._engine._cuda
        shapes, addresses, workspace = dict(self._shapes), dict(self._addresses), self._workspace[0]
        host = self._host_values()
        generation = self._generation
        me = weakref.ref(self) if cuda.capturing(stream) else None
        mark = random.Random(len(cuda.calls)).randbytes(8)
        held: dict[str, bytes] = {}
        device = [name for name in engine._inputs if name not in engine._host]

        def fetch(name: str) -> bytes:
            size = math.prod(shapes[name]) * dtype_of(engine._specs[name]).itemsize
            return cuda.read(addresses[name], size) if size else b""

        def begin() -> None:
            if me is not None:
                alive = me()
                if alive is None:
                    raise Fault("a graph whose context is gone")
                if alive._generation != generation:
                    raise Fault("a graph whose context was given other shapes")
            cuda.write(workspace, mark)
            held.update({name: fetch(name) for name in device})

        def compute() -> dict[str, Array]:
            if cuda.read(workspace, len(mark)) != mark:
                raise Fault("device memory of a context used by another at the same time")
            feeds = dict(host)
            for name in device:
                if fetch(name) != held[name]:
                    raise Fault(f"input '{name}' changed while it was read")
                feeds[name] = np.frombuffer(held[name], dtype_of(engine._specs[name])).reshape(shapes[name])
            return engine._compute(feeds)

        def end() -> None:
            for name, value in compute().items():
                if name not in engine._host and value.size:
                    cuda.write(addresses[name], value.tobytes())

        self._write_host_outputs()
        cuda.put(stream, "read", begin)
        if not engine._late:
            cuda.put(stream, "compute", end)
            return True
        cuda.drain(stream)
        for name, value in compute().items():
            if name in engine._late:
                allocator = self._allocators[name]
                address = allocator.reallocate_output_async(name, 0, max(1, value.nbytes), 256, stream)
                if not address:
                    return engine._say("Error Code 1: the allocator gave nothing")
                allocator.notify_shape(name, value.shape)
                addresses[name] = address
        cuda.put(stream, "compute", end)
        return True
