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


@contextmanager
def extra(user: str) -> Iterator[None]:
    """While entered, say how to install a package of the extra `scripts` that is not there.

    Args:
        user: what needs it, for the message.

    Raises:
        ModuleNotFoundError: an import inside found no such package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = PACKAGES.get((error.name or "").split(".")[0])
        if package is None:
            raise
        raise ModuleNotFoundError(
            f"{user} needs {package}, which is not installed. It comes with the extra: pip install "
            f'"torch-metaopt[scripts]".',
            name=error.name,
        ) from error
