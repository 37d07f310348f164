"""State that stays on the device: outputs of one step that are inputs of the next."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence

from compiler.backends.feeds import FeedCheck, listed, shape_fits
from compiler.backends.tensorrt.contexts import Core, Shape
from compiler.backends.tensorrt.lanes import Lanes
from compiler.backends.tensorrt.memory import Buffer
from compiler.backends.tensorrt.profiles import choose_profile
from compiler.errors import BuildError, suggest
from compiler.spec import Array, Feeds, TensorSpec


class _State:
    """A tensor that stays on the device from step to step: in two buffers in turn, or in one that TensorRT updates."""

    def __init__(self, core: Core, given: TensorSpec, taken: TensorSpec) -> None:
        self.given, self.taken = given, taken
        """The output, and the input that it becomes."""
        self.in_place = core.aliases.get(given.name) == taken.name
        self.buffers = [Buffer(core.cuda, on_device=True, on_host=False) for _ in range(1 if self.in_place else 2)]
        self.shape: Shape | None = None
        """None: nothing to go on from."""


class Stepper:
    """Steps with state on the device; made by `PlanRunner.stepper`. Steppers of one runner know nothing of each other.

    One thread at a time steps; more wait.
    """

    def __init__(self, lanes: Lanes, inputs: Sequence[TensorSpec], carry: Mapping[str, str]) -> None:
        core = lanes.core
        self._lanes, self._core = lanes, core
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
        self._check = FeedCheck(core.where, [spec for spec in inputs if spec.name not in carried])
        self._check_state = FeedCheck(core.where, [state.taken for state in self._states])
        self._staging = Buffer(core.cuda, on_device=False, on_host=True)
        lanes.freed_with.append(self._free)

    def reset(self, initial: Mapping[str, Array]) -> None:
        """Begin anew: a value for every carried input, by its name."""
        core = self._core
        with self._working():
            self._check_state(initial)
            for state in self._states:
                state.shape = None
            with self._lanes.one() as lane:
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
            with self._lanes.one() as lane, lane.slot() as slot:
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
                with self._lanes.one() as lane:
                    core.cuda.copy_out(self._staging.host.address, state.buffers[0].device, size, lane.work)
                    core.cuda.synchronize(lane.work)
            return self._staging.read(state.shape, core.dtypes[output])

    def close(self) -> None:
        """Free the state; the runner does so too when it is closed."""
        with contextlib.suppress(BuildError), self._working():
            self._lanes.freed_with.remove(self._free)
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
        with self._lanes.working(), self._lock:
            if self._freed:
                raise self._lanes.closed_error()
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


def _known(core: Core, kind: str, name: str, names: Sequence[str]) -> TensorSpec:
    if name not in names:
        raise BuildError(f"{core.where}: no {kind} is named '{name}'; {suggest(name, names)}")
    return core.specs[name]
