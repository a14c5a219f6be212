"""What is refused, cast or renamed where an optimizer meets what does not fit it.

This may be gradients, losses, names and saved states.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor, nn

import metaopt as mo
from optimizers import SGD, Adam, ClipNorm, Cosine, Grouped, LSTMSchedule, Plateau

pytestmark = pytest.mark.usefixtures("float64")


def live(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(size)) for size in sizes]


def give(params: list[nn.Parameter], *grads: float) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = torch.full_like(param, grad)


def test_rates_by_name_stay_with_their_parameters_when_a_state_is_loaded() -> None:
    """The saved names replaced the group's own, so that the rates moved to other parameters."""
    w, b, w2, b2 = live(2, 2, 2, 2)
    one = SGD({"b": 0.01, "*": 1.0}).as_torch([("w", w), ("b", b)])
    other = SGD({"b": 0.01, "*": 1.0}).as_torch([("b", b2), ("w", w2)])
    other.load_state_dict(one.state_dict())
    give([w2, b2], 1.0, 10.0)
    other.step()
    assert_close(w2.detach(), torch.full((2,), 0.0), 1e-15)
    assert_close(b2.detach(), torch.full((2,), 0.9), 1e-15)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Adam(0.1),
        lambda: ClipNorm(1.0, Grouped({"x*": SGD(0.1, momentum=0.9), "*": Adam(0.1)})),
    ],
)
@pytest.mark.parametrize("skips", [False, True])
def test_memory_goes_by_places_as_in_torch(make: Any, skips: bool) -> None:
    """Saved unnamed and loaded named, or under other names.

    It was refused, with an empty message for another order.
    """
    first, second = live(2, 3), live(2, 3)
    names = ["x", "y"]
    one = make().as_torch(list(zip(names, first, strict=True)))
    give(first, 1.0, 2.0)
    if skips:
        first[1].grad = None
    one.step()
    other = make().as_torch(list(zip(["x2", "a"], second, strict=True)))
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        for a, b in zip(first, second, strict=True):
            b.copy_(a)
    for params, optimizer in ((first, one), (second, other)):
        give(params, 0.5, -1.0)
        optimizer.step()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert other.param_groups[0]["param_names"] == ["x2", "a"]


def test_memory_takes_the_dtype_of_the_parameters() -> None:
    """It stayed in the saved one, and every step was rounded to it."""
    (narrow,), (wide,) = live(3), live(3)
    narrow = nn.Parameter(narrow.detach().float())
    one, other = Adam(0.1).as_torch([narrow]), Adam(0.1).as_torch([wide])
    give([narrow], 1.0)
    one.step()
    other.load_state_dict(one.state_dict())
    assert other.state["group 0"]["slots"]["mean"]["0"].dtype == torch.float64


def test_a_gradient_is_not_broadcast_to_its_parameter() -> None:
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    for optimizer in (
        SGD(0.1),
        SGD(0.1, momentum=0.9),
        Adam(0.1),
        ClipNorm(1.0, SGD(0.1, weight_decay=0.1)),
    ):
        state = optimizer.init(params)
        with pytest.raises(
            ValueError, match=r"`grads` must have the shapes of `params`, got \(1,\) for \(2,\) at"
        ):
            optimizer.moved({"a": torch.ones(1), "b": torch.ones(3)}, state, params)


@pytest.mark.parametrize(
    "schedule", [Plateau(0.1, patience=0), LSTMSchedule(0.1)], ids=lambda s: type(s).__name__
)
def test_a_schedule_observes_a_scalar(schedule: Any) -> None:
    """A loss of shape (3,) became three rates."""
    optimizer, w = SGD(schedule), torch.ones(3)
    state = optimizer.init(w)
    for wrong in (torch.ones(3), torch.ones(1)):
        with pytest.raises(ValueError, match=r"`loss` must be a scalar for .* to observe, got \("):
            optimizer(w, state, w, loss=wrong)
    number, tensor = (optimizer(w, state, w, loss=loss)[0] for loss in (1.0, torch.tensor(1.0)))
    assert torch.equal(number, tensor)


def test_a_rate_with_more_axes_than_its_parameter_is_refused() -> None:
    w = torch.ones(2)
    with pytest.raises(ValueError, match=r"must be a scalar, or have the shape of every parameter"):
        SGD(torch.tensor([[0.1]]))(w, SGD(0.1).init(w), w)


def test_two_parameters_of_one_name_are_told_apart() -> None:
    clash = {"x": {"y": torch.ones(2)}, "x.y": torch.ones(3)}
    with pytest.raises(
        ValueError, match=r"Parameters must have names of their own, got \['x.y'\] for two of them"
    ):
        SGD({"*": 0.1}).init(clash)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_complex_memory_of_torch_goes_on(kind: Any) -> None:
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    p = nn.Parameter(torch.randn(3, dtype=torch.complex128))
    optimizer = kind([p], 0.1, **options)
    p.grad = torch.randn(3, dtype=torch.complex128)
    optimizer.step()
    pure = mo.from_torch(optimizer)
    w, grad = p.detach().clone(), torch.randn(3, dtype=torch.complex128)
    moved, _ = pure.moved([grad], pure.init([w]), [w])
    p.grad = grad.clone()
    optimizer.step()
    assert_close(moved[0], p.detach(), 1e-12)


def test_a_level_graph_with_evolution_goes_on_where_it_was() -> None:
    """Its noise began again at the first block."""

    def build() -> mo.LevelGraph:
        class Value(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.v = nn.Parameter(torch.tensor(0.5))

            def forward(self) -> Tensor:
                return self.v

        up = mo.Level(
            "up",
            Value(),
            lambda levels, _: (levels.low() - 1).square() + levels.up().square(),
            SGD(0.1),
        )
        low = mo.Level(
            "low", Value(), lambda levels, _: (levels.low() - levels.up()).square(), SGD(0.1)
        )
        return mo.LevelGraph(
            [mo.Edge(up, low, steps=2, differentiate=mo.EvolutionStrategy(std=0.1, pairs=4))]
        )

    whole = build()
    for _ in range(2):
        whole.step()
    state = whole.state_dict()
    resumed = build()
    resumed.load_state_dict(state)
    for _ in range(3):
        whole.step(), resumed.step()
    assert torch.equal(whole.params("up")["v"], resumed.params("up")["v"])


def test_a_cosine_still_takes_no_loss() -> None:
    w = torch.ones(2)
    optimizer = SGD(Cosine(0.1, 10))
    assert torch.equal(optimizer(w, optimizer.init(w))[0], -0.1 * w)
