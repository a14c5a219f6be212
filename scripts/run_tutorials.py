"""Run the tutorials and write their pages, or check that the pages are what they print.

    python scripts/run_tutorials.py                  # all of them
    python scripts/run_tutorials.py schedule search  # two
    python scripts/run_tutorials.py --check          # writes nothing

A tutorial is docs/tutorials/NAME.py, in jupytext's percent format. It is run in a fresh kernel of
this interpreter on one core, and becomes docs/pages/tutorials/NAME.md with its pictures, and
NAME.ipynb without outputs. Each asserts what it claims. The check fails if one raises, if a page or
notebook is not that of its source, or if a page shows other words or clearly other numbers than are
printed. METAOPT_OMNIGLOT is the path of an official images_*.zip: without, the tutorial that reads
it runs on digits, and is neither written nor are its numbers compared.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbclient
import nbformat
import tyro
from nbformat import NotebookNode
from tutorial_pages import find_differences, without_outputs, write_page

ROOT = Path(__file__).parents[1]
SOURCES, PAGES = ROOT / "docs/tutorials", ROOT / "docs/pages/tutorials"
DATA = {"maml": "METAOPT_OMNIGLOT"}  # what must be set to run on the data of the page
SECONDS = 900  # at most for a cell, and for the kernel to start
ENVIRONMENT = {"MATPLOTLIBRC": str(SOURCES / "matplotlibrc"), "OMP_NUM_THREADS": "1"}
CLOCK = "import time; print(time.process_time())"


def main(names: tyro.conf.Positional[tuple[str, ...]] = (), check: bool = False) -> None:
    """Run tutorials, all by default; write their pages, or check them."""
    os.environ.update(ENVIRONMENT)
    faults = []
    for name in names or sorted(path.stem for path in SOURCES.glob("*.py")):
        try:
            faults += [f"{name}: {fault}" for fault in run(name, check)]
        except (nbclient.exceptions.CellExecutionError, ValueError) as error:
            faults.append(f"{name}: {error}")
    if faults:
        sys.exit("\n".join(faults))


def run(name: str, check: bool) -> list[str]:
    """Run one tutorial, and write its page or return what is wrong with it."""
    notebook = read(name)
    text = nbformat.writes(notebook)
    seconds = execute(notebook)
    page, pictures = write_page(name, notebook.cells)
    has_data = name not in DATA or DATA[name] in os.environ
    print(f"{name}: {seconds:.0f} s of CPU, {len(pictures)} pictures", flush=True)
    target, download = PAGES / f"{name}.md", PAGES / f"{name}.ipynb"
    if check:
        shown = target.read_text()
        faults = list(find_differences(shown, page)) if has_data else []
        if without_outputs(shown) != without_outputs(page) or download.read_text() != text:
            faults.append("the page is not that of the source")
        return [f"{fault}. Run scripts/run_tutorials.py {name}" for fault in faults]
    if not has_data:
        return [f"its page shows other data. Set {DATA[name]}"]
    for old in PAGES.glob(f"{name}-*.png"):
        old.unlink()
    for file, content in pictures.items():
        (PAGES / file).write_bytes(content)
    target.write_text(page)
    download.write_text(text)
    return []


def read(name: str) -> NotebookNode:
    """Return the tutorial as a notebook; the same at each time."""
    notebook = jupytext.read(SOURCES / f"{name}.py")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.pop("lines_to_next_cell", None)  # jupytext's own note
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
    }
    return notebook


def execute(notebook: NotebookNode) -> float:
    """Run all cells in a fresh kernel, in a folder that is thrown away; return its CPU seconds."""
    notebook.cells.append(nbformat.v4.new_code_cell(CLOCK))
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(
            notebook,
            timeout=SECONDS,
            startup_timeout=SECONDS,
            kernel_name="python3",  # for jupyter that is the interpreter that runs this
            resources={"metadata": {"path": folder}},
        ).execute()
    return float(notebook.cells.pop().outputs[0].text)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
