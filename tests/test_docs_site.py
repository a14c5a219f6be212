"""The pages of the site that a script writes, and its navigation.

`scripts/docs` builds the site, where every warning is an error.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import metaopt
import optimizers

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs/pages"


def load_script() -> ModuleType:
    path = ROOT / "scripts" / "write_api_pages.py"
    spec = importlib.util.spec_from_file_location("write_api_pages", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture(scope="module")
def texts() -> dict[Path, str]:
    return script.write_all()


def test_each_public_name_has_a_page(texts) -> None:
    """What is not as the script would write it now is stale."""
    stale = [
        str(path)
        for path, text in texts.items()
        if not (ROOT / path).exists() or (ROOT / path).read_text() != text
    ]
    old = {path.relative_to(ROOT) for path in (PAGES / "api").rglob("*.md")} - texts.keys()
    assert not [*stale, *old], "run scripts/write_api_pages.py"


def test_the_pages_are_those_of_all(texts) -> None:
    documented = {text.split("::: ")[1].strip() for text in texts.values() if "\n::: " in text}
    assert documented == {
        *(f"metaopt.{name}" for name in metaopt.__all__),
        *(f"metaopt.optimizers.{name}" for name in optimizers.__all__),
        *(f"metaopt.tasks.{name}" for name in metaopt.tasks.__all__ if name != "Episode"),
        "metaopt.interop.higher",
    }


def test_no_two_pages_share_a_file_where_case_does_not_count(texts) -> None:
    assert len({str(path).lower() for path in texts}) == len(texts)


def test_groups_are_the_comments_of_all(tmp_path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        '\n__all__ = [  # noqa\n    # one\n    "b",\n    "a",\n    # two\n    "C",\n]\n'
    )
    assert script.read_groups(str(file)) == {"One": ["b", "a"], "Two": ["C"]}


def test_a_summary_is_the_first_sentence() -> None:
    def fn() -> None:
        """Solve q_t . k = 1,
        for k. Not this.

        Nor this.
        """

    assert script.summarize(fn) == "Solve q_t . k = 1, for k."
    fn.__doc__ = None
    with pytest.raises(AssertionError, match="has no docstring that begins with a sentence"):
        script.summarize(fn)


def test_markdown_finds_nothing_in_a_formula() -> None:
    assert script.escape("a * b <v> [c] `d * [e]`") == r"a \* b &lt;v> \[c\] `d * [e]`"


def test_the_navigation_has_every_page() -> None:
    settings = (ROOT / "docs/mkdocs.yml").read_text()
    listed = re.findall(r"([\w/-]+\.md)$", settings[settings.index("\nnav:") :], re.MULTILINE)
    assert len(listed) == len({*listed})
    assert {*listed} == {str(page.relative_to(PAGES)) for page in PAGES.rglob("*.md")}


ITEM = re.compile(r"(?P<indent> *)(?P<mark>[-*+] |\d+\. |\|)")


def find_run_on(text: str) -> list[str]:
    """Return what is a list or a table on GitHub, and on the site part of the paragraph above.

    There both need a blank line before them, and a list in a list is indented by four.
    """
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "\n", text, flags=re.DOTALL)
    found = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip("\n").splitlines()
        items = [ITEM.match(line) for line in lines]
        for before, line, item in zip(lines, lines[1:], items[1:]):
            is_row = item and item["mark"] == "|"
            if item and not (before.startswith("|") if is_row else items[0]):
                found.append(line)
        found += [line for line, item in zip(lines, items) if item and item.end(1) in (2, 3)]
    return found


def test_lists_and_tables_are_the_same_on_github_and_on_the_site() -> None:
    found = {str(page): find_run_on(page.read_text()) for page in PAGES.rglob("*.md")}
    assert not {page: lines for page, lines in found.items() if lines}


def test_a_run_on_list_is_found() -> None:
    assert find_run_on("For example:\n- a\n- b\n") == ["- a", "- b"]
    assert find_run_on("- a\n\n  - b\n") == ["  - b"]
    assert find_run_on("Of two:\n| a |\n|---|\n| 1 |\n") == ["| a |"]
    assert not find_run_on("Text\n\n- a\n  goes on\n- b\n    - c\n\n1. d\n\n```\nx\n- y\n```\n")
    assert not find_run_on("Text\n<!-- -->\n| a |\n|---|\n")
