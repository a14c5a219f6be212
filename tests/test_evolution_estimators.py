"""ES, TruncatedES, PES and NRES: by hand, against known derivatives, and what they say no to."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaopt as mo
from metaopt.meta_training import sample_tasks
from metaopt.meta_training.noise import Noise, normal, philox
from optimizers import SGD, Adam

float64 = pytest.mark.usefixtures("float64")


# The noise


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox(counter: list[int], key: list[int], expected: str) -> None:
    """The known answers of Random123, the library of those who found it."""
    words = philox([torch.tensor([word]) for word in counter], (key[0], key[1]))
    assert " ".join(f"{word.item():08x}" for word in words) == expected


def test_noise_is_the_same_in_any_order_and_any_company() -> None:
    """Bit for bit: for some of the particles, as another process would ask, and shuffled."""
    steps, particles = torch.arange(60) % 7, torch.arange(60)
    whole = normal(3, steps, particles, 37)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole[order], normal(3, steps[order], particles[order], 37))
    for rank in range(2):
        mine = particles % 2 == rank
        assert torch.equal(whole[mine], normal(3, steps[mine], particles[mine], 37))
    assert torch.equal(whole[:1], normal(3, steps[:1], particles[:1], 37))
    others = (normal(4, steps, particles, 37), normal(3, steps + 1, particles, 37))
    assert not any(torch.isclose(whole, other).any() for other in others)
    assert not torch.isclose(whole[0], whole[7]).any()  # another particle of the same step


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_noise_has_unit_variance_and_no_correlations(rank: int | None) -> None:
    """Of 40,000 draws: a mean of products is off by 1/200, and by 3/200 where entries are
    products themselves; five times that is allowed.
    """
    like = {"matrix": torch.zeros(2, 3), "vector": torch.zeros(2), "number": torch.zeros(())}
    draws = torch.arange(40_000)
    found = Noise(0, 0.5, like, rank)(draws // 50, draws % 50)
    assert {name: rows.shape[1:] for name, rows in found.items()} == {
        name: leaf.shape for name, leaf in like.items()
    }
    rows = torch.cat([rows.reshape(len(draws), -1) for rows in found.values()], 1).double()
    covariance = rows.T @ rows / len(draws) / 0.25
    assert (covariance - torch.eye(9)).abs().max() < 0.075
    assert rows.mean(0).abs().max() < 0.0125


# By hand


class Regression:
    """Least squares in two dimensions, from other data at each step."""

    def loss(self, w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (x @ w - y).square().mean()

    def sample(self, generator: torch.Generator, steps: int) -> mo.Task:
        x = torch.randn(steps, 4, 2, generator=generator)
        y = torch.randn(steps, 4, generator=generator)
        return mo.Task(torch.randn(2, generator=generator), (x, y))


class ByHand:
    """One pair after the other, each half by itself, as the formulas say."""

    def __init__(self, estimator: Any, optimizer: mo.Optimizer, horizon: int, seed: int) -> None:
        self.estimator, self.optimizer, self.horizon = estimator, optimizer, horizon
        self.window = min(getattr(estimator, "window", horizon), horizon)
        self.windows = math.ceil(horizon / self.window)
        self.generator = torch.Generator().manual_seed(seed)
        noise_seed = int(torch.randint(2**62, (), generator=self.generator))
        theta = {name: p.detach() for name, p in optimizer.named_parameters()}
        self.theta, self.noise = theta, Noise(noise_seed, estimator.std, theta)
        self.count = 0
        self.pairs = [self.new(task) for task in self.draw(estimator.pairs)]
        for i, pair in enumerate(self.pairs):
            if getattr(estimator, "stagger", False):
                pair["step"] = self.window * (i * self.windows // estimator.pairs)
                for half in pair["halves"]:
                    self.run(theta, half, pair["task"], 0, pair["step"])

    def draw(self, count: int) -> list[mo.Task]:
        drawn = tuple(sample_tasks(Regression(), self.generator, count, self.horizon))  # type: ignore[arg-type]
        return [mo.Task(*mo.tree.index(drawn, i)) for i in range(count)]

    def new(self, task: mo.Task) -> dict[str, Any]:
        state = self.optimizer.init(task.params)
        halves = [{"w": task.params, "state": state} for _ in range(2)]
        return {"task": task, "halves": halves, "step": 0, "seen": [], "first": self.count}

    def run(self, theta: Any, half: Any, task: mo.Task, start: int, stop: int) -> Tensor:
        """Take a half from one step to another, and return its losses."""
        if start == stop:
            return torch.zeros(0)
        rows = mo.tree.index(task.batches, slice(start, stop))
        optimizer = copy.deepcopy(self.optimizer)
        optimizer.load_state_dict(theta)
        with torch.no_grad():
            out = mo.minimize(
                Regression().loss, optimizer, half["w"], rows, opt_state=half["state"]
            )
        half["w"], half["state"] = out.params, out.opt_state
        return out.losses

    def objective(self, theta: Any, half: Any, pair: Any, start: int, stop: int) -> Tensor:
        last = mo.tree.index(pair["task"].batches, -1)
        before = Regression().loss(half["w"], last)
        losses = self.run(theta, half, pair["task"], start, stop)
        if self.estimator.objective == mo.MeanLoss():
            return losses.sum() * self.windows / self.horizon
        return (Regression().loss(half["w"], last) - before) * self.windows

    def estimate(self) -> list[dict[str, Tensor]]:
        for i, pair in enumerate(self.pairs):
            self.estimate_one(i, pair)
        return self.finish()

    def estimate_one(self, i: int, pair: dict[str, Any]) -> None:
        kind = type(self.estimator).__name__
        step = pair["first"] if kind == "NRES" else self.count
        rows = self.noise(torch.tensor([step]), torch.tensor([i]))
        epsilon = {name: row[0] for name, row in rows.items()}
        start, stop = pair["step"], min(pair["step"] + self.window, self.horizon)
        before = copy.deepcopy(pair["halves"][0])
        values = [
            self.objective(
                {name: at + sign * epsilon[name] for name, at in self.theta.items()},
                half,
                pair,
                start,
                stop,
            )
            for sign, half in zip((1, -1), pair["halves"], strict=True)
        ]
        if kind == "TruncatedES":
            self.run(self.theta, before, pair["task"], start, stop)
            pair["halves"] = [before, copy.deepcopy(before)]
        pair["seen"] = [*(pair["seen"] if kind == "PES" else []), epsilon]
        slope = (values[0] - values[1]) / (2 * self.estimator.std**2)
        pair["found"] = {
            name: slope * sum(seen[name] for seen in pair["seen"]) for name in self.theta
        }
        pair["step"] = stop

    def finish(self) -> list[dict[str, Tensor]]:
        found = [pair["found"] for pair in self.pairs]
        self.count += 1
        over = [i for i, pair in enumerate(self.pairs) if pair["step"] == self.horizon]
        if over:
            for i, task in zip(over, self.draw(len(over)), strict=True):
                self.pairs[i] = self.new(task)
        return found


def learnable() -> mo.Optimizer:
    return SGD(nn.Parameter(torch.tensor(0.1)), momentum=nn.Parameter(torch.tensor(0.6)))


@float64
@pytest.mark.parametrize("objective", [mo.MeanLoss(), mo.LastLoss()], ids=repr)
@pytest.mark.parametrize(
    "kind", [mo.ES, mo.TruncatedES, mo.PES, mo.NRES], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize("window", [1, 3, 7, 10])
def test_an_estimate_is_what_the_formula_says(
    kind: Any, window: int, objective: mo.Objective
) -> None:
    """Over several episodes of 7 steps, whose last windows are shorter; pair by pair."""
    of_window: dict[str, Any] = {} if kind is mo.ES else {"window": window}
    for stagger, chunk in itertools.product([True, False], [None, 2]):
        if kind is not mo.ES:
            of_window["stagger"] = stagger
        estimator = kind(0.05, 3, objective=objective, chunk_size=chunk, **of_window)
        optimizer = learnable()
        hand = ByHand(estimator, optimizer, 7, seed=5)
        generator, state = torch.Generator().manual_seed(5), estimator.init()
        for _ in range(9 if window == 3 else 4):
            estimate = estimator(optimizer, hand.theta, Regression(), 7, state, generator)
            for i, expected in enumerate(hand.estimate()):
                found = estimate.weighted_sum(torch.eye(3)[i])
                norm = torch.stack([*expected.values()]).norm()
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(estimate.norms[i], norm, rtol=1e-9, atol=1e-12)
            state = estimate.state


# What they estimate


class Walk(mo.Optimizer):
    """s <- s + theta."""

    def __init__(self, theta: float = 0.5) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def slots(self, params: Any) -> Any:
        return {}

    def update(self, grads: Any, params: Any, slots: Any, hyper: Any, step: Any) -> Any:
        return [torch.zeros_like(p) + self.theta for p in params], slots


class Line:
    """L(s) = s, from s = 0: after t steps it is t theta."""

    def loss(self, s: Tensor, _: Tensor) -> Tensor:
        return s.sum()

    def sample(self, generator: torch.Generator, steps: int) -> mo.Task:
        return mo.Task(torch.zeros(1), torch.zeros(steps, 1))


def mean_of(estimator: Any, horizon: int, cycles: int) -> tuple[float, float]:
    """Return the mean estimate of d sum_t L_t / d theta, and its standard error.

    Over whole cycles of windows, after one that is burn-in: where the pairs begin, theta has taken
    them, without noise. The error is that of independent pairs, each with its mean over all cycles.
    """
    optimizer, generator = Walk(), torch.Generator().manual_seed(1)
    theta, state = {"theta": optimizer.theta.detach()}, estimator.init()
    windows = -(-horizon // getattr(estimator, "window", horizon))
    found = []
    for _ in range((cycles + 1) * windows):
        estimate = estimator(optimizer, theta, Line(), horizon, state, generator)
        state = estimate.state
        multipliers = estimate.multipliers.of(torch.arange(estimator.pairs))["theta"]
        found.append(estimate.slopes * multipliers)
    scale = horizon if estimator.objective == mo.MeanLoss() else 1
    by_pair = scale * torch.stack(found)[windows:].mean(0)
    return by_pair.mean().item(), by_pair.std().item() / estimator.pairs**0.5


ROWS = [
    (mo.MeanLoss(), 21, 5, 210),  # sum_{t < 21} t
    (mo.MeanLoss(), 21, 7, 210),
    (mo.MeanLoss(), 8, 20, 28),
    (mo.LastLoss(), 20, 5, 20),
    (mo.MeanLoss(), 12, 1, 66),
    (mo.MeanLoss(), 12, 5, 66),
    (mo.MeanLoss(), 12, 12, 66),
    (mo.MeanLoss(), 12, 30, 66),
]


@float64
@pytest.mark.parametrize(("objective", "horizon", "window", "truth"), ROWS)
def test_pes_and_nres_are_unbiased(objective: Any, horizon: int, window: int, truth: int) -> None:
    """Within four standard errors, which are below a fifth of the truth."""
    for kind in (mo.PES, mo.NRES):
        estimator = kind(0.1, 2000, window=window, objective=objective)
        mean, error = mean_of(estimator, horizon, 5)
        assert error < truth / 20
        assert abs(mean - truth) < 4 * error, kind.__name__


@float64
def test_es_is_unbiased_and_truncated_es_is_not() -> None:
    mean, error = mean_of(mo.ES(0.1, 2000), 12, 12)
    assert abs(mean - 66) < 4 * error < 10
    mean, error = mean_of(mo.TruncatedES(0.1, 2000, window=5), 12, 12)
    assert abs(mean - 21) < 4 * error < 4  # 10 + 10 + 1 in windows of 5, 5 and 2; the truth is 66
    mean, _ = mean_of(mo.TruncatedES(0.1, 2000, window=1), 12, 2)
    assert mean == 0  # a loss before a step does not depend on it


class Balance(mo.Optimizer):
    """s <- A s + theta b in 23 dimensions: at once theta moves s_0 up, in the long run down.

    Vicol, Metz, Sohl-Dickstein 2021, arXiv:2112.13835, section 5.2.
    """

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(0.5))
        self.matrix = torch.eye(23) / 2 + torch.diag(torch.full((22,), 0.5), 1)
        self.sign = torch.tensor([1.0] * 10 + [-1.0] * 13)

    def slots(self, params: Any) -> Any:
        return {}

    def update(self, grads: Any, params: Any, slots: Any, hyper: Any, step: Any) -> Any:
        return [self.matrix @ p + self.theta * self.sign - p for p in params], slots


class FirstEntry:
    def loss(self, s: Tensor, _: Tensor) -> Tensor:
        return (s[0] - 1) ** 2 / 2

    def sample(self, generator: torch.Generator, steps: int) -> mo.Task:
        return mo.Task(torch.ones(23), torch.zeros(steps, 1))


def loss_after_500_steps(estimator: Any, updates: int) -> float:
    optimizer = Balance()
    training = mo.MetaTraining(
        optimizer, FirstEntry(), estimator=estimator, outer=SGD(1e-4), horizon=500, clip=None
    )
    for _ in range(updates):
        training.step()
    return mo.evaluate({"": optimizer}, FirstEntry(), horizon=501, seeds=1).curves[""][0, -1].item()


@float64
def test_influence_balancing() -> None:
    """The loss starts at 8; short windows without memory of what theta did lead away from 0."""
    assert loss_after_500_steps(mo.NRES(0.1, 200, window=1, stagger=False), 700) < 0.05
    assert loss_after_500_steps(mo.PES(0.1, 200, window=1, stagger=False), 250) < 1
    short = mo.TruncatedBackprop(2, 1, mo.Backprop())  # a loss before a step, and one after it
    assert loss_after_500_steps(short, 150) > 8.2
    assert loss_after_500_steps(mo.TruncatedES(0.1, 50, window=2, stagger=False), 150) > 8.2


# In training


class NoisyLine(Line):
    """The same with a random number added, and dropout of a one."""

    def loss(self, s: Tensor, _: Tensor) -> Tensor:
        noise = nn.functional.dropout(torch.ones(40), 0.5).sum() + torch.randn(())
        return s.sum() + noise


@float64
@pytest.mark.parametrize(
    "kind", [mo.ES, mo.TruncatedES, mo.PES, mo.NRES], ids=lambda kind: kind.__name__
)
def test_halves_share_the_random_numbers_of_the_loss(kind: Any) -> None:
    """A difference of theirs is then that of what depends on theta; pairs draw other numbers."""

    def first(family: Line) -> Any:
        torch.manual_seed(0)
        theta = {"theta": torch.tensor(0.5)}
        generator = torch.Generator().manual_seed(0)
        return kind(0.1, 4)(Walk(), theta, family, 5, None, generator)

    clean, noisy = first(Line()), first(NoisyLine())
    torch.testing.assert_close(noisy.slopes, clean.slopes, rtol=1e-8, atol=1e-10)
    assert len((noisy.losses - clean.losses).unique()) == 4


class Explodes(Line):
    """No number any more for half of the tasks, after two steps."""

    def loss(self, s: Tensor, batch: Tensor) -> Tensor:
        return s.sum() / batch.sum()

    def sample(self, generator: torch.Generator, steps: int) -> mo.Task:
        is_good = torch.randint(2, (), generator=generator)
        batches = torch.ones(steps, 1)
        batches[2:] = is_good
        return mo.Task(torch.ones(1), batches)


def test_pairs_without_numbers_are_left_out_and_begin_again() -> None:
    optimizer = Walk()
    training = mo.MetaTraining(
        optimizer,
        Explodes(),
        estimator=mo.PES(0.1, 16, window=2, stagger=False),
        outer=SGD(1e-3),
        horizon=20,
    )
    out = [training.step()["tasks left out"] for _ in range(6)]
    assert out[0] == 0
    assert 0 < out[1] < 16
    assert optimizer.theta.isfinite()
    steps = training.estimator_state["step"]
    assert (steps == 12).sum() == 16 - out[1]  # those that never had one


@pytest.mark.parametrize("chunk", [None, 3])
def test_training_goes_on_where_it_was(chunk: int | None) -> None:
    def make() -> mo.MetaTraining:
        return mo.MetaTraining(
            Adam(nn.Parameter(torch.tensor(0.01))),
            mo.tasks.Quadratics(3),
            estimator=mo.PES(0.01, 5, window=4, chunk_size=chunk),
            outer=Adam(1e-2),
            horizon=10,
        )

    one, other = make(), make()
    for _ in range(4):
        one.step()
    saved = copy.deepcopy(one.state_dict())
    expected = [one.step() for _ in range(4)]
    other.load_state_dict(saved)
    found = [other.step() for _ in range(4)]
    assert found == expected
    assert torch.equal(other.optimizer.lr, one.optimizer.lr)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "estimator",
    [
        mo.ES(0.02, 16),
        mo.PES(0.02, 16, window=10),
        mo.NRES(0.02, 16, window=10, rank=2),
        mo.NRES(0.02, 16, window=10, objective=mo.LastLoss()),
    ],
    ids=["ES", "PES", "NRES, rank 2", "NRES, last"],
)
def test_a_learned_optimizer_is_trained(estimator: Any) -> None:
    """From nearly no progress, to less than half of the loss; losses on tasks that it never saw."""
    optimizer, family = SGD(nn.Parameter(torch.tensor(1e-4))), mo.tasks.Quadratics(5)
    training = mo.MetaTraining(
        optimizer, family, estimator=estimator, outer=Adam(1e-3), horizon=30, seed=1
    )

    def judge() -> float:
        return mo.evaluate({"": optimizer}, family, horizon=30, seeds=64).mean("")

    before = judge()
    for _ in range(30):
        training.step()
    assert judge() < before / 2


# Said no to


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mo.ES(0.0), r"ES: `std` must be .*positive.*, got 0.0"),
        (lambda: mo.PES(-0.1), r"PES: `std` must be .*positive.*, got -0.1"),
        (lambda: mo.NRES(math.nan), r"NRES: `std` must be .*, got nan"),
        (lambda: mo.NRES(0.1, 0), r"NRES: `pairs` must be a positive integer, got 0"),
        (lambda: mo.NRES(0.1, 1.5), r"NRES: `pairs` must be a positive integer, got 1.5"),
        (lambda: mo.PES(0.1, window=0), r"PES: `window` must be a positive integer, got 0"),
        (lambda: mo.PES(0.1, stagger=3), r"PES: `stagger` must be True or False, got 3"),
        (lambda: mo.ES(0.1, rank=0), r"ES: `rank` must be a positive integer or None, got 0"),
        (lambda: mo.ES(0.1, chunk_size=-1), r"ES: `chunk_size` must be a positive integer or None"),
        (lambda: mo.ES(0.1, objective="best"), r"ES: `objective` must be .*MeanLoss.*"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(
        TypeError if "stagger" in message or "objective" in message else ValueError, match=message
    ):
        make()


def test_they_are_values() -> None:
    assert mo.PES(0.1, window=5) == mo.PES(0.1, window=5)
    assert mo.PES(0.1, window=5) != mo.NRES(0.1, window=5)
    assert repr(mo.ES(0.1)) == (
        "ES(std=0.1, pairs=8, objective=MeanLoss(relative=None, late=1.0), rank=None, "
        "chunk_size=None, compile=False)"
    )
