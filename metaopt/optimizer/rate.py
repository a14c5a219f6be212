"""The step size of the update that an optimizer would make next."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from metaopt.optimizer.by_name import Value
from metaopt.optimizer.schedule import Schedule
from metaopt.tree import Tree

if TYPE_CHECKING:
    from metaopt.optimizer.optimizer import Optimizer


def find_rate(
    optimizer: Optimizer,
    state: dict[str, Any],
    params: Tree,
    observe: Callable[[], tuple[Tree, Tensor | None]],
) -> Value:
    """Return the one `lr` among the present values of an optimizer's hyperparameters; see
    `Optimizer.rate`.

    Raises:
        ValueError: there is not just one, or it is no scalar.
    """
    looks = any(isinstance(module, Schedule) for module in optimizer.modules())
    grads, loss = observe() if looks else (None, None)
    values = optimizer.values(state, loss=loss, grads=grads, params=params)
    rates = {
        name: value
        for name, value in values.items()
        if name.replace("/", ".").split(".")[-1] == "lr"
    }
    (value,) = rates.values() if len(rates) == 1 else (None,)
    if value is None or (isinstance(value, Tensor) and value.ndim):
        found = {name: _show(rate) for name, rate in rates.items()}
        raise ValueError(
            f'`scale="lr"` must find one step size in the optimizer, got '
            f"{type(optimizer).__name__} with {found or 'none'}. "
            "Give a number: `scale=0.1`."
        )
    return value


def _show(rate: Value) -> Any:
    return (
        f"a tensor of shape {tuple(rate.shape)}" if isinstance(rate, Tensor) and rate.ndim else rate
    )
