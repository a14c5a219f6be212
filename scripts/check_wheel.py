"""Build the distribution, and run the wheel where only what it requires is installed.

    .venv/bin/python scripts/check_wheel.py          # leaves nothing behind
    .venv/bin/python scripts/check_wheel.py dist     # leaves what was built in dist, to publish it

Nothing large is downloaded: the packages that the wheel requires, and those that these require, are
links to the installed ones.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests/wheel_program.py"


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command and return what it prints; if it fails, end with that."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"check_wheel: {' '.join(map(str, command))} failed:\n{done.stdout}")
    return done.stdout


def build(folder: Path) -> Path:
    """Build source distribution and wheel into an empty folder, and return the wheel."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    run(sys.executable, "-m", "twine", "check", "--strict", *folder.iterdir())
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_files(wheel: Path) -> None:
    """End if a file of the two packages is not in the wheel: data files are easily forgotten."""
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = [
        path.relative_to(ROOT)
        for package in ("metaopt", "optimizers")
        for path in (ROOT / package).rglob("*")
    ]
    missing = {
        path.as_posix()
        for path in files
        if (ROOT / path).is_file() and "__pycache__" not in path.parts
    } - packed
    if missing:
        sys.exit(
            f"check_wheel: the wheel lacks {sorted(missing)}. Add them to "
            "[tool.setuptools.package-data]."
        )


def requirements(wheel: Path) -> list[str]:
    """Return what the wheel says that it requires."""
    (metadata,) = [
        name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA")
    ]
    return PathDistribution(zipfile.Path(wheel, metadata.removesuffix("METADATA"))).requires or []


def closure(lines: list[str]) -> dict[str, Distribution]:
    """Return the installed distributions that satisfy the requirements, and theirs in turn."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    pending = [(line, "") for line in lines]
    while pending:
        line, extra = pending.pop()
        needed = Requirement(line)
        if (line, extra) in seen or (
            needed.marker is not None and not needed.marker.evaluate({"extra": extra})
        ):
            continue
        seen.add((line, extra))
        found[needed.name] = distribution(needed.name)
        pending += [
            (other, name)
            for other in found[needed.name].requires or []
            for name in ("", *needed.extras)
        ]
    return found


def link(packages: dict[str, Distribution], site: Path) -> None:
    """Make the packages importable from another environment."""
    for package in packages.values():
        for top in {PurePosixPath(str(file)).parts[0] for file in package.files or []} - {
            "..",
            "__pycache__",
        }:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(package.locate_file(top))))


def main() -> None:
    """Build, install, run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else folder / "dist")
        check_files(wheel)
        run(sys.executable, "-m", "venv", "--without-pip", folder / "env")
        python = folder / "env/bin/python"
        site = Path(
            run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        )
        link(closure(requirements(wheel)), site)
        run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", wheel)
        run(python, "-I", "-W", "error", PROGRAM, cwd=folder)
    print(f"{wheel.name} is complete, and works with what it requires alone.")


if __name__ == "__main__":
    main()
