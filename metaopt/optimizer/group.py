"""A parameter group of `torch.optim` that knows a pair as a whole and by its items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What is one option in torch, and in ours as many hyperparameters as it has items.
TUPLES = {
    "betas": ("beta1", "beta2"),
    "etas": ("eta_minus", "eta_plus"),
    "step_sizes": ("step_min", "step_max"),
    "ns_coefficients": ("a", "b", "c"),
}


class Group(dict[str, Any]):
    """A dict in which `betas` is always (`beta1`, `beta2`), whichever is written.

    Schedulers of torch that cycle the momentum write `betas`; a group of ours may also have the two
    as options of their own.
    """

    def __init__(self, options: Mapping[str, Any]):
        super().__init__()
        self.update(options)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        for whole, items in _wholes(self):
            if name == whole:
                super().update(zip(items, value, strict=True))
            elif name in items:
                super().__setitem__(whole, tuple(self[item] for item in items))

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Write several options."""
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def setdefault(self, name: str, default: Any = None) -> Any:
        """Write an option that is not there yet, and return the one that is."""
        if name not in self:
            self[name] = default
        return self[name]

    def __ior__(self, other: Any) -> Group:  # type: ignore[override,misc]
        self.update(other)
        return self


def by_items(options: Mapping[str, Any]) -> Group:
    """Return the group in which the items win over the tuple."""
    wholes = {name for name, _ in _wholes(options)}
    return Group({name: value for name, value in options.items() if name not in wholes})


def with_items(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with the items of each tuple in place of it.

    Raises:
        ValueError: a tuple of another length, or an item of it is given besides.
    """
    taken = dict(options)
    for name, items in TUPLES.items():
        if name not in options:
            continue
        value = taken.pop(name)
        if not isinstance(value, tuple | list) or len(value) != len(items):
            raise ValueError(
                f"`{name}` of a parameter group must be {len(items)} numbers ({', '.join(items)}), "
                f"got {value!r}."
            )
        for item, part in zip(items, value, strict=True):
            if taken.setdefault(item, part) is not part and taken[item] != part:
                raise ValueError(
                    f"A parameter group has {name}={value!r} and {item}={taken[item]!r}, which is "
                    "one of them. Give it once."
                )
    return taken


def _wholes(options: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    """Return (name, items) of each tuple whose items are all among the options."""
    return [(name, items) for name, items in TUPLES.items() if options.keys() >= set(items)]
