"""Files that nobody wrote, for what loads weights, checkpoints and configurations.

    python tests/fuzzing.py 600   # seconds, shared out over the loaders

What comes out of a loader is a result or one of our own errors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import metaopt as mo
from metaopt.optimizer.module import FORMAT as WEIGHTS
from metaopt.scan import tensor_file
from metaopt.train import Checkpoints
from metaopt.train.checkpoint import FORMAT
from metaopt.train.state_file import STRUCTURE, read_state
from optimizers import SGD, LSTMSchedule

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import command_line
import train_schedule


class Pair(NamedTuple):
    """A named tuple that states may have."""

    one: Any
    other: Any


STATE = {
    "a": torch.arange(3.0),
    "b": [Pair(1, 2.5), (float("nan"), None, True), {3: "x"}],
    "c": torch.ones(2, dtype=torch.complex64),
}
KEYS = ["float", "complex", "tuple", "named", "dict", "tensor", "array", "a", "class", "arguments"]
KEYS += ["mapping", "parameter", "dtype", "shape", "data_offsets", "__metadata__"]
words = st.sampled_from([*KEYS, "SGD", "LSTMSchedule", "float32", "nan", "cpu", "cuda", "F32"])
plain = st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=5)
anything = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(words | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)
# where bytes are written over a good file, and which; and where it ends
damage = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=9)), max_size=4)
ending = st.floats(0, 1.2)


def make_checkpoint(folder: Path) -> bytes:
    checkpoints = Checkpoints(folder / "good")
    checkpoints.save(3, STATE)
    return checkpoints.path(3).read_bytes()


def make_weights(folder: Path) -> bytes:
    SGD(lr=LSTMSchedule(0.1, 5), momentum=0.5).save(folder / "weights")
    return (folder / "weights").read_bytes()


def damaged(content: bytes, changes: list[tuple[float, bytes]], end: float) -> bytes:
    changed = bytearray(content)
    for place, new in changes:
        # more often in the header, which comes first
        at = int(place**3 * len(content))
        changed[at : at + len(new)] = new
    return bytes(changed[: int(end * len(content))])


def with_header(header: Any, content: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


NAMES = (
    "checkpoint, damaged",
    "checkpoint, any header",
    "checkpoint, any bytes",
    "checkpoint, any structure",
    "weights, damaged",
    "weights, any configuration",
    "configuration, any value",
    "configuration, any bytes",
)


class Fuzz:
    """The loaders on such files, in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        self.checkpoint, self.weights = make_checkpoint(folder), make_weights(folder)

    def _file(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def load_checkpoint(self, content: bytes) -> None:
        """Load it as the newest of two, of which the older is good."""
        self.count += 1
        folder = self.folder / "run"
        folder.mkdir(exist_ok=True)
        checkpoints = Checkpoints(folder)
        self._file("run/step-00000002.safetensors", self.checkpoint)
        self._file("run/step-00000004.safetensors", content)
        with warnings.catch_warnings(record=True):
            try:
                found = checkpoints.load()
            except mo.CheckpointError:
                return
        assert found is not None
        assert found.step in (2, 4)

    def load_structure(self, structure: Any) -> None:
        """Load a file whose checksum is right, and whose structure is any JSON."""
        self.count += 1
        text = torch.frombuffer(bytearray(json.dumps(structure).encode()), dtype=torch.uint8)
        path = self.folder / "structure.safetensors"
        tensor_file.write(path, {"0": torch.ones(2), STRUCTURE: text}, {})
        try:
            read_state(path, "Delete it.")
        except mo.CheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017

    def load_weights(self, content: bytes) -> None:
        self.count += 1
        try:
            mo.Optimizer.load(self._file("damaged", content))
        except (ValueError, TypeError) as error:
            assert "damaged" in str(error), error  # noqa: PT017

    def load_configuration(self, content: bytes) -> None:
        self.count += 1
        given = ["--config", str(self._file("run.json", content))]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                found = command_line.parse(train_schedule.Config, given)
            except SystemExit as stop:
                assert stop.code == 2  # noqa: PT017
                assert said.getvalue()
            else:
                assert type(found.steps) is int
                assert found.steps > 0


def targets(fuzz: Fuzz) -> dict[str, tuple[Any, Callable[..., None]]]:
    """Return name -> (strategy, what to call with what it draws)."""
    texts = st.builds(json.dumps, anything) | words
    header = st.fixed_dictionaries(
        {
            "__metadata__": st.fixed_dictionaries(
                {"format": st.just(FORMAT), "checksum": words, "complex": texts},
                optional={"best": texts, "config": texts, "versions": texts},
            )
        },
        optional={"0": anything, STRUCTURE: anything},
    )
    config = st.builds(
        lambda value: with_header(
            {"__metadata__": {"format": WEIGHTS, "config": json.dumps(value)}}
        ),
        st.fixed_dictionaries({"class": words, "arguments": st.dictionaries(words, anything)})
        | anything,
    )
    fields = [field.name for field in dataclasses.fields(train_schedule.Config)]
    saved = anything | st.dictionaries(st.sampled_from(fields), anything, max_size=4)
    return {
        "checkpoint, damaged": (
            st.builds(damaged, st.just(fuzz.checkpoint), damage, ending),
            fuzz.load_checkpoint,
        ),
        "checkpoint, any header": (st.builds(with_header, header), fuzz.load_checkpoint),
        "checkpoint, any bytes": (st.binary(max_size=60), fuzz.load_checkpoint),
        "checkpoint, any structure": (anything, fuzz.load_structure),
        "weights, damaged": (
            st.builds(damaged, st.just(fuzz.weights), damage, ending),
            fuzz.load_weights,
        ),
        "weights, any configuration": (config, fuzz.load_weights),
        "configuration, any value": (
            st.builds(lambda value: json.dumps(value).encode(), saved),
            fuzz.load_configuration,
        ),
        "configuration, any bytes": (st.binary(max_size=40), fuzz.load_configuration),
    }


def search(strategy: Any, call: Callable[..., None], examples: int, *, seconds: float) -> None:
    """Call it with this number of examples; raise what is none of our errors, made small."""

    @settings(
        max_examples=examples,
        deadline=timedelta(seconds=seconds),  # of one example: nothing hangs
        database=None,
        derandomize=seconds < 5,
        suppress_health_check=[*HealthCheck],
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategy)
    def one(value: Any) -> None:
        call(value)

    one()


def main(seconds: float) -> None:
    import time

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder))
        found = targets(fuzz)
        for name, (strategy, call) in found.items():
            began, before = time.monotonic(), fuzz.count
            while time.monotonic() - began < seconds / len(found):
                search(strategy, call, 500, seconds=10)
            print(f"{name}: {fuzz.count - before} files, only our own errors", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
