"""A learned linear map of the gradient of each tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn

from metaopt import tree
from metaopt.optimizer import Optimizer
from metaopt.optimizer.names import paths
from metaopt.transforms import is_differentiable
from metaopt.tree import Tree

from .transform import Call, Transform

Shapes = Mapping[str, tuple[int, ...]]


class MetaCurvature(Transform):
    """g = g x_1 M_1 x_2 M_2 ..., a learned matrix for each axis of each gradient.

    Of a matrix it is M_1 g M_2^T, of a vector M_1 g. The last two axes of a tensor with four, the
    height and width of a filter, count as one, of height x width entries. All matrices are the
    identity at first, are learned, saved and loaded, and have the dtype of the parameters, at least
    float32. `MetaCurvature(net.params, SGD(0.1))`.

    Args:
        params: the tree of parameters that will be updated, for names, shapes, precision and
            device; or name -> shape.
        optimizer: what sees the changed gradients.

    Raises:
        ValueError: there are no parameters, one has no axis or more than four, or (in a step)
            others are updated.
        TypeError: a leaf is not a real floating-point tensor.

    Cost:
        For a matrix of n x k entries n^2 + k^2 weights and n k (n + k) multiplications a step.

    Reference:
        Park and Oliva 2019, arXiv:1902.03356, section 3; M_1 is their M_o, M_2 M_i, M_3 M_f.
    """

    def __init__(self, params: Tree, optimizer: Optimizer):
        super().__init__(optimizer)
        named = paths(params) if not _are_shapes(params) else dict(params)
        if not named:
            raise ValueError("MetaCurvature: `params` must hold at least one tensor, got none.")
        self.params = {name: _shape_of(name, leaf) for name, leaf in named.items()}
        dtype, device = torch.float32, None
        for leaf in named.values():
            if isinstance(leaf, Tensor):
                dtype, device = torch.promote_types(dtype, leaf.dtype), leaf.device
        self._matrices = nn.ModuleList(
            nn.ParameterList(torch.eye(n, dtype=dtype, device=device) for n in _sizes(shape))
            for shape in self.params.values()
        )

    @property
    def matrices(self) -> dict[str, list[Tensor]]:
        """Name of a parameter -> its matrices, one for each axis."""
        rows = cast(Iterable[Iterable[Tensor]], self._matrices)
        return {name: list(row) for name, row in zip(self.params, rows, strict=True)}

    def _observed(self, call: Call) -> Tree:
        grads, matrices = paths(call.grads), self.matrices
        if grads.keys() != matrices.keys():
            missing = sorted(matrices.keys() - grads.keys())
            unknown = sorted(grads.keys() - matrices.keys())
            raise ValueError(
                f"MetaCurvature: `params` must be those that are updated, missing {missing}, "
                f"unknown {unknown}. Write MetaCurvature(params, optimizer) with their tree."
            )
        curved = {
            name: grad if grad is None else curve(grad, matrices[name])
            for name, grad in grads.items()
        }
        return tree.with_leaves(call.grads, curved.values())


def curve(grad: Tensor, matrices: list[Tensor]) -> Tensor:
    """Return the product of a gradient with a matrix along each axis."""
    sizes = [len(matrix) for matrix in matrices]
    if grad.numel() != torch.Size(sizes).numel():
        raise ValueError(
            f"MetaCurvature: a gradient must have the shape of its parameter in `params`, got "
            f"{tuple(grad.shape)} for matrices of {sizes} rows."
        )
    x = grad.to(matrices[0].dtype).reshape(sizes)
    # each product puts its axis last, so that after all of them the first is first again
    x = reduce(lambda x, matrix: x.movedim(0, -1) @ matrix.mT, matrices, x)
    return x.reshape(grad.shape).to(grad.dtype)


def _sizes(shape: tuple[int, ...]) -> list[int]:
    """Return the number of entries along each axis, of which the fourth belongs to the third."""
    return [*shape[:2], torch.Size(shape[2:]).numel()] if len(shape) > 2 else [*shape]


def _are_shapes(params: Tree) -> bool:
    return isinstance(params, Mapping) and all(
        isinstance(shape, tuple | list) and all(type(size) is int for size in shape)
        for shape in params.values()
    )


def _shape_of(name: str, leaf: Any) -> tuple[int, ...]:
    """Return the shape of a parameter.

    Raises:
        TypeError: it is no real floating-point tensor.
        ValueError: it has no axis, or more than four.
    """
    if isinstance(leaf, tuple | list):
        shape = tuple(leaf)
    elif not is_differentiable(leaf) or leaf.is_complex():
        kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
        raise TypeError(
            f"MetaCurvature: `params` must be real floating-point tensors, got {kind} at {name!r}."
        )
    else:
        shape = tuple(leaf.shape)
    if not 1 <= len(shape) <= 4:
        raise ValueError(
            f"MetaCurvature: `params` must have 1 to 4 axes, got shape {shape} at {name!r}. Give "
            'it to another optimizer: `Grouped({"scale": SGD(0.1), "*": ...})`.'
        )
    return shape
