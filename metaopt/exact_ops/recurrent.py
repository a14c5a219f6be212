"""Recurrent layers from elementary operations, equal to torch's.

Torch's LSTM, GRU and RNN kernels have no batching rule for `vmap`, and those of cuDNN and mkldnn no
second derivative.

Sequences are kept as torch packs them: rows of all times below one another, `sizes[t]` of them at
time t, the longest sequence first. An ordinary batch is the case of equal sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.exact_ops.dropout import dropout as dropped

States = tuple[Tensor, ...]  # (hidden, cell) of an LSTM, (hidden,) of the others; [rows, features]


class _Weights(NamedTuple):
    """What acts on the states of a layer: W_h, b_h and the projection of an LSTM's output."""

    w: Tensor
    b: Tensor | None
    projection: Tensor | None

    def act(self, h: Tensor) -> Tensor:
        """Return W_h h + b_h."""
        return F.linear(h, self.w, self.b)


# (W_i x + b_i, states, weights) -> next states, the output first
Cell = Callable[[Tensor, States, _Weights], States]


def _lstm_step(x: Tensor, states: States, weights: _Weights) -> States:
    """Return h and c: i, f, g, o = W x + U h; c = s(f) c + s(i) tanh(g); h = s(o) tanh(c).

    s is the sigmoid, and h may be projected.
    """
    h, c = states
    i, f, g, o = (x + weights.act(h)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if weights.projection is None else F.linear(h, weights.projection)), c


def _gru_step(x: Tensor, states: States, weights: _Weights) -> States:
    """Return h: r, z = s(W x + U h); n = tanh(W_n x + r U_n h); h = (1 - z) n + z h."""
    (h,) = states
    r, z, n = x.chunk(3, -1)
    of_r, of_z, of_n = weights.act(h).chunk(3, -1)
    z = (z + of_z).sigmoid()
    n = (n + (r + of_r).sigmoid() * of_n).tanh()
    return ((1 - z) * n + z * h,)


def _tanh_step(x: Tensor, states: States, weights: _Weights) -> States:
    return (torch.tanh(x + weights.act(states[0])),)


def _relu_step(x: Tensor, states: States, weights: _Weights) -> States:
    return (torch.relu(x + weights.act(states[0])),)


def _make_layers(step: Cell) -> Callable[..., tuple[Tensor, ...]]:
    """Return what computes all layers of a recurrent network, called like `torch.lstm`.

    It takes a batch, or sequences that are packed.
    """

    def padded(
        input: Tensor, hx: Any, params: Sequence[Tensor], *settings: Any, **named: Any
    ) -> tuple[Tensor, ...]:
        network = _Settings(*settings, **named)
        x = input.transpose(0, 1) if network.batch_first else input
        sizes = [x.shape[1]] * x.shape[0]
        output, *last = _run_layers(step, x.flatten(0, 1), sizes, hx, params, network)
        output = output.unflatten(0, x.shape[:2])
        return (output.transpose(0, 1) if network.batch_first else output), *last

    def packed(
        data: Tensor,
        batch_sizes: Tensor,
        hx: Any,
        params: Sequence[Tensor],
        *settings: Any,
        **named: Any,
    ) -> tuple[Tensor, ...]:
        network = _Settings(*settings, **named)
        return _run_layers(step, data, batch_sizes.tolist(), hx, params, network)

    def layers(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        is_packed = "batch_sizes" in kwargs or (len(args) > 3 and not isinstance(args[3], bool))
        return (packed if is_packed else padded)(*args, **kwargs)

    return layers


class _Settings(NamedTuple):
    """Torch's last arguments of a recurrent network."""

    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool = False


def _run_layers(
    step: Cell,
    data: Tensor,
    sizes: list[int],
    hx: Any,
    params: Sequence[Tensor],
    network: _Settings,
) -> tuple[Tensor, ...]:
    """Return (outputs of the last layer, *last states of all, [layers * directions, ...])."""
    first = _as_states(hx)
    directions = 1 + network.bidirectional
    per_run = len(params) // (network.num_layers * directions)
    lasts = []
    for layer in range(network.num_layers):
        if layer and network.dropout and network.train:
            data = dropped(data, network.dropout)
        outputs = []
        for direction in range(directions):
            run = layer * directions + direction
            initial = tuple(state[run] for state in first)
            weights = params[run * per_run :][:per_run]
            output, last = _run(
                step, data, sizes, initial, weights, network.has_biases, backwards=direction == 1
            )
            outputs.append(output)
            lasts.append(last)
        data = torch.cat(outputs, -1)
    return data, *[torch.stack(states) for states in zip(*lasts, strict=True)]


def _as_states(hx: Any) -> States:
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


def _run(
    step: Cell,
    data: Tensor,
    sizes: list[int],
    states: States,
    params: Sequence[Tensor],
    biased: bool,
    *,
    backwards: bool,
) -> tuple[Tensor, States]:
    """Return (outputs, last states) of one layer in one direction."""
    w_i, w_h, *rest = params
    b_i, b_h = rest[:2] if biased else (None, None)
    weights = _Weights(w_h, b_h, rest[-1] if len(rest) % 2 else None)
    inputs = F.linear(data, w_i, b_i).split(sizes)
    outputs: list[Tensor] = []
    for x in reversed(inputs) if backwards else inputs:
        now = step(x, tuple(state[: len(x)] for state in states), weights)
        outputs.append(now[0])  # sequences that have ended, or not begun, keep their states
        states = tuple(
            torch.cat([new, old[len(x) :]]) if len(x) < len(old) else new
            for new, old in zip(now, states, strict=True)
        )
    return torch.cat(outputs[::-1] if backwards else outputs), states


def _make_cell(step: Cell) -> Callable[..., Any]:
    """Return one step of one layer, called like `torch.lstm_cell`."""

    def cell(
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor | States:
        states = step(F.linear(input, w_ih, b_ih), _as_states(hx), _Weights(w_hh, b_hh, None))
        return states[0] if isinstance(hx, Tensor) else states

    return cell


RECURRENT: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm: _make_layers(_lstm_step),
    torch.gru: _make_layers(_gru_step),
    torch.rnn_tanh: _make_layers(_tanh_step),
    torch.rnn_relu: _make_layers(_relu_step),
    torch.lstm_cell: _make_cell(_lstm_step),
    torch.gru_cell: _make_cell(_gru_step),
    torch.rnn_tanh_cell: _make_cell(_tanh_step),
    torch.rnn_relu_cell: _make_cell(_relu_step),
}
