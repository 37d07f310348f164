"""The number formats, and the opsets that know them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.errors import CalibrationError
from compiler.quantize import formats, opset
from compiler.quantize.formats import FP8, HALVES, INT4, INT8, in_rest
from compiler.spec import Precision
from tests.quantize import reference
from tests.quantize.networks import Net

POSITIVE = st.floats(min_value=2.0**-126, max_value=2.0**100, width=32)


def test_fp8_rounds_as_the_format_is_defined() -> None:
    random = np.random.default_rng(0)
    values = (random.normal(size=4000) * 2.0 ** random.integers(-12, 10, size=4000)).astype(np.float32)
    assert FP8.round(values).astype(np.float64).tolist() == reference.e4m3(values.astype(np.float64)).tolist()


def test_every_fp8_number_stays_and_what_lies_between_two_goes_to_the_even_one() -> None:
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    numbers = np.unique(every[np.isfinite(every.astype(np.float32))].astype(np.float64))
    assert (numbers.size, numbers.max(), numbers[numbers > 0].min()) == (253, 448, 2**-9)
    assert FP8.round(numbers).astype(np.float64).tolist() == numbers.tolist()
    assert reference.e4m3(numbers).tolist() == numbers.tolist()
    middle = (numbers[1:] + numbers[:-1]) / 2
    assert FP8.round(middle).astype(np.float64).tolist() == reference.e4m3(middle).tolist()


@pytest.mark.parametrize("steps", [INT8, INT4, FP8], ids=lambda steps: steps.label)
def test_what_is_too_large_becomes_the_largest(steps: formats.Steps) -> None:
    found = steps.round(np.array([1e30, -1e30, steps.largest * 1.03, 0.0])).astype(float)
    assert found.tolist() == [steps.largest, steps.lowest, steps.largest, 0]


@pytest.mark.parametrize("rest", ["fp16", "bf16"])
@given(scale=POSITIVE)
def test_a_scale_is_the_next_one_that_the_rest_holds(rest: str, scale: float) -> None:
    half = HALVES[Precision(rest)]
    found = in_rest(np.array([scale], np.float32), rest)
    if scale > half.largest:
        assert found == np.float32(scale)
        return
    assert half.round(found).astype(np.float32) == found >= np.float32(scale)
    next_below = (half.round(found).view(np.uint16) - np.uint16(1)).view(half.dtype.numpy()).astype(np.float32)
    assert next_below < np.float32(scale)


@given(scale=POSITIVE)
def test_a_scale_for_fp32_is_itself(scale: float) -> None:
    assert in_rest(np.array(scale), "fp32") == np.float32(scale)


@pytest.mark.parametrize("rest", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("steps", [INT8, INT4, FP8], ids=lambda steps: steps.label)
@given(peak=st.floats(min_value=2.0**-100, max_value=2.0**15, width=32))
def test_the_largest_magnitude_is_never_cut_off(steps: formats.Steps, rest: str, peak: float) -> None:
    scale = float(steps.scale(np.array([peak], np.float32), rest)[0])
    assert scale > 0
    assert peak / scale <= steps.largest * (1 + 1e-6)


# --- opsets ---------------------------------------------------------------------------------------------------------


def network(version: int, kind: str = "Relu", ir_version: int = 8) -> ir.Model:
    net = Net()
    net.op(kind, ["x"], "y")
    model = ir.from_proto(net.model({"x": ["batch", 2, 4, 4]}, {"y": ["batch", 2, 4, 4]}, opset=20))
    model.opset_imports[""], model.ir_version = version, ir_version
    return model


def test_an_opset_is_raised_with_its_ir_version_and_said() -> None:
    model = network(18)
    assert opset.require(model, 21, "INT4") == ["opset raised from 18 to 21, the first that defines INT4"]
    assert (model.opset_imports[""], model.ir_version) == (21, 10)


def test_an_opset_that_is_new_enough_stays() -> None:
    model = network(23, ir_version=11)
    assert opset.require(model, 21, "INT4") == []
    assert (model.opset_imports[""], model.ir_version) == (23, 11)


@pytest.mark.parametrize(
    ("version", "kind", "reason"),
    [
        (17, "Relu", "only 18 or later can be raised"),
        (18, "AveragePool", "AveragePool 'node_y' has changed its meaning since"),
        (18, "Resize", "Resize 'node_y' has changed its meaning since"),
        (19, "DFT", "DFT 'node_y' has changed its meaning since"),
    ],
)
def test_an_opset_that_cannot_be_raised_is_refused(version: int, kind: str, reason: str) -> None:
    model = network(version, kind)
    with pytest.raises(CalibrationError) as caught:
        opset.require(model, 21, "INT4")
    assert caught.value.message == (
        f"model: its opset is {version}; INT4 needs 21 or later, and {reason}. Export it again with a newer opset."
    )
    assert (model.opset_imports[""], model.ir_version) == (version, 8)


def test_an_operator_that_changed_before_is_no_obstacle() -> None:
    assert opset.obstacle(network(19, "AveragePool"), 21) is None
    assert opset.obstacle(network(18, "Relu"), 21) is None


def test_local_functions_are_an_obstacle() -> None:
    model = network(20)
    function = ir.Function("local", "f", graph=ir.Graph([], [], nodes=[], opset_imports={"": 20}), attributes=[])
    model.functions[function.identifier()] = function
    assert opset.obstacle(model, 21) == "it has local functions, which have opsets of their own"


def test_every_operator_that_lost_or_changed_a_parameter_is_known() -> None:
    """Of all schemas from `OLDEST_RAISED` to 22: what is not additive stands in `CHANGED`."""
    found: dict[int, set[str]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        since = schema.since_version
        if schema.domain or not opset.OLDEST_RAISED < since <= 22:
            continue
        try:
            before = onnx.defs.get_schema(schema.name, since - 1, "")
        except onnx.defs.SchemaError:
            continue  # new
        kept = all(
            name in schema.attributes and str(old.default_value) == str(schema.attributes[name].default_value)
            for name, old in before.attributes.items()
        )
        inputs = [(i.name, i.option) for i in before.inputs] == [(i.name, i.option) for i in schema.inputs]
        if not (kept and inputs) or before.deprecated:
            found.setdefault(since, set()).add(schema.name)
    assert found == {20: {"DFT", "GridSample"}, 21: {"GroupNormalization"}}
    assert all(names <= opset.CHANGED[version] for version, names in found.items())
