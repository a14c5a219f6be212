"""Kronecker factors, and the solvers that use them, against dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

import metaopt as mo
from metaopt import tree

pytestmark = pytest.mark.usefixtures("float64")
DAMPING = 0.1


def dense(factors: mo.KroneckerFactors) -> Tensor:
    """Return the curvature as a matrix, from the inverse that the factors give."""
    n = tree.ravel(factors.like).numel()
    inverse = torch.stack([factors.solve(unit, DAMPING) for unit in torch.eye(n)], 1)
    return torch.linalg.inv(inverse) - DAMPING * torch.eye(n)


def gauss_newton(predict: Any, params: Any, x: Any, likelihood: str = "categorical") -> Tensor:
    """Return J' (d^2 l / df^2) J, the mean over the outputs, as a matrix."""
    at = tree.ravel(params).detach()
    J = jacrev(lambda v: predict(tree.unravel(v, params), x).flatten(0, -2))(at)
    p = predict(params, x).flatten(0, -2).detach().softmax(-1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    if likelihood == "normal":
        H = torch.eye(p.shape[1]).expand_as(H)
    return torch.einsum("nop,noq,nqr->pr", J, H, J) / len(p)


def perceptron(outputs: int = 2) -> mo.Functional:
    return mo.functional(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)))


# --- what the factors are


def test_the_inverse_is_that_of_the_dense_kronecker_products() -> None:
    net, x = perceptron(), torch.randn(7, 3)
    w1, b1, w2, b2 = (leaf.detach() for leaf in net.params.values())
    h = torch.tanh(x @ w1.T + b1)
    p = (h @ w2.T + b2).softmax(-1)
    G2 = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    back = w2[None] * (1 - h**2)[:, None]  # d logits / d first layer's outputs
    G1 = torch.einsum("noi,nop,npj->ij", back, G2, back) / 7
    blocks = []
    for a, G in ((x, G1), (h, G2.mean(0))):
        a = torch.cat([a, torch.ones(7, 1)], 1)
        K = torch.kron(G.contiguous(), a.T @ a / 7)  # of [W b], row by row
        out, wide = len(G), a.shape[1]
        # the leaves are W, then b
        order = torch.arange(out * wide).view(out, wide)
        order = torch.cat([order[:, :-1].flatten(), order[:, -1]])
        blocks.append(K[order][:, order])
    K, b = torch.block_diag(*blocks), torch.randn(26)
    for damping in (1e-4, 0.1):
        expected = torch.linalg.solve(K + damping * torch.eye(26), b)
        for chunk_size in (3, 256):
            factors = mo.KroneckerFactors(net, net.params, x, chunk_size=chunk_size)
            # the condition number is 2e3
            assert_close(factors.solve(b, damping), expected, 1e-10)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("likelihood", "examples"), [("categorical", 1), ("normal", 9)])
@pytest.mark.parametrize("bias", [False, True])
def test_one_layer_is_exact_with_one_example_or_a_normal_likelihood(
    corrected: bool, likelihood: Any, examples: int, bias: bool
) -> None:
    net, x = mo.functional(nn.Linear(3, 4, bias=bias)), torch.randn(examples, 3)
    factors = mo.KroneckerFactors(net, net.params, x, likelihood=likelihood, corrected=corrected)
    assert_close(dense(factors), gauss_newton(net, net.params, x, likelihood), 1e-10)


def test_corrected_eigenvalues_are_the_diagonal_of_the_blocks_in_the_eigenbasis() -> None:
    """With one row an example: also the trace is the true one, that of the factors is not."""
    net, x = perceptron(), torch.randn(7, 3)
    true = gauss_newton(net, net.params, x)
    plain = mo.KroneckerFactors(net, net.params, x)
    corrected = mo.KroneckerFactors(net, net.params, x, corrected=True, chunk_size=3)
    for (layer, block), before in zip(corrected.blocks.items(), plain.blocks.values(), strict=True):
        ends = torch.zeros(len(block.left), len(block.right), 26)
        for i in range(len(block.left)):
            for j in range(len(block.right)):
                parts = [torch.zeros_like(leaf) for leaf in net.params.values()]
                layer.split(torch.outer(block.left[:, i], block.right[:, j]), parts)
                ends[i, j] = tree.ravel(parts)
        assert_close(block.eigenvalues, torch.einsum("ijp,pq,ijq->ij", ends, true, ends), 1e-10)
        assert (before.eigenvalues.sum() / block.eigenvalues.sum() - 1).abs() > 1e-3
    blocks = torch.block_diag(true[:16, :16], true[16:, 16:])
    assert (dense(corrected) - blocks).norm() < (dense(plain) - blocks).norm()


def test_drawn_labels_are_right_in_the_mean() -> None:
    net, x = mo.functional(nn.Linear(2, 3)), torch.randn(1, 2)
    for likelihood in ("categorical", "normal"):
        factors = mo.KroneckerFactors(net, net.params, x, likelihood=likelihood, draws=500)
        true = gauss_newton(net, net.params, x, likelihood)
        # 4 standard errors of a mean of 500 squares, whose deviation is at most 2 of the mean
        assert (dense(factors) - true).norm() < 4 * 2 / 500**0.5 * true.norm()


# --- which parameters are whose


def test_frozen_parameters_have_no_block_and_biases_may_stand_alone() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(1, 3)
    model[0].requires_grad_(False)
    model[1].weight.requires_grad_(False)
    net = mo.functional(model)
    factors = mo.KroneckerFactors(net, net.params, x)
    assert_close(dense(factors), gauss_newton(net, net.params, x), 1e-10)
    assert not factors.others


def test_a_layer_used_twice_sums_over_its_uses() -> None:
    W, x = torch.randn(3, 3), torch.randn(1, 3)

    def twice(W: Tensor, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, W), W)

    J = torch.stack([torch.eye(3), W])  # of the outputs by what the uses return, last one first
    a = torch.cat([x @ W.T, x])
    G = torch.einsum("uoi,uoj->ij", J, J)
    factors = mo.KroneckerFactors(twice, W, x, likelihood="normal")
    assert_close(dense(factors), torch.kron(G, a.T @ a / 2), 1e-10)
    # with one example the corrected ones know the whole gradient, the sum over both uses
    corrected = mo.KroneckerFactors(twice, W, x, likelihood="normal", corrected=True)
    true = gauss_newton(twice, W, x, "normal")
    assert_close(dense(corrected).trace(), true.trace(), 1e-10)


def test_embeddings_and_convolutions_are_linear_layers() -> None:
    readout, symbols = torch.randn(2, 6), torch.tensor([[1, 3], [0, 3]])
    net = mo.functional(nn.Embedding(5, 3))

    def by_layer(W: Tensor, x: Tensor) -> Tensor:
        return F.linear(F.one_hot(x, 5).double(), W).flatten(1) @ readout.T

    found = dense(
        mo.KroneckerFactors(
            lambda params, x: net(params, x).flatten(1) @ readout.T, net.params, symbols
        )
    )
    order = torch.arange(15).view(5, 3).T.flatten()  # an embedding is the transposed matrix
    expected = mo.KroneckerFactors(by_layer, net.params["weight"].T, symbols)
    assert_close(found[order][:, order], dense(expected), 1e-10)

    # one patch is one row of a linear layer
    convolution = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(inplace=True), nn.Flatten())
    image, net = torch.randn(4, 2, 2, 2), mo.functional(convolution)
    weight, bias = net.params.values()
    of_layer = mo.KroneckerFactors(
        lambda p, x: F.linear(x.flatten(1), *p).relu(), [weight.flatten(1), bias], image
    )
    assert_close(dense(mo.KroneckerFactors(net, net.params, image)), dense(of_layer), 1e-10)


def test_a_strided_and_padded_convolution_has_the_true_diagonal() -> None:
    """In the eigenbasis, of each example's gradient over all places; one example a pass."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1, dilation=1), nn.Tanh())
    net, image = mo.functional(nn.Sequential(*model, nn.Flatten())), torch.randn(1, 1, 5, 5)
    corrected = mo.KroneckerFactors(
        net, net.params, image, likelihood="normal", corrected=True, chunk_size=1
    )
    true = gauss_newton(net, net.params, image, "normal")
    assert_close(dense(corrected).trace(), true.trace(), 1e-10)


def test_other_parameters_have_the_mean_of_their_curvature() -> None:
    norm = nn.LayerNorm(3)
    net = mo.functional(nn.Sequential(nn.Linear(3, 3), norm, nn.Linear(3, 2)))
    x = torch.randn(6, 3)
    factors = mo.KroneckerFactors(net, net.params, x, chunk_size=1)  # nothing to keep apart
    true = gauss_newton(net, net.params, x)
    found = dense(factors)
    assert_close(found[12:15, 12:15], true[12:15, 12:15].trace() / 3 * torch.eye(3), 1e-10)
    # in one pass signs keep the examples apart: right in the mean over seeds
    traces = torch.stack(
        [mo.KroneckerFactors(net, net.params, x, seed=seed).others[2] for seed in range(60)]
    )
    error = traces.std() / 60**0.5
    assert (traces.mean() - true[12:15, 12:15].trace() / 3).abs() < 4 * error


@pytest.mark.parametrize("tied", ["embedding", "product"])
def test_tied_weights_of_two_kinds_are_refused(tied: str) -> None:
    embedding, x = nn.Embedding(4, 3), torch.tensor([0, 3])
    net = mo.functional(embedding)

    def predict(params: Any, x: Tensor) -> Tensor:
        W = params["weight"]
        h = net(params, x)
        return F.linear(h, W) if tied == "embedding" else h @ W.T

    kind = "linear" if tied == "embedding" else "something else"
    with pytest.raises(ValueError, match=r"\['weight'\].*embedding.*" + kind) as error:
        mo.KroneckerFactors(predict, net.params, x)
    assert "Give each use a weight of its own" in str(error.value)


def test_in_half_precision_the_factors_are_single() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    net, x = mo.functional(model), torch.randn(7, 3)
    wide = mo.KroneckerFactors(net, net.params, x, corrected=True)
    half = mo.functional(model.bfloat16())
    narrow = mo.KroneckerFactors(half, half.params, x.bfloat16(), corrected=True)
    b = torch.randn(26, dtype=torch.float32)
    found, expected = narrow.solve(b, 0.1), wide.solve(b.double(), 0.1)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()  # eps of bfloat16 is .008


# --- the solvers


def regression() -> tuple[Any, mo.Functional, Tensor, Tensor, Tensor]:
    """Return (weighted loss, net, x, y, weights) of a softmax regression with a ridge."""
    net, x = mo.functional(nn.Linear(3, 2)), torch.randn(12, 3)
    y, weights = torch.randint(2, (12,)), torch.ones(12)

    def loss(params: Any, _: Any, weights: Tensor) -> Tensor:
        losses = F.cross_entropy(net(params, x), y, reduction="none")
        return (weights * losses).mean() + 0.05 * tree.ravel(params).square().sum()

    return loss, net, x, y, weights


def test_as_solvers_of_the_implicit_function_theorem() -> None:
    loss, net, x, y, weights = regression()

    def influence(solver: Any) -> Tensor:
        def test_loss(weights: Tensor) -> Tensor:
            w = mo.implicit(loss, net.params, meta=weights, solver=solver)
            return F.cross_entropy(net(w, x[:1]), y[:1])

        return grad(test_loss)(weights)

    exact = influence(mo.Direct())
    factors = mo.KroneckerFactors(net, net.params, x)
    # damping 0.1 is the ridge: the Hessian of a linear model is its Gauss-Newton matrix
    flat = tree.ravel(net.params).detach()
    K, v = (
        dense(factors),
        grad(lambda w: F.cross_entropy(net(tree.unravel(w, net.params), x[:1]), y[:1]))(flat),
    )
    mixed = jacrev(grad(lambda w, m: loss(tree.unravel(w, net.params), None, m)), 1)(flat, weights)
    expected = -torch.linalg.solve(K + 0.1 * torch.eye(8), v) @ mixed
    found = influence(mo.KFAC(factors, damping=0.1))
    assert_close(found, expected, 1e-10)
    assert 0.01 < (found - exact).norm() / exact.norm() < 0.3

    damped = influence(mo.Direct(damping=1e-6))
    assert_close(influence(mo.KFACCG(rtol=1e-13, factors=factors, damping=1e-6)), damped, 1e-9)


def test_the_preconditioner_is_faster_and_the_residual_is_that_of_the_operator() -> None:
    net, x = perceptron(5), torch.randn(100, 3) * torch.tensor([0.1, 1.0, 10.0])
    A = gauss_newton(net, net.params, x)
    b = tree.map(torch.randn_like, net.params)

    def matvec(v: Any) -> Any:
        return tree.unravel(A @ tree.ravel(v), b)

    factors = mo.KroneckerFactors(net, net.params, x, corrected=True)
    plain, ours = (
        mo.ConjugateGradient(max_steps=4, rtol=0, damping=1e-3)(matvec, b),
        mo.KFACCG(max_steps=4, rtol=0, factors=factors)(matvec, b),
    )
    true = torch.linalg.solve(A + 1e-3 * torch.eye(len(A)), tree.ravel(b))
    far, near = ((tree.ravel(out.value) - true).norm() / true.norm() for out in (plain, ours))
    assert near < far / 2
    once = mo.KFAC(factors)(matvec, b)
    r = tree.ravel(b) - (A @ tree.ravel(once.value) + 1e-3 * tree.ravel(once.value))
    assert_close(once.residual, r.norm() / tree.ravel(b).norm(), 1e-12)
    rows = tree.map(lambda leaf: torch.stack([leaf, 2 * leaf]), b)
    batched = vmap(lambda b: mo.KFAC(factors)(matvec, b).value)(rows)
    assert_close(tree.index(batched, 1), tree.map(lambda leaf: 2 * leaf, once.value), 1e-12)


def test_bad_arguments() -> None:
    net, x = perceptron(), torch.randn(5, 3)
    factors = mo.KroneckerFactors(net, net.params, x)
    assert mo.KFAC(factors) == mo.KFAC(factors, damping=1e-3)
    for options, message in (
        ({"likelihood": "poisson"}, "`likelihood` must be"),
        ({"draws": 0}, "`draws` must be a positive integer or None, got 0"),
        ({"chunk_size": 0}, "`chunk_size` must be a positive integer, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            mo.KroneckerFactors(net, net.params, x, **options)  # type: ignore[arg-type]
    for solver in (mo.KFAC, mo.KFACCG):
        name = solver.__name__
        with pytest.raises(ValueError, match=f"{name}: `damping` must be a positive number, got 0"):
            solver(factors=factors, damping=0)
        with pytest.raises(TypeError, match=f"{name}: `factors` must be Kronecker factors, got 3"):
            solver(factors=3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"`b` does not have .* missing \['0.bias'\]|missing"):
            solver(factors=factors)(lambda v: v, {"0.weight": torch.ones(4, 3)})
