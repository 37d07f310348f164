"""A workshop: a folder with a small model file and its recipe, a store of its own, and the command to run there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def denormal_numbers() -> None:
    """ONNX Runtime's first session in a process decides whether the thread that opens it knows denormal numbers from then on.
    An engine is opened without; tests of every float must not depend on which test comes first."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g", [value], [helper.make_tensor_value_info("y", 1, [1])]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.finfo(np.float64).smallest_subnormal > 0


MODEL = '''\
"""A two-layer classifier of points; its labels are what the original says, so the original is always right."""

import numpy as np
import torch
from torch import nn

from compiler.metrics import top1

WEIGHTS = np.random.default_rng(7)
FIRST = WEIGHTS.normal(size=(32, 16)).astype(np.float32) * 0.3
SECOND = WEIGHTS.normal(size=(10, 32)).astype(np.float32) * 0.3


class Points(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 10)
        with torch.no_grad():
            self.first.weight.copy_(torch.from_numpy(FIRST))
            self.second.weight.copy_(torch.from_numpy(SECOND))
            self.first.bias.zero_()
            self.second.bias.zero_()

    def forward(self, x):
        return {"logits": self.second(torch.relu(self.first(x)))}


def build():
    return Points()


def points(seed, count):
    return np.random.default_rng(seed).normal(size=(count, 16)).astype(np.float32)


def calibration():
    yield {"x": points(1, 64)}


def validation():
    x = points(2, 600)
    labels = (np.maximum(x @ FIRST.T, 0) @ SECOND.T).argmax(1)
    yield {"x": x}, labels


metrics = {"top1": top1}
'''

RECIPE = """\
name = "points"

[model]
source = "points.py"

[model.inputs.x]
shape = ["batch", 16]

[axes]
batch = { min = 1, opt = 8, max = 64 }

[[engines]]
precision = "fp32"

[[engines]]
precision = "int8"

[latency]
batches = [1]
blocks = 5
block_ms = 5.0
compile = false

[[gates]]
metric = "top1"
max_drop = 0.1
"""


@dataclass
class Workshop:
    """A folder in which a user works."""

    folder: Path
    store: Path

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def run(self, *args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """``build-engine`` with these arguments, started in the folder as a user would start it."""
        return subprocess.run(
            [sys.executable, "-m", "compiler.cli", *args],
            cwd=self.folder,
            env={**os.environ, "BUILD_ENGINE_CACHE": str(self.store), "COLUMNS": "200", **(env or {})},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def report(self, folder: str = "dist/points") -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / folder / "report.json").read_bytes())
        return content


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One store for the tests of a worker: what one has exported, the next finds."""
    yield tmp_path_factory.mktemp("store")


@pytest.fixture
def workshop(tmp_path: Path, shared_store: Path) -> Workshop:
    """A folder with ``points.py`` and ``points.toml`` in it."""
    folder = tmp_path / "user's folder"
    folder.mkdir()
    made = Workshop(folder=folder, store=shared_store)
    made.write("points.py", MODEL)
    made.write("points.toml", RECIPE)
    return made


@pytest.fixture
def change(workshop: Workshop) -> Callable[[str, str, str], None]:
    """Replace text in a file of the workshop; the text must be there."""

    def replace(name: str, old: str, new: str) -> None:
        path = workshop.folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return replace
