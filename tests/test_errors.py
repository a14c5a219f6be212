"""Bad input: each a clear error, with its message."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

import metaopt as mo
from metaopt import tree
from optimizers import SGD, Adam, AdamW, NAdam, RMSprop

RULES = [mo.Backprop(), mo.Backprop(memory="steps"), mo.FirstOrder(), mo.FirstOrder(memory="steps")]
each_rule = pytest.mark.parametrize("rule", RULES, ids=str)

GLOBAL = torch.tensor(2.0, requires_grad=True)


def square(w: Tensor, _: Any = None) -> Tensor:
    return (w**2).sum()


def uses_a_global(w: Tensor, _: Any) -> Tensor:
    return (w * GLOBAL).sum()


class Holder:
    """An object with a tensor, a method and a call."""

    def __init__(self) -> None:
        self.inner = SimpleNamespace(gain=torch.tensor(2.0, requires_grad=True))

    def loss(self, w: Tensor, _: Any) -> Tensor:
        return (w * self.inner.gain).sum()

    def __call__(self, w: Tensor, _: Any) -> Tensor:
        return self.loss(w, None)


def closures() -> dict[str, tuple[Callable[..., Tensor], str]]:
    gain = torch.tensor([2.0, 3.0], requires_grad=True)
    table = {"a": [torch.ones(2), gain]}
    holder, model = Holder(), nn.Linear(2, 1)
    product = gain * 3

    def two_deep(w: Tensor, _: Any) -> Tensor:
        return (lambda: (w * gain).sum())()

    return {
        "local": (lambda w, _: (w * gain).sum(), r"`gain` \(shape \(2,\)\)"),
        "computed": (lambda w, _: (w * product).sum(), r"`product` \(shape \(2,\)\)"),
        "two-deep": (two_deep, r"`gain` \(shape \(2,\)\)"),
        "container": (
            lambda w, _: (w * table["a"][1]).sum(),
            r"`table\['a'\]\[1\]` \(shape \(2,\)\)",
        ),
        "global": (uses_a_global, r"`GLOBAL` \(shape \(\)\)"),
        "method": (holder.loss, r"`self.inner.gain` \(shape \(\)\)"),
        "object": (holder, r"`inner.gain` \(shape \(\)\)"),
        "attribute": (
            lambda w, _: (w * holder.inner.gain).sum(),
            r"`holder.inner.gain` \(shape \(\)\)",
        ),
        "partial": (
            functools.partial(lambda g, w, _: (w * g).sum(), gain),
            r"`0` \(shape \(2,\)\)",
        ),
        "keyword": (
            functools.partial(lambda w, _, g: (w * g).sum(), g=gain),
            r"`g` \(shape \(2,\)\)",
        ),
        "module": (lambda w, _: model(w).sum(), r"`model.weight` \(shape \(1, 2\)\)"),
    }


@pytest.mark.parametrize("kind", closures())
@each_rule
def test_a_tensor_reached_through_the_closure_is_named(kind: str, rule: Any) -> None:
    """Never a silent zero."""
    loss, name = closures()[kind]
    with pytest.raises(
        ValueError,
        match=rf"`loss_fn` reaches .*{name}.* through its closure, and that requires "
        rf"grad.*`minimize\(loss_fn, \.\.\., meta=w\)`",
    ):
        mo.minimize(loss, SGD(0.1), torch.ones(2), None, steps=2, differentiate=rule)


OUTER: dict[
    str, tuple[Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]], tuple[int, ...]]
] = {
    "grad": (grad, ()),
    "vmap-grad": (lambda f: vmap(grad(f)), (3,)),
    "grad-vmap": (lambda f: grad(lambda x: vmap(f)(x).sum()), (3,)),
    "grad-grad": (lambda f: grad(grad(f)), ()),
    "jacrev": (jacrev, ()),
}


@pytest.mark.parametrize("transform", OUTER)
@each_rule
def test_a_tensor_that_an_outer_transform_differentiates_is_named(
    rule: Any, transform: str
) -> None:
    def value(gain: Tensor) -> Tensor:
        return square(
            mo.minimize(
                lambda w, _: (w * gain).sum(),
                SGD(0.1),
                torch.ones(2),
                None,
                steps=2,
                differentiate=rule,
            ).params
        )

    outer, shape = OUTER[transform]
    with pytest.raises(
        ValueError, match=r"`loss_fn` reaches `gain` \(shape \(\)\) through its closure"
    ):
        outer(value)(torch.ones(shape))


@each_rule
def test_a_closure_that_needs_no_gradient_is_fine(rule: Any) -> None:
    gain, model = torch.tensor([2.0, 3.0]), nn.Linear(2, 1).requires_grad_(False)
    unused = torch.ones(1, requires_grad=True)
    mo.minimize(
        lambda w, _: (model(w * gain).sum(), unused)[0],
        SGD(0.1),
        torch.ones(2),
        None,
        steps=2,
        differentiate=rule,
    )
    with torch.no_grad():  # nothing is differentiated here
        mo.minimize(
            lambda w, _: (w * GLOBAL).sum(),
            SGD(0.1),
            torch.ones(2),
            None,
            steps=2,
            differentiate=rule,
        )
    vmap(
        lambda gain: (
            mo.minimize(
                lambda w, _: (w * gain).sum(),
                SGD(0.1),
                torch.ones(2),
                None,
                steps=2,
                differentiate=rule,
            ).params
        )
    )(torch.ones(3))


@each_rule
def test_a_generator_of_ones_own_is_refused(rule: Any) -> None:
    """Trap 5: a rebuilt step would draw new noise, and the gradient would be silently wrong."""
    generator = torch.Generator().manual_seed(0)
    for draw in (
        lambda w: torch.rand(2, generator=generator),
        lambda w: torch.empty(2).normal_(generator=generator),
        lambda w: w[torch.randperm(2, generator=generator)],
    ):
        with pytest.raises(
            ValueError,
            match=r"`loss_fn` draws from a torch.Generator of its own "
            r"\(`(rand|normal_|randperm)`\).*pass the numbers in `batches`",
        ):
            mo.minimize(
                lambda w, _, draw=draw: (w * draw(w)).sum(),
                SGD(0.1),
                torch.ones(2),
                None,
                steps=2,
                differentiate=rule,
            )


MISSING = (
    r"`steps` is missing: without it every leaf of `batches` needs the leading axis time, which"
)
BATCHES = {
    "missing": (
        None,
        rf"{MISSING} \['the tensor itself'\] has not. Pass `steps=` to use the same batch at every "
        rf"step",
    ),
    "empty": ((), rf"{MISSING} an empty tree has not"),
    "scalar": ((torch.ones(3), torch.tensor(1.0)), rf"{MISSING} \['\[1\]'\] has not"),
    "not-a-tensor": (
        {"x": torch.ones(3), "name": "digits"},
        rf"{MISSING} \[\"\['name'\]\"\] has not",
    ),
    "mismatch": (
        {"x": torch.ones(3), "y": torch.ones(4)},
        r"leading axis of every leaf of `batches` must be the number of steps, got \{\"\['x'\]\": "
        r"3, \"\['y'\]\": 4\}",
    ),
    "none": (torch.ones(0, 2), r"`batches` must hold at least one step, got the leading axis 0"),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_without_a_common_time_axis(kind: str) -> None:
    batches, message = BATCHES[kind]
    with pytest.raises(ValueError, match=message):
        mo.minimize(square, SGD(0.1), torch.ones(2), batches)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "3", torch.tensor(3)])
def test_steps_must_be_a_positive_integer(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"`steps` must be a positive integer, got"):
        mo.minimize(square, SGD(0.1), torch.ones(2), None, steps=steps)


LOSSES = {
    "vector": (
        lambda w, _: w**2,
        r"must return a floating-point scalar, got a torch.float32 tensor of shape \(2,\). Take "
        r"the mean or the sum",
    ),
    "one-entry": (lambda w, _: (w**2).sum()[None], r"got a torch.float32 tensor of shape \(1,\)"),
    "integer": (lambda w, _: torch.tensor(3), r"got a torch.int64 tensor of shape \(\)"),
    "float": (lambda w, _: 3.0, r"got a float"),
    "nothing": (lambda w, _: None, r"got a NoneType"),
    "triple": (lambda w, _: ((w**2).sum(), w, w), r"got a tuple of 3"),
}


@pytest.mark.parametrize("kind", LOSSES)
@each_rule
def test_a_loss_is_a_floating_point_scalar(kind: str, rule: Any) -> None:
    loss, message = LOSSES[kind]
    for context in (torch.enable_grad, torch.no_grad):
        with (
            context(),
            pytest.raises(
                ValueError, match=rf"`loss_fn` {message}" if message.startswith("must") else message
            ),
        ):
            mo.minimize(loss, SGD(0.1), torch.ones(2), None, steps=2, differentiate=rule)


@each_rule
def test_a_loss_that_is_not_finite_names_step_and_last_value(rule: Any) -> None:
    with pytest.raises(
        mo.NonFiniteError,
        match=r"minimize, step 3: the loss is nan. The last finite loss was 4 at step 2. Lower the "
        r"learning rate",
    ) as info:
        mo.minimize(
            lambda w, x: w.sum() * 0 + x,
            SGD(0.1),
            torch.ones(2),
            torch.tensor([1.0, 2.0, 4.0, torch.nan, 5.0]),
            differentiate=rule,
        )
    assert (info.value.step, info.value.last_finite) == (3, 4.0)
    with pytest.raises(
        mo.NonFiniteError, match=r"minimize, step 0: the loss is inf. Check the batch"
    ):
        mo.minimize(
            lambda w, x: w.sum() * 0 + x,
            SGD(0.1),
            torch.ones(2),
            torch.tensor([torch.inf, 1.0]),
            differentiate=rule,
        )
    with pytest.raises(
        mo.NonFiniteError,
        match=r"step \d+: the loss is (inf|nan). The last finite loss was [0-9.]+e\+\d+ at step "
        r"\d+",
    ):
        # diverges by itself
        mo.minimize(square, SGD(lr=10.0), torch.ones(2), None, steps=40, differentiate=rule)
    with torch.no_grad(), pytest.raises(mo.NonFiniteError, match="step 0: the loss is nan"):
        mo.minimize(
            square, SGD(0.1), torch.full((2,), torch.nan), None, steps=1, differentiate=rule
        )


def test_values_inside_transforms_are_passed_on_as_they_are() -> None:
    out = vmap(lambda w: mo.minimize(square, SGD(0.1), w, None, steps=2).losses)(
        torch.tensor([[1.0], [torch.nan]])
    )
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_a_task_whose_loss_is_not_finite_is_named() -> None:
    with pytest.raises(
        mo.NonFiniteError, match=r"meta_grad, task 2: the loss is nan. Lower"
    ) as info:
        mo.meta_grad(lambda w, x: (w * x).sum())(torch.ones(2), torch.tensor([1.0, 2.0, torch.nan]))
    assert info.value.step == 2
    assert info.value.last_finite is None


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD([torch.ones(1)], 0.1), SGD, "sgd", 0.1, None]
)
def test_only_our_optimizers_minimize(optimizer: Any) -> None:
    with pytest.raises(
        TypeError,
        match=r"`optimizer` must be a metaopt Optimizer, got .*Use one from `metaopt.optimizers`",
    ):
        mo.minimize(square, optimizer, torch.ones(2), None, steps=1)


PARAMETERS = {
    "integer": (
        {"w": torch.ones(2), "n": torch.tensor(3)},
        r"`params` must be floating-point or complex tensors, got torch.int64 at \['n'\]",
    ),
    "number": (
        {"w": 1.0},
        r"`params` must be floating-point or complex tensors, got float at \['w'\]",
    ),
    "boolean": (torch.ones(1, dtype=torch.bool), r"got torch.bool at the tensor itself"),
    "empty": (
        {},
        r"`params` must hold at least one tensor, got an empty tree. Is every parameter frozen\?",
    ),
}


@pytest.mark.parametrize("kind", PARAMETERS)
def test_params_are_floating_point_tensors(kind: str) -> None:
    params, message = PARAMETERS[kind]
    with pytest.raises(ValueError, match=message):
        mo.minimize(lambda p, _: torch.zeros(()), SGD(0.1), params, None, steps=1)


def test_gradients_params_and_state_must_have_one_structure() -> None:
    optimizer = Adam(0.1, weight_decay=0.1)
    params = {"a": torch.ones(1), "b": torch.ones(2)}
    state, differs = optimizer.init(params), "does not have the expected structure"
    with pytest.raises(
        ValueError,
        match=rf"`params` {differs}: missing \[\"\['b'\]\"\], unknown \[\]. Build it from the same "
        rf"tree",
    ):
        optimizer(params, state, {"a": torch.ones(1)})
    with pytest.raises(
        ValueError,
        match=rf"`params` {differs}: the same names in another order.* in the same order",
    ):
        optimizer(params, state, {"b": torch.ones(2), "a": torch.ones(1)})
    with pytest.raises(
        ValueError,
        match=rf"`state\['slots'\]\['mean'\]` {differs}: missing \[\], unknown \[\"\['b'\]\"\]",
    ):
        optimizer({"a": torch.ones(1)}, state, {"a": torch.ones(1)})
    with pytest.raises(ValueError, match=rf"`state\['slots'\]\['mean'\]` {differs}"):
        mo.minimize(
            lambda p, _: p["c"].sum(),
            optimizer,
            {"c": torch.ones(1)},
            None,
            steps=1,
            opt_state=state,
        )


@pytest.mark.parametrize(
    ("optimizer", "other", "names"),
    [
        (Adam(), SGD(0.1, 0.9), r"Adam, with the memory \['mean', 'square'\], got \['velocity'\]"),
        (SGD(0.1), Adam(), r"SGD, with the memory \[\], got \['mean', 'square'\]"),
        (
            NAdam(),
            Adam(),
            r"NAdam, with the memory \['mean', 'product', 'square'\], got \['mean', 'square'\]",
        ),
    ],
)
def test_the_state_of_another_optimizer(
    optimizer: mo.Optimizer, other: mo.Optimizer, names: str
) -> None:
    params = {"w": torch.ones(2)}
    state = other.init(params)
    with pytest.raises(
        ValueError, match=rf"`state` must be that of this {names}. Pass what its own `init`"
    ):
        mo.minimize(lambda p, _: p["w"].sum(), optimizer, params, None, steps=2, opt_state=state)


def test_a_missing_key_in_an_update_is_not_blamed_on_the_state() -> None:
    class Misspelt(SGD):
        def update(self, grads: Any, params: Any, slots: Any, hyper: Any, step: Any) -> Any:
            return hyper["rate"]

    with pytest.raises(KeyError, match="rate"):
        Misspelt(0.1)(torch.ones(1), Misspelt(0.1).init(torch.ones(1)))


@pytest.mark.parametrize(
    "optimizer",
    [SGD(0.1, weight_decay=0.01), Adam(weight_decay=0.01), AdamW(), RMSprop(weight_decay=0.01)],
    ids=repr,
)
def test_weight_decay_needs_params(optimizer: mo.Optimizer) -> None:
    message = (
        f"`{type(optimizer).__name__}` needs `params` because weight_decay=0.01. Call "
        r"`optimizer\(grads, state, params\)`"
    )
    with pytest.raises(ValueError, match=message):
        optimizer(torch.ones(2), optimizer.init(torch.ones(2)))


@pytest.mark.parametrize("rule", [mo.Backprop, mo.FirstOrder])
@pytest.mark.parametrize("memory", ["everything", None, 3])
def test_memory_modes(rule: Any, memory: Any) -> None:
    with pytest.raises(ValueError, match='`memory` must be "full", "steps" or Revolve'):
        rule(memory=memory)


HYPERPARAMETERS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: SGD(-0.1), ValueError, r"SGD: `lr` must lie in \[0.0, inf\], got -0.1"),
    (lambda: SGD(float("nan")), ValueError, r"SGD: `lr` must lie in \[0.0, inf\], got nan"),
    (
        lambda: SGD("0.1"),
        TypeError,
        r"SGD: `lr` must be a number, a tensor, an nn.Parameter or a Schedule, got str",
    ),
    (lambda: SGD(None), TypeError, r"SGD: `lr` must be a number, .* got NoneType"),
    (lambda: SGD(True), TypeError, r"SGD: `lr` must be a number, .* got bool"),
    (lambda: SGD(nn.Linear(1, 1)), TypeError, r"SGD: `lr` must be a number, .* got Linear"),
    (lambda: SGD(0.1, -0.5), ValueError, r"SGD: `momentum` must lie in"),
    (
        lambda: SGD(0.1, dampening=1.5),
        ValueError,
        r"SGD: `dampening` must lie in \[0.0, 1.0\], got 1.5",
    ),
    (lambda: SGD(0.1, weight_decay=-1.0), ValueError, r"SGD: `weight_decay` must lie in"),
    (
        lambda: SGD(0.1, nesterov=True),
        ValueError,
        r"SGD: `nesterov` needs momentum > 0 and dampening = 0, got 0.0 and 0.0",
    ),
    (
        lambda: SGD(0.1, 0.9, dampening=0.1, nesterov=True),
        ValueError,
        r"SGD: `nesterov` needs .* got 0.9 and 0.1",
    ),
    (
        lambda: Adam(betas=(1.0, 0.9)),
        ValueError,
        r"Adam: `beta1` must lie in \[0.0, 1.0\), got 1.0",
    ),
    (
        lambda: Adam(betas=(0.9, -0.1)),
        ValueError,
        r"Adam: `beta2` must lie in \[0.0, 1.0\), got -0.1",
    ),
    (
        lambda: Adam(betas=0.9),
        ValueError,
        r"Adam: `betas` must be a pair, got 0.9. Write betas=\(0.9, 0.999\)",
    ),
    (lambda: AdamW(betas=(0.9,)), ValueError, r"AdamW: `betas` must be a pair, got \(0.9,\)"),
    (lambda: Adam(eps=-1e-8), ValueError, r"Adam: `eps` must lie in"),
    (lambda: RMSprop(alpha=1.0), ValueError, r"RMSprop: `alpha` must lie in \[0.0, 1.0\), got 1.0"),
    # eps by keyword only
    (lambda: Adam(1e-3, (0.9, 0.999), 1e-8), TypeError, r"positional argument"),
    (lambda: mo.Backprop("steps", 3), TypeError, r"positional argument"),
]


@pytest.mark.parametrize(("build", "error", "message"), HYPERPARAMETERS)
def test_hyperparameters_are_checked_when_given(
    build: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build()


def test_what_a_subclass_must_define() -> None:
    bare, w = mo.Optimizer(), torch.ones(1)
    with pytest.raises(
        TypeError, match=r"Optimizer must define `update\(grads, params, slots, hyper, step\)`"
    ):
        bare(w, bare.init(w))
    scheduled = SGD(mo.Schedule())
    with pytest.raises(
        TypeError, match=r"Schedule must define `forward\(state, \*, step, loss, grads\)`"
    ):
        scheduled(w, scheduled.init(w))


def test_params_that_are_not_the_models() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    net, x = mo.functional(model), torch.ones(4, 2)
    missing = {name: p for name, p in net.params.items() if name != "0.bias"} | {
        "extra": torch.ones(1)
    }
    message = (
        r"`params` must have the names of the model's params; missing \['0.bias'\], unknown "
        r"\['extra'\]. Start from `net.params`"
    )
    for call in (
        lambda: net(missing, x),
        lambda: net.load(missing),
        lambda: net.with_buffers(missing, net.buffers, x),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    batched = tree.map(lambda p: p.expand(5, *p.shape), net.params)
    with pytest.raises(
        ValueError,
        match=r"`params\['0.weight'\]` must have shape \(3, 2\), got \(5, 3, 2\). For a batch of "
        r"models, map .* `torch.func.vmap`",
    ):
        net(batched, x)
    with pytest.raises(
        ValueError,
        match=r"`buffers` must have the names of the model's buffers; missing "
        r"\['1.num_batches_tracked', ",
    ):
        net.with_buffers(net.params, {}, x)
    with pytest.raises(
        TypeError,
        match=r"`model` must be an nn.Module, got Tensor. Pass the module, not its output",
    ):
        mo.functional(model(x))  # type: ignore[arg-type]


TASKS = {
    "mismatch": (
        (torch.ones(3), torch.ones(2)),
        r"Every leaf of `tasks` must have the number of tasks .* got \{'\[0\]': 3, '\[1\]': 2\}",
    ),
    "scalar": (
        torch.tensor(1.0),
        r"Every leaf of `tasks` must have .* got \{'the tensor itself': -1\} \(-1: none\). Stack "
        r"the tasks first",
    ),
    "none": (
        torch.ones(0, 2),
        r"Every leaf of `tasks` must have the number of tasks \(at least 1\)",
    ),
    "empty": ({}, r"Every leaf of `tasks` must have .* got \{\}"),
    "number": (
        (torch.ones(3), 5),
        r"Every leaf of `tasks` must have .* got \{'\[0\]': 3, '\[1\]': -1\}",
    ),
}


@pytest.mark.parametrize("kind", TASKS)
def test_tasks_without_a_common_axis(kind: str) -> None:
    tasks, message = TASKS[kind]
    with pytest.raises(ValueError, match=message):
        mo.meta_grad(lambda w, task: square(w))(torch.ones(2), tasks)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunks_hold_a_task_at_least(chunk_size: int) -> None:
    with pytest.raises(
        ValueError, match=rf"`chunk_size` must be a positive integer or None, got {chunk_size}"
    ):
        mo.meta_grad(lambda w, task: square(w), chunk_size=chunk_size)


def test_gradients_that_are_not_the_models() -> None:
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    with pytest.raises(
        ValueError,
        match=r"`grads` must name the model's trainable parameters; missing \['weight'\], unknown "
        r"\['bias'\]",
    ):
        mo.assign_grads(model, {"bias": torch.ones(1)})
    with pytest.raises(
        ValueError, match=r"`grads\['weight'\]` must have shape \(1, 2\), got \(2, 1\)"
    ):
        mo.assign_grads(model, {"weight": torch.ones(2, 1)})
    assert model.weight.grad is None


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        mo.minimize(square, SGD(0.1), torch.ones(2), None, 5)  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional argument"):
        mo.meta_grad(square, True)  # type: ignore[misc]


def test_shapes_do_not_grow_silently() -> None:
    w = torch.ones(3)
    with pytest.raises(
        ValueError,
        match=r"`lr` must be a scalar, or have the shape of .*, got shape \(2, 3\) .* `Grouped`",
    ):
        mo.minimize(lambda p, _: p.square().sum(), SGD(torch.full((2, 3), 0.1)), w, None, steps=1)
    with pytest.raises(
        ValueError,
        match=r"Adam: the memory 'mean' of shape \(1,\) became \(3,\). The state is that of other",
    ):
        Adam()(w, Adam().init(torch.ones(1)), w)


def test_a_slot_that_was_not_declared_is_an_error() -> None:
    class Undeclared(mo.Optimizer):
        def update(self, grads, params, slots, hyper, step):
            return grads, {"memory": grads}

    optimizer = Undeclared()
    with pytest.raises(
        ValueError, match=r"Undeclared: `update` must return the slots \[\], got \['memory'\]"
    ):
        optimizer(torch.ones(1), optimizer.init(torch.ones(1)))
