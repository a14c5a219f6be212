"""Complex parameters, trees of several dtypes, and autocast inside the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close, two_derivatives
from torch import Tensor, nn
from torch.func import grad

import metaopt as mo
from metaopt import tree
from optimizers import (
    AGC,
    ASGD,
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
    Cautious,
    ClipNorm,
    ClipValue,
    Grouped,
    Lion,
    Lookahead,
    LSTMOptimizer,
    MLPOptimizer,
    Muon,
    NAdam,
    NNAdam,
    RAdam,
    RMSprop,
    Rprop,
    ScheduleFree,
    TrustRatio,
)

RULES = {
    "full": mo.Backprop(),
    "steps": mo.Backprop("steps"),
    "revolve": mo.Backprop(mo.Revolve(2)),
    "window": mo.Backprop(window=3),
    "first-order": mo.FirstOrder(),
}
each_rule = pytest.mark.parametrize("rule", RULES)
OPTIMIZERS: dict[str, tuple[Callable[[], mo.Optimizer], Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": (
        lambda: SGD(0.1, 0.8, nesterov=True, weight_decay=0.05),
        lambda p: torch.optim.SGD(p, 0.1, 0.8, nesterov=True, weight_decay=0.05),
    ),
    "adam": (lambda: Adam(0.05), lambda p: torch.optim.Adam(p, 0.05)),
    "adam-amsgrad": (
        lambda: Adam(0.05, amsgrad=True, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.05, amsgrad=True, weight_decay=0.1),
    ),
    "adamw": (lambda: AdamW(0.05), lambda p: torch.optim.AdamW(p, 0.05)),
    "rmsprop": (
        lambda: RMSprop(0.02, momentum=0.5, centered=True),
        lambda p: torch.optim.RMSprop(p, 0.02, momentum=0.5, centered=True),
    ),
    "adagrad": (lambda: Adagrad(0.1), lambda p: torch.optim.Adagrad(p, 0.1)),
    "adadelta": (lambda: Adadelta(1.0), lambda p: torch.optim.Adadelta(p, 1.0)),
    "adamax": (lambda: Adamax(0.05), lambda p: torch.optim.Adamax(p, 0.05)),
    "nadam": (lambda: NAdam(0.05), lambda p: torch.optim.NAdam(p, 0.05)),
    "radam": (lambda: RAdam(0.05), lambda p: torch.optim.RAdam(p, 0.05)),
    "asgd": (lambda: ASGD(0.05), lambda p: torch.optim.ASGD(p, 0.05)),
    "rprop": (lambda: Rprop(0.05), lambda p: torch.optim.Rprop(p, 0.05)),
}


def start(dtype: torch.dtype = torch.complex128) -> dict[str, Tensor]:
    """Return complex and real parameters."""
    return {
        "a": torch.randn(3, 2, dtype=dtype),
        "b": torch.randn(2, dtype=dtype),
        "c": torch.randn((), dtype=dtype),
        "real": torch.randn(2, dtype=dtype.to_real()),
    }


def energy(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """A real loss that is no function of |z| alone: its gradients point everywhere in the plane."""
    y = (x @ params["a"]).sin() * params["c"] + params["b"].exp() * params["real"]
    return (y.abs() ** 2).mean() + (y**2).real.mean() * 0.3 + (params["b"] * 1j).real.square().sum()


@pytest.mark.usefixtures("float64")  # in which torch's NAdam and ASGD then keep their scalars too
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_complex_parameters_move_as_with_torch_optim(name: str) -> None:
    ours, theirs = OPTIMIZERS[name]
    params, xs = start(), torch.randn(50, 4, 3, dtype=torch.complex128)
    twin = {key: nn.Parameter(p.clone()) for key, p in params.items()}
    optimizer = theirs(list(twin.values()))
    for x in xs:
        optimizer.zero_grad()
        energy(twin, x).backward()
        optimizer.step()
    found = mo.minimize(energy, ours(), params, xs).params
    # 50 steps of rounding 1e-16, amplified some 1e2
    assert_close(found, {key: p.detach() for key, p in twin.items()}, 1e-12)
    deployed = {key: nn.Parameter(p.clone()) for key, p in params.items()}
    live = ours().as_torch(list(deployed.values()))
    for x in xs:
        live.zero_grad()
        energy(deployed, x).backward()
        live.step()
    assert_close({key: p.detach() for key, p in deployed.items()}, found, 1e-12)


@pytest.mark.parametrize(
    "make",
    [
        LSTMOptimizer,
        MLPOptimizer,
        AdafactorMLP,
        RNNMLP,
        NNAdam,
        lambda: Lion(0.01),
        lambda: TrustRatio(0.1, Cautious(Adam(0.1))),
        lambda: Lookahead(SGD(0.1), every=1),
        lambda: Accumulate(1, ScheduleFree(SGD(0.1))),
    ],
    ids=[
        "lstm",
        "mlp",
        "adafactor-mlp",
        "rnn-mlp",
        "nn-adam",
        "lion",
        "trust-ratio",
        "lookahead",
        "accumulate",
    ],
)
def test_the_others_see_a_complex_number_as_two(make: Callable[[], mo.Optimizer]) -> None:
    optimizer, params = make(), start(torch.complex64)
    grads = tree.map(torch.randn_like, params)
    updates, state = optimizer(grads, optimizer.init(params), params, loss=torch.ones(()))
    real_params, real_grads = (tree.map(tree.as_real, t) for t in (params, grads))
    expected, after = optimizer(
        real_grads, optimizer.init(real_params), real_params, loss=torch.ones(())
    )
    assert_close(
        tree.map(lambda u: tree.as_real(u).detach(), updates),
        tree.map(torch.Tensor.detach, expected),
        1e-6,
    )
    assert tree.flatten(state)[1] == tree.flatten(after)[1]
    assert {key: u.dtype for key, u in updates.items()} == {
        key: p.dtype for key, p in params.items()
    }


def test_clipping_bounds_the_parts_and_the_modulus() -> None:
    z = {"z": torch.tensor([3 + 4j, 0.1 - 0.2j], dtype=torch.complex128)}
    optimizer: mo.Optimizer = ClipValue(1.0, SGD(1.0))
    clipped, _ = optimizer(z, optimizer.init(z))
    assert_close(clipped["z"], -torch.tensor([1 + 1j, 0.1 - 0.2j], dtype=torch.complex128), 1e-15)
    optimizer = ClipNorm(1.0, Grouped({"*": SGD(1.0)}))
    bounded, _ = optimizer(z, optimizer.init(z))
    assert_close(bounded["z"], -z["z"] / (z["z"].abs() ** 2).sum().sqrt(), 1e-15)
    assert_close(tree.norm(z), (z["z"].abs() ** 2).sum().sqrt(), 1e-15)


def test_muon_refuses_complex_matrices() -> None:
    with pytest.raises(ValueError, match=r"`params` must be matrices, got shape \(2, 2, 2\)"):
        Muon(0.1).init({"z": torch.ones(2, 2, dtype=torch.complex64)})


@pytest.mark.parametrize(
    "make",
    [Adafactor, lambda: Grouped({"*": AGC(0.1, SGD(0.1))})],
    ids=["adafactor", "agc"],
)
def test_what_goes_by_the_axes_refuses_complex_parameters(make: Callable[[], mo.Optimizer]) -> None:
    with pytest.raises(ValueError, match=r"`params` must be real, got torch.complex128 at \['a'\]"):
        make().init(start())


def test_func_grad_has_the_convention_of_autograd() -> None:
    """dL/d(re) + i dL/d(im): the direction of steepest ascent."""
    params, x = start(), torch.randn(4, 3, dtype=torch.complex128)
    found = grad(energy)(params, x)
    leaves = {key: p.clone().requires_grad_() for key, p in params.items()}
    expected = torch.autograd.grad(energy(leaves, x), list(leaves.values()))
    assert_close(list(found.values()), list(expected), 1e-14)
    real = {key: tree.as_real(p) for key, p in params.items()}
    parts = grad(
        lambda q: energy({k: tree.as_complex(v) if k != "real" else v for k, v in q.items()}, x)
    )(real)
    assert_close(tree.map(tree.as_real, found), parts, 1e-14)


@each_rule
def test_meta_gradients_of_complex_parameters(rule: str) -> None:
    """Against the same loop over real and imaginary parts, written out."""
    params, xs, lr = (
        start(),
        torch.randn(5, 4, 3, dtype=torch.complex128),
        torch.tensor(0.03, dtype=torch.float64),
    )
    kinds = {key: p.is_complex() for key, p in params.items()}

    def whole(parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tree.as_complex(p) if kinds[key] else p for key, p in parts.items()}

    def ours(parts: dict[str, Tensor], lr: Tensor) -> Tensor:
        out = mo.minimize(energy, SGD(lr, 0.5), whole(parts), xs, differentiate=RULES[rule])
        return energy(out.params, xs[0]) + out.losses[-1]

    def by_hand(parts: dict[str, Tensor], lr: Tensor) -> Tensor:
        velocity = {key: torch.zeros_like(p) for key, p in parts.items()}
        for t, x in enumerate(xs):
            loss = energy(whole(parts), x)
            g = dict(
                zip(
                    parts,
                    torch.autograd.grad(loss, list(parts.values()), create_graph=True),
                    strict=True,
                )
            )
            if rule == "first-order":
                g = {key: value.detach() for key, value in g.items()}
            velocity = {key: 0.5 * v + g[key] for key, v in velocity.items()} if t else g
            parts = {key: p - lr * velocity[key] for key, p in parts.items()}
            if rule == "window" and t == 1:
                parts = {key: p.detach().requires_grad_() for key, p in parts.items()}
                velocity = {key: v.detach() for key, v in velocity.items()}
        return energy(whole(parts), xs[0]) + loss

    def derivatives(outer: Callable[..., Tensor]) -> Any:
        leaves = {key: tree.as_real(p).clone().requires_grad_() for key, p in params.items()}
        rate = lr.clone().requires_grad_()
        inputs = [rate] if rule == "window" else [*leaves.values(), rate]
        return two_derivatives(outer(leaves, rate), inputs)

    assert_close(derivatives(ours), derivatives(by_hand), 1e-9)


@pytest.mark.parametrize("memory", ["full", "steps"])
def test_complex_meta_gradients_are_batched_over_tasks(memory: Any) -> None:
    params, tasks = start(), torch.randn(3, 4, 3, dtype=torch.complex128)

    def task_loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        rule = mo.Backprop(memory)
        return energy(
            mo.minimize(
                energy, Adam(0.05, eps_root=1e-3), params, x, steps=3, differentiate=rule
            ).params,
            x,
        )

    batched, loop = (mo.meta_grad(task_loss, chunk_size=size)(params, tasks) for size in (None, 1))
    assert_close(batched, loop, 1e-12)
    h, v = 1e-6, tree.map(torch.randn_like, params)
    ends = [
        mo.meta_grad(task_loss)(tree.map(lambda p, v, s=s: p + s * h * v, params, v), tasks)[
            1
        ].mean()
        for s in (1, -1)
    ]
    slope = sum(
        (tree.as_real(g) * tree.as_real(d)).sum()
        for g, d in zip(batched[0].values(), v.values(), strict=True)
    )
    assert_close(slope, (ends[0] - ends[1]) / (2 * h), 1e-7)


MIXED = {"a": torch.float32, "b": torch.float64, "c": torch.bfloat16}


def mixed_loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
    a, b, c = (params[key].double() for key in "abc")
    return ((x @ a).tanh() * b + c).square().mean()


@each_rule
@pytest.mark.parametrize(
    "make",
    [lambda lr: SGD(lr, 0.9), lambda lr: Adam(lr), lambda lr: AdamW(lr)],
    ids=["sgd", "adam", "adamw"],
)
def test_every_leaf_keeps_its_own_dtype(make: Callable[[Any], mo.Optimizer], rule: str) -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    exact = {"a": torch.randn(3, 2), "b": torch.randn(2), "c": torch.randn(2)}
    params = {key: value.to(MIXED[key]).requires_grad_() for key, value in exact.items()}
    lr = torch.tensor(0.05, requires_grad=True)
    out = mo.minimize(mixed_loss, make(lr), params, x, steps=4, differentiate=RULES[rule])
    assert {key: p.dtype for key, p in out.params.items()} == MIXED
    for slot in out.opt_state["slots"].values():
        assert {key: memory.dtype for key, memory in slot.items()} == MIXED
    out.losses[-1].backward()
    assert lr.grad is not None
    wide = {key: p.detach().double().requires_grad_() for key, p in params.items()}
    rate = lr.detach().double().requires_grad_()
    expected = mo.minimize(mixed_loss, make(rate), wide, x, steps=4, differentiate=RULES[rule])
    expected.losses[-1].backward()
    # one leaf is rounded to 2^-8 at every step
    assert_close(lr.grad.double(), rate.grad, 0.1)
    for key in () if rule == "window" else params:
        assert params[key].grad.dtype == MIXED[key]
        assert_close(params[key].grad.double(), wide[key].grad, 0.1)


class First(nn.Module):
    """The first of a layer's results, from one argument or several times the same."""

    def __init__(self, layer: nn.Module, times: int = 1):
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        options = {"need_weights": False} if self.times > 1 else {}
        return self.layer(*[x] * self.times, **options)[0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layer-norm": lambda: nn.Sequential(
        nn.Linear(4, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4)
    ),
    "batch-norm": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4)
    ),
    "convolution": lambda: nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)
    ),
    "lstm": lambda: nn.Sequential(nn.Linear(4, 4), First(nn.LSTM(4, 4, batch_first=True))),
    "attention": lambda: First(nn.MultiheadAttention(4, 2, batch_first=True), times=3),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
    "transformer-eval": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(),
}


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("rule", ["full", "steps", "revolve"])
@pytest.mark.parametrize("name", MODELS)
def test_autocast_inside_the_loss_with_float32_state(
    name: str, rule: str, chunk_size: int | None
) -> None:
    net, tasks = mo.functional(MODELS[name]()), torch.randn(3, 2, 5, 3, 4)

    def gradient(autocast: bool) -> tuple[dict[str, Tensor], list[torch.dtype]]:
        dtypes = []

        def loss_fn(params: dict[str, Tensor], x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = net(params, x)
                dtypes.append(F.linear(y, y.new_zeros(1, y.shape[-1])).dtype)
            return (y.float() - 1).square().mean()

        def task_loss(params: dict[str, Tensor], task: Tensor) -> Tensor:
            out = mo.minimize(
                loss_fn, SGD(0.1), params, task[0], steps=3, differentiate=RULES[rule]
            )
            return loss_fn(out.params, task[1])

        return mo.meta_grad(task_loss, chunk_size=chunk_size)(net.params, tasks)[0], dtypes

    exact, plain = gradient(autocast=False)
    found, narrow = gradient(autocast=True)
    assert set(plain) == {torch.float32}
    assert set(narrow) == {torch.bfloat16}  # in the steps that run again too
    assert {g.dtype for g in found.values()} == {torch.float32}
    error = tree.norm(tree.map(torch.sub, found, exact)) / tree.norm(exact)
    assert 0 < error < 2**-6  # bfloat16 has 2^-8, and rounding errors average out over a sum
