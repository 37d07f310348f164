"""Whether engines of TensorRT run here, as told by libraries that are made up."""

from __future__ import annotations

import json
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from scripts.gpu import cuda, missing, rtx
from tests.gpu.fakes import FakeRuntime


class TestTinyModel:
    def test_it_is_valid_onnx_and_computes_what_numpy_does(self) -> None:
        model = onnx.load_from_string(rtx.tiny_model())
        onnx.checker.check_model(model, full_check=True)
        x, expected = rtx.tiny_answer()
        session = onnxruntime.InferenceSession(rtx.tiny_model(), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"x": x})
        assert np.array_equal(found, expected)
        assert 0.2 < float((expected > 0).mean()) < 0.8


class FakeTrt(ModuleType):
    """A TensorRT that logs, and fails where it is told to."""

    __version__ = "1.7.1"

    class ILogger:
        def __init__(self) -> None:
            pass

    def __init__(self, fails: str = "", memory: Any = None) -> None:
        super().__init__("fake")
        outer, self.memory = self, memory

        def told(logger: Any, severity: str, text: str) -> None:
            logger.log(SimpleNamespace(name=severity), text)

        class Builder:
            def __init__(self, logger: Any) -> None:
                told(logger, "VERBOSE", "thousands of lines while building")
                told(logger, "WARNING", "careful")

            create_network = staticmethod(lambda flags: "network")
            create_builder_config = staticmethod(lambda: "config")
            build_serialized_network = staticmethod(lambda network, config: None if fails == "build" else b"plan")

        class Parser:
            num_errors = 2

            def __init__(self, network: Any, logger: Any) -> None: ...

            parse = staticmethod(lambda data: fails != "parse")
            get_error = staticmethod(lambda index: f"error {index}")

        class Context:
            def set_tensor_address(self, name: str, address: int) -> bool:
                return fails != "address"

            def execute_async_v3(self, stream: int) -> bool:
                if fails == "run":
                    return False
                x, y = outer.memory.values
                weights = np.array(rtx.WEIGHTS, np.float32).reshape(16, 16)
                y[:] = np.maximum(x @ weights, 0) + (0.5 if fails == "compare" else 0)
                return True

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, plan: bytes) -> Any:
                told(self.logger, "VERBOSE", "Skipping the engine compute capability check")
                if fails == "crash":
                    raise SystemExit("stands for a crash")
                if fails == "load":
                    told(self.logger, "ERROR", "this plan is for sm_89")
                    return None
                return SimpleNamespace(create_execution_context=Context)

        self.Builder, self.OnnxParser, self.Runtime = Builder, Parser, Runtime


class FakeMemory:
    stream = 0

    def __init__(self) -> None:
        self.values: list[Any] = []

    def upload(self, value: Any) -> int:
        self.values.append(value.copy())
        return len(self.values) - 1

    def download(self, pointer: int) -> Any:
        return self.values[pointer]


class TestFlavours:
    def tried(self, fails: str = "") -> dict[str, Any]:
        memory = FakeMemory()
        seen: list[str] = []
        rtx.try_flavour(
            "tensorrt_rtx",
            lambda found: seen.append(json.dumps(found)),
            load=lambda name: FakeTrt(fails, memory),
            memory=lambda: memory,
        )
        found: dict[str, Any] = json.loads(seen[-1])
        return found

    def test_an_engine_that_works_says_so(self) -> None:
        found = self.tried()
        assert [step["step"] for step in found["steps"]] == [
            *("import", "build", "open the runtime", "load", "make a context", "take device memory", "run", "compare")
        ]
        assert (found["worked"], found["max_abs_diff"], found["plan_bytes"]) == (True, 0.0, 4)
        assert rtx.answer({"tensorrt_rtx": found}) == (
            "tensorrt_rtx 1.7.1: yes: an engine of 4 bytes was built, loaded and run, and differs from numpy by 0"
        )

    @pytest.mark.parametrize(
        ("fails", "why"),
        [
            ("parse", "build: the parser refused the model: error 0; error 1"),
            ("build", "build: build_serialized_network() returned nothing"),
            ("load", "load: deserialize_cuda_engine() returned nothing; this plan is for sm_89"),
            ("address", "run: set_tensor_address('x') returned False"),
            ("run", "run: execute_async_v3() returned False"),
            ("compare", "compare: the outputs differ from numpy's by 0.5; at most 1e-05 was expected"),
        ],
    )
    def test_the_first_step_that_fails_is_the_answer(self, fails: str, why: str) -> None:
        found = self.tried(fails)
        assert (found["worked"], found["missing"]) == (False, why)
        assert rtx.answer({"tensorrt_rtx": found}) == f"tensorrt_rtx 1.7.1: no: {why}"

    def test_the_library_s_lines_are_kept_word_by_word_the_verbose_ones_from_loading_on(self) -> None:
        assert self.tried("load")["log"] == [
            {"severity": "WARNING", "text": "careful"},
            {"severity": "VERBOSE", "text": "Skipping the engine compute capability check"},
            {"severity": "ERROR", "text": "this plan is for sm_89"},
        ]

    def test_a_step_that_ends_the_process_leaves_its_name(self) -> None:
        seen: list[str] = []
        with pytest.raises(SystemExit):
            rtx.try_flavour(
                "tensorrt", lambda found: seen.append(json.dumps(found)), load=lambda name: FakeTrt("crash")
            )
        assert json.loads(seen[-1])["steps"][-1] == {"step": "load", "error": "it ended the process"}

    def test_a_library_that_is_not_there_is_named(self) -> None:
        found: dict[str, Any] = {}
        rtx.try_flavour("no_such_tensorrt", found.update)
        assert found["missing"] == "import: ModuleNotFoundError: No module named 'no_such_tensorrt'"
        assert rtx.answer({"x": {}, "y": found}) == f"x: no: it was not tried\ny: no: {found['missing']}"


class TestMemory:
    def test_what_goes_up_comes_down(self) -> None:
        memory = cuda.Memory(FakeRuntime())
        value = np.arange(6, dtype=np.float32).reshape(2, 3)
        assert np.array_equal(memory.download(memory.upload(value)), value)
        assert memory.stream == 7

    def test_a_failure_is_told_in_the_runtime_s_words(self) -> None:
        with pytest.raises(missing.MissingError) as refused:
            cuda.Memory(FakeRuntime("cudaMalloc")).upload(np.zeros(1))
        assert str(refused.value) == "cudaMalloc: driver is too old (35)"
