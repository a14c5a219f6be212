"""`optimizers` and `metaopt.optimizers` are the same modules, and only the first can be hidden."""

from __future__ import annotations

import importlib
import os
import pickle
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import metaopt as mo
import optimizers
from metaopt.optimizer import counterparts, register_equal
from metaopt.optimizers import SGD
from metaopt.optimizers.schedules import Cosine

ROOT = Path(__file__).parents[1]
NAMES = [
    "optimizers",
    "metaopt.optimizers",
    "optimizers.schedules.cosine",
    "metaopt.optimizers.schedules.cosine",
]


def run(program: str, *, cwd: Path = ROOT, before: Path | None = None) -> str:
    """Run a program in a fresh interpreter and return what it prints.

    `before` precedes this checkout.
    """
    path = os.pathsep.join(str(folder) for folder in (before, ROOT) if folder is not None)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("first", NAMES)
def test_whichever_name_is_imported_first_the_modules_are_the_same(first: str) -> None:
    run(
        f"import {first}; import sys, optimizers, metaopt.optimizers;"
        "assert optimizers is metaopt.optimizers;"
        "from optimizers import SGD; from metaopt.optimizers import SGD as Same; assert Same is "
        "SGD;from optimizers.schedules import Cosine; from metaopt.optimizers.schedules import "
        "Cosine as Same; assert Same is Cosine;both = {name for name in sys.modules if "
        "name.startswith('optimizers.')};assert both == {name.removeprefix('metaopt.') for name in "
        "sys.modules if name.startswith('metaopt.optimizers.')};assert all(sys.modules[name] is "
        "sys.modules[f'metaopt.{name}'] for name in both)"
    )


def test_every_module_has_both_names_from_the_start() -> None:
    """One that were loaded later would be loaded twice, and its classes be two."""
    every = {
        name for _, name, _ in pkgutil.walk_packages(optimizers.__path__, "metaopt.optimizers.")
    }
    assert {
        f"metaopt.optimizers.{name}"
        for name in ("sgd", "schedules", "schedules.cosine", "learned.lstm")
    } <= every
    for name in every:
        assert sys.modules[name] is sys.modules[name.removeprefix("metaopt.")]


def test_the_names_are_those_that_the_stubs_give_to_type_checkers() -> None:
    for path in (ROOT / "metaopt/optimizers").glob("*.pyi"):
        part = "" if path.stem == "__init__" else f".{path.stem}"
        assert path.read_text() == f"from optimizers{part} import *\n"
        assert importlib.import_module(f"optimizers{part}").__all__
    packages = {
        name for _, name, is_package in pkgutil.iter_modules(optimizers.__path__) if is_package
    }
    assert packages == {path.stem for path in (ROOT / "metaopt/optimizers").glob("*.pyi")} - {
        "__init__"
    }


def test_pickles_name_the_classes_so_that_every_process_finds_them() -> None:
    optimizer = SGD(lr=Cosine(0.1, steps=3))
    data = pickle.dumps(optimizer)
    assert b"metaopt.optimizers.sgd" in data
    assert type(pickle.loads(data)) is SGD
    # as they were written while the other name was the only one
    assert pickle.loads(b"coptimizers.sgd\nSGD\n.") is SGD


MINE = '''
class SGD:
    """A user's own, of the same name."""

def schedule():
    return "mine"
'''
PROGRAM = """
import torch, {first}, {second}
import metaopt as mo
from metaopt.optimizers import SGD, LSTMOptimizer
from metaopt.optimizers.schedules import Cosine
import optimizers

assert optimizers.schedule() == "mine" and optimizers.SGD is not SGD
model = torch.nn.Linear(2, 1)
net = mo.functional(model)
loss = lambda params, x: net(params, x).square().mean()
for optimizer in (SGD(Cosine(0.1, steps=2)), mo.from_torch(torch.optim.Adam(model.parameters()))):
    model.zero_grad()
    mo.minimize(loss, optimizer, net.params, torch.ones(3, 2), steps=2).losses.sum().backward()
    assert model.weight.grad.abs().min() > 0
LSTMOptimizer(4).save("w.safetensors")
assert type(mo.Optimizer.load("w.safetensors")) is LSTMOptimizer
assert type(LSTMOptimizer.load("w.safetensors").as_torch(model.parameters())).__name__ == "Deployed"
try:
    mo.minimize(loss, optimizers.SGD(), net.params, torch.ones(3, 2), steps=2)
except TypeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [("optimizers", "metaopt.optimizers"), ("metaopt.optimizers", "optimizers")],
)
def test_a_users_own_file_of_that_name_stands_in_nobodys_way(
    first: str, second: str, tmp_path: Path
) -> None:
    """`from_torch` imported `optimizers` by name, and got the user's file."""
    (tmp_path / "optimizers.py").write_text(MINE)
    (tmp_path / "script.py").write_text(PROGRAM.format(first=first, second=second))
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "got optimizers.SGD. Use one from `metaopt.optimizers`, for example "
        "`metaopt.optimizers.SGD(lr=0.1)`" in done.stdout
    )


def test_so_does_a_users_package_and_a_process_that_is_spawned(tmp_path: Path) -> None:
    (tmp_path / "optimizers").mkdir()
    (tmp_path / "optimizers/__init__.py").write_text(MINE)
    (tmp_path / "script.py").write_text(
        "import multiprocessing, torch\n"
        "from metaopt.optimizers import SGD\n"
        "import optimizers\n"
        "def rate(optimizer):\n"
        "    return type(optimizer) is SGD, optimizer.lr, optimizers.schedule()\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(rate, [SGD(0.5)]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "script"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[(True, 0.5, 'mine')]", done.stderr


def test_importing_metaopt_leaves_the_plain_name_to_whoever_comes_later(tmp_path: Path) -> None:
    """The path may get a folder of the user's first after `metaopt.optimizers` was loaded."""
    (tmp_path / "optimizers.py").write_text(MINE)
    run(
        f"import sys, metaopt.optimizers; sys.path.insert(0, {str(tmp_path)!r}); import "
        f"optimizers; optimizers.schedule()"
    )


def test_without_the_package_beside_it_the_alias_says_what_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "metaopt/optimizers"
    folder.mkdir(parents=True)
    (tmp_path / "metaopt/__init__.py").write_text("")
    (folder / "__init__.py").write_text((ROOT / "metaopt/optimizers/__init__.py").read_text())
    printed = run(
        "try: import metaopt.optimizers\nexcept ImportError as error: print(error.name, error)",
        cwd=tmp_path,
        before=tmp_path,
    )
    assert "optimizers The package `optimizers` must stand beside `metaopt`, got none in" in printed
    assert "pip install --force-reinstall torch-metaopt" in printed


def test_equals_are_for_classes() -> None:
    mine = type("Mine", (torch.optim.SGD,), {})
    with pytest.raises(
        TypeError, match=r"`ours` must be a class derived from metaopt\..*Optimizer, got SGD\("
    ):
        register_equal(mine, SGD(0.1), {})  # type: ignore[arg-type]
    with pytest.raises(
        TypeError,
        match=r"`theirs` must be a class derived from torch\.optim\..*Optimizer, got <module",
    ):
        register_equal(types.ModuleType("x"), SGD, {})  # type: ignore[arg-type]


def test_a_users_optimizer_and_its_equal_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass of torch's has no equal, until somebody says which."""

    class Mine(torch.optim.SGD):
        pass

    model = torch.nn.Linear(2, 1)
    with pytest.raises(
        TypeError, match=r"no known equal here: .*`metaopt\.optimizer\.register_equal`"
    ):
        mo.from_torch(Mine(model.parameters(), 0.5))
    monkeypatch.setattr(counterparts, "_COUNTERPARTS", dict(counterparts._COUNTERPARTS))
    register_equal(Mine, SGD, {"velocity": "momentum_buffer"})
    (ours,) = mo.from_torch(Mine(model.parameters(), 0.5)).optimizers
    assert type(ours) is SGD
    assert ours.lr == 0.5
