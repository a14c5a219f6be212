"""Every example runs in a small form, where its own assertions hold too.

Those with fixed figures print these.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
# name, and the arguments of its small form; "out" is set to a fresh folder
EXAMPLES: list[tuple[str, dict[str, Any]]] = [
    ("architecture_search", {"seeds": 1, "rivals": 2, "steps": 40}),
    ("domains", {"seeds": 1, "steps": 10}),
    ("learning_by_ignoring", {"seeds": 1, "steps": 15}),
    ("maml_plus_plus", {"steps": 4, "tasks": 4, "test_tasks": 10}),
    ("meta_curvature", {"steps": 10, "test_tasks": 10}),
    ("meta_sgd", {"steps": 10, "test_tasks": 10}),
    ("reweighting", {"seeds": 1, "steps": 300, "out": "weights.png"}),
    ("virtual_step", {"seeds": 1, "steps": 20}),
    ("weight_decay", {"seeds": 1, "steps": 3}),
]

COMMANDS = {  # arguments of the small form, and a phrase of what it prints
    "implicit_maml": (["--steps", "10", "--tasks", "8", "--test-tasks", "50"], "implicit MAML: 0."),
    "data_distillation": (
        ["--steps", "40", "--learners", "4", "--out", "{out}/images.png"],
        "synthetic images: 0.",
    ),
    "learning_rate_of_learning_rate": (["--steps", "4"], "learned rate of learned rate: test loss"),
    "implicit_middle": (
        ["--steps", "1", "--copies", "4", "--test-tasks", "10"],
        "learned start: test loss 0.",
    ),
}


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "small"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_the_small_form_runs(name: str, small: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    if "out" in small:
        small = {**small, "out": tmp_path / small["out"]}
    load(name).main(**small)
    assert any(character.isdigit() for character in capsys.readouterr().out)
    if "out" in small:
        assert small["out"].stat().st_size > 10_000


SLOW = {"implicit_middle"}  # its check solves to rounding


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in COMMANDS],
)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    arguments, phrase = COMMANDS[name]
    command = [
        sys.executable,
        "-W",
        "error",
        f"examples/{name}.py",
        *(part.format(out=tmp_path) for part in arguments),
    ]
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert phrase in done.stdout


def test_every_example_is_in_the_table_and_opens_with_its_command() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(
        [*COMMANDS, *(name for name, _ in EXAMPLES)]
    )
    for name in [*COMMANDS, *(name for name, _ in EXAMPLES)]:
        lines = (FOLDER / f"{name}.py").read_text().splitlines()
        assert lines[0].startswith('"""')
        assert lines[2].startswith(f"    python examples/{name}.py")
        assert len(lines) <= 190, "an example is read in a sitting"


@pytest.mark.slow
def test_weight_decay_ends_at_the_known_losses() -> None:
    """To 1e-4: the figures are known to four digits; float32 moves the sixth."""
    found = load("weight_decay").main()
    assert found == {
        "exact": pytest.approx([0.3657, 0.3609, 0.3769], abs=1e-4),
        "CG(3)": pytest.approx([0.3664, 0.3607, 0.3774], abs=1e-4),
    }


@pytest.mark.slow
def test_derived_architectures_are_better_than_median_random_ones() -> None:
    """In the mean over two seeds."""
    derived, median, _ = load("architecture_search").main(seeds=2, rivals=3, steps=100).mean(0)
    assert derived > median
