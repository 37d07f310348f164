"""What is timed, and how it is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from compiler.errors import ArtifactError, BuildError
from compiler.spec import Engine
from scripts.gpu import candidates, children, recipes
from tests.gpu.fakes import ENGINE, FEEDS, FakeCuda, FakeTorch, Graph, Tiny


class TestTorchRunner:
    def test_host_arrays_go_in_and_come_out(self, on_cpu: FakeTorch) -> None:
        model = Tiny()
        runner = candidates.TorchRunner(on_cpu, candidates.typed(on_cpu, model, "fp32"), FEEDS, ["y"], "fp32", False)
        other = {"x": 3 * FEEDS["x"]}
        with torch.no_grad():
            expected = model(torch.from_numpy(other["x"]))[0].numpy()
        assert np.allclose(runner.run(other)["y"], expected)
        assert len(runner.time(FEEDS, 3)) == 3
        assert runner.time_device(FEEDS, 3) == [pytest.approx(0.002)] * 3

    def test_a_graph_is_captured_once_and_replayed(self, on_cpu: FakeTorch) -> None:
        calls: list[bool] = []

        def call(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            calls.append(FakeCuda.capturing)
            return (x + 1,)

        runner = candidates.TorchRunner(on_cpu, call, FEEDS, ["y"], "fp32", True)
        assert calls == [False, False, False, True]
        Graph.replays = 0
        assert np.array_equal(runner.run(FEEDS)["y"], FEEDS["x"] + 1)
        runner.time(FEEDS, 2)
        runner.time_device(FEEDS, 4)
        assert (len(calls), Graph.replays) == (4, 1 + 2 + 3 + 4)

    def test_half_precision_stays_inside(self, on_cpu: FakeTorch) -> None:
        inside: list[Any] = []

        def model(x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
            inside.extend([x.dtype, ids.dtype])
            return (x, ids)

        outputs = candidates.typed(on_cpu, model, "bf16")(torch.ones(2), torch.ones(2, dtype=torch.int64))
        assert inside == [torch.bfloat16, torch.int64]
        assert [out.dtype for out in outputs] == [torch.float32, torch.int64]

    def test_each_candidate_switches_tf32_before_its_calls(self, on_cpu: FakeTorch) -> None:
        runners = {
            name: candidates.TorchRunner(on_cpu, candidates.typed(on_cpu, Tiny(), name), FEEDS, ["y"], name, False)
            for name in ("fp32", "tf32")
        }
        on_cpu.precisions.clear()
        for name in ("tf32", "fp32", "tf32"):
            runners[name].time_device(FEEDS, 1)
            runners[name].time(FEEDS, 1)
        assert on_cpu.precisions == ["high"] * 2 + ["highest"] * 2 + ["high"] * 2


class TestTorchCandidates:
    WORK: ClassVar = {"float_elements": 100, "io_bytes": 7}

    def made(self, on_cpu: FakeTorch, how: str, left_s: float = 60.0) -> list[dict[str, Any]]:
        models: dict[str, Any] = {"fp32": Tiny()}
        deadline = children.Deadline(left_s)
        made = list(candidates.torch_candidates(how, on_cpu, models, FEEDS, ["y"], self.WORK, deadline))
        assert {name: model.head.weight.dtype for name, model in models.items()} == {"fp32": torch.float32} | (
            {"fp16": torch.float16, "bf16": torch.bfloat16} if left_s or how == "eager" else {}
        )
        assert [runner is None for _, runner in made] == ["missing" in entry for entry, _ in made]
        return [entry for entry, _ in made]

    def test_every_precision_is_made_with_and_without_a_graph_from_a_model_of_its_own(self, on_cpu: FakeTorch) -> None:
        eager, compiled = self.made(on_cpu, "eager"), self.made(on_cpu, "compile")
        assert [entry["candidate"] for entry in eager][:5] == [
            *("eager", "eager fp32, CUDA graph", "eager tf32", "eager tf32, CUDA graph", "eager fp16")
        ]
        assert [(entry["candidate"], entry["precision"], entry["graph"]) for entry in compiled][-2:] == [
            ("compile bf16", "bf16", False),
            ("compile bf16, CUDA graph", "bf16", True),
        ]
        assert [entry["how"] for entry in (*eager, *compiled)] == ["eager"] * 8 + ["compile"] * 8
        assert not any("missing" in entry for entry in (*eager, *compiled))
        assert on_cpu.compiled == 4
        assert [entry["bytes"] for entry in eager] == [407] * 4 + [207] * 4

    def test_what_does_not_compile_or_has_no_time_left_is_named(self, on_cpu: FakeTorch) -> None:
        on_cpu.refusal = "no compiler"
        assert [entry["missing"] for entry in self.made(on_cpu, "compile")] == ["RuntimeError: no compiler"] * 8
        too_late = ["no time was left to compile it"] * 8
        assert [entry["missing"] for entry in self.made(on_cpu, "compile", 0.0)] == too_late
        assert not any("missing" in entry for entry in self.made(on_cpu, "eager", 0.0))


class TestEngines:
    def test_engines_are_opened_by_their_back_end_and_their_weights_are_known_best_from_the_proof(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def open_engine(engine: Engine, *, threads: int) -> Any:
            if engine.name == "broken":
                raise BuildError("engine.plan: refused.")
            return "runner"

        monkeypatch.setattr("compiler.backends.get", lambda name: SimpleNamespace(open=open_engine))
        proof: Any = SimpleNamespace(weight_bytes=300, expected_weight_bytes=None)
        engines = [ENGINE, replace(ENGINE, name="proven", proof=proof), replace(ENGINE, name="broken")]
        engines.append(replace(ENGINE, name="cpu", backend="onnxruntime", options={"provider": "CPUExecutionProvider"}))
        made = list(candidates.engine_candidates([SimpleNamespace(engines=engines)], {"io_bytes": 50}))
        assert [(entry["candidate"], entry["bytes"], runner, entry.get("missing")) for entry, runner in made] == [
            ("int8", 1050, "runner", None),
            ("proven", 350, "runner", None),
            ("broken", 1050, None, "engine.plan: refused."),
            ("cpu", 1050, "runner", None),
        ]
        assert [entry["how"] for entry, _ in made] == ["tensorrt"] * 3 + ["onnxruntime, CPUExecutionProvider"]
        assert [entry["sha256"] for entry, _ in made] == ["sha-of-int8"] * 4
        assert made[0][0]["notes"] == ["bytes: the size of its file stands for its weights"]
        assert made[1][0]["notes"] == []

    def test_only_undamaged_artifacts_of_the_recipe_are_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def verify(folder: Path) -> Any:
            if folder.name == "damaged":
                raise ArtifactError("damaged: not what was built.")
            return SimpleNamespace(name=folder.name, engines=[ENGINE])

        monkeypatch.setattr("compiler.artifact.verify", verify)
        entry: dict[str, Any] = {}
        assert [one.name for one in recipes.manifests_of("digits", ["dist/minilm", "dist/digits"], entry)] == ["digits"]
        assert entry["engines"] == {"int8": "sha-of-int8"}
        assert recipes.manifests_of("digits", ["dist/minilm"], entry) == []
        assert entry["engines"] == {"missing": "no artifact of this recipe was given (--artifact)"}
        assert recipes.manifests_of("digits", ["damaged"], entry) == []
        assert entry["engines"] == {"missing": "damaged: not what was built."}
