"""What several of these tests start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compiler.validate import latency
from scripts.gpu import batches, machine
from tests.gpu.fakes import FakeTorch

MODEL = """\
import numpy as np
import torch


def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3))


def calibration():
    yield {"input": np.arange(12, dtype=np.float32).reshape(3, 4)}
"""


RECIPE = """\
name = "line"
[model]
source = "line.py"
outputs = ["y"]
[model.inputs.input]
shape = ["batch", 4]
[axes]
batch = { min = 1, opt = 5, max = 8 }
[latency]
batches = [1, 5]
"""


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTorch]:
    fake = FakeTorch()
    monkeypatch.setattr(machine, "DEVICE", "cpu")
    monkeypatch.setattr(machine, "cuda_torch", lambda: fake)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    yield fake
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule of five blocks that hardly warms up."""
    monkeypatch.setattr(latency, "WARM_S", 0.0)
    monkeypatch.setattr(latency, "WARM_LIMIT_S", 0.0)
    monkeypatch.setattr(batches, "BLOCKS", 5)
    monkeypatch.setattr(batches, "BLOCK_MS", 10.0)


@pytest.fixture
def line(tmp_path: Path) -> Path:
    (tmp_path / "line.py").write_text(MODEL)
    path = tmp_path / "line.toml"
    path.write_text(RECIPE)
    return path
