"""The language model is one: trained, causal, judged by text that it never saw; and its outliers change nothing but ranges."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from compiler import export, recipe, source
from compiler.backends.onnxruntime import open_model
from compiler.data import collect
from compiler.metrics import perplexity, top1_agreement
from compiler.optimize.driver import optimize
from compiler.quantize import observe, quantize
from compiler.recipe import EngineSection, QuantizeSection
from compiler.source import load_module
from compiler.spec import Array, OnnxModel, Precision

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "models" / "weights" / "decoder.safetensors"
WINDOWS = 16


@pytest.fixture(scope="module")
def decoder() -> ModuleType:
    return load_module(ROOT / "models" / "decoder.py")


@pytest.fixture(scope="module")
def plain(decoder: ModuleType) -> torch.nn.Module:
    model: torch.nn.Module = decoder.build()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


@pytest.fixture(scope="module")
def outlying() -> torch.nn.Module:
    model: torch.nn.Module = load_module(ROOT / "models" / "decoder_outliers.py").build()
    return model.eval()


@pytest.fixture(scope="module")
def judging(decoder: ModuleType) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A few windows that judge, and the bytes that follow theirs."""
    ((feeds, labels),) = decoder.validation()
    return feeds["ids"][:WINDOWS], labels[:WINDOWS]


def answer(model: torch.nn.Module, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.from_numpy(ids)).numpy()
    return logits


def peaks(model: torch.nn.Module, ids: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """Of each linear layer, the largest magnitude of every channel that it reads."""
    found: dict[str, NDArray[np.float32]] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: found.update({name: args[0].abs().flatten(0, -2).amax(dim=0).numpy()})
        )
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    answer(model, ids)
    for hook in hooks:
        hook.remove()
    return found


def test_shipped_weights_are_small_and_predict_text_that_they_never_saw(
    decoder: ModuleType, plain: torch.nn.Module, judging: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> None:
    ids, labels = judging
    found = perplexity(decoder.losses["nll"]({"logits": answer(plain, ids)}, labels))
    untrained = perplexity(decoder.losses["nll"]({"logits": answer(decoder.build(), ids)}, labels))
    assert WEIGHTS.stat().st_size < 6_000_000
    assert found < 5.0
    assert untrained > 200.0


def test_a_byte_changes_no_answer_before_it(
    plain: torch.nn.Module, judging: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> None:
    ids, _ = judging
    changed = ids.copy()
    changed[:, 64] ^= 1
    before, after = answer(plain, ids), answer(plain, changed)
    np.testing.assert_allclose(before[:, :64], after[:, :64], atol=1e-4)
    assert np.abs(before[:, 64] - after[:, 64]).max() > 0.1


def test_no_window_is_in_two_sets_or_stands_in_the_text_that_trains(decoder: ModuleType) -> None:
    parts = decoder.split()
    assert {name: windows.shape for name, windows in parts.items() if name != "train"} == {
        "validation": (256, 129),
        "selection": (128, 129),
        "calibration": (128, 129),
    }
    read = np.concatenate([windows[:, :-1] for name, windows in parts.items() if name != "train"])
    text = parts["train"].tobytes()
    assert len(np.unique(read, axis=0)) == len(read) == 512
    assert not [window for window in read if window.tobytes() in text]


def test_labels_are_the_bytes_that_follow(decoder: ModuleType) -> None:
    for part in (decoder.validation, decoder.selection):
        ((feeds, labels),) = part()
        assert feeds["ids"].dtype == labels.dtype == np.int64
        assert (feeds["ids"][:, 1:] == labels[:, :-1]).all()


def test_outliers_leave_every_answer_as_it_was(
    plain: torch.nn.Module, outlying: torch.nn.Module, judging: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> None:
    ids, _ = judging
    np.testing.assert_allclose(answer(outlying, ids), answer(plain, ids), atol=1e-3, rtol=0)


def test_six_channels_of_what_each_layer_reads_are_forty_times_as_large(
    plain: torch.nn.Module, outlying: torch.nn.Module, judging: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> None:
    ids, _ = judging
    before, after = peaks(plain, ids), peaks(outlying, ids)
    assert before.keys() == after.keys()
    assert len(before) == 4 * 7 + 1
    for name, channels in after.items():
        grown = channels / before[name]
        outliers = 6 * 3 if name.endswith("output") else 6  # three heads of queries read one of values
        np.testing.assert_allclose(np.sort(grown)[:-outliers], 1.0, rtol=1e-2, err_msg=name)
        np.testing.assert_allclose(np.sort(grown)[-outliers:], 40.0, rtol=1e-2, err_msg=name)
        assert channels.max() / np.median(channels) >= 20, name


def test_outliers_come_from_the_seed_and_are_as_many_and_as_large_as_asked(decoder: ModuleType) -> None:
    def gains(**options: float) -> NDArray[np.float32]:
        norm = decoder.inject_outliers(decoder.build(), **options).norm.weight
        return np.asarray(norm.detach().numpy())

    assert np.array_equal(gains(), gains())
    assert not np.array_equal(gains(), gains(seed=1))
    assert np.unique(gains(channels=3, factor=8.0), return_counts=True)[1].tolist() == [189, 3]


@pytest.mark.slow
def test_one_scale_per_activation_is_not_enough_for_the_outliers_unless_they_are_smoothed(
    tmp_path: Path, plain: torch.nn.Module, judging: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> None:
    ids, _ = judging
    asked = recipe.load(ROOT / "recipes" / "decoder_outliers.toml")
    sources = source.locate(asked, ROOT / "recipes")
    folders = {step: tmp_path / step for step in ("data", "export", "optimize", "observe", "off", "auto")}
    for folder in folders.values():
        folder.mkdir()
    calibration = collect(asked, sources, out_dir=folders["data"]).calibration
    assert calibration is not None
    written = export.export(asked, sources, opset=20, open_model=open_model, out_dir=folders["export"])
    model = optimize(asked.optimize, written, open_model=open_model, out_dir=folders["optimize"])
    np.testing.assert_allclose(run(model, ids), answer(plain, ids), atol=1e-3, rtol=0)
    statistics = observe(
        model,
        calibration,
        samples=32,
        min_samples=16,
        open_model=open_model,
        threads=2,
        out_dir=folders["observe"],
    )

    def agreement(smooth: Literal["auto", "off"]) -> float:
        rounded = quantize(
            EngineSection(precision=Precision.INT8),
            QuantizeSection(method="minmax", smooth=smooth, rounding="nearest"),
            model,
            statistics,
            calibration,
            open_model=open_model,
            threads=2,
            out_dir=folders[smooth],
            checked=False,
        )
        return float(np.mean(top1_agreement({"logits": run(rounded, ids)}, {"logits": run(model, ids)})))

    assert agreement("off") < 0.93
    assert agreement("auto") > 0.975


def run(model: OnnxModel, ids: NDArray[np.int64]) -> Array:
    runner = open_model(model.path, threads=2)
    try:
        return runner.run({"ids": ids})["logits"]
    finally:
        runner.close()
