"""Hyperparameters that differ from parameter to parameter.

A dict of patterns, or a tensor of the shape of each parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor, nn
from torch.func import grad, vmap

import metaopt as mo
from metaopt import tree
from optimizers import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    ClipNorm,
    ClipValue,
    Constant,
    Cosine,
    DecoupledWeightDecay,
    Exponential,
    Grouped,
    Lion,
    LSTMSchedule,
    Masked,
    Muon,
    NAdam,
    PerParameter,
    PerStep,
    RAdam,
    RMSprop,
    Rprop,
    WeightDecay,
)

pytestmark = pytest.mark.usefixtures("float64")


def start() -> dict[str, Tensor]:
    return {
        "a.weight": torch.randn(3, 4),
        "a.bias": torch.randn(1, 3),
        "b.weight": torch.randn(2, 3),
        "b.bias": torch.randn(1, 2),
    }


def curve(params: dict[str, Tensor], shift: Tensor) -> Tensor:
    hidden = torch.tanh(params["a.weight"].sum(-1) + params["a.bias"] + shift)
    return (hidden @ params["b.weight"].T + params["b.bias"]).square().sum() + 0.1 * params[
        "a.weight"
    ].square().sum()


def make(kind: Any, **named: Any) -> Callable[..., mo.Optimizer]:
    """Return the optimizer as a function of some of its hyperparameters.

    Betas and the like are put together.
    """

    def build(**given: Any) -> mo.Optimizer:
        options = {**named, **given}
        if "beta1" in options:
            options["betas"] = (options.pop("beta1"), options.pop("beta2"))
        if "eta_minus" in options:
            options["etas"] = (options.pop("eta_minus"), options.pop("eta_plus"))
            options["step_sizes"] = (options.pop("step_min"), options.pop("step_max"))
        if "a" in options:
            options["ns_coefficients"] = tuple(options.pop(name) for name in "abc")
        return kind(**options)

    return build


# name -> (how to make it, for each of its hyperparameters the value for biases and that for the
# rest)
KINDS: dict[str, tuple[Callable[..., mo.Optimizer], dict[str, tuple[float, float]]]] = {
    "sgd": (
        make(SGD),
        {
            "lr": (0.05, 0.1),
            "momentum": (0.0, 0.9),
            "dampening": (0.3, 0.1),
            "weight_decay": (0.0, 0.1),
        },
    ),
    "nesterov": (
        make(SGD, nesterov=True),
        {"lr": (0.05, 0.1), "momentum": (0.5, 0.9), "weight_decay": (0.0, 0.1)},
    ),
    "adam": (
        make(Adam, amsgrad=True),
        {
            "lr": (0.05, 0.1),
            "beta1": (0.5, 0.9),
            "beta2": (0.9, 0.99),
            "eps": (0.1, 0.01),
            "eps_root": (0.0, 0.01),
            "weight_decay": (0.0, 0.1),
        },
    ),
    "adamw": (make(AdamW), {"lr": (0.05, 0.1), "weight_decay": (0.0, 0.1)}),
    "nadam": (
        make(NAdam),
        {
            "lr": (0.05, 0.1),
            "beta1": (0.5, 0.9),
            "beta2": (0.9, 0.99),
            "momentum_decay": (0.1, 0.004),
        },
    ),
    "radam": (
        make(RAdam),
        {"lr": (0.05, 0.1), "beta1": (0.5, 0.9), "beta2": (0.5, 0.9), "weight_decay": (0.0, 0.1)},
    ),
    "adamax": (
        make(Adamax),
        {"lr": (0.05, 0.1), "beta1": (0.5, 0.9), "beta2": (0.9, 0.99), "weight_decay": (0.0, 0.1)},
    ),
    "adagrad": (
        make(Adagrad),
        {
            "lr": (0.05, 0.1),
            "lr_decay": (0.0, 0.1),
            "initial_accumulator_value": (0.0, 0.2),
            "weight_decay": (0.0, 0.1),
        },
    ),
    "adadelta": (
        make(Adadelta),
        {"lr": (0.5, 1.0), "rho": (0.5, 0.9), "eps": (1e-3, 1e-2), "weight_decay": (0.0, 0.1)},
    ),
    "rmsprop": (
        make(RMSprop, centered=True),
        {
            "lr": (0.01, 0.02),
            "alpha": (0.5, 0.9),
            "eps": (0.1, 0.2),
            "momentum": (0.0, 0.5),
            "weight_decay": (0.0, 0.1),
        },
    ),
    "rprop": (
        make(Rprop),
        {
            "lr": (0.01, 0.02),
            "eta_minus": (0.4, 0.5),
            "eta_plus": (1.1, 1.3),
            "step_min": (1e-6, 1e-5),
            "step_max": (1.0, 2.0),
        },
    ),
    "asgd": (
        make(ASGD),
        {
            "lr": (0.05, 0.1),
            "lambd": (1e-4, 1e-2),
            "alpha": (0.5, 0.75),
            "t0": (1.0, 2.0),
            "weight_decay": (0.0, 0.1),
        },
    ),
    "lion": (
        make(Lion),
        {"lr": (0.01, 0.02), "beta1": (0.5, 0.9), "beta2": (0.9, 0.99), "weight_decay": (0.0, 0.1)},
    ),
    "muon": (
        make(Muon),
        {
            "lr": (0.01, 0.02),
            "weight_decay": (0.0, 0.1),
            "momentum": (0.5, 0.9),
            "a": (3.4, 2.0),
            "b": (-4.7, -1.5),
            "c": (2.0, 0.5),
            "eps": (1e-7, 1e-6),
        },
    ),
    "clip-norm": (make(ClipNorm, optimizer=SGD(0.1, 0.9)), {"max_norm": (0.1, 1.0)}),
    "clip-value": (make(ClipValue, optimizer=SGD(0.1, 0.9)), {"limit": (0.1, 1.0)}),
    "decay": (make(WeightDecay, optimizer=Adam(0.1)), {"weight_decay": (0.0, 0.3)}),
    "decoupled": (make(DecoupledWeightDecay, optimizer=Adam(0.1)), {"weight_decay": (0.0, 0.3)}),
}


@pytest.mark.parametrize("learned", [False, True], ids=["numbers", "learned"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_the_groups_of_the_same(kind: str, learned: bool) -> None:
    """Values, losses and derivatives with respect to every value and the initial parameters."""
    build, numbers = KINDS[kind]
    if learned:  # a number 0 stays one: it says that there is no such thing
        leaves = {
            n: tuple(nn.Parameter(torch.tensor(v)) if v else v for v in pair)
            for n, pair in numbers.items()
        }
    else:
        leaves = dict(numbers)
    by_name = build(**{name: {"*.bias": one, "*": other} for name, (one, other) in leaves.items()})
    groups = {
        pattern: build(**{name: pair[place] for name, pair in leaves.items()})
        for place, pattern in enumerate(("*.bias", "*"))
    }
    first = tree.map(torch.Tensor.requires_grad_, start())
    found, expected = (
        mo.minimize(curve, optimizer, first, torch.linspace(-1, 1, 6))
        for optimizer in (by_name, Grouped(groups))
    )
    assert_close(
        tree.map(torch.Tensor.detach, found.params),
        tree.map(torch.Tensor.detach, expected.params),
        1e-12,
    )
    inputs = [
        *first.values(),
        *[v for pair in leaves.values() for v in pair if isinstance(v, Tensor)],
    ]
    slopes = [
        torch.autograd.grad(
            out.losses.sum() + sum(p.square().sum() for p in out.params.values()),
            inputs,
            allow_unused=True,
        )
        for out in (found, expected)
    ]
    for one, other in zip(*slopes, strict=True):
        assert_close(
            torch.zeros(()) if one is None else one,
            torch.zeros(()) if other is None else other,
            1e-11,
        )
    assert_close(found.losses.detach(), expected.losses.detach(), 1e-12)


def test_a_rate_for_each_tensor_and_step_in_one_argument() -> None:
    """The program of the wish: it was refused without naming `Grouped`."""
    rates = nn.Parameter(torch.tensor([0.1, 0.2, 0.05]))
    optimizer = SGD(lr={"*.bias": 0.01, "*": PerStep(rates)})
    assert [name for name, _ in optimizer.named_parameters()] == ["lr.value1.values"]
    groups = Grouped({"*.bias": SGD(0.01), "*": SGD(PerStep(rates))})
    first, shifts = start(), torch.randn(3)
    losses = [mo.minimize(curve, o, first, shifts).losses.sum() for o in (optimizer, groups)]
    assert_close(losses[0].detach(), losses[1].detach(), 1e-13)
    assert_close(*(torch.autograd.grad(loss, rates)[0] for loss in losses), 1e-13)


def test_a_schedule_observes_its_own_parameters_as_in_a_group() -> None:
    learned = LSTMSchedule(0.1, seed=3)
    with torch.no_grad():
        learned.readout.normal_()
    first, shifts = start(), torch.randn(4)
    optimizer = Adam({"*.bias": learned, "*": Cosine(0.1, 5)})
    found = mo.minimize(curve, optimizer, first, shifts)
    groups = Grouped({"*.bias": Adam(learned), "*": Adam(Cosine(0.1, 5))})
    expected = mo.minimize(curve, groups, first, shifts)
    assert_close(found.params, expected.params, 1e-13)
    seen = {"loss": torch.tensor(1.0), "grads": first}
    values = [
        o.values(s, **seen) for o, s in ((optimizer, found.opt_state), (groups, expected.opt_state))
    ]  # type: ignore[attr-defined]
    assert_close(
        *[torch.stack([torch.as_tensor(v[n]) for n in ("*.bias/lr", "*/lr")]) for v in values],
        1e-13,
    )
    assert values[0]["beta1"] == values[1]["*/beta1"]
    last = [
        torch.as_tensor(o.values(s)["*.bias/lr"])
        for o, s in ((optimizer, found.opt_state), (groups, expected.opt_state))
    ]  # type: ignore[attr-defined]
    assert_close(*last, 1e-13)


def test_several_dicts_of_different_patterns() -> None:
    """Rates by kind, decays by layer: four groups."""
    optimizer = Adam({"*.bias": 0.2, "*": 0.1}, weight_decay={"a.*": 0.0, "b.*": 0.3}, eps=0.1)
    groups = Grouped(
        {
            n: Adam(0.2 if "bias" in n else 0.1, eps=0.1, weight_decay=0.3 if n[0] == "b" else 0.0)
            for n in start()
        }
    )
    first, shifts = start(), torch.randn(5)
    assert_close(
        mo.minimize(curve, optimizer, first, shifts).params,
        mo.minimize(curve, groups, first, shifts).params,
        1e-13,
    )


def test_inside_transforms_and_groups_names_are_the_parameters() -> None:
    first, shifts = start(), torch.randn(4)
    inner: dict[str, Any] = {"*.bias": 0.2, "*": 0.1}
    found = ClipNorm(
        {"a.*": 0.1, "*": 1.0},
        Masked(Grouped({"a.*": SGD(inner), "*": Adam(inner)}), ("*.bias", "*.weight")),
    )
    by_group = {
        p: ClipNorm(c, Grouped({"*.bias": k(0.2), "*": k(0.1)}))
        for p, c, k in (("a.*", 0.1, SGD), ("*", 1.0, Adam))
    }
    ends = [
        mo.minimize(curve, optimizer, first, shifts).params
        for optimizer in (found, Grouped(by_group))
    ]
    assert_close(*ends, 1e-13)
    assert found.values(found.init(first))["optimizer.optimizer.a.*/*.bias/lr"] == 0.2


@pytest.mark.parametrize("transform", ["grad", "vmap", "compile"])
def test_under_transforms(transform: str) -> None:
    first = start()

    def outer(rate: Tensor, optimizer: Callable[[Tensor], mo.Optimizer]) -> Tensor:
        return mo.minimize(curve, optimizer(rate), first, torch.linspace(-1, 1, 3)).losses.sum()

    def by_name(rate: Tensor) -> mo.Optimizer:
        return Adam({"*.bias": rate, "*": 0.1}, eps=0.1)

    def groups(rate: Tensor) -> mo.Optimizer:
        return Grouped({"*.bias": Adam(rate, eps=0.1), "*": Adam(0.1, eps=0.1)})

    rate = torch.tensor(0.2)
    found = grad(lambda r: outer(r, by_name))
    expected = grad(lambda r: outer(r, groups))
    if transform == "vmap":
        rate, found, expected = torch.tensor([0.1, 0.2]), vmap(found), vmap(expected)
    if transform == "compile":
        optimizer = by_name(rate)

        def run(factor: Tensor) -> Tensor:
            params = {name: factor * p for name, p in first.items()}
            return mo.minimize(curve, optimizer, params, torch.linspace(-1, 1, 3)).losses.sum()

        found, expected, rate = (
            torch.compile(grad(run), fullgraph=True, backend="eager"),
            grad(run),
            torch.tensor(0.9),
        )
    assert_close(found(rate), expected(rate), 1e-12)


def test_meta_sgd_in_one_line() -> None:
    """w' = w - alpha * g with a learned alpha for each entry.

    Its derivative is -g times the slope at w'.
    """
    first = start()
    optimizer = SGD(lr=PerParameter(first, 0.1))
    assert {name: tuple(p.shape) for name, p in optimizer.named_parameters()} == {
        f"lr.value{i}": tuple(p.shape) for i, p in enumerate(first.values())
    }
    end = mo.minimize(curve, optimizer, first, torch.tensor([0.3])).params
    gradient = grad(curve)(first, torch.tensor(0.3))
    assert_close(
        tree.map(torch.Tensor.detach, end),
        tree.map(lambda w, g: w - 0.1 * g, first, gradient),
        1e-14,
    )
    found = torch.autograd.grad(curve(end, torch.tensor(-0.2)), list(optimizer.parameters()))
    slope = grad(curve)(tree.map(torch.Tensor.detach, end), torch.tensor(-0.2))
    assert_close(list(found), [-slope[name] * gradient[name] for name in first], 1e-13)


def test_rates_of_entries_with_memory_and_for_complex_parameters() -> None:
    """All rates alike are one rate.

    In Adam with every hyperparameter that may be one, and for two numbers of a complex entry.
    """
    first = {"w": torch.randn(3, dtype=torch.complex128), "b": torch.randn(())}
    per = lambda value: PerParameter(first, value)
    each = Adam(
        per(0.1), (per(0.8), per(0.9)), eps=per(0.1), eps_root=per(0.01), weight_decay=per(0.2)
    )
    one = Adam(0.1, (0.8, 0.9), eps=0.1, eps_root=0.01, weight_decay=0.2)

    def loss(p: dict[str, Tensor], shift: Tensor) -> Tensor:
        return (p["w"] - shift).abs().square().sum() + (p["b"] * shift) ** 2

    ends = [mo.minimize(loss, o, first, torch.linspace(-1, 1, 5)).params for o in (each, one)]
    assert_close(tree.map(torch.Tensor.detach, ends[0]), ends[1], 1e-13)


@pytest.mark.parametrize(
    "build",
    [
        lambda: SGD(
            {"*.bias": nn.Parameter(torch.tensor(0.1)), "*": PerStep(nn.Parameter(torch.ones(3)))},
            {"*": 0.9},
        ),
        lambda: Adam(
            {"*.bias": torch.tensor(0.2), "*": Exponential(0.1, 0.9)},
            (0.9, {"a.*": 0.9, "*": 0.99}),
        ),
        lambda: SGD(PerParameter(start(), 0.1)),
        lambda: ClipNorm({"*.bias": 0.1, "*": Constant(0.2)}, Adam(0.1)),
    ],
    ids=["sgd", "adam", "per-parameter", "clip"],
)
def test_it_is_saved_and_loaded(build: Callable[[], mo.Optimizer], tmp_path: Path) -> None:
    optimizer = build()
    with torch.no_grad():
        for parameter in optimizer.parameters():
            parameter *= 1 + torch.rand_like(parameter)
    optimizer.save(tmp_path / "w")
    loaded = mo.Optimizer.load(tmp_path / "w")
    assert loaded.config() == optimizer.config()
    first, shifts = start(), torch.randn(3)
    ends = [mo.minimize(curve, o, first, shifts).params for o in (optimizer, loaded)]
    assert_close(*(tree.map(torch.Tensor.detach, end) for end in ends), 0)


def test_deployed_by_the_names_that_torch_is_given() -> None:
    first, shifts = start(), torch.randn(3)
    expected = mo.minimize(curve, SGD({"*.bias": 0.2, "*": 0.1}), first, shifts).params
    params = {name: nn.Parameter(p.clone()) for name, p in first.items()}
    deployed = SGD({"*.bias": 0.2, "*": 0.1}).as_torch(params.items())
    for shift in shifts:
        deployed.zero_grad()
        curve(dict(params), shift).backward()
        deployed.step()
    assert_close({name: p.detach() for name, p in params.items()}, expected, 1e-14)


class Shared(mo.Optimizer):
    """Divides by the norm of all gradients so far."""

    hyperparameters = ("lr",)

    def __init__(self, lr: Any) -> None:
        super().__init__()
        mo.optimizer.hyperparameter.set_hyperparameter(self, "lr", lr)

    def slots(self, params: Any) -> Any:
        return {"norm": torch.zeros(())}

    def update(self, grads: Any, params: Any, slots: Any, hyper: Any, step: Any) -> Any:
        norm = slots["norm"] + tree.norm(grads)
        return [-hyper["lr"] * g / norm for g in grads], {"norm": norm}


def test_memory_over_all_parameters_is_one_over_those_of_a_pattern() -> None:
    first, shifts = start(), torch.randn(4)
    ends = [
        mo.minimize(curve, o, first, shifts).params
        for o in (
            Shared({"*.bias": 0.1, "*": 0.2}),
            Grouped({"*.bias": Shared(0.1), "*": Shared(0.2)}),
        )
    ]
    assert_close(*ends, 1e-14)


@pytest.mark.parametrize("kind", ["adam", "nadam", "asgd", "sgd", "decay"])
def test_a_parameter_without_a_gradient_stays_in_its_group(kind: str) -> None:
    """With a step count for each parameter, as in the groups of the same."""
    build, numbers = KINDS[kind]
    by_name = build(**{name: {"*.bias": one, "*": other} for name, (one, other) in numbers.items()})
    pairs = zip(("*.bias", "*"), zip(*numbers.values(), strict=True), strict=True)
    groups = Grouped(
        {pattern: build(**dict(zip(numbers, values, strict=True))) for pattern, values in pairs}
    )
    ends = []
    for optimizer in (by_name, groups):
        params = start_at(3)
        state = optimizer.init(params, per_parameter=True)
        for step in range(4):
            grads = {
                n: None if (i + step) % 3 == 0 else p**2 for i, (n, p) in enumerate(params.items())
            }
            optimizer.values(state, grads=grads, params=params)
            updates, state = optimizer(grads, state, params)
            params = mo.apply_updates(params, updates)
        ends.append(params)
    assert_close(*ends, 1e-13)


def start_at(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return start()


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: SGD({}),
        ValueError,
        r'A hyperparameter by names must not be empty, got \{\}. Write \{"\*": 0.1\}',
    ),
    (lambda: SGD({1: 0.1}), TypeError, r"A hyperparameter by names needs patterns, got 1"),
    (
        lambda: SGD({"*": "0.1"}),
        TypeError,
        r"SGD: `lr\['\*'\]` must be a number, a tensor, .* got str",
    ),
    (
        lambda: SGD({"*": {"a": 0.1}}),
        TypeError,
        r"SGD: `lr\['\*'\]` must be a number, a tensor, .* got dict",
    ),
    (
        lambda: SGD({"*": PerParameter(start(), 0.1)}),
        TypeError,
        r"SGD: `lr\['\*'\]` must be .* got PerParameter",
    ),
    (
        lambda: SGD({"a.*": 0.1, "*": -0.1}),
        ValueError,
        r"SGD: `lr\['\*'\]` must lie in \[0.0, inf\], got -0.1",
    ),
    (
        lambda: Adam(betas=({"*": torch.tensor(1.5)}, 0.9)),
        ValueError,
        r"Adam: `beta1\['\*'\]` must lie in \[0.0, 1.0\), got 1.5",
    ),
    (
        lambda: SGD(0.1, {"a": 0.0, "*": 0.9}, nesterov=True),
        ValueError,
        r"SGD: `nesterov` needs momentum > 0",
    ),
    (
        lambda: ClipNorm({"a": 0.0, "*": 1.0}, SGD(0.1)),
        ValueError,
        r"ClipNorm: `max_norm` must be positive, got 0.0",
    ),
    (
        lambda: SGD({"*.bias": 0.1}).init(start()),
        ValueError,
        r"SGD: no pattern of `lr` matches the parameter 'a.weight'",
    ),
    (
        lambda: SGD({"c": 0.1, "*": 0.1}).init(start()),
        ValueError,
        r"SGD: the pattern 'c' of `lr` gets no parameter",
    ),
    (
        lambda: ClipNorm({"c": 0.1}, SGD(0.1)).init(start()),
        ValueError,
        r"ClipNorm: no pattern of `max_norm` matches",
    ),
    (
        lambda: SGD(PerParameter({"a": torch.ones(2)}, 0.1)).init({"b": torch.ones(2)}),
        ValueError,
        r"SGD: `lr` must be for the parameters that are updated, missing \['a'\], unknown \['b'\]",
    ),
    (
        lambda: SGD(PerParameter({"a": torch.ones(2)}, 0.1)).init({"a": torch.ones(3)}),
        ValueError,
        r"SGD: `lr` must be a scalar, or have the shape .* got shape \(2,\) for a parameter of "
        r"shape \(3,\)",
    ),
    (
        lambda: PerParameter({"a": torch.ones(2, dtype=torch.int64)}, 0.1),
        TypeError,
        r"`params` must be floating-point .*int64 at 'a'",
    ),
    (
        lambda: SGD(PerParameter(start(), -0.1)),
        ValueError,
        r"SGD: `lr\['a.weight'\]` must lie in \[0.0, inf\], got -0.1",
    ),
    (
        lambda: PerParameter(start(), torch.ones(2)),
        TypeError,
        r"PerParameter: `value` must be a number, got tensor",
    ),
    (
        lambda: SGD({"*": 0.1})(
            start(), SGD({"*": Cosine(0.1, 5)}).init(start()) | {"schedules": {"lr": {"*": {}}}}
        ),
        ValueError,
        r"`state` must be that of this SGD, with the schedules \[\] of `lr`, got \['\*'\]",
    ),
]


@pytest.mark.parametrize(("build", "error", "message"), BAD)
def test_what_does_not_fit_is_refused(
    build: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build()
