"""Running a TensorRT plan: buffers that stay, pinned host memory, streams of its own, CUDA graphs; no PyTorch.

`PlanRunner.run` takes a lane and a slot of it (see `lanes`); `PlanRunner.run_many` keeps three slots in flight, so that
one call is copied in while another computes and a third is copied out.

Every exit code and every None of TensorRT becomes a `BuildError` that ends in TensorRT's own words.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compiler.backends.feeds import FeedCheck, listed
from compiler.backends.tensorrt.contexts import Call, Core, Log
from compiler.backends.tensorrt.cuda import Cuda, CudaLike
from compiler.backends.tensorrt.lanes import Lane, Lanes
from compiler.backends.tensorrt.log import shorten
from compiler.backends.tensorrt.memory import Slot
from compiler.backends.tensorrt.profiles import choose_profile
from compiler.backends.tensorrt.stepper import Stepper
from compiler.durable import hash_of
from compiler.errors import BuildError
from compiler.spec import Array, Engine, Feeds

_IN_FLIGHT = 3


def open_plan(
    engine: Engine, trt: Any, *, contexts: int = 1, graphs: bool | None = None, cuda: CudaLike | None = None
) -> PlanRunner:
    """Open ``engine`` through the module ``trt`` (``tensorrt`` or ``tensorrt_rtx``).

    ``contexts`` calls may run at once. ``graphs`` says whether CUDA graphs are captured; None: wherever a graph is sure to
    keep the best kernels, see `Core`.

    Raises:
        BuildError: the plan is missing or is not the one that was built, or it cannot run on this machine.
    """
    where = engine.path.name
    plan_bytes = _read(engine)
    if cuda is None:
        cuda = Cuda(where)
    log = Log(trt)
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
    _refit(engine, plan, trt, log)
    _stream_weights(engine, plan, log)
    return PlanRunner(engine, plan, trt, cuda, log=log, runtime=runtime, contexts=contexts, graphs=graphs)


def _read(engine: Engine) -> bytes:
    """The plan, which is what was built: what was hashed is what is opened, since the bytes are read once."""
    where = engine.path.name
    try:
        plan = engine.path.read_bytes()
    except OSError as exc:
        raise BuildError(
            f"{where}: cannot be read ({exc.strerror or exc}); the plan that was built was expected. "
            "Build the engine again."
        ) from exc
    found = _sha256(engine, plan)
    if found != engine.sha256:
        raise BuildError(
            f"{where}: its SHA-256 is {found}; {engine.sha256} was expected. It was not opened, since deserialising a plan "
            "runs native code. Build the engine again, or fetch the file again."
        )
    return plan


def _sha256(engine: Engine, plan: bytes) -> str:
    """As `compiler.onnx_files.sha256_of` has it, of a plan that is in memory; loads no onnx."""
    hashes = [(engine.path.name, hashlib.sha256(plan).hexdigest())]
    for file in engine.external_data:
        name = file.relative_to(engine.path.parent).as_posix()
        try:
            with file.open("rb") as opened:
                hashes.append((name, hashlib.file_digest(opened, "sha256").hexdigest()))
        except OSError as exc:
            raise BuildError(
                f"{engine.path.name}: {name}, which belongs to it, cannot be read ({exc.strerror or exc}); it was expected "
                "beside the plan. Build the engine again, or fetch the file again."
            ) from exc
    return hash_of(hashes)


def _refit(engine: Engine, plan: Any, trt: Any, log: Log) -> None:
    """Fill a plan that was built without weights from the ONNX file beside it."""
    if engine.options.get("strip") != "on":
        return
    where = engine.path.name
    model = next(iter(engine.external_data), None)
    if model is None or model.suffix != ".onnx":
        beside = listed(file.name for file in engine.external_data)
        raise BuildError(
            f"{where}: was built without weights, and beside it belongs {beside}; the ONNX file that it was built from was "
            "expected. Build the engine again."
        )
    log.take()
    doing = "makes no refitter for it"
    refitter = parser = None
    try:
        refitter = trt.Refitter(plan, log.logger)
        parser = trt.OnnxParserRefitter(refitter, log.logger)
        doing = f"cannot take its weights from {model.name}"
        if parser.refit_from_file(str(model)):
            doing = f"cannot refit it with the weights of {model.name}"
            if refitter.refit_cuda_engine():
                return
        errors = [*log.take(), *(parser.get_error(index).desc() for index in range(parser.num_errors))]
    except Exception as exc:
        raise _not_refitted(where, doing, [*log.take(), str(exc)]) from exc
    finally:
        parser = refitter = None  # in this order: the parser has a reference to the refitter, and holds the weights
    raise _not_refitted(where, doing, errors)


def _not_refitted(where: str, doing: str, errors: Sequence[str]) -> BuildError:
    return BuildError(
        f"{where}: was built without weights, and TensorRT {doing}; the ONNX file that it was built from was expected. "
        f"Build the engine again. Its own words: {shorten(errors)}"
    )


def _stream_weights(engine: Engine, plan: Any, log: Log) -> None:
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


def _not_opened(where: str, trt: Any, log: Log, *more: str) -> BuildError:
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


@dataclass
class _Flight:
    """A call of `PlanRunner.run_many` that is not over."""

    lane: Lane
    slot: Slot
    call: Call


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
        graphs: bool | None = None,
    ) -> None:
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self._check = FeedCheck(engine.path.name, engine.inputs)
        self._core = Core(engine, plan, trt, cuda, log=log, runtime=runtime, graphs=graphs)
        self._lanes = Lanes(self._core, contexts)

    @property
    def notes(self) -> tuple[str, ...]:
        """What did not go as it should: CUDA graphs that cannot be captured, inputs that the plan does not use."""
        return tuple(self._core.notes)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        with self._lanes.working():
            profile = self._profile(feeds)
            with self._lanes.one() as lane, lane.slot() as slot:
                return self._run(lane, slot, profile, feeds)

    def time(self, feeds: Feeds, repeats: int) -> list[float]:
        with self._lanes.working():
            profile = self._profile(feeds)
            taken = []
            with self._lanes.one() as lane, lane.slot() as slot:
                for _ in range(repeats):
                    started = time.perf_counter()
                    self._run(lane, slot, profile, feeds)
                    taken.append(time.perf_counter() - started)
            return taken

    def time_device(self, feeds: Feeds, repeats: int) -> list[float]:
        """Seconds of each of ``repeats`` calls between two CUDA events around it: no copies, inputs on the device, after
        calls enough to capture a CUDA graph."""
        cuda = self._core.cuda
        with self._lanes.working():
            profile = self._profile(feeds)
            with contextlib.ExitStack() as stack:
                lane = stack.enter_context(self._lanes.one())
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
        with self._lanes.working():
            return Stepper(self._lanes, self.inputs, carry)

    def inspect(self) -> str:
        """What TensorRT's inspector says of the engine's layers, as JSON."""
        with self._lanes.working():
            core = self._core
            with core.lock:
                inspector = core.plan.create_engine_inspector()
                return str(inspector.get_engine_information(core.trt.LayerInformationFormat.JSON))

    def close(self) -> None:
        """Free everything, once the calls that are under way are over."""
        self._lanes.close()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _profile(self, feeds: Feeds) -> int:
        return choose_profile(self._core.where, self._core.profiles, self._check(feeds))

    def _run(self, lane: Lane, slot: Slot, profile: int, feeds: Feeds) -> dict[str, Array]:
        names = self._core.outputs
        call = lane.prepare(profile, feeds, slot.memory)
        lane.put(call, feeds, lane.work)
        lane.enqueue(call)
        lane.get(call, names, lane.work)
        self._core.cuda.synchronize(lane.work)
        return lane.read(call, names)

    def _launch(self, feeds: Feeds) -> _Flight:
        cuda = self._core.cuda
        with self._lanes.working():
            profile = self._profile(feeds)
            with self._lanes.one() as lane:
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
        with self._lanes.working():
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
