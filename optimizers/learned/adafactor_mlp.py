"""The per-parameter MLP optimizer with Adafactor's features, in a layout for large models."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metaopt.checks import check_count, check_number
from metaopt.optimizer import Hyper, Leaves, Optimizer, Slots, require_params

from ..lstm_cell import uniform
from .blocks import Block, Piece, find_blocks, gather
from .factors import Factored, factor, factor_shapes, find_axes

MOMENT_DECAYS = (0.9, 0.99, 0.999, 0.999)  # three momenta, and the average of g^2
FACTOR_DECAYS = (0.9, 0.99, 0.999)
HORIZONS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
# Features with an entry for each coordinate: g, w, m, v, 1 / sqrt(v), m / sqrt(v), and g and m
# divided by the root of the factored v. Then those of rows, of columns, and of the time.
SIZES = [16, 6, 6, len(HORIZONS)]
MOST_KEPT = 8  # blocks whose features are kept


class AdafactorMLP(Optimizer):
    """u = -step_size * d * exp(sharpness * s), with (d, s) = MLP(features of one coordinate).

    The 28 features, each divided by sqrt(mean square over the tensor + 1e-5): g, w, momenta m at
    three decays, v (the average of g^2), 1 / sqrt(v), m / sqrt(v); and with the averages of g^2
    over rows R and columns C at three decays: R, C, 1 / sqrt(R), 1 / sqrt(C), and g / sqrt(V) and
    m / sqrt(V) with V = R C / mean(R). To these come tanh(t / h - 1) for 11 horizons h from 1 to
    1e5 steps. With `hidden_size` 4 that makes 197 numbers to learn: the weights and seven decays.

    The first layer never sees a matrix of 39 rows. The time is a part of its bias; each tensor's
    root mean squares are factors on its weights; rows and columns go through it as vectors, and
    what comes out is broadcast. What is left is a matrix of 16 rows with a column for each
    coordinate.

    Args:
        hidden_size: width of both hidden layers.
        step_size: factor on the update.
        sharpness: factor in the exponent.
        seed: of the initial weights.

    Cost:
        4 copies of the parameters as state, and 3 numbers for each row and column;
        hidden_size * (hidden_size + 18) multiplications per coordinate.

    Reference:
        Metz, Freeman, Harrison, Maheswaranathan, Sohl-Dickstein 2022, arXiv:2203.11860
        ("small_fc_lopt"), whose program also says which small numbers keep the roots from 0.
    """

    def __init__(
        self,
        hidden_size: int = 4,
        *,
        step_size: float = 1e-3,
        sharpness: float = 1e-3,
        seed: int = 0,
    ):
        super().__init__()
        self.hidden_size = check_count(self, "hidden_size", hidden_size)
        self.step_size = check_number(self, "step_size", step_size)
        self.sharpness = check_number(self, "sharpness", sharpness)
        self.seed = check_count(self, "seed", seed, least=0)
        generator = torch.Generator().manual_seed(seed)
        inputs = sum(SIZES)
        self.input_weight = uniform((hidden_size, inputs), inputs, generator)
        self.input_bias = nn.Parameter(torch.zeros(hidden_size, 1))
        self.hidden_weight = uniform((hidden_size, hidden_size), hidden_size, generator)
        self.hidden_bias = nn.Parameter(torch.zeros(hidden_size, 1))
        self.output_weight = uniform((2, hidden_size), hidden_size, generator)
        self.output_bias = nn.Parameter(torch.zeros(2, 1))
        # d in 1 - decay = (1 - initial decay) exp(10 d)
        self.moment_shift = nn.Parameter(torch.zeros(len(MOMENT_DECAYS)))
        self.factor_shift = nn.Parameter(torch.zeros(len(FACTOR_DECAYS)))

    def slots(self, params: Leaves) -> Slots:
        like = [p.to(self.input_weight.dtype) for p in params]
        rows, columns = zip(*(factor_shapes(p.shape) for p in params), strict=True)
        shapes = {"moments": [p.shape for p in params], "rows": rows, "columns": columns}
        few = len(FACTOR_DECAYS)
        counts = {"moments": len(MOMENT_DECAYS), "rows": few, "columns": few}
        return {
            name: [p.new_zeros(counts[name], *s) for p, s in zip(like, each, strict=True)]
            for name, each in shapes.items()
        }

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        params = require_params(self, params, "the parameter is one of its features")
        # All is computed in the network's precision, as in `MLPOptimizer`.
        dtype = self.input_weight.dtype
        grads, params = [g.to(dtype) for g in grads], [p.to(dtype) for p in params]
        forget = _forgets(FACTOR_DECAYS, self.factor_shift)
        given = zip(grads, slots["rows"], slots["columns"], strict=True)
        factors = [factor(*one, forget) for one in given]
        g, w = [_flat(x[None]) for x in grads], [_flat(x[None]) for x in params]
        before = [_flat(m) for m in slots["moments"]]
        forget, blocks = _forgets(MOMENT_DECAYS, self.moment_shift)[:, None], find_blocks(grads)
        moments = [_advance(block.take(before), block.take(g), forget) for block in blocks]
        # Many features are made twice: that is faster than to write them and to read them again.
        kept: dict[int, Tensor] = {}
        squares = [g[0].new_zeros(SIZES[0]) for _ in grads]
        for place, block in enumerate(blocks):
            features = _features(block, g, w, moments[place], factors)
            if len(blocks) <= MOST_KEPT:
                features = [torch.cat(features)]
                kept[place] = features[0]
            for piece, *own in zip(block, *map(block.part, features), strict=True):
                found = torch.cat([torch.linalg.vecdot(x, x) for x in own])
                squares[piece.tensor] = squares[piece.tensor] + found
        layers, updates = self._first_layers(grads, factors, squares, step), []
        for place, block in enumerate(blocks):
            if place not in kept:
                rows = torch.cat(_features(block, g, w, moments[place], factors))
            else:
                rows = kept[place]
            pairs = zip(block, block.part(rows), strict=True)
            x = [layers[piece.tensor](piece, part) for piece, part in pairs]
            updates.append(self._finish(_join(x)))
        return [u[0] for u in gather(blocks, updates, grads)], {
            "moments": gather(blocks, moments, grads),
            "rows": [one.rows for one in factors],
            "columns": [one.columns for one in factors],
        }

    def _first_layers(
        self, grads: Leaves, factors: list[Factored], squares: Leaves, step: Tensor
    ) -> list[_FirstLayer]:
        """Return the first layer of each tensor, given its features' sums of squares."""
        dense, of_rows, of_columns, of_time = torch.split(self.input_weight, SIZES, dim=1)
        horizons = grads[0].new_tensor(HORIZONS)
        bias = of_time @ torch.tanh((step - 1) / horizons - 1)[:, None] + self.input_bias
        layers = []
        for grad, one, square in zip(grads, factors, squares, strict=True):
            axes = find_axes(grad.shape)
            if axes is None:
                vectors: tuple[Tensor, ...] = (_through(of_rows + of_columns, one.rows),)
            else:
                pair = _through(of_rows, one.rows), _through(of_columns, one.columns)
                vectors = axes.broadcast(*pair)
            weight = dense * _inverse_rms(square, grad.numel())
            layers.append(_FirstLayer(weight, bias, vectors))
        return layers

    def _finish(self, x: Tensor) -> Tensor:
        """Return updates [1, n], given the first layer [hidden, n] before its relu."""
        x = torch.addmm(self.hidden_bias, self.hidden_weight, x.relu())
        direction, sharpness = torch.addmm(self.output_bias, self.output_weight, x.relu()).split(1)
        update: Tensor = -self.step_size * direction * torch.exp(self.sharpness * sharpness)
        return update


class _FirstLayer(NamedTuple):
    """W features + bias for one tensor, once its features are normalised.

    Args:
        weight: on the features with an entry for each coordinate.
        bias: with what the time adds.
        vectors: what rows and columns add, [hidden, ...], where ... broadcasts to the tensor.
    """

    weight: Tensor
    bias: Tensor
    vectors: tuple[Tensor, ...]

    def __call__(self, piece: Piece, features: Tensor) -> Tensor:
        """Return the layer at a piece of the tensor, [hidden, n]."""
        x = torch.addmm(self.bias, self.weight, features)
        first, *others = map(piece.cut, self.vectors)
        return x + sum(others, start=first).reshape(x.shape)


def _advance(moments: Tensor, grad: Tensor, forget: Tensor) -> Tensor:
    """Return the next averages of g, and of g^2 in the last row."""
    new = torch.cat([grad.expand(len(moments) - 1, -1), grad * grad])
    return torch.lerp(moments, new, forget)


def _features(
    block: Block, grads: Leaves, params: Leaves, moments: Tensor, factors: list[Factored]
) -> Leaves:
    """Return the features with an entry for each coordinate, 16 rows in all, of a block."""
    g, momenta, inverse = block.take(grads), moments[:-1], (moments[-1:] + 1e-6).rsqrt()
    for_grad, for_momentum = [], []
    for piece in block:
        one = factors[piece.tensor]
        for_grad.append(_product(piece, one.for_grad))
        other = one.for_momentum
        for_momentum.append(for_grad[-1] if other is None else _product(piece, other))
    scaled = g * _join(for_grad), momenta * _join(for_momentum)
    return [g, block.take(params), moments, inverse, momenta * inverse, *scaled]


def _product(piece: Piece, factors: tuple[Tensor, ...]) -> Tensor:
    """Return the product of factors at a piece, [rows, n]."""
    first, *others = map(piece.cut, factors)
    product = math.prod(others, start=first)
    return product.reshape(len(product), piece.size)


def _through(weight: Tensor, average: Tensor) -> Tensor:
    """Return weight @ (average, 1 / sqrt(average)) normalised, [hidden, ...] for [decays, ...]."""
    rows = _flat(average)
    rows = torch.cat([rows, (rows + 1e-8).rsqrt()])
    scale = _inverse_rms(torch.linalg.vecdot(rows, rows), rows.shape[1])
    return ((weight * scale) @ rows).reshape(len(weight), *average.shape[1:])


def _inverse_rms(squares: Tensor, count: int) -> Tensor:
    """Return 1 / sqrt(mean square + 1e-5) for sums of squares."""
    return (squares / max(count, 1) + 1e-5).rsqrt()


def _forgets(decays: tuple[float, ...], shift: Tensor) -> Tensor:
    """Return 1 - decay, at most 1."""
    logs = shift.new_tensor([math.log1p(-d) for d in decays])
    return (logs + 10 * shift).exp().clamp(max=1)


def _flat(x: Tensor) -> Tensor:
    """Return [rows, entries] for [rows, *shape]."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _join(parts: Leaves) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
