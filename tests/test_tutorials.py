"""The pages, notebooks and sources of the tutorials agree; `scripts/run_tutorials.py` runs them."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
SOURCES, PAGES = ROOT / "docs/tutorials", ROOT / "docs/pages/tutorials"
NAMES = [path.stem for path in sorted(SOURCES.glob("*.py"))]
each_tutorial = pytest.mark.parametrize("name", NAMES)


def load_pages():
    path = ROOT / "scripts/tutorial_pages.py"
    spec = importlib.util.spec_from_file_location("tutorial_pages", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages = load_pages()


def cells_of(name: str) -> list[dict]:
    return json.loads((PAGES / f"{name}.ipynb").read_text())["cells"]


def as_percent(cells: list[dict]) -> list[str]:
    """Return the lines of the cells in jupytext's percent format, without headers."""
    lines = []
    for cell in cells:
        is_text = cell["cell_type"] == "markdown"
        for line in "".join(cell["source"]).splitlines():
            lines.append(f"# {line}".rstrip() if is_text else line)
    return [line for line in lines if line.strip("# ")]


@each_tutorial
def test_the_notebook_and_the_page_are_those_of_the_source(name) -> None:
    cells = cells_of(name)
    source = (SOURCES / f"{name}.py").read_text().splitlines()
    assert as_percent(cells) == [
        line for line in source if line.strip("# ") and not line.startswith("# %%")
    ]
    headers = [line for line in source if line.startswith("# %%")]
    assert len(headers) == len(cells)
    for header, cell in zip(headers, cells, strict=True):
        assert ("[markdown]" in header) == (cell["cell_type"] == "markdown")
        options = dict(re.findall(r'(\w+)=("[^"]*"|\[[^]]*\])', header))
        shown = {key: json.loads(text) for key, text in options.items()}
        assert shown == {k: v for k, v in cell["metadata"].items() if k != "title"}, header
    text = (PAGES / f"{name}.md").read_text()
    assert pages.without_outputs(text) == pages.write_page(name, cells)[0]


@each_tutorial
def test_every_tutorial_has_pictures_claims_and_its_place(name) -> None:
    text = (PAGES / f"{name}.md").read_text()
    pictures = set(re.findall(r"\]\(([\w-]+\.png)\)", text))
    assert pictures == {path.name for path in PAGES.glob(f"{name}-?.png")}
    assert len(pictures) >= 2
    assert all((PAGES / picture).stat().st_size <= pages.MOST_BYTES for picture in pictures)
    assert not any(cell.get("outputs") for cell in cells_of(name))
    last = cells_of(name)[-1]
    assert last["metadata"]["title"] == "What this page claims, checked"
    assert "assert " in "".join(last["source"])
    index = (PAGES / "index.md").read_text()
    assert f"({name}.md)" in index
    assert re.search(rf"\({name}-\d\.png\)", index)
    assert f"tutorials/{name}.md" in (ROOT / "docs/mkdocs.yml").read_text()


def test_there_are_seven() -> None:
    assert len(NAMES) == 7


def cell(source: str, *outputs: dict, **metadata: object) -> dict:
    return {"cell_type": "code", "source": source, "metadata": metadata, "outputs": outputs}


TITLE = {"cell_type": "markdown", "source": "# Title\n\nText.", "metadata": {}}


def printed(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": text}


def test_a_page_shows_what_a_cell_prints_in_one_piece_and_not_what_it_logs() -> None:
    code = cell("f()", printed("a 1\n"), printed("noise\n", "stderr"), printed("b 2\n"))
    page, pictures = pages.write_page("one", [TITLE, code])
    assert pictures == {}
    assert "```py\nf()\n```" in page
    assert "```text\na 1\nb 2\n```" in page
    assert "noise" not in page
    assert pages.without_outputs(page) == pages.write_page("one", [TITLE, cell("f()")])[0]


def picture(image: Image.Image) -> dict:
    content = io.BytesIO()
    image.save(content, "PNG")
    text = base64.b64encode(content.getvalue()).decode()
    return {"output_type": "display_data", "data": {"image/png": text}}


def test_a_picture_says_what_it_shows_and_is_small() -> None:
    grey = Image.new("RGBA", (40, 20), (128, 128, 128, 255))
    data = picture(grey)
    page, pictures = pages.write_page("one", [TITLE, cell("draw()", data, alt="A curve")])
    (content,) = pictures.values()
    with Image.open(io.BytesIO(content)) as shown:
        assert shown.mode == "P"
        assert shown.size == (40, 20)
        assert shown.convert("RGBA").getpixel((0, 0)) == (128, 128, 128, 255)
    assert "![A curve](one-1.png)" in page
    with pytest.raises(ValueError, match="its cell must say what it shows"):
        pages.write_page("one", [TITLE, cell("draw()", data)])
    noise = torch.randint(256, (400, 400), generator=torch.Generator().manual_seed(0))
    large = picture(Image.fromarray(noise.to(torch.uint8).numpy()))
    with pytest.raises(ValueError, match="must have at most 80000 bytes, got 9"):
        pages.write_page("one", [TITLE, cell("draw()", large, alt="A curve")])


@pytest.mark.parametrize(
    ("before", "after", "count"),
    [
        ("loss 0.50 ± 0.1\n", "loss 0.55 ± 0.1\n", 0),
        ("loss 0.50\n", "loss 0.80\n", 1),
        ("loss 0.50\n", "error 0.50\n", 1),
        ("loss -0.50\n", "loss 0.50\n", 1),
        ("a  10\n-----\n", "a  9\n----\n", 0),
        ("a 1\n", "a 1 2\n", 1),
    ],
)
def test_differences_between_what_is_shown_and_printed(before, after, count) -> None:
    shown, now = (
        pages.write_page("one", [TITLE, cell("f()", printed(text))])[0] for text in (before, after)
    )
    assert len(list(pages.find_differences(shown, now))) == count


def test_outputs_that_vary_are_not_compared_but_their_number_is() -> None:
    first, second = (
        pages.write_page("one", [TITLE, cell("f()", printed(text), tags=["varies"])])[0]
        for text in ("took 1 s\n", "took 9 s\n")
    )
    assert not list(pages.find_differences(first, second))
    nothing = pages.write_page("one", [TITLE, cell("f()")])[0]
    shown = pages.write_page("one", [TITLE, cell("f()", printed("1\n"))])[0]
    assert "0" in next(pages.find_differences(shown, nothing))
