"""Small C++ libraries, compiled on the machine that runs them.

They hold loops over plain arrays and know nothing of torch, so one is compiled in a second or two,
once: the result is kept in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

# not -ffast-math: it makes the whole process round tiny numbers to zero, and takes nan for absent
FLAGS = [
    "-std=c++17",
    "-O3",
    "-shared",
    "-fPIC",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-freciprocal-math",
]
LEVELS = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}


@functools.cache
def load_native(source: Path) -> ctypes.CDLL | None:
    """Return the library compiled from a C++ file; None where there is no compiler.

    The compiler is `$CXX`, else `g++` or `clang++`. With `METAOPT_NATIVE=0` none is looked for. If
    it fails, a warning says so, and None is returned too.
    """
    compiler = _find_compiler()
    if compiler is None:
        return None
    level = LEVELS.get(torch.backends.cpu.get_cpu_capability())
    command = [compiler, *FLAGS, *([f"-march={level}"] if level else [])]
    key = hashlib.sha256(source.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
    try:
        target = _cache() / f"{source.stem}-{key}.so"
        with contextlib.suppress(OSError):  # not there yet, or damaged
            return ctypes.CDLL(str(target))
        _compile(command, source, target)
        return ctypes.CDLL(str(target))
    # RuntimeError: there is no home
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(
            f"{source.name} could not be compiled with {compiler}, so its slower definition in "
            f"Python is used: {said}. Set CXX to a compiler of C++17, or METAOPT_NATIVE=0.",
            stacklevel=2,
        )
        return None


def _find_compiler() -> str | None:
    if os.environ.get("METAOPT_NATIVE") == "0":
        return None
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "metaopt"


def _compile(command: list[str], source: Path, target: Path) -> None:
    """Write the library; another process that does the same at the same time is no trouble."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        subprocess.run(
            [*command, str(source), "-o", str(made)], check=True, capture_output=True, text=True
        )
        made.replace(target)
