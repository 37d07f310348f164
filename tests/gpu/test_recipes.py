"""A recipe, measured with PyTorch on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from compiler.spec import TensorSpec
from scripts.gpu import batches, candidates, missing, recipes, work
from tests.gpu.fakes import ENGINE, FakeTorch, graph_of


@pytest.mark.usefixtures("quick")
class TestRecipe:
    def measured(self, recipe: Path, **job: Any) -> dict[str, Any]:
        found: list[str] = []
        job = {"recipe": str(recipe), "artifacts": [], "energy": False, "limit_s": 3600, **job}
        recipes.part(job, lambda value: found.append(json.dumps(value)))
        last: dict[str, Any] = json.loads(found[-1])
        return last

    def test_every_batch_of_the_recipe_is_measured_in_every_form(
        self, line: Path, on_cpu: FakeTorch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(candidates, "PRECISIONS", ("fp32", "bf16"))
        monkeypatch.setattr(batches, "BLOCK_MS", 0.5)
        engine = candidates.described("int8", "tensorrt", "int8")
        monkeypatch.setattr(
            recipes, "engine_candidates", lambda manifests, work: [(engine | {"missing": "no GPU"}, None)]
        )
        found = self.measured(line)
        assert (found["name"], [batch["batch"] for batch in found["batches"]]) == ("line", [1, 5])
        for batch in found["batches"]:
            # What is quick to make comes first.
            assert [one["how"] for one in batch["candidates"]] == ["eager"] * 4 + ["tensorrt"] + ["compile"] * 4
            assert batch["candidates"].pop(4)["missing"] == "no GPU"
            assert [candidate.get("missing") for candidate in batch["candidates"]] == [None] * 8
            assert all(candidate["host"]["median_ms"] > 0 for candidate in batch["candidates"])
            assert batch["work"]["flops"] == 2 * batch["batch"] * 4 * 3
            assert min(c["difference"]["cosine"] for c in batch["candidates"][1:]) > 0.999
        assert found["engines"] == {"missing": "no artifact of this recipe was given (--artifact)"}

    def test_feeds_repeat_real_samples(self) -> None:
        inputs = (
            TensorSpec(name="a", dtype="float32", shape=("batch", 2)),
            TensorSpec(name="b", dtype="float32", shape=(3,)),
        )
        samples = [{"a": np.full((1, 2), float(n), np.float32), "b": np.zeros(3, np.float32)} for n in range(2)]
        feeds = recipes.feeds_at(SimpleNamespace(inputs=inputs), samples, 3)
        assert feeds["a"].tolist() == [[0, 0], [1, 1], [0, 0]]
        assert feeds["b"].shape == (3,)
        assert feeds["a"].flags.writeable and feeds["a"].flags.c_contiguous

    def test_a_model_that_fails_is_named_in_each_of_its_parts(self, line: Path, on_cpu: FakeTorch) -> None:
        line.with_name("line.py").write_text("def build():\n    raise ValueError('no weights')\n")
        found = self.measured(line)
        reasons = {found[part]["missing"] for part in ("latency", "energy", "roofline")}
        assert len(reasons) == 1
        assert reasons.pop().endswith(
            "build() raised ValueError: no weights. Fix the file; the full traceback is in the log."
        )

    def test_packages_that_lack_are_named_together(self, line: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recipes, "NEEDED", ("numpy", "no_such_package", "nor_this"))
        why = "not installed, and needed for a recipe: no_such_package, nor_this"
        assert self.measured(line)["latency"] == {"missing": why}

    def test_an_onnx_file_has_no_original_to_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("compiler.original.open_original", lambda *a, **k: SimpleNamespace(outputs=()))
        with pytest.raises(missing.MissingError) as refused:
            recipes.original_of(None, None)
        assert str(refused.value) == "an ONNX source has no PyTorch original to time"

    def test_flops_come_from_an_onnx_engine_where_there_is_one(self, tmp_path: Path) -> None:
        path = tmp_path / "engine.onnx"
        onnx.save(graph_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ["batch", 4]}, {"w": [4, 3]}), path)
        recipe = SimpleNamespace(inputs=ENGINE.inputs, axes=ENGINE.axes)
        manifest = SimpleNamespace(engines=[ENGINE, replace(ENGINE, name="fp32", path=path)])
        assert work.of_onnx(recipe, [manifest], 7) == {
            "flops_source": "ONNX shapes of engine fp32",
            "flops": 2 * 7 * 4 * 3,
            "by_op": {"MatMul": 168},
            "uncounted": {},
        }
        assert work.of_onnx(recipe, [SimpleNamespace(engines=[ENGINE])], 7) == {}
