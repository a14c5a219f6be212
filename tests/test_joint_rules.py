"""Several point rules into one level: each is for the level at the other end of its edge."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import metaopt as mo
from optimizers import SGD


class Vector(nn.Module):
    def __init__(self, values: list[float]):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def level(name: str, loss: Callable[..., torch.Tensor], values: list[float]) -> mo.Level:
    return mo.Level(name, Vector(values), loss, SGD(0.1))


def hypergradient(scale: float) -> torch.Tensor:
    def top_loss(levels: mo.Levels, _: None) -> torch.Tensor:
        return sum((view.params["w"] ** 2).sum() for view in (levels.a, levels.b, levels.c))

    def middle_loss(levels: mo.Levels, _: None) -> torch.Tensor:
        return ((levels.b.params["w"] - levels.a.params["w"]) ** 2).sum()

    def random_loss(levels: mo.Levels, _: None) -> torch.Tensor:
        rest = levels.c.params["w"] - levels.a.params["w"] - levels.b.params["w"]
        return (rest**2 * torch.rand(2)).sum()

    a, b = level("a", top_loss, [1.0, 2.0]), level("b", middle_loss, [0.5, 0.1])
    c = level("c", random_loss, [0.2, 0.3])
    rule = mo.T1T2(scale=0.1)
    edges = [(a, b, rule), (b, c, rule), (a, c, mo.T1T2(scale=scale))]
    graph = mo.LevelGraph([mo.Edge(up, low, differentiate=how) for up, low, how in edges])
    torch.manual_seed(0)
    return graph.hypergradient("a")["w"]


def test_they_see_the_same_random_numbers() -> None:
    """Rules that are all but equal, and so two, give what equal ones give, which are one."""
    torch.testing.assert_close(hypergradient(0.1), hypergradient(0.1 + 1e-12), rtol=1e-9, atol=0)
