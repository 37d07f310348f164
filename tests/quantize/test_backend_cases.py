"""Every case of onnx's own backend suite that multiplies: its weight made a constant, calibrated on its own inputs and
random variations of them, quantised in every format, checked, run, built and compared.

Opsets below `OPSET` are converted by onnx itself, so that no case is refused for its age alone.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper, version_converter

from compiler.backends import onnxruntime as backend
from compiler.errors import BuildEngineError, BuildError, CalibrationError
from compiler.spec import Array, Precision, Runner
from tests.quantize.bench import Bench

pytestmark = pytest.mark.slow

OPSET = 20
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
SAMPLES, FRESH = 16, 4
FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"precision": Precision.INT8},
    "int8 auto": {"precision": Precision.INT8, "method": "auto"},
    "int8 weights": {"precision": Precision.INT8, "weights_only": True},
    "fp8": {"precision": Precision.FP8},
    "fp8 weights": {"precision": Precision.FP8, "weights_only": True},
    "int4": {"precision": Precision.INT4, "block": 16},
}
LEAST_DB = {"int8": 22, "int8 auto": 22, "int8 weights": 30, "fp8": 18, "fp8 weights": 20, "int4": 15}
"""On `FRESH` samples that did not calibrate. Tensors of a few numbers are far from the average of their format."""

NOTHING_LEFT = (
    "model: {count} layers could be rounded to {label}, and none is left of them; at least one {kinds}, not kept by "
    "engines.keep or quantize.keep, was expected. Keep fewer layers, or build another precision."
)
WEIGHTS = "Conv, ConvTranspose, Gemm or MatMul with a constant weight"
BLOCKS = "MatMul or Gemm with a constant weight of a multiple of 16 input channels"
LABELS = {"int8": "INT8", "fp8": "FP8", "int4": "INT4"}


@dataclass
class Tried:
    """What became of one case."""

    weights: list[tuple[str, tuple[int, ...], int | None]] = field(default_factory=list)
    """Kind, shape and summed axis of each constant FP32 operand that a product of an activation reads."""
    runs: bool = True
    """Whether ONNX Runtime runs the case itself."""
    refused: dict[str, BuildEngineError] = field(default_factory=dict)
    """By format; under "observe" what calibration refused."""
    sqnr_db: dict[str, float] = field(default_factory=dict)
    engine_db: dict[str, float] = field(default_factory=dict)
    """Of the engine, against the canonical model without any optimisation."""


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Tried]]:
    """Every case of the suite with a product, by name."""
    patch = pytest.MonkeyPatch()
    patch.setenv("ALLOW_RELEASED_ONNX_OPSET_ONLY", "0")  # or the newest opsets of the suite are refused
    patch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the suite's own cases
        import onnx_backend_suite  # type: ignore[import-not-found]

        cases = [
            case
            for case in onnx_backend_suite.load_cases()
            if any(node.op_type in PRODUCTS for node in case.model.graph.node)
        ]
        yield {case.name: _try(case, tmp_path_factory.mktemp("case")) for case in cases}
    patch.undo()


def _try(case: Any, folder: Path) -> Tried:
    tried = Tried()
    try:
        proto, feeds = frozen(case)
        samples = varied(feeds)
        bench = Bench(folder, proto, samples[:SAMPLES])
    except BuildError:
        tried.runs = False
        return tried
    except BuildEngineError as exc:
        tried.refused["observe"] = exc
        return tried
    tried.weights = constant_operands(proto)
    fresh = samples[SAMPLES:]
    expected = _outputs(backend.open_model(bench.model.path, threads=1, optimize=False), fresh)
    for name, changes in FORMATS.items():
        try:
            made = bench.quantize(**changes)
        except BuildEngineError as exc:
            tried.refused[name] = exc
            continue
        onnx.checker.check_model(str(made.path), full_check=True)
        found = _outputs(backend.open_model(made.path, threads=1, optimize=False), fresh)
        tried.sqnr_db[name] = ratio_db(expected, found)
        engine = backend.build(made, name=name.replace(" ", "_"), reason="", threads=1, out_dir=made.path.parent)
        tried.engine_db[name] = ratio_db(found, _outputs(backend.open(engine, threads=1), fresh))
    return tried


def _outputs(runner: Runner, samples: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Of all samples, stacked."""
    with closing(runner):
        each = [runner.run(sample) for sample in samples]
    return {name: np.stack([one[name] for one in each]) for name in each[0]}


def frozen(case: Any) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The case with all that its weights are made of as constants, folded; and the inputs that are left."""
    proto = onnx.ModelProto()
    proto.CopyFrom(case.model)
    graph = proto.graph
    known = {tensor.name for tensor in graph.initializer}
    feeds = {name: value for name, value in case.inputs.items() if name not in known and value is not None}
    products = [node for node in graph.node if node.op_type in PRODUCTS]
    activations = _sources(graph, [node.input[0] for node in products[:1]])
    weights = _sources(graph, [name for node in products for name in node.input[1:]])
    fixed = (weights - activations) & set(feeds)
    left = [value for value in graph.input if value.name in feeds and value.name not in fixed]
    del graph.input[:]
    graph.input.extend(left)
    graph.initializer.extend(numpy_helper.from_array(feeds.pop(name), name) for name in sorted(fixed))
    proto.ir_version = max(proto.ir_version, 8)
    if proto.opset_import[0].version < OPSET:
        proto = version_converter.convert_version(proto, OPSET)
    return _folded(proto, feeds), feeds


def _sources(graph: onnx.GraphProto, names: list[str]) -> set[str]:
    """All that these tensors are computed from."""
    makers = {output: node for node in graph.node for output in node.output}
    found: set[str] = set()
    while names:
        name = names.pop()
        if name not in found:
            found.add(name)
            node = makers.get(name)
            names.extend(node.input if node is not None and node.op_type not in ("Shape", "Size") else ())
    return found


def _folded(proto: onnx.ModelProto, feeds: Mapping[str, Array]) -> onnx.ModelProto:
    """With what depends on constants alone computed, by running it once, where it can be run."""
    graph = proto.graph
    constant = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if _read(node) <= constant or node.op_type in ("Shape", "Size"):  # of tensors whose sizes the case fixes
            constant.update(node.output)
    used = {name for node in graph.node if not set(node.output) <= constant for name in _read(node)}
    wanted = sorted(name for node in graph.node for name in node.output if name in constant & used)
    if not wanted:
        return proto
    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])
        values = session.run(wanted, dict(feeds))
    except Exception:
        return proto  # what cannot run will be found not to run
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in zip(wanted, values, strict=True))
    nodes = [node for node in graph.node if not set(node.output) <= constant]
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in _read(node)}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    outputs = [value for value in graph.output if value.name not in constant]
    del graph.output[:]
    graph.output.extend(outputs)
    return proto


def _read(node: onnx.NodeProto) -> set[str]:
    """What a node reads, and what its subgraphs read around it."""
    found = {name for name in node.input if name}
    for attribute in node.attribute:
        if attribute.HasField("g"):
            inner = {name for one in attribute.g.node for name in _read(one)} | {v.name for v in attribute.g.output}
            found |= inner - {name for one in attribute.g.node for name in one.output}
    return found


def varied(feeds: Mapping[str, Array]) -> list[dict[str, Array]]:
    """The case's own inputs and others, with even noise as large as they are, so that few
    samples show their range; masks and indices stay."""
    random = np.random.default_rng(0)
    samples = [dict(feeds)]
    for _ in range(SAMPLES + FRESH - 1):
        sample = {}
        for name, value in feeds.items():
            noise = value.dtype.kind == "f" and np.isfinite(value).all()
            size = (np.std(value.astype(np.float64)) or 1.0) if noise else 0.0
            sample[name] = (
                (value + random.uniform(-1.5, 1.5, size=value.shape) * size).astype(value.dtype) if noise else value
            )
        samples.append(sample)
    return samples


def constant_operands(proto: onnx.ModelProto) -> list[tuple[str, tuple[int, ...], int | None]]:
    known = {w.name: tuple(w.dims) for w in proto.graph.initializer if w.data_type == TensorProto.FLOAT}
    found = []
    for node in proto.graph.node:
        if node.op_type not in PRODUCTS or node.input[0] in known or len(known.get(node.input[1], ())) < 2:
            continue
        shape, summed = known[node.input[1]], None
        if node.op_type in ("MatMul", "Gemm"):
            turned = any(a.name == "transB" and a.i for a in node.attribute)
            summed = len(shape) - (1 if turned else 2)
        found.append((node.op_type, shape, summed))
    return found


def ratio_db(expected: Mapping[str, Array], found: Mapping[str, Array]) -> float:
    """Of the worst float output, over its finite values; -inf where others are finite."""
    worst = np.inf
    for name, one in expected.items():
        if one.dtype.kind != "f":
            continue
        two = found[name].astype(np.float64)
        finite = np.isfinite(one)
        if not np.array_equal(finite, np.isfinite(two)):
            return -np.inf
        signal, noise = np.sum(one[finite].astype(np.float64) ** 2), np.sum((one[finite] - two[finite]) ** 2)
        if noise:
            worst = min(worst, float(10 * np.log10(signal / noise)) if signal else -np.inf)
    return worst


# --- what is expected -----------------------------------------------------------------------------------------------

CANNOT_RUN = {
    **dict.fromkeys(
        ("test_affine_grid_2d_expanded", "test_affine_grid_2d_align_corners_expanded"),
        "ONNX Runtime refuses Range of constants of rank 1",
    ),
    **dict.fromkeys(
        (
            "test_attention_3d_causal_bf16_expanded",
            "test_attention_4d_attn_mask_causal_bf16_expanded",
            "test_attention_4d_causal_bf16_expanded",
            "test_attention_4d_causal_padded_kv_bf16_expanded",
            "test_attention_4d_padded_kv_bf16_expanded",
        ),
        "ONNX Runtime has no kernels for BF16 on a CPU",
    ),
}
"""Cases that cannot be calibrated, because the runtime refuses them as they are."""

MASK_INPUT = dict.fromkeys(
    ("test_attention_4d_softcap_neginf_mask_expanded", "test_attention_4d_softcap_neginf_mask_poison_expanded"),
    "calibration sample 0: input 'attn_mask' holds NaN or Inf; finite values were expected. Correct calibration(), or "
    "leave the sample out.",
)
"""Cases whose inputs are not finite: refused by the calibration, with this message."""

NO_WEIGHT = {
    **dict.fromkeys(
        ("test_affine_grid_3d_expanded", "test_affine_grid_3d_align_corners_expanded"),
        "the constant is the first operand",
    ),
    **dict.fromkeys(
        (
            "test_attention_4d_fp16_expanded",
            "test_attention_4d_gqa_with_past_and_present_fp16_expanded",
            "test_attention_4d_causal_fp16_expanded",
            "test_attention_4d_gqa_causal_nonpad_decode_fp16_expanded",
            "test_attention_24_qk_matmul_output_mode3_softmax_precision_expanded",
            "test_attention_local_window_ext_cache_float16_mask_expanded",
            "test_causal_conv_with_state_fp16_expanded",
            "test_causal_conv_with_state_silu_fp16_expanded",
        ),
        "weights in FP16",
    ),
    "test_flexattention_double_expanded_ver26": "weights in FP64",
    **dict.fromkeys(("test_matmul_4d_1d", "test_matmul_1d_1d"), "the constant is a vector, not a matrix"),
}
"""Cases without a constant FP32 matrix or kernel: refused by every format, with the message that says what was expected."""


def _refusals(tried: Mapping[str, Tried]) -> dict[str, dict[str, str]]:
    return {name: {kind: exc.message for kind, exc in one.refused.items()} for name, one in tried.items()}


def test_every_case_that_multiplies_is_tried(tried: Mapping[str, Tried]) -> None:
    kinds = {kind for one in tried.values() for kind, _, _ in one.weights}
    assert kinds == PRODUCTS
    assert len(tried) >= 190  # of onnx 1.23.2
    assert {name for name, one in tried.items() if not one.runs} == CANNOT_RUN.keys()
    assert sum(bool(one.weights) for one in tried.values()) >= 168
    assert {name for name, one in tried.items() if one.runs and not one.weights} == NO_WEIGHT.keys() | MASK_INPUT.keys()


def test_every_case_with_a_weight_becomes_a_model_in_every_format_of_8_bits(tried: Mapping[str, Tried]) -> None:
    for name, one in tried.items():
        if one.weights:
            assert set(one.sqnr_db) >= FORMATS.keys() - {"int4"}, (name, one.refused)


def test_every_matrix_that_blocks_divide_becomes_int4(tried: Mapping[str, Tried]) -> None:
    fitting = {
        name
        for name, one in tried.items()
        if any(summed is not None and shape[summed] % 16 == 0 for _, shape, summed in one.weights)
    }
    assert fitting == {name for name, one in tried.items() if "int4" in one.sqnr_db}
    assert len(fitting) >= 4


def test_a_refusal_says_what_was_found_and_what_was_expected(tried: Mapping[str, Tried]) -> None:
    """Whole messages: of cases in the tables above, and of INT4 where nothing can be had in blocks; of no other."""
    found = _refusals(tried)
    for name, one in tried.items():
        expected: dict[str, str] = {}
        if name in MASK_INPUT:
            expected = {"observe": MASK_INPUT[name]}
        elif name in NO_WEIGHT:
            expected = {kind: _nothing_left(0, kind) for kind in FORMATS}
        elif one.runs and "int4" not in one.sqnr_db:
            expected = {"int4": _nothing_left(len(one.weights), "int4")}
        assert found[name] == expected
        assert all(type(exc) is CalibrationError for exc in one.refused.values())


def _nothing_left(count: int, kind: str) -> str:
    label = LABELS[re.split(" ", kind)[0]]
    return NOTHING_LEFT.format(count=count, label=label, kinds=BLOCKS if label == "INT4" else WEIGHTS)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_lost_is_what_the_format_costs(tried: Mapping[str, Tried], kind: str) -> None:
    poor = {name: one.sqnr_db[kind] for name, one in tried.items() if one.sqnr_db.get(kind, np.inf) < LEAST_DB[kind]}
    assert not poor
    ratios = [one.sqnr_db[kind] for one in tried.values() if kind in one.sqnr_db]
    assert np.median(ratios) > LEAST_DB[kind] + 8


@pytest.mark.parametrize("kind", FORMATS)
def test_the_engine_computes_what_the_canonical_model_computes(tried: Mapping[str, Tried], kind: str) -> None:
    """But for sums in another order, after which a value near the middle of two steps may go the other way: rare."""
    ratios = [one.engine_db[kind] for one in tried.values() if kind in one.engine_db]
    assert min(ratios) > 45
    assert sum(ratio < 130 for ratio in ratios) <= len(ratios) / 10
