"""The benchmarks: every side computes the same numbers, in a small form.

How fast is no matter of a test.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def small(comparison: str) -> Any:
    from contenders import problems

    return {
        "sinusoid": lambda: problems.Sinusoid(tasks=3, shots=2, queries=4, steps=2, hidden=5),
        "omniglot": lambda: problems.Omniglot(tasks=2, ways=2, queries=2, steps=2, filters=4),
        "lstm": lambda: problems.LSTM(steps=3, batch=4, sizes=(6, 5, 3), hidden=4),
        "transformer": lambda: problems.Transformer(steps=2, batch=2, length=5, width=8, heads=2),
        "meta-weight-net": lambda: problems.MetaWeightNet(batch=6, sizes=(5, 4, 3), hidden=4),
        "imaml": lambda: problems.IMAML(shots=4, queries=3, steps=2, hidden=5, cg_steps=3),
        "regression-darts": lambda: problems.LogisticRegression(
            "darts", examples=9, features=4, steps=3
        ),
        "regression-cg": lambda: problems.LogisticRegression("cg", examples=9, features=4, steps=3),
        "regression-neumann": lambda: problems.LogisticRegression(
            "neumann", examples=9, features=4, steps=3
        ),
        "many-tensors": lambda: problems.ManyTensors(layers=8, width=3, batch=4, steps=3),
    }[comparison]()


NAMES = [
    "sinusoid",
    "omniglot",
    "lstm",
    "transformer",
    "meta-weight-net",
    "imaml",
    "regression-darts",
    "regression-cg",
    "regression-neumann",
    "many-tensors",
]


@pytest.mark.filterwarnings("ignore:`torch.jit")  # Betty imports what calls it
@pytest.mark.parametrize("comparison", NAMES)
def test_all_sides_compute_the_same(comparison: str) -> None:
    """Here, not in processes of their own.

    Compiled sides are left to the benchmark, which compares them too.
    """
    import bench
    import bench_process
    from contenders.sides import COMPARISONS, function_of

    results = {}
    for side in COMPARISONS[comparison].sides:
        if side.missing is None and not side.options.get("compile"):
            build = getattr(
                importlib.import_module(f"contenders.{side.module}"), function_of(comparison)
            )
            run = build(small(comparison), **side.options)
            first, second = (
                {name: bench_process.array(value) for name, value in run().items()}
                for _ in range(2)
            )
            assert all(np.abs(value).max() > 0 or "conv" in name for name, value in first.items())
            bench.check_equal({"a run": first, "another": second}, 1e-4)  # running changes nothing
            results[side.name] = first
    assert len(results) >= 2
    bench.check_equal(results, 1e-4)


def test_every_comparison_can_be_asked_for() -> None:
    import bench
    from contenders.sides import COMPARISONS

    assert list(get_args(bench.Name)) == list(COMPARISONS) == NAMES


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "betty is not installed. `pip install --no-deps .* betty-ml==0.2.1` brings it."),
        (
            "0.1.1",
            "betty-ml must be 0.2.1, got 0.1.1: .* `pip install --no-deps .* betty-ml==0.2.1`",
        ),
        ("0.2.1", None),
    ],
)
def test_a_library_that_is_missing_or_too_old_is_named(
    monkeypatch, found: str | None, message: str | None
) -> None:
    from contenders import sides

    monkeypatch.setattr(sides, "find_spec", lambda library: found)
    monkeypatch.setattr(sides, "version", lambda distribution: found)
    missing = sides.Side("Betty", "with_betty").missing
    assert (missing is None) if message is None else re.match(message, missing)
    assert sides.Side("by hand", "by_hand").missing is None


def test_a_difference_ends_the_run() -> None:
    import bench

    right = {"a": np.ones(3), "b": np.full(2, 1e-2)}
    bench.check_equal({"one": right, "other": {"a": np.ones(3) + 1e-6, "b": right["b"]}}, 1e-4)
    for wrong in (
        {"a": np.ones(3), "b": np.full(2, 1.01e-2)},
        {"a": np.ones(3) * np.nan, "b": right["b"]},
    ):
        with pytest.raises(ValueError, match=r"other and one differ in '[ab]' by .* of its norm"):
            bench.check_equal({"one": right, "other": wrong}, 1e-4)
    with pytest.raises(ValueError, match="other and one do not compute the same tensors"):
        bench.check_equal({"one": right, "other": {"a": right["a"]}}, 1e-4)


def test_a_process_runs_answers_and_says_what_went_wrong() -> None:
    from bench_process import Contender
    from contenders.sides import Side

    with Contender(Side("by hand", "by_hand"), "lstm", small("lstm"), 1) as contender:
        assert contender.result()["readout"].shape == (1, 4)
        assert 0 < contender.seconds() < 10
        assert 0 <= contender.grown <= contender.peak
    with pytest.raises(
        RuntimeError, match=r"(?s)broken failed\..*unexpected keyword argument 'nonsense'"
    ):
        Contender(Side("broken", "by_hand", {"nonsense": 1}), "lstm", small("lstm"), 1)


def test_memory_that_would_not_fit_is_estimated(monkeypatch) -> None:
    import bench
    from contenders.sides import Side

    class Fake:
        def __init__(self, side, comparison, problem, threads, *, exact_memory):
            self.grown, self.peak, self.first = 100 + 10 * problem.steps, 1000, 1.5

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(bench, "Contender", Fake)
    found = bench.measure(
        "lstm", Side("side", "by_hand"), small("lstm"), (10, 20, 40, 80), 1, limit=500
    )
    assert [(point.steps, point.grown, point.seconds) for point in found] == [
        (10, 200, 1.5),
        (20, 300, 1.5),
        (40, 500, 1.5),
        (80, 900, None),
    ]


def test_tables_go_between_the_markers_of_the_readme(tmp_path) -> None:
    from bench_report import Memory, Times, readme_with, tables, write

    write(
        tmp_path,
        "lstm",
        1,
        small("lstm"),
        [Times("slow", 3.0, [0.2, 0.1, 0.4]), Times("fast", 60.0, [0.05])],
    )
    points = [
        Memory("slow", 10, 10 * 2**20, 1, 1.0),
        Memory("slow", 20, 30 * 2**20, 1, 2.0),
        Memory("slow", 40, 2**31, None, None),
    ]
    write(tmp_path, "lstm", 1, small("lstm"), points)
    versions = json.loads((tmp_path / "lstm-times-1.json").read_text())["versions"]
    assert {"torch", "metaopt"} <= versions.keys()
    text = tables(tmp_path)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert ["slow", "200 ms", "100 ms to 400 ms", "1", "3 s"] in rows
    assert ["fast", "50 ms", "50 ms to 50 ms", "4", "60 s"] in rows
    assert ["slow", "10 MiB, 1 s", "30 MiB, 2 s", "(would be 2 GiB)", "2 MiB"] in rows
    readme = "before <!-- bench --> old <!-- /bench --> after"
    assert readme_with(readme, "new") == "before <!-- bench -->\nnew\n<!-- /bench --> after"
    with pytest.raises(ValueError, match=r"no place for the tables\. Put `<!-- bench -->`"):
        readme_with("nothing", text)


def test_the_readme_has_the_place() -> None:
    from bench_report import readme_with

    assert "the tables" in readme_with((SCRIPTS.parent / "README.md").read_text(), "the tables")


def test_help_lists_the_options() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPTS / "bench.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "--write-readme" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "must be positive, got 0 and 20"),
        ({"repeats": 0}, "must be positive, got 1 and 0"),
        ({"threads": 1000}, "`threads` must be at most .* got 1000"),
    ],
)
def test_silly_options(options: dict, message: str) -> None:
    import bench

    with pytest.raises(ValueError, match=message):
        bench.Config(**options)
