"""The bar: every runnable case of onnx's own backend suite keeps its outputs, after each pass alone and after all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/onnx_backend_suite.py"


@pytest.mark.slow
def test_every_case_of_the_onnx_backend_suite_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No other value, crash, invalid model or interface; a second run changes nothing; `changed` is the truth."""
    verdicts_path = tmp_path / "verdicts.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--workers", "2", "--json", verdicts_path], capture_output=True, text=True
    )
    with capsys.disabled():
        sys.stdout.write(f"\n{done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = json.loads(verdicts_path.read_text())
    judged = [verdict for verdict in verdicts.values() if verdict["oracles"]]
    # onnx 1.23.2 has 2,024 cases, 2,006 of which ONNX Runtime 1.31 or the reference can run.
    assert len(verdicts) >= 1_700 and len(judged) > 0.98 * len(verdicts)
    changed = [verdict for verdict in judged if verdict["pipeline"] == "kept"]
    assert len(changed) > 400
