"""Each private name of torch: that it exists, and does what the library takes it for."""

from __future__ import annotations

import itertools
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.overrides import TorchFunctionMode

from metaopt import torch_internals as internals

Pair = namedtuple("Pair", "first second")
ONES = torch.ones(2)


class Seen(TorchFunctionMode):
    """Notes the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Callable[..., Any]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def inside(transform: Callable[..., Any], look: Callable[[Tensor], Any]) -> Any:
    """Return what `look` finds at a tensor that `transform` is differentiating or mapping over."""
    found = []

    def fn(x: Tensor) -> Tensor:
        found.append(look(x))
        return x.sum()

    transform(fn)(ONES)
    return found[0]


def forward(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    return lambda x: jvp(fn, (x,), (ONES,))


def test_every_name_has_a_test() -> None:
    assert {f"test_{name.lower()}" for name in internals.__all__} <= globals().keys()


def test_pytree() -> None:
    """Dicts keep their order, paths read like Python, named tuples are nodes, `map` has leaves."""
    pytree = internals.pytree
    given = {"b": [ONES, 2], "a": Pair(3, OrderedDict(c=None))}
    leaves, structure = pytree.tree_flatten(given)
    assert leaves == [ONES, 2, 3, None] == pytree.tree_leaves(given)
    assert structure == pytree.tree_structure(given)
    assert structure.num_leaves == 4
    assert pytree.tree_unflatten(leaves, structure) == given
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(given)[0]]
    assert paths == ["['b'][0]", "['b'][1]", "['a'].first", "['a'].second['c']"]
    assert pytree.tree_map(lambda *x: x, [1], [2]) == [(1, 2)]
    assert pytree.tree_map(type, given, is_leaf=lambda x: isinstance(x, list))["b"] is list
    assert pytree.is_namedtuple_class(Pair)
    assert not pytree.is_namedtuple_class(tuple)
    assert OrderedDict in pytree.SUPPORTED_NODES
    assert Pair not in pytree.SUPPORTED_NODES
    assert isinstance(structure, pytree.TreeSpec)
    assert not hasattr(torch.utils, "pytree"), "there is a public module now"


def test_allow_in_compiled_graphs() -> None:
    """A Function that a compiler would refuse for its `jvp` has its derivatives in a graph."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, bar: Tensor) -> Tensor:
            return double(2 * bar)

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            return double(2 * tangent)

    @internals.allow_in_compiled_graphs
    def double(x: Tensor) -> Tensor:
        found: Tensor = Double.apply(x)
        return found

    internals.load_compiler.__wrapped__()  # it may have been called before
    slope = grad(lambda x: grad(lambda x: double(x).square().sum())(x).square().sum())
    compiled = torch.compile(slope, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ONES), slope(ONES))


def test_compiled_call() -> None:
    layer = nn.Linear(2, 2)
    before = vars(layer).get(internals.COMPILED_CALL)
    layer.compile(backend="eager")
    assert before is None
    assert callable(vars(layer)[internals.COMPILED_CALL])


def test_foreach_add() -> None:
    (found,) = internals.foreach_add([ONES], [ONES], alpha=3)
    assert torch.equal(found, 4 * ONES)


def test_foreach_mul() -> None:
    assert torch.equal(internals.foreach_mul([ONES], 3)[0], 3 * ONES)
    assert torch.equal(internals.foreach_mul([ONES], [5 * ONES])[0], 5 * ONES)


def test_foreach_addcmul() -> None:
    (found,) = internals.foreach_addcmul([ONES], [2 * ONES], [3 * ONES], value=2)
    assert torch.equal(found, 13 * ONES)


def test_foreach_sqrt() -> None:
    assert torch.equal(internals.foreach_sqrt([4 * ONES])[0], 2 * ONES)


def test_foreach_norm() -> None:
    assert torch.equal(internals.foreach_norm([torch.tensor([3.0, 4.0])])[0], torch.tensor(5.0))


def test_foreach_copy_() -> None:
    memory = torch.zeros(2)
    internals.foreach_copy_([memory], [ONES])
    assert torch.equal(memory, ONES)


def check_fused_step(operation: Callable[..., None], kind: Any) -> None:
    """Two steps, by a number and a tensor as rate; the count is that of the step that is made."""
    for lr in (0.1, torch.tensor(0.1)):
        w, mean, square, count = torch.ones(3), torch.zeros(3), torch.zeros(3), torch.zeros(())
        other = nn.Parameter(w.clone())
        optimizer = kind([other], 0.1, weight_decay=0.2)
        for g in (torch.tensor([1.0, 0.0, -2.0]), torch.tensor([0.5, 1.0, 1.0])):
            other.grad, count = g.clone(), count + 1
            optimizer.step()
            settings = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.2, "eps": 1e-8}
            rows = [[w], [g], [mean], [square], [], [count]]
            operation(*rows, lr=lr, amsgrad=False, maximize=False, **settings)
        torch.testing.assert_close(w, other.detach())


def test_fused_adam_() -> None:
    check_fused_step(internals.fused_adam_, torch.optim.Adam)


def test_fused_adamw_() -> None:
    check_fused_step(internals.fused_adamw_, torch.optim.AdamW)


def test_weight_norm() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    with Seen() as seen:
        layer(ONES)
    assert internals.weight_norm in seen.functions


@pytest.mark.parametrize(
    "kind", [nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm2d]
)
def test_normwithstatistics(kind: type) -> None:
    layer = kind(2)
    assert isinstance(layer, internals.NormWithStatistics)
    assert isinstance(layer.track_running_stats, bool)
    assert not isinstance(nn.LayerNorm(2), internals.NormWithStatistics)
    assert not isinstance(nn.GroupNorm(1, 2), internals.NormWithStatistics)


def test_jvp() -> None:
    def is_jvp(_: Tensor) -> bool:
        return any(level.key() == internals.JVP for level in internals.transforms())

    assert inside(forward, is_jvp)
    assert not inside(grad, is_jvp)
    assert not inside(vmap, is_jvp)


def test_vmap() -> None:
    def is_vmap(_: Tensor) -> bool:
        return any(level.key() == internals.VMAP for level in internals.transforms())

    assert inside(vmap, is_vmap)
    assert not inside(grad, is_vmap)
    assert not inside(forward, is_vmap)


def test_children_of() -> None:
    layer = nn.Linear(2, 2)
    assert [*internals.children_of(nn.Sequential(layer, layer)).values()] == [layer, layer]


def test_twin_of() -> None:
    module = nn.Sequential(nn.Linear(2, 3))
    module.register_buffer("scale", torch.ones(2))
    twin = internals.twin_of(module)
    assert twin[0] is module[0]
    assert twin.scale is module.scale
    twin.scale, twin[0], twin.name = torch.zeros(2), nn.ReLU(), "twin"
    assert module.scale.sum() == 2
    assert isinstance(module[0], nn.Linear)
    assert not hasattr(module, "name")


def test_transforms() -> None:
    assert internals.transforms() == []
    assert inside(grad, lambda _: len(internals.transforms())) == 1
    assert (
        inside(lambda fn: grad(lambda x: vmap(fn)(x).sum()), lambda _: len(internals.transforms()))
        == 2
    )


def test_outside_transforms() -> None:
    """What is drawn there is one and the same for the whole batch, which `vmap` itself refuses."""

    def draw(_: Tensor) -> Tensor:
        with internals.outside_transforms():
            assert not internals.is_in_transform()
            return torch.randn(())

    assert inside(vmap, draw).shape == ()
    with pytest.raises(RuntimeError, match="vmap: called random operation"):
        inside(vmap, lambda _: torch.randn(()))


def test_is_in_transform() -> None:
    assert not internals.is_in_transform()
    for transform in (grad, vmap, forward):
        assert inside(transform, lambda _: internals.is_in_transform())


def test_uses_dual_numbers() -> None:
    assert not internals.uses_dual_numbers()
    assert inside(forward, lambda _: internals.uses_dual_numbers())
    assert not inside(grad, lambda _: internals.uses_dual_numbers())
    with forward_ad.dual_level():
        assert internals.uses_dual_numbers()


def test_is_wrapped() -> None:
    assert not internals.is_wrapped(ONES)
    assert inside(grad, internals.is_wrapped)
    assert inside(vmap, internals.is_wrapped)


def test_is_batched() -> None:
    assert inside(vmap, internals.is_batched)
    assert not inside(grad, internals.is_batched)
    assert not internals.is_batched(ONES)


def test_level_of() -> None:
    assert inside(lambda fn: grad(lambda x: vmap(fn)(x).sum()), internals.level_of) == 2


def test_unwrapped() -> None:
    """Of a batch it has all rows."""
    assert inside(vmap, internals.unwrapped).shape == (2,)
    assert not internals.is_wrapped(inside(grad, internals.unwrapped))


def test_unwrapped_if_over() -> None:
    assert inside(grad, lambda x: internals.is_wrapped(internals.unwrapped_if_over(x)))
    ended = inside(grad, lambda x: x)
    assert internals.is_wrapped(ended)
    assert not internals.is_wrapped(internals.unwrapped_if_over(ended))
    assert internals.unwrapped_if_over(ONES) is ONES


def test_function_modes() -> None:
    with Seen() as outer, Seen() as inner:
        assert internals.function_modes() == [outer, inner]
    assert internals.function_modes() == []


def test_is_autograd_excluded() -> None:
    """Also below a transform in inference mode, where torch says that the mode is off."""
    seen = []

    class Note(torch.autograd.Function):
        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            leaf = torch.zeros((), requires_grad=True)
            with torch.enable_grad():
                seen.append((internals.is_autograd_excluded(), (2 * leaf).requires_grad))
            assert not torch.is_inference_mode_enabled()
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

        @staticmethod
        def backward(ctx: Any, bar: torch.Tensor) -> torch.Tensor:
            return bar

    assert not internals.is_autograd_excluded()
    with torch.no_grad():
        assert not internals.is_autograd_excluded()
    grad(Note.apply)(torch.tensor(1.0))
    with torch.inference_mode():
        assert internals.is_autograd_excluded()
        grad(Note.apply)(torch.tensor(1.0))
    assert seen == [(False, True), (True, False)]


def test_version() -> None:
    x = torch.zeros(2)
    before = internals.version(x)
    x.add_(1)
    assert internals.version(x) == before + 1
    with torch.inference_mode():
        assert internals.version(torch.zeros(2)) == 0
    assert internals.version("text") == 0


def test_holders_of() -> None:
    """What is written there is what the model computes with, also a tensor of another kind."""
    model = nn.Sequential(nn.BatchNorm1d(2))
    places = [(("0",), "weight"), (("0",), "running_mean"), (("0",), "gone"), ((), "gone")]
    members, buffers, *others = internals.holders_of(model, places)
    assert members["weight"] is model[0].weight
    members["weight"] = 7 * ONES
    assert torch.equal(model[0].weight, 7 * ONES)
    assert buffers["running_mean"] is model[0].running_mean
    assert not any("gone" in other for other in others)
    with pytest.raises(KeyError):
        internals.holders_of(model, [(("1",), "weight")])


def test_parameters_of() -> None:
    layer = nn.Linear(2, 3, bias=False)
    assert internals.parameters_of(layer) == {"weight": layer.weight, "bias": None}


def test_buffers_of() -> None:
    layer = nn.BatchNorm1d(2)
    assert internals.buffers_of(layer).keys() == dict(layer.named_buffers()).keys()


def test_has_buffers() -> None:
    """Also of one that is registered later; a place without a module is passed over."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
    model.register_module("empty", None)
    assert not internals.has_buffers(model)
    model[1][0].register_buffer("later", ONES)
    assert internals.has_buffers(model)


def test_has_forward_hooks() -> None:
    def hook(*_: Any) -> None: ...

    everywhere = nn.modules.module
    layer = nn.Linear(2, 2)
    for register in (
        layer.register_forward_hook,
        layer.register_forward_pre_hook,
        everywhere.register_module_forward_hook,
        everywhere.register_module_forward_pre_hook,
    ):
        assert not internals.has_forward_hooks(layer)
        handle = register(hook)
        assert internals.has_forward_hooks(layer)
        handle.remove()


def test_has_no_hooks() -> None:
    assert internals.has_no_hooks()
    with torch.autograd.graph.save_on_cpu():
        assert not internals.has_no_hooks()
    with torch.autograd.graph.disable_saved_tensors_hooks("no"):
        assert not internals.has_no_hooks()


def test_refuse_hooks() -> None:
    internals.refuse_hooks("not here")
    try:
        with (
            pytest.raises(RuntimeError, match="not here"),
            torch.autograd.graph.save_on_cpu(),
        ):
            pass
    finally:
        internals.allow_hooks()


def test_allow_hooks() -> None:
    internals.refuse_hooks("not here")
    internals.allow_hooks()
    assert internals.has_no_hooks()
    with torch.autograd.graph.save_on_cpu():
        pass


def test_is_in_backward() -> None:
    """Also where a hook of a backward pass computes something."""
    x, seen = torch.ones(1, requires_grad=True), []
    y = 2 * x
    y.register_hook(lambda grad: seen.append(internals.is_in_backward()))
    assert not internals.is_in_backward()
    torch.func.grad(lambda x: (seen.append(internals.is_in_backward()), x)[1])(torch.tensor(1.0))
    y.sum().backward()
    assert seen == [False, True]
    assert not internals.is_in_backward()


def test_mark_constant_when_compiled() -> None:
    """The mark is that of torch's own decorator."""

    def marked() -> int:
        return 0

    def same() -> int:
        return 0

    assert internals.mark_constant_when_compiled(marked) is marked
    assert vars(marked) == vars(torch.compiler.assume_constant_result(same)) != {}


def test_load_compiler() -> None:
    """Without a warning, which would be an error here."""
    internals.load_compiler()
    assert "torch._inductor.compile_fx" in sys.modules


@pytest.mark.parametrize("mode", [nullcontext(), torch.device("cpu")])
def test_run_backward_of_several_results(mode: Any) -> None:
    x, y = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor(3.0, requires_grad=True)
    results, bars = (
        [x**2, nn.Parameter(torch.ones(1)), x.sum() * y],
        [ONES, torch.ones(1), 2 * ONES[0]],
    )
    with mode:
        found = internals.run_backward(results, bars, [x, y], keep=False, again=False)
    assert torch.equal(found[0], 2 * x + 6)
    assert torch.equal(found[1], torch.tensor(6.0))
    assert internals.run_backward([x.sum()], ONES[:1], [], keep=False, again=False) == []
    assert x.grad is None
    # their cotangents are those of a `vmap`
    results = [x**3]
    batched = vmap(lambda v: internals.run_backward(results, [v], [x], keep=True, again=False)[0])
    assert torch.equal(batched(torch.eye(2)), torch.diag(3 * x**2))


@pytest.mark.parametrize("again", [False, True])
def test_run_backward(again: bool) -> None:
    """It is `torch.autograd.grad`: of a real scalar, of one that is shaped, and under a mode."""
    x, unused = torch.tensor([1.0, 2.0], requires_grad=True), torch.ones(2, requires_grad=True)
    modes = (nullcontext(), torch.device("cpu"))  # the second one is a function mode
    for value, mode in itertools.product(((x**3).sum(), (x**3).sum().reshape(1)), modes):
        with mode:
            slope, none = internals.run_backward(
                [value], [torch.ones_like(value)], [x, unused], keep=True, again=again
            )
        assert none is None
        assert torch.equal(slope, 3 * x**2)
        assert slope.requires_grad == again
        if again:
            (second,) = torch.autograd.grad(slope.sum(), x)
            assert torch.equal(second, 6 * x)
