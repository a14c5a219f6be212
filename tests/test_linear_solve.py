"""Solvers of linear systems on trees, against dense algebra and against their theory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor
from torch.func import grad, vmap

import metaopt as mo
from metaopt import tree
from metaopt.linear_solve import LinearSolver

pytestmark = pytest.mark.usefixtures("float64")

TIGHT: dict[str, Any] = {"max_steps": 40, "rtol": 1e-13}
EXACT: list[LinearSolver] = [  # for symmetric positive definite systems
    mo.ConjugateGradient(**TIGHT),
    mo.NormalCG(**TIGHT),
    mo.GMRES(**TIGHT),
    mo.BiCGStab(**TIGHT),
    mo.NystromCG(**TIGHT, rank=3),
    mo.Direct(),
]
APPROXIMATE: list[LinearSolver] = [mo.Neumann(0.2, terms=7), mo.Nystrom(rank=3, damping=0.1)]
ANY: list[LinearSolver] = [
    solver for solver in EXACT if not isinstance(solver, mo.ConjugateGradient)
]


def named(solvers: list[LinearSolver]) -> Any:
    return pytest.mark.parametrize("solver", solvers, ids=lambda solver: type(solver).__name__)


def matvec(A: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: A @ x


def spd(n: int) -> Tensor:
    root = torch.randn(n, n)
    return root @ root.T / n + torch.eye(n) / 2


def relative(x: Tensor, true: Tensor) -> Tensor:
    return (x - true).norm() / true.norm()


# --- the seeded quadratic: inner 1/2 w'Hw - w'B lam, outer 1/2 |w - c|^2, hypergradient B'H^-1 (w*
# - c)


def quadratic() -> tuple[Tensor, Tensor, Tensor]:
    """Return (H, B, v = w* - c)."""
    A, B, c, lam = torch.randn(5, 5), torch.randn(5, 5), torch.randn(5), torch.randn(5)
    H = A @ A.T / 5 + torch.eye(5) / 2
    return H, B, torch.linalg.solve(H, B @ lam) - c


HYPERGRADIENT = [-11.528753, 10.934745, -1.423259, -24.644045, -3.153058]


@named([*EXACT, mo.ConjugateGradient(max_steps=5)])
def test_the_seeded_quadratic(solver: LinearSolver) -> None:
    H, B, v = quadratic()
    expected = torch.tensor(HYPERGRADIENT)
    # printed to six digits
    assert_close(B.T @ v, torch.tensor([-5.881346, 6.578753, -0.461856, -17.62542, 0.585752]), 1e-6)
    out = solver(matvec(H), v)
    assert_close(B.T @ out.value, expected, 1e-6)
    assert_close(out.value, torch.linalg.solve(H, v), 1e-11)  # the condition number is 8
    assert out.residual < 1e-12


@pytest.mark.parametrize(
    ("solver", "error"),
    [
        (mo.Neumann(0.25, terms=10), 0.209266),
        (mo.Neumann(0.25, terms=11), 0.180975),
        (mo.ConjugateGradient(max_steps=2), 0.055735),
    ],
)
def test_errors_of_few_steps(solver: LinearSolver, error: float) -> None:
    H, B, v = quadratic()
    exact = B.T @ torch.linalg.solve(H, v)
    assert_close(relative(B.T @ solver(matvec(H), v).value, exact), torch.tensor(error), 1e-6)


# --- 20 dimensions, condition number 316


def stiff() -> tuple[Tensor, Tensor, Tensor]:
    """Return (A, b, its eigenvalues from 10^-2 to 10^0.5)."""
    eigenvalues = torch.logspace(-2, 0.5, 20)
    Q, _ = torch.linalg.qr(torch.randn(20, 20))
    return Q @ eigenvalues.diag() @ Q.T, torch.randn(20), eigenvalues


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_cg_is_the_best_of_its_krylov_space(steps: int) -> None:
    """In the norm x'Ax. Later, rounding costs every Krylov method some of its best."""
    A, b, _ = stiff()
    true = torch.linalg.solve(A, b)
    krylov = [b / b.norm()]
    for _ in range(steps - 1):
        vector = A @ krylov[-1]
        for _ in range(2):
            vector = vector - torch.stack(krylov).T @ (torch.stack(krylov) @ vector)
        krylov.append(vector / vector.norm())
    V = torch.stack(krylov, 1)
    best = V @ torch.linalg.solve(V.T @ A @ V, V.T @ b)
    out = mo.ConjugateGradient(max_steps=steps, rtol=0)(matvec(A), b)
    assert_close(out.value, best, 1e-8)
    error = out.value - true
    rate = (316**0.5 - 1) / (316**0.5 + 1)
    assert error @ A @ error <= (2 * rate**steps) ** 2 * (true @ A @ true)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_gmres_and_normal_cg_have_the_least_residual_of_their_spaces(steps: int) -> None:
    A, b, _ = stiff()
    A = A + 0.1 * torch.randn(20, 20)
    for solver, root, B in ((mo.GMRES, b, A), (mo.NormalCG, A.T @ b, A.T @ A)):
        krylov = [root / root.norm()]
        for _ in range(steps - 1):
            vector = B @ krylov[-1]
            for _ in range(2):
                vector = vector - torch.stack(krylov).T @ (torch.stack(krylov) @ vector)
            krylov.append(vector / vector.norm())
        V = torch.stack(krylov, 1)
        least = (b - A @ V @ torch.linalg.lstsq(A @ V, b[:, None]).solution[:, 0]).norm() / b.norm()
        out = solver(max_steps=steps, rtol=0)(matvec(A), b)
        # the squared condition number, 1e5 and more, times 1e-16, in 6 steps
        assert_close(out.residual, least, 1e-8)
        assert_close((b - A @ out.value).norm() / b.norm(), out.residual, 1e-10)


@pytest.mark.parametrize("terms", [1, 20, 200])
def test_neumann_leaves_one_minus_eta_mu_to_the_terms(terms: int) -> None:
    A, _, eigenvalues = stiff()
    vectors = torch.linalg.eigh(A).eigenvectors
    left = (1 - 0.3 * eigenvalues) ** terms
    out = mo.Neumann(0.3, terms=terms)(matvec(A), vectors.sum(1))
    assert_close(vectors.T @ out.value, (1 - left) / eigenvalues, 1e-10)
    assert_close(out.residual, left.norm() / 20**0.5, 1e-10)
    assert out.steps == terms


@pytest.mark.parametrize("rank", [1, 10, 20, 50])
def test_nystrom_equals_its_formula(rank: int) -> None:
    """x = b / rho - C (W + C'C / rho)^-1 C'b / rho^2, with the columns C that the seed chooses.

    (H + rho)^-1 b for all of them.
    """
    H, b, _ = stiff()
    rho, k = 0.1, min(rank, 20)
    K = torch.randperm(20, generator=torch.Generator().manual_seed(3))[:k]
    C, W = H[:, K], H[K][:, K]
    expected = b / rho - C @ torch.linalg.solve(W + C.T @ C / rho, C.T @ b) / rho**2
    out = mo.Nystrom(rank=rank, damping=rho, seed=3)(matvec(H), b)
    assert_close(out.value, expected, 1e-8)  # by hand the condition number is squared: 1e5
    if k == 20:
        assert_close(out.value, torch.linalg.solve(H + rho * torch.eye(20), b), 1e-9)
    true = b - H @ out.value - rho * out.value
    assert_close(out.residual, true.norm() / b.norm(), 1e-10)


def test_nystrom_with_columns_of_zeros() -> None:
    """A dead unit has no curvature: what its columns say is that nothing is there."""
    H = torch.zeros(6, 6)
    H[:3, :3] = spd(3)
    b = torch.randn(6)
    out = mo.Nystrom(rank=6, damping=0.5)(matvec(H), b)
    assert_close(out.value, torch.linalg.solve(H + torch.eye(6) / 2, b), 1e-12)
    once = mo.NystromCG(rank=5, damping=0.5, rtol=1e-13)(matvec(H), b)
    assert_close(once.value, out.value, 1e-11)


def test_a_sketch_of_the_large_eigenvalues_saves_steps() -> None:
    """Rank 30 and damping, as of a Hessian on little data.

    A sketch of 40 columns takes all there is, to rounding.
    """
    eigenvalues = torch.cat([torch.logspace(1, 4, 30), torch.zeros(370)])
    Q, _ = torch.linalg.qr(torch.randn(400, 400))
    A, b = (Q * eigenvalues) @ Q.T, torch.randn(400)
    plain = mo.ConjugateGradient(max_steps=200, rtol=1e-8, damping=1.0)(matvec(A), b)
    sketched = mo.NystromCG(max_steps=200, rtol=1e-8, rank=40, damping=1.0)(matvec(A), b)
    assert plain.steps > 30
    assert sketched.steps <= 3
    for out in (plain, sketched):
        assert (b - A @ out.value - out.value).norm() / b.norm() < 1.1e-8


# --- every solver


@named([*EXACT, *APPROXIMATE])
def test_several_leaves_equal_the_dense_solve(solver: LinearSolver) -> None:
    """All blocks between leaves count, of three shapes."""
    b = {"w": torch.randn(2, 3), "b": [torch.randn(()), torch.randn(2)]}
    A = spd(9)

    def on_trees(x: Any) -> Any:
        return tree.unravel(A @ tree.ravel(x), b)

    out = solver(on_trees, b)
    assert tree.flatten(out.value)[1] == tree.flatten(b)[1]
    assert [leaf.shape for leaf in tree.leaves(out.value)] == [
        leaf.shape for leaf in tree.leaves(b)
    ]
    assert_close(tree.ravel(out.value), solver(matvec(A), tree.ravel(b)).value, 0)
    if solver in EXACT:
        assert_close(tree.ravel(out.value), torch.linalg.solve(A, tree.ravel(b)), 1e-11)
        assert out.residual < 1e-11
    assert out.steps.dtype == torch.int64
    assert out.steps.shape == out.residual.shape == ()


@named([replace(solver, damping=0.7) for solver in [*EXACT, *APPROXIMATE]])
def test_damping_is_added_to_the_diagonal(solver: LinearSolver) -> None:
    A, b = spd(6), torch.randn(6)
    shifted = A + 0.7 * torch.eye(6)
    out = solver(matvec(A), b)
    if isinstance(solver, mo.Neumann):
        expected = sum(
            0.2 * torch.linalg.matrix_power(torch.eye(6) - 0.2 * shifted, i) @ b for i in range(7)
        )
        assert_close(out.value, expected, 1e-11)
    elif not isinstance(solver, mo.Nystrom):
        assert_close(out.value, torch.linalg.solve(shifted, b), 1e-11)
    assert_close(out.residual, (b - shifted @ out.value).norm() / b.norm(), 1e-11)


@named([*EXACT, *APPROXIMATE])
@pytest.mark.parametrize("scale", [2.0**-664, 2.0**-10, 2.0**23, 2.0**664])
def test_results_scale_with_the_right_hand_side(solver: LinearSolver, scale: float) -> None:
    """Powers of two leave every digit as it is.

    So rounding cannot decide about one more step.
    """
    A, b = spd(6), torch.randn(6)
    one, scaled = solver(matvec(A), b), solver(matvec(A), scale * b)
    assert_close(scaled.value / scale, one.value, 1e-11)
    assert_close(scaled.residual, one.residual, 1e-11)
    assert scaled.steps == one.steps


@named(
    [
        *EXACT,
        mo.ConjugateGradient(max_steps=3),
        mo.NormalCG(max_steps=3),
        mo.GMRES(max_steps=3),
        mo.BiCGStab(max_steps=3),
    ]
)
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-10, 2.0**23, 2.0**100])
def test_results_scale_with_the_operator(solver: LinearSolver, scale: float) -> None:
    """Also when the method has not converged yet: there is no step size in it."""
    A, b = spd(6), torch.randn(6)
    one, scaled = solver(matvec(A), b), solver(matvec(scale * A), b)
    assert_close(scaled.value * scale, one.value, 1e-10)
    assert scaled.steps == one.steps


@named(ANY)
@pytest.mark.parametrize("kind", ["indefinite", "not symmetric", "rotation"])
def test_operators_that_are_not_positive_definite(solver: LinearSolver, kind: str) -> None:
    A = {
        "indefinite": torch.diag(torch.tensor([-2.0, -1, 0.5, 1, 3, 4])),
        "not symmetric": spd(6) + torch.randn(6, 6).triu(1),
        "rotation": torch.block_diag(*[torch.tensor([[0.3, 1.0], [-1.0, 0.3]])] * 3),
    }[kind]
    b = torch.randn(6)
    out = solver(matvec(A), b)
    assert_close(out.value, torch.linalg.solve(A, b), 1e-9)
    assert out.residual < 1e-9


def test_conjugate_gradients_pass_over_negative_curvature_and_say_what_is_left() -> None:
    A = torch.diag(torch.tensor([1.0, -1.0]))
    b = torch.tensor([1.0, 1.0])  # b'Ab = 0: the very first step is undefined
    out = mo.ConjugateGradient()(matvec(A), b)
    assert_close(out.value, torch.zeros(2), 0)
    assert_close(out.residual, torch.tensor(1.0), 1e-15)
    assert mo.BiCGStab()(matvec(torch.tensor([[0.0, 1.0], [-1.0, 0.0]])), b).value.isfinite().all()


@named([*EXACT, *APPROXIMATE])
def test_a_right_hand_side_of_zeros(solver: LinearSolver) -> None:
    zero = {"a": torch.zeros(3), "b": torch.zeros(2, 1)}
    A = spd(5)

    def on_trees(x: Any) -> Any:
        return tree.unravel(A @ tree.ravel(x), zero)

    for start in (None, tree.map(torch.ones_like, zero)):
        out = solver(on_trees, zero, start=start)
        assert_close((out.value, out.residual), (zero, torch.tensor(0.0)), 0)

    b = torch.zeros(5)
    jacobian = torch.func.jacrev(lambda b: solver(matvec(A), b).value)(b)
    assert jacobian.isfinite().all()


@named(
    [
        mo.ConjugateGradient(**TIGHT),
        mo.NormalCG(**TIGHT),
        mo.GMRES(**TIGHT),
        mo.BiCGStab(**TIGHT),
        mo.NystromCG(**TIGHT, rank=2),
    ]
)
def test_a_start_saves_steps(solver: LinearSolver) -> None:
    A, b = spd(12), torch.randn(12)
    true = torch.linalg.solve(A, b)
    cold = solver(matvec(A), b)
    warm = solver(matvec(A), b, start=true + 1e-9 * torch.randn(12))
    assert_close(warm.value, true, 1e-11)
    assert warm.steps < cold.steps
    done = solver(matvec(A), b, start=true)
    assert done.steps <= 1  # its residual is that of rounding
    assert_close(done.value, true, 1e-12)


def test_neumann_goes_on_from_a_start() -> None:
    A, b = spd(6), torch.randn(6)
    half = mo.Neumann(0.2, terms=4)(matvec(A), b)
    assert_close(
        mo.Neumann(0.2, terms=3)(matvec(A), b, start=half.value).value,
        mo.Neumann(0.2, terms=7)(matvec(A), b).value,
        1e-13,
    )


@named([*EXACT, *APPROXIMATE])
def test_batches_equal_a_loop(solver: LinearSolver) -> None:
    """Elements that converge at once, in two steps, late, and one that is zero."""
    A = torch.stack(
        [torch.eye(6), torch.diag(torch.tensor([1.0, 1, 1, 2, 2, 2])), spd(6), spd(6), spd(6)]
    )
    b = torch.randn(5, 6)
    b[4] = 0
    if hasattr(solver, "rtol"):
        # apart from rounding, which would change the number of steps
        solver = replace(solver, rtol=1e-9)
    batched = vmap(lambda A, b: solver(matvec(A), b))(A, b)
    looped = [solver(matvec(A[i]), b[i]) for i in range(5)]
    assert_close(batched.value, torch.stack([one.value for one in looped]), 1e-12)
    assert_close(batched.residual, torch.stack([one.residual for one in looped]), 1e-12)
    assert batched.steps.tolist() == [int(one.steps) for one in looped]
    shared = vmap(lambda b: solver(matvec(A[3]), b))(b)
    assert_close(shared.value, torch.stack([solver(matvec(A[3]), one).value for one in b]), 1e-12)


@named(
    [
        solver
        for solver in EXACT
        if isinstance(solver, mo.ConjugateGradient | mo.NormalCG | mo.GMRES)
    ]
)
def test_what_has_converged_stays_as_it_is(solver: LinearSolver) -> None:
    """Nothing drifts, whatever the number of masked steps."""
    A, b = torch.stack([torch.eye(6), spd(6)]), torch.randn(2, 6)
    short, long = (
        vmap(lambda A, b, n=n: replace(solver, max_steps=n)(matvec(A), b))(A, b)  # type: ignore[call-arg]
        for n in (8, 60)
    )
    assert_close(long.value, short.value, 1e-14)
    assert_close(long.steps, short.steps, 0)


@named([*EXACT, *APPROXIMATE])
def test_derivatives_through_a_solver(solver: LinearSolver) -> None:
    """Of <g, A(t)^-1 b(t)>.

    Through the iterations, which for exact methods is the derivative of the inverse.
    """
    A, D, b, g = spd(4), torch.randn(4, 4), torch.randn(4), torch.randn(4)
    D = D + D.T

    def value(t: Tensor) -> Tensor:
        return g @ solver(matvec(A + t * D), b + t * g).value

    t, h = torch.tensor(0.01), 1e-5
    slope = grad(value)(t)
    if solver in EXACT:
        x, y = torch.linalg.solve(A + t * D, torch.stack([b + t * g, g], 1)).T
        assert_close(slope, y @ g - y @ D @ x, 1e-8)
    assert_close(slope, (value(t + h) - value(t - h)) / (2 * h), 1e-7)  # h^2
    assert_close(vmap(grad(value))(t.expand(2)), slope.expand(2), 1e-12)


@named([*EXACT, *APPROXIMATE])
def test_under_compile(solver: LinearSolver) -> None:
    torch._dynamo.reset()
    A, b = spd(4), torch.randn(3, 4)
    if hasattr(solver, "max_steps"):
        solver = replace(solver, max_steps=2)

    def value(b: Tensor) -> Tensor:
        return solver(matvec(A), b).value

    for function, at in ((value, b[0]), (vmap(grad(lambda b: value(b).square().sum())), b)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_close(compiled(at), function(at), 1e-12)


@named([*EXACT, *APPROXIMATE])
def test_single_precision(solver: LinearSolver) -> None:
    A, b = spd(6).float(), torch.randn(6).float()
    out = solver(matvec(A), b)
    exact = solver(matvec(A.double()), b.double())
    assert out.value.dtype == torch.float32
    # condition 8, eps 1.2e-7, 40 steps
    assert (out.value - exact.value).norm() < 2e-5 * exact.value.norm()
    mixed = {"low": b[:2].half(), "high": b[2:].double()}
    found = solver(lambda x: tree.unravel(A.double() @ tree.ravel(x), mixed), mixed).value
    assert [leaf.dtype for leaf in found.values()] == [torch.float16, torch.float64]


def test_seeds_choose_and_nothing_global_does() -> None:
    A, b = spd(12), torch.randn(12)
    before = torch.get_rng_state()
    values = [mo.Nystrom(rank=3, seed=seed)(matvec(A), b).value for seed in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_randomness_in_the_operator_is_the_same_for_all_columns() -> None:
    """A Hessian under dropout is one matrix only if its columns share the mask."""
    A = spd(6)
    torch.manual_seed(1)
    out = mo.Direct()(lambda x: A @ x * (1 + torch.rand(6)), torch.ones(6))
    torch.manual_seed(1)
    assert_close(out.value, torch.linalg.solve(A, 1 / (1 + torch.rand(6))), 1e-12)


# --- errors


def test_bad_arguments() -> None:
    with pytest.raises(
        ValueError, match="ConjugateGradient: `max_steps` must be a positive integer, got 0"
    ):
        mo.ConjugateGradient(max_steps=0)
    with pytest.raises(
        ValueError, match="GMRES: `rtol` must be a finite number, at least 0, got -1"
    ):
        mo.GMRES(rtol=-1)
    with pytest.raises(
        ValueError, match="Direct: `damping` must be a finite number, at least 0, got nan"
    ):
        mo.Direct(damping=float("nan"))
    with pytest.raises(ValueError, match="Nystrom: `damping` must be a positive number, got 0"):
        mo.Nystrom(damping=0)
    with pytest.raises(ValueError, match="Neumann: `step_size` must be a positive number, got '1'"):
        mo.Neumann("1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NystromCG: `rank` must be a positive integer, got 2"):
        mo.NystromCG(rank=2.5)  # type: ignore[arg-type]


def test_trees_that_do_not_fit() -> None:
    b = {"a": torch.ones(2)}
    with pytest.raises(
        ValueError,
        match=r"`start` does not have the expected structure: missing .*'a'.*, unknown .*'c'",
    ):
        mo.Direct()(lambda x: x, b, start={"c": torch.ones(2)})
    with pytest.raises(ValueError, match=r"`matvec\(x\)` does not have the expected structure"):
        mo.ConjugateGradient()(lambda x: x["a"], b)


def test_what_has_no_solution() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        mo.Direct()(lambda x: 0 * x, torch.ones(3))
    with pytest.raises(ValueError, match="NystromCG: the operator must be positive semidefinite"):
        mo.NystromCG()(lambda x: -x, torch.ones(3))
    assert vmap(lambda b: mo.NystromCG()(lambda x: -x, b).value)(torch.ones(2, 3)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [1e-2, 1e-6, 1e-8, 1e-12])
@pytest.mark.parametrize("rank", [3, 9])
def test_nystrom_with_all_columns_is_exact_at_any_damping(
    rank: int, damping: float, dtype: torch.dtype
) -> None:
    """1 / damping multiplies what is left outside of the columns: nothing, not even rounding."""
    root = torch.tensor([[2.0, 0.3, 0.0], [0.0, 1.0, 0.5], [0.1, 0.0, 1.5]], dtype=dtype)
    matrix, b = root @ root.T, torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    found = mo.Nystrom(rank=rank, damping=damping)(lambda v: matrix @ v, b).value
    expected = torch.linalg.solve(matrix + damping * torch.eye(3, dtype=dtype), b)
    tolerance = 100 * torch.finfo(dtype).eps  # the condition number is 12
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
