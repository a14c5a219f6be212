"""The programs of the README and of docs/ run as written.

The blocks of a page run one after the other, in one namespace.
"""

from __future__ import annotations

import ast
import contextlib
import io
import linecache
import re
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

import metaopt

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


def name_of(page: Path) -> str:
    """Return "guides/levels" for docs/pages/guides/levels.md."""
    top = ROOT / "docs" / "pages"
    return str(page.relative_to(top if top in page.parents else ROOT).with_suffix(""))


PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs" / "pages").rglob("*.md")),
]
PROGRAMS = [page for page in PAGES if BLOCK.search(page.read_text())]


@pytest.fixture(autouse=True)
def _default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("page", PROGRAMS, ids=name_of)
@pytest.mark.filterwarnings("ignore:`torch.jit")  # torch's own, at its first compilation
def test_the_python_blocks_run_and_print_what_the_page_says(page, tmp_path, monkeypatch) -> None:
    """What a page shows in a block of text after a program is what the program prints."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where classes look themselves up
    outputs = []
    for number, (block, expected) in enumerate(BLOCK.findall(page.read_text()), 1):
        program, name = textwrap.dedent(block), f"{page.name}, block {number}"  # one in a tab
        linecache.cache[name] = (len(program), None, program.splitlines(keepends=True), name)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(program, name, "exec", dont_inherit=True), vars(module))
        outputs.append(printed.getvalue())
        if expected:
            assert printed.getvalue() == expected, name
    if page.stem == "get-started":
        (recipe,) = (text for text in outputs if "test error" in text)
        errors = [float(line.split(": ")[1]) for line in recipe.splitlines()]
        assert errors[1] < 0.8 * errors[0]
        assert module.value.item() < 0.01  # the learned optimizer's
    if page.stem == "learned-optimizers":
        assert (tmp_path / "runs/docs-learned/curves.png").exists()
        assert list((tmp_path / "runs/docs-learned").glob("events.*"))


def test_pages_with_programs() -> None:
    names = {page.name for page in PROGRAMS}
    assert {"README.md", "long-loops.md", "optimizers.md", "maml.md", "levels.md"} <= names
    assert {"learned-optimizers.md", "wrap-a-model.md", "index.md", "get-started.md"} <= names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_links_lead_somewhere(page) -> None:
    text = page.read_text()
    for command in re.findall(r"((?:scripts|examples)/[a-z_]+(?:\.py)?)\b", text):
        assert (ROOT / command).exists(), command
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_readme_is_short_and_has_its_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 6 * 1024
    assert "\nscripts/demo    # " in text
    assert "\nscripts/test    # " in text


def test_the_readme_and_the_home_show_one_example_and_every_rule() -> None:
    text = (ROOT / "README.md").read_text()
    home = (ROOT / "docs" / "pages" / "index.md").read_text()
    (example,), (other,) = BLOCK.findall(text), BLOCK.findall(home)
    assert ast.dump(ast.parse(example[0])) == ast.dump(ast.parse(other[0]))  # lines break elsewhere
    assert example[1] == other[1]
    rules = [
        name
        for name in metaopt.__all__
        if isinstance(kind := getattr(metaopt, name), type)
        and issubclass(kind, metaopt.Rule)
        and name not in ("Rule", "PointRule")
    ]
    assert all(f"`mo.{name}(" in text for name in rules)
    assert len(rules) == 9
    assert "nine rules" in text
    assert "Nine rules" in home


def test_the_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {metaopt.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{metaopt.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()


def test_the_layout_names_every_module() -> None:
    """Of the first level; what is inside a package is its own matter."""
    layout = (ROOT / "docs" / "pages" / "architecture.md").read_text()
    layout = layout[layout.index("## The layout") : layout.index("## How to add")]
    named = set(re.findall(r"\w+", layout))
    modules = {path.stem for path in (ROOT / "metaopt").iterdir() if not path.name.startswith("__")}
    assert modules - {"py"} <= named, modules - named
