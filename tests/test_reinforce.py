"""`mo.Reinforce`: against the sum over rollouts written out, and against quadrature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaopt as mo
from metaopt.meta_training import sample_tasks
from optimizers import SGD, Adam, ClipNorm, MLPSchedule, PolicySchedule

pytestmark = pytest.mark.usefixtures("float64")


def policy(steps: int, **options: Any) -> PolicySchedule:
    """A policy whose mean depends on what it observes."""
    schedule = PolicySchedule(0.3, steps, hidden_size=3, max_change=0.8, **options)
    with torch.no_grad():
        schedule.net.readout.normal_()
        schedule.net.output_bias.fill_(0.4)
    return schedule


def trained(optimizer: mo.Optimizer) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in optimizer.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class Parabola:
    """L = w^2 / 2 from w = 1, without anything random."""

    def loss(self, params: Tensor, batch: Tensor) -> Tensor:
        return params.square() / 2 + 0 * batch

    def sample(self, generator: torch.Generator, steps: int) -> mo.Task:
        return mo.Task(torch.ones(()), torch.zeros(steps))


@pytest.mark.parametrize("tail", [None, 2])
@pytest.mark.parametrize("by_name", [False, True])
def test_it_is_the_sum_over_rollouts_and_steps(tail: int | None, by_name: bool) -> None:
    family, horizon, tasks, rollouts = mo.tasks.Quadratics(3), 5, 2, 3
    schedule = policy(7, std=0.6)
    optimizer = SGD({"*": schedule} if by_name else schedule)
    (prefix,) = {name.rpartition("net")[0] for name in trained(optimizer)}
    estimate = mo.Reinforce(tasks, rollouts, tail)(
        optimizer, trained(optimizer), family, horizon, None, torch.Generator().manual_seed(3)
    )
    generator = torch.Generator().manual_seed(3)
    drawn = sample_tasks(family, generator, tasks, horizon)
    noises = torch.randn(tasks, rollouts, 7, generator=generator)
    parameters = dict(schedule.net.named_parameters())
    for i in range(tasks):
        task, losses, scores = mo.tree.index(tuple(drawn), i), [], []
        for noise in noises[i]:
            w, state = task[0], schedule.init(noise)
            state["noise"] = noise
            row, log_p = [], []
            for t in range(horizon):
                batch = mo.tree.index(task[1], t)
                gradient, loss = torch.func.grad_and_value(family.loss)(w, batch)
                grads = mo.tree.leaves(gradient)
                rate, state = schedule(state, step=torch.tensor(t), loss=loss, grads=grads)
                observed, action = state["seen"][t].detach(), state["actions"][t].detach()
                mean = schedule.net(observed)
                torch.testing.assert_close(action, mean.detach() + 0.6 * noise[t])
                log_p.append(torch.distributions.Normal(mean, 0.6).log_prob(action))
                rate = rate.detach()
                w = mo.tree.map(lambda p, g, r=rate: p - r * g, w, gradient)
                row.append(loss)
            losses.append(torch.stack(row))
            scores.append(torch.stack(log_p))
        weights = torch.full((horizon,), 1 / horizon)
        if tail:
            weights = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5])
        total = 0
        for t in range(horizon):
            returns = [float((weights * one)[t + 1 :].sum()) for one in losses]
            for k in range(rollouts):
                others = [returns[j] for j in range(rollouts) if j != k]
                advantage = returns[k] - sum(others) / len(others)
                total = total + advantage * scores[k][t] / rollouts
        expected = torch.autograd.grad(total, list(parameters.values()))
        for name, one in zip(parameters, expected, strict=True):
            torch.testing.assert_close(
                estimate.grads[f"{prefix}net.{name}"][i], one, rtol=1e-9, atol=1e-13, msg=name
            )
        torch.testing.assert_close(estimate.losses[i], torch.stack(losses).mean())


def test_it_is_the_derivative_of_the_expected_loss() -> None:
    """L_0 = 1/2, L_1 = (1 - v)^2 / 2; the mean over the one action that counts by quadrature."""
    schedule = policy(2, std=0.7)
    optimizer = SGD(schedule)
    theta = trained(optimizer)
    # the observations at w = 1: loss 1/2, gradient 1, no update yet, step 0
    seen = torch.tensor([math.log(1.5), math.log(1 + 1e-6) / 5, 0.0, 0.0])
    # E f(noise) = sum_i weight_i f(sqrt(2) x_i) / sqrt(pi) by Golub and Welsch's eigenvalues
    off = (torch.arange(1, 40) / 2.0).sqrt()
    points, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    weights = vectors[0].square()

    def expected_loss() -> Tensor:
        action = schedule.net(seen) + 0.7 * math.sqrt(2) * points
        value = 0.3 * torch.exp(0.8 * 2 / math.pi * torch.atan(math.pi / 2 * action))
        return (weights * (0.5 + (1 - value).square() / 2) / 2).sum()

    names = [n for n, _ in schedule.net.named_parameters()]
    exact = torch.autograd.grad(expected_loss(), list(schedule.net.parameters()))
    found = mo.Reinforce(tasks=200, rollouts=100)(
        optimizer, theta, Parabola(), 2, None, torch.Generator().manual_seed(0)
    )
    for name, one in zip(names, exact, strict=True):
        rows = found.grads[f"lr.net.{name}"]
        error = rows.std(0) / len(rows) ** 0.5
        # 4.5 standard errors: a chance of 1e-5 for each of 27 numbers
        assert ((rows.mean(0) - one).abs() <= 4.5 * error + 1e-12).all(), name
    bias = found.grads["lr.net.output_bias"]
    assert bias.mean().abs() > 10 * bias.std() / len(bias) ** 0.5


def test_meta_training_with_it_lowers_a_loss_that_has_no_derivative() -> None:
    """The loss is rounded, so it is constant but for its jumps; the steps are the parabola's."""

    class Stairs(Parabola):
        def loss(self, params: Tensor, batch: Tensor) -> Tensor:
            value = params.square() / 2 + 0 * batch
            return (value * 50).round() / 50 + (value - value.detach())

    optimizer = SGD(PolicySchedule(0.05, 5, hidden_size=3, max_change=0.5))
    training = mo.MetaTraining(
        optimizer, Stairs(), estimator=mo.Reinforce(2, 8), outer=Adam(0.05), horizon=5
    )
    before = mo.evaluate({"": optimizer}, Stairs(), horizon=5, seeds=1).mean("")
    for _ in range(25):
        training.step()
    after = mo.evaluate({"": optimizer}, Stairs(), horizon=5, seeds=1).mean("")
    assert after < 0.8 * before
    assert float(optimizer.lr.log_initial) == pytest.approx(math.log(0.05))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(0.1), "`Reinforce` trains policies, got SGD without one"),
        (lambda: ClipNorm(1.0, SGD(PolicySchedule())), "got ClipNorm without one"),
        (lambda: SGD(MLPSchedule()), "got SGD without one"),
        (
            lambda: SGD(PolicySchedule(0.1, 3)),
            r"the record of a whole episode, got 4 steps and a policy with steps=3",
        ),
        (
            lambda: SGD(PolicySchedule(0.1, 4), nn.Parameter(torch.tensor(0.5))),
            r"got the parameters \['momentum'\] of SGD",
        ),
    ],
)
def test_what_it_cannot_train_is_refused(make: Any, message: str) -> None:
    optimizer = make()
    with pytest.raises(ValueError, match=message):
        mo.Reinforce(2, 2)(
            optimizer, trained(optimizer), mo.tasks.Quadratics(2), 4, None, torch.Generator()
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollouts": 1}, "`rollouts` must be an integer of at least 2, got 1"),
        ({"tasks": 0}, "`tasks` must be a positive integer, got 0"),
        ({"tail": 0}, "`tail` must be a positive integer or None, got 0"),
    ],
)
def test_bad_numbers_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mo.Reinforce(**options)


def test_a_policy_acts_by_its_mean_unless_it_is_given_noise() -> None:
    optimizer = SGD(policy(3))
    first, again = (
        mo.minimize(Parabola().loss, optimizer, torch.ones(()), torch.zeros(5)).losses
        for _ in range(2)
    )
    assert torch.equal(first, again)
    # its value is differentiable too
    estimate = mo.FullUnroll(1, mo.Backprop())(
        optimizer, trained(optimizer), Parabola(), 3, None, torch.Generator()
    )
    assert all(one.abs().max() > 1e-6 for one in estimate.grads.values())
