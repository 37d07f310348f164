"""A recipe is either right, or every mistake in it is named at once, with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler import recipe
from compiler.errors import RecipeError
from compiler.spec import DimRange, Precision

MINIMAL = """\
name = "mine"

[model]
source = "mine.py"

[model.inputs.x]
shape = ["batch", 3]

[axes]
batch = { min = 1, opt = 8, max = 64 }
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "r.toml"
    path.write_text(text)
    return path


def _error(folder: Path, text: str, *overrides: str) -> str:
    """The whole message for a recipe, its path written as ``r.toml``."""
    path = _write(folder, text)
    with pytest.raises(RecipeError) as caught:
        recipe.load(path, overrides)
    return caught.value.message.replace(str(path), "r.toml")


def test_a_short_recipe_gets_good_defaults(tmp_path: Path) -> None:
    found = recipe.load(_write(tmp_path, MINIMAL))
    assert [engine.label for engine in found.engines] == ["fp32", "int8"]
    assert found.axes == {"batch": DimRange(min=1, opt=8, max=64)}
    assert found.inputs[0].shape == ("batch", 3)
    assert found.inputs[0].dtype == "float32"
    assert [gate.describe() for gate in found.gates] == ["cosine >= 0.99 (95%)", "sqnr_db >= 10 (95%)"]


def test_every_mistake_is_named_at_once_with_its_line(tmp_path: Path) -> None:
    text = (
        MINIMAL.replace("source", "sorce")
        .replace('"batch", 3]', '"batch", 3]\ndtype = "flot32"')
        .replace("opt = 8", 'opt = "x"')
    )
    text += '\n[[engines]]\nprecision = "fp61"\n\n[[engines]]\nprecision = "int8"\nkeep = "a"\n\n[quantize]\nsamples = 0\nmetod = "mse"\n'
    assert _error(tmp_path, text).splitlines() == [
        "r.toml:4: [model] sorce: unknown key; did you mean 'source'?",
        "r.toml:3: [model] source: missing; it has no default. Add it.",
        "r.toml:8: [model.inputs.x] dtype: found 'flot32'; expected one of float32, float64, float16, int64, int32, int16, int8, uint8, bool. Did you mean 'float32'?",
        "r.toml:11: [axes.batch] opt: found 'x'; expected a whole number.",
        "r.toml:14: [engines #1] precision: found 'fp61'; expected one of fp32, fp16, bf16, int8, fp8, int4. Did you mean 'fp16'?",
        "r.toml:18: [engines #2] keep: found 'a'; expected a list.",
        "r.toml:22: [quantize] metod: unknown key; did you mean 'method'?",
        "r.toml:21: [quantize] samples: found 0; expected a whole number >= 1.",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("opt = 8, max = 64", "opt = 80, max = 64"), "r.toml:10: [axes] batch: min 1, opt 80, max 64; min <= opt <= max was expected."),
        (("min = 1", "min = 0"), "r.toml:10: [axes] batch: min is 0; at least 1 was expected."),
        (('"mine.py"', '"mine.txt"'), "r.toml:4: [model] source: found 'mine.txt'; expected file.py, package.module:callable, hf:<directory or id>, file.pt2 or file.onnx."),
        (('"mine.py"', '"mine.onnx"'), "r.toml:1: [data] source: missing; the model's source has no calibration() and validation(). Name a Python file that has."),
        (('"batch", 3', '"bach", 3'), "r.toml:7: [model.inputs.x] shape: axis 'bach' is not in [axes]; did you mean 'batch'? Add [axes] bach = { min = 1, opt = 8, max = 64 }.\nr.toml:10: [axes] batch: no input has this axis. Remove it, or name it in a shape."),
        (('name = "mine"', 'name = "../mine"'), "r.toml:1: name: found '../mine'; expected a string of letters, digits, '.', '_' or '-'."),
        (('name = "mine"', 'name = 3'), "r.toml:1: name: found 3; expected a string."),
        (("[model.inputs.x]", "[model.inputs]"), "r.toml:7: [model.inputs] shape: found a list; a table was expected."),
        (('name = "mine"', 'name = "mine"\nengines = []'), "r.toml:2: engines: empty; at least one [[engines]] was expected."),
        (('name = "mine"', 'name = "mine"\nengines = 3'), "r.toml:2: engines: found 3; a list of tables was expected, [[engines]]."),
        (('name = "mine"', 'name = "mine"\naxis = 3'), "r.toml:2: axis: unknown key; did you mean 'axes'?"),
    ],
)  # fmt: skip
def test_the_message_of_one_mistake(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert _error(tmp_path, MINIMAL.replace(*change)) == message


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ('[[gates]]\nmetric = "top1"', "r.toml:12: [gates #1]: found none; exactly one of max_drop, min, max was expected."),
        ('[[gates]]\nmetric = "top1"\nmin = 0.5\nmax = 1', "r.toml:12: [gates #1]: found min and max; exactly one of max_drop, min, max was expected."),
        ('[[gates]]\nmetric = "speedup_p50"\nmax_drop = 0.1', "r.toml:14: [gates #1] max_drop: 'speedup_p50' has no original to drop from; min or max was expected."),
        ('[[gates]]\nmetric = "cosine"\nmax_drop = 0.1', "r.toml:14: [gates #1] max_drop: 'cosine' compares with the original already; min or max was expected."),
        ('[[gates]]\nmetric = "top1"\nmax_drop = 0.1\nengine = "int9"', "r.toml:15: [gates #1] engine: no engine is named 'int9'; did you mean 'int8'?"),
        ('[[gates]]\nmetric = "top1"\nmax_drop = 0.1\nbatch = 8', "r.toml:15: [gates #1] batch: 'top1' does not depend on the batch size. Remove it."),
        ('[[gates]]\nmetric = "top1"\nmax_drop = 0.1\nagainst = "fp32"', "r.toml:15: [gates #1] against: 'top1' is not a ratio. Remove it."),
        ('[[gates]]\nmetric = "speedup_p50"\nmin = 1\nagainst = "egaer"', "r.toml:15: [gates #1] against: found 'egaer'; did you mean 'eager'?"),
        ('[[gates]]\nmetric = "top1"\nmax_drop = -0.1', "r.toml:14: [gates #1] max_drop: found -0.1; expected a number >= 0.0."),
        ('[[engines]]\nprecision = "int8"\n[[engines]]\nprecision = "int8"', "r.toml:14: [engines #2]: a second engine named 'int8'; give each its own name."),
        ('[[engines]]\nprecision = "fp32"\nname = "eager"', "r.toml:14: [engines #1] name: 'eager' names a run of the original model. Choose another name."),
        ('[[engines]]\nprecision = "fp32"\nkeep = ["a"]', "r.toml:14: [engines #1] keep: an FP32 engine keeps every layer in FP32 already. Remove it."),
        ('[[engines]]\nprecision = "fp16"\nrest = "bf16"', "r.toml:14: [engines #1] rest: only an INT8, FP8 or INT4 engine has a rest; this one is fp16. Remove it."),
        ('[latency]\nbatches = [128]', "r.toml:13: [latency] batches: batch 128 is outside axis 'batch', 1 to 64."),
        ('[latency]\nbatches = [1]\n[[gates]]\nmetric = "p50_ms"\nmax = 1\nbatch = 8', "r.toml:17: [gates #1] batch: batch 8 is not timed; expected one of 1 (latency.batches)."),
        ('[quantize]\nmin_sqnr_db = -inf', "r.toml:13: [quantize] min_sqnr_db: found -inf; a finite number was expected."),
        ('[data]\nsource = "x.csv"', "r.toml:13: [data] source: found 'x.csv'; a Python file was expected."),
        ('[quantize]\nmethod = "kl"', "r.toml:13: [quantize] method: found 'kl'; expected one of auto, minmax, percentile, entropy, mse."),
        ('[[engines]]\nprecision = "fp16"\nweights_only = true', "r.toml:14: [engines #1] weights_only: only an INT8, FP8 or INT4 engine has rounded weights; this one is fp16. Remove it."),
        ('[[engines]]\nprecision = "int8"\nblock = 64', "r.toml:14: [engines #1] block: only an INT4 engine shares scales in blocks; this one is int8. Remove it."),
        ('[tensorrt]\nstrip = true', "r.toml:13: [tensorrt] strip: a plan without weights cannot run unless it can be refitted. Set refit too."),
        ('[tensorrt]\noptimization_level = 6', "r.toml:13: [tensorrt] optimization_level: found 6; expected a whole number <= 5."),
        ('[tensorrt]\ncompute_capabilities = ["9.0"]', "r.toml:13: [tensorrt] compute_capabilities: found '9.0'; expected one of 7.5, 8.0, 8.6, 8.9, 12.0, 12.1."),
        ('[[tensorrt.profiles]]', "r.toml:12: [tensorrt.profiles #1]: axis 'batch' is missing; a profile gives a range for each axis of [axes]. Add it."),
        ('[[tensorrt.profiles]]\nbatch = {min = 1, opt = 8, max = 64}\nbach = {min = 1, opt = 1, max = 1}', "r.toml:14: [tensorrt.profiles #1] bach: axis 'bach' is not in [axes]; did you mean 'batch'?"),
        ('[[tensorrt.profiles]]\nbatch = {min = 1, opt = 80, max = 64}', "r.toml:13: [tensorrt.profiles #1] batch: min 1, opt 80, max 64; min <= opt <= max was expected."),
        ('[[tensorrt.profiles]]\nbatch = {min = 1, opt = 8, max = 65}', "r.toml:13: [tensorrt.profiles #1] batch: 1 to 65 is not inside the range of the axis in [axes], 1 to 64."),
        ('[[tensorrt.profiles]]\nbatch = {min = 1, opt = 8, max = 8}', "r.toml:12: [tensorrt] profiles: together they take axis 'batch' from 1 to 8; [axes] says 1 to 64. Widen a profile, or narrow the axis."),
        ('[[tensorrt.profiles]]\nbatch = {min = 1, opt = 1, max = 1}\n[[tensorrt.profiles]]\nbatch = {min = 16, opt = 16, max = 64}', "r.toml:12: [tensorrt] profiles: none takes batch 8, which [axes] and [latency] say is used most. Widen one."),
        ('[[tensorrt.profiles]]\nbatch = {min = 1, opt = 8, maxx = 64}', "r.toml:13: [tensorrt.profiles #1.batch] maxx: unknown key; did you mean 'max'?\nr.toml:13: [tensorrt.profiles #1] batch: max is missing. Add it."),
        ('[[tensorrt.profiles]]\nbatch = 8', "r.toml:13: [tensorrt.profiles #1] batch: found 8; a range was expected, { min = 1, opt = 8, max = 64 }."),
        ('[[engines]]\nprecision = "int8"\nbackend = "onnxruntime"\n[tensorrt]\ntf32 = true', "r.toml:15: tensorrt: no engine is built by TensorRT: each has backend = 'onnxruntime'. Remove the table."),
        ('[[engines]]\nprecision = "fp8"\nbackend = "tensorrt_rtx"\n[tensorrt]\ncompute_capabilities = ["8.6"]', "r.toml:16: [tensorrt] compute_capabilities: 8.6 asked, but engine 'fp8' needs 8.9 or later for FP8. Remove the target, or build engine 'fp8' in another recipe."),
        ('[[engines]]\nprecision = "int8"\nrest = "bf16"\nbackend = "tensorrt_rtx"\n[tensorrt]\ncompute_capabilities = ["7.5", "8.0"]', "r.toml:17: [tensorrt] compute_capabilities: 7.5 asked, but engine 'int8' needs 8.0 or later for BF16. Remove the target, or build engine 'int8' in another recipe."),
        ('[quantize]\npercentile = 3.0', "r.toml:13: [quantize] percentile: found 3.0; expected a number > 50.0."),
    ],
)  # fmt: skip
def test_the_message_of_one_added_mistake(tmp_path: Path, added: str, message: str) -> None:
    assert _error(tmp_path, MINIMAL + "\n" + added + "\n") == message


def test_weights_belong_to_python_sources(tmp_path: Path) -> None:
    text = (
        MINIMAL.replace('source = "mine.py"', 'source = "mine.onnx"\nweights = "w.safetensors"')
        + '[data]\nsource = "d.py"\n'
    )
    assert _error(tmp_path, text) == (
        "r.toml:5: [model] weights: not used with source 'mine.onnx', which carries its own. Remove it."
    )
    text = MINIMAL.replace('source = "mine.py"', 'source = "mine.py"\nweights = "w.pkl"')
    assert _error(tmp_path, text) == (
        "r.toml:5: [model] weights: found 'w.pkl'; a .safetensors, .pt or .pth file was expected."
    )


def test_overrides_win_and_are_named_in_messages(tmp_path: Path) -> None:
    path = _write(tmp_path, MINIMAL)
    found = recipe.load(path, ["quantize.method=minmax", "axes.batch.max=16", "export.rtol = 0.5"])
    assert (found.quantize.method, found.axes["batch"].max, found.export.rtol) == ("minmax", 16, 0.5)
    assert _error(tmp_path, MINIMAL, "quantize.samples=none") == (
        "--set quantize.samples: found 'none'; expected a whole number."
    )
    assert _error(tmp_path, MINIMAL, "quantize") == "--set quantize: not an assignment; table.key=value was expected."
    assert _error(tmp_path, MINIMAL, "name.x=3") == "--set name.x=3: 'name' is a value, not a table."
    engines = MINIMAL + '[[engines]]\nprecision = "int8"\n'
    assert recipe.load(_write(tmp_path, engines), ["engines.0.precision=fp16"]).engines[0].precision is Precision.FP16
    both = _write(tmp_path, engines + '[[engines]]\nprecision = "fp32"\n')
    named = [engine.backend for engine in recipe.load(both, ["engines.backend=tensorrt_rtx"]).engines]
    assert named == ["tensorrt_rtx", "tensorrt_rtx"]
    assert _error(tmp_path, MINIMAL, "engines.backend=tensorrt_rtx") == (
        "--set engines.backend=tensorrt_rtx: the recipe has no [[engines]]; at least one was expected. Add it to the file, or "
        "set all of them: engines=[{...}]."
    )
    assert _error(tmp_path, engines, "engines.backend=rtx") == (
        "--set engines.0.backend: found 'rtx'; expected one of auto, onnxruntime, tensorrt, tensorrt_rtx."
    )
    assert _error(tmp_path, engines, "engines.1.precision=fp16") == (
        "--set engines.1.precision=fp16: 'engines' is a list of 1; an index from 0 to 0 was expected after it, found '1'."
    )


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(RecipeError) as caught:
            recipe.load(path)
        return caught.value.message.replace(str(path), "r.toml")

    path = tmp_path / "r.toml"
    assert message(path) == "r.toml: no such file. Write one with 'build-engine init model.py'."
    assert message(tmp_path).endswith(": not a file; a recipe (TOML) was expected.")
    path.write_bytes(b"\xff\xfe")
    assert message(path) == "r.toml: not UTF-8 text; a recipe is a short TOML file."
    path.write_text("a" * (recipe.MAX_BYTES + 1))
    assert message(path) == "r.toml: larger than 64 KiB; a recipe is a short TOML file."
    path.write_text('name = "x\n')
    assert message(path).startswith("r.toml:1: not valid TOML: ")
    path.write_text("a = " + "[" * 20000)
    assert message(path) == "r.toml: not valid TOML: nested too deeply, or a number too long."
    path.write_text("a = " + "1" * 5000)
    assert message(path) == "r.toml: not valid TOML: nested too deeply, or a number too long."


def test_lines_are_found_through_strings_arrays_and_comments(tmp_path: Path) -> None:
    text = (
        'name = "mine" # [axes]\n[model] # x\nsource = """\nmine.py""" \n"inputs".x.shape = [\n  "batch", # ]\n  3,\n]\n'
        "[axes]\nbatch = {min = 1, opt = 8, max = 64}\n[quantize]\nsamples = 0\n"
    )
    assert _error(tmp_path, text) == "r.toml:12: [quantize] samples: found 0; expected a whole number >= 1."


_words = st.sampled_from(
    ["name", "model", "source", "inputs", "axes", "batch", "engines", "gates", "quantize", "x", ""]
)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(_words, _values, max_size=6))
@settings(max_examples=400, deadline=None)
def test_no_table_whatever_makes_anything_but_a_recipe_error(values: dict[str, object]) -> None:
    problems: list[recipe._Problem] = []
    decoded = recipe._decode(values, recipe.Recipe, (), problems)
    assert problems or isinstance(decoded, recipe.Recipe)


@given(st.text(max_size=300))
@settings(max_examples=300, deadline=None)
def test_no_text_whatever_makes_the_line_finder_fail(text: str) -> None:
    recipe._key_lines(text)
