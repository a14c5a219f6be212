"""Gradient transforms.

Equal to torch's, exact in their derivatives, and composed with any optimizer and each other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from problems import assert_close
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad

import metaopt as mo
from metaopt import tree
from optimizers import (
    SGD,
    Adam,
    AdamW,
    ClipNorm,
    ClipValue,
    Constant,
    Cosine,
    DecoupledWeightDecay,
    Grouped,
    LSTMSchedule,
    Masked,
    Muon,
    Transform,
    WeightDecay,
)

pytestmark = pytest.mark.usefixtures("float64")


def start() -> dict[str, Tensor]:
    return {"net.weight": torch.randn(3, 4), "net.bias": torch.randn(3), "scale": torch.randn(())}


def curve(params: dict[str, Tensor], shift: Tensor) -> Tensor:
    hidden = torch.tanh(params["net.weight"].sum(-1) + params["net.bias"] + shift)
    return (hidden * params["scale"]).square().sum() + 0.1 * params["net.weight"].square().sum()


def by_torch(
    start: dict[str, Tensor],
    shifts: Tensor,
    make: Callable[[dict[str, Tensor]], torch.optim.Optimizer],
    clip: Any = None,
) -> dict[str, Tensor]:
    """Return the parameters after one step of torch's optimizer per shift.

    The gradients are changed by `clip` before each.
    """
    params = {name: p.clone().requires_grad_() for name, p in start.items()}
    optimizer = make(params)
    for shift in shifts:
        optimizer.zero_grad()
        curve(params, shift).backward()
        if clip:
            clip(list(params.values()))
        optimizer.step()
    return tree.map(torch.Tensor.detach, params)


def scale_by_norm(params: list[Tensor]) -> None:
    """Clip as in Pascanu et al., algorithm 1, without the 1e-6 that torch adds to the norm."""
    norm = torch.cat([p.grad.flatten() for p in params]).norm()  # type: ignore[union-attr]
    if norm > 0.5:
        for p in params:
            p.grad.mul_(0.5 / norm)  # type: ignore[union-attr]


CLIP_VALUE = partial(nn.utils.clip_grad_value_, clip_value=0.1)


def of_all(kind: Any, **options: Any) -> Callable[[dict[str, Tensor]], torch.optim.Optimizer]:
    return lambda params: kind(params.values(), **options)


def by_group(params: dict[str, Tensor]) -> torch.optim.Optimizer:
    """Biases and the rest with settings of their own."""
    rest = [params["net.weight"], params["scale"]]
    return torch.optim.Adam(
        [{"params": [params["net.bias"]], "lr": 0.2, "betas": (0.5, 0.9)}, {"params": rest}],
        lr=0.05,
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "clip"),
    [
        (
            lambda: ClipValue(0.1, SGD(0.1, 0.9)),
            of_all(torch.optim.SGD, lr=0.1, momentum=0.9),
            CLIP_VALUE,
        ),
        (lambda: ClipNorm(0.5, Adam(0.05)), of_all(torch.optim.Adam, lr=0.05), scale_by_norm),
        (
            lambda: WeightDecay(0.1, Adam(0.05)),
            of_all(torch.optim.Adam, lr=0.05, weight_decay=0.1),
            None,
        ),
        (
            lambda: DecoupledWeightDecay(0.05 * 0.1, Adam(0.05)),
            of_all(torch.optim.AdamW, lr=0.05, weight_decay=0.1),
            None,
        ),
        (
            lambda: ClipNorm(0.5, ClipValue(1e9, AdamW(0.05))),
            of_all(torch.optim.AdamW, lr=0.05),
            scale_by_norm,
        ),
        (lambda: Grouped({"*.bias": Adam(0.2, (0.5, 0.9)), "*": Adam(0.05)}), by_group, None),
        (
            lambda: ClipNorm(0.5, Grouped({"*.bias": Adam(0.2, (0.5, 0.9)), "*": Adam(0.05)})),
            by_group,
            scale_by_norm,
        ),
        (
            lambda: Masked(Adam(0.05), mask=("*bias", "s*")),
            lambda p: torch.optim.Adam([p["net.bias"], p["scale"]], 0.05),
            None,
        ),
    ],
    ids=["value", "norm", "decay", "decoupled", "nested", "grouped", "norm-grouped", "masked"],
)
def test_fifty_steps_equal_torch(ours: Any, theirs: Any, clip: Any) -> None:
    first, shifts = start(), torch.randn(50)
    expected = by_torch(first, shifts, theirs, clip)
    assert_close(mo.minimize(curve, ours(), first, shifts).params, expected, 1e-12)


def test_clipping_the_norm_is_torchs_but_for_its_constant() -> None:
    """Torch divides by |g| + 1e-6.

    With |g| > 0.5 a relative difference below 2e-6 in every step.
    """
    first, shifts = start(), torch.randn(5)
    expected = by_torch(
        first, shifts, of_all(torch.optim.SGD, lr=0.1), lambda p: nn.utils.clip_grad_norm_(p, 0.5)
    )
    assert_close(mo.minimize(curve, ClipNorm(0.5, SGD(0.1)), first, shifts).params, expected, 5e-6)


@pytest.mark.parametrize("size", [0.0, 0.1, 10.0], ids=["zero", "inside", "clipped"])
@pytest.mark.parametrize(
    "kind",
    [
        lambda h: ClipNorm(h, SGD(0.1)),
        lambda h: ClipValue(h, SGD(0.1)),
        lambda h: WeightDecay(h, Adam(0.1, eps=0.1)),
        lambda h: DecoupledWeightDecay(h, SGD(0.1)),
        lambda h: Masked(ClipNorm(h, SGD(0.1)), "a"),
        lambda h: Grouped({"a": SGD(h), "b": ClipNorm(h, SGD(h))}),
    ],
    ids=["norm", "value", "decay", "decoupled", "masked", "grouped"],
)
def test_an_update_is_differentiated_exactly(kind: Any, size: float) -> None:
    """In the gradients, the parameters and the hyperparameter, twice; at a zero gradient too."""
    grads = (size * torch.tensor([0.6, -0.8, 0.1]), size * torch.tensor([0.3, 0.9]))
    params = (torch.randn(3), torch.randn(2))
    inputs = tuple(leaf.clone().requires_grad_() for leaf in (*grads, *params, torch.tensor(0.7)))

    def update(ga: Tensor, gb: Tensor, a: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        optimizer, params = kind(h), {"a": a, "b": b}
        state = optimizer.init(params)
        if "square" in state["slots"]:
            state = {
                **state,
                "slots": {**state["slots"], "square": {"a": torch.ones(3), "b": torch.ones(2)}},
            }
        updates, _ = optimizer({"a": ga, "b": gb}, state, params)
        return tuple(leaf for leaf in updates.values() if leaf.requires_grad)

    assert gradcheck(update, inputs)
    assert gradgradcheck(update, inputs)


def test_the_derivative_at_a_zero_norm_is_the_identity() -> None:
    """Where a naive norm has NaN: before clipping sets in, an update is the optimizer's own."""
    optimizer = ClipNorm(1.0, SGD(0.1))

    def update(g: Tensor) -> Tensor:
        return optimizer(g, optimizer.init(g))[0].sum()

    zero = torch.zeros(3)
    assert_close(grad(update)(zero), torch.full((3,), -0.1), 1e-15)
    assert_close(grad(lambda g: grad(update)(g).sum())(zero), torch.zeros(3), 1e-15)


def test_clipping_in_half_precision_does_not_overflow() -> None:
    grads = torch.full((100,), 500.0, dtype=torch.float16)  # its square is beyond 65504
    optimizer = ClipNorm(1.0, SGD(1.0))
    updates, _ = optimizer(grads, optimizer.init(grads))
    assert updates.dtype == torch.float16
    assert_close(updates.double(), torch.full((100,), -0.1), 1e-3)  # float16 has 11 bits


def test_the_inner_schedule_observes_the_changed_gradients() -> None:
    """A learned schedule behind a clip sees a norm of 0.1, whatever the gradient."""
    learned = LSTMSchedule(0.1)
    with torch.no_grad():
        learned.readout.normal_()
    loss = torch.tensor(1.0)

    def after(optimizer: mo.Optimizer, size: float) -> Tensor:
        w = torch.ones(2)
        return optimizer(torch.full((2,), size), optimizer.init(w), w, loss=loss)[1]["schedules"]

    clipped = [
        after(ClipNorm(0.1, SGD(learned)), size)["optimizer"]["lr"]["h"] for size in (1.0, 100.0)
    ]
    bare = [after(SGD(learned), size)["lr"]["h"] for size in (1.0, 100.0)]
    assert_close(clipped[0], clipped[1], 1e-14)
    assert (bare[0] - bare[1]).abs().max() > 1e-3


def test_schedules_of_every_layer_keep_their_own_time() -> None:
    """Two clips with schedules of one name, one in front of the other."""
    limits = [Cosine(1.0, 5, final=0.5), Constant(0.3)]
    optimizer = ClipNorm(limits[0], ClipNorm(limits[1], Grouped({"*": SGD(Cosine(0.1, 5))})))
    first, shifts = start(), torch.randn(5)
    expected = mo.minimize(curve, ClipNorm(0.3, SGD(Cosine(0.1, 5))), first, shifts).params
    assert_close(mo.minimize(curve, optimizer, first, shifts).params, expected, 1e-14)


def test_learned_hyperparameters_behind_a_transform_are_parameters() -> None:
    limit, lr, bias_lr = (nn.Parameter(torch.tensor(value)) for value in (0.2, 0.1, 0.3))
    optimizer = ClipNorm(limit, Grouped({"*.bias": SGD(bias_lr), "*": Adam(lr)}))
    assert len(list(optimizer.parameters())) == 3
    out = mo.minimize(curve, optimizer, start(), torch.randn(4))
    derivatives = torch.autograd.grad(out.losses.sum(), [limit, lr, bias_lr])
    assert all(d.abs() > 1e-6 for d in derivatives)


def test_each_group_clips_by_itself() -> None:
    grads = {"a": torch.full((4,), 5.0), "b": torch.full((4,), 0.1)}
    optimizer = Grouped({"a": ClipNorm(1.0, SGD(1.0)), "b": ClipNorm(1.0, SGD(1.0))})
    updates, _ = optimizer(grads, optimizer.init(grads))
    assert_close(updates, {"a": torch.full((4,), -0.5), "b": torch.full((4,), -0.1)}, 1e-15)


def test_muon_for_matrices_and_another_for_the_rest() -> None:
    first, shifts = start(), torch.randn(5)
    both = mo.minimize(
        curve, Grouped({"*.weight": Muon(0.02), "*": SGD(0.1)}), first, shifts
    ).params
    assert all((both[name] != first[name]).any() for name in first)
    one = Grouped({"*.weight": Muon(0.02), "*": SGD(0.1)})
    updates, _ = one(first, one.init(first), first)
    muon = Muon(0.02)
    alone, _ = muon(first["net.weight"], muon.init(first["net.weight"]), first["net.weight"])
    assert_close(updates["net.weight"], alone, 1e-15)
    assert_close(updates["scale"], -0.1 * first["scale"], 1e-15)


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


def test_names_are_paths_through_any_tree() -> None:
    params = {"layers": [Pair(torch.ones(2), torch.ones(1)), torch.ones(3)], "out": torch.ones(2)}
    optimizer = Masked(SGD(1.0), mask=("layers.0.right", "layers.1", "out"))
    updates, _ = optimizer(params, optimizer.init(params), params)
    moved = {name: bool(leaf.abs().sum()) for name, leaf in tree.named_leaves(updates)}
    assert list(moved.values()) == [False, True, True, True]
    single = Masked(SGD(1.0), mask="*")
    assert torch.equal(single(torch.ones(2), single.init(torch.ones(2)))[0], -torch.ones(2))


def test_only_what_is_selected_has_memory() -> None:
    first = start()
    assert set(Masked(Adam(0.1), "*.bias").init(first)["slots"]["square"]) == {"net.bias"}
    slots = Grouped({"*.bias": SGD(0.1, 0.9), "*": Adam(0.1)}).init(first)["slots"]
    assert {name: set(slot) for name, slot in slots.items()} == {
        "*.bias/velocity": {"net.bias"},
        "*/mean": {"net.weight", "scale"},
        "*/square": {"net.weight", "scale"},
    }


def test_a_meta_gradient_through_groups_is_one_graph() -> None:
    """Names are chosen by patterns, which a compiler cannot trace: it must not have to."""
    optimizer = ClipNorm(
        0.5, Grouped({"*.weight": Masked(Muon(Cosine(0.1, 5)), "*"), "*": Adam(0.1)})
    )
    first = start()

    def outer(factor: Tensor) -> Tensor:
        params = {name: factor * p for name, p in first.items()}
        return curve(
            mo.minimize(curve, optimizer, params, torch.linspace(-1, 1, 3)).params,
            torch.tensor(0.3),
        )

    factor = torch.tensor(0.9)
    compiled = torch.compile(grad(outer), fullgraph=True, backend="eager")
    assert_close(compiled(factor), grad(outer)(factor), 1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClipNorm(0.5, Adam(0.05)),
        lambda: Masked(ClipValue(0.1, SGD(0.1, 0.9)), mask="0"),
        lambda: Grouped({"0": Muon(), "*": WeightDecay(0.1, Adam(0.1))}),
        lambda: DecoupledWeightDecay(Constant(0.01), ClipNorm(0.2, SGD(Cosine(0.1, 5)))),
    ],
    ids=["norm", "masked", "grouped", "schedule"],
)
def test_deployed_it_steps_as_the_pure_one(make: Any) -> None:
    first, shifts = start(), torch.randn(5)
    numbered = {str(i): p for i, p in enumerate(first.values())}

    def loss(params: dict[str, Tensor], shift: Tensor) -> Tensor:
        return curve(dict(zip(first, params.values(), strict=True)), shift)

    expected = mo.minimize(loss, make(), numbered, shifts).params
    found = by_torch(first, shifts, lambda params: make().as_torch(params.values()))
    assert_close(list(found.values()), list(expected.values()), 1e-14)


def test_a_deployed_transform_has_its_own_options_and_a_factor_lr() -> None:
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = ClipNorm(1.0, SGD(0.1)).as_torch([w])
    assert optimizer.param_groups[0]["max_norm"] == 1.0
    optimizer.param_groups[0] |= {"max_norm": 5.0, "lr": 0.5}
    w.grad = torch.tensor([6.0, 8.0])
    optimizer.step()
    assert_close(w.detach(), torch.tensor([3.0, 4.0]) - 0.5 * 0.1 * torch.tensor([3.0, 4.0]), 1e-15)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ClipNorm(0.0, SGD(0.1)), ValueError, r"ClipNorm: `max_norm` must be positive, got "
        r"0.0. To freeze"),
        (lambda: ClipNorm(-1.0, SGD(0.1)), ValueError, r"ClipNorm: `max_norm` must lie in "
        r"\[0.0, inf\], got -1.0"),
        (lambda: ClipValue(0.1, torch.optim.SGD), TypeError, r"ClipValue: `optimizer` must be .*, "
        r"got builtins.type"),  # type: ignore[arg-type]
        (lambda: Masked(0.1, "*"), TypeError, r"Masked: `optimizer` must be a metaopt Optimizer, "
        r"got builtins.float"),  # type: ignore[arg-type]
        (lambda: Grouped({"*": 0.1}), TypeError, r"Grouped: `optimizer` must be a metaopt "
        r"Optimizer, got builtins.float"),  # type: ignore[dict-item]
        (lambda: Grouped({}), ValueError, r"Grouped: `groups` must not be empty"),
        (lambda: Masked(SGD(0.1), "head.*").init(start()), ValueError, r"the pattern 'head.\*' of "
        r"`mask` gets no parameter"),
        (lambda: Grouped({"*.bias": SGD(0.1)}).init(start()), ValueError, r"no pattern of `groups` "
        r"matches .* 'net.weight'"),
        (
            lambda: Grouped({"*": SGD(0.1), "*.bias": SGD(0.1)}).init(start()),
            ValueError,
            r"the pattern '\*.bias' of `groups` gets no parameter .* before the more general ones",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "optimizer",
    [WeightDecay(0.1, SGD(0.1)), DecoupledWeightDecay(0.1, SGD(0.1))],
    ids=["l2", "decoupled"],
)
def test_missing_params_are_named(optimizer: Transform) -> None:
    w = torch.ones(2)
    with pytest.raises(
        ValueError, match=rf"`{type(optimizer).__name__}` needs `params` because weight_decay=0.1"
    ):
        optimizer(w, optimizer.init(w))
