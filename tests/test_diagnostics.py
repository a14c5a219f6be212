"""Diagnostics: against closed forms, the graph's own steps, and functions of known smoothness."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from level_problems import CG, batches, level, tower
from problems import assert_close
from torch import Tensor, nn

import metaopt as mo
from metaopt.diagnostics.memory import peak_memory
from optimizers import SGD

pytestmark = [
    pytest.mark.usefixtures("float64"),
]
CURVATURE = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)


def quadratic(rule: Any = CG, steps: int = 1, **options: Any) -> mo.LevelGraph:
    """Inner 1/2 w'Hw - w'lam with H = diag(1, 2, 5), from its solution.

    Outer 1/2 |w - 3|^2: dF/dlam = H^-1 (w - 3).
    """
    lam = torch.tensor([1.0, -2.0, 0.5])
    outer = level("lam", lam, lambda s, _: 0.5 * (s.w() - 3).square().sum(), 1.0)
    inner = level(
        "w",
        lam / CURVATURE,
        lambda s, _: 0.5 * (CURVATURE * s.w() ** 2).sum() - s.w() @ s.lam(),
        0.1,
        **options,
    )
    return mo.LevelGraph([mo.Edge(outer, inner, steps=steps, differentiate=rule)])


def mixed_tower() -> mo.LevelGraph:
    data = [batches(4, seed) for seed in range(3)]
    return tower(3, [2, 2], [mo.Backprop(), mo.Backprop()], data, [1])


# compare_rules


def test_rules_beside_the_closed_form() -> None:
    """T1T2 takes H for 1: x = w - 3 beside H^-1 (w - 3).

    Ten steps of Backprop give (1 - (1 - .1 H)^10) H^-1 (w - 3).
    """
    report = mo.compare_rules(
        quadratic(steps=10), [mo.T1T2(), mo.Backprop()], "lam", exact=CG, repeats=1
    )
    v = torch.tensor([1.0, -1.0, 0.1]) - 3
    exact, identity, unrolled = v / CURVATURE, v, (1 - (1 - 0.1 * CURVATURE) ** 10) * v / CURVATURE
    assert report.rules[0].relative_error == 0
    assert report.rules[0].norm_ratio == 1
    for one, expected in zip(report.rules, (exact, identity, unrolled), strict=True):
        assert_close(one.hypergradient["value"], expected, 1e-10)
        cosine = F.cosine_similarity(expected, exact, dim=0)
        expected_numbers = (
            cosine,
            expected.norm() / exact.norm(),
            (expected - exact).norm() / exact.norm(),
        )
        assert (one.cosine, one.norm_ratio, one.relative_error) == pytest.approx(
            [float(x) for x in expected_numbers], rel=1e-9
        )
        assert 0 < one.seconds < 10
        assert one.memory > 0
    table = report.table()
    assert "relative error" in table
    assert len(table.splitlines()) == 2 + 3
    assert "T1T2(scale=1.0)" in table


@pytest.mark.parametrize("rule", [mo.Backprop(), mo.T1T2(), CG])
def test_the_hypergradient_is_that_of_the_next_step(rule: Any) -> None:
    """The upper level makes a step of plain SGD with rate 1.

    Comparing changes neither state nor data.
    """
    graph = quadratic(rule, steps=3)
    graph.step()
    before = graph.params("lam")["value"].clone()
    report = mo.compare_rules(graph, [rule], "lam", repeats=1)
    assert torch.equal(graph.params("lam")["value"], before)
    graph.step()
    assert_close(
        before - graph.params("lam")["value"], report.rules[1].hypergradient["value"], 1e-14
    )


def test_all_edges_below_the_level_get_the_rule() -> None:
    graph = mixed_tower()
    report = mo.compare_rules(
        graph, [mo.Backprop(memory="steps"), mo.FirstOrder()], "v0", repeats=1
    )
    assert report.rules[1].relative_error < 1e-12  # the same derivative, in another order of sums
    assert report.rules[2].relative_error > 1e-3
    with pytest.raises(ValueError, match=r"`level` must have levels below it, got 'v2'"):
        mo.compare_rules(graph, [CG], "v2")


def test_memory_grows_with_the_graph_of_the_steps_only_where_it_is_kept() -> None:
    """Sixty steps over 20000 numbers.

    Backprop keeps several of 160 kB each a step, Implicit none.
    """
    n = 20000
    outer = level("lam", torch.ones(n), lambda s, _: s.w().square().mean())
    inner = level(
        "w",
        torch.zeros(n),
        lambda s, _: ((s.w() - s.lam()) ** 4).mean() + s.w().square().mean(),
        1.0,
    )
    graph = mo.LevelGraph([mo.Edge(outer, inner, steps=60)])
    full, point = mo.compare_rules(graph, [mo.T1T2()], "lam", repeats=1).rules
    assert full.memory > 60 * 8 * n
    assert point.memory < 30 * 8 * n


def test_dropout_masks_are_those_of_the_other_rules() -> None:
    def loss(s: Any, _: Any) -> Tensor:
        return ((F.dropout(s.w(), 0.5) - s.lam()) ** 2).sum()

    torch.manual_seed(0)
    outer, inner = (
        level("lam", torch.ones(8), lambda s, _: s.w().square().sum()),
        level("w", torch.ones(8), loss),
    )
    graph, state = mo.LevelGraph([mo.Edge(outer, inner, steps=3)]), torch.get_rng_state()
    assert (
        mo.compare_rules(graph, [mo.Backprop(memory="steps")], "lam", repeats=1)
        .rules[1]
        .relative_error
        < 1e-12
    )
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("rules", "options", "message"),
    [
        ([], {}, r"`rules` must hold at least one rule, got none"),
        ([CG], {"repeats": 0}, r"`repeats` must be a positive integer, got 0"),
        ([CG], {"level": "nobody"}, r"`level` must be one of \['lam', 'w'\], got 'nobody'"),
        ([CG], {"level": "w"}, r"`level` must have levels below it, got 'w'"),
    ],
)
def test_silly_comparisons(rules: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mo.compare_rules(quadratic(), rules, **{"level": "lam", **options})


# The memory of a function


def test_peak_memory_counts_what_is_held_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Three blocks of 8 MB at the same time; x and what is freed later from before do not count."""
    x = torch.randn(1000, 1000)
    before = [torch.randn(1000, 1000)]

    def function() -> Tensor:
        before.clear()
        a = x + 1
        b = a + 1
        c = b + 1
        del a, b
        return c + 1

    assert 0 <= peak_memory(function, torch.device("cpu")) - 3 * 8_000_000 < 100  # and scalars
    print("after", file=sys.stderr)
    error = capfd.readouterr().err
    assert error.endswith("after\n")
    assert "profiler_st" not in error  # that it starts and stops


def test_memory_of_other_devices_cannot_be_asked() -> None:
    with pytest.raises(ValueError, match="measures on the CPU and on CUDA, got a level on 'meta'"):
        peak_memory(lambda: None, torch.device("meta"))


# hypergradient_check


def test_exact_rules_agree_with_finite_differences() -> None:
    """To 1e-7: h^2 = 1e-10 and 1e-16 / h = 1e-11, in numbers of order 1 to 100."""
    check = mo.hypergradient_check(mixed_tower(), "v0", directions=3, tolerance=1e-7)
    assert len(check.slopes) == len(check.differences) == 3
    assert all(abs(slope) > 1e-3 for slope in check.slopes)
    assert "finite difference" in check.table()
    mo.hypergradient_check(mixed_tower(), "v1", tolerance=1e-7)
    again = mo.hypergradient_check(mixed_tower(), "v0", directions=3)
    assert again == check  # the seed decides
    assert mo.hypergradient_check(mixed_tower(), "v0", directions=3, seed=1) != check


def test_an_implicit_rule_agrees_once_the_lower_level_has_converged() -> None:
    """Slowest factor 1 - 0.1 a step: after 200 steps 7e-10 is missing."""
    mo.hypergradient_check(quadratic(CG, steps=200), "lam", tolerance=1e-6)
    with pytest.raises(
        ValueError,
        match=r"(?s)level 'lam' must agree with finite differences to 1e-05, got.*relative "
        r"error.*Implicit",
    ):
        mo.hypergradient_check(quadratic(CG, steps=5), "lam")


def test_a_biased_rule_fails_by_its_bias() -> None:
    """T1T2 along d: <w - 3, d> beside <H^-1 (w - 3), d>.

    With a tolerance of None it says so without raising.
    """
    check = mo.hypergradient_check(
        quadratic(mo.T1T2(), steps=200), "lam", tolerance=None, directions=30
    )
    exact = mo.hypergradient_check(quadratic(CG, steps=200), "lam", directions=30)
    assert check.differences == exact.differences
    v = torch.tensor([1.0, -1.0, 0.1]) - 3
    for slopes, expected in ((check.slopes, v), (exact.slopes, v / CURVATURE)):
        mean_square = torch.tensor(slopes).square().mean()
        # 30 draws of something with relative variance 4/5: 3 sigma
        assert_close(mean_square, expected.square().mean(), 0.5)
    assert max(check.relative_errors) > 0.1


def test_levels_in_float32_with_modules_data_and_dropout_are_checked_in_float64() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 1)).float()
    model[0].bias.requires_grad_(False)
    weights = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1), nn.Sigmoid()).float()
    data = [(torch.randn(8, 4).float(), torch.randn(8, 1).float()) for _ in range(3)]

    def inner(s: Any, batch: Any) -> Tensor:
        x, y = batch
        losses = (s.learner(x) - y) ** 2
        return (s.weights(losses.detach()) * losses).mean()

    def outer(s: Any, batch: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(s.learner(x), y)

    upper = mo.Level("weights", weights, outer, SGD(0.1), data=data)
    lower = mo.Level("learner", model, inner, SGD(0.1), data=data)
    graph, state = mo.LevelGraph([mo.Edge(upper, lower)]), torch.get_rng_state()
    graph.step()
    state = torch.get_rng_state()
    # one step, so that `detach` changes nothing
    mo.hypergradient_check(graph, "weights", tolerance=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    assert {param.dtype for param in graph.params("weights").values()} == {torch.float32}
    assert model[3].weight.dtype == weights[0].weight.dtype == torch.float32
    assert math.isfinite(graph.step()["weights/loss"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": 0}, r"`directions` must be a positive integer, got 0"),
        ({"step": 0.0}, r"`step` must be a positive number, got 0.0"),
        ({"level": "nobody"}, r"`level` must be one of"),
    ],
)
def test_silly_checks(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mo.hypergradient_check(quadratic(), **{"level": "lam", **options})


# metasmoothness


def test_smoothness_of_known_functions() -> None:
    """theta = z goes on: 1.

    theta = (z - h)^2 comes back with no distance but in the second entry, which goes on. A zigzag:
    -1.
    """
    z, v = {"z": torch.zeros(3)}, {"z": torch.ones(3)}
    assert mo.metasmoothness(lambda z: 2 * z["z"], z, v, 0.1) == 1
    bent = mo.metasmoothness(lambda z: [(z["z"] - 0.1) ** 2, z["z"]], z, v, 0.1)
    assert bent == pytest.approx(1, abs=1e-12)

    def zigzag(z: Any) -> Tensor:
        """0, 3, 2 in the first entry: d = 2, signs opposite; 0, 1, 2 in the others: d = 2 each.

        S = (-2 + 2 + 2) / 6.
        """
        t = (z["z"] * 10).round()
        return torch.where(torch.arange(3) == 0, torch.where(t == 1, 3.0, t), t)

    assert mo.metasmoothness(zigzag, z, v, 0.1) == pytest.approx(1 / 3)
    back = mo.metasmoothness(
        lambda z: torch.where(z["z"] > 0.15, 1.0, torch.where(z["z"] > 0.05, 3.0, 0.0)), z, v, 0.1
    )
    assert back == -1


def test_smoothness_of_a_training_run() -> None:
    """Gradient descent on a quadratic is linear in its target: S = 1."""

    def train(z: Tensor) -> Any:
        loss = lambda params, _, z: (CURVATURE * (params["w"] - z) ** 2).sum()
        return mo.minimize(loss, SGD(0.05), {"w": torch.zeros(3)}, None, steps=20, meta=z).params

    assert mo.metasmoothness(train, torch.ones(3), torch.tensor([1.0, -1.0, 2.0]), 0.1) == 1


def test_silly_smoothness() -> None:
    z = torch.zeros(2)
    with pytest.raises(ValueError, match=r"`step` must be a positive number, got 0.0"):
        mo.metasmoothness(lambda z: z, z, z, 0.0)
    with pytest.raises(ValueError, match=r"`direction` does not have the expected structure"):
        mo.metasmoothness(lambda z: z, z, [z], 0.1)
    with pytest.raises(ValueError, match=r"must change with z, but are the same for step=0.1"):
        mo.metasmoothness(lambda z: torch.ones(2), z, z + 1, 0.1)
    with pytest.raises(ValueError, match=r"training at z \+ h v must end at finite parameters"):
        mo.metasmoothness(lambda z: torch.where(z > 0, torch.inf, z), z, z + 1, 0.1)
