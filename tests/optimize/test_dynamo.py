"""What torch's exporter writes before it optimises: the parameters of BatchNormalization hide behind Expand and CastLike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from compiler.optimize import PASSES
from compiler.optimize.driver import limit_bytes_for, run_passes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_conv_and_batch_norm_of_a_raw_export_are_folded(tmp_path: Path) -> None:
    """Two Convs with BatchNormalization, a residual and a Gemm come down to 2 Conv, 2 Relu, Add, ReduceMean, Gemm."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Conv2d(c, 8, 3, padding=1, bias=False) for c in (3, 8))
            self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
            self.last = nn.Linear(8, 5)
            for number in (v for norm in self.norms for v in norm.state_dict().values() if v.is_floating_point()):
                number.uniform_(0.5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = torch.relu(self.norms[0](self.one(x)))
            result: torch.Tensor = self.last(torch.relu(a + self.norms[1](self.two(a))).mean((2, 3)))
            return result

    torch.manual_seed(0)
    network, x = Network().eval(), torch.randn(2, 3, 6, 6)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.onnx.export(
        network, (x,), dynamo=True, optimize=False, opset_version=20, dynamic_shapes=({0: batch},), verbose=False
    )
    assert program is not None
    program.save(str(tmp_path / "raw.onnx"))
    model = ir.load(tmp_path / "raw.onnx")
    assert len(model.graph) > 20
    run_passes(PASSES, model, limit_bytes_for(model))
    assert sorted(node.op_type for node in model.graph) == [
        "Add", "Conv", "Conv", "Gemm", "ReduceMean", "Relu", "Relu"
    ]  # fmt: skip
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    with torch.no_grad():
        expected = network(x).numpy()
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-4, atol=1e-5)
