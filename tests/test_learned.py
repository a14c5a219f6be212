"""Learned optimizers and schedules.

Against networks written out coordinate by coordinate, and their meta-gradients.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt as mo
from optimizers import (
    RNNMLP,
    SGD,
    AdafactorMLP,
    Adam,
    Constant,
    Cosine,
    LSTMOptimizer,
    LSTMSchedule,
    MLPOptimizer,
    NNAdam,
)
from optimizers.learned.lstm import log_and_sign

pytestmark = pytest.mark.usefixtures("float64")

SHAPES = {"matrix": (3, 2), "vector": (4,), "scalar": (), "cube": (2, 1, 2)}


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def inner_problem() -> tuple[mo.Functional, Tensor, Tensor]:
    net = mo.functional(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    return net, torch.randn(3, 5, 3), torch.randn(3, 5, 2)


def busy_schedule() -> LSTMSchedule:
    """A schedule whose rate moves: an untrained one is constant and would prove nothing."""
    schedule = LSTMSchedule(0.2, steps=3, hidden_size=3)
    with torch.no_grad():
        schedule.readout.normal_()
    return schedule


def busy(optimizer: mo.Optimizer) -> mo.Optimizer:
    """Return an optimizer whose last layers, zero at the start, do something.

    And which is not where a relu bends, as one is whose inputs are all cut off and whose bias is 0.
    """
    with torch.no_grad():
        for parameter in optimizer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return optimizer


def test_lstm_equals_torch_cells_run_coordinate_by_coordinate() -> None:
    optimizer = LSTMOptimizer(hidden_size=5, seed=3)
    cells = []
    for cell, inputs in zip(optimizer.cells, (2, 5), strict=True):
        reference = nn.LSTMCell(inputs, 5)
        reference.load_state_dict(
            {
                "weight_ih": cell.weight[:, :inputs],
                "weight_hh": cell.weight[:, inputs:],
                "bias_ih": cell.bias,
                "bias_hh": torch.zeros(20),
            }
        )
        cells.append(reference)
    params, state = tensors(0), optimizer.init(tensors(0))
    memory = {
        name: [[(torch.zeros(5), torch.zeros(5))] * 2 for _ in range(p.numel())]
        for name, p in params.items()
    }
    for step in range(3):
        grads = tensors(step + 1)
        updates, state = optimizer(grads, state, params)
        for name, grad in grads.items():
            expected = []
            for i, g in enumerate(grad.flatten().tolist()):
                big = abs(g) >= math.exp(-10)
                signal = torch.tensor(
                    [math.log(abs(g)) / 10, math.copysign(1, g)] if big else [-1, math.exp(10) * g]
                )
                for layer, reference in enumerate(cells):
                    memory[name][i][layer] = reference(signal, memory[name][i][layer])
                    signal = memory[name][i][layer][0]
                expected.append(0.1 * (optimizer.readout[0] @ signal))
            # 1e-12: the same sums in another order
            torch.testing.assert_close(
                updates[name], torch.stack(expected).view(grad.shape), rtol=1e-12, atol=1e-14
            )


def mlp_by_hand(
    optimizer: MLPOptimizer, t: int, g: Tensor, w: Tensor, memory: dict[str, Any]
) -> Tensor:
    """The update of one tensor, from the equations in the docstring of `MLPOptimizer`."""
    memory["m"] = [d * m + (1 - d) * g for d, m in zip((0.5, 0.9, 0.99), memory["m"], strict=True)]
    memory["v"] = 0.999 * memory["v"] + 0.001 * g**2
    m = [m / (1 - d**t) for d, m in zip((0.5, 0.9, 0.99), memory["m"], strict=True)]
    r = 1 / (memory["v"] / (1 - 0.999**t) + 1e-16) ** 0.5
    features = [g, w, r, g * r, *m, *[x * r for x in m]]
    features = [x / ((x**2).mean() + 1e-16) ** 0.5 for x in features]
    time = [torch.full_like(g, math.tanh(t / h)) for h in (3, 10, 30, 100, 300, 1000)]
    x = torch.stack([*features, *time], dim=-1)
    x = F.linear(x, optimizer.input_weight, optimizer.input_bias[:, 0]).relu()
    x = F.linear(x, optimizer.hidden_weight, optimizer.hidden_bias[:, 0]).relu()
    d, s = F.linear(x, optimizer.output_weight, optimizer.output_bias[:, 0]).unbind(-1)
    return 0.1 * d * s.exp()


def test_mlp_equals_its_equations_and_has_578_weights() -> None:
    optimizer = MLPOptimizer(hidden_size=16, seed=3)
    assert sum(p.numel() for p in optimizer.parameters()) == 578
    params, state = tensors(0), optimizer.init(tensors(0))
    memory = {
        name: {"m": [torch.zeros_like(p)] * 3, "v": torch.zeros_like(p)}
        for name, p in params.items()
    }
    for t in (1, 2, 3):
        grads = tensors(t)
        updates, state = optimizer(grads, state, params)
        for name in SHAPES:
            expected = mlp_by_hand(optimizer, t, grads[name], params[name], memory[name])
            # 1e-11: sums in another order
            torch.testing.assert_close(updates[name], expected, rtol=1e-11, atol=1e-14)


def test_log_and_sign_is_continuous_and_has_finite_derivatives_at_zero() -> None:
    edge = math.exp(-10)
    x = torch.tensor([0.0, edge * (1 - 1e-9), edge * (1 + 1e-9), -1.0, 1e30], requires_grad=True)
    y = log_and_sign(x)
    torch.testing.assert_close(y[:, 1], y[:, 2], rtol=0, atol=1e-8)
    torch.testing.assert_close(y[:, 3], torch.tensor([0.0, -1.0]))
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert slope.isfinite().all()
    assert slope[0].item() == pytest.approx(math.exp(10))


OPTIMIZERS = {
    "lstm": lambda: LSTMOptimizer(hidden_size=3),
    "mlp": lambda: MLPOptimizer(hidden_size=4),
    "adafactor-mlp": lambda: busy(AdafactorMLP(step_size=0.1, sharpness=1.0)),
    "rnn-mlp": lambda: busy(RNNMLP(4, 3, step_size=0.1)),
    "nn-adam": lambda: busy(NNAdam(3, step_size=0.1)),
    "sgd-schedule": lambda: SGD(busy_schedule(), 0.5),
    "adam-schedule": lambda: Adam(busy_schedule(), eps=1e-2),
    "cosine": lambda: SGD(
        Cosine(nn.Parameter(torch.tensor(0.3)), 4, final=nn.Parameter(torch.tensor(0.1)))
    ),
}


LEARNED = ["lstm", "mlp", "adafactor-mlp", "rnn-mlp", "nn-adam"]


@pytest.mark.parametrize("memory", ["full", "steps"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_meta_gradients_equal_brute_force_and_finite_differences(name: str, memory: Any) -> None:
    optimizer = OPTIMIZERS[name]()
    net, x, y = inner_problem()
    start = {k: p.detach().clone().requires_grad_() for k, p in net.params.items()}
    inputs = [*optimizer.parameters(), *start.values()]

    def loss_fn(params, batch):
        return (net(params, batch[0]) - batch[1]).square().mean()

    def by_minimize() -> Tensor:
        out = mo.minimize(
            loss_fn, optimizer, start, (x, y), differentiate=mo.Backprop(memory=memory)
        )
        return out.losses.sum() + loss_fn(out.params, (x[0], y[0]))

    def by_hand() -> Tensor:
        params, state, total = start, optimizer.init(start), 0
        for t in range(3):
            loss = loss_fn(params, (x[t], y[t]))
            grads = dict(
                zip(
                    params,
                    torch.autograd.grad(loss, list(params.values()), create_graph=True),
                    strict=True,
                )
            )
            updates, state = optimizer(grads, state, params, loss=loss)
            params, total = {k: params[k] + updates[k] for k in params}, total + loss
        return total + loss_fn(params, (x[0], y[0]))

    def derivatives(value: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(value, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), inputs)
        return [*first, *second]

    for ours, theirs in zip(derivatives(by_minimize()), derivatives(by_hand()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        assert ours.isfinite().all()

    # Central differences along one random direction: error O(1e-10) from the step, O(1e-10) from
    # rounding.
    direction = [torch.randn_like(p) for p in inputs]
    slope = sum(
        (g * d).sum()
        for g, d in zip(torch.autograd.grad(by_minimize(), inputs), direction, strict=True)
    )
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(inputs, direction, strict=True):
                p.add_(d, alpha=sign * 1e-6)
            values.append(by_minimize())
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LEARNED)
def test_learned_optimizers_work_on_tied_frozen_scalar_and_empty_parameters(name: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
            self.head.weight = self.embed.weight
            self.scale, self.empty = (
                nn.Parameter(torch.tensor(1.0)),
                nn.Parameter(torch.zeros(0, 3)),
            )
            self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, tokens):
            return self.head(self.embed(tokens) * self.scale + self.frozen) + self.empty.sum()

    model, optimizer = Odd(), OPTIMIZERS[name]()
    net, tokens = mo.functional(model), torch.randint(5, (4, 7))
    assert sorted(net.params) == ["embed.weight", "empty", "head.bias", "scale"]
    out = mo.minimize(lambda p, b: F.cross_entropy(net(p, b), b), optimizer, net.params, tokens)
    out.losses[-1].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in optimizer.parameters())
    assert out.params["empty"].shape == (0, 3)
    assert model.frozen.grad is None


def test_lstm_treats_coordinates_alike_however_they_are_shaped() -> None:
    optimizer, flat = LSTMOptimizer(), torch.randn(12)
    state = optimizer.init(flat)
    whole, _ = optimizer(flat, state, flat)
    parts = {"a": flat[:6].view(2, 3), "b": flat[6:].view(3, 2, 1)}
    split, _ = optimizer(parts, optimizer.init(parts), parts)
    # products of a column do not depend on its neighbours
    torch.testing.assert_close(
        torch.cat([split["a"].flatten(), split["b"].flatten()]), whole, rtol=1e-12, atol=0
    )


def test_an_untrained_schedule_is_the_constant_rate() -> None:
    net, x, y = inner_problem()

    def run(lr: Any) -> Tensor:
        return mo.minimize(
            lambda p, b: (net(p, b[0]) - b[1]).square().mean(), SGD(lr), net.params, (x, y)
        ).losses

    torch.testing.assert_close(run(LSTMSchedule(0.3)), run(0.3), rtol=1e-14, atol=0)
    torch.testing.assert_close(run(Constant(0.3)), run(0.3), rtol=0, atol=0)


def test_a_schedule_changes_the_rate_by_a_bounded_factor() -> None:
    schedule = LSTMSchedule(0.3, steps=10, max_change=0.25)
    with torch.no_grad():
        schedule.readout.fill_(1e6)
    state, rate = schedule.init(torch.ones(1)), 0.3
    for step in range(5):
        value, state = schedule(
            state, step=torch.tensor(step), loss=torch.tensor(2.0), grads=[torch.ones(3)]
        )
        # the bound is reached slowly, so that no gradient dies there
        assert abs(math.log(value.item() / rate)) == pytest.approx(0.25, rel=1e-4)
        rate = value.item()


def test_the_schedule_under_no_grad_never_learns_and_ours_does() -> None:
    """The widespread recipe computes the rate under `no_grad`.

    It takes it from a schedule that then gets no gradient at all.
    """
    net, x, y = inner_problem()
    schedule = busy_schedule()

    def loss_fn(params, batch):
        return (net(params, batch[0]) - batch[1]).square().mean()

    params, state = net.params, schedule.init(x)
    for t in range(3):
        loss = loss_fn(params, (x[t], y[t]))
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        with torch.no_grad():
            rate, state = schedule(state, step=torch.tensor(t), loss=loss, grads=list(grads))
        params = {k: p - rate * g for (k, p), g in zip(params.items(), grads, strict=True)}
    assert all(
        g is None
        for g in torch.autograd.grad(
            loss_fn(params, (x[0], y[0])), list(schedule.parameters()), allow_unused=True
        )
    )

    out = mo.minimize(loss_fn, SGD(schedule), net.params, (x, y))
    grads = torch.autograd.grad(loss_fn(out.params, (x[0], y[0])), list(schedule.parameters()))
    assert all(g.abs().max() > 1e-6 for g in grads)


def test_cosine_equals_torch() -> None:
    weight = nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([weight], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=20, eta_min=0.01)
    ours = Cosine(0.3, 20, final=0.01)
    for step in range(20):
        value, _ = ours({}, step=torch.tensor(step), loss=None, grads=[torch.zeros(1)])
        assert value.item() == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        weight.grad = torch.zeros(1)
        theirs.step()
        scheduler.step()
    late, _ = ours({}, step=torch.tensor(1000), loss=None, grads=[torch.zeros(1)])
    assert late.item() == pytest.approx(0.01, rel=1e-12)


@pytest.mark.parametrize("name", [*LEARNED, "sgd-schedule"])
def test_deployed_equals_minimize(name: str) -> None:
    optimizer = OPTIMIZERS[name]()
    net, x, y = inner_problem()
    out = mo.minimize(
        lambda p, b: (net(p, b[0]) - b[1]).square().mean(), optimizer, net.params, (x, y)
    )
    deployed = optimizer.as_torch(net.model.parameters())
    for t in range(3):

        def closure(t: int = t) -> Tensor:
            deployed.zero_grad()
            loss = (net.model(x[t]) - y[t]).square().mean()
            loss.backward()
            return loss

        deployed.step(closure)
    for name, parameter in net.model.named_parameters():
        torch.testing.assert_close(parameter, out.params[name], rtol=1e-12, atol=1e-14)


def test_learned_optimizers_round_trip_through_a_file(tmp_path) -> None:
    for name, make in OPTIMIZERS.items():
        optimizer = make()
        optimizer.save(tmp_path / f"{name}.safetensors")
        again = type(optimizer).load(tmp_path / f"{name}.safetensors")
        assert again.config() == optimizer.config()
        for key, value in optimizer.state_dict().items():
            assert torch.equal(value, again.state_dict()[key])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LSTMOptimizer(hidden_size=0), "`hidden_size` must be a positive integer, got 0"),
        (lambda: MLPOptimizer(hidden_size=-1), "`hidden_size` must be a positive integer, got -1"),
        (lambda: LSTMSchedule(initial=0.0), "`initial` must be a positive number, got 0.0"),
        (lambda: LSTMSchedule(steps=-5), "`steps` must be a positive integer, got -5"),
        (lambda: Cosine(0.1, 0), "`steps` must be a positive integer, got 0"),
        (lambda: Constant(-1.0), "`value` must lie in"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_learned_parts_need_is_asked_for() -> None:
    grads = {"w": torch.ones(3)}
    with pytest.raises(
        ValueError,
        match="`MLPOptimizer` needs `params` because the parameter is one of its features",
    ):
        MLPOptimizer()(grads, MLPOptimizer().init(grads))
    optimizer = SGD(LSTMSchedule())
    with pytest.raises(ValueError, match="LSTMSchedule observes the loss, got None"):
        optimizer(grads, optimizer.init(grads), grads)
