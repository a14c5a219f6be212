"""Solvers of (A + damping I) x = b for an operator known by its products with vectors.

There is one in each file.
"""

from metaopt.linear_solve.base import LinearSolver, Solution
from metaopt.linear_solve.bicgstab import BiCGStab
from metaopt.linear_solve.conjugate_gradient import ConjugateGradient
from metaopt.linear_solve.direct import Direct
from metaopt.linear_solve.gmres import GMRES
from metaopt.linear_solve.kfac import KFAC
from metaopt.linear_solve.kfac_cg import KFACCG
from metaopt.linear_solve.kronecker import KroneckerFactors
from metaopt.linear_solve.neumann import Neumann
from metaopt.linear_solve.normal_cg import NormalCG
from metaopt.linear_solve.nystrom import Nystrom
from metaopt.linear_solve.nystrom_cg import NystromCG

__all__ = [
    "GMRES",
    "KFAC",
    "KFACCG",
    "BiCGStab",
    "ConjugateGradient",
    "Direct",
    "KroneckerFactors",
    "LinearSolver",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "NystromCG",
    "Solution",
]
