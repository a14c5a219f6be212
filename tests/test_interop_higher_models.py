"""The bridge for programs written for `higher`.

Models that higher gets wrong, exceptions, copies, and what it refuses.
"""

from __future__ import annotations

import copy
import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaopt.exact_ops import any_order
from metaopt.interop import higher

pytestmark = pytest.mark.usefixtures("float64")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


X, Z = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = Z[:, :2]


def snapshot(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


def unrolled(
    model: nn.Module, x: Tensor, y: Tensor, steps: int = 3, rate: float = 0.1
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss after plain gradient steps and its derivative in the initial parameters.

    It is computed with `functional_call` by hand.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    own = dict(model.named_parameters())
    first = [own[name].detach().clone().requires_grad_() for name in names]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def loss(params: list[Tensor]) -> Tensor:
        tensors = dict(zip(names, params, strict=True)) | buffers
        return F.mse_loss(torch.func.functional_call(model, tensors, (x,)), y)

    params = first
    for _ in range(steps):
        grads = torch.autograd.grad(loss(params), params, create_graph=True, materialize_grads=True)
        params = [p - rate * g for p, g in zip(params, grads, strict=True)]
    last = loss(params)
    return last, list(torch.autograd.grad(last, first, materialize_grads=True))


def patched(
    model: nn.Module, x: Tensor, y: Tensor, steps: int = 3, rate: float = 0.1
) -> tuple[Tensor, list[Tensor]]:
    """The same by the bridge."""
    with higher.innerloop_ctx(model, sgd(model, lr=rate)) as (fmodel, diffopt):
        for _ in range(steps):
            diffopt.step(F.mse_loss(fmodel(x), y))
        last = F.mse_loss(fmodel(x), y)
    first = [p for p in fmodel.parameters(time=0) if p.requires_grad]
    return last, list(torch.autograd.grad(last, first, materialize_grads=True))


# ------------------------------------------------------------------------------------------------
# models


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))[:, :2]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(1, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x[..., None])[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(1, 4), nn.Linear(4, 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x[..., None])
        return self.head(self.norm(h + self.attention(h, h, h, need_weights=False)[0]).mean(1))


class Indirect(nn.Module):
    """Reaches its layers by every way that does not go through their registered names."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.scale, self.shift = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(0.3))
        self.listed, self.paired = [self.first], (self.second, {"last": [self.third]})
        self.numbers = {"shift": [self.shift]}
        self.activation = self._activation
        self.output = lambda x: self.scale * x + self.numbers["shift"][0]
        self.itself = [self]
        self.itself.append(self.itself)

    def _activation(self, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * x)

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.listed[0](x))
        h = self.activation(self.paired[0](h))
        return self.output(self.itself[1][0].paired[1]["last"][0](h))


class Direct(Indirect):
    """The same function, by registered names only, which is what `functional_call` sees."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.scale * self.second(torch.tanh(self.scale * self.first(x))))
        return self.scale * self.third(h) + self.shift


def frozen() -> nn.Module:
    model = mlp()
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


def weight_normed() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 2)
    )


def hooked() -> nn.Module:
    model = mlp()
    model[0].register_forward_hook(lambda module, inputs, output: output * 2 + module.bias)
    return model


MODELS: list[Callable[[], nn.Module]] = [
    Tied, Recurrent, Attention, Indirect, frozen, Unused, normed, weight_normed, hooked
]  # fmt: skip


@pytest.mark.parametrize("build", MODELS)
def test_models_as_they_are(build: Callable[[], nn.Module]) -> None:
    """Tied, frozen, unused and normalised parameters, recurrence, attention, hooks, and more.

    There are layers reached by detours. Nothing leaks.
    """
    torch.manual_seed(0)
    model = build()
    before = snapshot(model)
    torch.manual_seed(0)
    with any_order():
        expected_loss, expected = unrolled(Direct() if build is Indirect else build(), X, Y)
    loss, found = patched(model, X, Y)
    # The same operations, those of norms apart, in float64.
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert sum(bool(grad.any()) for grad in found) >= 2
    torch.testing.assert_close(snapshot(model), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tied_parameters_stay_tied_and_are_one() -> None:
    model = Tied()
    with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
        diffopt.step(F.mse_loss(fmodel(X), Y))
    assert len(list(fmodel.parameters())) == len(list(model.parameters())) == 3
    assert fmodel.encoder.weight is fmodel.decoder.weight is next(fmodel.parameters())
    assert model.encoder.weight is model.decoder.weight
    fmodel.decoder.weight = torch.zeros(3, 3)  # a submodule's parameter, set by hand
    assert fmodel.encoder.weight is fmodel.fast_params[0] is fmodel.decoder.weight
    assert not fmodel.encoder.weight.any()


def test_frozen_and_unused_parameters_stay_what_they_are() -> None:
    for track in (True, False):
        model = frozen()
        seen: list[list[bool]] = []

        def look(grads: list[Any], seen: list[list[bool]] = seen) -> list[Any]:
            seen.append([grad is None for grad in grads])
            return grads

        with higher.innerloop_ctx(
            model, sgd(model, weight_decay=0.1, momentum=0.9), track_higher_grads=track
        ) as (fmodel, diffopt):
            for _ in range(2):
                diffopt.step(F.mse_loss(fmodel(X), Y), grad_callback=look)
        assert [p.requires_grad for p in fmodel.parameters()] == [True, False, False, True]
        assert torch.equal(fmodel[0].bias, model[0].bias)
        assert torch.equal(fmodel[2].weight, model[2].weight)
        assert seen == [[False, True, True, False]] * 2  # no gradient is not a gradient of zero
        assert sorted(diffopt.state[0]) == [0, 3]
    model = Unused()
    with higher.innerloop_ctx(model, torch.optim.Adam(model.parameters(), weight_decay=0.1)) as (
        fmodel,
        diffopt,
    ):
        diffopt.step(F.mse_loss(fmodel(X), Y))
        assert torch.equal(fmodel.unused.weight, model.unused.weight)
        # now it is used: its first step, the others' second
        both = F.mse_loss(fmodel(X) + fmodel.unused(X), Y)
        diffopt.step(both)
    assert [diffopt.state[0][i]["step"] for i in range(4)] == [2, 2, 1, 1]
    assert not torch.equal(fmodel.unused.weight, model.unused.weight)


def test_buffers_are_carried_by_the_patched_model_only() -> None:
    model = normed()
    twin = copy.deepcopy(model)
    fmodel = higher.monkeypatch(model)
    for _ in range(3):
        fmodel(X)
        twin(X)
    torch.testing.assert_close(
        dict(fmodel.named_buffers()), dict(twin.named_buffers()), rtol=0, atol=0
    )
    assert not model[1].running_mean.any()
    assert model[1].num_batches_tracked == 0
    fmodel.eval()
    assert model.training
    assert not fmodel[1].training
    frozen_statistics = fmodel(X).sum()
    fmodel.train()
    fmodel(X)  # does not spoil the graph of the call before, which holds the running statistics
    frozen_statistics.backward()
    assert all(p.grad is not None for p in fmodel.parameters(time=0))


def test_every_call_of_a_program_is_differentiable_twice() -> None:
    """A third derivative through a norm is that of elementary operations.

    torch's own is wrong by per cents.
    """
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))
    fmodel = higher.monkeypatch(model)

    def outer(weight: Tensor) -> Tensor:
        loss = fmodel(X, params=[weight, *list(fmodel.parameters())[1:]]).square().mean()
        return torch.autograd.grad(loss, weight, create_graph=True)[0].square().sum()

    weight = model[0].weight.detach().clone().requires_grad_()
    assert torch.autograd.gradgradcheck(outer, (weight,))


def test_a_model_that_keeps_what_it_computed() -> None:
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen, self.last = nn.Linear(3, 2), [], None

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.layer(x)
            self.seen.append(self.last)
            return self.last

    model = Keeps()
    model(X)  # `last` and `seen` now hold tensors that copy.deepcopy refuses
    fmodel = higher.monkeypatch(model)
    output = fmodel(X)
    assert fmodel.last is output
    assert model.last is not output
    assert (len(model.seen), len(fmodel.seen)) == (1, 2)


def test_a_patched_model_is_one_of_its_class() -> None:
    model = Indirect()
    fmodel = higher.monkeypatch(model)
    assert isinstance(fmodel, Indirect)
    assert isinstance(fmodel.first, nn.Linear)
    assert type(fmodel) is type(higher.monkeypatch(model))
    assert fmodel.listed[0] is fmodel.first is not model.first
    assert fmodel.activation.__self__ is fmodel
    assert dict(fmodel.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert {p.shape for p in fmodel.parameters(recurse=False)} == {torch.Size([])}
    assert len(list(fmodel.parameters(recurse=False))) == 2
    torch.testing.assert_close(fmodel.state_dict(), model.state_dict(), rtol=0, atol=0)
    fmodel.zero_grad()
    fmodel(X).sum().backward()
    fmodel.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in fmodel.parameters())
    fmodel.update_params([p * 2 for p in fmodel.parameters()])
    fmodel.zero_grad()  # without a warning for tensors that have no `.grad`
    fmodel.float()
    assert {p.dtype for p in fmodel.parameters()} == {torch.float32}
    assert {p.dtype for p in fmodel.parameters(time=0)} == {torch.float64}
    converted = higher.monkeypatch(normed()).to(torch.float32)
    assert {b.dtype for b in converted.buffers()} == {torch.float32, torch.int64}


# ------------------------------------------------------------------------------------------------
# time, copies, failure


def test_gradients_reach_the_original_only_if_asked() -> None:
    for copied in (True, False):
        model = mlp()
        with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=copied) as (
            fmodel,
            diffopt,
        ):
            diffopt.step(F.mse_loss(fmodel(X), Y))
            F.mse_loss(fmodel(X), Y).backward()
        assert all((p.grad is None) == copied for p in model.parameters())
        assert all(p.is_leaf == copied for p in fmodel.parameters(time=0))
        assert all(
            p is q for p, q in zip(fmodel.init_fast_params, fmodel.parameters(time=0), strict=True)
        )
    _, expected = unrolled(model, X, Y, steps=1)
    torch.testing.assert_close(
        [p.grad for p in model.parameters()], expected, rtol=1e-10, atol=1e-13
    )


def test_without_tracking_nothing_is_kept() -> None:
    model = mlp()
    lr = torch.tensor(0.1, requires_grad=True)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    with higher.innerloop_ctx(model, opt, override={"lr": [lr]}, track_higher_grads=False) as (
        fmodel,
        diffopt,
    ):
        past = [weakref.ref(p) for p in fmodel.parameters()]
        for _ in range(3):
            diffopt.step(F.mse_loss(fmodel(X), Y))
    gc.collect()
    assert all(p() is None for p in past)
    assert all(p.is_leaf and p.requires_grad for p in fmodel.parameters())
    assert all(memory["momentum_buffer"].grad_fn is None for memory in diffopt.state[0].values())
    with higher.innerloop_ctx(model, opt) as (tracked, diffopt):
        for _ in range(3):
            diffopt.step(F.mse_loss(tracked(X), Y))
    torch.testing.assert_close(
        list(fmodel.parameters()), list(tracked.parameters()), rtol=1e-12, atol=1e-14
    )
    assert list(fmodel.parameters(time=0)) == list(fmodel.parameters())
    with pytest.raises(ValueError, match="`time` must be 0 or -1, got 1"):
        fmodel.parameters(time=1)
    with pytest.raises(RuntimeError, match="initial parameters are not kept"):
        _ = fmodel.init_fast_params
    tracked.track_higher_grads = False
    assert not tracked.track_higher_grads
    assert list(tracked.parameters(time=0)) == list(tracked.parameters())
    with pytest.raises(TypeError, match="`track_higher_grads` must be a bool, got int"):
        tracked.track_higher_grads = 1


def test_a_call_that_raises_changes_nothing() -> None:
    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.second = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor, fail: bool = False) -> Tensor:
            h = self.norm(self.first(x))
            if fail:
                raise RuntimeError("on purpose")
            return self.second(h)

    model = Fragile()
    with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
        diffopt.step(F.mse_loss(fmodel(X), Y))
        reference = copy.deepcopy(fmodel)
        with pytest.raises(RuntimeError, match="on purpose"):
            fmodel(X, fail=True, params=[torch.zeros_like(p) for p in fmodel.parameters()])
        with pytest.raises(ValueError, match="must hold the 6 parameters"):
            fmodel(X, params=list(fmodel.parameters())[1:])
        assert all(p is q for p, q in zip(fmodel.parameters(), reference.parameters(), strict=True))
        torch.testing.assert_close(
            dict(fmodel.named_buffers()), dict(reference.named_buffers()), rtol=0, atol=0
        )
        assert torch.equal(fmodel.second(fmodel.first(X)), reference.second(reference.first(X)))
        assert torch.equal(fmodel(X), reference(X))
        with pytest.raises(ValueError, match="`time` must be at most 1"):
            fmodel.parameters(time=2)


def test_copies_go_their_own_way() -> None:
    model = normed()
    with higher.innerloop_ctx(model, sgd(model, momentum=0.9)) as (fmodel, diffopt):
        diffopt.step(F.mse_loss(fmodel(X), Y))
        branch, branch_opt = copy.deepcopy((fmodel, diffopt))
        before, statistics = list(fmodel.parameters()), [b.clone() for b in fmodel.buffers()]
        branch_opt.param_groups[0]["lr"] = 0.5
        branch_opt.step(F.mse_loss(branch(X), Y))
        assert all(p is q for p, q in zip(fmodel.parameters(), before, strict=True))
        torch.testing.assert_close(list(fmodel.buffers()), statistics, rtol=0, atol=0)
        assert diffopt.param_groups[0]["lr"] == 0.1
        assert branch.eval()[1].training is False
        assert fmodel[1].training
        branch.train()
        diffopt.param_groups[0]["lr"] = 0.5
        diffopt.step(F.mse_loss(fmodel(X), Y))
        torch.testing.assert_close(
            list(branch.parameters()), list(fmodel.parameters()), rtol=1e-12, atol=1e-14
        )
        grads = [
            torch.autograd.grad(
                F.mse_loss(net(X), Y), list(fmodel.parameters(time=0)), retain_graph=True
            )
            for net in (fmodel, branch)
        ]  # both go back to the same beginning
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)
    original = copy.deepcopy(model)
    torch.testing.assert_close(original.state_dict(), model.state_dict(), rtol=0, atol=0)
    same = [torch.ones(2, 3), torch.ones(2)]
    twice = higher.make_functional(nn.Linear(3, 2))
    assert copy.deepcopy(twice).fast_params is None
    twice.update_params(same)
    assert list(copy.deepcopy(twice).parameters())[1] is same[1]


def test_a_model_without_parameters_of_its_own() -> None:
    model = mlp()
    given: list[Any] = []
    fmodel = higher.make_functional(
        model, lambda patched, original: given.extend([patched, original])
    )
    assert given == [fmodel, model]
    assert fmodel.fast_params is None
    for action in (lambda: fmodel(X), lambda: list(fmodel.parameters())):
        with pytest.raises(ValueError, match="The patched module has no parameters yet"):
            action()
    diffopt = higher.get_diff_optim(sgd(model), model.parameters(), fmodel)
    with pytest.raises(ValueError, match="`params` is needed: this optimizer has no patched model"):
        diffopt.step(torch.zeros(()))
    params = higher.utils.get_func_params(model, device="cpu")
    assert all(p.is_leaf and p.requires_grad for p in params)
    assert (
        higher.utils.get_func_params(model, safe_copy=False)[0].data_ptr()
        == model[0].weight.data_ptr()
    )
    assert torch.equal(fmodel(X, params=params), model(X))
    assert fmodel.fast_params == params


# ------------------------------------------------------------------------------------------------
# optimizers


def test_an_optimizer_without_a_patched_model() -> None:
    """Parameters in and out by hand, as for a regression without modules."""
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    diffopt = higher.create_diff_optim(torch.optim.SGD, {"lr": 0.1, "momentum": 0.5}, params=[w])
    first = diffopt.step(w.square().sum(), params=[w])
    (second,) = diffopt.step(first[0].square().sum(), params=first)
    # w1 = .8 w; b2 = .5 * 2w + 2 * .8w = 2.6 w; w2 = .8w - .26w
    torch.testing.assert_close(second, 0.54 * w)
    torch.testing.assert_close(torch.autograd.grad(second.sum(), w)[0], torch.full((2,), 0.54))


def test_an_optimizer_made_for_groups() -> None:
    model = mlp()
    fmodel = higher.monkeypatch(model, device="cpu")
    groups = [{"params": list(model[0].parameters())}, {"params": model[2].weight, "lr": 0.5}]
    diffopt = higher.create_diff_optim(torch.optim.SGD, {"lr": 0.1}, params=groups)
    assert [group["lr"] for group in diffopt.param_groups] == [0.1, 0.5]
    params = list(fmodel.parameters())
    loss = F.mse_loss(fmodel(X), Y)
    with pytest.raises(ValueError, match="must hold the 4 parameters"):
        fmodel.update_params(diffopt.step(loss, params=params[:3]))
    alone = higher.create_diff_optim(
        torch.optim.Adam, fmodel=fmodel, override={"lr": [0.5]}, track_higher_grads=False
    )
    alone.step(F.mse_loss(fmodel(X), Y))
    # Adam's first step is that of the rate
    assert (fmodel[0].weight - params[0]).abs().max() > 0.49
    with pytest.raises(ValueError, match="`params` or `fmodel` is needed"):
        higher.create_diff_optim(torch.optim.Adam)


def test_groups_have_their_own_options_and_may_leave_parameters_out() -> None:
    model = mlp()
    groups = [
        {"params": [model[2].bias, model[0].weight]},
        {"params": [model[2].weight], "lr": 0.3},
    ]
    opt = torch.optim.SGD(groups, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with higher.innerloop_ctx(model, opt) as (fmodel, diffopt):
        loss = F.mse_loss(fmodel(X), Y)
        grads = torch.autograd.grad(loss, list(fmodel.parameters()), retain_graph=True)
        new = diffopt.step(loss, override={"lr": [torch.tensor(0.2), torch.tensor(0.4)]})
    expected = [
        p - rate * g for p, rate, g in zip(before, [0.2, 0.0, 0.4, 0.2], grads, strict=True)
    ]
    torch.testing.assert_close(new, expected, rtol=1e-12, atol=1e-14)
    assert diffopt.param_groups[0]["params"] == [new[3], new[0]]
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.3]
    assert [p.grad for p in model.parameters()] == [None] * 4


def test_gradients_pass_through_the_callback() -> None:
    model = mlp()
    opt = sgd(model)
    halve = lambda grads: (grad / 2 for grad in grads)
    for constructor, step, factor in [
        (None, None, 1.0),
        (halve, None, 0.5),
        (None, halve, 0.5),
        (halve, lambda g: g, 1.0),
    ]:
        fmodel = higher.monkeypatch(model)
        diffopt = higher.get_diff_optim(opt, model.parameters(), fmodel, grad_callback=constructor)
        loss = F.mse_loss(fmodel(X), Y)
        grads = torch.autograd.grad(loss, list(fmodel.parameters()), retain_graph=True)
        before = list(fmodel.parameters())
        after = diffopt.step(loss, grad_callback=step)
        expected = [p - factor * 0.1 * g for p, g in zip(before, grads, strict=True)]
        torch.testing.assert_close(after, expected, rtol=1e-12, atol=1e-14)
    with pytest.raises(
        ValueError,
        match="`grad_callback` must return 4 gradients, one for each that it is given, got 1",
    ):
        diffopt.step(F.mse_loss(fmodel(X), Y), grad_callback=lambda grads: grads[:1])


def test_live_memory_is_read_and_left_alone() -> None:
    model = mlp()
    opt = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1))
    F.mse_loss(model(X), Y).backward()
    opt.step()
    opt.zero_grad()
    before = copy.deepcopy(opt.state_dict())
    with higher.innerloop_ctx(model, opt, device="cpu") as (fmodel, diffopt):
        memory = diffopt.state[0][0]["exp_avg"]
        torch.testing.assert_close(memory, opt.state[model[0].weight]["exp_avg"], rtol=0, atol=0)
        diffopt.step(F.mse_loss(fmodel(X), Y))
    torch.testing.assert_close(opt.state_dict()["state"], before["state"], rtol=0, atol=0)
    assert diffopt.param_groups[0]["lr"] is not opt.param_groups[0]["lr"]
    assert diffopt.state[0][0]["step"] == 2


def test_an_optimizer_of_ones_own() -> None:
    class Sign(torch.optim.SGD):
        """Another rule: w <- w - lr sign(g)."""

    class DifferentiableSign(higher.optim.DifferentiableOptimizer):
        def _update(self, grouped_grads: list[list[Tensor | None]]) -> None:
            for index, (group, grads) in enumerate(
                zip(self.param_groups, grouped_grads, strict=True)
            ):
                for i, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                    if g is not None:
                        self.state[index][i]["steps"] = self.state[index][i].get("steps", 0) + 1
                        group["params"][i] = p - group["lr"] * g.sign()

    model = mlp()
    opt = Sign(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"no differentiable counterpart of .*Sign; there is one of .*'SGD'"
    ):
        higher.get_diff_optim(opt, model.parameters())
    higher.register_optim(Sign, DifferentiableSign)
    with higher.innerloop_ctx(model, opt) as (fmodel, diffopt):
        diffopt.step(F.mse_loss(fmodel(X), Y))
    assert type(diffopt) is DifferentiableSign
    torch.testing.assert_close((fmodel[0].weight - model[0].weight).abs(), torch.full((8, 3), 0.1))
    assert diffopt.state[0][0] == {"steps": 1}


def test_trainable_options_are_the_numbers() -> None:
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    override = higher.get_trainable_opt_params(opt, device="cpu")
    assert set(override) == {"lr", "momentum", "dampening", "weight_decay"}
    assert all(tensor.requires_grad for tensor in higher.utils.flatten(override))
    with higher.innerloop_ctx(model, opt, override=override) as (fmodel, diffopt):
        for _ in range(2):
            diffopt.step(F.mse_loss(fmodel(X), Y))
        F.mse_loss(fmodel(X), Y).backward()
    assert all(
        tensor.grad is not None and tensor.grad != 0 for tensor in higher.utils.flatten(override)
    )
    betas = higher.get_trainable_opt_params(torch.optim.Adam(model.parameters()))["betas"]
    assert [beta.tolist() for beta in betas[0]] == [0.9, 0.999]


def test_learned_options_are_written_back() -> None:
    model = mlp()
    opt = torch.optim.Adam([{"params": [p]} for p in model.parameters()], lr=0.1)
    lr = torch.tensor(0.2, requires_grad=True)
    higher.apply_trainable_opt_params(
        opt,
        {
            "lr": [lr],
            "betas": [(lr, 0.5)],
            "weight_decay": [0.01 * i for i in range(4)],
            "amsgrad": [torch.tensor(1.0)],
        },
    )
    assert [group["lr"] for group in opt.param_groups] == [0.2] * 4
    assert opt.param_groups[1]["betas"] == (0.2, 0.5)
    # torch's default weight decay is the integer 0; what is learned is none.
    assert [group["weight_decay"] for group in opt.param_groups] == [0.0, 0.01, 0.02, 0.03]
    assert opt.param_groups[0]["amsgrad"] is True
    tensor = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1, dtype=torch.float32))
    higher.apply_trainable_opt_params(tensor, {"lr": [lr]})
    assert tensor.param_groups[0]["lr"].dtype == torch.float32
    assert not tensor.param_groups[0]["lr"].requires_grad
    with pytest.raises(
        ValueError, match="override of 'betas' must have the form of the optimizer's own value"
    ):
        higher.apply_trainable_opt_params(opt, {"betas": [lr]})
    with pytest.raises(
        ValueError,
        match="override of 'lr' must be a list with one value, or with one for each of the 4 "
        "groups",
    ):
        higher.apply_trainable_opt_params(opt, {"lr": [lr, lr]})


# ------------------------------------------------------------------------------------------------
# refusals


def test_a_step_that_would_do_nothing_is_an_error() -> None:
    model = mlp()
    with higher.innerloop_ctx(model, sgd(model)) as (_, diffopt):
        with pytest.raises(ValueError, match="`loss` must depend on a trainable fast weight"):
            diffopt.step(F.mse_loss(model(X), Y))  # the original in place of the patched one
        with pytest.raises(ValueError, match="`loss` must depend on a trainable fast weight"):
            diffopt.step(torch.zeros(()))
    with pytest.raises(
        ValueError, match=r"`reference_params` must hold every parameter of the optimizer.*\(8, 3\)"
    ):
        higher.get_diff_optim(sgd(model), list(model.parameters())[1:])


def test_what_cannot_be_patched_is_refused() -> None:
    model = mlp()
    fmodel = higher.monkeypatch(model)
    with pytest.raises(ValueError, match="`module` is a patched module already"):
        higher.monkeypatch(fmodel)
    with pytest.raises(ValueError, match="`module` is a patched module already"):
        higher.monkeypatch(nn.Sequential(fmodel))
    model[0].forward = types.MethodType(lambda self, x: x, model[0])
    with pytest.raises(ValueError, match="The Linear to patch has a `forward` of its own"):
        higher.monkeypatch(model)
    for attribute in (lambda p: (p,), lambda p: lambda: p):
        model = mlp()
        model[0].kept = attribute(model[0].weight)
        with pytest.raises(
            ValueError, match=r"keeps a parameter of shape \(8, 3\) in a tuple or in the closure"
        ):
            higher.monkeypatch(model)
    with pytest.raises(
        TypeError, match="`weight` of a patched module must be a tensor, got NoneType"
    ):
        fmodel[0].weight = None
    with pytest.raises(TypeError, match="`params` must be tensors, got float"):
        fmodel.update_params([1.0] * 4)


def test_complex_parameters_move_as_torch_moves_them() -> None:
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0 + 2.0j, -0.5 + 0.3j]))

        def forward(self) -> Tensor:
            return (self.w - (0.3 - 1.0j)).abs().square().sum()

    model = Complex()
    opt = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):  # from fresh memory, and from live one
        with higher.innerloop_ctx(model, opt) as (fmodel, diffopt):
            diffopt.step(fmodel())
            diffopt.step(fmodel())
        assert diffopt.state[0][0]["exp_avg"].is_complex()
        for _ in range(2):
            opt.zero_grad()
            model().backward()
            opt.step()
        torch.testing.assert_close(fmodel.w, model.w.detach(), rtol=1e-12, atol=1e-14)


def test_an_option_changed_between_steps_counts() -> None:
    model = mlp()
    with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
        for rate in (0.1, 0.2, torch.tensor(0.3), torch.tensor(0.4, requires_grad=True), 0.2):
            diffopt.param_groups[0]["lr"] = rate
            loss, before = F.mse_loss(fmodel(X), Y), list(fmodel.parameters())
            grads = torch.autograd.grad(loss, before, retain_graph=True)
            after = diffopt.step(loss)
            torch.testing.assert_close(
                after,
                [p - rate * g for p, g in zip(before, grads, strict=True)],
                rtol=1e-12,
                atol=1e-14,
            )
        diffopt.param_groups[0]["lr"] = rate = torch.tensor(0.3)
        for _ in range(2):
            loss, before = F.mse_loss(fmodel(X), Y), list(fmodel.parameters())
            grads = torch.autograd.grad(loss, before, retain_graph=True)
            after = diffopt.step(loss)
            torch.testing.assert_close(
                after,
                [p - rate * g for p, g in zip(before, grads, strict=True)],
                rtol=1e-12,
                atol=1e-14,
            )
            rate += 0.1  # in place, as torch's schedulers do
