"""The page of a tutorial: cells and their outputs as Markdown, and the two taken apart again.

What stands between <!-- output --> and <!-- /output --> was printed or drawn by the cell before;
all the rest is the source.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

SOURCES = "https://github.com/torch-metaopt/torch-metaopt/blob/main/docs/tutorials"
OUTPUT = re.compile(r"<!-- output -->.*?<!-- /output -->\n*", re.DOTALL)
TEXT = re.compile(r"<!-- output -->\n\n```text\n(.*?)```\n\n<!-- /output -->", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d*\.?\d+(?:e[-+]?\d+)?")
# What another machine explains: last digits differ, and training magnifies that.
RELATIVE, ABSOLUTE = 0.15, 0.02
MOST_BYTES, COLOURS = 80_000, 192  # of a picture

Cell = Mapping[str, Any]


def write_page(name: str, cells: Sequence[Cell]) -> tuple[str, dict[str, bytes]]:
    """Return the page, and its pictures by file name.

    A code cell with the tag "fold" is folded under its title; its outputs are not. What a cell with
    the tag "varies" prints is a block of "txt", at which `find_differences` does not look.

    Args:
        name: of the tutorial.
        cells: of a notebook; with outputs if it was run. The first begins with the page's title.

    Raises:
        ValueError: a picture has no `alt` in the metadata of its cell, or is too large.
    """
    title, _, rest = "".join(cells[0]["source"]).partition("\n")
    links = f"Run it yourself: [notebook]({name}.ipynb), [script]({SOURCES}/{name}.py)."
    parts, pictures = [title, links, rest.strip()], {}
    for cell in cells[1:]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(_show_code(cell, source))
        for content in _contents(cell.get("outputs", ())):
            if isinstance(content, bytes):
                file = f"{name}-{len(pictures) + 1}.png"
                pictures[file] = _shrink(cell, file, content)
                parts.append(_output(f"![{cell['metadata']['alt']}]({file})"))
            elif content:
                fence = "txt" if "varies" in _tags(cell) else "text"
                parts.append(_output(f"```{fence}\n{content.rstrip()}\n```"))
    return "\n\n".join(parts) + "\n", pictures


def without_outputs(page: str) -> str:
    """Return what of a page is its source."""
    return OUTPUT.sub("", page).rstrip() + "\n"


def find_differences(page: str, other: str) -> Iterator[str]:
    """Yield what is printed on one page and not on the other, but for what machines explain.

    The words must be the same, and each number x up to RELATIVE |x| + ABSOLUTE.
    """
    shown, printed = TEXT.findall(page), TEXT.findall(other)
    if len(shown) != len(printed):
        yield f"the page has {len(shown)} printed outputs, running it gave {len(printed)}"
        return
    for before, after in zip(shown, printed, strict=True):
        numbers = list(zip(NUMBER.findall(before), NUMBER.findall(after), strict=False))
        same_words = _words(before) == _words(after)
        if not same_words or not all(_is_near(float(a), float(b)) for a, b in numbers):
            yield f"the page shows\n{before}and running it printed\n{after}"


def _words(text: str) -> list[str]:
    """Return the words, without numbers and the rules of tables, whose length varies."""
    return re.sub(r"[-=]{3,}", " ", NUMBER.sub("#", text)).split()


def _is_near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=0, abs_tol=RELATIVE * abs(a) + ABSOLUTE)


def _tags(cell: Cell) -> Sequence[str]:
    return cell["metadata"].get("tags", ())


def _show_code(cell: Cell, source: str) -> str:
    code = f"```py\n{source}\n```"  # programs marked "python" are run by the test of the pages
    if "fold" not in _tags(cell):
        return code
    title = cell["metadata"].get("title", "Code")
    return f'<details markdown="1"><summary>{title}</summary>\n\n{code}\n\n</details>'


def _contents(outputs: Sequence[Mapping[str, Any]]) -> Iterator[str | bytes]:
    """Yield pictures, and what is printed between them in one piece."""
    for kind, run in itertools.groupby(map(_content, outputs), type):
        contents = [*run]
        yield from ["".join(map(str, contents))] if kind is str else contents


def _content(output: Mapping[str, Any]) -> str | bytes:
    """Return a picture, or the text of an output; of what goes to standard error, nothing."""
    if output["output_type"] == "stream":
        return "".join(output["text"]) if output["name"] == "stdout" else ""
    data = output["data"]
    return base64.b64decode(data["image/png"]) if "image/png" in data else data["text/plain"]


def _shrink(cell: Cell, file: str, content: bytes) -> bytes:
    """Return the picture with a palette, in about a third of the bytes."""
    if "alt" not in cell["metadata"]:
        raise ValueError(f'{file}: its cell must say what it shows, `# %% alt="..."`, got none.')
    small = io.BytesIO()
    with Image.open(io.BytesIO(content)) as picture:
        palette = picture.convert("RGBA").quantize(COLOURS, Image.Quantize.FASTOCTREE)
        palette.save(small, "PNG", optimize=True)
    if len(small.getvalue()) > MOST_BYTES:
        raise ValueError(
            f"{file} must have at most {MOST_BYTES} bytes, got {len(small.getvalue())}. Draw less."
        )
    return small.getvalue()


def _output(text: str) -> str:
    return f"<!-- output -->\n\n{text}\n\n<!-- /output -->"
