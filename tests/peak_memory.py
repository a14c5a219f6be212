"""The memory that a program needs, measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

# Not getrusage: its maximum survives `exec`, so a child of a large process starts with that of its
# parent.
PEAK = """
def peak():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1])
"""


def printed(program: str, *arguments: object) -> int:
    """Return the number that `program` prints.

    It may call `peak()`, which returns its largest size so far in KiB. glibc is told to give large
    blocks back at once: by default it keeps them, and small ones between hide what is needed.
    """
    command = [sys.executable, "-c", PEAK + program, *map(str, arguments)]
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.run(command, capture_output=True, check=True, env=exact).stdout)
