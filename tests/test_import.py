"""What `import metaopt` costs and brings along."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import metaopt

ROOT = Path(__file__).parents[1]
LIMIT = 1.15
RUNS = 3
NEEDED = {"metaopt", "einops", "safetensors", "tqdm"}  # beyond what torch imports itself


def run(program: str) -> str:
    """Run a program in a fresh interpreter that keeps compiled modules, as installed ones are."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    path = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=env | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_it_takes_hardly_longer_than_torch() -> None:
    """It took 2.1 times as long: two decorators of torch imported its compiler, unasked.

    Processor time, user and system, of one process: a busy machine slows down both parts. Found:
    1.08; all modules at once take 1.20, of which .07 is a pass of Python's collector over torch's
    objects.
    """
    program = (
        "import time, torch; alone = time.process_time(); import metaopt; "
        "print(time.process_time() / alone)"
    )
    run(program)  # compiles the modules
    ratios = [float(run(program)) for _ in range(RUNS)]
    assert statistics.median(ratios) <= LIMIT, f"{ratios}"


def test_what_is_imported_on_demand_is_there() -> None:
    """Module or name first, in a program that has imported none of it: a fork with torch alone."""
    cases = []
    for module, names in metaopt.ON_DEMAND.items():
        asked = [f"metaopt.{name} is metaopt.{module}.{name}" for name in names] or [
            f"metaopt.{module}"
        ]
        for order in (f"metaopt.{module}", f"metaopt.{(*names, module)[0]}"):
            cases.append(
                f"import metaopt; assert not {{{module!r}, *{names}}} - set(dir(metaopt)); "
                f"{order}; assert {' and '.join(asked)}"
            )
        assert set(names) <= set(metaopt.__all__)
    program = f"""
import os, sys, torch
for case in {cases!r}:
    sys.stdout.flush()
    child = os.fork()
    if not child:
        exec(case)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, case
    print(case)
"""
    assert run(program).splitlines() == cases
    with pytest.raises(AttributeError, match="module 'metaopt' has no attribute 'Levl'"):
        _ = metaopt.Levl


def test_it_brings_along_only_what_every_program_needs() -> None:
    """What is slow, or in an extra, is imported where it is used."""
    program = (
        "import sys, torch; before = {name.split('.')[0] for name in sys.modules};"
        "import metaopt, metaopt.optimizers; new = {name.split('.')[0] for name in sys.modules} - "
        "before;print(*(new - sys.stdlib_module_names));"
        "assert 'torch._dynamo' not in sys.modules; assert 'torch.utils.tensorboard' not in "
        "sys.modules"
    )
    assert set(run(program).split()) <= NEEDED
