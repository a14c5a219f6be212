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
        package = (PACKAGES | SEARCH_PACKAGES).get(module)
        if package is None:
            raise
        name = "scripts" if module in PACKAGES else "blackbox"
        raise ModuleNotFoundError(
            f"{user} needs {package}, which is not installed. It comes with the extra: pip install "
            f'"torch-metaopt[{name}]".',
            name=error.name,
        ) from error
