"""The one exception of our own.

Everything else that is wrong is a `ValueError` or a `TypeError`.
"""

from __future__ import annotations


class NonFiniteError(FloatingPointError):
    """A loss, or the gradient that a step needs, became infinite or not a number.

    Args:
        where: whose loss it is, for example `minimize` or a level's name.
        step: index of the first step (or task) with a non-finite value.
        value: that value.
        last_finite: the loss before it, if there was one.
        unit: what `step` counts, "step" or "task".
        what: of what it is the value.
    """

    def __init__(
        self,
        where: str,
        step: int,
        value: float,
        last_finite: float | None = None,
        *,
        unit: str = "step",
        what: str = "loss",
    ):
        self.where, self.step, self.value, self.last_finite, self.unit = (
            where,
            step,
            value,
            last_finite,
            unit,
        )
        before = (
            f" The last finite loss was {last_finite:.6g} at {unit} {step - 1}."
            if last_finite is not None
            else ""
        )
        first = unit == "step" and step == 0
        mend = (
            "Check the batch (is it empty?) and the parameters."
            if first
            else "Lower the learning rate or clip the gradients."
        )
        super().__init__(f"{where}, {unit} {step}: the {what} is {value}.{before} {mend}")
