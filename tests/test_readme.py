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
import unicodedata
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

import metaopt

ROOT = Path(__file__).parent.parent
SITE = ROOT / "docs" / "pages"
HOME = "https://github.com/torch-metaopt/torch-metaopt"
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
OPTIONAL = re.compile(r"```py\n(.*?)```", re.DOTALL)  # run where its library is installed


def name_of(page: Path) -> str:
    """Return "guides/levels" for docs/pages/guides/levels.md."""
    return str(page.relative_to(SITE if SITE in page.parents else ROOT).with_suffix(""))


def strip_code(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return what a link to a heading may be: what it is on GitHub and on the site."""
    found = set()
    for heading in re.findall(r"^#+ (.*)", strip_code(page.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        github = re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-")
        ascii_only = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
        site = re.sub(r"[^\w\s-]", "", ascii_only).strip().lower()
        if re.sub(r"[-\s]+", "-", site) == github:
            found.add(github)
    return found


PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    # those of the API are written by a script
    *sorted(page for page in SITE.rglob("*.md") if SITE / "api" not in page.parents),
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
        assert errors[1] < 0.75 * errors[0]
        assert module.value.item() < 0.01  # the learned optimizer's
    if page.stem == "learned-optimizers":
        assert (tmp_path / "runs/docs-learned/curves.png").exists()
        assert list((tmp_path / "runs/docs-learned").glob("events.*"))


@pytest.mark.parametrize("library", ["accelerate", "lightning"])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # what Lightning calls in torch
@pytest.mark.filterwarnings("ignore:The number of training batches")  # five, in place of a thousand
def test_trainings_run_inside_the_loops_of_others(library, tmp_path, monkeypatch) -> None:
    """The blocks that need what not every environment has, each in five steps."""
    pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    page = (SITE / "guides/training.md").read_text()
    (block,) = (one for one in OPTIONAL.findall(page) if f"import {library}\n" in one)
    assert "1000" in block
    module = types.ModuleType("page_training")
    for program in (BLOCK.findall(page)[0][0], block.replace("1000", "5")):
        exec(compile(program, "training.md", "exec", dont_inherit=True), vars(module))
    assert (module.trainer.step, module.trainer.stopped_by) == (5, "max_steps")
    if library == "accelerate":
        assert list((tmp_path / "runs/levels").glob("events.*"))
    else:
        assert list((tmp_path / "runs/docs-lightning").glob("step-00000005*"))


def test_pages_with_programs() -> None:
    names = {page.name for page in PROGRAMS}
    assert {"README.md", "long-loops.md", "optimizers.md", "maml.md", "levels.md"} <= names
    assert {"learned-optimizers.md", "wrap-a-model.md", "index.md", "get-started.md"} <= names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_links_lead_somewhere(page) -> None:
    text = page.read_text()
    for command in re.findall(r"((?:scripts|examples)/[a-z_]+(?:\.py)?)\b", text):
        assert (ROOT / command).exists(), command
    for link in re.finditer(r'\]\(([^)]+)\)|(?:href|src)="([^"]+)"', strip_code(text)):
        check_link(page, link[1] or link[2])


def check_link(page: Path, target: str) -> None:
    """Raise if a link leads to nothing; what is on other sites is only looked at.

    Pages of the site link to files outside docs/pages by their address on GitHub.
    """
    address, _, anchor = target.partition("#")
    place = page.parent / address if address else page
    parts = urlsplit(address)
    own = re.fullmatch(rf"{HOME}/(blob|tree)/main/(.*)", address)
    if own:
        place = ROOT / own[2]
        assert place.is_file() if own[1] == "blob" else place.is_dir(), target
    elif parts.scheme:
        assert parts.scheme == "https", target
        assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), target
        assert not re.search(r"\s", target), target
        return
    else:
        assert place.exists(), target
        assert SITE not in page.parents or SITE in place.resolve().parents, target
    if anchor and place.suffix == ".md":
        assert anchor in anchors(place), target


def test_a_link_that_leads_nowhere_is_found() -> None:
    page = ROOT / "docs/pages/guides/levels.md"
    for target in (
        "missing.md",
        "levels.md#no-heading",
        "#no-heading",
        "../../../README.md",
        f"{HOME}/blob/main/missing.py",
        f"{HOME}/blob/main/README.md#no-heading",
        f"{HOME}/tree/main/README.md",
        "http://arxiv.org/abs/1",
        "https://arxiv",
    ):
        with pytest.raises(AssertionError):
            check_link(page, target)
    for target in (
        "#large-models",
        "maml.md",
        "../results/index.md#scripts",
        f"{HOME}/tree/main/examples",
        f"{HOME}/blob/main/CONTRIBUTING.md#style",
        "https://arxiv.org/abs/1703.03400",
    ):
        check_link(page, target)


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
    layout = (SITE / "architecture.md").read_text()
    layout = layout[layout.index("## The layout") : layout.index("## How to add")]
    named = set(re.findall(r"\w+", layout))
    modules = {path.stem for path in (ROOT / "metaopt").iterdir() if not path.name.startswith("__")}
    assert modules - {"py"} <= named, modules - named
