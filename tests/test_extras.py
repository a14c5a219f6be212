"""Without the extra `scripts` everything else works, and what needs it says how to get it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import metaopt as mo
from metaopt.extras import EXTRAS, PACKAGES, extra
from metaopt.meta_training import Report
from metaopt.table import write_table
from metaopt.tasks.digits import digits
from metaopt.tasks.omniglot import read_omniglot
from optimizers import SGD

ROOT = Path(__file__).parents[1]
INSTALL = r'not installed\. It comes with the extra: pip install "torch-metaopt\[scripts\]"'


@pytest.fixture
def without_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make imports of these packages fail as where they are not installed."""
    for name in list(sys.modules):
        if name.split(".")[0] in PACKAGES:
            monkeypatch.setitem(sys.modules, name, None)
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    digits.cache_clear()


def report() -> Report:
    return Report(
        {"SGD, lr 0.1": torch.tensor([[2.0, 1.0], [1.0, 0.5]]), "x": torch.full((2, 2), torch.nan)}
    )


def read(folder: Path) -> None:
    with zipfile.ZipFile(folder / "images_small.zip", "w") as archive:
        archive.writestr("images/Greek/character01/0001_01.png", b"")
    read_omniglot(folder)


def draw(folder: Path) -> None:
    def loss(levels: object, batch: object) -> torch.Tensor:
        return levels.low(torch.ones(1)).sum() + levels.top(torch.ones(1)).sum()  # type: ignore[attr-defined]

    top, low = (mo.Level(name, torch.nn.Linear(1, 1), loss, SGD(0.1)) for name in ("top", "low"))
    mo.LevelGraph([mo.Edge(top, low)]).draw(folder / "graph.png")


@pytest.mark.usefixtures("without_extra")
@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda folder: digits(), "`digits` needs scikit-learn"),
        (
            lambda folder: mo.tasks.DigitsMLP().sample(torch.Generator(), 1),
            "`digits` needs scikit-learn",
        ),
        (read, "`read_omniglot` needs pillow"),
        (lambda folder: report().plot(folder / "plot.png"), "`Report.plot` needs matplotlib"),
        (draw, "`LevelGraph.draw` needs matplotlib"),
    ],
)
def test_what_needs_a_package_of_the_extra_names_both(
    use: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"{message}, which is {INSTALL}"):
        use(tmp_path)


def test_so_does_each_script() -> None:
    """Each in a fork of a process that has imported torch alone."""
    scripts = ["train_optimizer", "evaluate", "train_schedule", "maml", "meta_weight_net"]
    program = f"""
import os, sys, torch
sys.path.insert(0, {str(ROOT / "scripts")!r})
sys.modules.update(dict.fromkeys({sorted(PACKAGES)!r}))
for script in {scripts!r}:
    child = os.fork()
    if not child:
        __import__(script)
    assert os.waitpid(child, 0)[1], script
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for script in scripts:
        needs = rf'ModuleNotFoundError: scripts/{script}\.py needs .*"torch-metaopt\[scripts\]"'
        assert re.search(needs, done.stderr), script


def test_another_missing_package_is_not_ours_to_explain() -> None:
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_package'"), extra("x"):
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401


def test_the_extra_is_what_the_messages_speak_of() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, packages in EXTRAS.items():
        found = project["optional-dependencies"][name]
        assert {line.split(">")[0] for line in found} == set(packages.values())
    assert project["name"] == "torch-metaopt"
    assert not {line.split(">")[0] for line in project["dependencies"]} & set(PACKAGES.values())


@pytest.mark.usefixtures("without_extra")
def test_a_report_is_written_without_any() -> None:
    assert report().table() == (
        "optimizer      mean loss    std. error    final loss    diverged\n"
        "-----------  -----------  ------------  ------------  ----------\n"
        "SGD, lr 0.1       1.1250        0.3750        0.7500           0\n"
        "x                    nan           nan           nan           2"
    )


def test_a_table_without_rows_has_headers_only() -> None:
    assert write_table(["a", "bc"], [], ["", ".4f"]) == "a  bc\n-  --"
