"""Which back end builds an engine, and why."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compiler import backends
from compiler.backends import machine
from compiler.errors import BackendUnavailableError, RecipeError
from compiler.recipe import EngineSection, QuantizeSection, TensorRTSection
from compiler.spec import Precision
from tests.backends.machines import pretend_gpu, pretend_package

NO_GPU = "no NVIDIA GPU was found on this machine (nvidia-smi lists none)"
NO_TENSORRT = (
    "the Python package 'tensorrt' is not installed; it comes from NVIDIA: "
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/installing-tensorrt/installing.html"
)
NO_RTX = (
    "the Python package 'tensorrt_rtx' is not installed. On Linux x86-64 'python scripts/rtx_builder.py' installs a builder "
    "that needs no GPU; for an RTX card, install TensorRT for RTX from NVIDIA"
)


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without a GPU and without TensorRT, whatever is installed here."""
    real = importlib.util.find_spec
    absent = ("tensorrt", "tensorrt_rtx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else real(name, *rest))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    machine.gpu.cache_clear()
    yield
    machine.gpu.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, version: str) -> None:
    pretend_package(monkeypatch, tmp_path, name, version)
    hidden = importlib.util.find_spec
    found = importlib.machinery.PathFinder.find_spec(name, [str(tmp_path / "site")])
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda other, *rest: found if other == name else hidden(other, *rest)
    )


def section(backend: Any = "auto", precision: Precision = Precision.INT8) -> EngineSection:
    return EngineSection(precision=precision, backend=backend)


def test_auto_takes_the_first_whose_engines_run_here_and_says_why_not_the_others() -> None:
    assert backends.choose(section()) == (
        "onnxruntime",
        f"onnxruntime: the first whose engines run here; tensorrt: {NO_TENSORRT}; tensorrt_rtx: {NO_RTX}",
    )


def test_auto_does_not_take_a_builder_whose_engines_cannot_run_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, tmp_path, "tensorrt_rtx", "1.7.1")
    assert backends.choose(section()) == (
        "onnxruntime",
        f"onnxruntime: the first whose engines run here; tensorrt: {NO_TENSORRT}; tensorrt_rtx: {NO_GPU}",
    )


def test_auto_prefers_tensorrt_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "tensorrt", "11.4.0")
    pretend_gpu(monkeypatch, tmp_path, 'echo "NVIDIA L4, 8.9, 595.10"')
    assert backends.choose(section()) == ("tensorrt", "tensorrt: the first whose engines run here")


def test_auto_passes_by_a_back_end_that_does_not_take_an_option(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, tmp_path, "tensorrt", "11.4.0")
    pretend_gpu(monkeypatch, tmp_path, 'echo "NVIDIA L4, 8.9, 595.10"')
    name, reason = backends.choose(section(), TensorRTSection(compute_capabilities=("8.9",)))
    assert name == "onnxruntime"
    assert reason.startswith(
        "onnxruntime: the first whose engines run here; tensorrt: does not take [tensorrt] compute_capabilities: "
    )


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt_rtx"])
def test_a_named_back_end_is_taken_at_its_word(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "tensorrt_rtx", "1.7.1")
    assert backends.choose(section(name)) == (name, "named in the recipe")


@pytest.mark.parametrize(("name", "reason"), [("tensorrt", NO_TENSORRT), ("tensorrt_rtx", NO_RTX)])
def test_a_named_back_end_that_cannot_be_used_is_an_error(name: str, reason: str) -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        backends.choose(section(name))
    assert caught.value.message == f"engine 'int8': backend '{name}': {reason}."


def test_tensorrt_10_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "tensorrt", "10.16.1")
    pretend_gpu(monkeypatch, tmp_path, 'echo "NVIDIA L4, 8.9, 595.10"')
    assert backends.get("tensorrt").unavailable() == (
        "TensorRT 10.16.1 is installed; 11 or later was expected: up to 10 the builder may leave the precision of a layer as "
        "it likes, from 11 on the graph decides. Install tensorrt>=11"
    )


def test_tensorrt_needs_a_gpu_to_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "tensorrt", "11.4.0")
    assert backends.get("tensorrt").unavailable() == NO_GPU


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "tensorrt", "11.4.0")
    pretend_gpu(monkeypatch, tmp_path, 'echo "NVIDIA L4, 8.9, 550.54.14"')
    assert backends.get("tensorrt").unavailable() == (
        "the NVIDIA driver is 550.54.14; 580 or later was expected for CUDA 13. Update the driver"
    )


def test_a_driver_that_does_not_tell_its_version_is_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "tensorrt", "11.4.0")
    pretend_gpu(monkeypatch, tmp_path, 'echo "NVIDIA L4, 8.9, [N/A]"')
    assert (backends.get("tensorrt").unavailable() or "").startswith("the NVIDIA driver is [N/A]; 580 or later")


def test_what_depends_on_the_gpu_is_keyed_by_it_wherever_engines_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, tmp_path, "tensorrt_rtx", "1.7.1")
    rtx = backends.get("tensorrt_rtx")
    found = [rtx.fingerprint()]
    for card in ("RTX 4090, 8.9, 590.1", "RTX 5090, 12.0, 590.1", "RTX 5090, 12.0, 600.1", "H100, 9.0, 600.1"):
        pretend_gpu(monkeypatch, tmp_path, f'echo "{card}"')
        found.append(rtx.fingerprint())
    nowhere, *cards, hopper = found
    assert nowhere == hopper  # where no engine runs, none depends on a GPU
    assert len({tuple(sorted(card.items())) for card in (nowhere, *cards)}) == 4


@pytest.mark.parametrize(
    ("visible", "name"),
    [(None, "card 0"), ("1", "card 1"), ("1,0", "card 1"), ("GPU-abc", "card GPU-abc"), ("", None), ("-1", None)],
)
def test_the_gpu_is_the_one_that_cuda_may_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str | None, name: str | None
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    pretend_gpu(monkeypatch, tmp_path, 'echo "card ${1#--id=}, 8.9, 595.10"')
    found = machine.gpu()
    assert (found.name if found else None) == name


def test_engines_for_rtx_cards_do_not_run_on_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "tensorrt_rtx", "1.7.1")
    pretend_gpu(monkeypatch, tmp_path, 'echo "NVIDIA H100, 9.0, 595.10"')
    assert backends.get("tensorrt_rtx").unavailable() is None
    assert backends.get("tensorrt_rtx").cannot_run() == (
        "NVIDIA H100 has compute capability 9.0; TensorRT for RTX takes 7.5, 8.0, 8.6, 8.9, 12.0, 12.1. "
        'Use backend = "tensorrt"'
    )


JIT = "TensorRT for RTX chooses kernels where the engine runs, not where it is built; the plan is the same with and without"
DRIVER = "the builder of TensorRT for RTX needs a GPU and its driver for it, and finds none here"


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"optimization_level": 5}, JIT),
        ({"sparse_weights": True}, JIT),
        (
            {"hardware_compatibility": "ampere_plus"},
            "TensorRT for RTX does not have it; name the targets in compute_capabilities",
        ),
        ({"tiling": "full"}, JIT),
        ({"aux_streams": 2}, JIT),
        ({"timing_cache": True}, JIT),
        (
            {"version_compatible": True},
            "it needs NVIDIA's lean runtime library, which TensorRT for RTX does not have",
        ),
        ({"refit": True}, DRIVER),
        ({"refit": True, "strip": True}, DRIVER),
    ],
)
def test_an_option_that_the_rtx_flavour_does_not_take(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: dict[str, Any], reason: str
) -> None:
    install(monkeypatch, tmp_path, "tensorrt_rtx", "1.7.1")
    with pytest.raises(RecipeError) as caught:
        backends.choose(section("tensorrt_rtx"), TensorRTSection(**option))
    expected = [
        f"[tensorrt] {key}: engine 'int8', backend 'tensorrt_rtx', does not take it: {reason}." for key in option
    ]
    assert caught.value.message == "\n".join(expected)


@pytest.mark.parametrize(
    "option", [{}, {"timing_cache": False}, {"tf32": True}, {"workspace_mib": 64}, {"compute_capabilities": ("8.9",)}]
)
def test_options_that_the_rtx_flavour_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: dict[str, Any]
) -> None:
    install(monkeypatch, tmp_path, "tensorrt_rtx", "1.7.1")
    assert backends.choose(section("tensorrt_rtx"), TensorRTSection(**option))[0] == "tensorrt_rtx"


def test_an_option_of_the_rtx_flavour_is_refused_for_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "tensorrt", "11.4.0")
    pretend_gpu(monkeypatch, tmp_path, 'echo "NVIDIA L4, 8.9, 595.10"')
    with pytest.raises(RecipeError) as caught:
        backends.choose(section("tensorrt"), TensorRTSection(compute_capabilities=("8.9",), tiling="full"))
    assert caught.value.message == (
        "[tensorrt] compute_capabilities: engine 'int8', backend 'tensorrt', does not take it: TensorRT builds for the GPU of "
        "the machine it runs on; build there, or set hardware_compatibility for later ones."
    )


@pytest.mark.parametrize(
    ("asked", "backend", "found"),
    [
        ("auto", "onnxruntime", "asymmetric"),
        ("auto", "tensorrt", "symmetric"),
        ("auto", "tensorrt_rtx", "symmetric"),
        ("symmetric", "onnxruntime", "symmetric"),
        ("asymmetric", "onnxruntime", "asymmetric"),
    ],
)
def test_whether_ranges_are_symmetric_is_for_the_back_end_to_say(asked: Any, backend: str, found: str) -> None:
    decided = backends.decided(QuantizeSection(activations=asked, samples=7), section(), backend)
    assert (decided.activations, decided.samples) == (found, 7)


@pytest.mark.parametrize(
    ("asked", "backend", "found"),
    [
        ("auto", "onnxruntime", "own"),
        ("auto", "tensorrt", "shared"),
        ("auto", "tensorrt_rtx", "shared"),
        ("own", "tensorrt_rtx", "own"),
        ("shared", "onnxruntime", "shared"),
    ],
)
def test_whether_joins_share_a_scale_is_for_the_recipe_to_say(asked: Any, backend: str, found: str) -> None:
    assert backends.decided(QuantizeSection(joins=asked), section(), backend).joins == found


def test_ranges_that_a_back_end_does_not_take_are_refused() -> None:
    asked = QuantizeSection(activations="asymmetric")
    with pytest.raises(RecipeError) as caught:
        backends.decided(asked, section(), "tensorrt_rtx")
    assert caught.value.message == (
        "quantize.activations: engine 'int8', backend 'tensorrt_rtx', does not take \"asymmetric\": zero points must be 0. "
        'Write "auto", or "symmetric".'
    )
    # An engine whose activations are not rounded does not mind.
    assert backends.decided(asked, section(precision=Precision.FP8), "tensorrt_rtx") == asked


def test_onnxruntime_minds_no_option_of_tensorrt() -> None:
    assert backends.choose(section("onnxruntime"), TensorRTSection(tiling="full"))[0] == "onnxruntime"


def test_a_precision_that_a_named_back_end_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.get("onnxruntime"), "PRECISIONS", frozenset({Precision.FP32, Precision.FP16}))
    with pytest.raises(BackendUnavailableError) as caught:
        backends.choose(section("onnxruntime"))
    assert caught.value.message == ("engine 'int8': backend 'onnxruntime': does not take int8; it takes fp16, fp32.")


def test_no_back_end_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.get("onnxruntime"), "PRECISIONS", frozenset({Precision.FP32}))
    with pytest.raises(BackendUnavailableError) as caught:
        backends.choose(section())
    assert caught.value.message == (
        f"engine 'int8': no back end can be used: tensorrt: {NO_TENSORRT}; tensorrt_rtx: {NO_RTX}; onnxruntime: does not "
        "take int8; it takes fp32."
    )


def test_the_recipe_knows_exactly_these_back_ends() -> None:
    from typing import get_args, get_type_hints

    assert set(get_args(get_type_hints(EngineSection)["backend"])) == {"auto", *backends.NAMES}


def test_every_back_end_is_told_by_its_name() -> None:
    assert all(name == backend.NAME for name, backend in backends.NAMES.items())
