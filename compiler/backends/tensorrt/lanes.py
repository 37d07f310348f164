"""Lanes: what one call at a time runs on.

A lane has three streams (copies in, work, copies out), an execution context for each optimisation profile, one block of
memory for intermediate results that these contexts share, and slots, each of which holds the inputs and outputs of one
call.

Why a context of its own for every CUDA graph: a graph keeps what its context held when it was captured, so the context
must never be given other shapes. NVIDIA's advice is the same, and to let such contexts share their memory:
https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/best-practices.html
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from compiler.backends.feeds import listed
from compiler.backends.tensorrt.contexts import Call, Context, Core, Shape
from compiler.backends.tensorrt.cuda import CudaLike
from compiler.backends.tensorrt.memory import Buffer, Slot
from compiler.backends.tensorrt.profiles import at
from compiler.errors import BuildError
from compiler.spec import Array, Feeds

_MAX_GRAPHS = 16
_MAX_SEEN = 256
_MAX_SHAPES = 256
_HOST_BYTES = 4096
"""Enough for any shape tensor."""


class Lane:
    """What one call at a time runs on."""

    def __init__(self, core: Core) -> None:
        self._core = core
        cuda = core.cuda
        self._stack = contextlib.ExitStack()
        self._contexts: list[Context] = []
        self._graphs: OrderedDict[tuple[Any, ...], tuple[int, Context]] = OrderedDict()
        self._seen: OrderedDict[tuple[Any, ...], None] = OrderedDict()
        self._inferred: OrderedDict[tuple[Any, ...], dict[str, Shape | None]] = OrderedDict()
        self._free: deque[Slot] = deque()
        self._slots: list[Slot] = []
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

    def _context(self, profile: int) -> Context:
        return Context(self._core, profile, self._workspace, self._workspace_size, self.work)

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
    def slot(self) -> Iterator[Slot]:
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

    def take_slot(self) -> Slot:
        try:
            return self._free.pop()
        except IndexError:
            return self._new_slot()

    def give_slot(self, slot: Slot) -> None:
        self._free.append(slot)

    def _new_slot(self) -> Slot:
        core = self._core
        slot = Slot(core.cuda, (*core.inputs, *core.outputs), on_host=core.on_host, aliases=core.aliases)
        self._slots.append(slot)
        return slot

    def _reserve(self, slot: Slot) -> None:
        """Give the slot what every profile needs at its optimum."""
        core = self._core
        for profile, ranges in enumerate(core.profiles):
            shapes = {name: at(core.specs[name], ranges, "opt") for name in core.inputs}
            known = tuple((name, shape) for name, shape in shapes.items() if shape is not None)
            for name, shape in known:
                slot.memory[name].reserve(core.size(name, shape), core.limits.get(name, 0))
            if len(known) == len(shapes) and not core.on_host.intersection(core.inputs):
                for name, output in self._outputs(Call(profile, known, (), slot.memory)).items():
                    most = self._contexts[profile].at_most(name)
                    core.limits[name] = max(core.limits.get(name, 0), most)
                    if output is not None:
                        slot.memory[name].reserve(core.size(name, output), core.limits[name])

    # --- a call, step by step ---

    def prepare(
        self, profile: int, feeds: Feeds, memory: Mapping[str, Buffer], carried: Mapping[str, Shape] | None = None
    ) -> Call:
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
        call = Call(profile, shapes, tuple(values), memory)
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

    def _outputs(self, call: Call) -> dict[str, Shape | None]:
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

    def put(self, call: Call, feeds: Feeds, stream: int) -> None:
        """Copy ``feeds`` to the device."""
        core = self._core
        for name, shape in call.shapes:
            size = core.size(name, shape)
            if name in feeds and name not in core.on_host and size:
                call.memory[name].write(feeds[name])
                core.cuda.copy_in(call.memory[name].device, call.memory[name].host.address, size, stream)

    def enqueue(self, call: Call) -> None:
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

    def _capture(self, key: tuple[Any, ...], call: Call) -> None:
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

    def get(self, call: Call, names: Iterable[str], stream: int) -> None:
        """Copy outputs to pinned memory."""
        core = self._core
        for name in names:
            shape = call.outputs[name]
            assert shape is not None
            size = core.size(name, shape)
            if name not in core.on_host and size:
                core.cuda.copy_out(call.memory[name].host.address, call.memory[name].device, size, stream)

    def read(self, call: Call, names: Iterable[str]) -> dict[str, Array]:
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


class Lanes:
    """The lanes of a plan, ``count`` of them; each is lent to one call at a time."""

    def __init__(self, core: Core, count: int) -> None:
        self.core = core
        self.all: list[Lane] = []
        self.freed_with: list[Callable[[], None]] = []
        """What frees memory that work on the lanes uses; called when they are closed."""
        self._free: queue.LifoQueue[Lane] = queue.LifoQueue()
        self._idle = threading.Condition()
        self._working_now = 0
        self._closed = False
        try:
            core.cuda.use()
            for _ in range(max(1, count)):
                self.all.append(Lane(core))
        except BaseException:
            self.close()
            raise
        for lane in self.all:
            self._free.put(lane)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Around everything that a caller asks for: closing waits until it is over.

        Raises:
            BuildError: the lanes are closed.
        """
        with self._idle:
            if self._closed:
                raise self.closed_error()
            self._working_now += 1
        try:
            self.core.cuda.use()
            yield
        finally:
            with self._idle:
                self._working_now -= 1
                self._idle.notify_all()

    @contextlib.contextmanager
    def one(self) -> Iterator[Lane]:
        """A lane to oneself. The one used last comes first: it has the graphs."""
        lane = self._free.get()
        try:
            yield lane
        finally:
            self._free.put(lane)

    def closed_error(self) -> BuildError:
        return BuildError(f"{self.core.where}: closed; an open model was expected. Open it again.")

    def close(self) -> None:
        """Free everything, the plan too, once the calls that are under way are over."""
        with self._idle:
            if self._closed:
                return
            self._closed = True
            while self._working_now:
                self._idle.wait()
        with contextlib.suppress(BuildError):
            self.core.cuda.use()
        with contextlib.ExitStack() as stack:
            stack.callback(self.core.close)
            for lane in self.all:
                stack.callback(lane.close)
            for free in self.freed_with:
                stack.callback(free)
            for lane in self.all:
                stack.callback(_settle_quietly, lane)


def _settle_quietly(lane: Lane) -> None:
    with contextlib.suppress(BuildError):
        lane.settle()
