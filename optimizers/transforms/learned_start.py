"""Learned initial parameters."""

from __future__ import annotations

from torch import Tensor, nn

from metaopt import tree
from metaopt.optimizer import Optimizer
from metaopt.optimizer.names import paths
from metaopt.tree import Tree

from ..for_params import named_params
from .transform import Transform


class LearnedStart(Transform):
    """w_0 is learned: episodes of training and evaluation start at parameters of the optimizer.

    `MetaTraining` then trains the initial parameters, with any estimator and beside everything else
    that the optimizer learns: MAML by evolution strategies or by truncated backpropagation, for
    example.
    The updates are those of the optimizer behind. `minimize`, levels and `as_torch` begin at the
    parameters that they are given, which are `optimizer.initial(params)` for the learned ones.
    Parameters that are tied are one as long as they are not saved and loaded.

    Args:
        params: the initial parameters, a tree like that of the tasks, or a dict of some of them by
            name: the others start where each task says. An `nn.Parameter` is taken as it is, so
            that the model of `functional(model).params` learns; of a tensor, a copy.
        optimizer: what moves the parameters.

    Raises:
        ValueError: there are no parameters. Where it starts: the tasks have no such parameter, or
            one of another shape or dtype.
        TypeError: a leaf is not a floating-point or complex tensor.

    Cost:
        One copy of the initial parameters.

    Reference:
        Finn, Abbeel, Levine 2017, arXiv:1703.03400; by evolution strategies: Song et al. 2020,
        arXiv:1910.01215; with a learned optimizer: Ravi, Larochelle, ICLR 2017.
    """

    def __init__(self, params: Tree, optimizer: Optimizer):
        super().__init__(optimizer)
        named = named_params("LearnedStart", params)
        if not named:
            raise ValueError(f"LearnedStart: `params` must have a parameter, got {params!r}.")
        self.names = tuple(named)
        self.starts = nn.ParameterList(
            one if isinstance(one, nn.Parameter) else nn.Parameter(one.detach().clone())
            for one in named.values()
        )

    @property
    def params(self) -> dict[str, Tensor]:
        """Name of a parameter -> where it starts."""
        return dict(zip(self.names, self.starts, strict=True))

    def initial(self, params: Tree) -> Tree:
        named = paths(params)
        for name, start in self.params.items():
            given = named.get(name)
            if given is None or (given.shape, given.dtype) != (start.shape, start.dtype):
                found = f"only {sorted(named)}" if given is None else _describe(given)
                raise ValueError(
                    f"LearnedStart: the tasks must have the parameter {name!r}, "
                    f"{_describe(start)}, got {found}. Give the parameters of the tasks' own "
                    "network."
                )
        return tree.with_leaves(params, [self.params.get(name, named[name]) for name in named])


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}"
