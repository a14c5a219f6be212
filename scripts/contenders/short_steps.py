"""Steps so short that the loop around them can be seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TrainerLoop:
    """A thousand steps of about 1 ms, and a checkpoint at the end; how the loop is written.

    Everyone calls the same steps of gradient descent, which are plain PyTorch.
    """

    batch: int = 320
    sizes: tuple[int, int, int] = (128, 256, 10)
    lr: float = 0.01
    steps: int = 1000

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        inputs, hidden, outputs = self.sizes
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    def data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(self.batch, self.sizes[0], generator=generator)
        return x, torch.randint(self.sizes[-1], (self.batch,), generator=generator)


class Descent:
    """Gradient descent in plain PyTorch, as something that a `Trainer` can step."""

    def __init__(self, problem: TrainerLoop):
        self.model, (self.x, self.y) = problem.model(), problem.data()
        self.optimizer = torch.optim.SGD(self.model.parameters(), problem.lr)

    def step(self) -> dict[str, Tensor]:
        loss = F.cross_entropy(self.model(self.x), self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}

    def state_dict(self) -> dict[str, Tensor]:
        return {name: leaf.clone() for name, leaf in self.model.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)
