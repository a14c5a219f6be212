"""The rules of the tree, read off the source."""

from __future__ import annotations

import ast
import copy
import graphlib
import importlib
import io
import subprocess
import sys
import tokenize
import types
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import metaopt
import optimizers

ROOT = Path(__file__).parents[1]
# Inside metaopt a module imports only from lower layers; what stands in one line does not know its
# neighbours.
LAYERS = [
    ["torch_internals", "extras", "table", "native", "log_axis"],
    ["transforms"],
    ["checks", "tree", "random_state", "spare"],
    ["exact_ops", "compiled", "linear_solve", "distributed"],
    ["autodiff"],
    ["_functional", "scan", "batching"],
    ["closure", "differentiate", "second_order"],
    ["optimizer"],
    ["inner_problem", "optimizers"],
    ["_minimize"],
    ["_implicit", "_meta_grad", "meta_training", "levels"],
    ["tasks", "diagnostics"],
    ["train", "interop"],
    ["black_box"],
    ["__init__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
PACKAGES = ["metaopt", "optimizers", "scripts", "examples"]  # each may import the ones before it
LAZY = {  # may import what is slow to load when it is asked for
    "metaopt/distributed/shards.py",  # torch.distributed.checkpoint, 1 s
    "metaopt/train/loggers.py",  # a logging backend
    "metaopt/meta_training/evaluation.py",  # matplotlib, for a report's plot
    "metaopt/meta_training/judging.py",  # the same
    "metaopt/levels/show.py",  # matplotlib
    "metaopt/tasks/digits.py",  # scikit-learn, for its data
    "metaopt/tasks/examples.py",  # the same
    "metaopt/tasks/omniglot.py",  # pillow, to read drawings
    "metaopt/tasks/sentences.py",  # transformers, 3 s
    "scripts/meta_weight_net_learners.py",  # peft, which is of no extra
    "metaopt/interop/torchopt.py",  # torchopt, 0.13 s
    "scripts/contenders/large_model.py",  # transformers, 2 s
    "metaopt/black_box/ax.py",  # Ax, 3 s
    "metaopt/black_box/botorch.py",  # BoTorch, 2 s
    "metaopt/black_box/optuna.py",  # Optuna
    "metaopt/black_box/shared.py",  # the same
    "metaopt/black_box/show.py",  # matplotlib and TensorBoard
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

# Names of torch that begin with an underscore stand in `torch_internals`, but for methods that one
# class has to override.
INTERNALS = "metaopt.torch_internals"
PRIVATE = {
    name
    for owner in (torch.Tensor, nn.Module(), torch.autograd.Function, torch.optim.Optimizer)
    for name in dir(owner)
    if name.startswith("_") and not name.startswith("__")
} | {"_current_level"}
OVERRIDDEN = {("metaopt.interop.higher.patch", "_apply")}  # what `to` and `double` call
MOST_LINES = {ast.FunctionDef: 60, ast.ClassDef: 200, ast.Module: 300}  # but for docstrings
LONG: set[str] = set()
# Tokens of code, without comments and docstrings. Whoever needs more says why; whoever needs less
# lowers it.
MOST_TOKENS = {"metaopt": 133_900, "optimizers": 37_800}
NOT_COUNTED = {"interop", "tasks", "diagnostics", "black_box"}  # beside the core
SHADOWED: set[str] = set()
# set the global generators, and put them back
RESTORE = {"metaopt.black_box.isolation", "metaopt.random_state"}

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
    """The modules of `optimizers` are loaded as `metaopt.optimizers`.

    What they call by its first name may be a user's file.
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
    shared = {"protocol", "arguments", "refusal", "steps", "point", "rerun", "statistics"}
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
    written = ast.parse(ast.unparse(SOURCES[name]))
    assert lines_of_code(written) <= MOST_LINES[ast.Module], "a file holds one concept"


def torch_names(source: ast.Module) -> dict[str, str]:
    """Return what a file imports from torch: its name there -> its full name."""
    names = {}
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
    return {name: full for name, full in names.items() if full.split(".")[0] == "torch"}


def private_names(source: ast.Module) -> Iterator[str]:
    """Yield the private names of torch in a file: imported, read, written, defined or in texts."""
    names = torch_names(source)
    yield from (full for full in names.values() if any(part[0] == "_" for part in full.split(".")))
    for node in ast.walk(source):
        if isinstance(node, ast.Attribute) and node.attr[0] == "_" and node.attr[:2] != "__":
            if ast.unparse(node).split(".")[0] in names or node.attr in PRIVATE:
                yield node.attr
        elif isinstance(node, ast.Constant) and str(node.value) in PRIVATE:
            yield str(node.value)
        elif isinstance(node, ast.ClassDef):
            methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
            yield from methods & PRIVATE


@each_module
def test_private_names_of_torch_stand_in_one_file(name: str) -> None:
    if name.split(".")[0] not in ("metaopt", "optimizers") or name == INTERNALS:
        return
    found = [part for part in private_names(SOURCES[name]) if (name, part) not in OVERRIDDEN]
    assert not found, f"{name} uses {found}: put them into {INTERNALS}, with the reason"


def test_a_private_name_is_found_however_it_is_used() -> None:
    for program in (
        "import torch._dynamo",
        "from torch._C import x",
        "from torch.nn.modules.batchnorm import _NormBase",
        "import torch; torch._foreach_add",
        "from torch.autograd import forward_ad; forward_ad._current_level",
        "import torch; torch._dynamo.config.x",
        "tensor._version",
        "module._parameters['x']",
        "getattr(module, '_buffers')",
        "class A(Module):\n    def _apply(self): ...",
    ):
        assert list(private_names(ast.parse(program))), program
    assert not list(private_names(ast.parse("import torch; self._own; torch.add; x.__dict__")))


def test_no_module_is_shadowed_by_what_its_package_exports() -> None:
    """`import a.b as b` gives whatever `a.b` is."""
    modules = {name for name in MODULES if name.split(".")[0] in ("metaopt", "optimizers")}
    for name in modules:
        importlib.import_module(name)
    shadowed = {
        name
        for name in modules
        for package, _, last in [name.rpartition(".")]
        if package and not isinstance(getattr(sys.modules[package], last), types.ModuleType)
    }
    assert shadowed <= SHADOWED


def lines_of_code(node: ast.AST) -> int:
    """Return the number of lines of a module, function or class, without docstrings."""

    def lines(first: ast.stmt, last: ast.stmt) -> int:
        assert last.end_lineno is not None
        return last.end_lineno - first.lineno + 1

    kinds = ast.FunctionDef | ast.ClassDef | ast.Module
    documented = [
        part.body[0]
        for part in ast.walk(node)
        if isinstance(part, kinds) and ast.get_docstring(part)
    ]
    body = node.body if isinstance(node, ast.Module) else [node]
    return lines(body[0], body[-1]) - sum(lines(doc, doc) for doc in documented)  # type: ignore[arg-type]


@each_module
def test_functions_and_classes_are_short(name: str) -> None:
    if name.split(".")[0] not in ("metaopt", "optimizers"):
        return
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            full, found = f"{name.removesuffix('.__init__')}.{node.name}", lines_of_code(node)
            assert found <= MOST_LINES[type(node)] or full in LONG, f"{full} has {found} lines"


def count_tokens(paths: Iterable[Path]) -> int:
    """Return the number of names, numbers, operators and texts that are no docstrings."""
    count = 0
    starts = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
    kinds = {tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING}
    for path in paths:
        before = tokenize.ENCODING
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type in (tokenize.COMMENT, tokenize.NL):
                continue
            is_docstring = token.type == tokenize.STRING and before in starts
            count += token.type in kinds and not is_docstring
            before = token.type
    return count


@pytest.mark.parametrize("package", MOST_TOKENS)
def test_the_library_does_not_grow_unseen(package: str) -> None:
    paths = [
        path for path in FILES if path.parts[0] == package and path.parts[1] not in NOT_COUNTED
    ]
    assert count_tokens(ROOT / path for path in paths) <= MOST_TOKENS[package]


@each_module
def test_the_core_is_pure(name: str) -> None:
    if unit(name) in ("train", "interop") or name.split(".")[0] not in ("metaopt", "optimizers"):
        return
    if name in RESTORE:
        return
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Attribute):
            assert node.attr not in FORBIDDEN_ATTRIBUTES, f"{name}:{node.lineno} reads .{node.attr}"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, (
                f"{name}:{node.lineno} calls {ast.unparse(node.func)}"
            )
    assert not {"pickle", "random", "numpy.random"} & set(imports(SOURCES[name]))


def test_one_place_each_knows_distribution_and_logging_backends() -> None:
    users = {
        name
        for name in SOURCES
        for i in imports(SOURCES[name])
        if i.startswith(("torch.distributed", "torch.utils.tensorboard"))
    }
    pages = "metaopt.black_box.show"  # TensorBoard's page of hyperparameters
    distributed = {name for name in MODULES if unit(name) == "distributed"}
    measured = {"scripts.scaling", "scripts.two_processes"}  # messages
    assert users <= distributed | {"metaopt.train.loggers", pages} | measured


@pytest.mark.parametrize(
    ("package", "name"),
    [(package, name) for package in (metaopt, optimizers) for name in package.__all__],
)
def test_what_is_public_is_documented(package: object, name: str) -> None:
    """By hand: the docstring that Python gives a dataclass or named tuple starts with its name."""
    doc = getattr(package, name).__doc__
    assert doc
    assert not doc.startswith(f"{name}(")


def test_importing_the_library_has_no_side_effect_on_torch() -> None:
    """A fresh interpreter.

    The random state, the default dtype and the thread count are as torch leaves them.
    """
    program = (
        "import torch; state = lambda: (torch.get_rng_state().tolist(), torch.get_default_dtype(), "
        "torch.is_grad_enabled());before = state(); import metaopt, optimizers; assert before == "
        "state()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
