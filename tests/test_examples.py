"""Every example runs in a small form, where its own assertions hold too; those with fixed figures print these."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES: list[tuple[str, dict[str, Any]]] = [  # name, and the arguments of its small form; "out" is set to a fresh folder
    ("architecture_search", {"seeds": 1, "rivals": 2, "steps": 40}),
    ("learning_by_ignoring", {"seeds": 1, "steps": 15}),
    ("reweighting", {"seeds": 1, "steps": 300, "out": "weights.png"}),
    ("weight_decay", {"seeds": 1, "steps": 3}),
]


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


def test_every_example_is_in_the_table_and_opens_with_its_command() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(name for name, _ in EXAMPLES)
    for name, _ in EXAMPLES:
        lines = (FOLDER / f"{name}.py").read_text().splitlines()
        assert lines[0].startswith('"""')
        assert lines[2].startswith(f"    python examples/{name}.py")
        assert len(lines) <= 120


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
    """In the mean over three seeds."""
    derived, median, _ = load("architecture_search").main().mean(0)
    assert derived > median
