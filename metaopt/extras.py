"""Packages that only some of the library needs, and that are installed when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

PACKAGES = {  # name of the import -> name of the package
    "PIL": "pillow",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "tabulate": "tabulate",
    "tyro": "tyro",
}
SEARCH_PACKAGES = {  # the same, of the extra `blackbox`
    "ax": "ax-platform",
    "botorch": "botorch",
    "gpytorch": "gpytorch",
    "optuna": "optuna",
}
TEXT_PACKAGES = {"transformers": "transformers"}  # the same, of the extra `text`
EXTRAS = {"scripts": PACKAGES, "blackbox": SEARCH_PACKAGES, "text": TEXT_PACKAGES}


@contextmanager
def extra(user: str) -> Iterator[None]:
    """While entered, say how to install a package of an extra that is not there.

    Args:
        user: what needs it, for the message.

    Raises:
        ModuleNotFoundError: an import inside found no such package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        name = next((name for name, packages in EXTRAS.items() if module in packages), None)
        if name is None:
            raise
        raise ModuleNotFoundError(
            f"{user} needs {EXTRAS[name][module]}, which is not installed. It comes with the "
            f'extra: pip install "torch-metaopt[{name}]".',
            name=error.name,
        ) from error
