"""Arguments and states that do not fit an optimizer.

Each a clear error, where it was silent or a KeyError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaopt as mo
from metaopt.interop import from_torch, from_torchopt
from optimizers import (
    SGD,
    Adam,
    AdamW,
    ClipNorm,
    ClipValue,
    Constant,
    Cosine,
    Grouped,
    Joined,
    LSTMSchedule,
    Masked,
    MLPOptimizer,
    Muon,
    NAdam,
    Plateau,
    RAdam,
    RMSprop,
    Warmup,
)

AN_LSTM = LSTMSchedule(0.1, hidden_size=4)
# (the optimizer, whose state it is given instead, message)
STRANGERS: list[tuple[mo.Optimizer, mo.Optimizer, str]] = [
    (
        Adam(amsgrad=True),
        Adam(),
        r"this Adam, with the memory \['largest', 'mean', 'square'\], got \['mean', 'square'\]",
    ),
    (
        Adam(),
        Adam(amsgrad=True),
        r"this Adam, with the memory \['mean', 'square'\], got \['largest', 'mean', 'square'\]",
    ),
    (
        AdamW(),
        Adam(amsgrad=True),
        r"this AdamW, with the memory \['mean', 'square'\], got \['largest'",
    ),
    (
        RMSprop(),
        RMSprop(centered=True),
        r"this RMSprop, with the memory \['square'\], got \['mean', 'square'\]",
    ),
    (SGD(0.1, 0.9), SGD(0.1), r"momentum=0.9, but `state` was made without"),
    (SGD(Cosine(0.1, 5)), SGD(AN_LSTM), r"this Cosine, a tree \{\}, got \{'h': \(4, 1\)"),
    (SGD(AN_LSTM), SGD(Cosine(0.1, 5)), r"this LSTMSchedule, a tree \{'h': \(4, 1\), .* got \{\}"),
    (
        SGD(AN_LSTM),
        SGD(LSTMSchedule(0.1)),
        r"this LSTMSchedule, a tree \{'h': \(4, 1\), .* got \{'h': \(20, 1\)",
    ),
    (SGD(AN_LSTM), SGD(Plateau(0.1)), r"this LSTMSchedule, a tree .* got \{'best'"),
    (SGD(Plateau(0.1)), SGD(AN_LSTM), r"this Plateau, a tree \{'best': .* got \{'h'"),
    (SGD(Warmup(Cosine(0.1, 5), 5)), SGD(AN_LSTM), r"this Warmup, a tree \{\}, got \{'h'"),
    (SGD(Warmup(0.1, 5)), SGD(AN_LSTM), r"this Warmup, a tree \{\}, got \{'h'"),
    (
        SGD(Joined((Constant(0.1), AN_LSTM), (2,))),
        SGD(AN_LSTM),
        r"this Joined, a tree \[\{\}, \{'h': .* got \{'h'",
    ),
    (
        SGD(Joined((Constant(0.1), AN_LSTM), (2,))),
        SGD(Joined((AN_LSTM, AN_LSTM), (2,))),
        r"this Joined, a tree \[\{\}, .* got \[\{'h'",
    ),
    (
        SGD(AN_LSTM),
        SGD(Joined((AN_LSTM, AN_LSTM), (2,))),
        r"this LSTMSchedule, a tree .* got \[\{'h'",
    ),
    (SGD(0.1), SGD(Cosine(0.1, 5)), r"this SGD, with the schedules \[\], got \['lr'\]"),
    (Adam(), ClipNorm(1.0, Adam()), r"this Adam, with the schedules \[\], got \['optimizer'\]"),
    (
        ClipNorm(1.0, Adam()),
        Adam(),
        r"this ClipNorm, with the schedules \['optimizer', ...\], got \[\]",
    ),
    (
        ClipNorm(Cosine(1.0, 5), Adam()),
        ClipNorm(1.0, Adam()),
        r"this ClipNorm, with the schedules \['max_norm'\], got \[\]",
    ),
    (
        ClipNorm(1.0, Adam()),
        ClipNorm(Cosine(1.0, 5), Adam()),
        r"this ClipNorm, with the schedules \[\], got \['max_norm'\]",
    ),
    (
        Grouped({"*": Adam()}),
        Adam(),
        r"this Grouped, with the groups \['\*'\], got the groups \[\] and memory of none \['mean'",
    ),
    (Adam(), Grouped({"*": Adam()}), r"this Adam, with the schedules \[\], got \['\*'\]"),
    (
        Grouped({"w": SGD(0.1)}),
        Grouped({"*": SGD(0.1)}),
        r"this Grouped, with the groups \['w'\], got the groups \['\*'\]",
    ),
    (
        Masked(Adam(), "w"),
        SGD(0.1, 0.9),
        r"this Adam, with the memory \['mean', 'square'\], got \['velocity'\]",
    ),
    (
        SGD({"*": Cosine(0.1, 5)}),
        SGD(Cosine(0.1, 5)),
        r"this SGD, with the schedules \['\*'\] of `lr`, got \[\]",
    ),
    (SGD({"*": 0.1}), SGD(0.1), r"this SGD, with the schedules \['lr'\], got \[\]"),
    (
        SGD(Cosine(0.1, 5)),
        SGD({"*": Cosine(0.1, 5)}),
        r"this Cosine, a tree \{\}, got \{'\*': \{\}\}",
    ),
]


@pytest.mark.parametrize(("optimizer", "other", "message"), STRANGERS)
def test_a_state_is_not_taken_for_that_of_another_optimizer(
    optimizer: mo.Optimizer, other: mo.Optimizer, message: str
) -> None:
    """Each was accepted, or ended in a bare KeyError."""
    params = {"w": torch.ones(2)}
    state, loss = other.init(params), torch.tensor(1.0)
    with pytest.raises(ValueError, match=message):
        optimizer(params, state, params, loss=loss)
    if "made without" not in message and "memory" not in message:  # of which the values say nothing
        with pytest.raises(ValueError, match=message):
            optimizer.values(state, loss=loss, grads=params, params=params)
    own = optimizer.init(params)
    # its own it takes
    optimizer(params, optimizer(params, own, params, loss=loss)[1], params, loss=loss)


@pytest.mark.parametrize(
    "optimizer", [Adam(), ClipNorm(1.0, Adam()), Grouped({"*": Adam()}), Masked(Adam(), "*")]
)
@pytest.mark.parametrize(
    "state", [{}, None, {"step": torch.tensor(0)}, [1]], ids=["empty", "none", "part", "list"]
)
def test_what_is_no_state_at_all(optimizer: mo.Optimizer, state: Any) -> None:
    params = {"w": torch.ones(2)}
    with pytest.raises(
        ValueError,
        match=r"`state` must be a dict with \['schedules', 'shared', 'slots', 'step'\], got",
    ):
        optimizer(params, state, params)


def test_a_state_of_torchs_optimizer_and_another() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = from_torch(torch.optim.SGD([w], 0.1))
    with pytest.raises(
        ValueError, match=r"`state` must be that of this FromTorch, with 1 parts, got 0"
    ):
        optimizer([w], SGD(0.1).init([w]), [w])
    with pytest.raises(
        ValueError, match=r"`state` must be that of this FromTorch, with 1 parts, got 0"
    ):
        optimizer.values(SGD(0.1).init([w]))


def test_a_state_of_torchopts_transformation_and_another() -> None:
    torchopt = pytest.importorskip("torchopt")
    optimizer, w = from_torchopt(torchopt.adam(0.1)), torch.ones(2)
    with pytest.raises(
        ValueError,
        match=r"`state` must be that of this FromTorchOpt, got memory named \['mean', 'square'\]",
    ):
        optimizer(w, Adam().init(w), w)
    with pytest.raises(ValueError, match=r"`state` must be a dict with"):
        optimizer(w, {}, w)
    assert optimizer.values(optimizer.init(w)) == {}
    learned = from_torchopt(torchopt.adam, lr=Cosine(0.1, 5))
    assert list(learned.values(learned.init(w))) == ["lr"]


def test_groups_one_of_whose_patterns_begins_as_another() -> None:
    """ "layer/" led the memory of "layer/w" too."""
    params = {"layer/w": torch.ones(2), "layer": torch.ones(1)}
    optimizer = Grouped({"layer": SGD(0.1, 0.9), "layer/w": Adam()})
    _, state = optimizer(params, optimizer.init(params), params)
    assert list(state["slots"]) == ["layer/velocity", "layer/w/mean", "layer/w/square"]


def test_a_momentum_that_is_turned_off_leaves_its_memory() -> None:
    """As in torch, whose groups may say so at any step.

    A schedule of the deployed optimizer may reach 0.
    """
    w = torch.ones(2)
    for on, off in (
        (SGD(0.1, 0.9), SGD(0.1, dampening=0.5)),
        (RMSprop(0.1, momentum=0.9), RMSprop(0.1)),
    ):
        _, state = on(w, on.init(w), w)
        updates, after = off(w, state, w)
        plain = {k: v for k, v in state["slots"].items() if k != "velocity"}
        assert torch.equal(updates, off(w, {**state, "slots": plain}, w)[0])
        assert torch.equal(after["slots"]["velocity"], state["slots"]["velocity"])


# Tensors and parameters were not looked at; of words and numbers their truth was taken.
ARGUMENTS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: SGD(torch.tensor(-1.0)), ValueError, r"SGD: `lr` must lie in \[0.0, inf\], got -1.0"),
    (
        lambda: SGD(nn.Parameter(torch.tensor([0.1, -0.2]))),
        ValueError,
        r"SGD: `lr` must lie in \[0.0, inf\], got -0.2",
    ),
    (
        lambda: SGD(torch.tensor(float("nan"))),
        ValueError,
        r"SGD: `lr` must lie in \[0.0, inf\], got nan",
    ),
    (
        lambda: Adam(betas=(nn.Parameter(torch.tensor(1.5)), 0.9)),
        ValueError,
        r"Adam: `beta1` must lie in \[0.0, 1.0\), got 1.5",
    ),
    (
        lambda: SGD(torch.tensor(0.1 + 1j)),
        TypeError,
        r"SGD: `lr` must be real and floating-point, got a tensor of torch.complex64",
    ),
    (
        lambda: SGD(torch.tensor(1)),
        TypeError,
        r"SGD: `lr` must be real and floating-point, got a tensor of torch.int64",
    ),
    (
        lambda: SGD(torch.tensor(True)),
        TypeError,
        r"SGD: `lr` must be real and floating-point, got a tensor of torch.bool",
    ),
    (
        lambda: Cosine(torch.tensor(-0.1), 5),
        ValueError,
        r"Cosine: `initial` must lie in \[0.0, inf\], got -0.1",
    ),
    (
        lambda: ClipNorm(torch.tensor(-0.5), SGD(0.1)),
        ValueError,
        r"ClipNorm: `max_norm` must lie in \[0.0, inf\], got -0.5",
    ),
    (lambda: SGD(0.1, 0.9, nesterov=1), TypeError, r"SGD: `nesterov` must be True or False, got 1"),
    (lambda: Adam(amsgrad="no"), TypeError, r"Adam: `amsgrad` must be True or False, got 'no'"),
    (
        lambda: RMSprop(centered=None),
        TypeError,
        r"RMSprop: `centered` must be True or False, got None",
    ),
    (
        lambda: NAdam(decoupled_weight_decay=0),
        TypeError,
        r"NAdam: `decoupled_weight_decay` must be True or False, got 0",
    ),
    (
        lambda: RAdam(decoupled_weight_decay=0),
        TypeError,
        r"RAdam: `decoupled_weight_decay` must be True or False, got 0",
    ),
    (lambda: Muon(nesterov="yes"), TypeError, r"Muon: `nesterov` must be True or False, got 'yes'"),
    (
        lambda: Muon(ns_steps=2.0),
        ValueError,
        r"Muon: `ns_steps` must be a positive integer, got 2.0",
    ),
    (
        lambda: MLPOptimizer(step_size=True),
        TypeError,
        r"MLPOptimizer: `step_size` must be a number, got True",
    ),
    (
        lambda: MLPOptimizer(sharpness=float("inf")),
        ValueError,
        r"MLPOptimizer: `sharpness` must lie in .*, got inf",
    ),
    (
        lambda: LSTMSchedule(initial="a"),
        TypeError,
        r"LSTMSchedule: `initial` must be a number, got 'a'",
    ),
    (
        lambda: Masked(SGD(0.1), 3),
        TypeError,
        r"Masked: `mask` must be a pattern or a tuple of them, got 3",
    ),
    (
        lambda: Masked(SGD(0.1), ()),
        TypeError,
        r"Masked: `mask` must be a pattern or a tuple of them, got \(\)",
    ),
    (
        lambda: Grouped({3: SGD(0.1)}),
        TypeError,
        r"Grouped: `groups` must be a dict from patterns to optimizers, got \{3",
    ),
    (
        lambda: Grouped(5),
        TypeError,
        r"Grouped: `groups` must be a dict from patterns to optimizers, got 5",
    ),
]


@pytest.mark.parametrize(("build", "error", "message"), ARGUMENTS)
def test_arguments_are_checked_when_given(
    build: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("transform", ["vmap", "grad", "meta"])
def test_tensors_are_looked_at_only_where_they_can_be(transform: str) -> None:
    """Under a transform, a compiler or on the device "meta" there is no value to read."""
    w = torch.ones(1)

    def step(rate: Tensor) -> Tensor:
        return SGD(rate)(w, SGD(rate).init(w))[0].sum()

    if transform == "vmap":
        assert torch.func.vmap(step)(torch.tensor([-1.0, 0.5])).tolist() == [1.0, -0.5]
    elif transform == "grad":
        assert torch.func.grad(step)(torch.tensor(-1.0)) == -1
    else:
        assert SGD(torch.tensor(-1.0, device="meta")).lr.is_meta  # type: ignore[union-attr]


def test_a_rate_for_each_step_is_not_taken_for_one_for_each_column() -> None:
    """Where the last axis was as long as the list of rates it ran, with other numbers."""
    rates, w = nn.Parameter(torch.full((5,), 0.1)), {"w": torch.ones(3, 5), "b": torch.ones(5)}
    message = (
        r"SGD: `lr` must be a scalar, or have the shape of every parameter that it meets, got "
        r"shape \(5,\) for a parameter of "
        r"shape \(3, 5\). A value for each step is `lr=PerStep\(values\)`, "
        r".*`Piecewise`.*`Grouped`.*PerParameter"
    )
    with pytest.raises(ValueError, match=message):
        SGD(rates).init(w)
    for optimizer in (
        SGD(rates),
        SGD(Constant(rates)),
        Adam(0.1, (rates, 0.9)),
        ClipValue(rates, SGD(0.1)),
    ):
        with pytest.raises(
            ValueError,
            match=r"must be a scalar, or have the shape of every parameter .*, got shape \(5,\)",
        ):
            optimizer(w, optimizer.init(w), w)
    column = {"b": w["b"]}
    assert SGD(rates)(column, SGD(rates).init(column))[0]["b"].shape == (5,)
    one = SGD(nn.Parameter(torch.tensor([0.1])))  # one number is one number
    assert one(w, one.init(w))[0]["w"].shape == (3, 5)
    swapped = SGD(nn.Parameter(torch.tensor(0.1)))
    with pytest.raises(ValueError, match=r"`lr` must be a scalar, .* got shape \(5,\)"):
        torch.func.functional_call(swapped, {"lr": torch.full((5,), 0.1)}, (w, swapped.init(w)))
