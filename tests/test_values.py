"""`Optimizer.values`.

The hyperparameters that the next step uses, exact, differentiable, and without any effect.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor, nn

import metaopt as mo
from metaopt import tree
from metaopt.interop import from_torch
from optimizers import (
    SGD,
    Adam,
    ClipNorm,
    Constant,
    Cosine,
    Exponential,
    GPSchedule,
    Grouped,
    Joined,
    LSTMSchedule,
    Masked,
    MLPOptimizer,
    MLPSchedule,
    Warmup,
    WeightDecay,
)

pytestmark = pytest.mark.usefixtures("float64")
LOSS = torch.tensor(0.7)


def learned(seed: int = 3) -> LSTMSchedule:
    """A schedule that has learned something."""
    schedule = LSTMSchedule(0.1, seed=seed)
    with torch.no_grad():
        schedule.readout.normal_(generator=torch.Generator().manual_seed(seed))
    return schedule


def params() -> dict[str, Tensor]:
    return {"net.weight": torch.randn(2, 3), "net.bias": torch.randn(3)}


# name -> (optimizer, the leaf whose rate is looked at, the name of that rate)
RATES: dict[str, tuple[Any, str, str]] = {
    "number": (lambda: SGD(0.1), "net.bias", "lr"),
    "parameter": (lambda: SGD(nn.Parameter(torch.tensor(0.1))), "net.bias", "lr"),
    "schedule": (lambda: SGD(Cosine(0.1, 10)), "net.bias", "lr"),
    "observing": (lambda: SGD(learned()), "net.bias", "lr"),
    "from-a-cosine": (lambda: SGD(MLPSchedule(Cosine(0.1, 10), 10)), "net.bias", "lr"),
    "gaussian-process": (lambda: SGD(GPSchedule(0.1, 10)), "net.bias", "lr"),
    "warmup": (lambda: SGD(Warmup(learned(), 5, start=0.2)), "net.bias", "lr"),
    "joined": (lambda: SGD(Joined((Constant(0.3), learned()), (2,))), "net.bias", "lr"),
    "clipped": (
        lambda: ClipNorm(1e9, ClipNorm(Constant(1e9), SGD(Cosine(0.1, 10)))),
        "net.bias",
        "optimizer.optimizer.lr",
    ),
    "grouped": (
        lambda: Grouped({"*.bias": SGD(learned()), "*": SGD(Cosine(0.2, 10))}),
        "net.bias",
        "*.bias/lr",
    ),
    "other-group": (
        lambda: Grouped({"*.bias": SGD(learned()), "*": SGD(Cosine(0.2, 10))}),
        "net.weight",
        "*/lr",
    ),
    "masked": (lambda: Masked(SGD(learned()), "*.bias"), "net.bias", "optimizer.lr"),
    "nested": (
        lambda: ClipNorm(
            1e9, Grouped({"*.weight": SGD(0.2), "*": Masked(SGD(learned()), "net.bias")})
        ),
        "net.bias",
        "optimizer.*/optimizer.lr",
    ),
}


@pytest.mark.parametrize("name", RATES)
def test_it_is_what_the_next_step_uses(name: str) -> None:
    """Of plain SGD the update is -lr g.

    Read off the lr, at every one of five steps, by division.
    """
    make, leaf, key = RATES[name]
    optimizer, w = make(), params()
    state = optimizer.init(w)
    for _ in range(5):
        grads = {k: torch.randn_like(p) for k, p in w.items()}
        before = tree.map(torch.clone, state)
        value = optimizer.values(state, loss=LOSS, grads=grads)[key]
        assert_close(state, before, 0)
        updates, state = optimizer(grads, state, w, loss=LOSS)
        assert_close(
            (-updates[leaf] / grads[leaf])[0],
            torch.as_tensor(value).expand_as(updates[leaf][0]),
            1e-14,
        )


@pytest.mark.parametrize("name", ["observing", "warmup", "joined", "grouped", "masked", "nested"])
def test_without_the_loss_a_schedule_that_observes_answers_with_its_last_value(name: str) -> None:
    make, leaf, key = RATES[name]
    optimizer, w = make(), params()
    state = optimizer.init(w)
    first = optimizer.values(state)[key]
    if name not in ("warmup", "joined"):
        assert_close(torch.as_tensor(first), torch.tensor(0.1), 1e-7)  # its parameters are float32
    for _ in range(4):
        used = optimizer.values(state, loss=LOSS, grads=w)[key]
        _, state = optimizer(w, state, w, loss=LOSS)
    seen = optimizer.values(state)[key]
    ramps = (0.2 + 0.8 * 4 / 5) / (0.2 + 0.8 * 3 / 5) if name == "warmup" else 1.0
    assert_close(seen, used * ramps, 1e-14)
    # the gradients are still unknown
    assert_close(optimizer.values(state, loss=LOSS)[key], seen, 0)
    assert leaf in w


def test_a_transform_says_what_the_schedule_behind_it_will_see() -> None:
    """The clipped norm of .1, not that of the gradient.

    Weight decay needs the parameters for it.
    """
    optimizer, w = ClipNorm(0.1, SGD(learned())), params()
    state = optimizer.init(w)
    small, large = (
        optimizer.values(state, loss=LOSS, grads={k: size * p for k, p in w.items()})[
            "optimizer.lr"
        ]
        for size in (10, 1000)
    )
    assert_close(small, large, 1e-14)
    bare = SGD(learned())
    assert (bare.values(bare.init(w), loss=LOSS, grads=w)["lr"] - small).abs() > 1e-6
    decayed = WeightDecay(0.1, SGD(learned()))
    with pytest.raises(ValueError, match=r"`WeightDecay` needs `params` because weight_decay=0.1"):
        decayed.values(decayed.init(w), loss=LOSS, grads=w)
    found = decayed.values(decayed.init(w), loss=LOSS, grads=w, params=w)["optimizer.lr"]
    assert_close(
        found,
        bare.values(bare.init(w), loss=LOSS, grads={k: 1.1 * p for k, p in w.items()})["lr"],
        1e-14,
    )
    plain = WeightDecay(0.1, SGD(0.1))
    # nothing observes: no parameters are needed
    assert plain.values(plain.init(w), grads=w)["optimizer.lr"] == 0.1


def test_values_are_differentiated() -> None:
    initial, gamma = (nn.Parameter(torch.tensor(v)) for v in (0.3, 0.9))
    optimizer, w = ClipNorm(1.0, SGD(Exponential(initial, gamma))), torch.ones(2)
    state = {**optimizer.init(w), "step": torch.tensor(4)}
    value = optimizer.values(state)["optimizer.lr"]
    assert isinstance(value, Tensor)
    found = torch.autograd.grad(value, [initial, gamma])
    assert_close(found, (torch.tensor(0.9**4), torch.tensor(0.3 * 4 * 0.9**3)), 1e-14)


def test_every_hyperparameter_has_a_value() -> None:
    optimizer, w = Adam(Cosine(0.1, 10), (0.8, torch.tensor(0.99))), torch.ones(2)
    found = optimizer.values(optimizer.init(w))
    assert list(found) == ["lr", "beta1", "beta2", "eps", "eps_root", "weight_decay"]
    assert (found["beta1"], float(found["beta2"]), found["eps"]) == (0.8, 0.99, 1e-8)
    network = MLPOptimizer()
    assert network.values(network.init(w)) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_as_precise_as_the_step(dtype: torch.dtype) -> None:
    """Of memory or gradients in float64 in float64, else in float32.

    0.1 (1 + cos(pi / 3)) / 2 has no exact float32.
    """
    grads = torch.ones(1, dtype=dtype)
    for optimizer, given in ((Adam(Cosine(0.1, 3)), None), (SGD(Cosine(0.1, 3)), grads)):
        value = optimizer.values({**optimizer.init(grads), "step": torch.tensor(1)}, grads=given)[
            "lr"
        ]
        assert isinstance(value, Tensor)
        assert value.dtype == dtype


def test_of_torchs_optimizers_each_part_has_its_own() -> None:
    model = nn.Linear(2, 2)
    torchs = torch.optim.SGD(
        [{"params": [model.weight], "lr": 0.3}, {"params": [model.bias], "maximize": True}], lr=0.1
    )
    params = mo.functional(model).params
    optimizer = from_torch(torchs, params)
    optimizer.optimizers[1].lr = learned()  # type: ignore[assignment]
    state = optimizer.init(params)
    found = optimizer.values(state, loss=LOSS, grads=params, params=params)
    assert found["optimizers.0.lr"] == 0.3
    updates, _ = optimizer(params, state, params, loss=LOSS)
    assert_close(
        updates["bias"].detach(), (found["optimizers.1.lr"] * params["bias"]).detach(), 1e-14
    )


class Observing(mo.Schedule):
    """Is a multiple of the loss, or of the norm of the gradients, and knows nothing else."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of = of

    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Any, Any]:
        return 0.1 * (loss if self.of == "loss" else grads[0].norm()), state  # type: ignore[operator]


def test_a_schedule_of_ones_own_that_observes() -> None:
    optimizer, w = SGD(Observing("loss")), torch.ones(2)
    state = optimizer.init(w)
    assert_close(optimizer.values(state, loss=LOSS)["lr"], 0.1 * LOSS, 1e-15)
    with pytest.raises(
        ValueError,
        match=r"Observing: its value needs the loss, got None. Call `optimizer.values\(state, "
        r"loss=loss",
    ):
        optimizer.values(state)
    with pytest.raises(AttributeError, match="boom"):
        SGD(Broken()).values({**state, "schedules": {"lr": {}}}, loss=LOSS)
    optimizer = SGD(Observing("grads"))
    assert torch.as_tensor(optimizer.values(state | {"schedules": {"lr": {}}})["lr"]).isnan(), (
        "unknown, and seen to be"
    )


class Broken(mo.Schedule):
    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Any, Any]:
        raise AttributeError("boom")


@pytest.mark.parametrize(
    "state", [{}, None, {"step": torch.tensor(0)}], ids=["empty", "none", "part"]
)
def test_what_is_no_state_is_said(state: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"`state` must be a dict with \['schedules', 'shared', 'slots', 'step'\], got",
    ):
        SGD(0.1).values(state)
