"""Cross-layer equalisation: the same function, even channels, and everything that compares with the original told of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from compiler import onnx_files
from compiler.backends.onnxruntime import open_model
from compiler.quantize import biases, equalize, int8, placement
from compiler.quantize.explain import explain
from compiler.quantize.observe import load, measure
from compiler.recipe import EngineSection, QuantizeSection
from compiler.spec import Array, OnnxModel, Precision
from tests.quantize import networks
from tests.quantize.bench import NONE, Bench, constants, outputs, sqnr
from tests.quantize.networks import Net, f32

FACTORS = np.geomspace(1, 200, 8)


def uneven(*, between: str = "Relu", readers: int = 1, bias: bool = True) -> onnx.ModelProto:
    """Two convolutions, the channels between them a factor 200 apart, which the second weight makes up for."""
    net = Net(3)
    first = net.random.normal(size=(8, 3, 3, 3)) * FACTORS[:, None, None, None] / 5
    inputs = ["x", net.weight("first", f32(first))]
    if bias:
        inputs.append(net.weight("bias", f32(net.random.normal(size=8) * FACTORS / 5)))
    y = net.op("Conv", inputs, "made", pads=[1] * 4)
    if between == "Clip":
        y = net.op("Clip", [y, net.weight("low", f32(0)), net.weight("high", f32(600))], "between")
    elif between:
        y = net.op(between, [y], "between")
    parts = []
    for reader in range(readers):
        second = net.random.normal(size=(6, 8, 3, 3)) / FACTORS[:, None, None] / 8
        second_bias = net.weight(f"second_bias{reader}", f32(net.random.normal(size=6)))
        parts.append(net.op("Conv", [y, net.weight(f"second{reader}", f32(second)), second_bias], f"read{reader}"))
    net.op("GlobalAveragePool", [parts[0] if readers == 1 else net.op("Add", parts, "sum")], "y")
    return net.model({"x": ["batch", 3, 10, 10]}, {"y": ["batch", 6, 1, 1]})


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, uneven(), networks.normal_samples(24, 3, 10, 10))


def read(bench: Bench) -> ir.Model:
    network = onnx_files.read(bench.model.path)
    LiftConstantsToInitializersPass(lift_all_constants=True)(network)
    return network


def equalised(bench: Bench, how: Any = "auto", *, symmetric: bool = True) -> tuple[ir.Model, equalize.Equalised]:
    network = read(bench)
    placed = placement.place(network.graph)
    return network, equalize.equalize(network.graph, placed, load(bench.statistics.path), how=how, symmetric=symmetric)


def over_all(bench: Bench, model: OnnxModel) -> float:
    exact, found = (np.concatenate([outputs(one, sample) for sample in bench.samples]) for one in (bench.model, model))
    return sqnr(exact, found)


# --- the same function, with even channels --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"between": ""}, {"readers": 2}, {"bias": False}], ids=str)
def test_the_function_stays_and_the_channels_become_even(tmp_path: Path, options: dict[str, Any]) -> None:
    bench = Bench(tmp_path, uneven(**options), networks.normal_samples(24, 3, 10, 10))
    network, found = equalised(bench)
    name = "between" if options.get("between", "Relu") else "made"
    assert list(found.factors) == list(dict.fromkeys([name, "made"]))
    assert found.factors[name] / found.factors[name][0] == pytest.approx(FACTORS, rel=1.0)
    value = next(v for node in network.graph for v in node.outputs if v.name == name)
    value.dtype = ir.DataType.FLOAT
    network.graph.outputs.append(value)
    onnx_files.write(network, tmp_path / "equalised.onnx")
    runner = open_model(tmp_path / "equalised.onnx", threads=1)
    made = [runner.run(sample) for sample in bench.samples]
    for sample, again in zip(bench.samples, made, strict=True):
        assert again["y"] == pytest.approx(outputs(bench.model, sample), rel=1e-4, abs=1e-4)
    peaks = np.max([np.abs(again[name]).max(axis=(0, 2, 3)) for again in made], axis=0)
    assert peaks.max() / peaks.min() < 20 < 100 < FACTORS[-1]
    # Nothing lies beyond what is said of it, and the bound is reached.
    known = found.known[name]
    low, high = min(again[name].min() for again in made), max(again[name].max() for again in made)
    assert known.low <= low * (1 - 1e-5) <= 0 or known.low == pytest.approx(low, abs=1e-6)
    assert known.high == pytest.approx(high, rel=1e-5) or options.get("between") == ""


def test_that_pays(bench: Bench) -> None:
    off, on = bench.quantize(equalize="off"), bench.quantize(equalize="auto")
    assert over_all(bench, on) > over_all(bench, off) + 6
    assert any(
        re.fullmatch(
            r"channels evened out between convolutions, whole range kept: 1 activations, expected error \d+ dB lower",
            note,
        )
        for note in on.notes
    )
    assert {"first_equalised_int8", "second0_equalised_int8"} <= constants(on).keys()


def test_the_expected_error_is_the_measured_one() -> None:
    """Of a convolution of random numbers, its input and its weight rounded, after dividing by random factors."""
    random = np.random.default_rng(0)
    x = np.maximum(random.normal(size=(400, 6, 3, 3)) * np.geomspace(1, 10, 6)[:, None, None], 0)
    weight = random.normal(size=(16, 6, 3, 3)) / np.geomspace(1, 4, 6)[:, None, None]
    statistics = measure(x, by_channel=1)
    factors, gain_db = equalize.choose(statistics, [f32(weight)], symmetric=False)

    def error(by: Array) -> float:
        given, kernel = x / by[:, None, None], weight * by[:, None, None]
        step = given.max() / 255
        steps = np.abs(kernel).max(axis=(1, 2, 3), keepdims=True) / 127
        rounded, kernel = np.rint(given / step) * step, np.rint(kernel / steps) * steps
        exact, found = (np.einsum("nckl,ockl->no", a, b) for a, b in ((x, weight), (rounded, kernel)))
        return float(np.mean((exact - found) ** 2))

    # Half of the inputs are zero, which rounding leaves alone: the model errs to one side.
    measured = 10 * np.log10(error(np.ones(6)) / error(factors.astype(np.float64)))
    assert gain_db > 1
    assert measured == pytest.approx(gain_db, abs=1.0)


# --- what is left alone ---------------------------------------------------------------------------------------------


def test_even_channels_are_left_alone(tmp_path: Path) -> None:
    net = Net(1)
    signs = np.sign(net.random.normal(size=(4, 8, 3, 3)))
    y = net.op(
        "Conv", ["x", net.weight("a", f32(np.repeat(net.random.normal(size=(1, 3, 3, 3)), 8, 0)))], "made", pads=[1] * 4
    )
    y = net.op("Relu", [y], "between")
    net.op("Conv", [y, net.weight("b", f32(signs))], "y", pads=[1] * 4)
    bench = Bench(
        tmp_path, net.model({"x": ["batch", 3, 8, 8]}, {"y": ["batch", 4, 8, 8]}), networks.normal_samples(16, 3, 8, 8)
    )
    assert equalised(bench)[1].factors == {}


def pairs_of(proto: onnx.ModelProto) -> list[str]:
    network = ir.from_proto(proto)
    return [str(pair.value.name) for pair in placement.pairs(network.graph, placement.place(network.graph))]


def test_only_what_passes_factors_on_is_a_pair() -> None:
    assert pairs_of(uneven()) == ["between"]
    assert pairs_of(uneven(between="Clip")) == [], "Clip(x / s) is not Clip(x) / s"
    assert pairs_of(uneven(between="Sigmoid")) == []
    shown = uneven()
    shown.graph.output.append(onnx.helper.make_tensor_value_info("between", 1, ["batch", 8, 10, 10]))
    assert pairs_of(shown) == [], "the caller wants it as it is"
    shared = uneven(readers=2)
    shared.graph.node[3].input[1] = shared.graph.node[2].input[1]
    assert pairs_of(shared) == [], "a weight that two layers read"
    grouped = Net(2)
    y = grouped.op("Relu", [grouped.conv("x", "a", (4, 8))], "between")
    grouped.op("Conv", [y, grouped.normal("w", 8, 1, 3, 3)], "y", group=8)
    assert pairs_of(grouped.model({"x": ["batch", 4, 8, 8]}, {"y": ["batch", 8, 6, 6]})) == []
    residual = networks.residual()
    assert [name for name in pairs_of(residual) if "sum" in name] == [], "a residual stream"
    assert pairs_of(residual)


def test_off_means_off(bench: Bench) -> None:
    assert equalised(bench, "off")[1].factors == {}


# --- those who compare with the original ----------------------------------------------------------------------------


def test_biases_are_corrected_for_what_they_are_now(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"equalize": "auto", "min_sqnr_db": NONE}
    plain, corrected = (over_all(bench, bench.quantize(correct_bias=how, **options)) for how in ("off", "on"))
    assert corrected > plain - 0.5
    right = biases.correct
    monkeypatch.setattr(biases, "correct", lambda *args, **more: right(*args, **{**more, "divided": {}}))
    assert over_all(bench, bench.quantize(correct_bias="on", **options)) < plain - 6, "factors that are forgotten"


def test_weights_are_learnt_on_what_they_read_now(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"equalize": "auto", "rounding": "gptq", "min_sqnr_db": NONE}
    right = over_all(bench, bench.quantize(**options))
    prepare = int8.prepare
    monkeypatch.setattr(int8, "prepare", lambda *args: replace(prepare(*args), factors={}))
    assert over_all(bench, bench.quantize(**options)) < right - 0.5, "Gram matrices of what was read before"


def test_a_refusal_does_not_blame_what_was_divided(bench: Bench) -> None:
    message = bench.refusal(equalize="auto", min_sqnr_db=90.0)
    assert "Most is lost at " in message
    assert "'made'" not in message
    assert "'between'" not in message


def test_explain_compares_after_the_factors(bench: Bench, tmp_path: Path) -> None:
    section = QuantizeSection(equalize="auto", method="minmax", rounding="nearest", correct_bias="off")
    quantised = bench.quantize(equalize="auto")
    (tmp_path / "explained").mkdir()
    found = explain(
        EngineSection(precision=Precision.INT8),
        section,
        bench.model,
        quantised,
        bench.statistics,
        bench.data,
        searched=False,
        open_model=open_model,
        threads=1,
        out_dir=tmp_path / "explained",
    )
    assert any("are compared after a factor per channel" in note for note in found.notes)
    between = next(tensor for tensor in found.tensors if tensor.name == "between")
    assert between.sqnr_db is not None and between.sqnr_db > 30
    assert between.peak is not None and between.threshold is not None
    assert between.threshold >= between.peak * 0.99, "in units of what is rounded"
    assert between.clipped == 0
