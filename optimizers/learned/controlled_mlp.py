"""A small learned optimizer: a normalised direction, and a controller of each tensor's step."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metaopt.checks import check_count, check_flag
from metaopt.optimizer import (
    Hyper,
    Hyperparameter,
    Leaves,
    Optimizer,
    Slots,
    State,
    require_params,
    require_steps,
    set_hyperparameter,
)
from metaopt.optimizer.missing import separate_state
from metaopt.optimizer.step import step_leaves
from metaopt.tree import Tree

from ..lstm_cell import uniform
from ..moving import mean_along, mean_of_squares
from ..muon import orthogonalized
from . import controlled_mlp_kernel as kernel

DECAYS = (0.5, 0.9, 0.99)
SQUARE_DECAY = 0.98
LOSS_DECAYS = (0.9, 0.98)
HIDDEN = 8
FEATURES = 12  # of a coordinate
TIMES = 5
CONTROLS = 13  # features of a tensor
FIRST_STEP = -4.6  # the logarithm of the step before anything is learned: .01
LARGEST = 8.0  # change of that logarithm
TINY = 1e-16
SCHULZ, SCHULZ_STEPS, LEAST_NORM = (3.4445, -4.7750, 2.0315), 4, 1e-7
ADAM = 6  # the feature m / sqrt(v) with decay .9, the direction before anything is learned


class ControlledMLP(Optimizer):
    """u = -lr e^s d / rms(d), for each tensor with a direction d and a step e^s of its own.

    The direction is a network of each coordinate's features f, shared over all coordinates:
    d = a . f + b . relu(A f + B tau). Features, each divided by its root mean square over the
    tensor: the gradient g and its momenta m at decays .5, .9, .99; the same four times
    1 / sqrt(v / mean v + 1e-4), where v is the second moment at decay .98; m.9 / sqrt(row col) with
    the means of g^2 over the columns and rows of the tensor as a matrix [first axis, others]; the
    parameter p; min(1 / sqrt(v), 10); and 1. tau = (1, x, x^2, tanh(t / 10), (ln T - 5) / 2) is
    time, with x = t / T. The direction of a matrix, and of a filter as a matrix, is made orthogonal
    by four Newton-Schulz steps, as in `Muon`.

    The step of a tensor is s = -4.6 + 2 (c . h + e . tanh(C h + k)), kept within 8 of -4.6. Its
    features h: 1, x, x^4, 1 - tanh(t / (T / 20 + 3)), (ln T - 5) / 2, ln rms(p) / 2, ln of
    rms(m.9) / rms(sqrt v), of rms(m.99) / rms(sqrt v), of the loss's fast over its slow average,
    and half of that of its fast average over its first value, ln(fan in) / 3, ln(fan out) / 3, and
    whether there is one axis at most.

    Untrained it is near to Adam with steps of root mean square .01. What carries over to other
    networks is mostly the controller, which has to know the number of steps T and the loss. It has
    289 weights.

    Args:
        lr: factor on the update, the one number to tune; 1 is as trained.
        steps: T. None: whoever runs the optimizer for a known number of steps sets it
            (`MetaTraining`, `evaluate`), and you with `with_steps(optimizer, steps)`.
        orthogonal: whether directions of matrices are made so. On wide layers that costs far more
            than all the rest: 10 r^2 c multiplications for r rows and c >= r columns.
        seed: of the initial weights.

    Raises:
        ValueError: at a step: T or the loss is not known.

    Cost:
        4 copies of the parameters as state, 116 multiplications per coordinate. Where nothing is
        differentiated, in float32 on a CPU with a C++ compiler, one pass of a kernel of ours.

    Reference:
        Metz et al. 2022 (VeLO), arXiv:2211.09760, for a network per tensor above one per parameter;
        Moudgil et al. 2026 (Celo2), arXiv:2602.19142, for the normalised direction;
        Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, for orthogonal ones.
    """

    hyperparameters = ("lr",)
    needs_steps = True

    def __init__(
        self,
        lr: Hyperparameter = 1.0,
        *,
        steps: int | None = None,
        orthogonal: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        set_hyperparameter(self, "lr", lr)
        self.orthogonal = check_flag(self, "orthogonal", orthogonal)
        self.steps = None if steps is None else check_count(self, "steps", steps)
        self.seed = check_count(self, "seed", seed, least=0)
        generator = torch.Generator().manual_seed(seed)
        first = torch.zeros(FEATURES)
        first[ADAM] = 1
        self.direct = nn.Parameter(first)
        self.feature_weight = uniform((HIDDEN, FEATURES), FEATURES, generator)
        self.time_weight = uniform((HIDDEN, TIMES), FEATURES, generator)
        self.direction_weight = nn.Parameter(torch.zeros(HIDDEN))
        self.control = nn.Parameter(torch.zeros(CONTROLS))
        self.control_weight = uniform((HIDDEN, CONTROLS), CONTROLS, generator)
        self.control_bias = nn.Parameter(torch.zeros(HIDDEN))
        self.step_weight = nn.Parameter(torch.zeros(HIDDEN))

    def slots(self, params: Leaves) -> Slots:
        like = partial(self.direct.new_zeros, device=params[0].device)
        return {name: like(shape) for name, shape in _memory([p.shape for p in params]).items()}

    def separate(self, state: State, params: Tree) -> State:
        return separate_state(self, state, params)

    def forward(
        self, grads: Tree, state: State, params: Tree | None = None, *, loss: Tensor | None = None
    ) -> tuple[Tree, State]:
        if loss is None:
            raise ValueError(
                f"{type(self).__name__} looks at the loss, got None. Call `optimizer(grads, state, "
                "params, loss=loss)`; deployed as a torch optimizer, `step(loss=loss)` or "
                "`step(closure)`."
            )
        if isinstance(loss, Tensor) and loss.ndim:
            raise ValueError(
                f"`loss` must be a scalar for {type(self).__name__} to look at, got "
                f"{tuple(loss.shape)}. Take the mean."
            )
        return step_leaves(self, partial(self._step, loss), grads, state, params, loss)

    def _step(
        self,
        loss: Tensor,
        grads: Leaves,
        params: Leaves | None,
        slots: Slots,
        hyper: Hyper,
        step: Tensor,
    ) -> tuple[Leaves, Slots]:
        params = require_params(self, params, "the parameter is one of its features")
        steps = float(require_steps(self))
        dtype, shapes = self.direct.dtype, [p.shape for p in params]
        flat, weights = (torch.cat([x.reshape(-1).to(dtype) for x in xs]) for xs in (grads, params))
        loss = torch.as_tensor(loss, dtype=dtype, device=flat.device)
        t = step.to(dtype) - 1
        rate = torch.as_tensor(hyper["lr"], dtype=dtype, device=flat.device)
        if {name: slot.shape for name, slot in slots.items()} != _memory(shapes):
            raise KeyError("memory")  # whoever calls says which it is
        if rate.ndim == 0 and kernel.is_usable(flat, weights, self.direct, *slots.values()):
            theta = torch.cat([p.reshape(-1) for p in self._theta()])
            scalars = torch.stack([loss, t, rate])
            sizes = [(*_as_matrix(shape), int(len(shape) < 2)) for shape in shapes]
            update, after = kernel.step(
                sizes, self.orthogonal, steps, theta, flat, weights, slots, scalars
            )
        else:
            seen = {**slots, "losses": _follow(slots["losses"], loss, step)}
            update, after = self._plain_step(shapes, flat, weights, seen, Time.of(t, steps))
            update = update * (rate if rate.ndim == 0 else rate.expand(shapes[0]).reshape(-1))
        parts = torch.split(update, [g.numel() for g in grads])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)], after

    def _theta(self) -> list[Tensor]:
        """Return all weights, in the order in which the kernel reads them."""
        return [
            self.direct,
            self.feature_weight,
            self.time_weight,
            self.direction_weight,
            self.control,
            self.control_weight,
            self.control_bias,
            self.step_weight,
        ]

    def _plain_step(
        self,
        shapes: list[torch.Size],
        grad: Tensor,
        param: Tensor,
        slots: Slots,
        time: Time,
    ) -> tuple[Tensor, Slots]:
        """Return (-e^s d / rms(d), the next memory), the definition that the kernel is held to."""
        decays = grad.new_tensor(DECAYS)[:, None]
        momenta = decays * slots["momenta"] + (1 - decays) * grad
        square = SQUARE_DECAY * slots["square"] + (1 - SQUARE_DECAY) * grad * grad
        sizes = [_as_matrix(shape) for shape in shapes]
        counts = [rows * columns for rows, columns in sizes]
        parts = zip(
            shapes,
            *(x.split(counts, -1) for x in (grad, param, momenta, square)),
            slots["rows"].split([rows for rows, _ in sizes]),
            slots["columns"].split([columns for _, columns in sizes]),
            strict=True,
        )
        updates, all_rows, all_columns = [], [], []
        for shape, g, p, m, v, rows, columns in parts:
            squares = (g * g).view(len(rows), len(columns))
            rows = SQUARE_DECAY * rows + (1 - SQUARE_DECAY) * mean_along(squares, 1)
            columns = SQUARE_DECAY * columns + (1 - SQUARE_DECAY) * mean_along(squares, 0)
            factors = _inverse_root(rows)[:, None] * _inverse_root(columns)
            direction = self._direction(_features(g, p, m, v, factors.view(-1)), time)
            if self.orthogonal and len(shape) > 1 and len(g):
                matrix = direction.view(len(rows), len(columns))
                direction = orthogonalized(matrix, SCHULZ, LEAST_NORM, SCHULZ_STEPS).reshape(-1)
            step = self._log_step(shape, p, m, v, slots["losses"], time).exp()
            updates.append(-step * _inverse_root(mean_along(direction.square())) * direction)
            all_rows.append(rows)
            all_columns.append(columns)
        return torch.cat(updates), {
            "momenta": momenta,
            "square": square,
            "rows": torch.cat(all_rows),
            "columns": torch.cat(all_columns),
            "losses": slots["losses"],
        }

    def _direction(self, features: Tensor, time: Time) -> Tensor:
        """Return d [n] for features [12, n], which this divides by their root mean squares."""
        lines = torch.cat([self.feature_weight, self.direct[None]])
        biases = torch.cat([self.time_weight @ time.of_direction, self.direct.new_zeros(1)])
        # the 12 n features are read twice: for their sizes, and for all lines at once
        scale = _inverse_root(mean_of_squares(features))
        seen = torch.addmm(biases[:, None], lines * scale, features)
        return seen[-1] + self.direction_weight @ seen[:-1].relu()

    def _log_step(
        self, shape: torch.Size, p: Tensor, m: Tensor, v: Tensor, losses: Tensor, time: Time
    ) -> Tensor:
        """Return s, the logarithm of the step of a tensor with this shape."""
        rows, columns = _as_matrix(shape)
        log_spread = (mean_along(v) + TINY).log() / 2
        first, fast, slow = losses.unbind()
        floor = 0.01 * first.abs() + 1e-8
        fast, slow, first = ((x.clamp(min=0) + floor).log() for x in (fast, slow, first.abs()))
        constants = [math.log(max(columns, 1)) / 3, math.log(max(rows, 1)) / 3]
        observed = torch.stack(
            [
                (mean_along(p.square()) + 1e-4).log() / 4,
                (mean_along(m[1].square()) + TINY).log() / 2 - log_spread,
                (mean_along(m[2].square()) + TINY).log() / 2 - log_spread,
                (fast - slow).clamp(max=3),
                (fast - first).clamp(max=6) / 2,
            ]
        )
        of_shape = p.new_tensor([*constants, float(len(shape) < 2)])
        h = torch.cat([time.of_control, observed, of_shape])
        hidden = torch.tanh(self.control_weight @ h + self.control_bias)
        change = 2 * (self.control @ h + self.step_weight @ hidden)
        return FIRST_STEP + change.clamp(-LARGEST, LARGEST)


def _memory(shapes: list[torch.Size]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the memory of parameters with these shapes."""
    sizes = [_as_matrix(shape) for shape in shapes]
    count = sum(rows * columns for rows, columns in sizes)
    return {
        "momenta": (len(DECAYS), count),
        "square": (count,),
        "rows": (sum(rows for rows, _ in sizes),),
        "columns": (sum(columns for _, columns in sizes),),
        "losses": (1 + len(LOSS_DECAYS),),
    }


class Time(NamedTuple):
    """What the networks see of the time t of T.

    Attributes:
        of_direction: tau, [5].
        of_control: the first five features of a tensor.
    """

    of_direction: Tensor
    of_control: Tensor

    @classmethod
    def of(cls, t: Tensor, steps: float) -> Time:
        """Return the features of the step t of `steps`, counted from 0."""
        x = (t / steps).clamp(max=1)
        one = torch.ones_like(x)
        length = one * ((math.log(steps) - 5) / 2)
        begin = 1 - torch.tanh(t / (0.05 * steps + 3))
        return cls(
            torch.stack([one, x, x * x, torch.tanh(t / 10), length]),
            torch.stack([one, x, x**4, begin, length]),
        )


def _follow(losses: Tensor, loss: Tensor, step: Tensor) -> Tensor:
    """Return (the first loss, its fast and its slow average) after this one."""
    decays = losses.new_tensor(LOSS_DECAYS)
    averages = decays * losses[1:] + (1 - decays) * loss
    return torch.where(step == 1, loss, torch.cat([losses[:1], averages]))


def _features(g: Tensor, p: Tensor, m: Tensor, v: Tensor, factors: Tensor) -> Tensor:
    """Return the features of the coordinates of a tensor, [12, n], of any size."""
    moved = torch.cat([g[None], m])
    relative = (v / (mean_along(v) + TINY) + 1e-4).rsqrt()
    others = [m[1] * factors, p, _inverse_root(v).clamp(max=10), torch.ones_like(p)]
    return torch.cat([moved, moved * relative, torch.stack(others)])


def _as_matrix(shape: torch.Size) -> tuple[int, int]:
    """Return (rows, columns) of a tensor as a matrix; one with one axis is a column."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (math.prod(shape), 1)


def _inverse_root(x: Tensor) -> Tensor:
    return (x + TINY).rsqrt()
