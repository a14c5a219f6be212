"""Estimators, training, evaluation: against the same computation written out task by task."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import metaopt as mo
from metaopt.meta_training import sample_tasks
from metaopt.transforms import values_are_readable
from optimizers import EMA, SGD, Adam, LSTMOptimizer, MLPOptimizer


def objective(
    optimizer: mo.Optimizer, family: mo.TaskFamily, task: mo.Task, rule: object
) -> Tensor:
    return mo.minimize(
        family.loss, optimizer, task.params, task.batches, differentiate=rule
    ).losses.mean()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rule", [mo.FirstOrder(), mo.Backprop(), mo.Backprop(memory="steps")])
def test_full_unroll_is_the_gradient_of_each_episode(rule) -> None:
    family, optimizer = mo.tasks.Quadratics(4), LSTMOptimizer(hidden_size=3)
    theta = dict(optimizer.named_parameters())
    estimator = mo.FullUnroll(tasks=3, differentiate=rule)
    estimate = estimator(
        optimizer, theta, family, 6, estimator.init(), torch.Generator().manual_seed(5)
    )
    tasks = sample_tasks(family, torch.Generator().manual_seed(5), 3, 6)
    for i in range(3):
        loss = objective(optimizer, family, mo.Task(*mo.tree.index(tuple(tasks), i)), rule)
        torch.testing.assert_close(estimate.losses[i], loss, rtol=1e-12, atol=0)
        for (name, value), grad in zip(
            theta.items(), torch.autograd.grad(loss, list(theta.values())), strict=True
        ):
            torch.testing.assert_close(
                estimate.grads[name][i], grad, rtol=1e-10, atol=1e-14, msg=name
            )
            assert value.grad is None


class Images:
    """Classification by a small convolution network, with noise in the loss."""

    def __init__(self) -> None:
        self.net = mo.functional(
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 2))
        )
        self.vmapped = 0

    def loss(self, params: Tensor, batch: Tensor) -> Tensor:
        self.vmapped += not values_are_readable()
        return (self.net(params, batch) - batch.sum((1, 2, 3))[:, None]).square().mean()

    def sample(self, generator: torch.Generator, steps: int) -> mo.Task:
        params = {
            key: torch.randn(p.shape, generator=generator) for key, p in self.net.params.items()
        }
        return mo.Task(params, torch.randn(steps, 3, 1, 4, 4, generator=generator))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rule", [mo.FirstOrder(), mo.Backprop(), mo.Backprop(memory="steps")])
@pytest.mark.parametrize("tasks", [1, 3])
def test_one_task_and_convolutions_go_without_vmap(tasks: int, rule) -> None:
    """In a loop one task took 125 ms for 200.

    The values are those of each task by itself, its dropout masks too.
    """
    torch.manual_seed(0)
    family, optimizer = Images(), SGD(nn.Parameter(torch.tensor(0.01)))
    estimator = mo.FullUnroll(tasks=tasks, differentiate=rule)
    theta = {"lr": optimizer.lr.detach()}
    torch.manual_seed(1)
    estimator(optimizer, theta, family, 2, None, torch.Generator().manual_seed(5))
    calls, family.vmapped = family.vmapped, 0
    assert (calls > 0) == (tasks > 1)  # once, to see the convolution
    torch.manual_seed(1)
    estimate = estimator(optimizer, theta, family, 2, None, torch.Generator().manual_seed(5))
    assert family.vmapped == 0
    assert not any(grad.requires_grad for grad in estimate.grads.values())
    drawn = sample_tasks(family, torch.Generator().manual_seed(5), tasks, 2)
    torch.manual_seed(1)
    for i in range(tasks):
        loss = objective(optimizer, family, mo.Task(*mo.tree.index(tuple(drawn), i)), rule)
        torch.testing.assert_close(estimate.losses[i], loss, rtol=1e-12, atol=0)
        (grad,) = torch.autograd.grad(loss, optimizer.lr)
        torch.testing.assert_close(estimate.grads["lr"][i], grad, rtol=1e-10, atol=1e-14)


def test_defaults_can_be_read_in_a_signature() -> None:
    """`help` showed `differentiate = <factory>`."""
    signature = str(inspect.signature(mo.FullUnroll))
    assert "differentiate: 'Rule' = FirstOrder(memory='full')" in signature
    for name in {*mo.__all__} - {"Trial"}:  # a record, which a search makes
        if dataclasses.is_dataclass(one := getattr(mo, name)):
            assert "<factory>" not in str(inspect.signature(one)), name


@pytest.mark.usefixtures("float64")
def test_windows_go_on_where_they_stopped_and_start_afresh_at_the_horizon() -> None:
    family, optimizer, horizon = mo.tasks.Quadratics(4), LSTMOptimizer(hidden_size=3), 7
    theta = dict(optimizer.named_parameters())
    estimator, generator = mo.TruncatedBackprop(window=3, tasks=2), torch.Generator().manual_seed(5)
    tasks = sample_tasks(family, torch.Generator().manual_seed(5), 2, horizon)
    full = torch.stack(
        [
            mo.minimize(family.loss, optimizer, *mo.tree.index(tuple(tasks)[:2], i)).losses
            for i in range(2)
        ]
    ).detach()
    state, losses = estimator.init(), []
    for length in (3, 3, 1):  # the last window is shorter
        _, loss, state = estimator(optimizer, theta, family, horizon, state, generator)
        losses.append(loss * length)
    assert state is None
    torch.testing.assert_close(sum(losses), full.sum(1), rtol=1e-12, atol=0)
    whole = mo.TruncatedBackprop(window=horizon, tasks=2)(
        optimizer, theta, family, horizon, None, torch.Generator().manual_seed(5)
    )
    other = mo.FullUnroll(tasks=2)(
        optimizer, theta, family, horizon, None, torch.Generator().manual_seed(5)
    )
    for name in theta:
        torch.testing.assert_close(whole.grads[name], other.grads[name], rtol=1e-12, atol=1e-15)


@pytest.mark.usefixtures("float64")
def test_a_window_holds_its_start_constant() -> None:
    """Two windows of one step on L = (w - 1)^2 / 2 with SGD.

    dL_1/dlr through the state is left out.
    """

    @dataclass(frozen=True)
    class Parabola:
        def loss(self, params, batch):
            return (params - 1).square() / 2 + 0 * batch

        def sample(self, generator, steps):
            return mo.Task(torch.zeros(()), torch.zeros(steps))

    optimizer = SGD(nn.Parameter(torch.tensor(0.1)))
    theta = {"lr": optimizer.lr}
    two = mo.TruncatedBackprop(window=2, tasks=1)(
        optimizer, theta, Parabola(), 4, None, torch.Generator()
    )
    # w_1 = lr, so the mean loss of the window is (1 + (lr - 1)^2) / 4, with derivative (lr - 1) / 2
    assert two.grads["lr"].item() == pytest.approx((0.1 - 1) / 2, rel=1e-12)
    later = mo.TruncatedBackprop(window=2, tasks=1)(
        optimizer, theta, Parabola(), 4, two.state, torch.Generator()
    )
    # r_2 = -(1 - lr)^2 is held constant; losses r_2^2 / 2 and ((1 - lr) r_2)^2 / 2
    assert later.grads["lr"].item() == pytest.approx(-(1 - 0.1) * (1 - 0.1) ** 4 / 2, rel=1e-12)


def quick_training(seed: int = 0) -> mo.MetaTraining:
    return mo.MetaTraining(
        MLPOptimizer(hidden_size=4),
        mo.tasks.DigitsMLP(hidden=(8,), batch_size=16),
        estimator=mo.TruncatedBackprop(window=3, tasks=2),
        outer=Adam(1e-2),
        horizon=8,
        seed=seed,
    )


def test_training_resumes_bit_for_bit_from_its_state() -> None:
    training = quick_training()
    for _ in range(4):
        training.step()
    saved = copy.deepcopy(training.state_dict())
    for _ in range(4):
        training.step()
    resumed = quick_training(seed=99)
    resumed.load_state_dict(saved)
    for _ in range(4):
        resumed.step()
    for name, value in training.optimizer.state_dict().items():
        assert torch.equal(value, resumed.optimizer.state_dict()[name]), name


def test_training_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    quick_training().step()
    assert torch.equal(before, torch.get_rng_state())


def test_training_improves_the_validation_loss() -> None:
    family = mo.tasks.Quadratics(3)
    optimizer = SGD(nn.Parameter(torch.tensor(0.001)))
    training = mo.MetaTraining(
        optimizer, family, estimator=mo.FullUnroll(16, mo.Backprop()), outer=Adam(2e-3), horizon=10
    )
    before = mo.evaluate({"sgd": optimizer}, family, horizon=10, seeds=64).mean("sgd")
    for _ in range(30):
        training.step()
    after = mo.evaluate({"sgd": optimizer}, family, horizon=10, seeds=64).mean("sgd")
    # lr grows from .001 towards the best, near .05: the loss falls from 8.9 to about 5
    assert after < 0.75 * before


def test_a_diverged_task_is_left_out_and_counted() -> None:
    @dataclass(frozen=True)
    class Wild:
        def loss(self, params, batch):
            return (params * batch).square().sum()

        def sample(self, generator, steps):
            scale = 1e30 if torch.rand((), generator=generator) < 0.5 else 1.0
            return mo.Task(torch.ones(2), torch.full((steps, 2), scale))

    optimizer = SGD(nn.Parameter(torch.tensor(0.1)))
    training = mo.MetaTraining(
        optimizer, Wild(), estimator=mo.FullUnroll(8, mo.Backprop()), outer=SGD(0.01), horizon=5
    )
    metrics = training.step()
    assert 0 < int(metrics["tasks left out"]) < 8
    assert math.isfinite(float(metrics["loss"]))
    assert optimizer.lr.isfinite()
    assert optimizer.lr.item() != pytest.approx(0.1, abs=1e-6)


def test_a_step_without_any_finite_task_changes_nothing() -> None:
    @dataclass(frozen=True)
    class Broken:
        def loss(self, params, batch):
            return (params * batch).sum()

        def sample(self, generator, steps):
            return mo.Task(torch.ones(2), torch.full((steps, 2), torch.nan))

    optimizer = SGD(nn.Parameter(torch.tensor(0.1)))
    training = mo.MetaTraining(
        optimizer, Broken(), estimator=mo.FullUnroll(3), outer=SGD(0.5), horizon=5
    )
    metrics = training.step()
    assert int(metrics["tasks left out"]) == 3
    assert optimizer.lr.item() == pytest.approx(0.1)


@pytest.mark.usefixtures("float64")
def test_evaluate_equals_a_loop_and_tune_finds_the_best_of_the_grid() -> None:
    family = mo.tasks.Quadratics(4)
    report = mo.evaluate({"a": SGD(0.01), "b": SGD(0.02, 0.9)}, family, horizon=5, seeds=3, seed=7)
    generator = torch.Generator().manual_seed(7)
    for i in range(3):
        task = family.sample(generator, 5)
        for name, optimizer in {"a": SGD(0.01), "b": SGD(0.02, 0.9)}.items():
            params, velocity = task.params, torch.zeros_like(task.params)
            for t in range(5):
                residual = task.batches[0][t] @ params - task.batches[1][t]
                torch.testing.assert_close(
                    report.curves[name][i, t], residual.square().sum(), rtol=1e-12, atol=0
                )
                velocity = (0.9 if name == "b" else 0.0) * velocity + 2 * task.batches[0][
                    t
                ].T @ residual
                params = params - float(optimizer.lr) * velocity
    value, loss = mo.tune(SGD, [1e-4, 0.01, 0.02, 10.0], family, horizon=20, seeds=16)
    validation = {
        lr: mo.evaluate({"": SGD(lr)}, family, horizon=20, seeds=16, seed=1_000_003).mean("")
        for lr in (1e-4, 0.01, 0.02)
    }
    assert value == min(validation, key=validation.__getitem__)
    assert loss == min(validation.values())


def test_the_report_shows_diverged_runs(tmp_path) -> None:
    report = mo.evaluate(
        {"good": SGD(0.01), "bad": SGD(1e9)}, mo.tasks.Quadratics(4), horizon=20, seeds=3
    )
    good, bad = report.table().splitlines()[-2:]
    assert good.split()[-1] == "0"
    assert bad.split()[-1] == "3"
    report.plot(tmp_path / "deep" / "plot.png", "title")
    assert (tmp_path / "deep" / "plot.png").stat().st_size > 5_000


def test_the_trainer_ends_with_what_validated_best() -> None:
    class Counter:
        value = 0

        def step(self):
            self.value += 1
            return {"value": self.value}

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state):
            self.value = state["value"]

    training, logged = Counter(), []

    class Log:
        def log(self, step, metrics):
            logged.append((step, dict(metrics)))

        def close(self):
            logged.append("closed")

    def validate() -> float:
        return math.nan if training.value == 6 else abs(training.value - 5)

    trainer = mo.Trainer(training, max_steps=9, validate=validate, validate_every=2, logger=Log())
    trainer.fit()
    assert (training.value, trainer.best, trainer.best_step) == (4, 1, 4)
    assert (9, {"value": 9.0}) in logged
    assert (8, {"validation": 3.0}) in logged
    assert logged[-1] == "closed"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mo.FullUnroll(tasks=0), "`tasks` must be a positive integer, got 0"),
        (lambda: mo.TruncatedBackprop(window=0), "`window` must be a positive integer, got 0"),
        (
            lambda: mo.tasks.DigitsMLP(batch_size=0),
            "`batch_size` and `hidden` must be positive, got 0",
        ),
        (lambda: mo.tasks.Quadratics(0), "`dimension` must be a positive integer, got 0"),
        (
            lambda: mo.evaluate({}, mo.tasks.Quadratics(), horizon=5),
            "`evaluate` needs an optimizer",
        ),
        (
            lambda: mo.tune(SGD, [1e9], mo.tasks.Quadratics(), horizon=50, seeds=2),
            "Every value of the grid diverged",
        ),
        (lambda: mo.Trainer(quick_training(), max_steps=0), "must be positive, got 0"),
        (
            lambda: mo.MetaTraining(
                SGD(0.1), mo.tasks.Quadratics(), estimator=mo.FullUnroll(), outer=Adam(), horizon=5
            ),
            "SGD has nothing to train. Make a hyperparameter an nn.Parameter",
        ),
        (
            lambda: mo.MetaTraining(
                MLPOptimizer(),
                mo.tasks.Quadratics(),
                estimator=mo.FullUnroll(),
                outer=Adam(),
                horizon=0,
            ),
            "`horizon` must be a positive integer, got 0",
        ),
        (
            lambda: mo.MetaTraining(
                MLPOptimizer(),
                mo.tasks.Quadratics(),
                estimator=mo.FullUnroll(),
                outer=Adam(),
                horizon=5,
                clip=-1.0,
            ),
            "`clip` must be positive or None, got -1.0",
        ),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_functional_call_reaches_the_optimizer_inside_an_unroll() -> None:
    """Lending parameters to an optimizer changes the unroll and leaves the optimizer as it was."""
    optimizer, family = SGD(nn.Parameter(torch.tensor(0.01))), mo.tasks.Quadratics(3)
    estimate = mo.FullUnroll(tasks=2)(
        optimizer, {"lr": torch.tensor(0.0)}, family, 4, None, torch.Generator().manual_seed(0)
    )
    tasks = sample_tasks(family, torch.Generator().manual_seed(0), 2, 4)
    # lr 0 stays at w = 0
    torch.testing.assert_close(estimate.losses, tasks.batches[1][:, 0].square().sum(1))
    assert (
        functional_call(
            optimizer, {}, ({"w": torch.ones(1)}, optimizer.init({"w": torch.ones(1)}))
        )[0]["w"].item()
        == -optimizer.lr.item()
    )


def test_tune_takes_arrays() -> None:
    grid = torch.logspace(-3, -1, 3)
    value, _ = mo.tune(SGD, grid.numpy(), mo.tasks.Quadratics(3), horizon=5, seeds=2)
    assert value in grid.tolist()
    assert mo.tune(SGD, grid, mo.tasks.Quadratics(3), horizon=5, seeds=2)[0] == value


@dataclass(frozen=True)
class Noisy:
    """A loss with dropout."""

    def loss(self, params: Tensor, batch: Tensor) -> Tensor:
        return torch.nn.functional.dropout(params * batch, 0.5).square().sum()

    def sample(self, generator: torch.Generator, steps: int) -> mo.Task:
        return mo.Task(torch.ones(20), torch.ones(steps, 20))


def test_dropout_in_a_loss_is_part_of_the_seed() -> None:
    def losses() -> list[float]:
        optimizer = SGD(nn.Parameter(torch.tensor(0.1)))
        training = mo.MetaTraining(
            optimizer, Noisy(), estimator=mo.FullUnroll(2), outer=Adam(), horizon=3, seed=4
        )
        return [float(training.step()["loss"]) for _ in range(3)]

    first = losses()
    torch.rand(7)
    assert losses() == first
    assert len(set(first)) == 3


def test_evaluation_with_dropout_is_decided_by_its_seed() -> None:
    """Whatever was drawn before.

    Every optimizer meets the same masks, every task and step others; nothing is drawn globally.
    """

    def curves(seed: int) -> Tensor:
        report = mo.evaluate(
            {"a": SGD(0.01), "b": SGD(0.01)}, Noisy(), horizon=3, seeds=4, seed=seed
        )
        assert torch.equal(report.curves["a"], report.curves["b"])
        return report.curves["a"]

    first = curves(0)
    torch.rand(7)
    before = torch.get_rng_state()
    assert torch.equal(curves(0), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(first[:, 0].tolist()) | set(curves(1)[:, 0].tolist())) > 4


def test_the_state_is_a_snapshot_that_torch_loads_safely(tmp_path) -> None:
    training = quick_training()
    training.step()
    state = training.state_dict()
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    training.step()
    for name, value in loaded["theta"].items():
        assert torch.equal(value, state["theta"][name])
    training.load_state_dict(loaded)
    again = training.step()["loss"]
    training.load_state_dict(state)
    assert training.step()["loss"] == again


def test_an_interrupted_training_keeps_its_best() -> None:
    class Interrupted:
        value = 0

        def step(self):
            self.value += 1
            if self.value == 4:
                raise KeyboardInterrupt
            return {}

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state):
            self.value = state["value"]

    class Log:
        closed = False

        def log(self, step, metrics): ...

        def close(self):
            self.closed = True

    training, log = Interrupted(), Log()
    trainer = mo.Trainer(
        training,
        max_steps=9,
        validate=lambda: abs(training.value - 2),
        validate_every=1,
        logger=log,
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert (training.value, trainer.best_step, log.closed) == (2, 2, True)


def test_batches_must_have_a_row_for_each_step() -> None:
    @dataclass(frozen=True)
    class Short:
        def loss(self, params, batch):
            return params.square().sum()

        def sample(self, generator, steps):
            return mo.Task(torch.ones(2), torch.zeros(7))

    with pytest.raises(
        ValueError, match=r"Short: every leaf of a task's batches must have 3 rows, .* got .*: 7"
    ):
        mo.evaluate({"a": SGD(0.1)}, Short(), horizon=3, seeds=2)


def test_a_report_of_one_run_plots(tmp_path) -> None:
    mo.evaluate({"a": SGD(0.01)}, mo.tasks.Quadratics(3), horizon=4, seeds=1).plot(
        tmp_path / "one.png"
    )
    assert (tmp_path / "one.png").exists()


def test_the_outer_optimizer_is_ours() -> None:
    theirs = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    with pytest.raises(TypeError, match="`outer` must be a metaopt Optimizer, got SGD"):
        mo.MetaTraining(
            MLPOptimizer(),
            mo.tasks.Quadratics(),
            estimator=mo.FullUnroll(),
            outer=theirs,
            horizon=5,
        )


@pytest.mark.usefixtures("float64")
def test_many_quadratics_are_one_to_a_coordinatewise_optimizer() -> None:
    """The gradient of their sum is the sum of their gradients."""
    optimizer, generator = LSTMOptimizer(hidden_size=3), torch.Generator().manual_seed(5)
    theta = dict(optimizer.named_parameters())
    many = mo.tasks.Quadratics(4, functions=3)
    task = many.sample(generator, 5)
    assert task.params.shape == (3, 4)
    together = torch.autograd.grad(objective(optimizer, many, task, mo.Backprop()), theta.values())
    one, parts = mo.tasks.Quadratics(4), []
    for i in range(3):
        own = mo.Task(task.params[i], tuple(leaf[:, i] for leaf in task.batches))
        loss = objective(optimizer, one, own, mo.Backprop())
        parts.append(torch.autograd.grad(loss, theta.values()))
    for found, *expected in zip(together, *parts, strict=True):
        torch.testing.assert_close(found, sum(expected), rtol=1e-10, atol=1e-14)


def test_the_parameters_to_use_are_those_that_the_outer_optimizer_evaluates_at() -> None:
    """With EMA a_k = .8 a_{k-1} + .2 theta_k; it is saved and resumed."""

    def make(outer: mo.Optimizer) -> mo.MetaTraining:
        return mo.MetaTraining(
            SGD(nn.Parameter(torch.tensor(0.01))),
            mo.tasks.Quadratics(3),
            estimator=mo.FullUnroll(2),
            outer=outer,
            horizon=4,
        )

    training, expected = make(EMA(0.8, Adam(1e-3))), 0.01
    for _ in range(20):
        training.step()
        expected = 0.8 * expected + 0.2 * training.optimizer.lr.item()
        assert training.evaluated().lr.item() == pytest.approx(expected, rel=1e-5)  # float32
    other = make(EMA(0.8, Adam(1e-3)))
    other.load_state_dict(copy.deepcopy(training.state_dict()))
    for one in (training, other):
        one.step()
    assert training.evaluated().lr == other.evaluated().lr != training.optimizer.lr
    plain = make(Adam(1e-3))
    plain.step()
    assert plain.evaluated().lr == plain.optimizer.lr
    assert plain.evaluated().lr is not plain.optimizer.lr
