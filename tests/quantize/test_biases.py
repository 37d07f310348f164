"""The correction of biases, against means known by hand and on samples that it did not see."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compiler.backends.onnxruntime import open_model
from compiler.quantize import biases, graphs
from compiler.spec import Array, Dim, OnnxModel
from tests.quantize import networks
from tests.quantize.bench import NONE, Bench, graph
from tests.quantize.networks import Net, f32

W = f32([[[[1.0]], [[0.3]]]])
"""One output, two inputs; in steps of 1/127 the second is 38.1 and becomes 38."""

ERROR_OF_W = 38 / 127 - 0.3


def pointwise(bias: Array | None) -> onnx.ModelProto:
    net = Net()
    inputs = ["x", net.weight("w", W)]
    if bias is not None:
        inputs.append(net.weight("b", bias))
    net.op("Conv", inputs, "y")
    return net.model({"x": ["batch", 2, 4, 4]}, {"y": ["batch", 1, 4, 4]})


def whole_numbers(means: Sequence[float], seed: int = 0) -> list[dict[str, Array]]:
    """Samples whose values INT8 holds exactly, their second channel of these means, nearly; the largest is 127."""
    random = np.random.default_rng(seed)
    samples = []
    for mean in means:
        x = np.rint(random.normal(f32([[0], [mean]]), 5, size=(1, 2, 16))).clip(-127, 127).reshape(1, 2, 4, 4)
        x[0, 0, 0, 0] = 127
        samples.append({"x": x.astype(np.float32)})
    return samples


def bias_of(model: OnnxModel, node: str) -> Array | None:
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph(model).initializer}
    conv = next(n for n in graph(model).node if n.name == node)
    return found[conv.input[2]] if len(conv.input) > 2 else None


@pytest.mark.parametrize("bias", [f32([0.5]), None], ids=["bias", "no bias"])
def test_the_mean_of_a_known_error_is_taken_back(tmp_path: Path, bias: Array | None) -> None:
    samples = whole_numbers([100] * 8)
    bench = Bench(tmp_path, pointwise(bias), samples)
    expected = (0.0 if bias is None else 0.5) - ERROR_OF_W * np.mean([sample["x"][0, 1] for sample in samples])
    model = bench.quantize(correct_bias="auto")
    found = bias_of(model, "node_y")
    assert found is not None and found == pytest.approx(expected, abs=1e-5)
    assert "biases corrected for the mean error of their channels: 1 of 1 layers" in model.notes
    plain = bias_of(bench.quantize(correct_bias="off"), "node_y")
    assert plain is None if bias is None else plain is not None and plain.tolist() == bias.tolist()


def test_what_the_halves_of_the_samples_disagree_on_stays(tmp_path: Path) -> None:
    bench = Bench(tmp_path, pointwise(f32([0.5])), whole_numbers([100, 100, -100, -100]))
    model = bench.quantize(correct_bias="auto")
    assert bias_of(model, "node_y") == pytest.approx(0.5, abs=0)
    assert "biases corrected for the mean error of their channels: 0 of 1 layers" in model.notes


def mean_errors(bench: Bench, model: OnnxModel, samples: Sequence[dict[str, Array]]) -> tuple[float, float]:
    """Of a classifier's outputs: power of the mean error, and of the error."""
    exact, found = (open_model(m.path, threads=1) for m in (bench.model, model))
    errors = np.concatenate([found.run(sample)["y"] - exact.run(sample)["y"] for sample in samples]).astype(np.float64)
    return float((errors.mean(axis=0) ** 2).sum()), float((errors**2).sum(axis=1).mean())


@pytest.mark.parametrize("batch", ["batch", 1])
def test_layer_after_layer_the_mean_error_falls_on_fresh_samples(tmp_path: Path, batch: Any) -> None:
    proto = networks.residual()
    if batch == 1:
        for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
            value.type.tensor_type.shape.dim[0].dim_value = 1
    samples = [{"x": np.abs(sample["x"])} for sample in networks.normal_samples(48, 3, 16, 16)]
    bench = Bench(tmp_path, proto, samples[:32])
    plain, corrected = (
        mean_errors(bench, bench.quantize(method="mse", correct_bias=how), samples[32:]) for how in ("off", "on")
    )
    assert corrected[0] < 0.25 * plain[0]
    assert corrected[1] < 0.8 * plain[1]


def test_products_are_corrected_only_on_request(tmp_path: Path) -> None:
    net = Net()
    x = net.op("Relu", [net.linear("x", "a", (16, 16))], "a_relu")
    net.op("Gemm", [x, net.normal("w", 16, 8, fan_in=16), net.normal("b", 8)], "y", alpha=0.5)
    samples = [{"x": np.abs(sample["x"]) + 1} for sample in networks.normal_samples(32, 16)]
    bench = Bench(tmp_path, net.model({"x": ["batch", 16]}, {"y": ["batch", 8]}), samples)
    plain, auto, on = (bench.quantize(correct_bias=how, min_sqnr_db=NONE) for how in ("off", "auto", "on"))
    assert auto.sha256 == plain.sha256
    assert any(note.startswith("biases corrected") and note.endswith("2 of 2 layers") for note in on.notes)
    before, after = (mean_errors(bench, model, samples)[0] for model in (plain, on))
    assert after < 0.1 * before


def test_a_shared_bias_is_corrected_for_its_layer_alone(tmp_path: Path) -> None:
    net = Net()
    weight, bias = net.weight("w", W), net.weight("b", f32([0.5]))
    net.op("Conv", ["x", weight, bias], "y")
    net.op("Sub", ["z", bias], "other")
    shapes: dict[str, list[Dim]] = {"x": ["batch", 2, 4, 4], "z": ["batch", 1]}
    samples = [{**sample, "z": f32([[1 + i]])} for i, sample in enumerate(whole_numbers([100] * 8))]
    bench = Bench(tmp_path, net.model(shapes, {"y": ["batch", 1, 4, 4], "other": ["batch", 1]}), samples)
    model = bench.quantize(correct_bias="auto")
    assert bias_of(model, "node_y") != pytest.approx(0.5, abs=1e-3)
    assert open_model(model.path, threads=1).run(samples[0])["other"].tolist() == [[0.5]]


def test_a_layer_whose_outliers_are_multiplied_apart_is_left_alone(tmp_path: Path) -> None:
    """What it makes is then not all of what it made: the difference is no error."""
    net = Net()
    net.linear("x", "y", (160, 16))
    samples = networks.normal_samples(32, 4, 160)
    for sample in samples:
        sample["x"][..., :4] = 60 * sample["x"][..., :4] + 200
    bench = Bench(tmp_path, net.model({"x": ["batch", 4, 160]}, {"y": ["batch", 4, 16]}), samples)
    plain, on = (bench.quantize(smooth="off", split="on", correct_bias=how) for how in ("off", "on"))
    assert any("with channels in high precision" in note for note in plain.notes)
    assert on.sha256 == plain.sha256


def test_the_planted_fault_of_a_sign_is_worse_than_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [{"x": np.abs(sample["x"])} for sample in networks.normal_samples(48, 3, 16, 16)]
    bench = Bench(tmp_path, networks.residual(), samples[:32])
    plain = mean_errors(bench, bench.quantize(method="mse", correct_bias="off"), samples[32:])
    right = biases._means
    monkeypatch.setattr(biases, "_means", lambda *a: {name: -found for name, found in right(*a).items()})
    wrong = mean_errors(bench, bench.quantize(method="mse", correct_bias="auto", min_sqnr_db=NONE), samples[32:])
    assert wrong[0] > 1.5 * plain[0]


def test_a_model_that_takes_too_long_or_too_much_memory_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, pointwise(f32([0.5])), whole_numbers([100] * 8))
    for module, name, value in ((biases, "MOST_MACS", 1.0), (graphs, "COPIED_BYTES", 1)):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, value)
            assert bias_of(bench.quantize(correct_bias="on"), "node_y") == pytest.approx(0.5, abs=0)


def test_the_run_leaves_no_file(tmp_path: Path) -> None:
    bench = Bench(tmp_path, pointwise(f32([0.5])), whole_numbers([100] * 8))
    model = bench.quantize(correct_bias="on")
    assert [file.name for file in model.path.parent.iterdir() if "bias" in file.name] == []
