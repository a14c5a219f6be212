"""Small networks as pure functions, drawn from normal distributions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt._functional import Params
from metaopt.checks import check_choice, check_count, check_positive

# name -> (function, variance of the weights times the fan in)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "relu": (F.relu, 2.0),
    "leaky_relu": (F.leaky_relu, 2.0),
    "elu": (F.elu, 2.0),
    "gelu": (F.gelu, 2.0),
    "silu": (F.silu, 2.0),
    "tanh": (torch.tanh, 1.0),
}


class Network(Protocol):
    """A function of parameters and inputs."""

    def init(self, generator: torch.Generator, inputs: int, outputs: int) -> Params:
        """Draw the parameters."""
        ...

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Return outputs [n, outputs] for x [n, inputs]."""
        ...


@dataclass(frozen=True)
class MLP:
    """Linear layers with an activation between them; without hidden layers, a linear model.

    Weights are normal with mean 0 and variance gain^2 c / fan in, where c is 2 for "relu" and its
    like, 1 for "tanh"; biases are 0.

    Args:
        hidden: widths of the hidden layers.
        activation: "relu", "leaky_relu", "elu", "gelu", "silu" or "tanh".
        gain: factor on the weights at the start.

    Raises:
        ValueError: a width or the gain is not positive, or there is no such activation.

    Reference:
        He, Zhang, Ren, Sun 2015, arXiv:1502.01852, equation 10.
    """

    hidden: tuple[int, ...] = (32,)
    activation: str = "relu"
    gain: float = 1.0

    def __post_init__(self) -> None:
        for width in self.hidden:
            check_count(self, "hidden", width)
        check_network(self)

    def init(self, generator: torch.Generator, inputs: int, outputs: int) -> Params:
        """Draw weights [fan out, fan in] and biases."""
        scale = self.gain * math.sqrt(ACTIVATIONS[self.activation][1])
        params = {}
        for layer, (fan_in, fan_out) in enumerate(
            itertools.pairwise([inputs, *self.hidden, outputs])
        ):
            weight = torch.randn(fan_out, fan_in, generator=generator)
            params[f"weight{layer}"] = scale / math.sqrt(fan_in) * weight
            params[f"bias{layer}"] = torch.zeros(fan_out)
        return params

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Return outputs [n, outputs] for x [n, inputs]."""
        activation, _ = ACTIVATIONS[self.activation]
        for layer in range(len(self.hidden) + 1):
            x = activation(x) if layer else x
            x = F.linear(x, params[f"weight{layer}"], params[f"bias{layer}"])
        return x


@dataclass(frozen=True)
class ConvNet:
    """3x3 convolutions, each followed by an activation and 2x2 mean pooling; then a linear layer.

    Images are square, of one channel. Weights as in `MLP`, that of the linear layer with c = 1.

    Args:
        channels: of each convolution.
        activation: as in `MLP`.
        gain: as in `MLP`.

    Raises:
        ValueError: as in `MLP`; or the images cannot be halved as often as there are convolutions.
    """

    channels: tuple[int, ...] = (8, 16)
    activation: str = "relu"
    gain: float = 1.0

    def __post_init__(self) -> None:
        for count in self.channels:
            check_count(self, "channels", count)
        check_network(self)

    def init(self, generator: torch.Generator, inputs: int, outputs: int) -> Params:
        """Draw weights [channels out, channels in, 3, 3], those of the last layer, and biases."""
        side = math.isqrt(inputs)
        if side * side != inputs or side % 2 ** len(self.channels):
            raise ValueError(
                f"ConvNet: images must be square, with a side that can be halved "
                f"{len(self.channels)} times, got {inputs} pixels. Take fewer `channels`."
            )
        scale = self.gain * math.sqrt(ACTIVATIONS[self.activation][1])
        params = {}
        for layer, (before, after) in enumerate(itertools.pairwise([1, *self.channels])):
            weight = torch.randn(after, before, 3, 3, generator=generator)
            params[f"weight{layer}"] = scale / math.sqrt(9 * before) * weight
            params[f"bias{layer}"] = torch.zeros(after)
        last = self.channels[-1] * (side >> len(self.channels)) ** 2
        weight = torch.randn(outputs, last, generator=generator)
        params["weight"] = self.gain / math.sqrt(last) * weight
        params["bias"] = torch.zeros(outputs)
        return params

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Return outputs [n, outputs] for x [n, pixels]."""
        activation, _ = ACTIVATIONS[self.activation]
        side = math.isqrt(x.shape[-1])
        x = x.reshape(-1, 1, side, side)
        for layer in range(len(self.channels)):
            x = F.conv2d(x, params[f"weight{layer}"], params[f"bias{layer}"], padding=1)
            x = F.avg_pool2d(activation(x), 2)
        return F.linear(x.flatten(1), params["weight"], params["bias"])


def check_network(network: Any) -> None:
    """Raise ValueError unless activation and gain are what they must be."""
    check_choice(network, "activation", network.activation, tuple(ACTIVATIONS))
    check_positive(network, "gain", network.gain)
