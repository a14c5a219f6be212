"""What a step of an optimizer costs: each side makes a step of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerSteps:
    """One step of an optimizer on a dense network, in place, with fixed gradients.

    Nothing is recorded. Weights of learned optimizers are those before any training: others would
    take as long.
    """

    sizes: tuple[int, ...]

    def model(self) -> nn.Module:
        """Return the network, with gradients."""
        torch.manual_seed(0)
        pairs = zip(self.sizes, self.sizes[1:])
        model = nn.Sequential(*[nn.Linear(inputs, outputs) for inputs, outputs in pairs])
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        return model
