"""Kronecker-factored curvature of the layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt import tree
from metaopt.checks import check_choice, check_count
from metaopt.linear_solve.layers import Layer, Recording, Use
from metaopt.tree import Tree

Likelihood = Literal["categorical", "normal"]


class KroneckerFactors:
    """The Gauss-Newton matrix H of a model, each layer's block as a Kronecker product.

    For the mean negative log-likelihood over all outputs f, H = E[J' (d^2 l / df^2) J] = E[g g'],
    the Fisher matrix, with the gradient g of -log p(y | f) for y drawn from the model. A layer s =
    W a has the gradient e a', with e = d(-log p) / ds, and its block is taken for

        E[a a' (x) e e'] = A (x) G,  A = E[a a'],  G = E[e e'],

    as if a and e were independent (blocks between layers count as 0). Exact for one layer with one
    example, or with the "normal" likelihood. With A = U_A S_A U_A' and G = U_G S_G U_G' a damped
    inverse costs four products of matrices. `corrected` puts the true second moments of g in this
    basis, E[(U_G' e a' U_A)^2], for S_G S_A': the best diagonal there is in it (EKFAC).

    Layers are the calls of `F.linear`, `F.conv2d` and `F.embedding` (one-hot a) whose weight or
    bias is a leaf of `params`, wherever they stand; a bias is the weight of a 1 in a. The rows of
    one example (positions of a sequence, places of an image), and the uses of a weight in several
    calls, count as independent examples. Any other parameter has the multiple of the identity that
    is next to its block, tr H / n. (So have the weights of `nn.MultiheadAttention`.) What is frozen
    is no leaf, and has no block.

    Args:
        predict: `predict(params, inputs)` returns the outputs [n, ..., outputs], for example a
            `functional(model)`.
        params: where the curvature is taken, a tree of floating-point tensors.
        inputs: what `predict` gets, a tree of tensors [n, ...].
        likelihood: "categorical" for `F.cross_entropy` of logits; "normal" for 1/2 |y - f|^2, of
            which `F.mse_loss` is 2 / outputs.
        corrected: whether the eigenvalues are corrected.
        draws: number of labels that are drawn for each output, or None for the expectation over all
            of them.
        chunk_size: examples in one forward pass.
        seed: of the drawn labels, and of signs that keep rows apart.

    Raises:
        ValueError: a parameter is used by layers of two kinds, by layers with different biases, or
            by a layer and otherwise (tied weights): no Kronecker product stands for both. Or
            something is not among what it can be.

    Cost:
        One forward pass, and `draws` (else as many as there are outputs) backward passes to the
        layers; both twice if `corrected`, with `chunk_size` gradients of each layer in memory. For
        a layer from m to n: m^2 + n^2 + m n numbers and the cubes of m and n, where an embedding
        reads as many as it has symbols.

    Reference:
        Martens, Grosse 2015, arXiv:1503.05671, section 3; George et al. 2018, arXiv:1806.03884,
        section 3; convolutions and shared weights: Eschenhagen et al. 2023, arXiv:2311.00636,
        "expand"; embeddings as in Grosse et al. 2023, arXiv:2308.03296.
    """

    def __init__(
        self,
        predict: Callable[[Tree, Tree], Tensor],
        params: Tree,
        inputs: Tree,
        *,
        likelihood: Likelihood = "categorical",
        corrected: bool = False,
        draws: int | None = None,
        chunk_size: int = 256,
        seed: int = 0,
    ):
        check_choice(self, "likelihood", likelihood, get_args(Likelihood))
        check_count(self, "chunk_size", chunk_size)
        if draws is not None:
            check_count(self, "draws", draws, or_none=True)
        self.like = tree.map(torch.Tensor.detach, params)
        run = _Run(predict, self.like, inputs, likelihood, draws, chunk_size, seed)
        moments = _Moments()
        run.visit(moments.read, moments.respond)
        self.blocks = {layer: _decompose(moments, layer, run.outputs) for layer in moments.rows}
        if corrected:
            squares = _Squares(self.blocks)
            run.visit(squares.read, squares.respond)
            self.blocks = {
                layer: block._replace(eigenvalues=squares.sums[layer] / run.outputs)
                for layer, block in self.blocks.items()
            }
        self.others = {
            place: total / run.outputs / tree.leaves(self.like)[place].numel()
            for place, total in run.traces.items()
        }

    def solve(self, b: Tensor, damping: float) -> Tensor:
        """Return (H + damping I)^-1 b, for all leaves in a row, [n]."""
        leaves = tree.leaves(self.like)
        parts = [
            part.reshape(leaf.shape)
            for part, leaf in zip(b.split([leaf.numel() for leaf in leaves]), leaves, strict=True)
        ]
        for place, curvature in self.others.items():
            parts[place] = parts[place] / (curvature.to(b) + damping)
        for layer, block in self.blocks.items():
            left, right, eigenvalues = (tensor.to(b) for tensor in block)
            rotated = left.T @ layer.join(parts) @ right
            layer.split(left @ (rotated / (eigenvalues + damping)) @ right.T, parts)
        return torch.cat([part.reshape(-1) for part in parts])


class _Block(NamedTuple):
    """The eigenvectors U_G [n, n] and U_A [m, m], and the eigenvalues [n, m]."""

    left: Tensor
    right: Tensor
    eigenvalues: Tensor


class _Moments:
    """Sums of a a' and e e' over all rows."""

    def __init__(self) -> None:
        self.inputs: dict[Layer, Tensor] = {}
        self.slopes: dict[Layer, Tensor] = {}
        self.rows: dict[Layer, int] = {}

    def read(self, layer: Layer, rows: Tensor) -> None:
        a = rows.flatten(0, 1)
        self.inputs[layer] = self.inputs.get(layer, 0) + a.T @ a
        self.rows[layer] = self.rows.get(layer, 0) + len(a)

    def respond(self, uses: list[Use]) -> None:
        for use in uses:
            e = use.slopes.flatten(0, 1)
            self.slopes[use.layer] = self.slopes.get(use.layer, 0) + e.T @ e


class _Squares:
    """Sums over examples of the squared gradients in the eigenbasis."""

    def __init__(self, blocks: dict[Layer, _Block]):
        self.blocks = blocks
        self.sums = {layer: torch.zeros_like(block.eigenvalues) for layer, block in blocks.items()}

    def read(self, layer: Layer, rows: Tensor) -> Tensor:
        return rows @ self.blocks[layer].right

    def respond(self, uses: list[Use]) -> None:
        # A weight's gradient is the sum over its uses and the rows of an example.
        grads: dict[Layer, Tensor] = {}
        for use in uses:
            e = use.slopes @ self.blocks[use.layer].left
            grad = e.transpose(1, 2) @ use.kept
            grads[use.layer] = grads.get(use.layer, 0) + grad
        for layer, grad in grads.items():
            self.sums[layer] = self.sums[layer] + grad.square().sum(0)


class _Run:
    """Passes of a model over its inputs, chunk by chunk, with gradients of drawn likelihoods.

    Attributes:
        outputs: number of outputs, in all rows.
        traces: place of a parameter that no layer has -> sum of its squared gradients.
    """

    def __init__(
        self,
        predict: Callable[[Tree, Tree], Tensor],
        params: Tree,
        inputs: Tree,
        likelihood: Likelihood,
        draws: int | None,
        chunk_size: int,
        seed: int,
    ):
        self.predict, self.params, self.likelihood = predict, params, likelihood
        self.draws, self.seed = draws, seed
        parts = [leaf.split(chunk_size) for leaf in tree.leaves(inputs)]
        self.chunks = [tree.with_leaves(inputs, chunk) for chunk in zip(*parts, strict=True)]
        self.outputs = 0
        self.traces: dict[int, Tensor] = {}

    def visit(
        self, read: Callable[[Layer, Tensor], Any], respond: Callable[[list[Use]], None]
    ) -> None:
        """Call `read` with what each layer reads, `respond` with the slopes of each direction."""
        generator = torch.Generator().manual_seed(self.seed)
        self.outputs, self.traces = 0, {}
        names = [name for name, _ in tree.named_leaves(self.params)]
        for chunk in self.chunks:
            with torch.enable_grad():
                given = [leaf.detach().requires_grad_() for leaf in tree.leaves(self.params)]
                recording = Recording(dict(zip(names, given, strict=True)), read)
                with recording:
                    f = self.predict(tree.with_leaves(self.params, given), chunk)
            others = recording.others()
            wanted = recording.probes + [given[place] for place in others]
            for u in self._directions(f.detach(), generator):
                slopes = torch.autograd.grad(
                    f, wanted, u, retain_graph=True, materialize_grads=True
                )
                calls = len(recording.probes)
                respond(recording.uses(slopes[:calls]))
                for place, slope in zip(others, slopes[calls:], strict=True):
                    self.traces[place] = self.traces.get(place, 0) + slope.square().sum()
            self.outputs += f.shape[:-1].numel()

    def _directions(self, f: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield u [n, ..., outputs], of which the sum of u u' is d^2 l / df^2 for each row.

        Rows have signs of their own, so that in expectation nothing is left of products of two.
        """
        C = f.shape[-1]
        p = f.softmax(-1)
        for c in range(C if self.draws is None else self.draws):
            sign = 2.0 * torch.randint(2, (*f.shape[:-1], 1), generator=generator) - 1
            if self.draws is None:
                unit = torch.eye(C).to(f)[c].expand_as(f)
                u = (
                    (unit - p) * p[..., c : c + 1].sqrt()
                    if self.likelihood == "categorical"
                    else unit
                )
            elif self.likelihood == "categorical":
                places = torch.multinomial(p.flatten(0, -2).cpu(), 1, generator=generator)
                u = F.one_hot(places.to(f.device), C).view_as(f).to(f) - p
            else:
                u = torch.randn(f.shape, generator=generator).to(f)
            yield u * sign.to(f) / (self.draws or 1) ** 0.5


def _decompose(moments: _Moments, layer: Layer, outputs: int) -> _Block:
    """Return the eigenvectors and eigenvalues of A (x) G."""
    of_inputs, right = torch.linalg.eigh(moments.inputs[layer] / moments.rows[layer])
    of_slopes, left = torch.linalg.eigh(moments.slopes[layer] / outputs)
    return _Block(left, right, of_slopes.clamp(min=0)[:, None] * of_inputs.clamp(min=0))
