"""The comparisons in JAX, without further libraries."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
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
    layers = len(learned.cells)

    def loss(flat: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        (x, y), params = batch, unflatten(flat)
        x = jax.nn.sigmoid(x @ params["0.weight"].T + params["0.bias"])
        logits = x @ params["2.weight"].T + params["2.bias"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    def step(weights: Params, carry: Any, batch: Any) -> tuple[Any, jax.Array]:
        flat, memory = carry
        value, gradient = jax.value_and_grad(loss)(flat, batch)
        signal, after = log_and_sign(lax.stop_gradient(gradient)), []
        for layer, (h, c) in enumerate(memory):
            signal, c = cell(
                weights[f"cells.{layer}.weight"], weights[f"cells.{layer}.bias"], signal, h, c
            )
            after.append((signal, c))
        return (flat + learned.scale * (weights["readout"] @ signal)[0], tuple(after)), value

    if remat:
        step = jax.checkpoint(step)

    @jax.jit
    @jax.grad
    def gradient(weights: Params, start: jax.Array, data: Any) -> jax.Array:
        zeros = jnp.zeros((problem.hidden, len(start)))
        return lax.scan(partial(step, weights), (start, ((zeros, zeros),) * layers), data)[1].sum()

    return lambda: jax.block_until_ready(gradient(weights, start, data))


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
