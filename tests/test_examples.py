"""The examples run in a small form, and say what they should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

EXAMPLES = {
    "implicit_maml": (["--steps", "10", "--tasks", "8", "--test-tasks", "50"], "implicit MAML: 0."),
    "data_distillation": (["--steps", "40", "--learners", "4", "--out", "{out}/images.png"], "synthetic images: 0."),
    "learning_rate_of_learning_rate": (["--steps", "4"], "learned rate of learned rate: test loss"),
    "implicit_middle": (["--steps", "1", "--copies", "4", "--test-tasks", "10"], "learned start: test loss 0."),
}


SLOW = {"implicit_middle"}  # its check solves to rounding


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in EXAMPLES])
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    arguments, phrase = EXAMPLES[name]
    command = [sys.executable, "-W", "error", f"examples/{name}.py", *(part.format(out=tmp_path) for part in arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert phrase in done.stdout
