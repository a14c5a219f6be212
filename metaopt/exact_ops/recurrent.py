"""Recurrent layers from elementary operations, equal to torch's.

Torch's LSTM, GRU and RNN kernels have no batching rule for `vmap`, and those of cuDNN and mkldnn no
second derivative.

Sequences are kept as torch packs them: rows of all times below one another, `sizes[t]` of them at
time t, the longest sequence first. An ordinary batch is the case of equal sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.exact_ops.dropout import dropout as dropped

States = tuple[Tensor, ...]  # (hidden, cell) of an LSTM, (hidden,) of the others; [rows, features]
# (W_i x + b_i, states, the layer's other weights: W_h, b_h or None, projection or None) -> next
# states, the output first
Cell = Callable[[Tensor, States, Tensor, Tensor | None, Tensor | None], States]


def _lstm_step(
    x: Tensor, states: States, w_h: Tensor, b_h: Tensor | None, projection: Tensor | None
) -> States:
    """i, f, g, o = W x + U h; c = sigmoid(f) c + sigmoid(i) tanh(g);  h = sigmoid(o) tanh(c),
    projected.
    """
    h, c = states
    i, f, g, o = (x + F.linear(h, w_h, b_h)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if projection is None else F.linear(h, projection)), c


def _gru_step(
    x: Tensor, states: States, w_h: Tensor, b_h: Tensor | None, projection: Tensor | None
) -> States:
    """r, z = sigmoid(W x + U h);  n = tanh(W_n x + r U_n h);  h = (1 - z) n + z h."""
    (h,) = states
    r, z, n = x.chunk(3, -1)
    of_r, of_z, of_n = F.linear(h, w_h, b_h).chunk(3, -1)
    z = (z + of_z).sigmoid()
    n = (n + (r + of_r).sigmoid() * of_n).tanh()
    return ((1 - z) * n + z * h,)


def _tanh_step(
    x: Tensor, states: States, w_h: Tensor, b_h: Tensor | None, projection: Tensor | None
) -> States:
    return (torch.tanh(x + F.linear(states[0], w_h, b_h)),)


def _relu_step(
    x: Tensor, states: States, w_h: Tensor, b_h: Tensor | None, projection: Tensor | None
) -> States:
    return (torch.relu(x + F.linear(states[0], w_h, b_h)),)


def _layer(step: Cell) -> Callable[..., tuple[Tensor, ...]]:
    """Return what computes all layers of a recurrent network, called like `torch.lstm`, with a
    batch or a packed one.
    """

    def padded(
        input: Tensor,
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        x = input.transpose(0, 1) if batch_first else input
        sizes = [x.shape[1]] * x.shape[0]
        output, *last = packed(
            x.flatten(0, 1),
            sizes,
            hx,
            params,
            has_biases,
            num_layers,
            dropout,
            train,
            bidirectional,
        )
        output = output.unflatten(0, x.shape[:2])
        return (output.transpose(0, 1) if batch_first else output), *last

    def packed(
        data: Tensor,
        batch_sizes: Tensor | list[int],
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
    ) -> tuple[Tensor, ...]:
        sizes = batch_sizes.tolist() if isinstance(batch_sizes, Tensor) else batch_sizes
        first = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        runs = num_layers * (1 + bidirectional)
        weights = [params[i * len(params) // runs :][: len(params) // runs] for i in range(runs)]
        lasts = []
        for run in range(0, runs, 1 + bidirectional):
            if run and dropout and train:
                data = dropped(data, dropout)
            outputs = []
            for direction in range(1 + bidirectional):
                initial = tuple(state[run + direction] for state in first)
                output, last = _run(
                    step,
                    data,
                    sizes,
                    initial,
                    weights[run + direction],
                    has_biases,
                    backwards=direction == 1,
                )
                outputs.append(output)
                lasts.append(last)
            data = torch.cat(outputs, -1)
        return data, *[torch.stack(states) for states in zip(*lasts, strict=True)]

    def layers(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        is_packed = "batch_sizes" in kwargs or (len(args) > 3 and not isinstance(args[3], bool))
        return (packed if is_packed else padded)(*args, **kwargs)

    return layers


def _run(
    step: Cell,
    data: Tensor,
    sizes: list[int],
    states: States,
    weights: Sequence[Tensor],
    biased: bool,
    *,
    backwards: bool,
) -> tuple[Tensor, States]:
    """Return (outputs, last states) of one layer in one direction."""
    w_i, w_h, *rest = weights
    b_i, b_h = rest[:2] if biased else (None, None)
    projection = rest[-1] if len(rest) % 2 else None
    inputs = F.linear(data, w_i, b_i).split(sizes)
    outputs: list[Tensor] = []
    for x in reversed(inputs) if backwards else inputs:
        now = step(x, tuple(state[: len(x)] for state in states), w_h, b_h, projection)
        outputs.append(now[0])  # sequences that have ended, or not begun, keep their states
        states = tuple(
            torch.cat([new, old[len(x) :]]) if len(x) < len(old) else new
            for new, old in zip(now, states, strict=True)
        )
    return torch.cat(outputs[::-1] if backwards else outputs), states


def _cell(step: Cell) -> Callable[..., Any]:
    """Return one step of one layer, called like `torch.lstm_cell`."""

    def cell(
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor | States:
        states = step(
            F.linear(input, w_ih, b_ih),
            (hx,) if isinstance(hx, Tensor) else tuple(hx),
            w_hh,
            b_hh,
            None,
        )
        return states[0] if isinstance(hx, Tensor) else states

    return cell


RECURRENT: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm: _layer(_lstm_step),
    torch.gru: _layer(_gru_step),
    torch.rnn_tanh: _layer(_tanh_step),
    torch.rnn_relu: _layer(_relu_step),
    torch.lstm_cell: _cell(_lstm_step),
    torch.gru_cell: _cell(_gru_step),
    torch.rnn_tanh_cell: _cell(_tanh_step),
    torch.rnn_relu_cell: _cell(_relu_step),
}
