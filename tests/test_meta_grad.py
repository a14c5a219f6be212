"""`meta_grad` against a Python loop over tasks.

The layers are those whose batched derivatives go wrong most easily.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Callable

import pytest
import torch
from problems import assert_close
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import metaopt as mo
from metaopt import tree
from metaopt.exact_ops import any_order
from optimizers import SGD, Adam

pytestmark = pytest.mark.usefixtures("float64")

RATE, STEPS, TASKS = 0.1, 2, 3


class Attention(nn.Module):
    """Self-attention, whose fused kernels have no second derivative (trap 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


class TiedAndFrozen(nn.Module):
    """One matrix used twice around a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.frozen, self.outer = (
            nn.Linear(3, 3),
            nn.Linear(3, 3).requires_grad_(False),
            nn.Linear(3, 3),
        )
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.frozen(torch.tanh(self.inner(x)))))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer-norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)),
        (6, 3),
    ),
    "layer-norm-conv": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 2), nn.LayerNorm([3, 4]), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)
        ),
        (4, 2, 5),
    ),
    "batch-norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)),
        (6, 3),
    ),
    "batch-norm-2d": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 1)
        ),
        (4, 1, 5, 5),
    ),
    "batch-norm-bare": (
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1)
        ),
        (6, 3),
    ),
    "batch-norm-eval": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).eval(),
        (6, 3),
    ),
    "group-norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Tanh(), nn.Linear(4, 1)),
        (6, 3),
    ),
    "instance-norm": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True), nn.Tanh(), nn.Flatten()
        ),
        (4, 2, 5),
    ),
    "instance-norm-tracked": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2),
            nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
            nn.Tanh(),
            nn.Flatten(),
        ),
        (3, 1, 4, 4),
    ),
    "rms-norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Tanh(), nn.Linear(4, 1)),
        (6, 3),
    ),
    "conv-max-pool": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 1)
        ),
        (3, 1, 6, 6),
    ),
    "conv-channels-last": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3),
            nn.BatchNorm2d(2),
            nn.MaxPool2d(2),
            nn.Conv2d(2, 2, 2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(2, 1),
        ).to(memory_format=torch.channels_last),
        (3, 1, 6, 6),
    ),
    "conv-avg-pool": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 2), nn.Tanh(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(6, 1)
        ),
        (3, 2, 5),
    ),
    "adaptive-pool": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ),
        (3, 1, 7, 7),
    ),
    "transposed-conv": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 1)
        ),
        (3, 1, 3, 3),
    ),
    "attention": (Attention, (2, 3, 4)),
    "transformer-layer": (
        lambda: nn.TransformerEncoderLayer(
            4, 2, 8, dropout=0.0, activation="gelu", batch_first=True
        ),
        (2, 3, 4),
    ),
    "transformer": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), 2
        ),
        (2, 3, 4),
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 1)), (4, 2)),
    "gru": (lambda: First(nn.GRU(3, 4, batch_first=True)), (2, 3, 3)),
    "lstm": (lambda: First(nn.LSTM(3, 4, batch_first=True)), (2, 3, 3)),
    "tied-and-frozen": (TiedAndFrozen, (5, 3)),
    "weight-norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)
        ),
        (6, 3),
    ),
    "bilinear-prelu": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2), nn.Softplus()),
        (6, 3),
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


class First(nn.Module):
    """The first of a recurrent layer's results."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def problem(name: str, tasks: int = TASKS) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model and tasks with support and query inputs and targets."""
    build, shape = MODELS[name]
    model = build()
    randoms = (
        (lambda: torch.randint(5, (tasks, *shape)))
        if name == "embedding"
        else (lambda: torch.randn(tasks, *shape))
    )
    batch = {"x": randoms(), "query_x": randoms()}
    y = torch.stack([copy.deepcopy(model)(x) for x in batch["x"]])
    return model, {**batch, "y": torch.randn_like(y), "query_y": torch.randn_like(y)}


def maml(
    model: nn.Module, rule: object
) -> Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]:
    net = mo.functional(model)

    def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return (net(params, batch[0]) - batch[1]).square().mean()

    def task_loss(params: dict[str, Tensor], task: dict[str, Tensor]) -> Tensor:
        support, query = (task["x"], task["y"]), (task["query_x"], task["query_y"])
        return loss_fn(
            mo.minimize(
                loss_fn, SGD(lr=RATE), params, support, steps=STEPS, differentiate=rule
            ).params,
            query,
        )  # type: ignore[arg-type]

    return task_loss


def loop_over_tasks(model: nn.Module, tasks: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """MAML by hand: `torch.autograd` on the module itself, task by task."""
    model = copy.deepcopy(model)
    names = mo.functional(model).params.keys()
    params = {name: model.get_parameter(name) for name in names}
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.training:
            layer.momentum = 0.0  # batch statistics as in training, running ones left alone
    total, losses = [torch.zeros_like(p) for p in params.values()], []
    with sdpa_kernel(SDPBackend.MATH):
        for i in range(len(tasks["y"])):
            task, adapted = tree.index(tasks, i), dict(params)
            for _ in range(STEPS):
                loss = (functional_call(model, adapted, (task["x"],)) - task["y"]).square().mean()
                grads = torch.autograd.grad(loss, list(adapted.values()), create_graph=True)
                adapted = {
                    name: w - RATE * g for (name, w), g in zip(adapted.items(), grads, strict=True)
                }
            losses.append(
                (functional_call(model, adapted, (task["query_x"],)) - task["query_y"])
                .square()
                .mean()
            )
            total = [
                t + g
                for t, g in zip(
                    total, torch.autograd.grad(losses[-1], list(params.values())), strict=True
                )
            ]
    return {name: t / len(losses) for name, t in zip(names, total, strict=True)}, torch.stack(
        losses
    ).detach()


@pytest.mark.filterwarnings("ignore:There is a performance drop.*_weight_norm:UserWarning")
@pytest.mark.parametrize("mode", ["full", "steps"])
@each_model
def test_it_equals_a_loop_over_tasks(name: str, mode: str) -> None:
    model, tasks = problem(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    meta_gradient = mo.meta_grad(maml(model, mo.Backprop(memory=mode)))  # type: ignore[arg-type]
    grads, losses = meta_gradient(mo.functional(model).params, tasks)
    # torch's second derivative of weight norm is wrong (see test_kernels), so that its witness
    # needs the elementary formula
    with any_order() if name == "weight-norm" else contextlib.nullcontext():
        expected, expected_losses = loop_over_tasks(model, tasks)
    assert_close(losses, expected_losses, 1e-12)
    scale = max(g.abs().max() for g in expected.values())
    assert_close(
        {k: g / scale for k, g in grads.items()}, {k: g / scale for k, g in expected.items()}, 1e-10
    )
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["layer-norm", "batch-norm-2d", "attention", "conv-max-pool"])
def test_first_order_equals_a_loop_with_constant_inner_gradients(name: str) -> None:
    model, tasks = problem(name)
    grads, _ = mo.meta_grad(maml(model, mo.FirstOrder()))(mo.functional(model).params, tasks)
    net, expected = mo.functional(model), []
    for i in range(TASKS):
        task = tree.index(tasks, i)
        params = tree.map(torch.Tensor.detach, net.params)
        for _ in range(STEPS):
            inner = grad(lambda p, t=task: (net(p, t["x"]) - t["y"]).square().mean())(params)
            params = tree.map(lambda p, g: p - RATE * g, params, inner)
        expected.append(
            grad(lambda p, t=task: (net(p, t["query_x"]) - t["query_y"]).square().mean())(params)
        )
    assert_close(grads, tree.map(lambda *g: sum(g) / TASKS, *expected), 1e-10)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 5, 8])
def test_chunks_and_their_remainder_do_not_change_the_result(chunk_size: int | None) -> None:
    model, tasks = problem("batch-norm", tasks=5)
    grads, losses = mo.meta_grad(maml(model, mo.Backprop()), chunk_size=chunk_size)(
        mo.functional(model).params, tasks
    )
    expected = loop_over_tasks(model, tasks)
    assert losses.shape == (5,)
    assert_close((grads, losses), expected, 1e-12)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_dropout_masks_differ_from_task_to_task(chunk_size: int | None) -> None:
    # a mask is read off its sum
    net, weights = mo.functional(nn.Dropout(0.5)), 2.0 ** torch.arange(40)
    _, losses = mo.meta_grad(lambda w, x: (net({}, x) * weights * w).sum(), chunk_size=chunk_size)(
        torch.tensor(1.0), torch.ones(4, 40)
    )
    assert len(set(losses.tolist())) == 4


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("name", ["layer-norm", "batch-norm-2d", "instance-norm", "transformer"])
def test_inside_func_grad_it_is_differentiated_again(name: str, chunk_size: int | None) -> None:
    """d/d lr of the meta-gradient's norm; batching the tasks there would be trap 1 once more."""
    model, tasks = problem(name)
    net = mo.functional(model)
    params = tree.map(torch.Tensor.detach, net.params)

    def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return (net(params, batch[0]) - batch[1]).square().mean()

    def norm(lr: Tensor) -> Tensor:
        def task_loss(params: dict[str, Tensor], task: dict[str, Tensor]) -> Tensor:
            adapted = mo.minimize(
                loss_fn, SGD(lr=lr), params, (task["x"], task["y"]), steps=STEPS
            ).params
            return loss_fn(adapted, (task["query_x"], task["query_y"]))

        return tree.norm(mo.meta_grad(task_loss, chunk_size=chunk_size)(params, tasks)[0])

    # central difference: error of order h^2, times a third derivative of some 1e3
    lr, h = torch.tensor(RATE), 1e-5
    difference = (norm(lr + h) - norm(lr - h)) / (2 * h)
    assert_close(grad(norm)(lr), difference, 1e-6)
    assert_close(vmap(grad(norm))(lr[None])[0], difference, 1e-6)


def test_learned_tensors_in_the_closure_are_refused_by_name() -> None:
    """A rate that is an `nn.Parameter` would not be learned, without a word."""
    lr = nn.Parameter(torch.tensor(0.1))

    def task_loss(w: Tensor, target: Tensor) -> Tensor:
        return mo.minimize(
            lambda w, target: (w - target).square(), SGD(lr=lr), w, target, steps=2
        ).params.square()

    for options in ({}, {"chunk_size": 1}, {"chunk_size": 2}):
        with pytest.raises(
            ValueError,
            match=r"depends on `lr` \(shape \(\)\).*`meta_grad\(task_loss, learn=module\)`",
        ):
            mo.meta_grad(task_loss, **options)(torch.tensor(1.0), torch.randn(3))
    both, _ = mo.meta_grad(lambda p, target: task_loss_of(p, target))(
        {"w": torch.tensor(1.0), "lr": lr.detach()}, torch.randn(3)
    )
    assert both["lr"] != 0


def task_loss_of(params: dict[str, Tensor], target: Tensor) -> Tensor:
    """Meta-SGD: the step size is one of the meta-parameters."""
    out = mo.minimize(
        lambda w, target: (w - target).square(), SGD(lr=params["lr"]), params["w"], target, steps=2
    )
    return out.params.square()


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_recurrent_kernels_still_cannot_be_batched_by_torch(name: str) -> None:
    """If this fails, torch can batch them.

    `metaopt/exact_ops/recurrent.py` is then for cuDNN and mkldnn only.
    """
    model, tasks = problem(name)
    params = tree.map(torch.Tensor.detach, mo.functional(model).params)
    with pytest.raises(RuntimeError, match=r"Batching rule not implemented|broadcast shape"):
        vmap(lambda p, x: functional_call(model, p, (x,)), (None, 0))(params, tasks["x"])


def test_the_result_carries_no_graph_and_meta_training_descends() -> None:
    model, tasks = problem("batch-norm")
    net, outer = mo.functional(model), torch.optim.Adam(model.parameters(), lr=0.02)
    meta_gradient = mo.meta_grad(maml(model, mo.Backprop()))
    history = []
    for _ in range(15):
        grads, losses = meta_gradient(net.params, tasks)
        assert not any(tensor.requires_grad for tensor in [*grads.values(), losses])
        mo.assign_grads(model, grads)
        outer.step()
        history.append(float(losses.mean()))
    assert history[-1] < 0.8 * history[0]


def test_tasks_may_be_any_tree_and_params_too() -> None:
    tasks = ((torch.arange(3.0), {"shift": torch.ones(3)}),)
    grads, losses = mo.meta_grad(
        lambda w, task: (w[0] * task[0][0]).square() + task[0][1]["shift"]
    )([torch.tensor(2.0)], tasks)
    assert_close(losses, torch.tensor([1.0, 5.0, 17.0]), 0)
    assert_close(grads, [torch.tensor((0 + 4 + 16) / 3)], 1e-15)


def test_assign_grads_copies() -> None:
    model = TiedAndFrozen()
    grads = {name: torch.ones_like(p) for name, p in mo.functional(model).params.items()}
    mo.assign_grads(model, grads)
    assert model.inner.weight.grad is not grads["inner.weight"]
    assert torch.equal(model.outer.weight.grad, torch.ones(3, 3))
    assert model.frozen.weight.grad is None


FUSED_NORMS = [
    "layer-norm",
    "layer-norm-conv",
    "batch-norm",
    "batch-norm-2d",
    "instance-norm",
    "transformer-layer",
]


@pytest.mark.parametrize("name", FUSED_NORMS)
def test_a_hand_made_average_over_vmap_is_exact_with_our_inner_loop(name: str) -> None:
    """Trap 1: `any_order` inside `minimize` takes away its cause.

    So users may nest `grad` and `vmap` as they like.
    """
    model, tasks = problem(name)
    task_loss, params = (
        maml(model, mo.Backprop()),
        tree.map(torch.Tensor.detach, mo.functional(model).params),
    )
    # for the attention of the query loss, which `vmap` would otherwise warn about
    with any_order():
        naive = grad(lambda p: vmap(task_loss, (None, 0))(p, tasks).mean())(params)
    expected, _ = loop_over_tasks(model, tasks)
    assert tree.norm(tree.map(torch.sub, naive, expected)) < 1e-10 * tree.norm(expected)


@pytest.mark.parametrize("name", FUSED_NORMS[:-1])
def test_the_derivative_of_an_average_over_vmap_is_still_wrong_in_torch(name: str) -> None:
    """Trap 1, a reason for `any_order`.

    If this fails, torch has mended it: simplify `metaopt/exact_ops`.
    """
    model, tasks = problem(name)
    net = mo.functional(model)

    def loss_fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (net(params, x) - y).square().mean()

    def task_loss(params: dict[str, Tensor], task: dict[str, Tensor]) -> Tensor:
        for _ in range(STEPS):
            params = tree.map(
                lambda w, g: w - RATE * g, params, grad(loss_fn)(params, task["x"], task["y"])
            )
        return loss_fn(params, task["query_x"], task["query_y"])

    naive = grad(lambda p: vmap(task_loss, (None, 0))(p, tasks).mean())(
        tree.map(torch.Tensor.detach, net.params)
    )
    expected, _ = loop_over_tasks(model, tasks)
    assert tree.norm(tree.map(torch.sub, naive, expected)) > 1e-4 * tree.norm(expected)


def test_fused_attention_still_has_no_second_derivative_in_torch() -> None:
    """Trap 2, the reason for `any_order`. If this fails, torch has mended it: simplify."""
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        y = nn.functional.scaled_dot_product_attention(x, x, x)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"not implemented|not require grad|derivative"):
        torch.autograd.grad(g.square().sum(), x)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler on CPU",
)
# of torch's own compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_equals_eager() -> None:
    """Of tasks under vmap; `test_compile` has the loop over tasks."""
    model = nn.Sequential(nn.Linear(1, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    tasks = {key: torch.randn(4, 6, 1) for key in ("x", "y", "query_x", "query_y")}
    net = mo.functional(model)
    found = mo.meta_grad(maml(model, mo.Backprop()), compile=True)(net.params, tasks)
    expected = mo.meta_grad(maml(model, mo.Backprop()))(net.params, tasks)
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize(
    "optimizer", [Adam(lr=0.05), SGD(lr=0.1, momentum=0.9)], ids=["adam", "momentum"]
)
def test_optimizers_with_memory_adapt_under_vmap(optimizer: mo.Optimizer) -> None:
    """The state is made from shared parameters and then meets batched gradients (trap 16)."""
    model, tasks = problem("layer-norm")
    net = mo.functional(model)

    def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return (net(params, batch[0]) - batch[1]).square().mean()

    def task_loss(params: dict[str, Tensor], task: dict[str, Tensor]) -> Tensor:
        adapted = mo.minimize(
            loss_fn, optimizer, params, (task["x"], task["y"]), steps=STEPS
        ).params
        return loss_fn(adapted, (task["query_x"], task["query_y"]))

    batched, loop = [
        mo.meta_grad(task_loss, chunk_size=size)(net.params, tasks) for size in (None, 1)
    ]
    assert_close(batched, loop, 1e-11)
    assert all((g != 0).any() for g in batched[0].values())
