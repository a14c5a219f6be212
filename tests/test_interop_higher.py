"""Programs written for `higher`, run with it and with ours: nothing but the module differs."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaopt.interop import higher as ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SyntaxWarning: it compares an integer by identity
    try:
        import higher as theirs
    except ImportError:
        theirs = None

needs_higher = pytest.mark.skipif(theirs is None, reason="higher is not installed")
# The two take the same operations in another order: a few ulp of float64 each, amplified by some
# steps.
close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


pytestmark = pytest.mark.usefixtures("float64")  # also what programs make of plain numbers


def run(program: Callable[..., Any], module: ModuleType, *arguments: Any) -> Any:
    """Run the program from the same seed; higher warns on the construction of RMSprop and Rprop."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        if module is theirs:
            warnings.simplefilter("ignore")
        return program(module, *arguments)


def mlp(*, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def batch(n: int = 6, *, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator), torch.randn(n, 2, generator=generator)


# ------------------------------------------------------------------------------------------------
# three programs


def maml(higher: ModuleType) -> dict[str, Any]:
    """Sinusoids: meta-training through five inner steps, then the same loop at test time."""
    model = nn.Sequential(
        nn.Linear(1, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 1)
    )
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    outer = torch.optim.Adam(model.parameters(), lr=1e-2)
    curve, gradients = [], []
    for _ in range(3):
        outer.zero_grad()
        for _ in range(4):
            amplitude, phase = 0.1 + 4.9 * torch.rand(()), 3.14 * torch.rand(())
            x = 10 * torch.rand(20, 1) - 5
            y = amplitude * torch.sin(x + phase)
            with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (
                fmodel,
                diffopt,
            ):
                for _ in range(5):
                    diffopt.step(F.mse_loss(fmodel(x[:10]), y[:10]))
                query = F.mse_loss(fmodel(x[10:]), y[10:])
                query.backward()
                curve.append(query.detach())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        outer.step()
    with higher.innerloop_ctx(model, inner, track_higher_grads=False) as (fmodel, diffopt):
        for _ in range(10):
            diffopt.step(F.mse_loss(fmodel(x[:10]), y[:10]))
        test = F.mse_loss(fmodel(x[10:]), y[10:]).detach()
    return {
        "curve": curve,
        "gradients": gradients,
        "weights": list(model.parameters()),
        "test": test,
    }


def learned_rates(higher: ModuleType) -> dict[str, Any]:
    """Learn the rate, momentum and decay of two groups, and write them back.

    They descend the loss after a few steps.
    """
    model = mlp()
    x, y = batch()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.2}]
    opt = torch.optim.SGD(groups, lr=0.1, momentum=0.5, weight_decay=0.01)
    advance(model, opt, 2, x, y)  # the live optimizer stands somewhere
    every = higher.optim.get_trainable_opt_params(opt)
    override = {name: every[name] for name in ("lr", "momentum", "weight_decay")}
    rates = higher.utils.flatten(override)
    outer = torch.optim.SGD(rates, lr=0.05)
    losses, gradients = [], []
    for _ in range(3):
        outer.zero_grad()
        with higher.innerloop_ctx(model, opt, override=override) as (fmodel, diffopt):
            for _ in range(4):
                diffopt.step(F.mse_loss(fmodel(x), y))
            loss = F.mse_loss(fmodel(x), y)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([rate.grad.clone() for rate in rates])
        outer.step()
    higher.optim.apply_trainable_opt_params(opt, override)
    written = [[group[name] for name in override] for group in opt.param_groups]
    untouched = [parameter.grad for parameter in fmodel.parameters(time=0)]
    return {"losses": losses, "gradients": gradients, "written": written, "untouched": untouched}


class Classifier(nn.Module):
    """A body with running statistics and a head, called together and apart."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh()
        )
        self.head = nn.Linear(6, 2)
        self.gain = nn.Parameter(torch.tensor([1.5, 0.5]))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.gain * self.head(self.body(x))


def by_hand(higher: ModuleType) -> dict[str, Any]:
    """Patch by hand.

    Other parameters in a call, clipped gradients, submodules, buffers, derivatives along the
    trajectory.
    """
    model = Classifier()
    x, y = batch(8)
    opt = torch.optim.Adam(model.parameters(), lr=0.05, eps=1e-15)
    advance(model, opt, 3, x, y)
    fmodel = higher.monkeypatch(model, copy_initial_weights=True)
    diffopt = higher.optim.get_diff_optim(opt, model.parameters(), fmodel=fmodel)

    def clip(grads: list[Tensor]) -> list[Tensor]:
        norm = sum(grad.square().sum() for grad in grads).sqrt()
        return [grad / torch.clamp(norm, min=1.0) for grad in grads]

    losses = []
    for step in range(4):
        loss = F.mse_loss(fmodel(x, scale=2.0), y)
        new = diffopt.step(loss, grad_callback=clip if step % 2 else None)
        assert all(a is b for a, b in zip(new, fmodel.fast_params, strict=True))
        losses.append(loss)
    halves = [p.detach().requires_grad_() * 0.5 for p in fmodel.parameters()]
    with_halves = fmodel(x, params=halves)
    diffopt.step(F.mse_loss(with_halves, y), params=halves)
    fmodel.fast_params = [p + 0.1 for p in fmodel.parameters()]
    fmodel.update_params([2 * p for p in fmodel.fast_params])
    fmodel.gain = fmodel.gain * 3
    final = F.mse_loss(fmodel.gain * fmodel.head(fmodel.body(x)), y)
    along = [
        torch.autograd.grad(final, list(fmodel.parameters(time=t)), retain_graph=True)
        for t in (-1, -3, 6, 5)
    ]
    early = torch.autograd.grad(losses[-1], fmodel.init_fast_params, retain_graph=True)
    fmodel.eval()
    return {
        "losses": losses,
        "with_halves": with_halves,
        "final": final,
        "along": along,
        "early": early,
        "evaluated": fmodel(x),
        "buffers": [b.clone() for b in fmodel.buffers()],
        "original": [*model.parameters(), *model.buffers()],
        "named": dict(fmodel.named_parameters()),
        "training": [model.training, fmodel.training, fmodel.body[1].training],
    }


@needs_higher
@pytest.mark.parametrize("program", [maml, learned_rates, by_hand])
def test_a_program_written_for_higher_returns_the_same(program: Callable[..., Any]) -> None:
    close(run(program, ours), run(program, theirs))


# ------------------------------------------------------------------------------------------------
# optimizers

# eps: higher adds it before the bias correction, torch after.
ADAM = {"lr": 0.05, "eps": 1e-15}
OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (torch.optim.Adam, {**ADAM, "weight_decay": 0.1}),
    (torch.optim.Adam, {**ADAM, "amsgrad": True, "betas": (0.5, 0.6)}),
    (torch.optim.Adamax, {"lr": 0.05, "weight_decay": 0.1}),
    (
        torch.optim.Adagrad,
        {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2, "weight_decay": 0.1},
    ),
    (torch.optim.Adadelta, {"lr": 1.0, "rho": 0.8, "weight_decay": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.02, "alpha": 0.9, "weight_decay": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.02, "momentum": 0.5, "centered": True}),
    (torch.optim.Rprop, {"lr": 0.05}),
]
BEYOND = [  # what higher has not, or gets wrong
    (torch.optim.SGD, {"lr": 0.1, "maximize": True}),
    (torch.optim.Adam, {"lr": 0.05}),
    (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.3}),
    (torch.optim.NAdam, {"lr": 0.05}),
    (torch.optim.RAdam, {"lr": 0.05}),
    (torch.optim.ASGD, {"lr": 0.1, "t0": 2, "lambd": 0.1, "weight_decay": 0.1}),
]
IDS = [f"{kind.__name__}-{'-'.join(options)}" for kind, options in [*OPTIMIZERS, *BEYOND]]


def live(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], steps: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model and its optimizer after some steps."""
    model = mlp()
    opt = kind(model.parameters(), **options)
    advance(model, opt, steps, *batch())
    return model, opt


def advance(model: nn.Module, opt: torch.optim.Optimizer, steps: int, x: Tensor, y: Tensor) -> None:
    for _ in range(steps):
        opt.zero_grad()
        F.mse_loss(model(x), y).backward()
        opt.step()


def unroll(
    higher: ModuleType, kind: type[torch.optim.Optimizer], options: dict[str, Any], before: int
) -> dict[str, Any]:
    """Three differentiable steps.

    The parameters, the derivatives in the first ones and in the rate.
    """
    model, opt = live(kind, options, before)
    x, y = batch()
    lr = torch.tensor(options["lr"], requires_grad=True)
    with higher.innerloop_ctx(model, opt, override={"lr": [lr]}) as (fmodel, diffopt):
        for _ in range(3):
            diffopt.step(F.mse_loss(fmodel(x), y))
        loss = F.mse_loss(fmodel(x), y)
        grads = torch.autograd.grad(loss, [lr, *fmodel.parameters(time=0)], materialize_grads=True)
    return {"params": list(fmodel.parameters()), "grads": grads}


@needs_higher
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=IDS[: len(OPTIMIZERS)])
def test_every_optimizer_of_higher_is_matched(
    kind: Any, options: dict[str, Any], before: int
) -> None:
    # Adam's first step is g / |g|, whose derivative 0 is what remains of terms as large as 1 / |g|.
    atol = 1e-8 if kind is torch.optim.Adam and before == 0 else 1e-12
    close(
        run(unroll, ours, kind, options, before),
        run(unroll, theirs, kind, options, before),
        atol=atol,
    )


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize(("kind", "options"), [*OPTIMIZERS, *BEYOND], ids=IDS)
def test_steps_are_those_that_the_live_optimizer_would_make(
    kind: Any, options: dict[str, Any], before: int
) -> None:
    model, opt = live(kind, options, before)
    x, y = batch()
    with ours.innerloop_ctx(model, opt) as (fmodel, diffopt):
        for _ in range(3):
            diffopt.step(F.mse_loss(fmodel(x), y))
    advance(model, opt, 3, x, y)
    close(list(fmodel.parameters()), [p.detach() for p in model.parameters()])
    for i, parameter in enumerate(model.parameters()):
        remembered = {
            name: value
            for name, value in diffopt.state[0].get(i, {}).items()
            if isinstance(value, Tensor)
        }
        close(
            remembered,
            {name: opt.state[parameter][name].to(value) for name, value in remembered.items()},
        )


def scalar_loop(update: Callable[..., Any], hyper: list[Tensor], steps: int = 4) -> Tensor:
    """Return sum w^2 after steps on 1/4 sum w^4.

    Each is made by `update(w, gradient, memory, t, *hyper)`.
    """
    w, memory = torch.tensor([0.7, -1.2, 0.4], requires_grad=True), None
    for t in range(1, steps + 1):
        w, memory = update(w, w**3, memory, t, *hyper)
    return w.square().sum()


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7, -1.2, 0.4]))

    def forward(self) -> Tensor:
        return 0.25 * (self.w**4).sum()


def patched_loop(
    higher: ModuleType, kind: Any, override: dict[str, list[Any]], steps: int = 4
) -> Tensor:
    model = Weights()
    with higher.innerloop_ctx(model, kind(model.parameters(), lr=0.1), override=override) as (
        fmodel,
        diffopt,
    ):
        for _ in range(steps):
            diffopt.step(fmodel())
        return fmodel.w.square().sum()


def adam(
    w: Tensor, g: Tensor, memory: Any, t: int, lr: Any, beta1: Any, beta2: Any, eps: Any, decay: Any
) -> tuple[Tensor, Any]:
    m, v = memory or (torch.zeros_like(w), torch.zeros_like(w))
    g = g + decay * w
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    return w - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps), (m, v)


def asgd(
    w: Tensor, g: Tensor, memory: Any, t: int, lr: Any, lambd: Any, alpha: Any
) -> tuple[Tensor, Any]:
    eta = lr / (1 + lambd * lr * (t - 1)) ** alpha
    return w * (1 - lambd * eta) - eta * g, None


def hyper(*values: float) -> list[Tensor]:
    return [torch.tensor(value, requires_grad=True) for value in values]


def test_the_betas_of_adam_have_their_true_derivative() -> None:
    """Trap 13: higher takes math.sqrt of the bias correction.

    It forgets how that depends on beta2.
    """
    by_definition = hyper(0.1, 0.9, 0.99, 1e-8, 0.05)
    expected = torch.autograd.grad(scalar_loop(adam, by_definition), by_definition)
    own = hyper(0.1, 0.9, 0.99, 1e-8, 0.05)
    override = {
        "lr": [own[0]],
        "betas": [(own[1], own[2])],
        "eps": [own[3]],
        "weight_decay": [own[4]],
    }
    close(torch.autograd.grad(patched_loop(ours, torch.optim.Adam, override), own), expected)
    if theirs is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrong = torch.autograd.grad(patched_loop(theirs, torch.optim.Adam, override), own)
        assert (wrong[2] - expected[2]).abs() > 0.5 * expected[2].abs()


def test_the_options_of_asgd_have_their_true_derivative() -> None:
    by_definition = hyper(0.1, 0.2, 0.75)
    expected = torch.autograd.grad(scalar_loop(asgd, by_definition), by_definition)
    own = hyper(0.1, 0.2, 0.75)
    override = {"lr": [own[0]], "lambd": [own[1]], "alpha": [own[2]]}
    close(torch.autograd.grad(patched_loop(ours, torch.optim.ASGD, override), own), expected)


@pytest.mark.parametrize(("kind", "options"), [*OPTIMIZERS, *BEYOND], ids=IDS)
def test_every_option_can_be_learned(kind: Any, options: dict[str, Any]) -> None:
    """By central differences of 1e-5.

    Truncation 1e-10, rounding 1e-11, both times derivatives of at most some hundreds.
    """
    model = mlp()
    if kind is torch.optim.Rprop:
        options = {"lr": 0.05, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0)}
    opt = kind(
        model.parameters(),
        **{"weight_decay": 0.1} | options if kind is not torch.optim.Rprop else options,
    )
    override = ours.get_trainable_opt_params(opt)
    # t0 moves the average only
    names = [name for name in override if name not in ("t0", "initial_lr")]
    leaves = ours.utils.flatten([override[name] for name in names])
    x, y = batch()

    def value() -> Tensor:
        with ours.innerloop_ctx(model, opt, override={name: override[name] for name in names}) as (
            fmodel,
            diffopt,
        ):
            for _ in range(3):
                diffopt.step(F.mse_loss(fmodel(x), y))
            return F.mse_loss(fmodel(x), y)

    grads = torch.autograd.grad(value(), leaves, allow_unused=True)
    assert sum(grad is not None and bool(grad != 0) for grad in grads) >= 2
    for leaf, grad in zip(leaves, grads, strict=True):
        if leaf.detach() < 1e-4:  # eps: no room for a difference on both sides
            continue
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * 1e-5
            ends.append(value().detach())
            with torch.no_grad():
                leaf -= sign * 1e-5
        torch.testing.assert_close(
            grad if grad is not None else torch.zeros(()),
            (ends[0] - ends[1]) / 2e-5,
            rtol=1e-5,
            atol=1e-7,
        )


# ---- names that programs take although they begin with an underscore ----


def used_names(higher: ModuleType) -> dict[str, Any]:
    """What programs written for higher do with its half-public names."""
    x, a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([5.0, 6.0])
    optim, patch, utils = higher.optim, higher.patch, higher.utils
    tree = {"a": [1, (2, 3)], "b": {4}}
    masked = torch.tensor([1.0, -2.0], requires_grad=True)
    square = masked.square()
    optim._maybe_mask(square, torch.tensor([True, False]))
    (first,) = torch.autograd.grad((square * a).sum(), masked, create_graph=True)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    fmodel = patch.make_functional(model)
    assert isinstance(fmodel, patch._MonkeyPatchBase)
    assert isinstance(fmodel[1], patch._MonkeyPatchBase)
    assert not isinstance(model, patch._MonkeyPatchBase)
    model[1].running_mean.fill_(3.0)
    patch.buffer_sync(model, fmodel)
    model[1].running_mean.fill_(4.0)
    target = torch.ones(2)
    assert optim._recursive_apply(a, target) is target
    copied = utils._copy_tensor(masked, True)
    assert copied.requires_grad
    assert copied.is_leaf
    assert torch.optim.SGD in optim._opt_mapping
    return {
        "mapped": utils.flatten(utils._recursive_map(tree, lambda leaf: 10 * leaf)),
        "containers": [utils._is_container(item) for item in ([], (), {}, set(), x, 1)],
        "found": [str(utils._find_param_in_list(p, [x, a, b])) == "2" for p in (b, x, a + 0)],
        "copied": [copied.detach(), *utils._recursive_copy_and_cast([x], None)],
        "shared": utils._copy_tensor(x, safe_copy=False).data_ptr() == x.data_ptr(),
        "sums": [
            optim._add(tensor=x, a1=-0.1, a2=a),
            optim._add(x, a),
            optim._addcmul(x, a, b),
            optim._addcmul(x, 0.1, a, b),
        ],
        "quotients": [optim._addcdiv(x, a, b), optim._addcdiv(x, 0.1, a, b)],
        "gradient": first.detach(),
        "buffers": {name: buffer.clone() for name, buffer in fmodel.named_buffers()},
        "applied": [
            target,
            *optim._recursive_apply((torch.tensor(0.5), torch.tensor(2.0)), (0.1, 3)),
        ],
    }


@needs_higher
def test_half_public_names_are_there_and_do_the_same() -> None:
    """A case of names without a counterpart.

    `_recursive_map`, `_add`, `_MonkeyPatchBase`, `buffer_sync` and others.
    """
    close(run(used_names, ours), run(used_names, theirs))
    names = {
        "optim": "_add _addcdiv _addcmul _get_mask_closure _maybe_mask _recursive_apply "
        "_opt_mapping _GroupedGradsType _StateType "
        "_GradClosureType _OverrideType _GradCallbackType",
        "patch": "_MonkeyPatchBase _EncapsulatorType _BufferType buffer_sync",
        "utils": "_recursive_map _copy_tensor _recursive_copy_and_cast _is_container "
        "_find_param_in_list",
    }
    for module, wanted in names.items():
        assert all(
            hasattr(getattr(ours, module), name) and hasattr(getattr(theirs, module), name)
            for name in wanted.split()
        )


def test_buffers_of_another_architecture_are_refused() -> None:
    fmodel = ours.monkeypatch(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(
        ValueError,
        match=r"`fmodule` must have the submodules of `module`, got none at .1.\. Patch this "
        r"module",
    ):
        ours.patch.buffer_sync(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), fmodel)


def test_what_is_written_back_is_of_the_kind_that_stood_there() -> None:
    """higher's own testGetApplyRoundTrip: an integer 0 comes back as an integer.

    What was learned is not cut off.
    """
    opt = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    before = {name: value for name, value in opt.param_groups[0].items() if name != "params"}
    ours.optim.apply_trainable_opt_params(opt, ours.optim.get_trainable_opt_params(opt))
    after = {name: value for name, value in opt.param_groups[0].items() if name != "params"}
    assert {name: (type(value), value) for name, value in after.items() if name != "lr"} == {
        name: (type(value), value) for name, value in before.items() if name != "lr"
    }
    ours.optim.apply_trainable_opt_params(opt, {"weight_decay": [torch.tensor(0.25)]})
    assert opt.param_groups[0]["weight_decay"] == 0.25


# ---- schedulers of the live optimizer ----


def test_a_scheduler_inside_the_loop_is_warned_of_and_an_override_is_not() -> None:
    """A case of a rate that stays, without a word.

    Higher reads the options when it makes its optimizer, and so do we.
    """
    model, x, y = nn.Linear(2, 1), torch.ones(3, 2), torch.zeros(3, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    with ours.innerloop_ctx(model, opt) as (fmodel, diffopt):
        diffopt.step(F.mse_loss(fmodel(x), y))
        opt.step()
        scheduler.step()
        message = (
            r"changed from 0\.1 to 0\.05 since .* It goes on with 0\.1: .*"
            r"`diffopt.step\(loss, override=\{'lr': \[0\.05\]\}\)`"
        )
        before = list(fmodel.parameters())
        loss = F.mse_loss(fmodel(x), y)
        grads = torch.autograd.grad(loss, before, retain_graph=True)
        with pytest.warns(UserWarning, match=message):
            after = diffopt.step(loss)
        close(after, [param - 0.1 * grad for param, grad in zip(before, grads, strict=True)])
        scheduler.step()
        diffopt.step(F.mse_loss(fmodel(x), y))  # once is enough
    # what is made now has the present rate
    with ours.innerloop_ctx(model, opt) as (fmodel, diffopt):
        assert diffopt.param_groups[0]["lr"] == 0.025
        scheduler.step()
        diffopt.step(F.mse_loss(fmodel(x), y), override={"lr": [0.0125]})
