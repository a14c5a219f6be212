"""The benchmarks: every side computes the same numbers, in a small form.

How fast is no matter of a test.
"""

from __future__ import annotations

import importlib
import math
import re
import runpy
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from metaopt.linear_solve.base import seeded_places

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def small(comparison: str) -> Any:
    from contenders import (
        attention,
        large_model,
        optimizer_steps,
        problems,
        quadratics,
        short_steps,
    )

    return {
        "sinusoid": lambda: problems.Sinusoid(tasks=3, shots=2, queries=4, steps=2, hidden=5),
        "omniglot": lambda: problems.Omniglot(tasks=2, ways=2, queries=2, steps=2, filters=4),
        "lstm": lambda: problems.LSTM(steps=3, batch=4, sizes=(6, 5, 3), hidden=4),
        **{
            f"meta-training{name}": lambda kind=kind: problems.MetaTraining(
                kind, tasks=2, steps=3, batch=4, hidden=(3,), size=4
            )
            for name, kind in (("", "backprop"), ("-nres", "nres"))
        },
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
        "trainer": lambda: short_steps.TrainerLoop(batch=6, sizes=(5, 4, 3), steps=3),
        "many-tensors": lambda: problems.ManyTensors(layers=8, width=3, batch=4, steps=3),
        **{
            f"attention{name}": lambda sees=sees: attention.Attention(
                tokens=5, heads=2, width=4, sees=sees
            )
            for name, sees in (("", "all"), ("-causal", "causal"), ("-masked", "masked"))
        },
        **{
            f"scale-{rule}{name}": lambda rule=rule, frozen=frozen: large_model.Scale(
                rule, 4, 4, frozen, width=8, layers=2, vocabulary=11, hidden=4, radius=0.1
            )
            for rule in ("darts", "sama")
            for name, frozen in (("", 0), ("-64", 0), ("-frozen", 1), ("-frozen-16", 1))
        },
        **{
            f"bilevel-{condition}": lambda condition=condition: quadratics.Bilevel(
                condition, products=12, inner=8, outer=3, rank=4, window=2
            )
            for condition in (100, 10_000)
        },
        **{
            f"optimizer-steps-{size}": lambda: optimizer_steps.OptimizerSteps((6, 5, 3))
            for size in ("26k", "269k", "5m")
        },
    }[comparison]()


NAMES = [
    "sinusoid",
    "omniglot",
    "lstm",
    "meta-training",
    "meta-training-nres",
    "transformer",
    "meta-weight-net",
    "imaml",
    "regression-darts",
    "regression-cg",
    "regression-neumann",
    "trainer",
    "many-tensors",
    "attention",
    "attention-causal",
    "attention-masked",
    "scale-darts",
    "scale-sama",
    "scale-darts-64",
    "scale-sama-64",
    "scale-darts-frozen",
    "scale-sama-frozen",
    "scale-darts-frozen-16",
    "scale-sama-frozen-16",
    "bilevel-100",
    "bilevel-10000",
    "optimizer-steps-26k",
    "optimizer-steps-269k",
    "optimizer-steps-5m",
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

    # of a displacement by .1 in float32 little remains in a bias
    tolerance = 1e-2 if comparison.startswith("scale") else 1e-4
    moves = comparison.startswith("optimizer-steps")
    if moves:  # each optimizer goes its own way
        tolerance = COMPARISONS[comparison].tolerance
        assert tolerance == math.inf
    results = {}
    if COMPARISONS[comparison].missing is not None:
        pytest.skip(COMPARISONS[comparison].missing)
    sides = [side for side in COMPARISONS[comparison].sides if side.missing is None]
    for side in sides:
        if not side.options.get("compile"):
            build = getattr(
                importlib.import_module(f"contenders.{side.module}"), function_of(comparison)
            )
            run = build(small(comparison), **side.options)
            first, second = (
                {name: bench_process.array(value) for name, value in run().items()}
                for _ in range(2)
            )
            assert all(np.abs(value).max() > 0 or "conv" in name for name, value in first.items())
            if moves:  # each run is a further step
                assert all(np.any(second[name] != value) for name, value in first.items())
            else:  # running changes nothing
                bench.check_equal({"a run": first, "another": second}, tolerance)
            results[side.name] = first
    assert len(results) >= 2
    bench.check(results, [s for s in sides if s.name in results], small(comparison), tolerance)


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


def test_an_error_is_that_of_the_exact_gradient() -> None:
    import bench
    from contenders.sides import Side

    problem = small("bilevel-100")
    exact = {name: value.numpy() for name, value in problem.exact().items()}
    results = {"good": exact, "rough": {name: 0.75 * value for name, value in exact.items()}}
    good = Side("good", "by_hand")
    sides = [good, Side("rough", "by_hand", error=1.0)]
    assert bench.check(results, sides, problem, 0.0) == {"good": 0.0, "rough": pytest.approx(0.25)}
    with pytest.raises(ValueError, match=r"rough and the exact gradient differ in 'w' by 2\.5e-01"):
        bench.check(results, [good, Side("rough", "by_hand")], problem, 1.0)


def test_each_way_on_quadratics_has_the_error_of_its_theory() -> None:
    """Against what each puts for the inverse Hessian, as a dense matrix."""
    from contenders import with_metaopt
    from contenders.sides import COMPARISONS

    problem = small("bilevel-100")
    lower, upper, _, x = problem.data()
    x.requires_grad_()
    A, rank, unit = lower.A, problem.rank, torch.eye(problem.inner, dtype=torch.float64)
    assert torch.linalg.cond(A).item() == pytest.approx(problem.condition)
    z = torch.linalg.solve(A, -lower.C.T @ x - lower.a)
    (whole,) = torch.autograd.grad(upper(z, x), x)
    torch.testing.assert_close(problem.exact()["w"], whole, rtol=1e-9, atol=1e-9)

    places = seeded_places(problem.inner, rank, 0)
    columns = A[:, places]
    sketch = columns @ torch.linalg.solve(columns[places], columns.T)
    exact = torch.linalg.inv(A)

    def series(terms: int) -> Tensor:
        return exact @ (unit - torch.linalg.matrix_power(unit - A, terms))

    inverses = {
        "Neumann": series(problem.products),
        "Nystrom": torch.linalg.inv(sketch + problem.condition**-0.5 * unit),
        "Backprop": series(problem.products),
        "Backprop, truncated": series(problem.window),
        **dict.fromkeys(("T1T2", "FiniteDifference", "SAMA"), unit),
    }
    z = z.detach().requires_grad_()
    slope, direct = torch.autograd.grad(upper(z, x), [z, x])
    for side in COMPARISONS["bilevel-100"].sides:
        if side.module == "with_metaopt":
            rule = side.options["rule"]
            limit = 1e-8 if rule in inverses else side.error
            expected = direct - lower.C @ inverses.get(rule, exact) @ slope
            found = with_metaopt.bilevel(problem, **side.options)()["w"]
            assert (found - expected).norm() <= limit * expected.norm(), side.name


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


def test_results_become_tables(tmp_path) -> None:
    from bench_report import Memory, Times, read, tables, write

    write(
        tmp_path,
        "lstm",
        1,
        small("lstm"),
        [Times("slow", 3.0, [0.2, 0.1, 0.4]), Times("fast", 60.0, [0.05])],
    )
    write(tmp_path, "bilevel-100", 1, small("bilevel-100"), [Times("rough", 1.0, [0.1], 0.123)])
    points = [
        Memory("slow", 10, 10 * 2**20, 1, 1.0),
        Memory("slow", 20, 30 * 2**20, 1, 2.0),
        Memory("slow", 40, 2**31, None, None),
    ]
    write(tmp_path, "lstm", 1, small("lstm"), points)
    errors, memory, times = read(tmp_path)
    assert {"torch", "metaopt"} <= times["versions"].keys()
    assert "\n" not in times["problem"]["about"]
    text = tables([errors, memory, times])
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert ["slow", "200 ms", "100 ms to 400 ms", "1", "3 s"] in rows
    assert ["fast", "50 ms", "50 ms to 50 ms", "4", "60 s"] in rows
    assert ["rough", "100 ms", "100 ms to 100 ms", "1", "1 s", "0.12"] in rows
    assert ["slow", "10 MiB, 1 s", "30 MiB, 2 s", "(would be 2 GiB)", "2 MiB"] in rows
    assert "\n\nMeasured with metaopt " in text
    assert f"- {times['date']}, at commit {times['commit']}: bilevel-100, lstm" in text


# What is published


def result(comparison: str, kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what `bench_report.write` would have written."""
    about = {"comparison": comparison, "kind": kind, "threads": 1, "problem": {"about": "A."}}
    when = {"commit": "abc", "date": "2026-01-02", "versions": {"torch": "2"}, "machine": "a CPU"}
    return {**about, **when, "rows": rows}


def times(comparison: str, **seconds: float) -> dict[str, Any]:
    rows = [{"name": name, "first": 1.0, "seconds": [s, s, 9.0]} for name, s in seconds.items()]
    return result(comparison, "times", rows)


def point(name: str, steps: int, grown: int, seconds: float | None) -> dict[str, Any]:
    peak = None if seconds is None else 1
    return {"name": name, "steps": steps, "grown": grown, "peak": peak, "seconds": seconds}


OURS = {"metaopt": 2.0, "metaopt, compiled": 0.5}
RESULTS = [
    times("sinusoid", **{"higher": 4.0, "JAX jit": 1.0, **OURS}),
    times("meta-weight-net", **{"Betty": 1.9, **OURS}),
    result(
        "transformer",
        "memory",
        [
            point("higher", 16, 100, 1.0),
            point("higher", 64, 800, 3.0),
            point("higher", 256, 9000, None),
            point("metaopt, Revolve(16)", 16, 100, 1.0),
            point("metaopt, Revolve(16)", 64, 200, 4.0),
            point("metaopt, Revolve(16)", 256, 300, 8.0),
        ],
    ),
    times("optimizer-steps-26k", Adam=0.0002, learned=0.00035, larger=0.004),
    times("optimizer-steps-269k", Adam=0.0005, learned=0.00497, larger=0.005),
    times("optimizer-steps-5m", Adam=0.012, learned=0.1197, larger=1.2),
]


def test_the_history_has_a_line_for_each_result_once(tmp_path) -> None:
    from bench_history import latest, record

    path = tmp_path / "benchmarks" / "history.jsonl"
    first = record(path, RESULTS)
    assert first == record(path, RESULTS)  # published again, it is no other run
    names = [line["comparison"] for line in first]
    assert names[:4] == ["sinusoid", "meta-weight-net", "transformer", "optimizer-steps-26k"]
    assert first[0] == {
        "comparison": "sinusoid",
        "kind": "times",
        "threads": 1,
        "commit": "abc",
        "date": "2026-01-02",
        "versions": {"torch": "2"},
        "machine": "a CPU",
        "medians": {"higher": 4.0, "JAX jit": 1.0, "metaopt": 2.0, "metaopt, compiled": 0.5},
        "ratios": {"higher": 1.0, "JAX jit": 4.0, "metaopt": 2.0, "metaopt, compiled": 8.0},
    }
    assert first[2]["memory"]["higher"] == {"16": [100, 1.0], "64": [800, 3.0], "256": [9000, None]}
    assert first[2]["ratios"]["metaopt, Revolve(16)"] == {"16": 1.0, "64": 4.0, "256": 30.0}

    later = record(path, [RESULTS[1] | {"commit": "def"}])
    assert len(later) == len(RESULTS) + 1
    assert latest(later, "meta-weight-net", "times")["commit"] == "def"
    with pytest.raises(
        ValueError, match=r"a line of 'lstm', memory, 1 thread, got none\. Run `pyt"
    ):
        latest(later, "lstm", "memory")


def test_ratios_say_where_ours_is_slower() -> None:
    from bench_history import headlines, summarize

    heads, _, row = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in headlines([*map(summarize, RESULTS)]).splitlines()
    )
    assert dict(zip(heads, row, strict=True)) == {
        "": "times as fast",
        "MAML on sine waves, beside higher": "2, compiled 8 (JAX jit: 4)",
        "meta-weight-net, beside Betty": "0.95, compiled 3.8",
        "64 steps of a transformer, beside higher": "0.75, in 1/4 of the memory",
    }


def test_steps_of_optimizers_are_counted_in_steps_of_adam() -> None:
    from bench_history import step_costs, summarize

    assert step_costs([*map(summarize, RESULTS)]).splitlines()[2:] == [
        "| `Adam` | 0.2 ms | 0.5 ms | 12 ms |",
        "| `learned` | 1.8 | 9.9 | 10 |",
        "| `larger` | 20 | 10 | 100 |",
    ]
    with pytest.raises(ValueError, match="a line of 'optimizer-steps-26k', times"):
        step_costs([*map(summarize, RESULTS[:3])])


def test_publishing_fills_the_pages(tmp_path) -> None:
    from bench_report import between, publish

    page = "before <!-- bench --> old <!-- /bench --> after"
    assert between(page, "bench", "new") == "before <!-- bench -->\nnew\n<!-- /bench --> after"
    with pytest.raises(ValueError, match=r"no place for the tables\. Put `<!-- bench -->`"):
        between("nothing", "bench", "new")

    guide = tmp_path / "docs" / "pages" / "guides" / "learned-optimizers.md"
    guide.parent.mkdir(parents=True)
    guide.write_text("<!-- optimizer steps --><!-- /optimizer steps -->")
    (tmp_path / "docs" / "pages" / "benchmarks.md").write_text("<!-- bench --><!-- /bench -->")
    (tmp_path / "README.md").write_text("<!-- ratios --><!-- /ratios -->")
    publish(RESULTS, tmp_path)
    assert (
        "2026-01-02, at commit abc" in (tmp_path / "docs" / "pages" / "benchmarks.md").read_text()
    )
    assert "MAML on sine waves" in (tmp_path / "README.md").read_text()
    assert "| `learned` | 1.8 |" in guide.read_text()
    lines = (tmp_path / "benchmarks" / "history.jsonl").read_text().splitlines()
    assert len(lines) == len(RESULTS)


def test_what_is_measured_again_takes_the_place_of_its_table(tmp_path) -> None:
    from bench_history import record
    from bench_report import between, merge

    both = [RESULTS[2] | {"kind": "times", "rows": RESULTS[0]["rows"]}, *RESULTS]
    history = tmp_path / "history.jsonl"
    page = merge("# A page", both, record(history, both))
    again = times("sinusoid", **{"higher": 3.0, **OURS}) | {"commit": "def", "date": "2026-02-03"}
    page = between("<!-- bench --><!-- /bench -->", "bench", page)
    merged = merge(page, [again], record(history, [again]))
    assert merged.count("**sinusoid**, 1 thread.") == 1
    assert merged.count("**transformer**, 1 thread.") == 2  # times and memory
    assert "4 s" not in merged.partition("**sinusoid**")[2].partition("**transformer**")[0]
    assert merged.endswith("\n- 2026-02-03, at commit def: sinusoid")
    assert merge(page, [], record(history, [])).count("| side") == page.count("| side")
    # what an older run left in its folder does not come back
    old = next(one for one in both if one["comparison"] == "sinusoid")
    page = between("<!-- bench --><!-- /bench -->", "bench", merged)
    assert merge(page, [old], record(history, [old])) == merged


def test_help_lists_the_options(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / "bench.py"), "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert "--write" in capsys.readouterr().out


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
