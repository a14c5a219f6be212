"""The rules of the tree, read off the source."""

from __future__ import annotations

import ast
import copy
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import metaopt
import optimizers

ROOT = Path(__file__).parents[1]
# Inside metaopt a module imports only from lower layers; what stands in one line does not know its
# neighbours.
LAYERS = [
    ["torch_internals", "errors", "extras", "table"],
    ["transforms"],
    ["tree"],
    ["exact_ops", "compiled", "linear_solve"],
    ["autodiff"],
    ["_functional", "scan", "batching"],
    ["closure", "differentiate", "second_order"],
    ["optimizer"],
    ["inner_problem", "optimizers"],
    ["_minimize"],
    ["_implicit", "_meta_grad", "meta_training", "levels"],
    ["tasks", "diagnostics"],
    ["train", "interop"],
    ["__init__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
PACKAGES = ["metaopt", "optimizers", "scripts", "examples"]  # each may import the ones before it
LAZY = {  # may import what is slow to load when it is asked for
    "metaopt/train/loggers.py",  # a logging backend
    "metaopt/meta_training/evaluation.py",  # matplotlib, for a report's plot
    "metaopt/levels/show.py",  # matplotlib
    "metaopt/tasks/digits.py",  # scikit-learn, for its data
    "metaopt/tasks/omniglot.py",  # pillow, to read drawings
    "metaopt/interop/torchopt.py",  # torchopt, 0.13 s
    # our optimizers, which most programs that never ask for them do without
    "metaopt/interop/torch.py",
    "metaopt/interop/scheduler.py",  # the same
}
FORBIDDEN_NAMES = {"utils", "misc", "common", "helpers"}
FORBIDDEN_ATTRIBUTES = {"item", "data"}
FORBIDDEN_CALLS = {
    "torch.manual_seed",
    "torch.random.manual_seed",
    "torch.seed",
    "torch.load",
    "torch.set_default_dtype",
}

FILES = sorted(
    path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")
)
TREES = {
    ".".join(path.with_suffix("").parts): ast.parse((ROOT / path).read_text()) for path in FILES
}


def absolute(name: str, source: ast.Module) -> ast.Module:
    """Return the source with absolute imports."""
    source = copy.deepcopy(source)
    for node in ast.walk(source):
        if isinstance(node, ast.ImportFrom) and node.level:
            node.module = ".".join([*name.split(".")[: -node.level], *filter(None, [node.module])])
            node.level = 0
    return source


SOURCES = {name: absolute(name, tree) for name, tree in TREES.items()}
MODULES = {name.removesuffix(".__init__") for name in SOURCES}
each_module = pytest.mark.parametrize("name", SOURCES)


def imports(node: ast.AST) -> Iterator[str]:
    """Yield the modules that a tree imports, leaving out what only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            full = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from (name if name in MODULES else str(child.module) for name in full)
        yield from imports(child)


def unit(name: str) -> str:
    """Return the layer's name: `metaopt.differentiate.point` belongs to `differentiate`."""
    return (*name.split("."), "__init__")[1]


@each_module
def test_imports_point_downwards(name: str) -> None:
    package = name.split(".")[0]
    for imported in imports(SOURCES[name]):
        other = imported.split(".")[0]
        if other in PACKAGES:
            assert PACKAGES.index(other) <= PACKAGES.index(package), f"{name} imports {imported}"
        if package == other == "metaopt" and unit(imported) != unit(name):
            assert RANK[unit(imported)] < RANK[unit(name)], f"{name} imports {imported}"
        if package == "optimizers" and other == "metaopt" and name != "optimizers.__init__":
            assert RANK[unit(imported)] < RANK["optimizers"], (
                f"{name} imports {imported}, which may import `metaopt.optimizers`"
            )


@each_module
def test_imports_are_relative_in_the_package_with_two_names_and_absolute_elsewhere(
    name: str,
) -> None:
    """The modules of `optimizers` are loaded as `metaopt.optimizers`; what they call by its first
    name may be a user's file.
    """
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            if name.startswith("optimizers."):
                assert (
                    node.module is None or node.module.split(".")[0] != "optimizers" or node.level
                ), f"{name}:{node.lineno}"
            else:
                assert not node.level, f"{name}:{node.lineno}: imports are absolute"
        if isinstance(node, ast.Import) and name.startswith("optimizers."):
            assert not [
                alias for alias in node.names if alias.name.split(".")[0] == "optimizers"
            ], f"{name}:{node.lineno}"


def test_there_are_no_cycles_and_rules_do_not_know_each_other() -> None:
    graph = {
        name.removesuffix(".__init__"): {i for i in imports(source) if i in MODULES}
        for name, source in SOURCES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
    shared = {"protocol", "arguments", "refusal", "steps", "point", "rerun"}
    rules = {name for name in MODULES if name.startswith("metaopt.differentiate.")} - {
        f"metaopt.differentiate.{name}" for name in shared
    }
    assert not {(rule, other) for rule in rules for other in graph[rule] & rules}


@each_module
def test_functions_import_nothing(name: str) -> None:
    inside = [
        i
        for node in ast.walk(SOURCES[name])
        if isinstance(node, ast.FunctionDef)
        for i in imports(node)
    ]
    assert not inside or f"{name.replace('.', '/')}.py" in LAZY, (
        f"{name} imports {inside} inside a function"
    )


@each_module
def test_names_say_what_is_meant(name: str) -> None:
    assert not FORBIDDEN_NAMES & set(name.split("."))
    assert not name.startswith("scripts.optimizers")
    assert len(ast.unparse(SOURCES[name]).splitlines()) <= 400, "a file holds one concept"


@each_module
def test_the_core_is_pure(name: str) -> None:
    if unit(name) in ("train", "interop") or name.split(".")[0] not in ("metaopt", "optimizers"):
        return
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Attribute):
            assert node.attr not in FORBIDDEN_ATTRIBUTES, f"{name}:{node.lineno} reads .{node.attr}"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, (
                f"{name}:{node.lineno} calls {ast.unparse(node.func)}"
            )
    assert not {"pickle", "random", "numpy.random"} & set(imports(SOURCES[name]))


def test_one_file_each_knows_distribution_and_logging_backends() -> None:
    users = {
        name
        for name in SOURCES
        for i in imports(SOURCES[name])
        if i.startswith(("torch.distributed", "torch.utils.tensorboard"))
    }
    assert users <= {"metaopt.train.distributed", "metaopt.train.loggers"}


@pytest.mark.parametrize(
    ("package", "name"),
    [(package, name) for package in (metaopt, optimizers) for name in package.__all__],
)
def test_what_is_public_is_documented(package: object, name: str) -> None:
    """By hand: a dataclass or a named tuple without a docstring is given one that starts with its
    own name.
    """
    doc = getattr(package, name).__doc__
    assert doc
    assert not doc.startswith(f"{name}(")


def test_importing_the_library_has_no_side_effect_on_torch() -> None:
    """A fresh interpreter: the random state, the default dtype and the thread count are as torch
    leaves them.
    """
    program = (
        "import torch; state = lambda: (torch.get_rng_state().tolist(), torch.get_default_dtype(), "
        "torch.is_grad_enabled());before = state(); import metaopt, optimizers; assert before == "
        "state()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
