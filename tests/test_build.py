"""The main job from the command line, as a user meets it: verdicts, exit codes, reruns, interruptions, bad model files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import compiler
from compiler import codec, source
from compiler import recipe as recipes
from compiler.errors import GateFailedError
from compiler.pipeline import plan as plans
from compiler.pipeline import run, session
from compiler.pipeline.store import Store
from compiler.spec import OnnxModel
from tests.conftest import Workshop

Change = Callable[[str, str, str], None]


def test_a_recipe_becomes_a_verified_engine_that_runs_without_pytorch(workshop: Workshop) -> None:
    done = workshop.run("points.toml")
    assert done.returncode == 0, done.stderr
    assert re.search(r"int8 +0\.0\d +top1 [01]\.\d+ +drop -?0\.\d+ \[-?0\.\d+, 0\.\d+\] +1 +0\.\d+", done.stderr)
    assert "pass: dist/points" in done.stderr
    report = workshop.report()
    assert report["outcome"] == "pass"
    assert [engine["name"] for engine in report["engines"]] == ["fp32", "int8"]
    assert all(score["samples"] == 600 for engine in report["engines"] for score in engine["scores"])
    assert report["data"]["calibration"]["samples"] == 64

    runner = compiler.load(workshop.folder / "dist/points", engine="int8")
    assert runner.run({"x": np.zeros((3, 16), np.float32)})["logits"].shape == (3, 10)


def test_an_unchanged_rerun_only_checks_and_a_changed_gate_only_judges(workshop: Workshop) -> None:
    workshop.run("points.toml")
    again = workshop.run("points.toml")
    assert again.returncode == 0
    assert "unchanged since" in again.stderr
    assert "from the store" not in again.stderr
    stricter = workshop.run("points.toml", "--set", "gates.0.max_drop=0.09")
    assert stricter.returncode == 0
    assert stricter.stderr.count("from the store") == len(workshop.report()["steps"]) == 12


def test_only_what_depends_on_a_changed_key_is_run_again(workshop: Workshop) -> None:
    workshop.run("points.toml")

    def missed(*changes: str) -> set[str]:
        arguments = [argument for change in changes for argument in ("--set", change)]
        shown = workshop.run("points.toml", "--plan", *arguments)
        assert shown.returncode == 0, shown.stderr
        return {line.split()[0] for line in shown.stdout.splitlines() if " miss " in line}

    int8 = {"quantize:int8", "explain:int8", "build:int8", "accuracy:int8", "latency"}
    everything = {"data", "export", "reference", "optimize", "observe", "build:fp32", "accuracy:fp32"} | int8
    assert missed() == set()
    assert missed("gates.0.max_drop=0.5", "gates.0.confidence=0.9") == set()
    assert missed("quantize.method=minmax") == int8
    assert missed("quantize.percentile=99.0") == set()
    assert missed("quantize.method=percentile", "quantize.percentile=99.0") == int8
    assert missed("quantize.activations=symmetric") == int8
    assert missed("quantize.equalize=off") == int8
    assert missed("quantize.attention=on") == int8 | {"observe"}
    assert missed("quantize.activations=asymmetric") == set(), "what it is anyway, on this back end"
    assert missed("engines.1.keep=['*first*']") == int8
    assert missed("latency.blocks=6") == {"latency"}
    assert missed("quantize.samples=32") == everything - {"export", "optimize", "build:fp32"}
    assert missed("export.rtol=0.01") >= {"export", "optimize", "build:fp32"}
    assert missed("axes.batch.max=32") == everything
    (workshop.folder / "points.py").write_text((workshop.folder / "points.py").read_text() + "\n# changed\n")
    assert missed() == everything


def test_the_users_data_is_read_once_and_stored(workshop: Workshop, change: Change) -> None:
    asked = workshop.folder / "asked"
    change(
        "points.py",
        '    yield {"x": points(1, 64)}',
        f'''    open("{asked}", "a").write("calibration ")
    yield {{"x": points(1, 64)}}''',
    )
    change(
        "points.py",
        "    x = points(2, 600)",
        f'''    open("{asked}", "a").write("validation ")
    x = points(2, 600)''',
    )
    assert workshop.run("points.toml").returncode == 0
    assert asked.read_text().split() == ["calibration", "validation"]


def test_a_comment_in_the_recipe_changes_nothing(workshop: Workshop, change: Change) -> None:
    workshop.run("points.toml")
    change("points.toml", "[model]\n", "# a comment\n\n[ model ]\n")
    assert "unchanged since" in workshop.run("points.toml").stderr


def test_a_missed_gate_exits_8_and_leaves_the_last_good_artifact(workshop: Workshop) -> None:
    assert workshop.run("points.toml").returncode == 0
    good = (workshop.folder / "dist/points/manifest.json").read_bytes()
    missed = workshop.run(
        "points.toml", "--set", "gates.0.metric=cosine", "--set", "gates.0.min=1.5", "--set", "gates.0.max_drop=nan"
    )
    assert missed.returncode == 2
    strict = workshop.folder / "strict.toml"
    strict.write_text(
        (workshop.folder / "points.toml").read_text() + '\n[[gates]]\nmetric = "sqnr_db"\nengine = "int8"\nmin = 90\n'
    )
    missed = workshop.run("strict.toml")
    assert missed.returncode == 8
    assert "fail: int8:" in missed.stderr
    assert "fail: dist/points.rejected (dist/points is left as it was)" in missed.stderr
    assert (workshop.folder / "dist/points/manifest.json").read_bytes() == good
    assert workshop.report("dist/points.rejected")["outcome"] == "fail"
    assert "sqnr_db" in (workshop.folder / "dist/points.rejected/report.md").read_text()
    again = workshop.run("strict.toml")
    assert (again.returncode, "unchanged since" in again.stderr) == (8, True)


def _plant(workshop: Workshop, arguments: list[str], step: str, break_it: Callable[[Path], None]) -> None:
    """Put a broken model in the place of what a step left in the store, as if the step itself had made it."""
    recipe = recipes.load(workshop.folder / "points.toml", arguments[1::2])
    plan = plans.make(recipe, source.locate(recipe, workshop.folder), machine=session.machine())
    key = plan.step(step).key
    with Store.open(workshop.store) as store:
        kept = store.lookup(key)
        assert kept is not None
        aside = workshop.folder / "aside"
        shutil.copytree(kept, aside)
        (aside / "entry.json").unlink()
        for spoilt in (step, "build:int8", "accuracy:int8", "latency"):
            store.discard(plan.step(spoilt).key)
        with store.fill(key) as filling:
            shutil.copytree(aside, filling.folder, dirs_exist_ok=True)
            model = codec.load((filling.folder / "result.json").read_bytes(), OnnxModel, filling.folder)
            break_it(model.path)
            broken = replace(model, sha256=hashlib.sha256(model.path.read_bytes()).hexdigest())
            (filling.folder / "result.json").write_bytes(codec.dump(broken, filling.folder))


@pytest.mark.parametrize("factor", [8.0, 0.125])
def test_a_scale_that_is_off_by_8_exits_8(workshop: Workshop, factor: float, tmp_path: Path) -> None:
    workshop.store = tmp_path / "store"  # the fault must not reach another test
    arguments = ["--set", "gates=[{metric = 'sqnr_db', min = 15.0}]"]
    sound = workshop.run("points.toml", *arguments)
    assert sound.returncode == 0, sound.stderr

    def break_it(path: Path) -> None:
        model = onnx.load(path)
        rounded = {node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
        back = next(
            node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in rounded
        )
        scale = next(tensor for tensor in model.graph.initializer if tensor.name == back.input[1])
        wrong = numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(factor), "wrong")
        model.graph.initializer.append(wrong)
        back.input[1] = "wrong"
        onnx.save(model, path)

    _plant(workshop, arguments, "quantize:int8", break_it)
    shutil.rmtree(workshop.folder / "dist")
    done = workshop.run("points.toml", *arguments)
    assert done.returncode == 8, done.stderr
    assert "= convert int8" in done.stderr
    assert "✓ build int8" in done.stderr
    assert re.search(r"fail: int8: mean -?[\d.]+ over 600 samples, .* limit 15", done.stderr)


def test_too_few_samples_for_a_gate_exit_10_and_say_how_many_would_do(workshop: Workshop) -> None:
    few = workshop.run("points.toml", "--set", "data.validation_samples=100", "--set", "gates.0.max_drop=0.01")
    assert few.returncode == 10
    needed = re.search(r"inconclusive: fp32: lost 0, gained 0 of 100: .*; (\d+) samples would decide", few.stderr)
    assert needed is not None, few.stderr
    assert int(needed[1]) == 2705  # 100 samples without a flip allow a share of flips of 3 %
    assert workshop.report("dist/points.rejected")["outcome"] == "inconclusive"


def test_json_goes_to_standard_output_alone(workshop: Workshop) -> None:
    done = workshop.run("points.toml", "--json")
    assert json.loads(done.stdout)["name"] == "points"
    assert workshop.run("points.toml", "--json").stdout == done.stdout


def test_verify_finds_one_flipped_bit_and_validates_again_on_request(workshop: Workshop) -> None:
    assert workshop.run("points.toml").returncode == 0
    clean = workshop.run("verify", "dist/points")
    assert clean.returncode == 0
    assert re.search(r"dist/points: \d+ files, every byte as written", clean.stdout)
    again = workshop.run("verify", "dist/points", "--recipe", "points.toml")
    assert again.returncode == 0, again.stderr
    assert "pass: int8: top1 drop <= 0.1 (95%)" in again.stdout
    engine = workshop.folder / "dist/points/engines/int8/engine.onnx"
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)
    broken = workshop.run("verify", "dist/points")
    assert broken.returncode == 9
    assert "engines/int8/engine.onnx" in broken.stderr
    assert "Traceback" not in broken.stderr


def test_a_model_file_that_raises_is_one_sentence_with_its_line(workshop: Workshop, change: Change) -> None:
    change("points.py", "    return Points()", "    raise ValueError('no weights today')")
    done = workshop.run("points.toml")
    assert done.returncode == 3
    line = next(
        n for n, text in enumerate((workshop.folder / "points.py").read_text().splitlines(), 1) if "today" in text
    )
    assert f"points.py:{line}: build() raised ValueError: no weights today." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", 5, r"error: step data: the child process was killed by SIGSEGV\. Its log is .*, ending in:"),
        ("os.abort()", 5, r"error: step data: the child process was killed by SIGABRT\. Its log is "),
        ("os.kill(os.getpid(), signal.SIGKILL)", 5, r"was killed by SIGKILL\. Memory may have run out: use fewer samples or a smaller axis\."),
        ("os._exit(0)", 5, r"error: step data: the child process ended with code 0 and no result\."),
        ("sys.exit(3)", 5, r"points\.py:\d+: calibration\(\) raised SystemExit: 3\."),
        ("print('x' * 100_000_000) or os.abort()", 5, r"killed by SIGABRT"),
    ],
    ids=["segfault", "abort", "killed", "silent exit", "sys.exit", "chatter"],
)  # fmt: skip
def test_a_child_that_dies_is_one_failed_step(
    workshop: Workshop, change: Change, fault: str, code: int, said: str
) -> None:
    change("points.py", "import numpy as np", "import numpy as np, os, signal, sys")
    change("points.py", '    yield {"x": points(1, 64)}', f'    {fault}\n    yield {{"x": points(1, 64)}}')
    done = workshop.run("points.toml", env={"BUILD_ENGINE_CACHE": str(workshop.folder / "store")})
    assert done.returncode == code, done.stderr
    assert re.search(said, done.stderr)
    assert "Traceback" not in done.stderr.partition("ending in:")[0]
    assert len(done.stderr) < 5_000


def _start(workshop: Workshop, *args: str, store: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "compiler.cli", *args],
        cwd=workshop.folder,
        env={**os.environ, "BUILD_ENGINE_CACHE": str(store), "COLUMNS": "200"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A test run in the background ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _children(pid: int) -> list[int]:
    done = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_build_leaves_no_child_and_no_artifact_and_goes_on(
    workshop: Workshop, change: Change, how: signal.Signals, code: int, tmp_path: Path
) -> None:
    change(
        "points.py",
        "    x = points(2, 600)",
        "    import time; time.sleep(float(open('pause').read()))\n    x = points(2, 600)",
    )
    (workshop.folder / "pause").write_text("60")
    store = tmp_path / "store"
    running = _start(workshop, "points.toml", store=store)
    deadline = time.monotonic() + 60
    while not (children := _children(running.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    running.send_signal(how)
    _, said = running.communicate(timeout=30)
    assert running.returncode == code
    if code == 130:
        assert "build-engine: interrupted; finished steps are kept, run again to go on." in said
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert not (workshop.folder / "dist").exists()
    (workshop.folder / "pause").write_text("0")
    again = workshop.run("points.toml", env={"BUILD_ENGINE_CACHE": str(store)})
    assert again.returncode == 0, again.stderr
    assert not list((store / "tmp").iterdir())


def test_two_builds_at_once_run_each_step_once(workshop: Workshop, tmp_path: Path) -> None:
    store = tmp_path / "store"
    builds = [_start(workshop, "points.toml", "--output", f"out{n}", store=store) for n in (1, 2)]
    said = [build.communicate(timeout=240)[1] for build in builds]
    assert [build.returncode for build in builds] == [0, 0], said
    assert sum(text.count("from the store") for text in said) == 12
    shutil.rmtree(store)


def test_options_that_make_no_sense_are_one_sentence(workshop: Workshop) -> None:
    assert (
        "error: nowhere.toml: no such file. Write one with 'build-engine init model.py'."
        in workshop.run("nowhere.toml").stderr
    )
    assert "No such option '--plam'" in workshop.run("points.toml", "--plam").stderr
    assert workshop.run("points.toml", "--plam").returncode == 2
    nothing = workshop.run("verify", "dist/nothing")
    assert nothing.returncode == 9
    assert "Traceback" not in nothing.stderr


def test_init_writes_a_recipe_that_builds(workshop: Workshop) -> None:
    (workshop.folder / "points.toml").unlink()
    done = workshop.run("init", "points.py")
    assert done.returncode == 0, done.stderr
    assert (workshop.folder / "points.toml").read_text() == (
        'name = "points"\n\n[model]\nsource = "points.py"\n# weights = "weights.safetensors"\n\n'
        '[model.inputs.x]\ndtype = "float32"\nshape = ["batch", 16]\n\n'
        "[axes]\nbatch = { min = 1, opt = 8, max = 64 }\n\n"
        '[[engines]]\nprecision = "fp32"\n\n[[engines]]\nprecision = "int8"\n\n[[gates]]\nmetric = "top1"\nmax_drop = 0.01\n'
    )
    assert workshop.run("points.toml", "--plan").returncode == 0
    again = workshop.run("init", "points.py")
    assert again.returncode == 2
    assert "error: points.toml: exists already. Choose another file with --output." in again.stderr


def test_doctor_says_what_is_there(workshop: Workshop) -> None:
    done = workshop.run("doctor")
    assert done.returncode == 0
    assert "✓ onnxruntime" in done.stdout
    assert "✗ tensorrt" in done.stdout
    assert str(workshop.store) in done.stdout


def test_keep_going_finishes_the_other_engines(workshop: Workshop, change: Change) -> None:
    change("points.toml", 'precision = "int8"\n', 'precision = "int8"\nkeep = ["nothing-like-this*"]\n')
    stopped = workshop.run("points.toml")
    assert stopped.returncode == 2
    assert (
        "error: keep: 'nothing-like-this*' matches no node and no tensor of the model; the nearest names are "
        in stopped.stderr
    )
    assert not (workshop.folder / "dist").exists()
    went_on = workshop.run("points.toml", "--keep-going")
    assert went_on.returncode == 2
    assert "failed: int8: keep: 'nothing-like-this*' matches no node" in went_on.stderr
    report = workshop.report("dist/points.rejected")
    assert [engine["name"] for engine in report["engines"]] == ["fp32"]
    assert [failure["engine"] for failure in report["failures"]] == ["int8"]
    assert workshop.run("points.toml").returncode == 2, "what was kept going must not pass for the whole"


def test_a_backend_that_is_not_there_is_named_before_anything_runs(workshop: Workshop, change: Change) -> None:
    change("points.toml", 'precision = "int8"\n', 'precision = "int8"\nbackend = "tensorrt"\n')
    done = workshop.run("points.toml")
    assert done.returncode == 6
    assert done.stderr.startswith("error: engine 'int8': backend 'tensorrt': ")
    assert done.stderr.count("\n") == 1


def test_a_full_disk_is_one_sentence_and_a_rerun_is_clean(workshop: Workshop, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    command = f"mount -t tmpfs -o size=120k none '{small}' && exec '{sys.executable}' -m compiler.cli points.toml"
    mounted = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size=120k none '{small}'"], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no private mounts here: {mounted.stderr.decode().strip()}")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command],
        cwd=workshop.folder, env={**os.environ, "BUILD_ENGINE_CACHE": str(small / "store")}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 9, done.stderr
    assert re.search(r"error: .*: the disk is full \(0 MiB free\)\. Free some space and run again\.", done.stderr)
    assert not (workshop.folder / "dist").exists()


def test_a_step_that_fails_by_our_own_mistake_says_so(workshop: Workshop) -> None:
    step = plans.Step(id="optimize", stage="optimize", key="", needs={})
    log = workshop.write("log", "Traceback\n")
    error = run._failure(step, 1, {"error": None, "message": "KeyError: 'x'"}, log)
    assert isinstance(error, run.StepBugError)
    assert str(error) == f"step optimize: KeyError: 'x'; its log is {log}"


def test_a_latency_gate_decides_on_the_measured_ratio(workshop: Workshop, change: Change) -> None:
    change(
        "points.toml",
        'metric = "top1"\nmax_drop = 0.1',
        'metric = "speedup_p50"\nmin = 1000\n\n[[gates]]\nmetric = "size_ratio"\nengine = "int8"\nmax = 10',
    )
    done = workshop.run("points.toml")
    assert done.returncode == 8
    assert re.search(r"fail: fp32: [\d.]+x as fast as eager over \d+ blocks, .* limit 1000", done.stderr)
    report = workshop.report("dist/points.rejected")
    taken = [entry for entry in report["latency"]["latencies"] if entry["candidate"] == "fp32"]
    assert all(len(entry["samples_s"]) == len(entry["block_of"]) > 0 for entry in taken)
    with pytest.raises(GateFailedError, match="no engine passed its gates"):
        compiler.load(workshop.folder / "dist/points.rejected")


def test_the_manifest_holds_everything_that_identifies_the_run(workshop: Workshop) -> None:
    assert workshop.run("points.toml").returncode == 0
    manifest = json.loads((workshop.folder / "dist/points/manifest.json").read_bytes())
    assert manifest["schema"] == 1
    assert {"engines/int8/engine.onnx", "recipe.json", "report.md", "report.json"} <= manifest["files"].keys()
    for name, record in manifest["files"].items():
        content = (workshop.folder / "dist/points" / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (record["sha256"], record["size"])
    assert manifest["calibration"]["samples"] == 64
    assert manifest["validation"]["samples"] == 600
    assert (
        manifest["platform"]["packages"].keys() >= {"onnxruntime-gpu"}
        or "onnxruntime" in manifest["platform"]["packages"]
    )
    engine = manifest["engines"][1]
    assert engine["precision"] == "int8"
    assert engine["inputs"] == [{"dtype": "float32", "name": "x", "shape": ["batch", 16]}]
    assert engine["axes"] == {"batch": {"max": 64, "min": 1, "opt": 8}}
    assert [verdict["outcome"] for verdict in manifest["verdicts"]] == ["pass", "pass"]
    assert all(scores["engine_sha256"] for scores in manifest["scores"])


def test_a_newer_failure_is_not_hidden_by_an_older_pass(workshop: Workshop) -> None:
    assert workshop.run("points.toml").returncode == 0
    shutil.copytree(workshop.folder / "dist/points", workshop.folder / "dist/points.rejected")
    rejected = workshop.folder / "dist/points.rejected/report.json"
    content = json.loads(rejected.read_bytes())
    rejected.write_text(json.dumps(content | {"finished": "9999-01-01T00:00:00.000+00:00", "outcome": "inconclusive"}))
    again = workshop.run("points.toml")
    assert "unchanged since" not in again.stderr
    assert "✓ time" in again.stderr


def test_a_reader_that_goes_away_costs_neither_the_artifact_nor_the_exit_code(
    workshop: Workshop, change: Change
) -> None:
    change("points.toml", 'metric = "top1"\nmax_drop = 0.1', 'metric = "sqnr_db"\nengine = "int8"\nmin = 90')
    command = f"'{sys.executable}' -m compiler.cli points.toml --json | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=workshop.folder, env={**os.environ, "BUILD_ENGINE_CACHE": str(workshop.store)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 8, done.stderr
    assert workshop.report("dist/points.rejected")["outcome"] == "fail"


def test_a_gate_on_the_value_itself_shows_no_drop(workshop: Workshop, change: Change) -> None:
    change("points.toml", "max_drop = 0.1", "min = 0.5")
    done = workshop.run("points.toml")
    assert done.returncode == 0, done.stderr
    assert re.search(r"fp32 +0\.0\d +top1 1\.0000 +\[0\.99\d+, 1\.0000\]", done.stderr)


def test_brackets_in_a_path_are_printed_as_they_are(workshop: Workshop) -> None:
    done = workshop.run("points.toml", "--output", "out[v2][/x]")
    assert done.returncode == 0, done.stderr
    assert "pass: out[v2][/x]/points" in done.stderr


def test_init_needs_a_folder_that_exists(workshop: Workshop) -> None:
    done = workshop.run("init", "points.py", "--output", "nowhere/points.toml")
    assert done.returncode == 9
    assert "error: nowhere/points.toml: cannot write: No such file or directory." in done.stderr


def test_the_traceback_of_user_code_is_where_the_message_says(workshop: Workshop, change: Change) -> None:
    change("points.py", "    return Points()", "    raise ValueError('no weights today')")
    for cached in ((), ("--no-cache",)):
        done = workshop.run("points.toml", *cached)
        log = re.search(r"the full traceback is in (.*\.log)\.", done.stderr)
        assert log is not None, done.stderr
        assert "ValueError: no weights today" in Path(log[1]).read_text()


def test_an_engine_may_be_renamed(workshop: Workshop) -> None:
    for name in ("first", "second"):
        engines = f'[{{precision = "fp32", name = "{name}"}}]'
        assert workshop.run("points.toml", "--set", f"engines={engines}").returncode == 0
        assert [engine["name"] for engine in workshop.report()["engines"]] == [name]


# --- explain --------------------------------------------------------------------------------------------------------


def test_explain_answers_from_the_artifact_alone(workshop: Workshop) -> None:
    assert workshop.run("points.toml").returncode == 0
    for name in ("points.py", "points.toml"):
        (workshop.folder / name).unlink()
    done = workshop.run("explain", "dist/points", env={"BUILD_ENGINE_CACHE": str(workshop.folder / "none")})
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"int8: SQNR against FP32 on 8 calibration samples: logits \d+\.\d dB\n", done.stdout)
    assert re.search(
        r"^x +input +\d+\.\d % +\d+\.\d +\d+\.\d .*  its own rounding, in steps of 0\.0\d+ *$", done.stdout, re.M
    )
    assert re.search(r"^1\. .*: about \+\d+\.\d dB$", done.stdout, re.M)
    assert max(len(line.rstrip()) for line in done.stdout.splitlines() if not line.startswith("     ")) <= 110
    as_json = json.loads(workshop.run("explain", "dist/points", "--engine", "int8", "--json").stdout)
    (found,) = as_json["engines"]
    assert (found["engine"], found["precision"], found["failure"]) == ("int8", "int8", "")
    assert sum(tensor["share"] for tensor in found["tensors"]) == pytest.approx(1)
    assert not (workshop.folder / "none").exists()


def test_explain_says_in_one_sentence_what_it_cannot_explain(workshop: Workshop) -> None:
    assert workshop.run("points.toml").returncode == 0
    unknown = workshop.run("explain", "dist/points", "--engine", "int9")
    assert (unknown.returncode, unknown.stderr) == (
        2,
        "error: --engine int9: no explanation of such an engine in dist/points; did you mean 'int8'?\n",
    )
    unquantised = workshop.run("explain", "dist/points", "--engine", "fp32")
    assert (unquantised.returncode, unquantised.stderr) == (
        2,
        "error: --engine fp32: no explanation of such an engine in dist/points; expected one of int8.\n",
    )
    nothing = workshop.run("explain", "dist/nothing")
    assert nothing.returncode == 9
    assert nothing.stderr == (
        "error: dist/nothing: no such file or directory; an artifact (dist/<name>) was expected. Build one first.\n"
    )
    engine = workshop.folder / "dist/points/engines/int8/engine.onnx"
    engine.write_bytes(engine.read_bytes()[:-1] + b"!")
    tampered = workshop.run("explain", "dist/points")
    assert tampered.returncode == 9
    assert "engines/int8/engine.onnx: found SHA-256 " in tampered.stderr
    assert (
        "not what was built. Do not use it: copy it again from where it was built, or build it again."
        in tampered.stderr
    )
    assert workshop.run("points.toml", "--set", "engines=[{precision = 'fp32'}]").returncode == 0
    without = workshop.run("explain", "dist/points")
    assert without.returncode == 9
    assert re.fullmatch(
        r"error: .*dist/points: no explanation in it \(engines: 'fp32' fp32\); that of an int8, fp8 or int4 engine was "
        r"expected\. Build one, with this version of build-engine\.\n",
        without.stderr,
    )


def test_an_engine_whose_rest_is_in_bf16_is_explained(workshop: Workshop, change: Change) -> None:
    change("points.toml", 'precision = "int8"\n', 'precision = "int8"\nrest = "bf16"\nkeep = ["*second*"]\n')
    done = workshop.run("points.toml", "--set", "quantize.smooth=off")
    if done.returncode == 2:
        pytest.skip(done.stderr)
    assert workshop.run("explain", "dist/points").stdout.startswith(
        "int8: SQNR against FP32 on 8 calibration samples: "
    )


def test_a_missed_gate_says_where_to_look(workshop: Workshop) -> None:
    done = workshop.run("points.toml", "--set", "gates=[{metric = 'sqnr_db', engine = 'int8', min = 90}]")
    assert done.returncode == 8
    told = "Where the error of a quantised engine comes from: build-engine explain dist/points.rejected"
    assert told in done.stderr.splitlines()
    assert workshop.run("explain", "dist/points.rejected").returncode == 0


# --- search ---------------------------------------------------------------------------------------------------------


def test_the_chosen_point_is_made_again_from_the_manifest_alone(workshop: Workshop, change: Change) -> None:
    """By its precision and its keep, without [search]: the same quantised file, bit by bit."""
    asked = workshop.folder / "asked"
    selection = f"""def selection():
    open("{asked}", "a").write("selection ")
    yield {{"x": points(3, 128)}}


"""
    change("points.py", "def validation():", f"{selection}def validation():")
    # A limit that INT8 everywhere misses and INT8 in one of the two layers meets.
    searched = workshop.folder / "searched.toml"
    searched.write_text(
        (workshop.folder / "points.toml").read_text()
        + '\n[search]\nobjective = "size"\nminutes = 1\n\n[[search.budget]]\nmetric = "sqnr_db"\nmin = 39.2\n'
    )
    done = workshop.run("searched.toml")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((workshop.folder / "dist/points/manifest.json").read_bytes())
    (search,) = manifest["searches"]
    point = search["points"][search["chosen"]]
    assert (point["precision"], point["kept_layers"], point["layers"]) == ("int8", 1, 2)
    assert "search for int8" in done.stderr
    assert re.search(rf"^ +{search['chosen']} +int8 +1 of 2 .* chosen, within the budget", done.stderr, re.M)
    assert workshop.report()["searches"][0]["points"][search["chosen"]]["keep"] == point["keep"]
    text = (workshop.folder / "dist/points/report.md").read_text()
    assert "## Search for int8" in text
    assert (
        f"on {search['samples']} samples, SHA-256 {search['data_sha256']}, which neither calibrate nor judge." in text
    )
    first = next(engine for engine in manifest["engines"] if engine["name"] == "int8")

    verified = workshop.run(
        *("verify", "dist/points", "--recipe", "searched.toml"),
        env={"BUILD_ENGINE_CACHE": str(workshop.folder / "else")},
    )
    assert verified.returncode == 0, verified.stderr
    assert asked.read_text().split() == ["selection"], "what chose is not asked again to verify"

    engines = f"[{{precision = 'fp32'}}, {{precision = 'int8', keep = {json.dumps(point['keep'])}}}]"
    again = workshop.run("points.toml", "--set", f"engines={engines}")
    assert again.returncode == 0, again.stderr
    manifest = json.loads((workshop.folder / "dist/points/manifest.json").read_bytes())
    second = next(engine for engine in manifest["engines"] if engine["name"] == "int8")
    assert manifest["searches"] == []
    assert second["model_sha256"] == first["model_sha256"]
    assert second["sha256"] == first["sha256"]
