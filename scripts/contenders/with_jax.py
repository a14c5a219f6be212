"""The comparisons in JAX, without further libraries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from contenders import problems
from optimizers import LSTMOptimizer

Params = dict[str, jax.Array]
Run = Callable[[], dict[str, jax.Array]]


def sinusoid(problem: problems.Sinusoid) -> Run:
    """`jit(vmap(grad))` with the inner steps unrolled."""
    start = {
        name: jnp.asarray(param.detach().numpy())
        for name, param in problem.model().named_parameters()
    }
    tasks = jax.tree.map(lambda tensor: jnp.asarray(tensor.numpy()), tuple(problem.data()))

    def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        for layer in ("hidden1", "hidden2"):
            x = jax.nn.relu(x @ params[f"{layer}.weight"].T + params[f"{layer}.bias"])
        return jnp.mean((x @ params["head.weight"].T + params["head.bias"] - y) ** 2)

    def task_loss(params: Params, task: Any) -> jax.Array:
        support, query = task
        for _ in range(problem.steps):
            grads = jax.grad(loss)(params, *support)
            params = jax.tree.map(lambda p, g: p - problem.lr * g, params, grads)
        return loss(params, *query)

    @jax.jit
    def meta_gradient(params: Params, tasks: Any) -> Params:
        return jax.tree.map(
            lambda g: g.mean(0), jax.vmap(jax.grad(task_loss), (None, 0))(params, tasks)
        )

    return lambda: jax.block_until_ready(meta_gradient(start, tasks))


def lstm(problem: problems.LSTM, *, remat: bool = True) -> Run:
    """`jit`, `lax.scan` over the steps and `jax.checkpoint` of each."""
    model = {
        name: jnp.asarray(param.detach().numpy())
        for name, param in problem.model().named_parameters()
    }
    data = tuple(jnp.asarray(tensor.numpy()) for tensor in problem.data())
    learned = LSTMOptimizer(problem.hidden)  # only for its initial weights
    weights = {
        name: jnp.asarray(param.detach().numpy()) for name, param in learned.named_parameters()
    }
    start, unflatten = ravel_pytree(model)

    def loss(flat: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        (x, y), params = batch, unflatten(flat)
        x = jax.nn.sigmoid(x @ params["0.weight"].T + params["0.bias"])
        return cross_entropy(x @ params["2.weight"].T + params["2.bias"], y)

    @jax.jit
    @jax.grad
    def gradient(weights: Params, start: jax.Array, data: Any) -> jax.Array:
        return losses(learned, loss, weights, start, data, remat=remat).sum()

    return lambda: jax.block_until_ready(gradient(weights, start, data))


def meta_training(problem: problems.MetaTraining) -> Run:
    """`jit`, `vmap` over tasks, or pairs and their halves, and `lax.scan` over the steps.

    Where it is backpropagated, with `jax.checkpoint` of each step, as in `lstm`.
    """
    learned = LSTMOptimizer(problem.size)  # only for its initial weights
    own = {name: param.detach() for name, param in learned.named_parameters()}
    theta, noise = (
        {name: jnp.asarray(leaf.numpy()) for name, leaf in leaves.items()}
        for leaves in (own, problem.noise(own))
    )
    tasks = problem.family().tasks
    _, unflatten = ravel_pytree({n: jnp.asarray(p.numpy()) for n, p in tasks[0].params.items()})
    starts = jnp.stack(
        [ravel_pytree({n: jnp.asarray(p.numpy()) for n, p in t.params.items()})[0] for t in tasks]
    )
    data = tuple(jnp.stack([jnp.asarray(t.batches[i].numpy()) for t in tasks]) for i in (0, 1))

    def loss(flat: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        (x, y), params = batch, unflatten(flat)
        layers = len(problem.hidden) + 1
        for layer in range(layers):
            x = jax.nn.relu(x) if layer else x
            x = x @ params[f"weight{layer}"].T + params[f"bias{layer}"]
        return cross_entropy(x, y)

    def mean_loss(theta: Params, start: jax.Array, data: Any) -> jax.Array:
        remat = problem.estimator == "backprop"
        return losses(learned, loss, theta, start, data, remat=remat).mean()

    @jax.jit
    def backprop(theta: Params, noise: Params, starts: jax.Array, data: Any) -> Params:
        grads = jax.vmap(jax.grad(mean_loss), (None, 0, 0))(theta, starts, data)
        return jax.tree.map(lambda g: g.mean(0), grads)

    @jax.jit
    def nres(theta: Params, noise: Params, starts: jax.Array, data: Any) -> Params:
        def pair(epsilon: Params, start: jax.Array, data: Any) -> jax.Array:
            both = jax.tree.map(lambda at, e: jnp.stack([at + e, at - e]), theta, epsilon)
            values = jax.vmap(mean_loss, (0, None, None))(both, start, data)
            return (values[0] - values[1]) / (2 * problem.std**2)

        slopes = jax.vmap(pair)(noise, starts, data)
        return jax.tree.map(lambda e: jnp.tensordot(slopes, e, 1) / len(slopes), noise)

    estimate = {"backprop": backprop, "nres": nres}[problem.estimator]
    return lambda: jax.block_until_ready(estimate(theta, noise, starts, data))


def losses(
    learned: LSTMOptimizer,
    loss: Callable[..., jax.Array],
    weights: Params,
    start: jax.Array,
    data: Any,
    *,
    remat: bool,
) -> jax.Array:
    """Return the losses of an episode of the learned optimizer with these weights, [steps]."""

    def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
        flat, memory = carry
        value, gradient = jax.value_and_grad(loss)(flat, batch)
        signal, after = log_and_sign(lax.stop_gradient(gradient)), []
        for layer, (h, c) in enumerate(memory):
            signal, c = cell(
                weights[f"cells.{layer}.weight"], weights[f"cells.{layer}.bias"], signal, h, c
            )
            after.append((signal, c))
        return (flat + learned.scale * (weights["readout"] @ signal)[0], tuple(after)), value

    zeros = jnp.zeros((learned.hidden_size, len(start)))
    memory = ((zeros, zeros),) * len(learned.cells)
    return lax.scan(jax.checkpoint(step) if remat else step, (start, memory), data)[1]


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()


def cell(
    weight: jax.Array, bias: jax.Array, x: jax.Array, h: jax.Array, c: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return (h', c'), every column a sequence of its own."""
    i, f, g, o = jnp.split(weight @ jnp.concatenate([x, h]) + bias[:, None], 4)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def log_and_sign(x: jax.Array) -> jax.Array:
    """Return [2, n], as in appendix A of arXiv:1606.04474 with p = 10."""
    tiny = np.float32(math.exp(-10))
    return jnp.stack([jnp.log(jnp.maximum(jnp.abs(x), tiny)) / 10, jnp.clip(x / tiny, -1, 1)])
