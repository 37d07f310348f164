"""Children that end well, fail, crash, hang, or leave children of their own."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu import children

CHILD = """\
import json, os, signal, sys, time
job = json.loads(sys.argv[sys.argv.index("--child") + 1])
pipe = os.fdopen(int(sys.argv[sys.argv.index("--pipe") + 1]), "w")
pipe.write(json.dumps({"value": {"reached": 1}}) + "\\n")
pipe.flush()
print("words of a library", file=sys.stderr, flush=True)
"""


class TestChildren:
    def run(self, tmp_path: Path, rest: str, limit_s: float = 60.0) -> tuple[list[Any], str | None]:
        script = tmp_path / "child.py"
        script.write_text(CHILD + rest)
        values: list[Any] = []
        why = children.run_child({"part": "x"}, limit_s, values.append, command=[sys.executable, str(script)])
        return values, why

    def test_a_child_that_comes_to_its_end_has_no_reason(self, tmp_path: Path) -> None:
        rest = """pipe.write('{"value": 2}\\n{"done": true}\\n')"""
        assert self.run(tmp_path, rest) == ([{"reached": 1}, 2], None)

    def test_a_child_that_crashes_leaves_what_it_had_reported(self, tmp_path: Path) -> None:
        values, why = self.run(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)")
        assert (values, why) == ([{"reached": 1}], "its process ended with SIGSEGV: words of a library")

    def test_a_child_that_fails_leaves_its_last_words(self, tmp_path: Path) -> None:
        values, why = self.run(tmp_path, "sys.exit('no more memory')")
        assert (values, why) == (
            [{"reached": 1}],
            "its process ended with exit code 1: words of a library | no more memory",
        )

    def test_a_child_that_hangs_is_ended_at_the_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(children, "LEAST_S", 0.0)
        assert self.run(tmp_path, "time.sleep(600)", limit_s=0.1)[1] == "stopped at its limit of 0 s"

    def test_a_child_is_told_its_limit_and_none_begins_without_time(self, tmp_path: Path) -> None:
        values, why = self.run(tmp_path, """pipe.write(json.dumps({"value": job}) + '\\n{"done": true}\\n')""", 100.0)
        assert (values[-1], why) == ({"part": "x", "limit_s": 95.0}, None)
        assert self.run(tmp_path, "", 1.0) == ([], "the limit of the run was reached before it began")

    def test_a_grandchild_that_holds_the_pipe_does_not_hold_the_parent(self, tmp_path: Path) -> None:
        rest = """
grandchild = os.fork()
if grandchild == 0:
    time.sleep(600)
    os._exit(0)
pipe.write(json.dumps({"value": grandchild}) + '\\n')
sys.exit(3)
"""
        (_, grandchild), why = self.run(tmp_path, rest)
        assert why == "its process ended with exit code 3: words of a library"
        os.kill(grandchild, signal.SIGKILL)  # it is still there

    def test_a_child_writes_lines_of_json_without_nan(self) -> None:
        reader, writer = os.pipe()
        children.child_main(lambda job, emit: emit({"a": float("inf"), "b": job["n"]}), {"n": 3}, writer)
        with os.fdopen(reader) as lines:
            assert [json.loads(line) for line in lines] == [
                {"value": {"a": {"missing": "not a number: inf"}, "b": 3}},
                {"done": True},
            ]
