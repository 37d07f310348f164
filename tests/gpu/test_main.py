"""The command: its parts, its file, its mistakes, and what it says where there is nothing to measure."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from compiler.errors import ArtifactError, RecipeError
from scripts.gpu import children, main, results, rtx
from tests.gpu.fakes import CEILINGS

MACHINE = {"gpu": {"name": "NVIDIA Test"}}


class Family:
    """Children that answer at once; ``dies`` names the part in which one does not come to its end."""

    def __init__(self, path: Path, dies: str = "", machine: Mapping[str, Any] = MACHINE) -> None:
        self.path, self.dies, self.machine = path, dies, machine
        self.jobs: list[str] = []
        self.limits_s: list[float] = []
        self.saved: list[Any] = []

    def __call__(self, job: Any, limit_s: float, on_value: Callable[[Any], None]) -> str | None:
        name = job.get("flavour") or Path(job.get("recipe", job["part"])).stem
        self.jobs.append(name)
        self.limits_s.append(limit_s)
        values = {
            "machine": self.machine,
            "ceilings": CEILINGS,
            "tensorrt_rtx": {"steps": [{"step": "load", "error": "it ended the process"}], "log": []},
            "tensorrt": {"missing": "import: no"},
        }
        on_value(
            values.get(name, {"recipe": f"{name}.toml", "name": name, "batches": [], "energy_asked": job.get("energy")})
        )
        if self.path.exists():
            self.saved.append(json.loads(self.path.read_bytes()))
        return "its process ended with SIGSEGV" if name == self.dies else None


@pytest.fixture
def recipes(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "one.toml", tmp_path / "two.toml"]
    for path in paths:
        path.write_text("")
    return [str(path) for path in paths]


class TestMeasure:
    def measured(self, tmp_path: Path, arguments: Sequence[str], **family: Any) -> tuple[dict[str, Any], Family]:
        path = tmp_path / "results.json"
        family_of = Family(path, **family)
        made = results.Report(path, "gpu_report")
        main.measure(main.options([*arguments, "--output", str(path)]), made, family_of)
        content: dict[str, Any] = json.loads(path.read_bytes())
        return content, family_of

    def test_parts_come_one_after_the_other_and_each_is_saved(self, tmp_path: Path, recipes: list[str]) -> None:
        content, family = self.measured(tmp_path, recipes)
        assert family.jobs == ["machine", "tensorrt_rtx", "tensorrt", "ceilings", "one", "two"]
        assert list(content) == [
            *("schema", "started", "finished", "command", "machine", "rtx", "ceilings", "recipes", "missing")
        ]
        # Recipes share what is left of an hour.
        assert family.limits_s == [60, 120, 120, 180, pytest.approx(1800, rel=0.1), pytest.approx(3600, rel=0.1)]
        assert [one["name"] for one in content["recipes"]] == ["one", "two"]
        assert content["finished"] is not None
        # What was on disk while the last child ran: everything before it, and that the run is not over.
        assert family.saved[-1]["ceilings"] == CEILINGS
        assert family.saved[-1]["finished"] is None
        assert len(family.saved) == len(family.jobs)
        assert not list(tmp_path.glob("*.part"))

    def test_a_part_that_crashes_costs_no_other(self, tmp_path: Path, recipes: list[str]) -> None:
        content, _ = self.measured(tmp_path, recipes, dies="one")
        assert content["recipes"][0]["interrupted"] == {"missing": "its process ended with SIGSEGV"}
        assert {"part": "recipes / one / interrupted", "reason": "its process ended with SIGSEGV"} in content["missing"]
        assert content["recipes"][1]["name"] == "two"
        content, _ = self.measured(tmp_path, recipes, dies="ceilings")
        assert content["ceilings"]["interrupted"] == {"missing": "its process ended with SIGSEGV"}

    def test_a_crash_of_tensorrt_names_its_step(self, tmp_path: Path, recipes: list[str]) -> None:
        content, _ = self.measured(tmp_path, recipes, dies="tensorrt_rtx")
        assert content["rtx"]["answer"] == (
            "tensorrt_rtx: no: load: its process ended with SIGSEGV\ntensorrt: no: import: no"
        )

    def test_only_what_is_asked_for_is_measured(self, tmp_path: Path, recipes: list[str]) -> None:
        content, family = self.measured(tmp_path, [*recipes, "--only", "rtx"])
        assert family.jobs == ["machine", "tensorrt_rtx", "tensorrt"]
        assert content["ceilings"] == content["recipes"] == {"missing": "not asked for (--only)"}
        content, family = self.measured(tmp_path, [*recipes, "--only", "recipes"])
        assert family.jobs == ["machine", "one", "two"]
        assert content["recipes"][0]["energy_asked"] is False

    def test_parts_of_an_earlier_result_are_kept_and_recipes_replaced_by_name(
        self, tmp_path: Path, recipes: list[str]
    ) -> None:
        self.measured(tmp_path, [recipes[0], "--only", "ceilings,recipes"])
        earlier = tmp_path / "earlier.json"
        (tmp_path / "results.json").rename(earlier)
        content, family = self.measured(tmp_path, [*recipes, "--only", "recipes,energy", "--earlier", str(earlier)])
        assert family.jobs == ["machine", "one", "two"]
        assert content["ceilings"] == CEILINGS
        assert [(one["name"], one["energy_asked"]) for one in content["recipes"]] == [("one", True), ("two", True)]
        with pytest.raises(ArtifactError) as refused:
            self.measured(tmp_path, [*recipes, "--earlier", str(earlier)], machine={"gpu": {"missing": "no"}})
        assert refused.value.message == (
            f"{earlier}: measured on NVIDIA Test; no GPU was expected, which is here. Results of two machines do not "
            "mix."
        )

    def test_a_file_that_cannot_be_written_is_an_error(self, tmp_path: Path, recipes: list[str]) -> None:
        path = tmp_path / "none" / "results.json"
        with pytest.raises(ArtifactError) as refused:
            results.Report(path, "x").save()
        assert refused.value.message == (
            f"{path}: cannot write: No such file or directory. Choose a folder that you may write to."
        )


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "why"),
        [
            (
                ["--only", "rtx,bogus"],
                "--only: found 'bogus'; some of rtx, ceilings, recipes, energy were expected. Correct it.",
            ),
            (["--only", "energy"], "--only: found 'energy' without 'recipes', whose candidates it is about. Add it."),
            (["none.toml"], "none.toml: no such file; a recipe (TOML) was expected. Correct the path."),
        ],
    )
    def test_mistakes_are_found_before_anything_is_measured(
        self, arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(RecipeError) as refused:
            main.options(arguments)
        assert refused.value.message == why
        assert main.main(arguments) == 2
        assert capsys.readouterr().err == why + "\n"

    def test_the_reference_recipes_are_the_default(self) -> None:
        assert [path.name for path in main.options([]).recipes] == ["digits.toml", "minilm.toml", "resnet50.toml"]

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            (None, "cannot be read: No such file or directory. Give a file that this command wrote."),
            ("{", "not JSON; a result of gpu_report was expected. Measure again."),
            ("[]", "found schema list; 1 was expected. Measure again with this version."),
            ('{"schema": 2}', "found schema 2; 1 was expected. Measure again with this version."),
        ],
    )
    def test_a_file_that_is_no_result_is_refused(
        self, text: str | None, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "results.json"
        if text is not None:
            path.write_text(text)
        assert main.main(["--render", str(path)]) == 9
        assert capsys.readouterr().err == f"{path}: {why}\n"


TORCH = """\
from types import SimpleNamespace

__version__ = "2.11"
cuda = SimpleNamespace(is_available=lambda: False)
version = SimpleNamespace(cuda=None)
"""
"""A torch without CUDA, as far as it is asked; `tests.gpu.test_machine` asks the one that is installed."""


def run(tmp_path: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """The command, started as a user would start it, in a folder of his; what it can import from ``more`` comes first."""
    command = [str(children.ROOT / "scripts/gpu_report"), *arguments]
    env = {**os.environ, "PYTHON": python, "PYTHONPATH": str(tmp_path / "more")}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU, and this is about there being none")
class TestHere:
    """The command itself, on a machine without a GPU."""

    def test_it_ends_well_and_names_every_part_as_missing(self, line: Path, tmp_path: Path) -> None:
        (tmp_path / "more").mkdir()
        (tmp_path / "more/torch.py").write_text(TORCH)
        done = run(tmp_path, line.name, "--output", "results.json")
        assert (done.returncode, done.stderr) == (0, "")
        content = json.loads((tmp_path / "results.json").read_bytes())
        reasons = {entry["part"]: entry["reason"] for entry in content["missing"]}
        assert reasons.keys() >= {"machine / gpu", "rtx / tensorrt_rtx", "rtx / tensorrt"}
        without = "torch 2.11 is built without CUDA"
        for part in ("machine / cuda", *(f"recipes / line / {name}" for name in ("latency", "energy", "roofline"))):
            assert reasons[part] == without
        assert reasons["ceilings"].startswith(f"{without}; ")
        assert all(reasons.values())
        assert content["finished"] is not None
        assert done.stdout.endswith(f"results.json: {len(content['missing'])} things missing\n")
        rendered = run(tmp_path, "--render", "results.json")
        assert (rendered.returncode, rendered.stderr) == (0, "")
        assert rendered.stdout.startswith("# GPU report: no GPU\n")

    def test_it_runs_without_any_package(self, line: Path, tmp_path: Path) -> None:
        venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
        bare = str(tmp_path / "bare/bin/python")
        done = run(tmp_path, line.name, "--output", "results.json", python=bare)
        assert (done.returncode, done.stderr) == (0, "")
        content = json.loads((tmp_path / "results.json").read_bytes())
        assert content["recipes"][0]["latency"]["missing"] == (
            "not installed, and needed for a recipe: numpy, msgspec, tomli, torch, onnx, onnx_ir, safetensors"
        )
        absent = "{0} cannot be imported: ModuleNotFoundError: No module named '{1}'"
        assert content["ceilings"]["missing"] == "; ".join(
            (absent.format("torch", "torch"), absent.format("cuda.bindings.runtime", "cuda"))
        )
        assert content["rtx"]["answer"] == "\n".join(
            f"{name}: no: import: ModuleNotFoundError: No module named '{name}'" for name in rtx.FLAVOURS
        )
        assert {name for name, found in content["machine"]["packages"].items() if isinstance(found, str)} == set()
        rendered = run(tmp_path, "--render", "results.json", python=bare)
        assert (rendered.returncode, rendered.stderr) == (
            2,
            "--render needs a package that is not installed: No module named 'msgspec'. Install it.\n",
        )

    def test_nvidia_s_own_builder_makes_the_tiny_engine_and_no_gpu_is_why_it_does_not_load(self) -> None:
        if importlib.util.find_spec("tensorrt_rtx") is None:
            pytest.skip("TensorRT for RTX is not installed")
        found: list[Any] = []
        assert children.run_child({"part": "rtx", "flavour": "tensorrt_rtx"}, 60, found.append) is None
        assert [step["step"] for step in found[-1]["steps"]] == ["import", "build", "open the runtime", "load"]
        assert found[-1]["plan_bytes"] > 1000
        assert found[-1]["missing"].startswith("load: deserialize_cuda_engine() returned nothing; ")
