"""Which back end builds an engine, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compiler import backends
from compiler.backends import tensorrt
from compiler.errors import BackendUnavailableError
from compiler.recipe import EngineSection
from compiler.spec import Precision

REASON = 'this version of build-engine does not build TensorRT engines yet; use backend = "onnxruntime", or "auto"'


def section(backend: Any = "auto", precision: Precision = Precision.INT8) -> EngineSection:
    return EngineSection(precision=precision, backend=backend)


def test_auto_takes_the_first_that_can_be_used_and_says_why_not_the_others() -> None:
    assert backends.choose(section()) == (
        "onnxruntime",
        f"onnxruntime: the first that can be used here; tensorrt: {REASON}",
    )


def test_auto_prefers_tensorrt_where_it_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "unavailable", lambda: None)
    assert backends.choose(section()) == ("tensorrt", "tensorrt: the first that can be used here")


def test_a_named_back_end_is_taken_at_its_word() -> None:
    assert backends.choose(section("onnxruntime")) == ("onnxruntime", "named in the recipe")


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_a_named_back_end_that_cannot_be_used_is_an_error(name: str) -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        backends.choose(section(name))
    assert caught.value.message == f"engine 'int8': backend '{name}': {REASON}."


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
        f"engine 'int8': no back end can be used: tensorrt: {REASON}; onnxruntime: does not take int8; it takes fp32."
    )


def test_the_recipe_knows_exactly_these_back_ends() -> None:
    from typing import get_args, get_type_hints

    assert set(get_args(get_type_hints(EngineSection)["backend"])) == {"auto", *backends.NAMES}


def test_every_back_end_is_told_by_its_name() -> None:
    assert {backends.get(name).NAME for name in backends.NAMES} == {"onnxruntime", "tensorrt"}


@pytest.mark.parametrize("function", ["fingerprint", "platform"])
def test_the_seat_of_tensorrt_says_what_to_do(function: str) -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        getattr(tensorrt, function)()
    assert caught.value.message == f"backend 'tensorrt': {REASON}."


def test_the_seat_of_tensorrt_builds_and_opens_nothing(tmp_path: Path) -> None:
    nothing: Any = None
    with pytest.raises(BackendUnavailableError):
        tensorrt.build(nothing, name="e", reason="", threads=1, out_dir=tmp_path)
    with pytest.raises(BackendUnavailableError):
        tensorrt.open(nothing, threads=1)
