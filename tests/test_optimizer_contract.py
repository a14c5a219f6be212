"""What every optimizer must be.

Equal to its published algorithm, pure, differentiable in everything, and usable under vmap.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, vmap

import metaopt as mo
from metaopt import tree
from optimizers import (
    AGC,
    ASGD,
    EMA,
    RNNMLP,
    SGD,
    Accumulate,
    Adadelta,
    Adafactor,
    AdafactorMLP,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    AttentionSchedule,
    Cautious,
    ClipNorm,
    ClipValue,
    Constant,
    ControlledMLP,
    Cosine,
    DecoupledWeightDecay,
    GPSchedule,
    Grouped,
    LearnedStart,
    Linear,
    Lion,
    Lookahead,
    LSTMOptimizer,
    LSTMSchedule,
    Masked,
    MetaCurvature,
    MLPOptimizer,
    MLPSchedule,
    Muon,
    NAdam,
    NNAdam,
    PerTensor,
    PolicySchedule,
    Positive,
    RAdam,
    RMSprop,
    Rprop,
    ScheduleFree,
    TrustRatio,
    WeightDecay,
    Within,
)


class PublishedLion(torch.optim.Optimizer):
    """Program 1 of arXiv:2302.06675, which torch does not have."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        *,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                gradient = weight.grad
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                update = torch.sign(gradient * (1.0 - beta1) + momentum * beta1)
                momentum.copy_(gradient * (1.0 - beta2) + momentum * beta2)
                weight.copy_(weight - (update + weight * group["weight_decay"]) * group["lr"])


@dataclass(frozen=True)
class Case:
    """One of ours, the one of torch's that takes the same arguments, and the arguments."""

    name: str
    ours: type[mo.Optimizer]
    theirs: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any]  # compared with torch
    # differentiated at: denominators far from 0, where finite differences are accurate
    smooth: dict[str, Any]

    @property
    def matrices(self) -> bool:
        return self.ours is Muon or self.name.endswith("matrices")

    def build(self) -> mo.Optimizer:
        return self.ours(**self.options)


_ADAM = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-2}
_DECAY = {"weight_decay": 0.05}
_ROOT = {"eps_root": 1e-3}
CASES = [
    Case("sgd", SGD, torch.optim.SGD, {"lr": 0.1}, {"lr": 0.1, **_DECAY}),
    Case(
        "sgd-dampening",
        SGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.02},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, **_DECAY},
    ),
    Case(
        "sgd-nesterov",
        SGD,
        torch.optim.SGD,
        {"lr": 0.02, "momentum": 0.9, "nesterov": True},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, **_DECAY},
    ),
    Case("adam", Adam, torch.optim.Adam, {}, _ADAM | _DECAY | _ROOT),
    Case(
        "adam-amsgrad",
        Adam,
        torch.optim.Adam,
        {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.02, "amsgrad": True},
        _ADAM | _DECAY | _ROOT | {"amsgrad": True},
    ),
    Case(
        "adamw", AdamW, torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}, _ADAM | _DECAY | _ROOT
    ),
    Case(
        "adamw-amsgrad",
        AdamW,
        torch.optim.AdamW,
        {"lr": 0.05, "amsgrad": True},
        _ADAM | _DECAY | _ROOT | {"amsgrad": True},
    ),
    Case("adamax", Adamax, torch.optim.Adamax, {}, _ADAM | _DECAY),
    Case(
        "adamax-decay",
        Adamax,
        torch.optim.Adamax,
        {"lr": 0.05, "betas": (0.7, 0.8), "weight_decay": 0.02},
        _ADAM | _DECAY,
    ),
    Case("radam", RAdam, torch.optim.RAdam, {"lr": 0.05}, _ADAM | _DECAY | _ROOT),
    Case(
        "radam-never",
        RAdam,
        torch.optim.RAdam,
        {"lr": 0.05, "betas": (0.9, 0.6)},
        _ADAM | {"betas": (0.8, 0.6)},
    ),
    Case(
        "radam-decoupled",
        RAdam,
        torch.optim.RAdam,
        {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1, "decoupled_weight_decay": True},
        _ADAM | _DECAY | _ROOT | {"decoupled_weight_decay": True},
    ),
    Case("nadam", NAdam, torch.optim.NAdam, {}, _ADAM | _DECAY | _ROOT | {"momentum_decay": 0.05}),
    Case(
        "nadam-decay",
        NAdam,
        torch.optim.NAdam,
        {"weight_decay": 0.1, "momentum_decay": 0.02},
        _ADAM | _DECAY | _ROOT,
    ),
    Case(
        "nadam-decoupled",
        NAdam,
        torch.optim.NAdam,
        {"betas": (0.8, 0.9), "weight_decay": 0.1, "decoupled_weight_decay": True},
        _ADAM | _DECAY | _ROOT | {"decoupled_weight_decay": True},
    ),
    Case(
        "adagrad",
        Adagrad,
        torch.optim.Adagrad,
        {"lr": 0.1},
        {"lr": 0.1, "eps": 1e-2, "initial_accumulator_value": 0.2},
    ),
    Case(
        "adagrad-all",
        Adagrad,
        torch.optim.Adagrad,
        {
            "lr": 0.1,
            "lr_decay": 0.03,
            "weight_decay": 0.02,
            "initial_accumulator_value": 0.3,
            "eps": 1e-6,
        },
        {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-2, **_DECAY},
    ),
    Case(
        "adadelta",
        Adadelta,
        torch.optim.Adadelta,
        {},
        {"lr": 1.0, "rho": 0.8, "eps": 1e-2, **_DECAY},
    ),
    Case(
        "adadelta-all",
        Adadelta,
        torch.optim.Adadelta,
        {"lr": 0.5, "rho": 0.7, "eps": 1e-3, "weight_decay": 0.02},
        {"lr": 1.0, "rho": 0.8, "eps": 1e-2, **_DECAY},
    ),
    Case("rmsprop", RMSprop, torch.optim.RMSprop, {}, {"lr": 0.02, "alpha": 0.9, "eps": 1e-2}),
    Case(
        "rmsprop-all",
        RMSprop,
        torch.optim.RMSprop,
        {"lr": 0.02, "alpha": 0.9, "weight_decay": 0.02, "momentum": 0.7, "centered": True},
        {"lr": 0.02, "alpha": 0.9, "eps": 1e-2, "momentum": 0.7, "centered": True, **_DECAY},
    ),
    Case(
        "asgd",
        ASGD,
        torch.optim.ASGD,
        {},
        {"lr": 0.1, "lambd": 0.1, "alpha": 0.6, "t0": 2.5, **_DECAY},
    ),
    Case(
        "asgd-all",
        ASGD,
        torch.optim.ASGD,
        {"lr": 0.05, "lambd": 0.02, "alpha": 0.6, "t0": 10.0, "weight_decay": 0.02},
        {"lr": 0.1, "lambd": 0.1, "alpha": 0.6, "t0": 2.5, **_DECAY},
    ),
    Case(
        "rprop",
        Rprop,
        torch.optim.Rprop,
        {},
        {"lr": 0.1, "etas": (0.5, 1.2), "step_sizes": (0.03, 0.2)},
    ),
    Case(
        "rprop-all",
        Rprop,
        torch.optim.Rprop,
        {"lr": 0.05, "etas": (0.4, 1.5), "step_sizes": (0.01, 0.1)},
        {"lr": 0.1, "etas": (0.5, 1.2), "step_sizes": (0.03, 0.2)},
    ),
    Case(
        "adafactor",
        Adafactor,
        torch.optim.Adafactor,
        {},
        {"lr": 0.3, "eps": (0.05, 1e-2), "d": 1.3, **_DECAY},
    ),
    # a step size above 1 / sqrt(t) and sizes below eps2 at first
    Case(
        "adafactor-matrices",
        Adafactor,
        torch.optim.Adafactor,
        {
            "lr": 0.1,
            "beta2_decay": -0.5,
            "eps": (1e-4, 1.5),
            "d": 1.2,
            "weight_decay": 0.02,
        },
        {"lr": 0.3, "eps": (0.05, 3.0), "d": 1.1, **_DECAY},
    ),
    Case("lion", Lion, PublishedLion, {}, {"lr": 0.1, "betas": (0.8, 0.95), **_DECAY}),
    Case(
        "lion-decay",
        Lion,
        PublishedLion,
        {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1},
        {"lr": 0.1, "betas": (0.8, 0.95), **_DECAY},
    ),
    Case("muon", Muon, torch.optim.Muon, {"lr": 0.02}, {"lr": 0.1, "ns_steps": 2, "eps": 0.1}),
    Case(
        "muon-all",
        Muon,
        torch.optim.Muon,
        {
            "lr": 0.02,
            "weight_decay": 0.2,
            "momentum": 0.8,
            "nesterov": False,
            "ns_coefficients": (2.0, -1.5, 0.5),
            "eps": 1e-6,
            "ns_steps": 4,
            "adjust_lr_fn": "match_rms_adamw",
        },
        {
            "lr": 0.1,
            "momentum": 0.8,
            "nesterov": False,
            "ns_steps": 2,
            "adjust_lr_fn": "match_rms_adamw",
        },
    ),
]
SHAPES = {"matrix0": (4, 3), "matrix1": (2, 3), "vector": (3,), "scalar": ()}
# What has no counterpart with the same arguments, but must be pure, savable, and so on.
OTHERS: dict[str, Callable[[], mo.Optimizer]] = {
    "schedule": lambda: SGD(Linear(0.1, 5, final=0.01), Constant(0.9)),
    "clip-value": lambda: ClipValue(0.1, Adam(0.05)),
    "clip-norm": lambda: ClipNorm(Linear(1.0, 5, final=0.1), RMSprop(LSTMSchedule(0.01))),
    "weight-decay": lambda: WeightDecay(0.1, ClipNorm(1.0, NAdam())),
    "decoupled": lambda: DecoupledWeightDecay(
        0.01, WeightDecay(Constant(0.1), SGD(Constant(0.1), 0.9))
    ),
    "masked": lambda: ClipNorm(1.0, Masked(Adam(Linear(0.1, 5)), mask=("matrix*", "vector"))),
    "grouped": lambda: Grouped(
        {"matrix*": Muon(), "vector": SGD(Constant(0.1)), "*": ClipNorm(0.1, Masked(NAdam(), "*"))}
    ),
    "ema": lambda: EMA(Linear(0.5, 5, final=0.9), Adam(0.05)),
    "lookahead": lambda: Lookahead(ClipNorm(1.0, Adam(Cosine(0.05, 5))), every=2),
    "learned-start": lambda: LearnedStart(
        {name: torch.zeros(shape) for name, shape in SHAPES.items()}, Adam(0.05)
    ),
    "schedule-free": lambda: ScheduleFree(AdamW(0.05, (0.0, 0.9)), weight=Linear(0.0, 3, final=1)),
    "accumulate": lambda: Accumulate(2, EMA(0.9, NAdam(Linear(0.05, 5)))),
    "trust-ratio": lambda: TrustRatio(Constant(0.05), TrustRatio(0.1, AdamW(1.0), of="gradients")),
    "agc": lambda: ClipValue(1.0, AGC(0.1, SGD(0.1, 0.9))),
    "cautious": lambda: Cautious(Adam(0.05)),
    "meta-curvature": lambda: Grouped(
        {
            "scalar": EMA(0.9, SGD(0.1)),
            "*": MetaCurvature(
                {name: shape for name, shape in SHAPES.items() if shape}, Adam(0.05)
            ),
        }
    ),
    "per-tensor": lambda: SGD(
        PerTensor({name: torch.empty(shape) for name, shape in SHAPES.items()}, 0.1, steps=3)
    ),
    "within": lambda: Adam(Positive(0.05), (Within(0.9), Within(0.99, 0.9, 1.0))),
    "gp-schedule": lambda: Adam(GPSchedule(0.05, 8, points=3)),
    "mlp-schedule": lambda: SGD({"scalar": 0.1, "*": MLPSchedule(0.05, 8)}),
    "attention-schedule": lambda: Adam(AttentionSchedule(Linear(0.1, 5), 8, change="additive")),
    "policy-schedule": lambda: RMSprop(PolicySchedule(0.05, 8)),
    "lstm": lambda: LSTMOptimizer(hidden_size=4),
    "mlp": lambda: MLPOptimizer(hidden_size=4),
    "adafactor-mlp": AdafactorMLP,
    "controlled-mlp": lambda: ControlledMLP(steps=9),
    "rnn-mlp": lambda: RNNMLP(4, 3),
    "nn-adam": lambda: NNAdam(3),
}
BUILDERS: dict[str, Callable[[], mo.Optimizer]] = {case.name: case.build for case in CASES} | OTHERS
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_optimizer = pytest.mark.parametrize("name", BUILDERS)


def start(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    others = (
        {}
        if name.startswith("muon")
        else {"vector": torch.randn(3, dtype=dtype), "scalar": torch.randn((), dtype=dtype)}
    )
    return {
        "matrix0": torch.randn(4, 3, dtype=dtype),
        "matrix1": torch.randn(2, 3, dtype=dtype),
        **others,
    }


def curve(params: dict[str, Tensor], shift: Tensor) -> Tensor:
    """A loss whose gradient changes size and sign.

    It is 0 in the first column of a matrix all the time.
    """
    hidden = torch.tanh(
        params["matrix0"][:, 1:] @ params["matrix1"][:, 1:].T + shift.to(params["matrix0"].dtype)
    )
    loss = (hidden**2).sum() + 0.3 * (params["matrix1"][:, 1:] ** 2).sum()
    if "vector" in params:
        loss = loss + (params["vector"] * params["scalar"] - 0.5).square().sum()
    return loss


def trained(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], start: dict[str, Tensor], shifts: Tensor
) -> dict[str, Tensor]:
    params = {name: p.clone().requires_grad_() for name, p in start.items()}
    optimizer = make(list(params.values()))
    for shift in shifts:
        optimizer.zero_grad()
        curve(params, shift).backward()
        optimizer.step()
    return tree.map(torch.Tensor.detach, params)


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take out of torch's Muon the rounding to bfloat16.

    It works in place on the result, hence the copy.

    It rounds by `bfloat16()`, and from 2.15 on by `to(dtype=torch.bfloat16)`.
    """
    to = torch.Tensor.to

    def unrounding(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        return (
            tensor.clone()
            if options.get("dtype") is torch.bfloat16
            else to(tensor, *args, **options)
        )

    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "to", unrounding)


# Rounding may differ by an operation: 50 steps of 2^-53, through a division by sqrt(v) in the worst
# case.
@pytest.mark.usefixtures("float64", "unrounded")
@pytest.mark.parametrize("deployed", [False, True], ids=["pure", "as_torch"])
@each_case
def test_fifty_steps_equal_torch_optim(case: Case, deployed: bool) -> None:
    first, shifts = start(case.name), torch.randn(50)
    expected = trained(lambda p: case.theirs(p, **case.options), first, shifts)
    found = (
        trained(case.build().as_torch, first, shifts)
        if deployed
        else mo.minimize(curve, case.build(), first, shifts).params
    )
    assert_close(found, expected, 1e-12)
    assert all((found[name] != first[name]).any() for name in first)


@pytest.mark.usefixtures("unrounded")
@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.name.startswith("muon")], ids=lambda case: case.name
)
def test_in_float32_it_rounds_as_torch_does(case: Case) -> None:
    """The tolerance is 50 steps of 2^-24.

    And 1 - 0.999 in float32 is off by 3e-5, its root by half of that.
    """
    first, shifts = start(case.name, torch.float32), torch.randn(50)
    expected = trained(lambda p: case.theirs(p, **case.options), first, shifts)
    assert_close(mo.minimize(curve, case.build(), first, shifts).params, expected, 3e-5)


def test_muon_is_torchs_up_to_its_rounding_to_bfloat16() -> None:
    """bfloat16 has 8 bits.

    Entries of the update are off by about 2^-8 each, here 3 steps of lr 0.02 and factor at most
    1.2.
    """
    first, shifts = start("muon", torch.float32), torch.randn(3)
    expected = trained(lambda p: torch.optim.Muon(p, lr=0.02), first, shifts)
    found = mo.minimize(curve, Muon(lr=0.02), first, shifts).params
    for name, w in found.items():
        assert (w - expected[name]).abs().max() < 3 * 0.02 * 1.2 * 5 * 2**-8
        assert (w - first[name]).abs().max() > 0.02


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("t0", [0.0, 3.0, 1e6])
def test_the_average_of_asgd_is_torchs(t0: float) -> None:
    w, targets = torch.randn(3).requires_grad_(), torch.randn(9, 3)
    first, theirs = w.detach().clone(), torch.optim.ASGD([w], 0.1, t0=t0)
    for target in targets:
        theirs.zero_grad()
        (w - target).square().sum().backward()
        theirs.step()
    out = mo.minimize(
        lambda w, target: (w - target).square().sum(), ASGD(0.1, t0=t0), first, targets
    )
    assert_close(out.opt_state["slots"]["average"], theirs.state[w]["ax"], 1e-12)
    assert (t0 == 1e6) == torch.allclose(out.opt_state["slots"]["average"], out.params)


def test_muon_makes_singular_values_near_one() -> None:
    gradient = torch.randn(6, 4, dtype=torch.float64)
    optimizer = Muon(lr=1.0, weight_decay=0.0, adjust_lr_fn="original")
    update, _ = optimizer(gradient, optimizer.init(gradient))
    values = torch.linalg.svdvals(update) / math.sqrt(6 / 4)
    # the range that the coefficients were chosen for
    assert ((values > 0.65) & (values < 1.3)).all()


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_muons_factor_of_the_shape(shape: tuple[int, int]) -> None:
    """torch's Muon has "spectral_unclamped" from 2.15 on."""
    gradient = torch.randn(shape, dtype=torch.float64)
    sizes = {}
    for choice in ("original", "match_rms_adamw", "spectral_unclamped"):
        optimizer = Muon(lr=1.0, weight_decay=0.0, adjust_lr_fn=choice)
        sizes[choice] = tree.norm(optimizer(gradient, optimizer.init(gradient))[0]).item()
    assert math.isclose(
        sizes["original"] / sizes["spectral_unclamped"], 1 if shape == (6, 4) else math.sqrt(6 / 4)
    )
    assert math.isclose(
        sizes["match_rms_adamw"] / sizes["spectral_unclamped"],
        0.2 * math.sqrt(6) / math.sqrt(shape[0] / shape[1]),
    )


def as_tensors(value: Any) -> Any:
    """Return numbers, also in pairs, as tensors of their own; the rest as it is."""
    if isinstance(value, tuple):
        return tuple(as_tensors(item) for item in value)
    return torch.tensor(value) if isinstance(value, float) else value


def memory(optimizer: mo.Optimizer, params: Tensor, step: int) -> dict[str, Any]:
    """Return a state as in the middle of a run.

    Positive where it is a square or a size, and on both sides of each maximum.
    """
    state = optimizer.init(params)
    values = {
        "square": lambda p: torch.rand_like(p) + 0.5,
        "row": lambda p: torch.rand_like(p) + 0.5,
        "column": lambda p: torch.rand_like(p) + 0.5,
        "moved": lambda p: torch.rand_like(p) + 0.5,
        "size": lambda p: torch.rand_like(p) * 0.04 + 0.1,
        "largest": lambda p: torch.linspace(0.2, 1.5, p.numel()).reshape(p.shape),
        "previous": lambda p: torch.linspace(-0.4, 1.0, p.numel()).reshape(p.shape),
    }
    slots = {name: values.get(name, torch.randn_like)(s) for name, s in state["slots"].items()}
    return {
        **state,
        "step": torch.tensor(step - 1),
        "slots": slots,
        "shared": {k: 0.3 * m for k, m in state["shared"].items()},
    }


def one_update(
    case: Case, step: int, zero: bool
) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Return an update as a function of everything it takes, and where to differentiate it."""
    optimizer = case.ours(**{name: as_tensors(value) for name, value in case.smooth.items()})
    hyper = dict(optimizer.named_buffers())
    params = torch.randn(2, 3) if case.matrices else torch.randn(3)
    grads = torch.randn(2, 3) if case.matrices else torch.tensor([0.6, 0.9, -0.7])
    if zero:
        grads.flatten()[1] = 0.0
    state = memory(optimizer, params, step)
    leaves, structure = tree.flatten((grads, params, state["slots"], state["shared"], hyper))

    def update(*leaves: Tensor) -> tuple[Tensor, ...]:
        grads, params, slots, shared, hyper = tree.unflatten(structure, leaves)
        updates, after = functional_call(
            optimizer, hyper, (grads, {**state, "slots": slots, "shared": shared}, params)
        )
        return tuple(leaf for leaf in tree.leaves((updates, after)) if leaf.requires_grad)

    return update, tuple(leaf.clone().requires_grad_() for leaf in leaves)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("step", [1, 9])
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero"])
@each_case
def test_one_update_is_differentiated_exactly_in_all_it_takes(
    case: Case, step: int, zero: bool
) -> None:
    """Gradients, parameters, memory and every hyperparameter, twice.

    The sign in Rprop jumps at a zero gradient.
    """
    if case.ours is Rprop and zero:
        pytest.skip("the next test says which derivative it has there")
    update, inputs = one_update(case, step, zero)
    assert gradcheck(update, inputs)
    assert gradgradcheck(update, inputs)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [Rprop, Lion])
def test_the_derivative_of_a_sign_is_zero_also_at_zero(kind: type[mo.Optimizer]) -> None:
    optimizer, params = kind(lr=0.1), torch.tensor([1.0, 2.0, 3.0])  # type: ignore[call-arg]
    grads = torch.tensor([0.0, 0.5, -0.5], requires_grad=True)
    updates, _ = optimizer(grads, optimizer.init(params), params)
    assert torch.equal(updates.detach(), torch.tensor([0.0, -0.1, 0.1]))
    (derivative,) = torch.autograd.grad(updates.sum(), grads)
    assert torch.equal(derivative, torch.zeros(3))


@pytest.mark.usefixtures("float64")
@each_case
def test_hyperparameters_are_differentiated_exactly_through_a_loop(case: Case) -> None:
    """Four steps from fresh memory.

    What starts as a hyperparameter (Rprop's sizes, Adagrad's sum) counts too.
    """
    optimizer = case.ours(**{name: as_tensors(value) for name, value in case.smooth.items()})
    names, values = zip(*dict(optimizer.named_buffers()).items(), strict=True)
    first, shifts = start(case.name), torch.randn(4)

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        for name, value in zip(names, values, strict=True):
            setattr(optimizer, name, value)
        return tuple(mo.minimize(curve, optimizer, first, shifts).params.values())

    assert gradcheck(run, tuple(value.clone().requires_grad_() for value in values))


def parameters(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(parameters(item) for item in value)
    return nn.Parameter(torch.tensor(value)) if isinstance(value, float) else value


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "kind", dict.fromkeys(case.ours for case in CASES), ids=lambda kind: kind.__name__
)
def test_meta_gradients_are_finite_where_the_gradient_is_zero(
    kind: type[mo.Optimizer], steps: int
) -> None:
    """Default settings.

    One weight never has a gradient, one starts at a stationary point, one tensor is at rest
    altogether.
    """
    defaults = {
        name: p.default
        for name, p in inspect.signature(kind).parameters.items()
        if p.default is not p.empty
    }
    optimizer = kind(
        **(
            {"lr": nn.Parameter(torch.tensor(0.1))}
            | {name: parameters(value) for name, value in defaults.items()}
        )
    )
    w = torch.tensor([[1.0, 0.0, 0.5], [-1.0, 0.3, 0.2]], requires_grad=True)
    rest = torch.zeros(2, 3, requires_grad=True)
    gain = torch.tensor([1.0, 1.0, 0.0], requires_grad=True)

    def loss(params: tuple[Tensor, Tensor], _: None, gain: Tensor) -> Tensor:
        return sum((gain * p**2).sum() for p in params)  # type: ignore[return-value]

    out = mo.minimize(loss, optimizer, (w, rest), None, steps=steps, meta=gain)
    inputs = [w, rest, gain, *optimizer.parameters()]
    total = sum(p.sum() for p in out.params) + out.losses.sum()
    first = torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)
    assert first[0] is not None
    assert all(g is None or torch.isfinite(g).all() for g in first)
    mixed = sum(g.sum() for g in first if g is not None)
    assert all(
        g is None or torch.isfinite(g).all()
        for g in torch.autograd.grad(mixed, inputs, allow_unused=True)
    )


@each_optimizer
def test_one_update_is_pure(name: str) -> None:
    optimizer, params, grads = BUILDERS[name](), start(name), start(name)
    loss = torch.tensor(0.7, dtype=torch.float64)
    update = partial(optimizer, loss=loss)
    _, state = update(grads, optimizer.init(params), params)
    everything = (params, grads, state, dict(optimizer.state_dict()))
    before, versions = (
        tree.map(torch.clone, everything),
        [leaf._version for leaf in tree.leaves(everything)],
    )
    random = torch.get_rng_state()
    results = [update(grads, state, params) for _ in range(2)]
    assert [leaf._version for leaf in tree.leaves(everything)] == versions
    assert all(
        torch.equal(a, b) for a, b in zip(tree.leaves(before), tree.leaves(everything), strict=True)
    )
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(*map(tree.leaves, results), strict=True))
    assert tree.flatten(results[0][1])[1] == tree.flatten(state)[1]
    owned = {leaf.data_ptr() for leaf in tree.leaves(everything) if leaf.numel()}
    assert not owned & {leaf.data_ptr() for leaf in tree.leaves(results[0])}, (
        "a result must not share memory with an input"
    )


@each_optimizer
def test_vmap_from_shared_initial_params_equals_a_loop(name: str) -> None:
    """Trap 16: `init` sees parameters without the batch, the gradients have it."""
    optimizer, first, shifts = (
        BUILDERS[name]().double(),
        start(name),
        torch.randn(3, 6, dtype=torch.float64),
    )

    def run(shifts: Tensor) -> tuple:
        return tuple(mo.minimize(curve, optimizer, first, shifts))

    batched = vmap(run)(shifts)
    for i in range(3):
        # matrix products are summed in another order
        assert_close(tree.index(batched, i), run(shifts[i]), 1e-12)


@each_optimizer
def test_it_is_saved_loaded_and_deployed(name: str, tmp_path: Path) -> None:
    optimizer = BUILDERS[name]()
    optimizer.save(tmp_path / "optimizer.safetensors")
    loaded = mo.Optimizer.load(tmp_path / "optimizer.safetensors")
    assert loaded.config() == optimizer.config()
    first, shifts = start(name, torch.float32), torch.randn(4)
    runs = [mo.minimize(curve, o, first, shifts) for o in (optimizer, loaded)]
    assert all(torch.equal(a, b) for a, b in zip(*map(tree.leaves, runs), strict=True))
    assert runs[0].params["matrix0"].ne(first["matrix0"]).any()


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_stays_low_and_finite(name: str, dtype: torch.dtype) -> None:
    optimizer, params = BUILDERS[name](), start(name, dtype)
    state = optimizer.init(params)
    kinds = tree.map(lambda leaf: leaf.dtype, state)
    for _ in range(3):
        updates, state = optimizer(params, state, params, loss=torch.tensor(0.7))
        params = mo.apply_updates(params, updates)
    assert tree.map(lambda leaf: leaf.dtype, state) == kinds
    assert {p.dtype for p in params.values()} == {dtype}
    assert all(torch.isfinite(p).all() for p in params.values())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: RAdam(betas=(0.9,)),
            ValueError,
            r"RAdam: `betas` must be a pair, got \(0.9,\). Write betas=",
        ),
        (
            lambda: Lion(betas=(0.9, 1.0)),
            ValueError,
            r"Lion: `beta2` must lie in \[0.0, 1.0\), got 1.0",
        ),
        (
            lambda: Rprop(etas=1.2),
            ValueError,
            r"Rprop: `etas` must be a pair, got "
            r"1.2",
        ),  # type: ignore[arg-type]
        (
            lambda: Rprop(etas=(0.5, 0.9)),
            ValueError,
            r"Rprop: `eta_plus` must lie in \[1.0, inf\], got 0.9",
        ),
        (
            lambda: Rprop(step_sizes=()),
            ValueError,
            r"Rprop: `step_sizes` must be a pair, got "
            r"\(\)",
        ),  # type: ignore[arg-type]
        (
            lambda: Adadelta(rho=1.1),
            ValueError,
            r"Adadelta: `rho` must lie in \[0.0, 1.0\], got 1.1",
        ),
        (
            lambda: NAdam(momentum_decay="x"),
            TypeError,
            r"NAdam: `momentum_decay` must be a "
            r"number",
        ),  # type: ignore[arg-type]
        (
            lambda: Muon(ns_coefficients=(1.0, 2.0)),
            ValueError,
            r"`ns_coefficients` must be three numbers",
        ),  # type: ignore[arg-type]
        (
            lambda: Muon(ns_steps=0),
            ValueError,
            r"Muon: `ns_steps` must be a positive integer, got 0",
        ),
        (
            lambda: Muon(adjust_lr_fn="no"),
            ValueError,
            r"`adjust_lr_fn` must be one of 'original', 'match_rms_adamw', 'spectral_unclamped', "
            r"got 'no'",
        ),  # type: ignore[arg-type]
        (
            lambda: Muon().init(torch.ones(3)),
            ValueError,
            r"Muon: `params` must be matrices, got shape \(3,\)",
        ),
    ],
)
def test_bad_arguments_are_refused(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (ASGD(), r"`ASGD` needs `params` because it averages them"),
        (Lion(weight_decay=0.1), r"`Lion` needs `params` because weight_decay=0.1"),
        (Adagrad(weight_decay=0.1), r"`Adagrad` needs `params` because weight_decay=0.1"),
        (Muon(), r"`Muon` needs `params` because weight_decay=0.1"),
    ],
)
def test_missing_params_are_named(optimizer: mo.Optimizer, message: str) -> None:
    w = torch.ones(2, 2)
    with pytest.raises(ValueError, match=message):
        optimizer(w, optimizer.init(w))
