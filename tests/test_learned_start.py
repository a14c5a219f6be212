"""Initial parameters that are learned, by every estimator: against formulas and loops by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_evolution_estimators import ByHand, Regression
from torch import Tensor, nn

import metaopt as mo
from metaopt.meta_training import sample_tasks
from optimizers import EMA, SGD, Adam, Grouped, LearnedStart

float64 = pytest.mark.usefixtures("float64")


def learnable() -> LearnedStart:
    start = nn.Parameter(torch.tensor([0.5, -0.3]))
    return LearnedStart(start, SGD(nn.Parameter(torch.tensor(0.1)), momentum=0.6))


@float64
@pytest.mark.parametrize("rule", [mo.Backprop(), mo.FirstOrder(), mo.Backprop("steps")], ids=repr)
def test_full_unroll_is_the_gradient_of_each_episode(rule: Any) -> None:
    """By torch's own autograd, with the steps written out."""
    optimizer, generator = learnable(), torch.Generator().manual_seed(5)
    theta = dict(optimizer.named_parameters())
    estimator = mo.FullUnroll(tasks=3, differentiate=rule)
    found = estimator(optimizer, theta, Regression(), 4, None, generator)
    tasks = sample_tasks(Regression(), torch.Generator().manual_seed(5), 3, 4)  # type: ignore[arg-type]
    for i in range(3):
        w, velocity, total = theta["starts.0"], torch.zeros(2), torch.zeros(())
        for x, y in zip(*mo.tree.index(tasks.batches, i), strict=True):
            loss = (x @ w - y).square().mean()
            (grad,) = torch.autograd.grad(loss, w, create_graph=True)
            grad = grad.detach() if isinstance(rule, mo.FirstOrder) else grad
            total, velocity = total + loss / 4, 0.6 * velocity + grad
            w = w - theta["optimizer.lr"] * velocity
        expected = torch.autograd.grad(total, list(theta.values()))
        for name, grad in zip(theta, expected, strict=True):
            torch.testing.assert_close(found.grads[name][i], grad, rtol=1e-10, atol=1e-14)


@float64
def test_only_the_first_window_reaches_the_start() -> None:
    optimizer, estimator = learnable(), mo.TruncatedBackprop(window=2, tasks=2)
    theta, generator = dict(optimizer.named_parameters()), torch.Generator().manual_seed(5)
    state, norms = estimator.init(), []
    for _ in range(3):
        found = estimator(optimizer, theta, Regression(), 4, state, generator)
        state = found.state
        norms.append(found.grads["starts.0"].norm())
    assert norms[0] > 0
    assert norms[1] == 0
    assert norms[2] > 0


class FromTheta(ByHand):
    """Episodes start at the start that a half has when it makes its first step."""

    def run(self, theta: Any, half: Any, task: mo.Task, start: int, stop: int) -> Tensor:
        if start == 0:
            half["w"] = theta["starts.0"]
        return super().run(theta, half, task, start, stop)


@float64
@pytest.mark.parametrize(
    "estimator",
    [
        mo.ES(0.05, 2),
        mo.TruncatedES(0.05, 3, window=3),
        mo.PES(0.05, 3, window=3),
        mo.NRES(0.05, 3, window=3, chunk_size=2),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_an_estimate_is_what_the_formula_says(estimator: Any) -> None:
    """Pair by pair, over several episodes of 7 steps."""
    optimizer = learnable()
    hand = FromTheta(estimator, optimizer, 7, seed=5)
    generator, state = torch.Generator().manual_seed(5), estimator.init()
    for _ in range(5):
        estimate = estimator(optimizer, hand.theta, Regression(), 7, state, generator)
        for i, expected in enumerate(hand.estimate()):
            found = estimate.weighted_sum(torch.eye(estimator.pairs)[i])
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        state = estimate.state


class Bowl:
    """L(w) = |w|^2 / 2."""

    def loss(self, w: Tensor, _: Tensor) -> Tensor:
        return w.square().sum() / 2

    def sample(self, generator: torch.Generator, steps: int) -> mo.Task:
        return mo.Task(torch.zeros(2), torch.zeros(steps, 1))


@float64
@pytest.mark.parametrize("kind", [mo.ES, mo.PES, mo.NRES], ids=lambda kind: kind.__name__)
def test_without_bias_on_a_quadratic(kind: Any) -> None:
    """w_t = (1 - lr)^t w_0, so that d/dw_0 of 1/T sum_t |w_t|^2 / 2 is w_0 / T sum_t (1 - lr)^2t.

    The loss is quadratic in w_0: smoothing leaves the derivative as it is. Within 4 standard errors
    of pairs that are independent of each other, each with its mean over whole episodes.
    """
    start, pairs = torch.tensor([1.0, -2.0]), 2000
    optimizer = LearnedStart(start, SGD(0.2))
    theta = {name: p.detach() for name, p in optimizer.named_parameters()}
    windows = {} if kind is mo.ES else {"window": 2, "stagger": False}
    estimator = kind(0.1, pairs, **windows)
    state, found, generator = estimator.init(), [], torch.Generator().manual_seed(0)
    for _ in range(estimator.windows(4)):
        estimate = estimator(optimizer, theta, Bowl(), 4, state, generator)
        state = estimate.state
        rows = estimate.multipliers.of(torch.arange(pairs))["starts.0"]
        found.append(estimate.slopes[:, None] * rows)
    by_pair = torch.stack(found).mean(0)
    truth = start * (0.8 ** (2 * torch.arange(4))).mean()
    error = by_pair.std(0) / pairs**0.5
    assert ((by_pair.mean(0) - truth).abs() < 4 * error).all()
    assert (error < 0.1 * truth.abs()).all()


def test_it_is_learned_and_evaluated_wherever_it_stands() -> None:
    """Behind other transforms, all but one tensor; the given parameters themselves learn."""
    family = mo.tasks.Supervised(mo.tasks.MLP((8,)), batch_size=16)
    drawn = family.sample(torch.Generator().manual_seed(0), 1).params
    start = {name: nn.Parameter(p.clone()) for name, p in list(drawn.items())[:-1]}
    optimizer = EMA(0.5, Grouped({"*": LearnedStart(start, SGD(0.05))}))
    before = mo.evaluate({"": optimizer}, family, horizon=3, seeds=8).mean("")
    training = mo.MetaTraining(
        optimizer, family, estimator=mo.FullUnroll(2), outer=Adam(0.05), horizon=3
    )
    for _ in range(12):
        training.step()
    assert mo.evaluate({"": optimizer}, family, horizon=3, seeds=8).mean("") < 0.8 * before
    assert not any(torch.equal(start[name], drawn[name]) for name in start)


@pytest.mark.parametrize("estimator", [mo.FullUnroll(2), mo.TruncatedBackprop(2, 2), mo.ES(0.1, 2)])
@pytest.mark.parametrize("clip", [1.0, None])
def test_a_start_and_a_rate_of_two_dtypes(estimator: Any, clip: float | None) -> None:
    start = {"w": torch.ones(3, dtype=torch.float64)}
    optimizer = LearnedStart(start, SGD(lr=nn.Parameter(torch.tensor(0.1))))

    class Bowl:
        def loss(self, params: Any, batch: Any) -> torch.Tensor:
            return (params["w"] - batch).square().sum()

        def sample(self, generator: torch.Generator, steps: int) -> mo.Task:
            return mo.Task({"w": torch.zeros(3).double()}, torch.full((steps, 3), 2.0).double())

    training = mo.MetaTraining(
        optimizer, Bowl(), estimator=estimator, outer=SGD(1e-3), horizon=2, clip=clip
    )
    assert training.step()["tasks left out"] == 0
    assert (optimizer.params["w"] != 1).all()


def test_another_network_is_refused(tmp_path: Any) -> None:
    optimizer = LearnedStart({"w": torch.ones(3), "b": torch.ones(())}, SGD(0.1))
    with pytest.raises(ValueError, match=r"parameter 'w', \(3,\) of torch.float32, got \(2,\)"):
        optimizer.initial({"w": torch.zeros(2), "b": torch.zeros(())})
    with pytest.raises(ValueError, match=r"parameter 'b', \(\) of .*, got only \['w'\]"):
        optimizer.initial({"w": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"got \(3,\) of torch.float64"):
        optimizer.initial({"w": torch.zeros(3).double(), "b": torch.zeros(())})
    with pytest.raises(ValueError, match=r"`params` must have a parameter, got \{\}"):
        LearnedStart({}, SGD(0.1))
    with pytest.raises(TypeError, match="LearnedStart: `params` must be floating-point"):
        LearnedStart({"w": torch.ones(2, dtype=torch.int64)}, SGD(0.1))
    optimizer.save(tmp_path / "start.safetensors")
    again = LearnedStart.load(tmp_path / "start.safetensors")
    assert again.names == optimizer.names
    assert torch.equal(again.params["w"], optimizer.params["w"])
