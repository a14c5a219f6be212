"""What `minimize` makes of batches, parameters and models as people write them.

An error names the likely mistake.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import metaopt as mo
from optimizers import SGD, Adam, ClipNorm

pytestmark = pytest.mark.usefixtures("float64")


def digits_like() -> tuple[Any, Any, Any]:
    net = mo.functional(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    batch = torch.randn(6, 4), torch.randint(2, (6,))
    return net, lambda p, b: F.cross_entropy(net(p, b[0]), b[1]), batch


def note_of(error: BaseException) -> str:
    return "".join(getattr(error, "__notes__", []))


def test_a_forgotten_steps_is_named_beside_torchs_error() -> None:
    """The batch was cut along its examples; torch only said what the model then could not do."""
    net = mo.functional(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)))
    batch = torch.randn(5, 1, 4, 4), torch.randint(2, (5,))
    with pytest.raises((RuntimeError, ValueError)) as caught:
        mo.minimize(lambda p, b: F.cross_entropy(net(p, b[0]), b[1]), SGD(0.1), net.params, batch)
    note = note_of(caught.value)
    assert "there are 5 steps and the first batch has the shapes" in note
    assert "If `batches` is one batch, for every step, pass `steps=`" in note


def test_nothing_is_added_where_it_would_mislead() -> None:
    net, _, batch = digits_like()
    for batches, steps in ((batch, 2), ([batch, batch], None), (iter([batch]), None)):
        with pytest.raises(RuntimeError) as caught:
            mo.minimize(
                lambda p, b: (b[0] @ torch.ones(7)).sum(),
                SGD(0.1),
                net.params,
                batches,
                steps=steps,
            )
        assert note_of(caught.value) == ""


def test_a_list_of_batches_is_one_batch_a_step() -> None:
    """It was taken apart along the examples: "argument 'input' must be Tensor, not tuple"."""
    net, loss, batch = digits_like()
    other = batch[0] + 1, batch[1]
    listed = mo.minimize(loss, SGD(0.1), net.params, [batch, other])
    stacked = mo.minimize(loss, SGD(0.1), net.params, mo.tree.stack([batch, other]))
    assert torch.equal(listed.losses, stacked.losses)
    ragged = mo.minimize(
        loss,
        SGD(0.1),
        net.params,
        [batch, (other[0][:2], other[1][:2])],
        differentiate=mo.Backprop(memory="steps"),
    )
    assert len(ragged.losses) == 2
    ragged.losses.sum().backward()
    with pytest.raises(
        ValueError,
        match=r"`batches` must not be a list of tensors, got 2.*`torch.stack\(batches\)`",
    ):
        mo.minimize(loss, SGD(0.1), net.params, [*batch])
    with pytest.raises(
        ValueError, match="`batches` must hold at least one step, got an empty list"
    ):
        mo.minimize(loss, SGD(0.1), net.params, [])
    # a DataLoader's batches are lists
    with_steps = mo.minimize(loss, SGD(0.1), net.params, [*batch], steps=2)
    assert_close(with_steps.losses[0], listed.losses[0], 0)


def test_a_data_loader_as_it_is() -> None:
    net, loss, batch = digits_like()
    loader = DataLoader(TensorDataset(*batch), batch_size=4)
    out = mo.minimize(loss, SGD(0.1), net.params, loader)
    assert len(out.losses) == 2


def test_a_model_is_no_tree_of_parameters() -> None:
    net, loss, batch = digits_like()
    for wrong in (net, net.model):
        with pytest.raises(
            TypeError, match=r"`params` must be a tree of tensors, got a .*Pass `net.params`"
        ):
            mo.minimize(loss, SGD(0.1), wrong, batch, steps=1)


class _Asking(nn.Module):
    """A model whose activations are asked to require grad by a hook.

    Hugging Face's `enable_input_require_grads` leaves it so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)
        self.embed.register_forward_hook(lambda module, args, output: output.requires_grad_(True))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).mean(1).tanh())


RULES: list[Any] = [
    mo.Backprop(),
    mo.Backprop(memory="steps"),
    mo.Backprop(memory=mo.Revolve(2)),
    mo.FirstOrder(),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_hook_that_asks_activations_to_require_grad_is_no_closure(rule: Any) -> None:
    """The error said that the loss "reaches a tensor through its closure", which it does not."""
    model = _Asking()
    net, batch = mo.functional(model), (torch.randint(5, (4, 3)), torch.randint(2, (4,)))
    found = {}
    for hooked in (True, False):
        if not hooked:
            model.embed._forward_hooks.clear()
        out = mo.minimize(
            lambda p, b: F.cross_entropy(net(p, b[0]), b[1]),
            SGD(0.3),
            net.params,
            batch,
            steps=3,
            differentiate=rule,
        )
        found[hooked] = torch.autograd.grad(
            out.losses.sum() + out.params["head.weight"].sum(), list(net.params.values())
        )
    for one, other in zip(found[True], found[False], strict=True):
        assert_close(one, other, 1e-14)


def test_a_gradient_penalty_inside_a_loss() -> None:
    """It makes a leaf of its own."""
    net, loss, batch = digits_like()

    def penalized(params: Any, b: Any) -> Tensor:
        x = b[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(params, x).sum(), x, create_graph=True)
        return loss(params, b) + slope.square().sum()

    out = mo.minimize(penalized, SGD(0.1), net.params, batch, steps=2)
    start = {name: p.detach().clone().requires_grad_() for name, p in net.params.items()}
    params = start
    for _ in range(2):
        grads = torch.autograd.grad(
            penalized(params, batch), list(params.values()), create_graph=True
        )
        params = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads, strict=True)}
    expected = torch.autograd.grad(
        params["2.weight"].square().sum(), list(start.values()), materialize_grads=True
    )
    found = torch.autograd.grad(
        out.params["2.weight"].square().sum(), list(net.params.values()), materialize_grads=True
    )
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-13)


@pytest.mark.parametrize(
    "memory", ["full", "steps", mo.Revolve(2)], ids=["full", "steps", "revolve"]
)
def test_tensors_without_values(memory: Any) -> None:
    """On the meta device shapes alone are computed: of large models before they are built."""
    w = torch.ones(3, 2, device="meta", requires_grad=True)
    out = mo.minimize(
        lambda w, x: (w @ x).square().sum(),
        Adam(0.1),
        w,
        torch.ones(4, 2, 5, device="meta"),
        differentiate=mo.Backprop(memory=memory),
    )
    (grad,) = torch.autograd.grad(out.params.sum() + out.losses.sum(), w)
    assert grad.is_meta
    assert grad.shape == (3, 2)
    assert out.losses.shape == (4,)


@pytest.mark.parametrize("memory", ["full", "steps"])
def test_a_window_that_forgets_the_start_never_answers_zero(memory: Any) -> None:
    """The derivative in the initial parameters was a silent zero.

    It was so under `torch.func` and in `meta_grad`.
    """
    rule = mo.Backprop(window=2, memory=memory)

    def value(w: Tensor, steps: int = 5) -> Tensor:
        return mo.minimize(
            lambda w, _: w.square().sum(), SGD(0.1), w, None, steps=steps, differentiate=rule
        ).params.sum()

    w = torch.ones(2, requires_grad=True)
    for ask in (
        lambda: value(w).backward(),
        lambda: torch.func.grad(value)(torch.ones(2)),
        lambda: mo.meta_grad(lambda w, _: value(w), chunk_size=1)(torch.ones(2), torch.ones(2, 1)),
    ):
        with pytest.raises(
            ValueError, match=r"Backprop: the initial parameters must not be differentiated"
        ):
            ask()
    assert_close(
        torch.func.grad(lambda w: value(w, 2))(torch.ones(2)), torch.full((2,), 0.64), 1e-15
    )
    lr = torch.tensor(0.1, requires_grad=True)
    out = mo.minimize(lambda w, _: w.square().sum(), SGD(lr), w, None, steps=5, differentiate=rule)
    # what else the loop depends on is differentiated as before
    (found,) = torch.autograd.grad(out.params.sum(), lr)
    assert_close(found, torch.tensor(2 * 0.8**3 * 2 * 0.8 * -2), 1e-14)


# What an optimizer of one's own reaches

HIDDEN = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)


class ReadsGlobal(mo.Optimizer):
    def slots(self, params: Any) -> Any:
        return {}

    def update(self, grads: Any, params: Any, slots: Any, hyper: Any, step: Any) -> Any:
        return [-HIDDEN * grad for grad in grads], slots


class ReadsItem(ReadsGlobal):
    def __init__(self, rate: Tensor) -> None:
        super().__init__()
        self.settings = {"rate": rate}

    def update(self, grads: Any, params: Any, slots: Any, hyper: Any, step: Any) -> Any:
        return [-self.settings["rate"] * grad for grad in grads], slots


class Ramp(mo.Schedule):
    def forward(self, state: Any, *, step: Any, loss: Any, grads: Any) -> Any:
        return HIDDEN * step, state


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (ReadsGlobal, "HIDDEN"),
        (lambda: ReadsItem(HIDDEN), "settings.rate|HIDDEN|a tensor"),
        (lambda: SGD(Ramp()), "HIDDEN"),
        (lambda: ClipNorm(1.0, ReadsGlobal()), "HIDDEN"),
    ],
    ids=["global", "item", "schedule", "inside a transform"],
)
@pytest.mark.parametrize("rule", [mo.Backprop(), mo.Backprop("steps"), mo.T1T2()], ids=str)
def test_what_an_optimizer_reaches_beside_its_own_is_refused(
    make: Any, name: str, rule: Any
) -> None:
    """It would be differentiated by some rules, and silently not by others."""
    meta = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(ValueError, match=f"the optimizer reaches .*({name}).*nn.Parameter"):
        mo.minimize(
            lambda w, _, meta: (w - meta).square().sum(),
            make(),
            torch.zeros(2),
            None,
            steps=2,
            meta=meta,
            differentiate=rule,
        )


@pytest.mark.parametrize("wrong", [mo.Backprop, "backprop", mo.ConjugateGradient(), None])
def test_differentiate_must_be_a_rule(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"`differentiate` must be a rule, got .*`Backprop\(\)`"):
        mo.minimize(
            lambda w, _: w.sum(), SGD(0.1), torch.zeros(2), None, steps=1, differentiate=wrong
        )


@pytest.mark.parametrize("what", ["params", "meta", "batch"])
@pytest.mark.parametrize(
    "rule", [mo.ForwardMode(), mo.Backprop("steps", hvp="forward"), mo.T1T2()], ids=str
)
def test_expanded_tensors(what: str, rule: Any) -> None:
    """Whose entries share one place in memory, where forward mode writes."""

    def slope(expand: Callable[[Tensor], Tensor]) -> Tensor:
        number = torch.tensor(0.5, requires_grad=True)
        given = {name: torch.ones(2) * number for name in ("params", "meta", "batch")}
        given[what] = expand(number)
        end = mo.minimize(
            lambda w, x, meta: (w - x * meta).square().sum() + w.pow(4).sum(),
            SGD(0.1),
            given["params"],
            given["batch"],
            steps=2,
            meta=given["meta"],
            differentiate=rule,
        ).params
        return torch.autograd.grad(end.sum(), number)[0]

    assert_close(slope(lambda x: x.expand(2)), slope(lambda x: x.expand(2).clone()), 1e-12)


@pytest.mark.parametrize(
    "rule", [mo.Backprop("steps"), mo.Backprop(mo.Revolve(1)), mo.FirstOrder("steps")], ids=str
)
def test_a_batched_tensor_in_a_closure_is_named_where_it_cannot_be(rule: Any) -> None:
    """Torch ends in an assertion about itself."""
    x, metas = torch.randn(4, 2), torch.randn(4)

    def value(x: Tensor, meta: Tensor, *, is_passed: bool) -> Tensor:
        def loss(w: Tensor, batch: Any, meta: Tensor) -> Tensor:
            return (w - meta * (batch if is_passed else x)).square().sum()

        end = mo.minimize(
            loss,
            SGD(0.1),
            torch.zeros(2),
            x if is_passed else None,
            steps=3,
            meta=meta,
            differentiate=rule,
        ).params
        return end.square().sum()

    def slopes(*, is_passed: bool) -> Tensor:
        each = torch.func.vmap(functools.partial(value, is_passed=is_passed))
        return torch.func.grad(lambda metas: each(x, metas).sum())(metas)

    assert slopes(is_passed=True).isfinite().all()
    with pytest.raises(ValueError, match=r"through a closure\. Pass it as `batches` or `meta`"):
        slopes(is_passed=False)
