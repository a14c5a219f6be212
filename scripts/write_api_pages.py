"""Write docs/pages/api: a page for each public name, an index, and their part of docs/mkdocs.yml.

    .venv/bin/python scripts/write_api_pages.py

A page holds the name only; mkdocstrings fills it from the docstring when the site is built. Groups
and their order are those of `metaopt.__all__`, and of the folders of `optimizers/`.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import metaopt
from metaopt.interop import higher

ROOT = Path(__file__).parents[1]
FOLDER = Path("docs/pages/api")
SETTINGS = Path("docs/mkdocs.yml")
BEGIN, END = "  # api: written by scripts/write_api_pages.py\n", "  # /api\n"
OF_OPTIMIZERS = {  # by the folder that a name comes from
    "": "Optimizers designed by hand",
    "transforms": "Transforms of gradients and updates",
    "schedules": "Schedules",
    "learned": "Optimizers that are learned",
    "trained": "Weights that come with the package",
}
TYPES = """
## Types in signatures

- `Tree`: a tensor, or a nesting of dicts, lists and tuples with tensors at its leaves.
- `Params`: a dict of tensors by name, as `functional(model).params`.
- `Value`: a number or a tensor.
- `Hyperparameter`: a number, a tensor, a schedule, or a dict of these by patterns of names of
  parameters. An `nn.Parameter` is a tensor that can be learned.
- `State`: what an optimizer remembers, a dict.
- `Leaves`: one tensor for each parameter. `Slots`: an optimizer's memory, leaves by name. `Hyper`:
  the values of the hyperparameters at a step, by name.
"""
SENTENCE = re.compile(r".*?(?<!\s)\.(?=\s+[A-Z`]|$)", re.DOTALL)


class Page(NamedTuple):
    """A public name."""

    name: str  # as it is imported, "metaopt.optimizers.Adam"
    file: str  # in docs/pages/api
    summary: str

    @property
    def title(self) -> str:
        return self.name.rpartition(".")[2]


def groups() -> dict[str, list[Page]]:
    """Return the pages by the title of their group."""
    found = {
        title: pages("metaopt", names) for title, names in read_groups(metaopt.__file__).items()
    }
    optimizers = import_module("metaopt.optimizers")
    for folder, title in OF_OPTIMIZERS.items():
        names = [name for name in optimizers.__all__ if folder_of(optimizers, name) == folder]
        found[title] = pages("metaopt.optimizers", names)
    names = sorted({*metaopt.tasks.__all__} - {*metaopt.__all__})
    found["Families of tasks, and data"] = pages("metaopt.tasks", names)
    found["Programs written for higher"] = [
        Page("metaopt.interop.higher", "higher.md", summarize(higher))
    ]
    return found


def read_groups(file: str | None) -> dict[str, list[str]]:
    """Return the names in a module's `__all__` by the comment above them."""
    source = Path(str(file)).read_text()
    found: dict[str, list[str]] = {}
    for line in source[source.index("\n__all__ = [") :].splitlines()[2:]:
        if line == "]":
            break
        if line.startswith("    # "):
            title = line.removeprefix("    # ")
            found[title[0].upper() + title[1:]] = names = []
        else:
            names.append(json.loads(line.strip(" ,")))
    return found


def folder_of(package: types.ModuleType, name: str) -> str:
    inside = getattr(package, name).__module__.removeprefix(f"{package.__name__}.")
    return inside.split(".")[0] if inside.split(".")[0] in OF_OPTIMIZERS else ""


def pages(module: str, names: list[str]) -> list[Page]:
    """Return a page for each name, in the order of the alphabet."""
    namespace = import_module(module)
    folder = module.removeprefix("metaopt").replace(".", "/").lstrip("/")
    return [
        Page(
            f"{module}.{name}",
            str(Path(folder, file_name(name, namespace.__all__))),
            summarize(getattr(namespace, name)),
        )
        for name in sorted(names, key=str.lower)
    ]


def file_name(name: str, others: list[str]) -> str:
    """Return "adam.md"; `Functional` is "functional-class.md", since `functional` has the other."""
    is_taken = name != name.lower() and name.lower() in others
    return f"{name.lower()}{'-class' if is_taken else ''}.md"


def summarize(value: object) -> str:
    """Return the first sentence of a docstring."""
    text = inspect.cleandoc(value.__doc__ or "")
    sentence = SENTENCE.match(text.partition("\n\n")[0])
    assert sentence is not None, f"{value} has no docstring that begins with a sentence."
    return " ".join(sentence[0].split())


def escape(text: str) -> str:
    """Return text in which Markdown finds nothing but `code`."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def write_page(page: Page) -> str:
    return f"---\ntitle: {page.title}\n---\n\n::: {page.name}\n"


def write_index(found: dict[str, list[Page]]) -> str:
    lines = [
        "# API",
        "",
        "Every public name, one page each. `mo` is `metaopt`, as in `import metaopt as mo`.",
    ]
    for title, group in found.items():
        lines += ["", f"## {title}", ""]
        for page in group:
            name = page.name if page.name.count(".") > 1 else page.name.replace("metaopt", "mo")
            lines.append(f"- [`{name}`]({page.file}): {escape(page.summary)}")
    return "\n".join(lines) + "\n" + TYPES


def write_navigation(found: dict[str, list[Page]]) -> str:
    lines = ["  - API:", "      - api/index.md"]
    for title, group in found.items():
        lines.append(f"      - {json.dumps(re.split('[,;]', title)[0])}:")  # the bar is narrow
        lines += [f"          - {page.title}: api/{page.file}" for page in group]
    return "\n".join(lines) + "\n"


def write_all() -> dict[Path, str]:
    """Return what the files should hold."""
    found = groups()
    settings = (ROOT / SETTINGS).read_text()
    before, rest = settings.split(BEGIN)
    after = rest.split(END)[1]
    return {
        **{FOLDER / page.file: write_page(page) for page in chain(*found.values())},
        FOLDER / "index.md": write_index(found),
        SETTINGS: before + BEGIN + write_navigation(found) + END + after,
    }


def main() -> None:
    texts = write_all()
    for path in (ROOT / FOLDER).rglob("*.md"):
        if path.relative_to(ROOT) not in texts:
            path.unlink()
    for path, text in texts.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text)
    print(f"{len(texts) - 2} pages in {FOLDER}.")


if __name__ == "__main__":
    main()
