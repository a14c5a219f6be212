"""The pairs of programs in docs/pages/migrate compute the same numbers, and have the length told.

A pair is two tabs of a page: the peer's program and ours. Each runs after the block of the page
that has model and data for both.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent.parent / "docs" / "pages" / "migrate"
SHARED = re.compile(r"^## Model and data.*\n\n```python\n((?:.*\n)*?)```\n", re.MULTILINE)
PAIR = re.compile(
    r"^## (?P<title>[^\n]+)\n(?:(?!## |=== ).*\n)*"
    r'=== "(?P<peer>[^\n"]+)"\n\n    ```py\n(?P<theirs>(?: {4}.*\n|\n)+?)    ```\n\n'
    r'=== "metaopt"\n\n    ```python\n(?P<ours>(?: {4}.*\n|\n)+?)    ```\n',
    re.MULTILINE,
)


class Comparison(NamedTuple):
    """Which module a peer's program needs, and the variables that the two are compared by.

    Adam hides the size of a gradient: "weights.grad" is that of the last step.

    The two take the same operations in another order: a few ulp of float64, amplified by some
    steps.
    """

    module: str
    names: list[str]
    rtol: float = 1e-8
    dtype: str = "float64"


COMPARISONS = {
    ("higher", "The README's loop"): Comparison("higher", ["gradient"], rtol=1e-3),
    ("higher", "MAML"): Comparison("higher", ["losses", "weights", "weights.grad"]),
    ("higher", "Learn the inner step size and momentum"): Comparison("higher", ["gradient"]),
    ("torchopt", "A functional inner loop"): Comparison("torchopt", ["gradient"]),
    ("torchopt", "Few-shot MAML"): Comparison("torchopt", ["loss", "weights", "weights.grad"]),
    ("torchopt", "Implicit MAML"): Comparison("torchopt", ["gradient"]),
    ("betty", "The quick start: weigh the examples"): Comparison("betty", ["learned", "weights"]),
    ("betty", "A decay for each weight"): Comparison("betty", ["decay"]),
    ("learn2learn", "MAML"): Comparison("learn2learn", ["losses", "weights", "weights.grad"]),
    ("learn2learn", "Meta-SGD"): Comparison("learn2learn", ["gradient", "of_rates"]),
    ("learned-optimization", "Differentiate through a hand-designed optimizer"): Comparison(
        "learned_optimization", ["gradient"]
    ),
    # Evolution: other random numbers, the same optimum, where the noise of the estimate vanishes.
    # Theirs runs in float32 alone.
    ("learned-optimization", "Train it by PES"): Comparison(
        "learned_optimization", ["rate"], rtol=0.02, dtype="float32"
    ),
    ("learned-optimization", "A network as the optimizer, in JAX alone"): Comparison(
        "jax", ["gradient"]
    ),
}


def pairs() -> dict[tuple[str, str], re.Match[str]]:
    return {
        (page.stem, pair["title"]): pair
        for page in sorted(FOLDER.glob("*.md"))
        for pair in PAIR.finditer(page.read_text())
    }


def run(page: str, program: str, name: str) -> dict[str, Any]:
    """Return the variables after the page's model and data and the program."""
    shared = SHARED.search((FOLDER / f"{page}.md").read_text())
    namespace: dict[str, Any] = {"__name__": name}
    for what, source in (("model and data", shared[1]), ("tab", textwrap.dedent(program))):
        file = f"{page}.md, {what} of {name}"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, file, "exec", dont_inherit=True), namespace)
    return namespace


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Make this the dtype of what programs create, in torch, and in JAX where it is imported."""
    jax, before = sys.modules.get("jax"), torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with jax.enable_x64(dtype == "float64") if jax else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


def read(variables: dict[str, Any], name: str) -> np.ndarray:
    """Return the numbers of "name", or of the gradients "name.grad", in a row."""
    value = variables[name.removesuffix(".grad")]
    return flat([param.grad for param in value] if name.endswith(".grad") else value)


def flat(value: Any) -> np.ndarray:
    """Return all numbers of a tree in a row."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return np.concatenate([flat(item) for item in value])
    return np.asarray(value.detach() if isinstance(value, torch.Tensor) else value).ravel()


def assert_agree(first: dict[str, Any], second: dict[str, Any], comparison: Comparison) -> None:
    for name in comparison.names:
        one, other = read(first, name), read(second, name)
        assert one.dtype == other.dtype == comparison.dtype, name
        assert np.abs(one).max() > 1e-3, name  # else they would agree on nothing
        np.testing.assert_allclose(
            one, other, comparison.rtol, comparison.rtol * np.abs(other).max(), err_msg=name
        )


def need(module: str) -> None:
    """Skip the test where the peer is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # higher compares an integer by identity
        pytest.importorskip(module, reason=f"{module} is not installed", exc_type=ImportError)


def count_lines(program: str) -> int:
    """Return the number of lines that are neither blank nor a comment."""
    lines = (line.strip() for line in program.splitlines())
    return sum(bool(line) and not line.startswith("#") for line in lines)


def test_every_pair_is_compared() -> None:
    assert set(pairs()) == set(COMPARISONS)


@pytest.mark.parametrize("key", COMPARISONS, ids=" ".join)
def test_both_programs_compute_the_same(key) -> None:
    pair, comparison = pairs()[key], COMPARISONS[key]
    need(comparison.module)
    with precision(comparison.dtype), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer's own
        theirs = run(key[0], pair["theirs"], pair["peer"])
    with precision(comparison.dtype):
        assert_agree(theirs, run(key[0], pair["ours"], "metaopt"), comparison)


@pytest.mark.parametrize("title", [title for page, title in COMPARISONS if page == "higher"])
def test_programs_for_higher_run_unchanged(title) -> None:
    """With our module of that name."""
    pair, comparison = pairs()["higher", title], COMPARISONS["higher", title]
    ported = pair["theirs"].replace("import higher\n", "from metaopt.interop import higher\n")
    assert ported != pair["theirs"]
    with precision("float64"):
        theirs, ours = run("higher", ported, "ported"), run("higher", pair["ours"], "metaopt")
    assert_agree(theirs, ours, comparison._replace(rtol=1e-8))


def test_what_differs_from_higher_is_where_epsilon_stands() -> None:
    """Where it is too small to matter, the two agree: see the README's loop."""
    need("higher")
    pair = pairs()["higher", "The README's loop"]
    small = [pair[side].replace("lr=0.01", "lr=0.01, eps=1e-16") for side in ("theirs", "ours")]
    with precision("float64"):
        theirs, ours = (run("higher", program, "small eps") for program in small)
    assert_agree(theirs, ours, Comparison("higher", ["gradient"]))


def test_the_table_has_the_number_of_lines() -> None:
    table = (FOLDER / "index.md").read_text()
    for (page, title), pair in pairs().items():
        anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        counts = f"{count_lines(pair['theirs'])} | {count_lines(pair['ours'])} |"
        assert f"[{title}]({page}.md#{anchor}) | {counts}" in table, (title, counts)
