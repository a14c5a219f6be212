"""Objectives and groups: against sums written out, and the same groups one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaopt as mo
from metaopt.meta_training import sample_tasks
from metaopt.meta_training.groups import draw_horizon
from optimizers import EMA, SGD, Adam, ControlledMLP

pytestmark = pytest.mark.usefixtures("float64")


class Lines:
    """Regression by a line, with points held out."""

    def __init__(self, features: int = 2, held_out: bool = True):
        self.features, self.held_out = features, held_out

    def loss(self, params: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (x @ params - y).square().mean()

    def sample(self, generator: torch.Generator, steps: int) -> mo.Task:
        x = torch.randn(steps, 4, self.features, generator=generator)
        other = torch.randn(5, self.features, generator=generator)
        held_out = (other, other.sum(-1)) if self.held_out else ()
        return mo.Task(torch.zeros(self.features), (x, x.sum(-1)), held_out)


def learnable() -> mo.Optimizer:
    return SGD(nn.Parameter(torch.tensor(0.1)))


def relative(loss: float, first: float, floor: float = 0.01, cap: float = 0.7) -> float:
    return min(math.log((loss + floor * first + 1e-4) / (first + 1e-4)), cap)


OBJECTIVES: dict[str, tuple[mo.Objective, Any]] = {
    "mean": (mo.MeanLoss(), lambda ls, last, out: sum(ls) / len(ls)),
    "late": (
        mo.MeanLoss(late=3.0),
        # of 7 steps the last one is in the last fifth
        lambda ls, last, out: (sum(ls[:6]) + 3 * ls[6]) / 9,
    ),
    "relative": (
        mo.MeanLoss(mo.Relative(0.1, 0.5)),
        lambda ls, last, out: sum(relative(x, ls[0], 0.1, 0.5) for x in ls) / len(ls),
    ),
    "last": (mo.LastLoss(), lambda ls, last, out: last[1] - last[0]),
    "validation": (
        mo.ValidationLoss(mo.Relative()),
        lambda ls, last, out: relative(out[1], ls[0]) - relative(out[0], ls[0]),
    ),
}


def value_of(name: str, optimizer: mo.Optimizer, task: mo.Task, family: Lines) -> Tensor:
    """Return J, from its definition, of one episode."""
    out = mo.minimize(family.loss, optimizer, task.params, task.batches)
    batch = mo.tree.index(task.batches, -1)

    def pair(batch: Any) -> tuple[float, float]:
        return (
            float(family.loss(task.params, batch)),
            float(family.loss(out.params, batch)),
        )

    found = OBJECTIVES[name][1](out.losses.tolist(), pair(batch), pair(task.held_out))
    return torch.tensor(found)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_of_windows_are_the_derivative_of_what_the_objective_says(name: str) -> None:
    """By whole episodes, exactly; by pairs in windows of 3 of 7 steps with little noise, nearly."""
    objective, family, optimizer = OBJECTIVES[name][0], Lines(), learnable()
    theta = {"lr": optimizer.lr.detach()}
    tasks = sample_tasks(family, torch.Generator().manual_seed(5), 2, 7)
    each = [mo.Task(*mo.tree.index(tuple(tasks), i)) for i in range(2)]

    def slope(task: mo.Task) -> float:
        up, down = (value_of(name, SGD(0.1 + h), task, family) for h in (1e-6, -1e-6))
        return float(up - down) / 2e-6

    expected = torch.tensor([slope(task) for task in each])
    generator = torch.Generator().manual_seed(5)
    found = mo.FullUnroll(2, mo.Backprop(), objective=objective)(
        optimizer, theta, family, 7, None, generator
    )
    torch.testing.assert_close(found.grads["lr"], expected, rtol=1e-5, atol=1e-7)

    estimator = mo.NRES(1e-4, 2, window=3, stagger=False, objective=objective)
    # its noise is drawn first
    generator, state = torch.Generator().manual_seed(5), None
    seeded = torch.Generator().manual_seed(5)
    torch.randint(2**62, (), generator=seeded)
    tasks = sample_tasks(family, seeded, 2, 7)
    each = [mo.Task(*mo.tree.index(tuple(tasks), i)) for i in range(2)]
    total = torch.zeros(2)
    for _ in range(3):
        estimate = estimator(optimizer, theta, family, 7, state, generator)
        state, noise = estimate.state, estimate.multipliers.of(torch.arange(2))["lr"]
        total += estimate.slopes * 1e-8 / noise  # (J(+) - J(-)) / (2 noise)
    expected = torch.tensor([slope(task) for task in each])
    torch.testing.assert_close(total / 3, expected, rtol=1e-4, atol=1e-6)


def test_a_relative_loss_counts_divergence_as_its_cap() -> None:
    f = mo.Relative(cap=0.7)
    losses = torch.tensor([1.0, 0.0, 5.0, math.inf, math.nan, -3.0])
    expected = [relative(x, 1.0) for x in (1.0, 0.0, 5.0)] + [0.7, 0.7, relative(0.0, 1.0)]
    torch.testing.assert_close(f(losses, torch.tensor(1.0)), torch.tensor(expected))
    estimate = mo.NRES(0.1, 4, window=5, objective=mo.MeanLoss(f))(
        SGD(nn.Parameter(torch.tensor(1e200))),
        {"lr": torch.tensor(1e200)},
        Lines(),
        20,
        None,
        torch.Generator().manual_seed(0),
    )
    assert estimate.slopes.isfinite().all()
    assert estimate.losses.isfinite().all()


class Sizes:
    """Lines with a random number of features."""

    def draw(self, generator: torch.Generator) -> Lines:
        return Lines(int(torch.randint(1, 5, (), generator=generator)))


def test_groups_are_estimates_of_their_own() -> None:
    """Each has a family and a horizon, in turns, and begins anew when its episodes end."""
    optimizer, inner = learnable(), mo.PES(0.01, 3, window=4)
    theta = {"lr": optimizer.lr.detach()}
    groups = mo.Groups(inner, 3, at_a_time=2, stagger=False)
    assert not groups.estimator.stagger
    generator, state = torch.Generator().manual_seed(3), groups.init()
    seen: list[list[int]] = [[], [], []]
    for count in range(9):
        before = None if state is None else state
        estimate = groups(optimizer, theta, Sizes(), (6, 20), state, generator)
        state = estimate.state
        assert estimate.losses.shape == estimate.norms.shape == (6,)
        weights = torch.arange(6.0)
        alone = [part.weighted_sum(row) for part, row in zip(estimate.parts, weights.split(3))]
        torch.testing.assert_close(
            estimate.weighted_sum(weights)["lr"], alone[0]["lr"] + alone[1]["lr"]
        )
        for i, group in enumerate(state["groups"]):
            seen[i].append(group["estimates"])
            if before is not None and group["estimates"]:
                assert group["seed"] == before["groups"][i]["seed"]
        assert state["next"] == 2 * (count + 1) % 3
    for group in state["groups"]:
        own = torch.Generator().manual_seed(group["seed"])
        assert 6 <= draw_horizon((6, 20), own) <= 20
    assert all(0 in counts and max(counts) >= 1 for counts in seen)


def test_staggered_groups_begin_at_different_places() -> None:
    optimizer = learnable()
    groups = mo.Groups(mo.NRES(0.01, 2, window=5), 4)
    given = (optimizer, {"lr": optimizer.lr.detach()}, Lines(), 20)
    estimate = groups(*given, None, torch.Generator().manual_seed(0))
    assert [group["estimates"] for group in estimate.state["groups"]] == [1, 2, 3, 0]


def test_training_over_families_tells_the_optimizer_its_horizon_and_can_be_resumed() -> None:
    def make() -> mo.MetaTraining:
        torch.set_default_dtype(torch.float32)
        return mo.MetaTraining(
            ControlledMLP(),
            mo.tasks.small_networks(),
            estimator=mo.Groups(
                mo.NRES(0.03, 2, window=5, objective=mo.MeanLoss(mo.Relative())), 2
            ),
            outer=Adam(0.01),
            horizon=(8, 12),
            clip=280.0,
        )

    straight, first, second = make(), make(), make()
    for _ in range(4):
        straight.step()
    for _ in range(2):
        first.step()
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        second.step()
    for one, other in zip(
        straight.optimizer.parameters(), second.optimizer.parameters(), strict=True
    ):
        assert torch.equal(one, other)
    assert straight.optimizer.control.abs().max() > 0


NRES = mo.NRES(0.1, window=10)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": Sizes()}, r"`tasks` is drawn anew .*got NRES.*Groups\(NRES"),
        ({"horizon": (20, 30)}, r"`horizon` is drawn anew .*Groups\(NRES"),
        ({"horizon": 9}, "The horizon 9 is shorter than the window of 10 steps. Take window=9"),
        ({"horizon": (5, 30), "estimator": mo.Groups(NRES)}, "The horizon 5 is shorter than"),
        ({"horizon": (30, 20), "estimator": mo.Groups(NRES)}, r"\(shortest, longest\), got"),
        ({"optimizer": SGD(0.1)}, "SGD has nothing to train"),
    ],
)
def test_what_does_not_go_together_is_said(given: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"optimizer": learnable(), "tasks": Lines(), "estimator": NRES}
    arguments |= {"outer": Adam(0.1), "horizon": 20} | given
    with pytest.raises(ValueError, match=message):
        mo.MetaTraining(arguments.pop("optimizer"), arguments.pop("tasks"), **arguments)


def test_more_bad_input() -> None:
    with pytest.raises(ValueError, match="at most the number of groups, 2, got 3"):
        mo.Groups(NRES, 2, at_a_time=3)
    with pytest.raises(ValueError, match=r"Relative: `cap` must be .*positive.*, got 0"):
        mo.Relative(cap=0)
    estimator = mo.ES(0.1, 2, objective=mo.ValidationLoss())
    given = (learnable(), {"lr": torch.tensor(0.1)}, Lines(held_out=False), 5, None)
    with pytest.raises(ValueError, match="ValidationLoss needs tasks that hold a batch out"):
        estimator(*given, torch.Generator())


class Growing:
    """Tasks of which each has one feature more."""

    def __init__(self) -> None:
        self.drawn = 0

    def loss(self, params: Tensor, batch: Tensor) -> Tensor:
        return params.square().sum()

    def sample(self, generator: torch.Generator, steps: int) -> mo.Task:
        self.drawn += 1
        return mo.Task(torch.zeros(self.drawn), torch.zeros(steps))


def test_tasks_of_different_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"Growing: .*same shapes.*\(1,\) and \(2,\).*Mixture"):
        sample_tasks(Growing(), torch.Generator(), 2, 3)


def test_training_that_has_no_finite_task_any_more_says_so_and_the_best_is_kept() -> None:
    training = mo.MetaTraining(
        SGD(nn.Parameter(torch.tensor(1e300))),
        Lines(),
        estimator=mo.NRES(0.1, 2, window=10),
        outer=Adam(0.1),
        horizon=20,
    )
    trainer = mo.Trainer(training, max_steps=100, validate=lambda: 1.0, progress=False)
    with pytest.raises(mo.NonFiniteError, match=r"MetaTraining, outer step .*every task, in each"):
        trainer.fit()
    assert trainer.best_step == 0
    assert training.optimizer.lr == 1e300


def test_what_is_judged_are_the_parameters_to_evaluate_at() -> None:
    """Those of an average: its decay has a derivative, against finite differences."""
    family, optimizer = Lines(), EMA(nn.Parameter(torch.tensor(0.6)), SGD(0.1))
    task = family.sample(torch.Generator().manual_seed(5), 7)

    def value(decay: float) -> Tensor:
        one = EMA(decay, SGD(0.1))
        out = mo.minimize(family.loss, one, task.params, task.batches)
        return family.loss(one.evaluated(out.opt_state, out.params), task.held_out)

    slope = (value(0.6 + 1e-6) - value(0.6 - 1e-6)) / 2e-6
    given = (optimizer, {"decay": optimizer.decay.detach()}, family, 7, None)
    exact = mo.FullUnroll(1, mo.Backprop(), objective=mo.ValidationLoss())(
        *given, torch.Generator().manual_seed(5)
    )
    torch.testing.assert_close(exact.grads["decay"][0], slope, rtol=1e-6, atol=1e-9)
    generator = torch.Generator().manual_seed(5)
    estimator, state, found = mo.NRES(1e-3, 1, window=3, objective=mo.ValidationLoss()), None, 0.0
    torch.manual_seed(0)
    seeded = torch.Generator().manual_seed(5)
    torch.randint(2**62, (), generator=seeded)
    task = family.sample(seeded, 7)
    for _ in range(3):
        estimate = estimator(*given[:4], state, generator)
        state = estimate.state
        found += estimate.slopes * 1e-6 / estimate.multipliers.of(torch.arange(1))["decay"]
    slope = (value(0.6 + 1e-6) - value(0.6 - 1e-6)) / 2e-6
    torch.testing.assert_close(found[0] / 3, slope, rtol=1e-3, atol=1e-9)
