"""A directory that serves one loop at a time, and the files of that loop in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metaopt import tree
from metaopt.scan.tensor_file import read, read_facts, write
from metaopt.tree import Tree

try:
    import fcntl
except ImportError:  # Windows: nobody notices two loops in one directory there
    fcntl = None  # type: ignore[assignment]


class Directory:
    """Files of one loop, each written whole, with a checksum, and naming the loop it belongs to.

    A file has a kind and, where there are several of it, a time. What else lies in the directory is
    not touched.

    Args:
        path: of the directory.
        remedies: kind -> what happens if a file of it is deleted, for who finds it damaged.
    """

    def __init__(self, path: Path, remedies: dict[str, str]):
        self.path = path
        self._remedies = remedies
        self._loop: dict[str, str] = {}
        self._lock: int | None = None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the directory until `release`, or until this process ends, however it ends.

        What is raised while this is entered releases it too: the same process may try again.

        Raises:
            OSError: there is no such directory.
            ValueError: another loop is using it.
        """
        try:
            self._acquire()
            yield
        except BaseException:
            self.release()
            raise

    def _acquire(self) -> None:
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"Revolve: `directory` must exist, got {str(self.path)!r}. It is not made for you, "
                f"lest a disk that is not mounted goes unnoticed. Call `mkdir -p {self.path}`."
            )
        if self._lock is not None or fcntl is None:
            return
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Revolve: `directory` must serve one loop at a time, got {str(self.path)!r}, "
                "which a loop that waits for its backward pass is using. Run that backward pass "
                "first (or drop its results), or use another directory."
            ) from None

    def release(self) -> None:
        """Let another loop use the directory."""
        if self._lock is not None:
            # to close it is not enough: a process forked meanwhile has it open too
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = None

    def __del__(self) -> None:
        self.release()

    def claim(self, loop: dict[str, str]) -> None:
        """Look through the directory for the loop with these facts.

        Raises:
            ValueError: a file in it belongs to another loop or is damaged.
        """
        self._loop = loop
        for partial in self.path.glob("*.partial"):  # of a process that was killed as it wrote
            if partial.stem.split("-")[0] in self._remedies:
                partial.unlink()
        for kind, remedy in self._remedies.items():
            for path in self._files(kind):
                self._check(path, read_facts(path, remedy))

    def _check(self, path: Path, facts: dict[str, str]) -> None:
        others = [
            f"{name} {facts.get(name)} instead of {value}"
            for name, value in self._loop.items()
            if facts.get(name) != value
        ]
        if others:
            raise ValueError(
                f"Revolve: `directory` must be empty or hold the snapshots of this very loop, got "
                f"{path} of another one: {'; '.join(others)}. Run the program that wrote it to its "
                f"end, delete its files, or give each loop a directory of its own."
            )

    def write(self, kind: str, time: int | None, tensors: Tree, **facts: str) -> None:
        """Write a tree of tensors, of which any may be None, and what else there is to say."""
        leaves = {str(place): leaf for place, leaf in enumerate(tree.leaves(tensors))}
        own = {place: leaf for place, leaf in leaves.items() if leaf is not None}
        write(self.file(kind, time), own, {**self._loop, **facts})
        if self._lock is not None:
            os.fsync(self._lock)  # the directory: its new entry

    def read(self, kind: str, time: int | None, devices: Tree) -> tuple[Tree, dict[str, str]]:
        """Return (the tree that was written, on the devices in its places, the facts)."""
        tensors, facts = read(self.file(kind, time), self._remedies[kind])
        places, structure = tree.flatten(devices)
        for place, device in enumerate(places):
            tensor = tensors.get(str(place))
            places[place] = None if tensor is None else tensor.to(device)
        return tree.unflatten(structure, places), facts

    def file(self, kind: str, time: int | None = None) -> Path:
        """Return the path of a file."""
        return self.path / f"{kind if time is None else f'{kind}-{time:08}'}.safetensors"

    def times(self, kind: str) -> list[int]:
        """Return the times of the files of a kind, in order."""
        return [int(path.stem.split("-")[1]) for path in self._files(kind)]

    def clear(self) -> None:
        """Remove the files, kind by kind."""
        for kind in self._remedies:
            for path in self._files(kind):
                path.unlink(missing_ok=True)

    def _files(self, kind: str) -> list[Path]:
        """Return the files of a kind, in the order of time."""
        return sorted(
            path
            for digits in ("", "-" + 8 * "[0-9]")
            for path in self.path.glob(f"{kind}{digits}.safetensors")
        )
