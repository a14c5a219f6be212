"""Attention of some queries, and its first two pullbacks written out.

With scores S = q K' + M where q = scale Q, weights P = softmax(S), results O = P V, and

    J(X) = P * X°,  X° = X - <P, X>       the derivative of the softmax, which is symmetric

where <,> sums each row, a cotangent G of O is pulled back to

    R = G V',  T = J(R)                   cotangents of P and S
    dQ = scale T K,  dK = T' q,  dV = P' G,  dM = T

and cotangents a / scale, b, c, m of these to

    A = a K' + q b' + m                   a cotangent of T
    U = J(A),  W = J(A° * R° + G c')      cotangents of R and S
    dQ = scale (W K + T b),  dK = W' q + T' a,  dV = U' G,  dM = W,  dG = U V + P c.

W is J of P's cotangent, which differs from what stands there by a multiple of 1 in each row: J does
not see that. These are 5 and 11 products of matrices, where autograd takes 6 and 18 and keeps more
than twice as many tensors as large as the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.exact_ops.dropout import dropout
from metaopt.exact_ops.recomputed import Function


@dataclass(frozen=True)
class Attend:
    """softmax(scale Q K' + M) V of (Q, K, V) or (Q, K, V, M); M may be boolean.

    A query that may attend to nothing gets a row of zeros.

    Attributes:
        scale: of the scores.
        causal_from: position of the first query, where none may attend to later keys; else None.
        precision: of the autocast in which all is computed; None for none.
    """

    scale: float
    causal_from: int | None = None
    precision: torch.dtype | None = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor]:
        with self.autocast(tensors):
            return (self.attend(*tensors),)

    def pullback(self, wanted: Sequence[bool]) -> Function:
        return _Slopes(self, wanted)

    def autocast(self, tensors: Sequence[Tensor]) -> torch.autocast:
        device = tensors[0].device.type
        return torch.autocast(device, self.precision, enabled=self.precision is not None)

    def attend(self, *tensors: Tensor, dropout_p: float = 0.0) -> Tensor:
        """Return the result in whatever autocast there is, by weights some of which may be dropped.

        It has autograd's derivatives.
        """
        query, _, value, weights = self.weigh(*tensors)
        found = (dropout(weights, dropout_p) if dropout_p else weights) @ value
        dtype = tensors[0].dtype
        return found if dtype == query.dtype else found.to(dtype)

    def weigh(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (q, K, V, P) in at least float32, without the keys that no query sees."""
        query = _widen(query) * self.scale
        key, value = (_widen(self.see(x, query)) for x in (key, value))
        scores = query @ key.mT
        if self.causal_from is not None:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
            scores = scores.masked_fill(future.triu(self.causal_from + 1), -torch.inf)
        if mask is None:
            return query, key, value, _widen(scores.softmax(-1))
        if mask.dtype == torch.bool:
            alone = ~mask.any(-1, keepdim=True)
            scores = scores.masked_fill(~(mask | alone), -torch.inf)
        else:
            alone = (mask == -torch.inf).all(-1, keepdim=True)
            scores = scores + mask.masked_fill(alone, 0)
        return query, key, value, _widen(scores.softmax(-1)).masked_fill(alone, 0)

    def see(self, keys: Tensor, query: Tensor) -> Tensor:
        """Return the rows of K or V that some of these queries may attend to."""
        if self.causal_from is None:
            return keys
        return keys[..., : self.causal_from + query.shape[-2], :]


@dataclass(frozen=True)
class _Slopes:
    """Those wanted of (dQ, dK, dV, dM), of (Q, K, V, M, G); there may be no M."""

    attend: Attend
    wanted: Sequence[bool]

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        *tensors, out = arguments
        with self.attend.autocast(tensors):
            query, key, value, weights = self.attend.weigh(*tensors)
            out = _widen(out)
            slope = weights * _centre(weights, out @ value.mT)
            slopes = (
                lambda: _widen(slope @ key) * self.attend.scale,
                lambda: slope.mT @ query,
                lambda: weights.mT @ out,
                lambda: slope,
            )
            return _evaluate(slopes, tensors, self.wanted)

    def pullback(self, wanted: Sequence[bool]) -> Function:
        return _Curvatures(self, wanted)


@dataclass(frozen=True)
class _Curvatures:
    """Those wanted of (dQ, dK, dV, dM, dG), of (Q, K, V, M, G, a / scale, b, c, m).

    Of the last four there are those of which the slopes were wanted.
    """

    slopes: _Slopes
    wanted: Sequence[bool]

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        attend = self.slopes.attend
        *tensors, out = arguments[: len(self.wanted)]
        bars = iter(arguments[len(self.wanted) :])
        # Of what has no slope the cotangent is zero.
        zero = tensors[0].new_zeros(())
        of_query, of_key, of_value, *of_mask = (
            _widen(next(bars) if has_bar else zero.expand_as(x))
            for x, has_bar in zip(tensors, self.slopes.wanted, strict=True)
        )
        with attend.autocast(tensors):
            query, key, value, weights = attend.weigh(*tensors)
            out, of_query = _widen(out), of_query * attend.scale
            of_key, of_value = attend.see(of_key, query), attend.see(of_value, query)
            steep = _centre(weights, out @ value.mT)
            of_slope = _widen(of_query @ key.mT) + query @ of_key.mT
            if self.slopes.wanted[3:] == (True,):
                of_slope = of_slope + of_mask[0]
            of_slope = _centre(weights, of_slope)
            curved = weights * _centre(weights, of_slope * steep + out @ of_value.mT)
            slope, of_steep = weights * steep, weights * of_slope
            curvatures = (
                lambda: (_widen(curved @ key) + slope @ of_key) * attend.scale,
                lambda: _widen(curved.mT @ query) + slope.mT @ of_query,
                lambda: of_steep.mT @ out,
                *(lambda: curved for _ in of_mask),
                lambda: of_steep @ value + weights @ of_value,
            )
            return _evaluate(curvatures, [*tensors, out], self.wanted)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _centre(weights: Tensor, x: Tensor) -> Tensor:
    """Return X°, each row less its mean by the weights."""
    return x - (weights * x).sum(-1, keepdim=True)


def _evaluate(
    slopes: Sequence[Callable[[], Tensor]], tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Return the wanted slopes, in the shapes and types of their tensors.

    Keys that nobody sees have slope zero; what was broadcast is summed.
    """
    found = []
    for slope, tensor, is_wanted in zip(slopes, tensors, wanted, strict=False):
        if is_wanted:
            x = slope()
            unseen = tensor.shape[-2] - x.shape[-2] if tensor.ndim > 1 else 0
            x = F.pad(x, (0, 0, 0, unseen)) if unseen > 0 else x
            found.append(x.sum_to_size(tensor.shape).to(tensor.dtype))
    return tuple(found)
