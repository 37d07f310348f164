"""TensorRT for RTX as its users meet it on a machine without a GPU, and builders that hang, crash and eat memory."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from compiler import backends
from tests.conftest import Workshop

NOT_RUN = (
    "not run here: no NVIDIA GPU was found on this machine (nvidia-smi lists none); its accuracy is that of the same ONNX "
    "file in onnxruntime"
)


@pytest.fixture(autouse=True)
def builder_without_gpu() -> None:
    backend = backends.get("tensorrt_rtx")
    if reason := backend.unavailable():
        pytest.skip(reason)
    if backend.cannot_run() is None:
        pytest.skip("there is a GPU: nothing needs to stand in")


def rtx(workshop: Workshop, *args: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    done = workshop.run("points.toml", "--set", "engines.backend=tensorrt_rtx", *args, env=env)
    return done.returncode, done.stderr


def test_an_engine_that_cannot_run_here_is_not_called_proved(workshop: Workshop) -> None:
    code, said = rtx(workshop)
    assert code == 10
    assert f"inconclusive: fp32: {NOT_RUN}\n" in said
    assert "To leave that to the target and pass here: [tensorrt] ahead_of_time = true\n" in said
    assert f"\ninconclusive: {Path('dist/points.rejected')} ({Path('dist/points')} is left as it was)\n" in said, said


def test_ahead_of_time_the_rest_is_left_to_the_target(workshop: Workshop) -> None:
    code, said = rtx(workshop, "--set", "tensorrt.ahead_of_time=true")
    assert code == 0
    assert f"deferred: int8: {NOT_RUN}\n" in said
    assert "To complete the evidence, on the target: build-engine verify dist/points --recipe RECIPE\n" in said
    content = workshop.report()
    assert content["outcome"] == "deferred"
    fp32, int8 = content["engines"]
    for engine in (fp32, int8):
        assert engine["backend"] == "tensorrt_rtx"
        assert engine["stand_in"]["backend"] == "onnxruntime"
        assert engine["speeds"] == []
        assert engine["proof"]["as_asked"] == engine["proof"]["layers"] == 2
        (accuracy,) = (gate for gate in engine["gates"] if gate["metric"] == "top1")
        assert accuracy["outcome"] == "pass"
        assert accuracy["reason"].endswith("(the same ONNX file in onnxruntime)")
    assert int8["proof"]["by_precision"] == {"int8": 2}
    page = (workshop.folder / "dist" / "points" / "report.md").read_text()
    assert page.count("NOT RUN HERE: no NVIDIA GPU was found") == 2
    again, said = rtx(workshop, "--set", "tensorrt.ahead_of_time=true")
    assert (again, "unchanged since" in said) == (0, True)


def test_a_missed_gate_fails_an_engine_that_cannot_run_here(workshop: Workshop) -> None:
    gates = '[{metric = "size_mib", max = 0.000001}]'
    code, said = rtx(workshop, "--set", "tensorrt.ahead_of_time=true", "--set", f"gates={gates}")
    assert code == 8
    assert "\nfail: int8: " in said


def test_a_gate_on_latency_is_left_to_the_target_and_never_passed(workshop: Workshop) -> None:
    gates = '[{metric = "speedup_p50", min = 0.001}]'
    code, said = rtx(workshop, "--set", f"gates={gates}")
    assert code == 10
    assert "inconclusive: int8: not timed: 'int8' was not run here\n" in said


def test_one_engine_runs_and_the_other_cannot(workshop: Workshop) -> None:
    done = workshop.run(
        "points.toml", "--set", "engines.0.backend=tensorrt_rtx", "--set", "tensorrt.ahead_of_time=true"
    )
    assert done.returncode == 0
    fp32, int8 = workshop.report()["engines"]
    assert (fp32["outcome"], int8["outcome"]) == ("deferred", "pass")
    assert (fp32["speeds"], len(int8["speeds"])) == ([], 1)


def test_such_an_artifact_is_verified_on_its_target_only(workshop: Workshop) -> None:
    assert rtx(workshop, "--set", "tensorrt.ahead_of_time=true")[0] == 0
    assert workshop.run("verify", "dist/points").returncode == 0
    done = workshop.run("verify", "dist/points", "--recipe", "points.toml")
    assert done.returncode == 6
    assert done.stderr.endswith(
        "engine 'fp32' of tensorrt_rtx cannot run here: no NVIDIA GPU was found on this machine (nvidia-smi lists none). "
        "Verify it on its target.\n"
    )


def test_an_option_that_this_flavour_lacks_is_refused_before_anything_runs(workshop: Workshop) -> None:
    code, said = rtx(workshop, "--set", "tensorrt.optimization_level=5")
    assert code == 2
    assert said == "".join(
        f"error: [tensorrt] optimization_level: engine '{name}', backend 'tensorrt_rtx', does not take it: TensorRT for RTX "
        "chooses kernels where the engine runs, not where it is built; the plan is the same with and without.\n"
        for name in ("fp32",)
    )


def test_the_reason_for_the_back_end_names_what_is_missing(workshop: Workshop) -> None:
    assert workshop.run("points.toml").returncode == 0
    assert all(
        "tensorrt_rtx: no NVIDIA GPU was found on this machine" in engine["backend_reason"]
        for engine in workshop.report()["engines"]
    )


# --- builders that misbehave ----------------------------------------------------------------------------------------

PLANT = """\
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("real_rtx", os.environ["REAL_RTX"], submodule_search_locations=[])
real = importlib.util.module_from_spec(spec)
sys.modules["real_rtx"] = real
spec.loader.exec_module(real)
globals().update({name: value for name, value in vars(real).items() if not name.startswith("__")})
__version__ = real.__version__


class Builder(real.Builder):
    def build_serialized_network(self, network, config):
        PLANTED
"""


@pytest.fixture
def plant(workshop: Workshop, tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """The environment in which the builder runs these statements where it should build."""
    found = importlib.util.find_spec("tensorrt_rtx")
    assert found is not None
    assert found.origin is not None

    def make(statements: str) -> dict[str, str]:
        package = tmp_path / "planted" / "tensorrt_rtx"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(PLANT.replace("PLANTED", statements))
        return {
            "PYTHONPATH": f"{package.parent}:{os.environ.get('PYTHONPATH', '')}",
            "REAL_RTX": str(found.origin),
            "BUILD_ENGINE_CACHE": str(tmp_path / "own store"),
        }

    return make


def test_a_builder_that_hangs_is_ended(workshop: Workshop, plant: Callable[[str], dict[str, str]]) -> None:
    code, said = rtx(workshop, "--set", "tensorrt.limit_s=2", env=plant("time.sleep(600)"))
    assert code == 7
    assert (
        "error: step build:fp32: ended after 2 s; at most 2 s were expected ([tensorrt] limit_s). Raise the limit, or build "
        "a smaller model. Its log is "
    ) in said


def test_a_builder_that_eats_memory_is_ended(workshop: Workshop, plant: Callable[[str], dict[str, str]]) -> None:
    eats = "eaten = [bytearray(os.urandom(1 << 20) * 64) for _ in range(40) if not time.sleep(0.05)]; time.sleep(600)"
    code, said = rtx(workshop, "--set", "tensorrt.limit_mib=900", env=plant(eats))
    assert code == 7
    assert (
        "of memory in use; at most 900 were expected ([tensorrt] limit_mib). Raise the limit, or build a smaller"
        in said
    )


@pytest.mark.parametrize("signal", ["SIGSEGV", "SIGKILL"])
def test_a_builder_that_dies_is_a_failed_engine_and_the_others_go_on(
    workshop: Workshop, plant: Callable[[str], dict[str, str]], signal: str
) -> None:
    env = plant(f"import signal; os.kill(os.getpid(), signal.{signal}); time.sleep(60)")
    done = workshop.run("points.toml", "--keep-going", "--set", "engines.0.backend=tensorrt_rtx", env=env)
    assert done.returncode == 7
    assert f"failed: fp32: step build:fp32: the child process was killed by {signal}." in done.stderr
    (engine,) = workshop.report("dist/points.rejected")["engines"]
    assert (engine["name"], engine["outcome"]) == ("int8", "pass")


def test_a_builder_that_gives_up_is_told_in_its_own_words(
    workshop: Workshop, plant: Callable[[str], dict[str, str]]
) -> None:
    env = plant("self.logger.log(real.ILogger.Severity.ERROR, 'Error Code 9: out of kernels'); return None")
    code, said = rtx(workshop, env=env)
    assert code == 7
    assert (
        "error: model.onnx: NVIDIA's builder failed; an engine was expected. Build this engine with backend = "
        '"onnxruntime". Its own words: Error Code 9: out of kernels. All it said is in '
    ) in said
    log = Path(said.rpartition("All it said is in ")[2].strip().removesuffix("."))
    assert "[ERROR] Error Code 9: out of kernels\n" in log.read_text()
