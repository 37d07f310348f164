"""Nouns round-trip through canonical JSON, and keys change with everything that they cover."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler import codec, spec
from compiler.spec import DimRange, Engine, GateResult, OnnxModel, Outcome, Platform, Precision, Score, TensorSpec

BASE = Path("/steps/abc")
PLATFORM = Platform(
    os="linux",
    arch="x86_64",
    cpu="a CPU",
    cores=2,
    gpu=None,
    compute_capability=None,
    driver=None,
    packages={"onnxruntime": "1.31.1"},
)
ENGINE = Engine(
    name="int8",
    path=BASE / "engine.onnx",
    sha256="ab",
    size_bytes=7,
    backend="onnxruntime",
    backend_reason="no GPU",
    precision=Precision.INT8,
    model_sha256="cd",
    platform=PLATFORM,
    inputs=(TensorSpec(name="image", dtype="float32", shape=("batch", 1, 32, 32)),),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 10)),),
    axes={"batch": DimRange(min=1, opt=8, max=64)},
    build_s=1,
    external_data=(BASE / "data" / "engine.onnx.data",),
)
floats = st.floats(allow_nan=False)


def test_an_engine_comes_back_as_it_was_with_absolute_paths() -> None:
    assert codec.load(codec.dump(ENGINE, BASE), Engine, BASE) == ENGINE


def test_paths_are_stored_relative_so_a_folder_may_move() -> None:
    moved = codec.load(codec.dump(ENGINE, BASE), Engine, Path("/elsewhere"))
    assert moved.path == Path("/elsewhere/engine.onnx")
    assert moved.external_data == (Path("/elsewhere/data/engine.onnx.data"),)


def test_the_form_is_canonical() -> None:
    value = DimRange(max=3, min=1, opt=2)
    assert codec.dump(value, BASE) == b'{"max":3,"min":1,"opt":2}'
    assert codec.dump({"b": 0.1, "a": Precision.FP16}, BASE) == b'{"a":"fp16","b":0.1}'


@given(
    st.builds(
        Score,
        metric=st.text(),
        value=st.floats(),
        original=st.none() | st.floats(),
        change=st.none() | st.floats(),
        samples=st.integers(0, 2**53),
        binary=st.booleans(),
        higher_is_better=st.booleans(),
        worst=st.lists(st.integers(0, 2**53), max_size=3).map(tuple),
        notes=st.lists(st.text(), max_size=3).map(tuple),
    )
)
def test_every_score_comes_back_bit_for_bit_not_a_number_included(score: Score) -> None:
    written = codec.dump(score, BASE)
    read = codec.load(written, Score, BASE)
    assert codec.dump(read, BASE) == written
    assert math.isnan(read.value) if math.isnan(score.value) else read.value == score.value
    json.loads(written, parse_constant=pytest.fail)


@given(st.dictionaries(st.text(), st.builds(GateResult, engine=st.text(), gate=st.text(), outcome=st.sampled_from(Outcome),
       measured=st.none() | floats, low=st.none() | floats, high=st.none() | floats, reason=st.text())))  # fmt: skip
def test_mappings_of_nouns_come_back(value: dict[str, GateResult]) -> None:
    assert codec.load(codec.dump(value, BASE), dict[str, GateResult], BASE) == value


def test_every_noun_of_spec_can_be_decoded() -> None:
    """msgspec refuses a type it cannot decode as soon as it sees it; anything else is a wrong shape."""
    nouns = [noun for noun in vars(spec).values() if dataclasses.is_dataclass(noun) and isinstance(noun, type)]
    assert len(nouns) >= 18
    for noun in nouns:
        with pytest.raises(ValueError, match=rf"^not a {noun.__name__}: (Object missing|Expected)"):
            codec.load(b'{"unknown":1}', noun, BASE)


def test_a_path_outside_the_folder_is_refused() -> None:
    outside = dataclasses.replace(ENGINE, path=Path("/steps/other/engine.onnx"))
    with pytest.raises(
        ValueError, match=r"^value\.path is /steps/other/engine\.onnx; a path below /steps/abc was expec"
    ):
        codec.dump(outside, BASE)
    climbing = dataclasses.replace(ENGINE, path=BASE / ".." / "other")
    with pytest.raises(
        ValueError, match=r"^value\.path is /steps/abc/\.\./other; a path below /steps/abc was expected$"
    ):
        codec.dump(climbing, BASE)


@pytest.mark.parametrize("path", ["/etc/passwd", "../other", "a/../../b", "nul\0"])
def test_a_stored_path_may_not_leave_the_folder(path: str) -> None:
    tree = json.loads(codec.dump(ENGINE, BASE))
    tree["path"] = path
    with pytest.raises(ValueError) as caught:
        codec.load(json.dumps(tree).encode(), Engine, BASE)
    assert str(caught.value) == f"not a Engine: path {path!r} leaves the folder - at `$.path`"


def test_a_path_that_is_no_string_is_refused() -> None:
    tree = json.loads(codec.dump(ENGINE, BASE)) | {"path": 7}
    with pytest.raises(ValueError, match=r"^not a Engine: a path was expected, found 7 - at `\$\.path`$"):
        codec.load(json.dumps(tree).encode(), Engine, BASE)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"null",
        b'{"min":1,"opt":2}',
        b'{"min":1,"opt":2,"max":3,"more":4}',
        b'{"min":1,"opt":2,"max":"3"}',
        b'{"min":1,"opt":2,"max":3.5}',
        b'{"min":1,"opt":2,"max":true}',
        b'{"min":1,"opt":2,"max":NaN}',
        b"[" * 100_000,
    ],
)
def test_the_wrong_shape_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^not a DimRange: "):
        codec.load(data, DimRange, BASE)


def test_an_unknown_key_deep_inside_is_refused() -> None:
    tree = json.loads(codec.dump(ENGINE, BASE))
    tree["platform"]["more"] = 1
    with pytest.raises(ValueError, match=r"^not a Engine: it holds something that a Engine does not have$"):
        codec.load(json.dumps(tree).encode(), Engine, BASE)


def test_a_type_that_is_no_noun_is_refused() -> None:
    @dataclass
    class Odd:
        when: complex

    with pytest.raises(ValueError, match=r"^not a Odd: a complex is no part of a noun - at `\$\.when`$"):
        codec.load(b'{"when":1}', Odd, BASE)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1: 2}, "value has the key 1; a string was expected"),
        ({"$float": "nan"}, "value is {'$float': 'nan'}; that form is kept for numbers that are not finite"),
        ({"a": {1, 2}}, "value['a'] is a set; a plain value was expected"),
        ([b"x"], "value[0] is a bytes; a plain value was expected"),
        ([OnnxModel], "value[0] is a type; a plain value was expected"),
    ],
)
def test_a_value_of_an_unknown_kind_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        codec.dump(value, BASE)
    assert str(caught.value) == message


# --- keys -----------------------------------------------------------------------------------------------------------

PARTS: Mapping[str, Any] = {"stage": "build", "inputs": {"model": "ab"}, "parts": [1, 0.5, None, True, "x"]}


def test_a_key_is_a_full_sha256_that_never_changes() -> None:
    assert codec.key({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # of the two bytes {}


def test_order_and_container_do_not_matter() -> None:
    assert codec.key(PARTS) == codec.key(dict(reversed(list(PARTS.items()))) | {"parts": (1, 0.5, None, True, "x")})


@pytest.mark.parametrize(
    "other",
    [
        {**PARTS, "stage": "Build"},
        {**PARTS, "inputs": {"model": "ac"}},
        {**PARTS, "inputs": {"models": "ab"}},
        {**PARTS, "parts": [True, 0.5, None, True, "x"]},
        {**PARTS, "parts": [1.0, 0.5, None, True, "x"]},
        {**PARTS, "parts": ["1", 0.5, None, True, "x"]},
        {**PARTS, "parts": [1, 0.5, "null", True, "x"]},
        {**PARTS, "parts": [0.5, 1, None, True, "x"]},
        {**PARTS, "parts": [1, math.nextafter(0.5, 1), None, True, "x"]},
        {**PARTS, "more": None},
    ],
)
def test_every_difference_makes_another_key(other: Mapping[str, Any]) -> None:
    assert codec.key(other) != codec.key(PARTS)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"a": math.nan}, "key['a'] is nan; a finite number was expected"),
        ({"a": [math.inf]}, "key['a'][0] is inf; a finite number was expected"),
        ({"a": Path("/x")}, f"key['a'] is a {type(Path()).__name__}; a plain value was expected"),
        ({"a": object()}, "key['a'] is a object; a plain value was expected"),
        ({None: 1}, "key has the key None; a string was expected"),
    ],
)
def test_a_key_refuses_what_has_no_canonical_form(parts: Mapping[Any, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        codec.key(parts)
    assert str(caught.value) == message


def test_what_an_older_version_wrote_is_read_with_defaults_for_what_came_later() -> None:
    tree = json.loads(codec.dump(ENGINE, BASE))
    for later in ("proof", "profiles"):
        del tree[later]
    assert codec.load(json.dumps(tree).encode(), Engine, BASE) == ENGINE


def test_a_nested_key_that_nobody_knows_is_refused() -> None:
    tree = json.loads(codec.dump(ENGINE, BASE))
    tree["inputs"][0]["layout"] = "NCHW"
    with pytest.raises(ValueError, match=r"^not a Engine: it holds something that a Engine does not have$"):
        codec.load(json.dumps(tree).encode(), Engine, BASE)


def test_threads_that_meet_a_kind_together_all_read_it() -> None:
    """In a process of its own: msgspec has met no kind there, and what this is about ends the process."""
    code = """
import threading, time
from pathlib import Path
import msgspec._utils
from compiler import codec
from compiler.spec import Outcome, Verdict

look = msgspec._utils.get_class_annotations

def slowly(*arguments):
    time.sleep(0.05)
    return look(*arguments)

msgspec._utils.get_class_annotations = slowly
verdict = Verdict(engine="int8", engine_sha256="0", outcome=Outcome.PASS, gates=())
data, read = codec.dump(verdict, Path("/x")), []

def load(after):
    time.sleep(after)
    read.append(codec.load(data, Verdict, Path("/x")) == verdict)

threads = [threading.Thread(target=load, args=(0.02 * number,)) for number in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(read.count(True))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr
