"""The runner of a plan, on a GPU that is not there: see `fake_cuda`. Planted faults show that each check can fail."""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import inspect
import os
import re
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from compiler.backends.onnxruntime import open_model
from compiler.backends.tensorrt import contexts, lanes, memory, run
from compiler.backends.tensorrt import cuda as cuda_module
from compiler.backends.tensorrt import stepper as stepper_module
from compiler.backends.tensorrt.profiles import choose_profile
from compiler.backends.tensorrt.run import PlanRunner, open_plan
from compiler.errors import BuildError
from compiler.onnx_files import sha256_of
from compiler.spec import Array, Dim, DimRange, Engine, Feeds, Platform, Precision, TensorSpec, dtype_of
from tests.backends.tensorrt import fake_cuda
from tests.backends.tensorrt.fake_cuda import FakeCuda, FakeEngine, FakeTrt, Fault, Range

BATCH = DimRange(min=1, opt=4, max=64)
PLATFORM = Platform(
    os="Linux", arch="x86_64", cpu="cpu", cores=1, gpu="GPU", compute_capability="9.0", driver="580.1", packages={}
)


def tensor(name: str, *shape: Dim, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


class Bench:
    """A plan on disk, what TensorRT makes of it, and the GPU."""

    def __init__(
        self,
        folder: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        function: Callable[[Feeds], Mapping[str, Array]],
        *,
        profiles: Sequence[Mapping[str, DimRange]] = (),
        seed: int = 0,
        progress: float = 0.0,
        device_bytes: int = 1 << 30,
        options: Mapping[str, str] | None = None,
        late: Sequence[str] = (),
        host: Sequence[str] = (),
        aliases: Mapping[str, str] | None = None,
        capturable: bool = True,
        stripped: bytes | None = None,
    ) -> None:
        self.cuda = FakeCuda(seed, progress=progress, device_bytes=device_bytes)
        self.trt = FakeTrt()
        self.plan = FakeEngine(
            self.cuda,
            inputs,
            outputs,
            function,
            profiles=[shapes_of(inputs, ranges) for ranges in profiles] or [{}],
            late=late,
            host=host,
            aliases=aliases,
            capturable=capturable,
            stripped=stripped,
        )
        path = folder / "engine.plan"
        path.write_bytes(b"a plan")
        self.trt.plans[b"a plan"] = self.plan
        self.engine = Engine(
            name="candidate",
            path=path,
            sha256=hashlib.sha256(b"a plan").hexdigest(),
            size_bytes=6,
            backend="tensorrt",
            backend_reason="because",
            precision=Precision.FP32,
            model_sha256="0" * 64,
            platform=PLATFORM,
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            axes=union(profiles),
            build_s=1.0,
            options=options or {},
            profiles=tuple(profiles) if len(profiles) > 1 else (),
        )

    def open(self, *, contexts: int = 1, graphs: bool | None = None) -> PlanRunner:
        return open_plan(self.engine, self.trt, contexts=contexts, graphs=graphs, cuda=self.cuda)

    def left(self) -> dict[str, int]:
        """What is still held after closing, contexts of TensorRT among it."""
        gc.collect()
        contexts = len(self.plan._contexts)
        return {**self.cuda.held(), **({"contexts": contexts} if contexts else {})}


def shapes_of(inputs: Sequence[TensorSpec], ranges: Mapping[str, DimRange]) -> dict[str, Range]:
    def at(spec: TensorSpec, end: str) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else getattr(ranges[dim], end) for dim in spec.shape)

    return {spec.name: (at(spec, "min"), at(spec, "opt"), at(spec, "max")) for spec in inputs}


def union(profiles: Sequence[Mapping[str, DimRange]]) -> dict[str, DimRange]:
    return {
        axis: DimRange(
            min=min(p[axis].min for p in profiles), opt=profiles[0][axis].opt, max=max(p[axis].max for p in profiles)
        )
        for axis in (profiles[0] if profiles else {})
    }


WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def linear(feeds: Feeds) -> dict[str, Array]:
    return {"y": feeds["x"] @ WEIGHT}


def linear_bench(folder: Path, profiles: Sequence[Mapping[str, DimRange]] = ({"batch": BATCH},), **more: Any) -> Bench:
    return Bench(folder, [tensor("x", "batch", 3)], [tensor("y", "batch", 4)], linear, profiles=profiles, **more)


def points(rows: int, seed: int = 0) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).integers(-9, 9, (rows, 3)).astype(np.float32)}


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(BuildError) as caught:
        work()
    return caught.value.message


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Closed by the test; nothing may be left then."""
    made = linear_bench(tmp_path)
    yield made
    assert made.left() == {}


SCHEDULES = [(seed, progress) for seed in range(4) for progress in (0.0, 0.7)]


# --- one call -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "progress"), SCHEDULES)
def test_a_call_computes_what_the_plan_computes(tmp_path: Path, seed: int, progress: float) -> None:
    bench = linear_bench(tmp_path, seed=seed, progress=progress)
    runner = bench.open()
    for rows in (1, 4, 64, 2, 4, 4, 4, 1):
        feeds = points(rows, rows)
        found = runner.run(feeds)
        assert list(found) == ["y"]
        np.testing.assert_array_equal(found["y"], feeds["x"] @ WEIGHT, strict=True)
    runner.close()
    assert bench.left() == {}


def test_an_onnx_file_gives_the_same_through_the_runner_as_through_onnx_runtime(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", kernel_shape=[3, 3]),
        helper.make_node("Relu", ["c"], ["y"], name="relu"),
    ]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 3, 3, 3], rng.normal(size=108).astype(np.float32).tolist())
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 6, 6])],
        [weight],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    model = open_model(path, threads=1)
    bench = Bench(tmp_path, model.inputs, model.outputs, model.run, profiles=[{"batch": BATCH}])
    runner = bench.open()
    feeds = [{"x": rng.normal(size=(rows, 3, 8, 8)).astype(np.float32)} for rows in (1, 3, 3, 3, 2)]
    for fed, found in zip(feeds, runner.run_many(feeds), strict=True):
        np.testing.assert_array_equal(found["y"], model.run(fed)["y"], strict=True)
        np.testing.assert_array_equal(runner.run(fed)["y"], found["y"], strict=True)
    runner.close()
    assert bench.left() == {}


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "int8", "int32", "int64", "bool", "uint8", "float8_e4m3fn"]
)
@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (2, 0), (2, 3)])
def test_every_dtype_and_shape_passes_through_bit_by_bit(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    spec = tensor("x", *shape, dtype=dtype)
    bench = Bench(tmp_path, [spec], [replace(spec, name="y")], lambda feeds: {"y": feeds["x"]})
    runner = bench.open()
    bits = np.random.default_rng(0).integers(0, 2, (*shape, dtype_of(spec).itemsize), np.uint8)
    value = np.ndarray(shape, dtype_of(spec), bits.tobytes())
    for _ in range(4):
        found = runner.run({"x": value})["y"]
        assert (found.dtype, found.shape, found.tobytes()) == (value.dtype, value.shape, value.tobytes())
        found.fill(1)  # it is the caller's own
    assert bench.cuda.calls.count("copy_in") == bench.cuda.calls.count("copy_out") == (4 if value.size else 0)
    runner.close()
    assert bench.left() == {}


def test_int64_is_not_narrowed(tmp_path: Path) -> None:
    spec = tensor("x", 1, dtype="int64")
    bench = Bench(tmp_path, [spec], [replace(spec, name="y")], lambda feeds: {"y": feeds["x"] + 1})
    runner = bench.open()
    assert runner.run({"x": np.array([2**40])})["y"].tolist() == [2**40 + 1]
    runner.close()


def test_outputs_are_fresh_and_inputs_may_be_strided_and_read_only(bench: Bench) -> None:
    runner = bench.open()
    first = runner.run(points(4))["y"]
    kept = first.copy()
    strided = np.asfortranarray(points(4, 1)["x"])
    strided.setflags(write=False)
    np.testing.assert_array_equal(runner.run({"x": strided})["y"], strided @ WEIGHT)
    np.testing.assert_array_equal(first, kept)
    runner.close()


MISFITS: list[Any] = [
    {},
    {"X": points(1)["x"]},
    {"x": points(1)["x"], "z": points(1)["x"]},
    {"x": points(1)["x"].astype(np.float64)},
    {"x": points(1)["x"].astype(">f4")},
    {"x": points(1)["x"][0]},
    {"x": points(1)["x"][:, :2]},
    {"x": points(1)["x"].tolist()},
]


@pytest.mark.parametrize("feeds", MISFITS)
def test_feeds_that_do_not_fit_are_refused_in_the_words_of_the_other_back_end(bench: Bench, feeds: Any) -> None:
    path = bench.engine.path.with_suffix(".onnx")
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "same",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    other = open_model(path, threads=1)
    runner = bench.open()
    expected = refused(lambda: other.run(feeds)).replace("engine.onnx", "engine.plan")
    assert refused(lambda: runner.run(feeds)) == expected
    assert refused(lambda: runner.time(feeds, 1)) == expected
    assert refused(lambda: runner.time_device(feeds, 1)) == expected
    assert refused(lambda: next(runner.run_many([feeds]))) == expected
    runner.close()


def test_one_axis_name_has_one_size(tmp_path: Path) -> None:
    inputs = [tensor("a", "n"), tensor("b", "n")]
    bench = Bench(tmp_path, inputs, [tensor("y", "n")], lambda f: {"y": f["a"] + f["b"]}, profiles=[{"n": BATCH}])
    runner = bench.open()
    ones = np.ones(3, np.float32)
    assert refused(lambda: runner.run({"a": ones, "b": ones[:2]})) == (
        "engine.plan: input 'b': found float32 [2]; float32 [n], n = 3 was expected. Convert it."
    )
    runner.close()


def test_an_input_that_the_plan_lacks_is_checked_and_noted(tmp_path: Path) -> None:
    bench = linear_bench(tmp_path)
    extra = tensor("unused", "batch")
    bench.engine = replace(bench.engine, inputs=(*bench.engine.inputs, extra))
    runner = bench.open()
    assert runner.notes == ("the plan does not use 'unused': what is fed there is checked and left",)
    feeds = {**points(2), "unused": np.zeros(2, np.float32)}
    np.testing.assert_array_equal(runner.run(feeds)["y"], feeds["x"] @ WEIGHT)
    assert "'unused': found float32 [3]" in refused(lambda: runner.run({**feeds, "unused": np.zeros(3, np.float32)}))
    runner.close()
    assert bench.left() == {}


def test_buffers_are_made_once(bench: Bench) -> None:
    runner = bench.open()
    for _ in range(2):
        for rows in (1, 2, 3, 4):
            runner.run(points(rows))
    runner.run(points(64))
    before = [bench.cuda.calls.count(name) for name in ("malloc", "malloc_host", "create_stream", "create_event")]
    for rows in (64, 1, 63, 4):
        runner.run(points(rows))
        runner.time(points(rows), 3)
    assert before == [bench.cuda.calls.count(n) for n in ("malloc", "malloc_host", "create_stream", "create_event")]
    runner.close()


def test_the_optimum_needs_no_new_buffer(bench: Bench) -> None:
    runner = bench.open()
    before = bench.cuda.calls.count("malloc")
    runner.run(points(4))
    assert bench.cuda.calls.count("malloc") == before
    runner.close()


def test_buffers_double_up_to_the_profile_s_largest(tmp_path: Path) -> None:
    bench = linear_bench(tmp_path, [{"batch": DimRange(min=1, opt=10, max=50)}])
    runner = bench.open()
    memory = runner._lanes.all[0]._slots[0].memory
    for rows, held in ((10, 10), (11, 20), (20, 20), (21, 40), (41, 50), (50, 50)):
        runner.run(points(rows))
        assert (memory["x"].capacity, memory["y"].capacity) == (held * 3 * 4, held * 4 * 4)
    runner.close()
    assert bench.left() == {}


def test_time_gives_one_number_per_call_and_runs_each(bench: Bench) -> None:
    runner = bench.open(graphs=False)
    before = bench.cuda.trace.count("compute")
    taken = runner.time(points(4), 5)
    assert len(taken) == 5
    assert all(0 < seconds < 60 for seconds in taken)
    assert bench.cuda.trace.count("compute") - before == 5
    assert bench.cuda.trace.count("copy in") == bench.cuda.trace.count("copy out") == 5
    runner.close()


def test_time_on_the_device_is_between_events_and_copies_once(bench: Bench) -> None:
    runner = bench.open()
    taken = runner.time_device(points(4), 3)
    # On the fake, every step takes a millisecond: reading, computing, the end of the graph, and the second event.
    assert taken == pytest.approx([0.004] * 3)
    assert bench.cuda.trace.count("copy in") == 1
    assert bench.cuda.trace.count("copy out") == 0
    assert bench.cuda.calls.count("launch") == 4
    runner.close()


def test_inspecting_gives_the_inspector_s_json(bench: Bench) -> None:
    runner = bench.open()
    assert runner.inspect() == '{"Layers": []}'
    runner.close()


# --- profiles -------------------------------------------------------------------------------------------------------

SHORT, LONG = DimRange(min=1, opt=2, max=16), DimRange(min=8, opt=64, max=128)


@pytest.mark.parametrize(("size", "expected"), [(1, 0), (7, 0), (8, 0), (11, 0), (12, 1), (16, 1), (17, 1), (128, 1)])
def test_the_profile_whose_optimum_is_nearest_is_chosen(size: int, expected: int) -> None:
    assert choose_profile("engine.plan", [{"n": SHORT}, {"n": LONG}], {"n": size}) == expected


def test_of_equally_near_profiles_the_first_is_chosen() -> None:
    assert choose_profile("engine.plan", [{"n": SHORT}, {"n": SHORT}], {"n": 3}) == 0
    assert choose_profile("engine.plan", [{}], {}) == 0
    assert choose_profile("engine.plan", [{}], {"n": 5}) == 0


def test_an_axis_of_size_0_is_as_near_as_1() -> None:
    empty = DimRange(min=0, opt=0, max=0)
    assert choose_profile("engine.plan", [{"n": DimRange(min=0, opt=4, max=9)}, {"n": empty}], {"n": 0}) == 1


def test_outside_every_profile_names_the_axis_and_each_range() -> None:
    one, two = {"batch": BATCH}, {"batch": DimRange(min=100, opt=110, max=128)}
    assert refused(lambda: choose_profile("engine.plan", [one], {"batch": 65})) == (
        "engine.plan: axis 'batch' is 65; 1 to 64 was expected (profile 1). Build with a wider profile."
    )
    assert refused(lambda: choose_profile("engine.plan", [one, two], {"batch": 99})) == (
        "engine.plan: axis 'batch' is 99; 1 to 64 was expected (profile 1), 100 to 128 (profile 2). "
        "Build with a wider profile."
    )


def test_sizes_that_no_one_profile_holds_are_all_named() -> None:
    profiles = [
        {"batch": DimRange(min=1, opt=1, max=1), "n": DimRange(min=1, opt=512, max=512)},
        {"batch": DimRange(min=1, opt=8, max=8), "n": DimRange(min=1, opt=1, max=1)},
    ]
    assert refused(lambda: choose_profile("engine.plan", profiles, {"batch": 8, "n": 512})) == (
        "engine.plan: 'batch' is 8, 'n' is 512; sizes inside one and the same profile were expected: 'batch' 1 to 1, "
        "'n' 1 to 512 (profile 1); 'batch' 1 to 8, 'n' 1 to 1 (profile 2). Build with a wider profile."
    )


def test_each_call_runs_in_the_profile_that_holds_it(tmp_path: Path) -> None:
    bench = linear_bench(tmp_path, [{"batch": SHORT}, {"batch": LONG}])
    runner = bench.open()
    for rows in (1, 16, 17, 128, 8, 1):
        feeds = points(rows)
        np.testing.assert_array_equal(runner.run(feeds)["y"], feeds["x"] @ WEIGHT)
    assert refused(lambda: runner.run(points(129))) == (
        "engine.plan: axis 'batch' is 129; 1 to 16 was expected (profile 1), 8 to 128 (profile 2). "
        "Build with a wider profile."
    )
    runner.close()
    assert bench.left() == {}


def test_planted_a_wrong_profile_is_refused_by_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = linear_bench(tmp_path, [{"batch": SHORT}, {"batch": LONG}])
    runner = bench.open()
    monkeypatch.setattr(run, "choose_profile", lambda where, profiles, sizes: 0)
    assert refused(lambda: runner.run(points(100))) == (
        "engine.plan: input 'x': TensorRT refuses the shape [100, 3]; one inside a profile was expected. Its own words: "
        "Error Code 3: x [100, 3] is not in [1, 3]..[16, 3]"
    )
    monkeypatch.undo()
    feeds = points(100)
    np.testing.assert_array_equal(runner.run(feeds)["y"], feeds["x"] @ WEIGHT)
    runner.close()


def test_an_axis_without_a_range_grows_buffers_as_calls_come(tmp_path: Path) -> None:
    spec = tensor("x", "?")
    bench = Bench(tmp_path, [spec], [replace(spec, name="y")], lambda feeds: {"y": feeds["x"] * 2})
    bench.plan._profiles = [{"x": ((1,), (2,), (1000,))}]
    runner = bench.open()
    for size in (1, 10, 500, 20):
        value = np.arange(size, dtype=np.float32)
        np.testing.assert_array_equal(runner.run({"x": value})["y"], value * 2)
    for _ in range(2):
        assert "refuses the shape [1001]" in refused(lambda: runner.run({"x": np.zeros(1001, np.float32)}))
    assert runner.run({"x": np.ones(2, np.float32)})["y"].tolist() == [2, 2]
    runner.close()
    assert bench.left() == {}


# --- shapes that depend on data; shape tensors ----------------------------------------------------------------------


def positive(feeds: Feeds) -> dict[str, Array]:
    return {"y": feeds["x"][feeds["x"] > 0]}


@pytest.mark.parametrize(("seed", "progress"), SCHEDULES)
def test_an_output_whose_shape_depends_on_data_has_its_own_size(tmp_path: Path, seed: int, progress: float) -> None:
    bench = Bench(
        tmp_path,
        [tensor("x", "n")],
        [tensor("y", "?")],
        positive,
        profiles=[{"n": BATCH}],
        late=["y"],
        seed=seed,
        progress=progress,
    )
    runner = bench.open()
    rng = np.random.default_rng(seed)
    feeds = [{"x": rng.normal(size=size).astype(np.float32)} for size in (1, 3, 60, 4, 4, 4)]
    feeds.append({"x": -np.ones(4, np.float32)})
    for fed, found in zip(feeds, runner.run_many(feeds), strict=True):
        np.testing.assert_array_equal(found["y"], positive(fed)["y"], strict=True)
        np.testing.assert_array_equal(runner.run(fed)["y"], positive(fed)["y"], strict=True)
    assert runner.notes == ("no CUDA graphs: the shape of 'y' depends on data",)
    runner.close()
    assert bench.left() == {}


def test_no_room_for_such_an_output_is_said(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [tensor("x", "n")], [tensor("y", "?")], positive, profiles=[{"n": BATCH}], late=["y"])
    runner = bench.open()
    bench.cuda._room = sum(m.data.size for m in bench.cuda._memory if not m.freed) + 10
    assert refused(lambda: runner.run({"x": np.ones(4, np.float32)})) == "planted: no room for 16"
    bench.cuda._room = 1 << 20
    assert runner.run({"x": np.ones(4, np.float32)})["y"].tolist() == [1, 1, 1, 1]
    runner.close()
    assert bench.left() == {}


def test_shape_tensors_live_on_the_host(tmp_path: Path) -> None:
    def reshaped(feeds: Feeds) -> dict[str, Array]:
        return {"y": np.resize(feeds["x"], tuple(feeds["to"].tolist()))}

    inputs = [tensor("x", "n"), tensor("to", 2, dtype="int64")]
    bench = Bench(tmp_path, inputs, [tensor("y", "a", "b")], reshaped, profiles=[{"n": BATCH}], host=["to"])
    runner = bench.open()
    x = np.arange(6, dtype=np.float32)
    for shape in ([2, 3], [3, 2], [1, 6], [3, 2], [3, 2], [3, 2], [1, 6]):
        feeds = {"x": x, "to": np.array(shape)}
        np.testing.assert_array_equal(runner.run(feeds)["y"], x.reshape(shape), strict=True)
    assert bench.cuda.calls.count("launch") == 2
    runner.close()
    assert bench.left() == {}


def test_an_output_that_is_computed_on_the_host_stops_graphs(tmp_path: Path) -> None:
    def size(feeds: Feeds) -> dict[str, Array]:
        return {"y": feeds["x"] + 1, "n": np.array(feeds["x"].shape, np.int64)}

    outputs = [tensor("y", "n"), tensor("n", 1, dtype="int64")]
    bench = Bench(tmp_path, [tensor("x", "n")], outputs, size, profiles=[{"n": BATCH}], host=["n"])
    runner = bench.open()
    sizes = (3, 5, 3, 5, 3, 5, 3)
    for rows in sizes:
        found = runner.run({"x": np.zeros(rows, np.float32)})
        assert (found["n"].tolist(), found["y"].tolist()) == ([rows], [1] * rows)
    new = (9, 10, 11, 12, 13, *sizes)  # what is in flight is not overwritten as shapes are inferred for the next
    many = runner.run_many({"x": np.zeros(rows, np.float32)} for rows in new)
    assert [found["n"].tolist() for found in many] == [[rows] for rows in new]
    assert runner.notes == ("no CUDA graphs: TensorRT computes 'n' on the host",)
    runner.close()
    assert bench.left() == {}


# --- CUDA graphs ----------------------------------------------------------------------------------------------------


def test_a_shape_seen_twice_runs_as_a_graph(bench: Bench) -> None:
    runner = bench.open()
    for count, launches in ((1, 0), (2, 0), (3, 1), (4, 2)):
        feeds = points(4, count)
        np.testing.assert_array_equal(runner.run(feeds)["y"], feeds["x"] @ WEIGHT)
        assert bench.cuda.calls.count("launch") == launches
    runner.run(points(3))
    assert bench.cuda.calls.count("launch") == 2
    feeds = points(4, 9)
    np.testing.assert_array_equal(runner.run(feeds)["y"], feeds["x"] @ WEIGHT)
    assert bench.cuda.calls.count("launch") == 3
    assert runner.notes == ()
    runner.close()


def test_without_graphs_nothing_is_captured(bench: Bench) -> None:
    runner = bench.open(graphs=False)
    for _ in range(4):
        runner.run(points(4))
    assert "begin_capture" not in bench.cuda.calls
    assert runner.notes == ()
    runner.close()


FASTER_LATER = "no CUDA graphs: TensorRT for RTX compiles faster kernels for a shape while it runs; a graph would keep the slow ones"


@pytest.mark.parametrize(
    ("backend", "rows", "graphs", "captured", "notes"),
    [
        ("tensorrt", "batch", None, 1, ()),
        ("tensorrt", 4, None, 1, ()),
        ("tensorrt_rtx", "batch", None, 0, (FASTER_LATER,)),
        ("tensorrt_rtx", "batch", True, 1, ()),
        ("tensorrt_rtx", "batch", False, 0, ()),
        ("tensorrt_rtx", 4, None, 1, ()),
    ],
)
def test_no_graph_is_captured_where_kernels_get_faster_later(
    tmp_path: Path, backend: str, rows: Dim, graphs: bool | None, captured: int, notes: tuple[str, ...]
) -> None:
    profiles = [{"batch": BATCH}] if rows == "batch" else ()
    bench = Bench(tmp_path, [tensor("x", rows, 3)], [tensor("y", rows, 4)], linear, profiles=profiles)
    bench.engine = replace(bench.engine, backend=backend)
    runner = bench.open(graphs=graphs)
    for seed in range(4):
        feeds = points(4, seed)
        np.testing.assert_array_equal(runner.run(feeds)["y"], feeds["x"] @ WEIGHT)
    assert bench.cuda.calls.count("begin_capture") == captured
    assert runner.notes == notes
    runner.close()
    assert bench.left() == {}


def test_new_addresses_mean_a_new_graph(bench: Bench) -> None:
    runner = bench.open()
    for _ in range(3):
        runner.run(points(4))
    runner.run(points(64))  # larger buffers take the place of the old ones
    feeds = points(4, 5)
    np.testing.assert_array_equal(runner.run(feeds)["y"], feeds["x"] @ WEIGHT)
    assert bench.cuda.calls.count("launch") == 1
    runner.close()


def test_planted_a_graph_of_old_addresses_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = linear_bench(tmp_path)
    monkeypatch.setattr(contexts.Call, "signature", lambda call: (call.profile, call.shapes, call.values))
    runner = bench.open()
    for _ in range(3):
        runner.run(points(4))
    runner.run(points(64))
    with pytest.raises(Fault, match=r"was freed"):
        runner.run(points(4, 5))


def test_planted_graphs_that_share_a_context_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = linear_bench(tmp_path)
    runner = bench.open()
    monkeypatch.setattr(lanes.Lane, "_context", lambda lane, profile: lane._contexts[profile])
    for _ in range(2):
        runner.run(points(4))
    runner.run(points(3))
    with pytest.raises(Fault, match="a graph whose context was given other shapes"):
        runner.run(points(4))


def test_old_graphs_make_room_for_new_ones(bench: Bench) -> None:
    runner = bench.open()
    runner.run(points(64))
    sizes = range(1, lanes._MAX_GRAPHS + 3)
    for rows in sizes:
        for _ in range(2):
            runner.run(points(rows))
    assert bench.cuda.held()["executable graphs"] == lanes._MAX_GRAPHS
    launches = bench.cuda.calls.count("launch")
    runner.run(points(sizes[-1]))
    assert bench.cuda.calls.count("launch") == launches + 1
    runner.run(points(sizes[0]))
    assert bench.cuda.calls.count("launch") == launches + 1
    runner.close()


def test_a_graph_in_flight_is_not_thrown_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_MAX_GRAPHS", 1)
    for seed in range(4):
        bench = linear_bench(tmp_path, seed=seed)
        runner = bench.open()
        feeds = [points(rows, seed) for rows in np.random.default_rng(seed).integers(3, 5, 40)]
        for fed, found in zip(feeds, runner.run_many(feeds), strict=True):
            np.testing.assert_array_equal(found["y"], fed["x"] @ WEIGHT)
        assert bench.cuda.calls.count("launch") > 0
        runner.close()
        assert bench.left() == {}


def test_a_graph_is_of_the_addresses_of_inputs(tmp_path: Path) -> None:
    """The input moves, the output stays where it is."""
    bench = Bench(tmp_path, [tensor("x", "n")], [tensor("y")], lambda f: {"y": f["x"].sum()}, profiles=[{"n": BATCH}])
    runner = bench.open()
    for size in (4, 4, 4, 64, 4):
        assert runner.run({"x": np.ones(size, np.float32)})["y"] == size
    runner.close()
    assert bench.left() == {}


def test_a_graph_is_of_the_addresses_of_outputs(tmp_path: Path) -> None:
    """The output moves, the input stays where it is."""

    def full(feeds: Feeds) -> dict[str, Array]:
        return {"y": np.full(int(feeds["size"][0]), feeds["x"])}

    inputs = [tensor("x"), tensor("size", 1, dtype="int64")]
    bench = Bench(tmp_path, inputs, [tensor("y", "n")], full, host=["size"])
    runner = bench.open()
    for count, size in enumerate((4, 4, 4, 64, 4)):
        found = runner.run({"x": np.array(count, np.float32), "size": np.array([size])})["y"]
        assert found.tolist() == [count] * size
    runner.close()
    assert bench.left() == {}


def test_where_capturing_fails_calls_go_on_without(tmp_path: Path) -> None:
    bench = linear_bench(tmp_path, capturable=False)
    runner = bench.open()
    for seed in range(4):
        feeds = points(4, seed)
        np.testing.assert_array_equal(runner.run(feeds)["y"], feeds["x"] @ WEIGHT)
    assert bench.cuda.calls.count("begin_capture") == 1
    (note,) = runner.notes
    assert note == (
        "no more CUDA graphs: capturing failed. engine.plan: TensorRT cannot run it; a call that it runs was expected. "
        "Its own words: Error Code 1: operation not permitted when stream is capturing"
    )
    runner.close()
    assert bench.left() == {}


@pytest.mark.parametrize("name", ["begin_capture", "end_capture", "instantiate"])
def test_where_cuda_makes_no_graph_calls_go_on_without(bench: Bench, name: str) -> None:
    runner = bench.open()
    bench.cuda.failing[name] = 0
    for seed in range(4):
        feeds = points(4, seed)
        np.testing.assert_array_equal(runner.run(feeds)["y"], feeds["x"] @ WEIGHT)
    assert runner.notes == (f"no more CUDA graphs: capturing failed. planted: {name}",)
    runner.close()


def test_where_there_is_no_room_for_a_context_calls_go_on_without(bench: Bench) -> None:
    bench.plan.most_contexts = 1
    runner = bench.open()
    for seed in range(4):
        feeds = points(4, seed)
        np.testing.assert_array_equal(runner.run(feeds)["y"], feeds["x"] @ WEIGHT)
    (note,) = runner.notes
    assert note == (
        "no more CUDA graphs: there is no room for a context. engine.plan: TensorRT makes no execution context; one more "
        "was expected. Its own words: Error Code 2: no memory for a context"
    )
    runner.close()


# --- many calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "progress"), SCHEDULES)
def test_many_calls_give_their_results_in_order(tmp_path: Path, seed: int, progress: float) -> None:
    bench = linear_bench(tmp_path, seed=seed, progress=progress)
    runner = bench.open()
    feeds = [points(1 + index * 7 % 64, index) for index in range(20)] + [points(8, index) for index in range(20)]
    found = list(runner.run_many(iter(feeds)))
    assert len(found) == len(feeds)
    for fed, got in zip(feeds, found, strict=True):
        np.testing.assert_array_equal(got["y"], fed["x"] @ WEIGHT, strict=True)
    assert bench.cuda.calls.count("launch") > 0
    runner.close()
    assert bench.left() == {}


def test_one_feed_may_be_overwritten_once_it_is_taken(bench: Bench) -> None:
    runner = bench.open()
    buffer = np.zeros((4, 3), np.float32)

    def feeds() -> Iterator[Feeds]:
        for value in range(8):
            buffer[:] = value
            yield {"x": buffer}

    for value, found in enumerate(runner.run_many(feeds())):
        np.testing.assert_array_equal(found["y"], np.full((4, 3), value, np.float32) @ WEIGHT)
    runner.close()


def test_copies_overlap_work(bench: Bench) -> None:
    """The next call is put on its streams before the result of the first is asked for, each part on a stream of its own."""
    runner = bench.open(graphs=False)
    results = runner.run_many(points(4, seed) for seed in range(9))
    next(results)
    lane = runner._lanes.all[0]
    flying = [[op.what for op in bench.cuda._streams[s].pending] for s in (lane.incoming, lane.work, lane.outgoing)]
    assert "copy in" not in flying[1] + flying[2]
    assert "copy out" not in flying[0] + flying[1]
    assert bench.cuda.calls.count("copy_in") == 3
    assert bench.cuda.calls.count("synchronize_event") == 1
    results.close()  # type: ignore[attr-defined]
    runner.close()


def test_many_calls_need_no_more_than_three_slots(bench: Bench) -> None:
    runner = bench.open()
    for _ in range(3):
        list(runner.run_many(points(4, seed) for seed in range(9)))
    assert len(runner._lanes.all[0]._slots) == 3
    runner.close()


def faults_over_seeds(folder: Path, plant: Callable[[pytest.MonkeyPatch], None]) -> int:
    """How many schedules see a planted mistake of `run_many`."""
    seen = 0
    for seed, progress in SCHEDULES:
        bench = linear_bench(folder, seed=seed, progress=progress)
        runner = bench.open()
        feeds = [points(4, index) for index in range(12)]
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            try:
                found = list(runner.run_many(feeds))
                seen += any(not np.array_equal(f["x"] @ WEIGHT, g["y"]) for f, g in zip(feeds, found, strict=True))
            except Fault:
                seen += 1
    return seen


def test_planted_mistakes_of_the_pipeline_are_caught(tmp_path: Path) -> None:
    wait = FakeCuda.wait

    def without_wait(nth: int) -> Callable[[pytest.MonkeyPatch], None]:
        def plant(patch: pytest.MonkeyPatch) -> None:
            count = [0]

            def some(cuda: FakeCuda, stream: int, event: int) -> None:
                count[0] += 1
                if count[0] % 2 != nth:
                    wait(cuda, stream, event)

            patch.setattr(FakeCuda, "wait", some)

        return plant

    def without_synchronise(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(FakeCuda, "synchronize_event", lambda cuda, event: None)

    def slots_given_too_early(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(lanes.Lane, "take_slot", lambda lane: lane._slots[0])

    assert faults_over_seeds(tmp_path, lambda patch: None) == 0
    assert faults_over_seeds(tmp_path, without_wait(1)) > 0  # work does not wait for the copy in
    assert faults_over_seeds(tmp_path, without_wait(0)) > 0  # the copy out does not wait for the work
    assert faults_over_seeds(tmp_path, without_synchronise) > 0
    assert faults_over_seeds(tmp_path, slots_given_too_early) > 0


def test_planted_a_call_that_does_not_wait_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = linear_bench(tmp_path)
    runner = bench.open()
    monkeypatch.setattr(FakeCuda, "synchronize", lambda cuda, stream: None)
    feeds = points(4)
    assert not np.array_equal(runner.run(feeds)["y"], feeds["x"] @ WEIGHT)


def test_a_wrong_feed_is_raised_in_its_place(bench: Bench) -> None:
    runner = bench.open()
    feeds = [points(2), points(3), points(4), points(65), points(5)]
    got = []
    with pytest.raises(BuildError, match="axis 'batch' is 65"):
        for found in runner.run_many(feeds):
            got.append(found["y"].shape[0])
    assert got == [2, 3, 4]
    np.testing.assert_array_equal(runner.run(points(4))["y"], points(4)["x"] @ WEIGHT)
    assert len(runner._lanes.all[0]._free) == len(runner._lanes.all[0]._slots)
    runner.close()


def test_what_the_caller_s_iterator_raises_comes_through(bench: Bench) -> None:
    runner = bench.open()

    def feeds() -> Iterator[Feeds]:
        yield points(2)
        raise ValueError("mine")

    results = runner.run_many(feeds())
    assert next(results)["y"].shape == (2, 4)
    with pytest.raises(ValueError, match="mine"):
        next(results)
    assert len(list(runner.run_many([points(3)] * 5))) == 5
    runner.close()


@pytest.mark.parametrize("name", ["copy_in", "copy_out", "record", "wait", "synchronize_event"])
def test_a_failure_on_the_way_leaves_a_runner_that_works(bench: Bench, name: str) -> None:
    runner = bench.open()
    list(runner.run_many([points(4)] * 4))
    bench.cuda.failing[name] = 2
    assert refused(lambda: list(runner.run_many(points(4, seed) for seed in range(9)))) == f"planted: {name}"
    assert len(runner._lanes.all[0]._free) == len(runner._lanes.all[0]._slots)
    feeds = [points(64, seed) for seed in range(9)]  # larger ones: nothing may be left that uses the old buffers
    for fed, found in zip(feeds, runner.run_many(feeds), strict=True):
        np.testing.assert_array_equal(found["y"], fed["x"] @ WEIGHT)
    runner.close()


@pytest.mark.parametrize("name", ["copy_in", "copy_out", "synchronize"])
def test_a_call_that_fails_leaves_nothing_under_way(bench: Bench, name: str) -> None:
    runner = bench.open()
    bench.cuda.failing[name] = 0
    assert refused(lambda: runner.run(points(4))) == f"planted: {name}"
    np.testing.assert_array_equal(runner.run(points(64))["y"], points(64)["x"] @ WEIGHT)
    runner.close()


def test_results_may_be_left_and_other_calls_come_between(bench: Bench) -> None:
    runner = bench.open()
    left = runner.run_many(points(4, seed) for seed in range(9))
    next(left)
    for seed, found in enumerate(runner.run_many(points(3, seed) for seed in range(9))):
        np.testing.assert_array_equal(found["y"], points(3, seed)["x"] @ WEIGHT)
        np.testing.assert_array_equal(runner.run(points(5, seed))["y"], points(5, seed)["x"] @ WEIGHT)
    np.testing.assert_array_equal(next(left)["y"], points(4, 1)["x"] @ WEIGHT)
    del left
    gc.collect()
    assert len(runner._lanes.all[0]._free) == len(runner._lanes.all[0]._slots)
    runner.close()


def test_a_runner_may_be_closed_with_results_left(bench: Bench) -> None:
    runner = bench.open()
    left = runner.run_many(points(4, seed) for seed in range(9))
    next(left)
    runner.close()
    assert bench.left() == {}
    assert refused(lambda: next(left)) == "engine.plan: closed; an open model was expected. Open it again."


# --- several at once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contexts", [1, 3])
def test_threads_run_at_once(tmp_path: Path, contexts: int) -> None:
    bench = linear_bench(tmp_path, progress=0.5)
    runner = bench.open(contexts=contexts)
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for index in range(10):
                feeds = points(1 + (seed * index) % 64, seed)
                found = next(runner.run_many([feeds])) if index % 3 == 2 else runner.run(feeds)
                if not np.array_equal(found["y"], feeds["x"] @ WEIGHT):
                    wrong.append((seed, index))
        except BaseException as exc:
            wrong.append(exc)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    runner.close()
    assert bench.left() == {}


def test_contexts_run_at_the_same_time(tmp_path: Path) -> None:
    """Two calls meet inside TensorRT, which needs two lanes."""
    meeting = threading.Barrier(2, timeout=30)
    bench = linear_bench(tmp_path)
    runner = bench.open(contexts=2, graphs=False)
    execute = fake_cuda.FakeContext.execute_async_v3

    def together(context: fake_cuda.FakeContext, stream_handle: int) -> bool:
        meeting.wait()
        return execute(context, stream_handle)

    found: list[Array] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_cuda.FakeContext, "execute_async_v3", together)
        threads = [threading.Thread(target=lambda: found.append(runner.run(points(4))["y"])) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 2
    runner.close()
    assert bench.left() == {}


def test_planted_lanes_that_share_intermediate_memory_are_caught(tmp_path: Path) -> None:
    def faults(plant: bool) -> int:
        seen = 0
        for seed in range(40):
            bench = linear_bench(tmp_path, seed=seed)
            runner = bench.open(contexts=2, graphs=False)
            first, second = runner._lanes.all
            if plant:
                for context in second._contexts:
                    context._context.set_device_memory(first._workspace, first._workspace_size)
            flying = [runner._launch(points(4))]
            with runner._lanes.one():  # the lane used last is taken, so that the other comes next
                flying.append(runner._launch(points(4)))
            assert {flight.lane for flight in flying} == {first, second}
            try:
                first.settle()
                second.settle()
            except Fault as fault:
                assert str(fault) == "device memory of a context used by another at the same time"
                seen += 1
        return seen

    assert faults(plant=False) == 0
    assert faults(plant=True) > 0


class Gate:
    """Holds up the first thread that comes."""

    def __init__(self) -> None:
        self.entered = 0
        self.inside, self._go_on = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.entered += 1
        self.inside.set()
        assert self._go_on.wait(30)

    def open(self) -> None:
        self._go_on.set()


def test_closing_waits_for_calls_under_way(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, gate = bench.open(), Gate()
    read = lanes.Lane.read
    found: list[Array] = []

    def held_up(lane: lanes.Lane, *arguments: Any) -> dict[str, Array]:
        gate()
        return read(lane, *arguments)

    monkeypatch.setattr(lanes.Lane, "read", held_up)
    caller = threading.Thread(target=lambda: found.append(runner.run(points(4))["y"]))
    closer = threading.Thread(target=runner.close)
    caller.start()
    assert gate.inside.wait(30)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive()
    assert refused(lambda: runner.run(points(1))) == "engine.plan: closed; an open model was expected. Open it again."
    gate.open()
    caller.join()
    closer.join()
    np.testing.assert_array_equal(found[0], points(4)["x"] @ WEIGHT)


# --- state on the device --------------------------------------------------------------------------------------------

PAST, SEQ = DimRange(min=0, opt=4, max=32), DimRange(min=1, opt=1, max=8)


def attend(feeds: Feeds) -> dict[str, Array]:
    """A cache that grows: what is new is put behind what was; the output counts and sums all of it."""
    present = np.concatenate([feeds["past"], feeds["new"]], axis=1)
    return {"sum": present.sum(axis=1), "present": present}


def growing(folder: Path, **more: Any) -> Bench:
    return Bench(
        folder,
        [tensor("new", "batch", "seq", 2), tensor("past", "batch", "length", 2)],
        [tensor("sum", "batch", 2), tensor("present", "batch", "length+seq", 2)],
        attend,
        profiles=[{"batch": BATCH, "seq": SEQ, "length": PAST}],
        **more,
    )


def news(seed: int, batch: int = 1, seq: int = 1) -> Array:
    return np.random.default_rng(seed).integers(-9, 9, (batch, seq, 2)).astype(np.float32)


def nothing(batch: int = 1) -> dict[str, Array]:
    return {"past": np.zeros((batch, 0, 2), np.float32)}


@pytest.mark.parametrize(("seed", "progress"), SCHEDULES)
def test_a_cache_grows_step_by_step_on_the_device(tmp_path: Path, seed: int, progress: float) -> None:
    bench = growing(tmp_path, seed=seed, progress=progress)
    runner = bench.open()
    stepper = runner.stepper({"present": "past"})
    for batch in (1, 3, 1):
        stepper.reset(nothing(batch))
        past = nothing(batch)["past"]
        copied = bench.cuda.calls.count("copy_in")
        for index, seq in enumerate((8, 1, 1, 1, 5, 1, 1)):
            new = news(index, batch, seq)
            expected = attend({"new": new, "past": past})
            found = stepper.step({"new": new})
            assert list(found) == ["sum"]
            np.testing.assert_array_equal(found["sum"], expected["sum"], strict=True)
            past = expected["present"]
        assert bench.cuda.calls.count("copy_in") - copied == 7  # the cache was never among them
        np.testing.assert_array_equal(stepper.fetch("present"), past, strict=True)
    runner.close()
    assert bench.left() == {}


def test_buffers_of_a_growing_cache_double(tmp_path: Path) -> None:
    bench = growing(tmp_path)
    runner = bench.open(graphs=False)
    stepper = runner.stepper({"present": "past"})
    stepper.reset(nothing())
    stepper.step({"new": news(0)})
    before = bench.cuda.calls.count("malloc")
    for index in range(31):
        stepper.step({"new": news(index)})
    assert bench.cuda.calls.count("malloc") - before <= 10
    runner.close()


def test_a_cache_beyond_the_profile_is_refused_and_kept(tmp_path: Path) -> None:
    bench = growing(tmp_path)
    runner = bench.open()
    stepper = runner.stepper({"present": "past"})
    full = np.ones((1, 33, 2), np.float32)
    stepper.reset({"past": full})
    assert refused(lambda: stepper.step({"new": news(0)})) == (
        "engine.plan: axis 'length' is 33; 0 to 32 was expected (profile 1). Build with a wider profile."
    )
    np.testing.assert_array_equal(stepper.fetch("present"), full)
    runner.close()
    assert bench.left() == {}


def test_two_steppers_and_plain_calls_do_not_disturb_one_another(tmp_path: Path) -> None:
    bench = growing(tmp_path, progress=0.3)
    runner = bench.open(contexts=2)
    steppers = [runner.stepper({"present": "past"}) for _ in range(2)]
    pasts = [nothing()["past"]] * 2
    for stepper in steppers:
        stepper.reset(nothing())
    for index in range(12):
        which = index % 3 % 2
        new = news(index)
        expected = attend({"new": new, "past": pasts[which]})
        np.testing.assert_array_equal(steppers[which].step({"new": new})["sum"], expected["sum"])
        pasts[which] = expected["present"]
        plain = {"new": new, "past": news(99, 1, 7)}
        for name, value in runner.run(plain).items():
            np.testing.assert_array_equal(value, attend(plain)[name])
    steppers[0].close()
    steppers[0].close()
    assert refused(lambda: steppers[0].step({"new": news(0)})) == (
        "engine.plan: closed; an open model was expected. Open it again."
    )
    np.testing.assert_array_equal(steppers[1].fetch("present"), pasts[1])
    runner.close()
    assert bench.left() == {}
    assert refused(lambda: steppers[1].fetch("present")).startswith("engine.plan: closed")


def test_one_stepper_steps_for_one_thread_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = growing(tmp_path)
    runner, gate = bench.open(contexts=2), Gate()
    stepper = runner.stepper({"present": "past"})
    stepper.reset(nothing())
    prepare = lanes.Lane.prepare

    def held_up(lane: lanes.Lane, *arguments: Any) -> Any:
        gate()
        return prepare(lane, *arguments)

    monkeypatch.setattr(lanes.Lane, "prepare", held_up)
    threads = [threading.Thread(target=stepper.step, args=({"new": news(seed)},)) for seed in range(2)]
    for thread in threads:
        thread.start()
    assert gate.inside.wait(30)
    threads[1].join(0.1)
    assert gate.entered == 1
    gate.open()
    for thread in threads:
        thread.join()
    assert stepper.fetch("present").sum() == news(0).sum() + news(1).sum()
    runner.close()
    assert bench.left() == {}


def test_several_tensors_are_carried(tmp_path: Path) -> None:
    """Among them two that change places, so that each becomes the other's input."""
    inputs = [tensor("x", 2), tensor("a", 3), tensor("b", 3), tensor("c", 50)]
    outputs = [tensor("a2", 3), tensor("b2", 3), tensor("c2", 50), tensor("y", 2)]

    def turn(feeds: Feeds) -> dict[str, Array]:
        return {"a2": feeds["a"] + 1, "b2": feeds["b"] * 2, "c2": feeds["c"] - 1, "y": feeds["x"] + feeds["a"][0]}

    bench = Bench(tmp_path, inputs, outputs, turn)
    runner = bench.open(contexts=2)
    stepper = runner.stepper({"a2": "b", "b2": "a", "c2": "c"})
    state = {name: np.arange(size, dtype=np.float32) + size for name, size in (("a", 3), ("b", 3), ("c", 50))}
    stepper.reset(state)
    for index in range(6):
        feeds = {"x": np.full(2, index, np.float32)}
        expected = turn({**feeds, **state})
        np.testing.assert_array_equal(stepper.step(feeds)["y"], expected["y"])
        state = {"a": expected["b2"], "b": expected["a2"], "c": expected["c2"]}
    for output, name in (("a2", "b"), ("b2", "a"), ("c2", "c")):
        np.testing.assert_array_equal(stepper.fetch(output), state[name])
    runner.close()
    assert bench.left() == {}


def update(feeds: Feeds) -> dict[str, Array]:
    """A cache of fixed length that is written in place, one row at a time."""
    cache = feeds["cache"].copy()
    cache[:, int(feeds["at"][0])] = feeds["new"]
    return {"sum": cache.sum(axis=1), "updated": cache}


def in_place(folder: Path, **more: Any) -> Bench:
    return Bench(
        folder,
        [tensor("new", 1, 2), tensor("at", 1, dtype="int64"), tensor("cache", 1, 6, 2)],
        [tensor("sum", 1, 2), tensor("updated", 1, 6, 2)],
        update,
        aliases={"updated": "cache"},
        **more,
    )


@pytest.mark.parametrize(("seed", "progress"), SCHEDULES)
def test_a_cache_that_is_updated_in_place_has_one_address(tmp_path: Path, seed: int, progress: float) -> None:
    bench = in_place(tmp_path, seed=seed, progress=progress)
    runner = bench.open()
    stepper = runner.stepper({"updated": "cache"})
    cache = np.zeros((1, 6, 2), np.float32)
    stepper.reset({"cache": cache})
    for index in range(6):
        feeds = {"new": news(index)[0], "at": np.array([index])}
        expected = update({**feeds, "cache": cache})
        np.testing.assert_array_equal(stepper.step(feeds)["sum"], expected["sum"])
        cache = expected["updated"]
    np.testing.assert_array_equal(stepper.fetch("updated"), cache)
    assert bench.cuda.calls.count("launch") == 4  # same shapes, same addresses: a graph from the third on
    runner.close()
    assert bench.left() == {}


def test_a_plain_call_updates_a_copy(tmp_path: Path) -> None:
    bench = in_place(tmp_path)
    runner = bench.open()
    cache = news(7, 1, 6)
    feeds = [{"new": news(i)[0], "at": np.array([i % 6]), "cache": cache} for i in range(5)]
    for fed, found in zip(feeds, runner.run_many(feeds), strict=True):
        for name, value in update(fed).items():
            np.testing.assert_array_equal(found[name], value)
            np.testing.assert_array_equal(runner.run(fed)[name], value)
    runner.close()
    assert bench.left() == {}


def test_planted_two_addresses_for_one_cache_are_refused(tmp_path: Path) -> None:
    bench = in_place(tmp_path)
    plan = bench.plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "get_aliased_input_tensor", lambda name: None)
        runner = bench.open()
    feeds = {"new": news(0)[0], "at": np.array([0]), "cache": news(1, 1, 6)}
    assert "updated and cache must have the same address" in refused(lambda: runner.run(feeds))
    runner.close()


def test_planted_a_stepper_that_does_not_swap_its_buffers_is_caught(tmp_path: Path) -> None:
    bench = growing(tmp_path)
    runner = bench.open()
    stepper = runner.stepper({"present": "past"})
    stepper.reset({"past": news(5, 1, 1)})

    class Stuck(list[Any]):
        def reverse(self) -> None:
            pass

    for state in stepper._states:
        state.buffers = Stuck(state.buffers)
    stepper.step({"new": news(0)})
    with pytest.raises(Fault, match=r"outside every allocation|never written"):
        stepper.step({"new": news(1)})


def test_what_cannot_be_carried_is_refused(tmp_path: Path) -> None:
    runner = growing(tmp_path).open()
    assert refused(lambda: runner.stepper({"presnt": "past"})) == (
        "engine.plan: no output is named 'presnt'; did you mean 'present'?"
    )
    assert refused(lambda: runner.stepper({"present": "zzz"})) == (
        "engine.plan: no input is named 'zzz'; expected one of new, past."
    )
    assert refused(lambda: runner.stepper({"sum": "past"})) == (
        "engine.plan: output 'sum' is float32 with 2 axes; float32 with 3 was expected for input 'past'. "
        "Carry it to another input."
    )
    runner.close()
    outputs = [tensor("a", 2), tensor("b", 2), tensor("n", 1, dtype="int64")]
    inputs = [tensor("x", 2), tensor("m", 1, dtype="int64")]
    bench = Bench(
        tmp_path,
        inputs,
        outputs,
        lambda f: {"a": f["x"], "b": f["x"], "n": np.array([2])},
        host=["n"],
    )
    runner = bench.open()
    assert refused(lambda: runner.stepper({"a": "x", "b": "x"})) == (
        "engine.plan: input 'x' is carried from two outputs; one was expected. Drop one."
    )
    assert refused(lambda: runner.stepper({"n": "m"})) == (
        "engine.plan: 'n' -> 'm' is a shape tensor, which lives on the host; a tensor on the device was expected. "
        "Feed it at every step."
    )
    runner.close()
    inputs = [tensor("x", 2), tensor("z", 2)]
    bench = Bench(
        tmp_path, inputs, [tensor("a", 2), tensor("b", 2)], lambda f: {"a": f["x"], "b": f["z"]}, aliases={"a": "x"}
    )
    runner = bench.open()
    for carry in ({"a": "z"}, {"b": "x"}):
        assert refused(lambda carry=carry: runner.stepper(carry)) == (  # type: ignore[misc]
            "engine.plan: TensorRT writes output 'a' in the place of input 'x'; the one carried to the other was expected. "
            "Carry it so, or carry neither."
        )
    stepper = runner.stepper({"b": "z"})
    stepper.reset({"z": np.ones(2, np.float32)})
    np.testing.assert_array_equal(stepper.step({"x": np.zeros(2, np.float32)})["a"], [0, 0])
    runner.close()
    assert bench.left() == {}


def test_steps_and_resets_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    bench = growing(tmp_path)
    runner = bench.open()
    stepper = runner.stepper({"present": "past"})
    missing = "engine.plan: input 'past' is carried and has no value; one was expected. Reset the stepper first."
    assert refused(lambda: stepper.step({"new": news(0)})) == missing
    assert refused(lambda: stepper.fetch("present")) == missing
    assert refused(lambda: stepper.reset({})) == (
        "engine.plan: feeds named nothing; 'past' were expected. Feed every input by its exact name."
    )
    stepper.reset(nothing())
    assert refused(lambda: stepper.fetch("sum")) == (
        "engine.plan: output 'sum' is not carried; 'present' was expected. Carry it, or take it from what a step returns."
    )
    assert refused(lambda: stepper.step({"new": news(0), **nothing()})) == (
        "engine.plan: feeds named 'new', 'past'; 'new' were expected. Feed every input by its exact name."
    )
    assert refused(lambda: stepper.step({"new": news(0, 2)})) == (
        "engine.plan: input 'new': found float32 [2, 1, 2]; float32 [batch, seq, 2], batch = 1 was expected. Convert it."
    )
    assert stepper.step({"new": news(0)})["sum"].tolist() == news(0)[:, 0].tolist()
    runner.close()
    assert bench.left() == {}


def test_a_step_that_fails_keeps_the_state_or_says_that_it_is_lost(tmp_path: Path) -> None:
    bench = growing(tmp_path)
    runner = bench.open(graphs=False)
    stepper = runner.stepper({"present": "past"})
    stepper.reset({"past": news(1, 1, 3)})
    for name in ("copy_in", "copy_out", "synchronize"):
        bench.cuda.failing[name] = 0
        assert refused(lambda: stepper.step({"new": news(0)})) == f"planted: {name}"
    bench.plan.lies["execute_async_v3"] = 0
    assert "planted in execute_async_v3" in refused(lambda: stepper.step({"new": news(0)}))
    np.testing.assert_array_equal(stepper.fetch("present"), news(1, 1, 3))
    runner.close()
    assert bench.left() == {}

    bench = in_place(tmp_path)
    runner = bench.open()
    stepper = runner.stepper({"updated": "cache"})
    stepper.reset({"cache": news(1, 1, 6)})
    feeds = {"new": news(0)[0], "at": np.array([0])}
    bench.cuda.failing["copy_out"] = 0
    assert refused(lambda: stepper.step(feeds)) == "planted: copy_out"
    assert refused(lambda: stepper.step(feeds)) == (
        "engine.plan: input 'cache' is carried and has no value; one was expected. Reset the stepper first."
    )
    stepper.reset({"cache": news(1, 1, 6)})
    expected = update({**feeds, "cache": news(1, 1, 6)})
    np.testing.assert_array_equal(stepper.step(feeds)["sum"], expected["sum"])
    runner.close()
    assert bench.left() == {}


def test_a_state_that_took_another_shape_is_refused(tmp_path: Path) -> None:
    bench = Bench(
        tmp_path,
        [tensor("x", 2), tensor("z", 2)],
        [tensor("y", "?")],
        lambda f: {"y": np.concatenate([f["x"], f["z"]])},
    )
    runner = bench.open()
    stepper = runner.stepper({"y": "z"})
    stepper.reset({"z": np.ones(2, np.float32)})
    assert stepper.step({"x": np.zeros(2, np.float32)}) == {}
    assert refused(lambda: stepper.step({"x": np.zeros(2, np.float32)})) == (
        "engine.plan: input 'z' is carried and has become [4]; [2] was expected. Reset the stepper."
    )
    runner.close()
    assert bench.left() == {}


# --- opening and closing --------------------------------------------------------------------------------------------


def test_a_plan_that_changed_is_never_deserialised(bench: Bench) -> None:
    bench.engine.path.write_bytes(b"another plan")
    found = hashlib.sha256(b"another plan").hexdigest()
    assert refused(bench.open) == (
        f"engine.plan: its SHA-256 is {found}; {bench.engine.sha256} was expected. It was not opened, since deserialising a "
        "plan runs native code. Build the engine again, or fetch the file again."
    )
    assert bench.trt.deserialised == []
    assert bench.cuda.calls == []
    assert "deserialising a plan runs native code" in refused(lambda: open_plan(bench.engine, bench.trt))


def test_planted_a_check_after_deserialising_is_caught(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the test above, with `_read` as it would be if the hash came later."""
    bench.engine.path.write_bytes(b"another plan")
    monkeypatch.setattr(run, "_read", lambda engine: engine.path.read_bytes())
    refused(bench.open)
    assert bench.trt.deserialised == [b"another plan"]


def test_external_data_is_hashed_too(bench: Bench) -> None:
    data = bench.engine.path.with_name("engine.plan.data")
    data.write_bytes(b"weights")
    lines = "".join(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in (bench.engine.path, data)
    )
    bench.engine = replace(bench.engine, external_data=(data,), sha256=hashlib.sha256(lines.encode()).hexdigest())
    bench.open().close()
    assert bench.trt.gone == []  # nothing is refitted that has its weights
    data.write_bytes(b"other weights")
    assert "deserialising a plan runs native code" in refused(bench.open)


def stripped_bench(folder: Path, beside: Sequence[str] = ("model.onnx", "data/model.onnx.data"), **more: Any) -> Bench:
    """A plan without weights, and files beside it, of which the first is the ONNX file."""
    bench = linear_bench(folder, options={"strip": "on"}, stripped=b"model.onnx", **more)
    files = tuple(folder / name for name in beside)
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(file.name.encode())
    bench.engine = replace(bench.engine, external_data=files, sha256=sha256_of(bench.engine.path, files))
    return bench


def test_a_plan_without_weights_gets_them_from_the_onnx_file_beside_it(tmp_path: Path) -> None:
    bench = stripped_bench(tmp_path)
    runner = bench.open(contexts=2)
    assert bench.trt.gone == ["parser", "refitter"]
    np.testing.assert_array_equal(runner.run(points(4))["y"], points(4)["x"] @ WEIGHT)
    runner.close()
    assert bench.left() == {}


def test_planted_a_plan_without_weights_that_is_not_refitted_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = stripped_bench(tmp_path)
    monkeypatch.setattr(run, "_refit", lambda engine, plan, trt, log: None)
    with pytest.raises(Fault, match="a context for a plan without its weights"):
        bench.open()


def test_planted_a_parser_that_goes_too_early_is_caught(tmp_path: Path) -> None:
    bench = stripped_bench(tmp_path)
    log = contexts.Log(bench.trt)
    refitter = bench.trt.Refitter(bench.plan, log.logger)
    assert bench.trt.OnnxParserRefitter(refitter, log.logger).refit_from_file(str(tmp_path / "model.onnx"))
    with pytest.raises(Fault, match="weights of a parser that is gone"):
        refitter.refit_cuda_engine()


@pytest.mark.parametrize("name", ["model.onnx", "data/model.onnx.data"])
def test_a_missing_file_beside_the_plan_is_named(tmp_path: Path, name: str) -> None:
    bench = stripped_bench(tmp_path)
    (tmp_path / name).unlink()
    assert refused(bench.open) == (
        f"engine.plan: {name}, which belongs to it, cannot be read (No such file or directory); it was expected beside the "
        "plan. Build the engine again, or fetch the file again."
    )
    assert bench.trt.deserialised == []


def test_weights_that_changed_are_never_parsed(tmp_path: Path) -> None:
    bench = stripped_bench(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"another")
    assert "deserialising a plan runs native code" in refused(bench.open)
    assert bench.trt.deserialised == []


@pytest.mark.parametrize(("beside", "found"), [((), "nothing"), (("weights.bin",), "'weights.bin'")])
def test_a_plan_without_weights_needs_the_onnx_file(tmp_path: Path, beside: Sequence[str], found: str) -> None:
    bench = stripped_bench(tmp_path, beside)
    assert refused(bench.open) == (
        f"engine.plan: was built without weights, and beside it belongs {found}; the ONNX file that it was built from was "
        "expected. Build the engine again."
    )
    assert bench.left() == {}


REFIT = "engine.plan: was built without weights, and TensorRT {}; the ONNX file that it was built from was expected. "


@pytest.mark.parametrize(
    ("method", "doing", "words"),
    [
        (
            "Refitter",
            "makes no refitter for it",
            "Error Code 9: planted in Refitter; factory function returned nullptr",
        ),
        (
            "refit_from_file",
            "cannot take its weights from model.onnx",
            "Error Code 9: planted in refit_from_file",
        ),
        (
            "refit_cuda_engine",
            "cannot refit it with the weights of model.onnx",
            "Error Code 9: planted in refit_cuda_engine",
        ),
    ],
)
def test_where_tensorrt_does_not_refit_its_words_are_said(tmp_path: Path, method: str, doing: str, words: str) -> None:
    bench = stripped_bench(tmp_path)
    bench.plan.lies[method] = 0
    assert refused(bench.open) == REFIT.format(doing) + f"Build the engine again. Its own words: {words}"
    assert bench.left() == {}
    assert bench.trt.gone == ([] if method == "Refitter" else ["parser", "refitter"])


def test_what_was_said_while_the_plan_was_opened_is_no_reason_of_the_refitter_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = stripped_bench(tmp_path)
    deserialise = fake_cuda.FakeRuntime.deserialize_cuda_engine

    def chatty(runtime: fake_cuda.FakeRuntime, serialized_engine: bytes) -> FakeEngine | None:
        runtime._logger.log(fake_cuda.Severity.ERROR, "said before")
        return deserialise(runtime, serialized_engine)

    monkeypatch.setattr(fake_cuda.FakeRuntime, "deserialize_cuda_engine", chatty)
    bench.plan.lies["refit_from_file"] = 0
    assert refused(bench.open).endswith(" Its own words: Error Code 9: planted in refit_from_file")


def test_where_the_parser_refuses_the_weights_its_errors_are_said(tmp_path: Path) -> None:
    bench = stripped_bench(tmp_path)
    bench.plan._stripped = b"another model"
    assert refused(bench.open) == (
        REFIT.format("cannot take its weights from model.onnx")
        + "Build the engine again. Its own words: weights of 'w' have another count"
    )
    assert bench.left() == {}


def test_what_refitting_raises_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = stripped_bench(tmp_path)

    def broken(parser: object, model: str) -> bool:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(fake_cuda.FakeOnnxParserRefitter, "refit_from_file", broken)
    assert refused(bench.open) == (
        REFIT.format("cannot take its weights from model.onnx") + "Build the engine again. Its own words: no such thing"
    )
    assert bench.left() == {}
    assert sorted(bench.trt.gone) == ["parser", "refitter"]


def test_a_missing_plan_is_refused(bench: Bench) -> None:
    bench.engine.path.unlink()
    assert refused(bench.open) == (
        "engine.plan: cannot be read (No such file or directory); the plan that was built was expected. "
        "Build the engine again."
    )
    assert bench.trt.deserialised == []


@pytest.mark.parametrize(
    ("lines", "advice"),
    [
        (
            ("IRuntime::deserializeCudaEngine: Error Code 1: magicTag == kEXPECTED_MAGIC_TAG failed.",),
            "Build the engine with the tensorrt installed here (11.4.0), or install the one that built it.",
        ),
        (
            ("The engine plan file is generated on an incompatible device, expecting compute 8.6 got compute 8.9.",),
            "Build the engine on this GPU, or with hardware compatibility.",
        ),
        (
            ("cudaError 35: CUDA driver version is insufficient for CUDA runtime version",),
            "Install an NVIDIA driver that is new enough for this TensorRT.",
        ),
        (("cudaError 100: no CUDA-capable device is detected",), "Run it where an NVIDIA GPU can be seen."),
        (("Error Code 2: out of memory",), "End other programs on the GPU."),
        (("Something else",), "Build the engine again on this machine."),
        ((), "Build the engine again on this machine."),
    ],
)
def test_a_plan_that_tensorrt_refuses_ends_in_its_own_words(bench: Bench, lines: tuple[str, ...], advice: str) -> None:
    bench.trt.plans.clear()
    bench.trt.refusal = lines
    words = "; ".join(lines).removeprefix("IRuntime::deserializeCudaEngine: ") or "it gave no reason"
    message = refused(bench.open).replace("IRuntime::deserializeCudaEngine: ", "")
    assert message == (
        f"engine.plan: tensorrt cannot open it; a plan for this machine was expected. {advice} Its own words: {words}"
    )


def test_a_runtime_that_cannot_be_made_is_said(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(logger: object) -> None:
        raise TypeError("factory function returned nullptr")

    monkeypatch.setattr(bench.trt, "Runtime", none)
    assert refused(bench.open) == (
        "engine.plan: tensorrt cannot open it; a plan for this machine was expected. "
        "Build the engine again on this machine. Its own words: factory function returned nullptr"
    )


def test_weights_are_streamed_before_contexts_are_made(tmp_path: Path) -> None:
    bench = linear_bench(tmp_path, options={"weight_streaming_mib": "3"})
    bench.open().close()
    assert bench.plan.weight_streaming_budget_v2 == 3 << 20
    bench = linear_bench(tmp_path, options={"weight_streaming_mib": "-1"})
    assert refused(bench.open) == (
        "engine.plan: weights cannot be streamed with -1 MiB of them on the GPU; a budget that TensorRT takes was "
        "expected. Change weight_streaming_mib, or leave it out. Its own words: Error Code 3: budget is negative"
    )
    bench = linear_bench(tmp_path, options={"weight_streaming_mib": "many"})
    assert "cannot be streamed with many MiB" in refused(bench.open)
    bench = linear_bench(tmp_path)
    bench.open().close()
    assert bench.plan.weight_streaming_budget_v2 == 0


@pytest.mark.parametrize(("options", "allowed"), [({}, False), ({"version_compatible": "on"}, True)])
def test_host_code_runs_only_from_a_version_compatible_plan(
    tmp_path: Path, options: dict[str, str], allowed: bool
) -> None:
    bench = linear_bench(tmp_path, options=options)
    bench.open().close()
    assert [runtime.engine_host_code_allowed for runtime in bench.trt.runtimes] == [allowed]


def test_a_plan_that_is_another_is_refused(tmp_path: Path) -> None:
    def message(**changes: Any) -> str:
        bench = linear_bench(tmp_path)
        bench.engine = replace(bench.engine, **changes)
        found = refused(bench.open)
        assert bench.left() == {}
        return found

    assert message(inputs=(tensor("z", "batch", 3),)) == (
        "engine.plan: computes 'x' -> 'y'; 'z' -> 'y' was expected. Build the engine again."
    )
    assert message(outputs=(tensor("z", "batch", 3),)) == (
        "engine.plan: computes 'x' -> 'y'; 'x' -> 'z' was expected. Build the engine again."
    )
    assert message(inputs=(tensor("x", "batch", 3, dtype="float16"),)) == (
        "engine.plan: tensor 'x' is FLOAT; float16 was expected. Build the engine again."
    )
    assert message(profiles=({"batch": BATCH},) * 2) == (
        "engine.plan: has 1 optimisation profiles; 2 were expected. Build the engine again."
    )


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (
            "set_optimization_profile_async",
            "TensorRT refuses profile 1; a profile that it was built with was expected.",
        ),
        ("set_input_shape", "input 'x': TensorRT refuses the shape [4, 3]; one inside a profile was expected."),
        (
            "infer_shapes",
            "TensorRT cannot infer shapes (shapes do not fit); inputs whose shapes fit together was expected.",
        ),
    ],
)
def test_what_tensorrt_refuses_at_opening_is_said_and_nothing_is_left(bench: Bench, method: str, expected: str) -> None:
    bench.plan.lies[method] = 0
    assert refused(bench.open) == f"engine.plan: {expected} Its own words: Error Code 9: planted in {method}"


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("set_tensor_address", "tensor 'x': TensorRT refuses its memory; an address that it takes was expected."),
        ("execute_async_v3", "TensorRT cannot run it; a call that it runs was expected."),
    ],
)
def test_what_tensorrt_refuses_in_a_call_is_said_and_the_next_call_works(
    bench: Bench, method: str, expected: str
) -> None:
    runner = bench.open()
    bench.plan.lies[method] = 0
    words = f"engine.plan: {expected} Its own words: Error Code 9: planted in {method}"
    assert refused(lambda: runner.run(points(4))) == words
    np.testing.assert_array_equal(runner.run(points(4))["y"], points(4)["x"] @ WEIGHT)
    runner.close()


def test_a_refused_allocator_is_said(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [tensor("x", "n")], [tensor("y", "?")], positive, profiles=[{"n": BATCH}], late=["y"])
    runner = bench.open()
    bench.plan.lies["set_output_allocator"] = 0
    assert refused(lambda: runner.run({"x": np.ones(4, np.float32)})) == (
        "engine.plan: output 'y': TensorRT refuses an allocator; an output was expected. "
        "Its own words: Error Code 9: planted in set_output_allocator"
    )
    runner.close()
    assert bench.left() == {}


def test_no_context_is_said_and_nothing_is_left(bench: Bench) -> None:
    bench.plan.most_contexts = 1
    assert refused(lambda: bench.open(contexts=2)) == (
        "engine.plan: TensorRT makes no execution context; one more was expected. "
        "Its own words: Error Code 2: no memory for a context"
    )


def scenario(bench: Bench) -> None:
    """Something of everything, for failures to be planted in."""
    runner = bench.open(contexts=2)
    try:
        for rows in (4, 4, 4, 9):
            runner.run({"new": news(0, rows), "past": news(1, rows, 3)})
        list(runner.run_many([{"new": news(0, 4), "past": news(1, 4, 3)}] * 5))
        stepper = runner.stepper({"present": "past"})
        stepper.reset(nothing())
        for index in range(3):
            stepper.step({"new": news(index)})
        stepper.fetch("present")
        runner.time_device({"new": news(0), "past": news(1)}, 2)
    finally:
        runner.close()


def test_wherever_cuda_fails_nothing_is_left(tmp_path: Path) -> None:
    bench = growing(tmp_path)
    scenario(bench)
    counts = {name: bench.cuda.calls.count(name) for name in set(bench.cuda.calls)}
    assert bench.left() == {}
    # What frees cannot be told to fail and to free at once.
    kinds = [name for name in sorted(counts) if not name.startswith(("free", "destroy", "use"))]
    assert len(kinds) >= 15
    for name in kinds:
        for nth in sorted({*range(min(counts[name], 12)), counts[name] // 2, counts[name] - 1}):
            bench = growing(tmp_path)
            bench.cuda.failing[name] = nth
            with contextlib.suppress(BuildError):
                scenario(bench)
            assert name not in bench.cuda.failing, (name, nth)
            assert bench.left() == {}, (name, nth)


def test_too_little_memory_at_opening_leaves_nothing(tmp_path: Path) -> None:
    for room in (0, 1023, 1030, 1100, 1200, 2200):
        bench = linear_bench(tmp_path, device_bytes=room)
        assert refused(lambda bench=bench: bench.open(contexts=2)).startswith("planted: no room")  # type: ignore[misc]
        assert bench.left() == {}


def test_closing_frees_everything_once(bench: Bench) -> None:
    runner = bench.open(contexts=2)
    runner.run(points(4))
    runner.close()
    calls = len(bench.cuda.calls)
    runner.close()
    assert len(bench.cuda.calls) == calls
    for work in (
        lambda: runner.run(points(1)),
        lambda: runner.time(points(1), 1),
        lambda: runner.time_device(points(1), 1),
        lambda: next(runner.run_many([points(1)])),
        lambda: runner.stepper({}),
        lambda: runner.inspect(),
    ):
        assert refused(work) == "engine.plan: closed; an open model was expected. Open it again."


def test_what_tensorrt_made_goes_in_the_reverse_order(tmp_path: Path) -> None:
    """Even while the closed runner is still held: weights lie on the GPU until the plan is gone."""
    bench = linear_bench(tmp_path)
    runner = bench.open()
    runner.run(points(4))
    gone: list[str] = []
    weakref.finalize(bench.plan, gone.append, "plan")
    weakref.finalize(bench.trt.runtimes[0], gone.append, "runtime")
    assert runner._core.log is not None
    weakref.finalize(runner._core.log.logger, gone.append, "logger")
    for context in list(bench.plan._contexts):
        weakref.finalize(context, gone.append, "context")
    del context
    plan = bench.plan
    bench.trt.plans.clear()
    bench.trt.runtimes.clear()
    del bench.plan, plan
    runner.close()
    assert gone == ["context", "plan", "runtime"]
    del runner
    gc.collect()
    assert gone == ["context", "plan", "runtime", "logger"]


def test_planted_a_double_free_and_a_leak_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = memory.Slot.close
    bench = linear_bench(tmp_path)
    runner = bench.open()
    buffer = runner._lanes.all[0]._slots[0].memory["x"]
    bench.cuda.free(buffer.device)
    with pytest.raises(Fault, match="was freed"):
        runner.close()
    monkeypatch.setattr(memory.Slot, "close", lambda slot: None)
    bench = linear_bench(tmp_path)
    bench.open().close()
    assert bench.left() == {"device memory": 2, "pinned memory": 2}
    assert close is not memory.Slot.close


# --- the fake is strict ---------------------------------------------------------------------------------------------


def test_the_fake_sees_what_a_gpu_would_not_say() -> None:
    cuda = FakeCuda()
    with pytest.raises(Fault, match="no device was made current"):
        cuda.malloc(4)
    cuda.use()
    stream, device, pinned = cuda.create_stream(), cuda.malloc(16), cuda.malloc_host(16)
    with pytest.raises(Fault, match="not in pinned host memory"):
        cuda.copy_in(device, np.zeros(16, np.uint8).ctypes.data, 16, stream)
    with pytest.raises(Fault, match="not in pinned host memory"):
        cuda.copy_in(device, pinned.address, 17, stream)
    with pytest.raises(Fault, match="outside every allocation"):
        cuda.copy_in(device + 1, pinned.address, 16, stream)
    cuda.copy_in(device, pinned.address, 16, stream)
    with pytest.raises(Fault, match="with work on it"):
        cuda.destroy_stream(stream)
    cuda.begin_capture(stream)
    with pytest.raises(Fault, match="during a capture"):
        cuda.malloc(1)
    cuda.end_capture(stream)
    cuda.free(device)
    with pytest.raises(Fault, match="was freed"):
        cuda.free(device)
    with pytest.raises(Fault, match="was freed"):
        cuda.synchronize(stream)  # the copy comes to what is freed only now
    cuda.free_host(pinned)
    with pytest.raises(Fault, match="freed twice"):
        cuda.free_host(pinned)
    cuda.create_event()
    assert cuda.held() == {"streams": 1, "events": 1, "graphs": 1}


def test_the_fake_sees_a_read_of_what_nobody_wrote() -> None:
    cuda = FakeCuda()
    cuda.use()
    stream, device, pinned = cuda.create_stream(), cuda.malloc(16), cuda.malloc_host(16)
    cuda.copy_in(device, pinned.address, 15, stream)
    cuda.copy_out(pinned.address, device, 16, stream)
    with pytest.raises(Fault, match=r"read of 16 bytes at .*, some of which were never written"):
        cuda.synchronize(stream)
    with pytest.raises(Fault, match="never written"):
        cuda.synchronize(stream)


@pytest.mark.parametrize("seed", range(8))
def test_a_wait_is_for_what_was_recorded_before_it(seed: int) -> None:
    """As CUDA has it: what is put on the first stream later, or recorded again, is not waited for."""
    cuda = FakeCuda(seed)
    cuda.use()
    one, two, event = cuda.create_stream(), cuda.create_stream(), cuda.create_event()
    order: list[str] = []
    cuda.put(one, "first", lambda: order.append("first"))
    cuda.record(event, one)
    cuda.wait(two, event)
    cuda.put(one, "later", lambda: order.append("later"), lambda: "second" in order)
    cuda.record(event, one)
    cuda.put(two, "second", lambda: order.append("second"))
    cuda.synchronize(one)
    assert order == ["first", "second", "later"]


# --- the real thing, as far as it is here ---------------------------------------------------------------------------


def uses(modules: Sequence[types.ModuleType], owners: Sequence[str]) -> dict[str, set[str]]:
    """By owner (a variable or an attribute of that name), the attributes that the modules' text asks it for."""
    found: dict[str, set[str]] = {owner: set() for owner in owners}
    for node in (node for module in modules for node in ast.walk(ast.parse(inspect.getsource(module)))):
        if isinstance(node, ast.Attribute):
            value = node.value
            name = value.attr if isinstance(value, ast.Attribute) else value.id if isinstance(value, ast.Name) else ""
            if name.lstrip("_") in found:
                found[name.lstrip("_")].add(node.attr)
    return found


def test_every_call_to_tensorrt_exists() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="no TensorRT bindings here: scripts/rtx_builder.py installs them")
    owners = {
        "trt": trt,
        "plan": trt.ICudaEngine,
        "context": trt.IExecutionContext,
        "runtime": trt.Runtime,
        "inspector": trt.EngineInspector,
        "refitter": trt.Refitter,
        "parser": trt.OnnxParserRefitter,
        "TensorIOMode": trt.TensorIOMode,
        "TensorLocation": trt.TensorLocation,
        "ExecutionContextAllocationStrategy": trt.ExecutionContextAllocationStrategy,
        "LayerInformationFormat": trt.LayerInformationFormat,
    }
    used = uses([run, contexts, lanes, memory, stepper_module], list(owners))
    missing = {
        f"{owner}.{name}" for owner, names in used.items() for name in names if not hasattr(owners[owner], name)
    } - {"trt.__name__"}
    assert missing == set()
    assert {"create_execution_context", "num_io_tensors"} <= used["plan"]
    assert used["refitter"] == {"refit_cuda_engine"}
    assert used["parser"] == {"refit_from_file", "num_errors", "get_error"}
    assert {"execute_async_v3", "infer_shapes", "set_device_memory"} <= used["context"]
    assert set(contexts._DTYPES) <= set(trt.DataType.__members__)


def test_the_fake_has_nothing_that_tensorrt_lacks() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="no TensorRT bindings here: scripts/rtx_builder.py installs them")
    pairs = [
        (fake_cuda.FakeContext, trt.IExecutionContext),
        (fake_cuda.FakeRuntime, trt.Runtime),
        (fake_cuda.FakeInspector, trt.EngineInspector),
        (fake_cuda.FakeEngine, trt.ICudaEngine),
        (fake_cuda.FakeRefitter, trt.Refitter),
        (fake_cuda.FakeOnnxParserRefitter, trt.OnnxParserRefitter),
        (fake_cuda.FakeParserError, trt.ParserError),
    ]
    invented = {
        f"{fake.__name__}.{name}"
        for fake, real in pairs
        for name in vars(fake)
        if not name.startswith("_") and not hasattr(real, name)
    }
    assert invented == set()
    for fake, real in pairs:
        for name, method in vars(fake).items():
            if name.startswith("_") or isinstance(method, property):
                continue
            accepted = set(re.findall(r"(\w+): ", getattr(real, name).__doc__))
            assert set(inspect.signature(method).parameters) - {"self"} <= accepted, name
    for maker in ("Refitter", "OnnxParserRefitter"):
        accepted = set(re.findall(r"(\w+): ", getattr(trt, maker).__init__.__doc__))
        assert set(inspect.signature(getattr(FakeTrt, maker)).parameters) <= accepted, maker
    assert set(fake_cuda.DataType.__members__) <= set(trt.DataType.__members__)


def test_the_bindings_refuse_a_plan_in_our_words(tmp_path: Path) -> None:
    """The real runtime, without a GPU: a plan that is none, and what it says of it."""
    trt = pytest.importorskip("tensorrt_rtx", reason="no TensorRT bindings here: scripts/rtx_builder.py installs them")
    bench = linear_bench(tmp_path)
    message = refused(lambda: open_plan(bench.engine, trt, cuda=bench.cuda))
    assert message.startswith(f"engine.plan: {trt.__name__} cannot open it; a plan for this machine was expected. ")
    assert "Its own words: " in message


RUNTIME_USES = {name for name in uses([cuda_module], ["runtime"])["runtime"] if name.startswith("cuda")} | set(
    re.findall(r'_call\("(\w+)"', inspect.getsource(cuda_module))
)


def test_every_call_to_cuda_exists() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    assert len(RUNTIME_USES) > 25
    assert {name for name in RUNTIME_USES if not hasattr(runtime, name)} == set()
    codes = {code.name for code in runtime.cudaError_t}
    assert {*cuda_module._NO_DRIVER, *cuda_module._NO_GPU, *cuda_module._LOST} <= codes


class Code(int):
    name: str


def code(number: int, name: str) -> Code:
    made = Code(number)
    made.name = name
    return made


class Runtime(types.ModuleType):
    """Stands for ``cuda.bindings.runtime``: notes calls, answers with what is set."""

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.seen: list[tuple[Any, ...]] = []
        self.answers: dict[str, tuple[Any, ...]] = {}
        self.cudaMemcpyKind = types.SimpleNamespace(
            cudaMemcpyHostToDevice="in", cudaMemcpyDeviceToHost="out", cudaMemcpyDeviceToDevice="within"
        )
        self.cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread")
        self.cudaStreamNonBlocking, self.cudaEventDisableTiming, self.cudaEventDefault = 1, 2, 0
        self.cudaHostAllocDefault, self.cudaEventWaitDefault = 0, 0

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.seen.append((name, *arguments))
            return self.answers.get(name, (code(0, "cudaSuccess"), 7))

        return call


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    bindings = types.ModuleType("cuda.bindings")
    bindings.runtime = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", made)
    return made


def test_what_cuda_is_asked(runtime: Runtime) -> None:
    cuda = cuda_module.Cuda("engine.plan")
    assert cuda.malloc(0) == 7
    cuda.free(7)
    cuda.copy_in(1, 2, 3, 4)
    cuda.copy_out(1, 2, 3, 4)
    cuda.copy_within(1, 2, 3, 4)
    cuda.fill(1, 0, 3, 4)
    cuda.create_stream()
    cuda.create_event()
    cuda.create_event(timing=True)
    cuda.record(1, 2)
    cuda.wait(1, 2)
    cuda.begin_capture(3)
    cuda.instantiate(cuda.end_capture(3))
    cuda.launch(1, 2)
    assert runtime.seen == [
        ("cudaGetDevice",),
        ("cudaSetDevice", 7),
        ("cudaMalloc", 1),
        ("cudaFree", 7),
        ("cudaMemcpyAsync", 1, 2, 3, "in", 4),
        ("cudaMemcpyAsync", 1, 2, 3, "out", 4),
        ("cudaMemcpyAsync", 1, 2, 3, "within", 4),
        ("cudaMemsetAsync", 1, 0, 3, 4),
        ("cudaStreamCreateWithFlags", 1),
        ("cudaEventCreateWithFlags", 2),
        ("cudaEventCreateWithFlags", 0),
        ("cudaEventRecord", 1, 2),
        ("cudaStreamWaitEvent", 1, 2, 0),
        ("cudaStreamBeginCapture", 3, "thread"),
        ("cudaStreamEndCapture", 3),
        ("cudaGraphInstantiate", 7, 0),
        ("cudaGraphLaunch", 1, 2),
    ]


def test_pinned_memory_is_seen_as_bytes(runtime: Runtime) -> None:
    under = np.arange(16, dtype=np.uint8)
    cuda = cuda_module.Cuda("engine.plan")
    runtime.answers["cudaHostAlloc"] = (code(0, "cudaSuccess"), under.ctypes.data)
    memory = cuda.malloc_host(16)
    assert memory.address == under.ctypes.data
    memory.view[3] = 99
    assert under[3] == 99
    cuda.free_host(memory)
    assert runtime.seen[-2:] == [("cudaHostAlloc", 16, 0), ("cudaFreeHost", under.ctypes.data)]


def test_a_lack_of_memory_says_how_much(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = cuda_module.Cuda("engine.plan")
    no_room = (code(2, "cudaErrorMemoryAllocation"), None)
    runtime.answers.update(cudaMalloc=no_room, cudaHostAlloc=no_room)
    runtime.answers["cudaMemGetInfo"] = (code(0, "cudaSuccess"), 1000, 80_000_000)
    assert refused(lambda: cuda.malloc(5_000_000)) == (
        "engine.plan: the GPU cannot give 5,000,000 bytes (1,000 of 80,000,000 are free); that much was expected. "
        "Open fewer contexts, end other programs on the GPU, or build with smaller profiles."
    )
    assert ("cudaGetLastError",) in runtime.seen
    runtime.answers["cudaMemGetInfo"] = (code(1, "cudaErrorUnknown"), None, None)
    assert refused(lambda: cuda.malloc(5)) == (
        "engine.plan: the GPU cannot give 5 bytes; that much was expected. "
        "Open fewer contexts, end other programs on the GPU, or build with smaller profiles."
    )
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 3, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert refused(lambda: cuda.malloc_host(5_000_000)) == (
        "engine.plan: this machine cannot lock 5,000,000 bytes of host memory (12,288 free); that much was expected. "
        "Open fewer contexts, end other programs, or build with smaller profiles."
    )


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("cudaErrorInsufficientDriver", "Install an NVIDIA driver at least as new as the CUDA bindings."),
        (
            "cudaErrorNoDevice",
            "Run it where an NVIDIA GPU can be seen (nvidia-smi lists it, CUDA_VISIBLE_DEVICES does not hide it).",
        ),
        (
            "cudaErrorIllegalAddress",
            "The GPU's state is lost: start the program again, and if it comes back, build the engine on this machine.",
        ),
        ("cudaErrorInvalidValue", "Run it again, and if it comes back, build the engine on this machine."),
    ],
)
def test_any_other_code_is_named_and_explained(runtime: Runtime, error: str, advice: str) -> None:
    cuda = cuda_module.Cuda("engine.plan")
    runtime.answers["cudaStreamSynchronize"] = (code(1, error),)
    runtime.answers["cudaGetErrorString"] = (code(0, "cudaSuccess"), b"its text")
    assert refused(lambda: cuda.synchronize(1)) == (
        f"engine.plan: CUDA's cudaStreamSynchronize gave {error} (its text); success was expected. {advice}"
    )


def test_every_method_checks_its_code(runtime: Runtime) -> None:
    cuda = cuda_module.Cuda("engine.plan")
    pinned = cuda_module.Pinned(1, np.zeros(1, np.uint8))
    for name, method in inspect.getmembers(cuda, inspect.ismethod):
        if name.startswith("_"):
            continue
        count = len(inspect.signature(method).parameters) - (name == "create_event")
        arguments = [pinned] if name == "free_host" else [1] * count
        runtime.answers.clear()
        runtime.seen.clear()
        if name == "malloc_host":
            runtime.answers["cudaHostAlloc"] = (code(0, "cudaSuccess"), pinned.view.ctypes.data)
        method(*arguments)
        assert len(runtime.seen) == 1
        runtime.answers[runtime.seen[0][0]] = (code(1, "cudaErrorInvalidValue"), None)
        runtime.answers["cudaGetErrorString"] = (code(0, "cudaSuccess"), b"its text")
        with pytest.raises(BuildError, match=f"CUDA's {runtime.seen[0][0]} gave cudaErrorInvalidValue"):
            method(*arguments)


def test_missing_bindings_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.delitem(sys.modules, "cuda.bindings", raising=False)
    message = refused(lambda: cuda_module.Cuda("engine.plan"))
    assert message.startswith("engine.plan: CUDA's Python bindings cannot be loaded (")
    assert message.endswith("); they were expected. Install cuda-bindings.")


def test_importing_the_runner_loads_nothing_heavy() -> None:
    listing = "import sys, compiler.backends.tensorrt.run; print(*sorted({n.split('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "onnx", "onnx_ir", "onnxruntime", "cuda", "tensorrt", "tensorrt_rtx", "polygraphy"}
