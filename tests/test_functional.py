"""`functional`: a module as a function, and the module as it was."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

import metaopt as mo
from metaopt import tree
from optimizers import SGD

pytestmark = pytest.mark.usefixtures("float64")


class Tied(nn.Module):
    """One matrix used twice, one frozen vector, one module that stands in two containers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight
        self.shift = nn.Parameter(torch.randn(3), requires_grad=False)
        shared = nn.Linear(3, 3)
        self.layers = nn.ModuleList([shared, nn.Tanh(), shared])
        self.by_name = nn.ModuleDict({"again": shared})

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens) + self.shift
        for layer in self.layers:
            hidden = layer(hidden)
        return self.out(self.by_name["again"](hidden))


def snapshot(model: nn.Module) -> tuple:
    """Everything a module holds: the identity and the bits of its tensors, and its modes."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return (
        {
            name: (
                id(tensor),
                tensor.detach().clone().tolist(),
                tensor.requires_grad,
                tensor._version,
            )
            for name, tensor in tensors.items()
        },
        {name: module.training for name, module in model.named_modules()},
    )


def test_it_computes_what_the_module_computes() -> None:
    model, tokens = Tied(), torch.tensor([[0, 3], [4, 1]])
    net = mo.functional(model)
    assert_close(net(net.params, tokens), model(tokens), 1e-15)
    other = Tied()
    own = {name: other.get_parameter(name) for name in net.params}
    other.shift.data = model.shift.data  # a constant inside `net`
    assert_close(net(own, tokens), other(tokens), 1e-15)


def test_tied_weights_stand_once_and_frozen_ones_not_at_all() -> None:
    model = Tied()
    net = mo.functional(model)
    assert list(net.params) == ["embed.weight", "layers.0.weight", "layers.0.bias"]
    assert net.params["embed.weight"] is model.out.weight


def test_the_gradient_of_a_tied_weight_is_the_sum_over_its_uses() -> None:
    model, tokens = Tied(), torch.tensor([[0, 3], [4, 1]])
    net = mo.functional(model)
    found = grad(lambda params: net(params, tokens).square().sum())(
        tree.map(torch.Tensor.detach, net.params)
    )
    model(tokens).square().sum().backward()
    assert_close(found, {name: parameter.grad for name, parameter in net.params.items()}, 1e-12)


def test_params_are_live_and_backward_fills_grad() -> None:
    model = nn.Linear(2, 1)
    net = mo.functional(model)
    net(net.params, torch.ones(1, 2)).sum().backward()
    assert_close(model.weight.grad, torch.ones(1, 2), 0)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert_close(net(net.params, torch.zeros(1, 2))[0], model.bias, 0)


def test_a_module_in_several_places_is_restored() -> None:
    """`functional_call` given both names of one module would swap it twice.

    It would put the wrong tensor back.
    """
    model = Tied()
    before, net = snapshot(model), mo.functional(model)
    net({name: torch.randn_like(p) for name, p in net.params.items()}, torch.tensor([1, 2]))
    assert snapshot(model) == before


def test_a_buffer_in_several_places_is_replaced_everywhere() -> None:
    model = nn.ModuleDict({"a": Counting(), "b": Counting()})
    model["b"].total = model["a"].total
    model.forward = lambda x: model["b"](model["a"](x))  # type: ignore[method-assign]
    net, before = mo.functional(model), snapshot(model)
    assert set(net.buffers) == {"a.calls", "a.total", "b.calls"}
    ones = torch.ones(1)
    # a: total 10 + 1 = 11, out 2 + 11 = 13; b: total 11 + 13 = 24, out 26 + 24 = 50.
    y, after = net.with_buffers(net.params, net.buffers | {"a.total": torch.tensor(10.0)}, ones)
    assert_close((y, after["a.total"]), (50 * ones, torch.tensor(24.0)), 0)
    assert snapshot(model) == before


@pytest.mark.parametrize("training", [True, False])
def test_the_module_is_never_changed(training: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.BatchNorm1d(8, momentum=None),
    ).train(training)
    net, x = mo.functional(model), torch.randn(4, 1, 4, 4)
    before = snapshot(model)
    params = {name: torch.randn_like(p) for name, p in net.params.items()}
    net(params, x)
    _, buffers = net.with_buffers(params, net.buffers, x)
    vmap(lambda x: net(params, x), randomness="different")(x[:, None].expand(4, 4, 1, 4, 4))
    assert snapshot(model) == before
    assert (buffers["1.num_batches_tracked"] == 1) == training


class Held(nn.Module):
    """A parameter that other modules hold as a buffer, before or after it.

    A buffer of its own, a frozen parameter held too.
    """

    def __init__(self, order: str) -> None:
        super().__init__()
        tied = nn.Linear(2, 2)
        for kind in order:
            holder = nn.Module()
            match kind:
                case "p":
                    holder.register_parameter("w", tied.weight)
                case "b":
                    holder.register_buffer("w", tied.weight)
                case "m":
                    holder = tied
                case "n":  # both, in one module
                    holder.register_buffer("before", tied.weight)
                    holder.register_parameter("w", tied.weight)
            setattr(self, f"{kind}{len(self._modules)}", holder)
        self.register_buffer("shift", torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("held", self.frozen)

    def forward(self, x: Tensor) -> Tensor:
        for module in self._modules.values():
            x = x @ (module.weight if isinstance(module, nn.Linear) else module.w)
            x = x @ getattr(module, "before", torch.eye(2))
        return x + self.shift * self.frozen * self.held


@pytest.mark.parametrize("order", ["bp", "pb", "bm", "mb", "bbpb", "bnm", "n", "bpmm"])
def test_a_parameter_that_is_a_buffer_elsewhere_is_lent_as_torch_lends_it(order: str) -> None:
    """It was never lent where an earlier module holds it as a buffer.

    Value and gradient were those of the module's own.
    """
    model, x = Held(order), torch.randn(3, 2)
    net = mo.functional(model)
    assert net.params.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert net.buffers.keys() == {"shift", "held"}
    params = tree.map(lambda p: torch.randn_like(p), net.params)
    own = dict([*model.named_parameters(), *model.named_buffers()])

    def ours(p: Any) -> Tensor:
        return net(p, x).sin().sum()

    def with_buffers(p: Any) -> Tensor:
        return net.with_buffers(p, net.buffers, x)[0].sin().sum()

    def of_torch(p: Any) -> Tensor:
        # it leaves a module of two places changed
        return torch.func.functional_call(copy.deepcopy(model), p, (x,)).sin().sum()

    for function in (ours, with_buffers):
        assert_close(function(params), of_torch(params), 1e-13)
        assert_close(grad(function)(params), grad(of_torch)(params), 1e-13)
    assert all(
        one is own[name] for name, one in [*model.named_parameters(), *model.named_buffers()]
    )
    shifted, _ = net.with_buffers(params, {**net.buffers, "held": torch.zeros(2)}, x)
    assert_close(
        shifted, torch.func.functional_call(model, {**params, "held": torch.zeros(2)}, (x,)), 1e-13
    )


def test_an_exception_inside_forward_leaves_the_module_whole() -> None:
    """Trap 15: a patched forward that fails must not leave the other weights behind."""

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.linear(self.norm(x))
            raise RuntimeError("in the middle")

    model = Failing()
    net = mo.functional(model)
    before = snapshot(model)
    params = {name: torch.zeros_like(p) for name, p in net.params.items()}
    for call in (
        lambda: net(params, torch.randn(4, 3)),
        lambda: net.with_buffers(params, net.buffers, torch.randn(4, 3)),
    ):
        with pytest.raises(RuntimeError, match="in the middle"):
            call()
        assert snapshot(model) == before


def test_with_buffers_returns_the_running_statistics_of_the_module_itself() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, momentum=0.3))
    net, reference = mo.functional(model), copy.deepcopy(model)
    buffers = net.buffers
    for x in torch.randn(3, 5, 3):
        y, buffers = net.with_buffers(net.params, buffers, x)
        assert_close(y, reference(x), 1e-14)
    assert_close(buffers, dict(reference.named_buffers()), 1e-14)
    assert_close(model[1].running_mean, torch.zeros(2), 0)
    reference.eval()
    model.eval()
    y, after = net.with_buffers(net.params, buffers, x)
    assert_close(y, reference(x), 1e-14)
    assert_close(after, buffers, 0)


def test_with_buffers_under_vmap_keeps_statistics_of_each_element() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    net, xs = mo.functional(model), torch.randn(4, 5, 3)
    batched = tree.map(lambda b: b.expand(4, *b.shape), net.buffers)
    ys, after = vmap(lambda buffers, x: net.with_buffers(net.params, buffers, x))(batched, xs)
    for i, x in enumerate(xs):
        reference = copy.deepcopy(model)
        assert_close(ys[i], reference(x), 1e-14)
        assert_close(tree.index(after, i), dict(reference.named_buffers()), 1e-14)


def test_a_call_uses_the_statistics_of_its_batch_and_eval_the_running_ones() -> None:
    model = nn.BatchNorm1d(2)
    net, x = mo.functional(model), 3 * torch.randn(8, 2) + 1
    assert_close(net(net.params, x).mean(0), torch.zeros(2), 1e-12)
    model.eval()
    assert_close(net(net.params, x), x / (1 + model.eps) ** 0.5, 1e-12)


class Counting(nn.Module):
    """A forward that rebinds one buffer and adds to another in place."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.total += x.sum()
        return self.scale * x + self.total


def test_buffers_that_forward_rebinds_or_adds_to() -> None:
    model = Counting()
    net, before = mo.functional(model), snapshot(model)
    assert_close(net(net.params, torch.ones(2)), torch.full((2,), 4.0), 0)
    buffers = net.buffers
    for _ in range(3):
        y, buffers = net.with_buffers(net.params, buffers, torch.ones(2))
    assert_close(
        (y, buffers),
        (torch.full((2,), 8.0), {"calls": torch.tensor(3), "total": torch.tensor(6.0)}),
        0,
    )
    assert snapshot(model) == before


def test_parametrized_weights_are_differentiated_through_their_parametrization() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    net, x = mo.functional(model), torch.randn(4, 3)
    assert set(net.params) == {
        "bias",
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    }
    found = grad(lambda params: net(params, x).square().sum())(
        tree.map(torch.Tensor.detach, net.params)
    )
    model(x).square().sum().backward()
    assert_close(found, {name: parameter.grad for name, parameter in net.params.items()}, 1e-12)


def test_spectral_norm_iterates_on_a_copy() -> None:
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    before, net = snapshot(model), mo.functional(model)
    net(net.params, torch.randn(2, 3))
    assert snapshot(model) == before


def test_load_writes_values_and_keeps_the_tensors() -> None:
    model = Tied()
    net, weight = mo.functional(model), model.embed.weight
    values = {name: torch.randn_like(p) for name, p in net.params.items()}
    net.load(values)
    assert model.out.weight is model.embed.weight is weight
    assert weight.requires_grad
    assert_close(tree.map(torch.Tensor.detach, net.params), values, 0)


def test_copies_and_pickles_stand_on_their_own() -> None:
    model, tokens = Tied(), torch.tensor([1, 2])
    net = mo.functional(model)
    expected = net(net.params, tokens).detach()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(file, weights_only=False),
    ):
        assert list(twin.params) == list(net.params)
        assert twin.params["embed.weight"] is not net.params["embed.weight"]
        twin.load(tree.map(torch.zeros_like, twin.params))
        assert_close(twin(twin.params, tokens), torch.zeros(2, 5), 0)
        assert_close(net(net.params, tokens).detach(), expected, 0)


def test_a_buffer_that_is_registered_later_is_seen() -> None:
    model = nn.Linear(2, 2)
    net = mo.functional(model)
    model.register_buffer("later", torch.ones(2))
    x = torch.randn(3, 2)
    output, after = net.with_buffers(net.params, net.buffers, x)
    assert_close(output, model(x), 0.0)
    assert_close(net(net.params, x), model(x), 0.0)
    assert list(after) == ["later"]


def test_a_parameter_that_is_gone_is_named() -> None:
    """A parametrization moves it: lending it under its old name would have no effect."""
    model = nn.Linear(3, 2)
    net = mo.functional(model)
    params = tree.map(torch.Tensor.detach, net.params)
    nn.utils.parametrizations.weight_norm(model)
    with pytest.raises(
        ValueError, match="no tensor 'weight' any more, which it had when `functional` saw it"
    ):
        net(params, torch.ones(1, 3))


def test_keyword_arguments_and_several_outputs() -> None:
    net = mo.functional(nn.MultiheadAttention(4, 2, batch_first=True))
    x = torch.randn(1, 3, 4)
    out, weights = net(net.params, x, x, x, need_weights=False)
    assert out.shape == x.shape
    assert weights is None


def test_a_module_that_is_called_inside_another_function_transform() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    net, xs = mo.functional(model), torch.randn(4, 6, 3)

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return net(params, x).square().mean()

    params = tree.map(torch.Tensor.detach, net.params)
    found = vmap(grad(loss), (None, 0))(params, xs)
    for i, x in enumerate(xs):
        twin = copy.deepcopy(model)
        twin(x).square().mean().backward()
        assert_close(
            tree.index(found, i), {name: p.grad for name, p in twin.named_parameters()}, 1e-12
        )


def test_nested_functionals_and_lazy_names_of_the_root() -> None:
    """A model that is a single norm layer has buffers without a prefix."""
    model = nn.BatchNorm1d(2, affine=False)
    net, before = mo.functional(model), snapshot(model)
    assert net.params == {}
    assert_close(net({}, torch.randn(6, 2)).mean(0), torch.zeros(2), 1e-12)
    assert snapshot(model) == before


def test_running_statistics_can_be_carried_through_an_inner_loop() -> None:
    """Step by step.

    In training mode the loss does not depend on them, and they depend on the parameters before each
    step.
    """
    model, xs = (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)),
        torch.randn(5, 6, 3),
    )
    net, twin = mo.functional(model), copy.deepcopy(model)

    def loss_fn(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return net(params, x).square().mean()

    sgd = SGD(0.1, momentum=0.9)
    params, buffers, state = net.params, net.buffers, sgd.init(net.params)
    for x in xs:
        _, buffers = net.with_buffers(params, buffers, x)
        params, state, *_ = mo.minimize(loss_fn, sgd, params, x, steps=1, opt_state=state)
    whole = mo.minimize(loss_fn, sgd, net.params, xs)
    assert_close(params, whole.params, 1e-14)
    gradients = [
        torch.autograd.grad(loss_fn(end, xs[0]), list(net.params.values()))
        for end in (params, whole.params)
    ]
    assert_close(gradients[0], gradients[1], 1e-12)

    optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    for x in xs:
        optimizer.zero_grad()
        twin(x).square().mean().backward()
        optimizer.step()
    statistics = dict(twin.named_buffers())
    assert_close(buffers["1.num_batches_tracked"], statistics["1.num_batches_tracked"], 0)
    assert_close(tree.map(torch.Tensor.detach, buffers), statistics, 1e-12)


class TestRecomputation:
    """What is computed again on the way back would be computed with the module's own parameters."""

    class Checkpointed(nn.Module):
        def __init__(self, **options: Any):
            super().__init__()
            self.layers, self.options = (
                nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)),
                options,
            )

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layers, x, **self.options)

    def test_a_checkpoint_in_the_model_is_refused(self) -> None:
        model = self.Checkpointed(use_reentrant=False)
        net, before = mo.functional(model), model.layers[0].weight
        with pytest.raises(
            RuntimeError, match=r"must not call torch.utils.checkpoint.*Take the checkpoint out"
        ):
            net(net.params, torch.randn(2, 3))
        assert model.layers[0].weight is before
        model(torch.randn(2, 3)).sum().backward()  # by itself it may still

    def test_torch_itself_answers_with_a_wrong_gradient(self) -> None:
        """The reason for the refusal. If this fails, torch has mended it: simplify."""
        model, x = self.Checkpointed(use_reentrant=False), torch.randn(2, 3)
        other = {
            name: torch.randn_like(param).requires_grad_()
            for name, param in model.named_parameters()
        }

        def gradient(call: nn.Module) -> Tensor:
            return torch.autograd.grad(
                torch.func.functional_call(call, other, (x,)).sum(), other["layers.0.weight"]
            )[0]

        found = gradient(model)
        model.forward = lambda x: model.layers(x)  # type: ignore[method-assign]
        assert (found - gradient(model)).norm() > 0.1 * found.norm()

    def test_the_reentrant_one_gives_no_gradient(self) -> None:
        net = mo.functional(self.Checkpointed(use_reentrant=True))
        x = torch.randn(2, 3, requires_grad=True)
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            torch.autograd.grad(net(net.params, x).sum(), list(net.params.values()))

    def test_hooks_around_the_call_are_left_alone(self) -> None:
        net, x = mo.functional(nn.Linear(3, 3)), torch.randn(2, 3)
        expected = torch.autograd.grad(net(net.params, x).square().sum(), list(net.params.values()))
        with torch.autograd.graph.save_on_cpu():
            value = net(net.params, x).square().sum()
        assert_close(torch.autograd.grad(value, list(net.params.values())), expected, 0)
