"""What few-shot learning learns beside the initial parameters: rates, and maps of the gradient.

And values of hyperparameters that stay in their range while they are learned.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap

import metaopt as mo
from metaopt import tree
from optimizers import (
    SGD,
    Adam,
    ClipNorm,
    Grouped,
    MetaCurvature,
    PerParameter,
    PerTensor,
    Positive,
    Within,
)

SHAPES = {"a.bias": (3,), "a.weight": (2, 3), "rows": (2, 3, 2), "filters": (2, 3, 2, 2)}


def start() -> dict[str, Tensor]:
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}


def shuffle(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.rand_like(p))


def curve(params: dict[str, Tensor], shift: Tensor) -> Tensor:
    return sum(((p + shift).sin() * p).sum() for p in params.values())  # type: ignore[return-value]


def test_rates_of_every_tensor_and_step() -> None:
    """MAML++: w = w - a[name][t] g. All rates are learned, also under vmap."""
    params, rates = start(), PerTensor(start(), 0.1, steps=2)
    assert {name: tuple(row.shape) for name, row in rates.params.items()} == dict.fromkeys(
        SHAPES, (2,)
    )
    shuffle(rates)
    numbers, shifts = dict(rates.params), torch.randn(3, dtype=torch.float64)

    def by_hand(numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        w = params
        for t, shift in enumerate(shifts):
            g = grad(curve)(w, shift)
            w = {name: p - numbers[name][min(t, 1)] * g[name] for name, p in w.items()}
        return w

    out = mo.minimize(curve, SGD(lr=rates), params, shifts)
    assert_close(out.params, by_hand(numbers), 1e-14)
    curve(out.params, shifts[0]).backward()
    expected = torch.autograd.grad(
        curve(by_hand(numbers), shifts[0]), [numbers[name] for name in SHAPES]
    )
    assert_close([numbers[name].grad for name in SHAPES], list(expected), 1e-12)


@pytest.mark.parametrize("steps", [None, 3])
def test_rates_are_saved_and_loaded(steps: int | None, tmp_path: Path) -> None:
    optimizer = ClipNorm(1.0, Adam(PerTensor(start(), 0.1, steps=steps)))
    shuffle(optimizer)
    optimizer.save(tmp_path / "rates.safetensors")
    loaded = mo.Optimizer.load(tmp_path / "rates.safetensors")
    assert loaded.config() == optimizer.config()
    pairs = zip(loaded.parameters(), optimizer.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    params = start()
    ends = [mo.minimize(curve, o, params, torch.zeros(2)).params for o in (optimizer, loaded)]
    assert_close(*ends, 0)


def test_rates_for_other_parameters_are_refused() -> None:
    for kind in (PerParameter, PerTensor):
        with pytest.raises(ValueError, match=rf"missing \['a'\], .*Write lr={kind.__name__}\(par"):
            SGD(lr=kind({"a": torch.ones(2)}, 0.1)).init({"b": torch.ones(2)})
        with pytest.raises(TypeError, match=rf"{kind.__name__}: `params` must be floating-point"):
            kind({"a": torch.ones(2, dtype=torch.int64)}, 0.1)
    with pytest.raises(ValueError, match=r"PerTensor: `steps` must be a positive integer"):
        PerTensor(start(), 0.1, steps=0)


def einsum(name: str, grad: Tensor, matrices: list[Tensor]) -> Tensor:
    """The mode products of arXiv:1902.03356, written out for each kind of tensor."""
    formula = {
        "a.bias": "oO,O->o",
        "a.weight": "oO,iI,OI->oi",
        "rows": "oO,iI,fF,OIF->oif",
        "filters": "oO,iI,fF,OIF->oif",
    }[name]
    flat = grad.flatten(2) if grad.ndim == 4 else grad
    return torch.einsum(formula, *matrices, flat).reshape(grad.shape)


def test_meta_curvature_is_the_papers_product_in_every_dimension() -> None:
    params, grads = start(), start()
    optimizer = MetaCurvature(params, SGD(0.1))
    assert_close(
        optimizer(grads, optimizer.init(params))[0], tree.map(lambda g: -0.1 * g, grads), 0
    )
    shuffle(optimizer)
    updates, _ = optimizer(grads, optimizer.init(params), params)
    expected = {name: -0.1 * einsum(name, g, optimizer.matrices[name]) for name, g in grads.items()}
    assert_close(updates, expected, 1e-14)
    assert [len(m) for m in optimizer.matrices["filters"]] == [2, 3, 4]


@pytest.mark.usefixtures("float64")
def test_meta_curvature_is_differentiated_exactly() -> None:
    """In the gradients and every matrix, twice; at a zero gradient too."""
    grads = {"bias": torch.zeros(2), "rows": torch.randn(1, 2, 2)}
    optimizer = MetaCurvature(grads, SGD(0.1))
    names, matrices = zip(*optimizer.named_parameters(), strict=True)

    def update(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, leaves[: len(names)], strict=True))
        g = dict(zip(grads, leaves[len(names) :], strict=True))
        return tuple(functional_call(optimizer, given, (g, optimizer.init(g)))[0].values())

    leaves = [torch.randn_like(m) for m in matrices] + list(grads.values())
    inputs = [leaf.detach().requires_grad_() for leaf in leaves]
    assert gradcheck(update, inputs)
    assert gradgradcheck(update, inputs)


def test_meta_curvature_under_vmap_in_a_group_and_without_a_gradient() -> None:
    params = start()
    some = {name: params[name] for name in ("a.bias", "a.weight")}
    optimizer = Grouped({"a.*": MetaCurvature(some, SGD(0.1, 0.9)), "*": SGD(0.1)})
    shuffle(optimizer)
    state = optimizer.init(params, per_parameter=True)
    grads = {name: torch.randn(2, 3, *shape).double() for name, shape in SHAPES.items()}

    def update(g: Any) -> Any:
        updates, _ = optimizer({**g, "a.bias": None}, state, params)
        assert updates["a.bias"] is None
        return updates["a.weight"]

    found = vmap(vmap(update))(grads)
    assert_close(found[1, 2], update(tree.map(lambda g: g[1, 2], grads)), 1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrices_of_half_precision_parameters_are_float32(dtype: torch.dtype) -> None:
    params = tree.map(lambda p: p.to(dtype), start())
    optimizer = MetaCurvature(params, SGD(0.1))
    assert {p.dtype for p in optimizer.parameters()} == {torch.float32}
    updates, _ = optimizer(params, optimizer.init(params), params)
    assert {u.dtype for u in updates.values()} == {dtype}


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({}, ValueError, "must hold at least one tensor, got none"),
        ({"a": torch.ones(())}, ValueError, r"must have 1 to 4 axes, got shape \(\) at 'a'"),
        ({"a": (1, 1, 1, 1, 1)}, ValueError, r"must have 1 to 4 axes, got shape \(1, 1, 1, 1, 1\)"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, TypeError, "got torch.complex64 at 'a'"),
        ({"a": torch.ones(2, dtype=torch.int64)}, TypeError, "got torch.int64 at 'a'"),
    ],
)
def test_what_has_no_matrices(params: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MetaCurvature(params, SGD(0.1))


def test_gradients_of_other_parameters_are_refused() -> None:
    optimizer, b = MetaCurvature({"a": (2,)}, SGD(0.1)), {"b": torch.ones(2)}
    with pytest.raises(ValueError, match=r"missing \['a'\], unknown \['b'\]"):
        optimizer(b, optimizer.init(b))
    a = {"a": torch.ones(3)}
    with pytest.raises(ValueError, match=r"must have the shape of its parameter in `params`, got"):
        optimizer(a, optimizer.init(a))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("make", "name", "slope"),
    [
        (lambda: Positive(0.2), "log_value", 0.2),
        (lambda: Within(0.9), "logit", 0.9 * 0.1),
        (lambda: Within(0.95, 0.8, 1.0), "logit", 0.2 * 0.75 * 0.25),
    ],
)
def test_a_value_in_a_range(make: Callable[[], mo.Schedule], name: str, slope: float) -> None:
    """It starts where it is told to, with the slope of exp and of the sigmoid."""
    schedule = make()
    value, state = schedule({}, step=torch.tensor(0), loss=None, grads=[torch.ones(2)])
    assert state == {}
    assert_close(value.detach(), torch.tensor(schedule.value), 1e-15)
    parameter = getattr(schedule, name)
    assert_close(torch.autograd.grad(value, parameter)[0], torch.tensor(slope), 1e-15)
    with torch.no_grad():
        parameter.fill_(30.0)
    optimizer = SGD(0.1, schedule)
    end = optimizer.values(optimizer.init(torch.ones(2)))["momentum"]
    assert end > 1e12 if name == "log_value" else end <= 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Positive(0.0), r"Positive: `value` must be a positive number, got 0.0"),
        (lambda: Within(1.0), r"Within: `value` must lie between low=0.0 and high=1.0, got 1.0"),
        (lambda: Within(1 - 1e-9), r"Within: `value` must .* rounded to torch.float32, got 0.9"),
    ],
)
def test_values_at_an_end_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def number(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value))


LEARNED: dict[str, Callable[[], mo.Optimizer]] = {
    "sgd": lambda: SGD(number(1e-3), number(0.5)),
    "sgd-in-range": lambda: SGD(Positive(1e-3), Within(0.5)),
    "adam": lambda: Adam(
        number(1e-3), (number(0.9), number(0.999)), eps=number(1e-8), weight_decay=number(1e-3)
    ),
    "adam-in-range": lambda: Adam(Positive(1e-3), (Within(0.9), Within(0.999))),
}


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize(
    "estimator", [mo.FullUnroll(), mo.NRES(std=1e-4, pairs=4, window=5)], ids=["full", "nres"]
)
def test_every_number_of_an_optimizer_is_meta_trained(name: str, estimator: Any) -> None:
    optimizer = LEARNED[name]()
    before = {key: p.detach().clone() for key, p in optimizer.named_parameters()}
    training = mo.MetaTraining(
        optimizer, mo.tasks.Quadratics(3), estimator=estimator, outer=Adam(lr=1e-4), horizon=10
    )
    mo.Trainer(training, max_steps=4).fit()
    for key, p in optimizer.named_parameters():
        assert p.isfinite()
        assert p != before[key], key


def test_what_is_learned_in_its_range_stays_there() -> None:
    """Large outer steps that lead a bare rate below 0, and a bare decay above 1."""

    def train(optimizer: mo.Optimizer) -> dict[str, float]:
        training = mo.MetaTraining(
            optimizer,
            mo.tasks.Quadratics(3),
            estimator=mo.FullUnroll(),
            outer=Adam(lr=0.3),
            horizon=10,
        )
        mo.Trainer(training, max_steps=8).fit()
        values = optimizer.values(optimizer.init(torch.ones(2)))
        return {name: values[name].item() for name in ("lr", "momentum")}

    bare, ranged = train(SGD(number(0.5), number(0.9))), train(SGD(Positive(0.5), Within(0.9)))
    assert bare["lr"] < 0 or not 0 <= bare["momentum"] <= 1
    assert ranged["lr"] > 0
    assert 0 < ranged["momentum"] < 1
