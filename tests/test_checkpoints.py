"""Checkpoints: what they hold, what happens when writing or reading fails, and exact resumption."""

from __future__ import annotations

import json
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fuzzing
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset, TensorDataset

import metaopt as mo
from metaopt import tree
from metaopt.distributed.shards import read_shards
from metaopt.levels.data import LevelData
from metaopt.random_state import read_random_state, restore_random_state
from metaopt.scan import tensor_file
from metaopt.train import checkpoint
from metaopt.train.state_file import STRUCTURE, read_state, write_state
from optimizers import SGD, Adam

ROOT = Path(__file__).parents[1]


class Pair(NamedTuple):
    one: Any
    other: Any


# what is in a file


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    shared = torch.randn(3)
    numbers = [0, -(2**70), 0.1, -0.0, 1e-320, float("inf"), float("-inf"), 1 + 2j, True, None]
    state = {
        "numbers": numbers,
        3: {"a": (1, [2, ()], {}), ("t", 1): "text \u00e9 \U0001f600"},
        "pair": Pair(Pair(1, torch.zeros(0, 2)), [shared]),
        "shared": shared,
        "half": torch.randn(4, 5).bfloat16().t(),
        "complex": torch.randn(2, dtype=torch.complex128),
        "bits": torch.tensor([True, False]),
        "array": np.arange(6.0).reshape(2, 3)[:, ::-1],
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    write_state(tmp_path / "x.safetensors", state, {})
    found = read_state(tmp_path / "x.safetensors", "")
    assert [*found] == [*state]
    assert repr(found["numbers"]) == repr(numbers)
    assert repr(found[3]) == repr(state[3])
    assert type(found["pair"]) is type(found["pair"].one) is Pair
    assert found["pair"].other[0] is found["shared"]
    assert type(found["array"]) is np.ndarray
    assert not found["parameter"].requires_grad
    np.testing.assert_array_equal(found["array"], state["array"])
    for name in ("shared", "half", "complex", "bits"):
        assert torch.equal(found[name], state[name])
        assert found[name].dtype == state[name].dtype


def test_nan_keeps_its_place(tmp_path: Path) -> None:
    write_state(tmp_path / "x.safetensors", [float("nan"), torch.tensor([torch.nan, 1.0])], {})
    number, tensor = read_state(tmp_path / "x.safetensors", "")
    assert number != number
    assert tensor.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [torch.Generator()]}, r"got Generator at \['a'\]\[0\]\. .*store `get_state\(\)`"),
        (
            {"a": torch.eye(2).to_sparse()},
            r"dense tensors, got a Tensor of layout torch.sparse_coo",
        ),
        ({1, 2}, "got set at its top"),
    ],
)
def test_what_cannot_be_stored_is_named(state: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=message):
        mo.Checkpoints(tmp_path).save(0, state)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"sharded": [0, 1, 2]}, "its structure has"),
        ({"shards": [{"a": 1}, None]}, "its shards are"),
        ({"shards": [{"../a": "x"}, None]}, "as it was written: it cannot be read: No such file"),
        (
            {"shards": [{}, {"sharded": [0, "torch.float32", [3], [[1], [0]]]}]},
            r"has a torch.float32 of shape \[3\], .* it has a torch.float32 of shape \[2\]",
        ),
        (
            {"shards": [{}, {"sharded": [-1, "torch.float32", [2], [["x"], [{}]]]}]},
            "as it was written: it cannot be read: No such file",
        ),
    ],
)
def test_shards_that_nobody_wrote_are_refused(node: Any, message: str, tmp_path: Path) -> None:
    text = torch.frombuffer(bytearray(json.dumps(node).encode()), dtype=torch.uint8)
    tensor_file.write(tmp_path / "x.safetensors", {STRUCTURE: text}, {})

    def read(files: Any, targets: Any) -> None:
        read_shards(tmp_path, 1, files, targets, mo.Ranks(), "")

    with pytest.raises(mo.CheckpointError, match=message):
        read_state(tmp_path / "x.safetensors", "", torch.ones(2), read)


# which are kept, and which is read


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = mo.Checkpoints(tmp_path, keep=2)
    for step, best in ((0, 0), (5, 0), (10, 10), (15, 10), (20, 10), (25, 10)):
        checkpoints.save(step, {"step": step}, best)
    assert checkpoints.steps() == [10, 20, 25]
    assert mo.Checkpoints(tmp_path).load() == (25, {"step": 25}, {"step": 10})
    assert mo.Checkpoints(tmp_path / "new").load() is None


def hostile(kind: str, path: Path) -> None:
    """Write a file over a good checkpoint."""
    content = path.read_bytes()
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Path("x")))
    elif kind == "truncated":
        path.write_bytes(content[:-7])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "flipped":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif kind == "huge header":
        path.write_bytes(struct.pack("<Q", 2**62) + content[8:])
    elif kind == "tensors only":
        save_file({"a": torch.ones(2)}, path)
    else:
        state = {"tuple": Pair(1, 2)}
        write_state(path, state, {"format": checkpoint.FORMAT, "best": "[]", "config": "{}"})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pickle", "got a damaged file"),
        ("truncated", "got a damaged file"),
        ("empty", "got a damaged file"),
        ("flipped", "its checksum is"),
        ("huge header", "got a damaged file"),
        ("tensors only", "it has no checksum"),
        ("other facts", "step-00000004"),
    ],
)
def test_one_that_cannot_be_read_is_put_aside_with_a_warning(
    kind: str, message: str, tmp_path: Path
) -> None:
    checkpoints = mo.Checkpoints(tmp_path)
    checkpoints.save(2, {"step": 2})
    checkpoints.save(4, {"step": 4})
    hostile(kind, checkpoints.path(4))
    with pytest.warns(UserWarning, match=f"{message}.*goes back before step 4"):
        assert checkpoints.load() == (2, {"step": 2}, None)
    assert checkpoints.steps() == [2]
    hostile(kind, checkpoints.path(2))
    with pytest.warns(UserWarning, match="step 2"), pytest.raises(mo.CheckpointError):
        checkpoints.load()


def test_a_lost_best_is_sought_anew(tmp_path: Path) -> None:
    checkpoints = mo.Checkpoints(tmp_path)
    checkpoints.save(2, {"step": 2}, 2)
    checkpoints.save(4, {"step": 4}, 2)
    hostile("truncated", checkpoints.path(2))
    with pytest.warns(UserWarning, match="The best state, of step 2, is lost"):
        assert checkpoints.load() == (4, {"step": 4}, None)


def test_another_configuration_says_what_differs(tmp_path: Path) -> None:
    @dataclass
    class Config:
        lr: float = 0.1
        out: Path = Path("x")

    mo.Checkpoints(tmp_path, config=Config()).save(1, {})
    assert mo.Checkpoints(tmp_path, config={"lr": 0.1, "out": "x"}).load()
    with pytest.raises(
        mo.CheckpointError,
        match=r"another configuration: lr was 0.1, is 0.2; out was 'x', is 'absent'; new was",
    ):
        mo.Checkpoints(tmp_path, config={"lr": 0.2, "new": 1}).load()
    with pytest.raises(TypeError, match="`config` must be a dataclass or a dict, got list"):
        mo.Checkpoints(tmp_path, config=[1])


def test_other_versions_are_a_warning(tmp_path: Path, monkeypatch: Any) -> None:
    mo.Checkpoints(tmp_path).save(1, {})
    monkeypatch.setattr(checkpoint, "find_versions", lambda: {"metaopt": "9.0", "torch": "1.0"})
    with pytest.warns(UserWarning, match=r"torch was '2.*', is '1.0'.*perhaps not bit for bit"):
        assert mo.Checkpoints(tmp_path).load() is not None


# where writing fails


def test_a_directory_that_cannot_be_written_to_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(mo.CheckpointError, match=r"must be one that can be written to, got"):
            mo.Trainer(Counter(), max_steps=1, checkpoint=path)


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """While entered, no file grows beyond this number of bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_else(tmp_path: Path) -> None:
    checkpoints = mo.Checkpoints(tmp_path)
    checkpoints.save(1, {"a": torch.ones(9)})
    with (
        full_disk(2000),
        pytest.raises(OSError, match=r"bytes could not be written\. What was written before is"),
    ):
        checkpoints.save(2, {"a": torch.ones(9999)})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]
    assert checkpoints.load() is not None


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    mo.Checkpoints(tmp_path).save(1, {})
    (tmp_path / "step-00000002.partial").write_bytes(b"half")
    assert mo.Checkpoints(tmp_path).steps() == [1]
    assert len([*tmp_path.iterdir()]) == 1


# going on


class Counter:
    """A training whose steps draw random numbers of all kinds."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def step(self) -> dict[str, float]:
        self.values.append(torch.rand(()).item() + np.random.rand())  # noqa: NPY002
        return {"loss": self.values[-1]}

    def state_dict(self) -> dict[str, Any]:
        return {"values": [*self.values]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = [*state["values"]]


def test_a_run_in_parts_is_one_run(tmp_path: Path) -> None:
    def run(directory: Path, *limits: int) -> list[float]:
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        for limit in limits:
            training = Counter()
            mo.Trainer(
                training,
                max_steps=limit,
                validate=lambda training=training: -len(training.values),  # type: ignore[misc]
                validate_every=4,
                checkpoint=directory,
                checkpoint_every=3,
                resume=limit != limits[0],
                progress=False,
            ).fit()
            torch.manual_seed(9)  # another process knows nothing of the first one's
            np.random.seed(9)  # noqa: NPY002
        return training.values

    straight = run(tmp_path / "straight", 17)
    assert run(tmp_path / "parts", 3, 7, 8, 8, 17) == straight
    assert len(straight) == 17


@pytest.mark.parametrize("reason", ["max_steps", "patience"])
def test_a_run_that_is_over_stays_so(reason: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 4}
    if reason == "patience":
        options = {"max_steps": 9, "validate": lambda: 1.0, "validate_every": 2, "patience": 2}
    for _ in range(2):
        training = Counter()
        trainer = mo.Trainer(training, checkpoint=tmp_path, resume=True, progress=False, **options)
        trainer.fit()
        assert (trainer.step, trainer.stopped_by) == (4, reason)


def test_a_second_fit_does_not_lose_what_it_saves(tmp_path: Path) -> None:
    trainer = mo.Trainer(Counter(), max_steps=2, checkpoint=tmp_path, progress=False)
    trainer.fit()
    with pytest.raises(mo.CheckpointError, match=r"has checkpoints, up to step 2\. Go on from"):
        trainer.fit()


def test_the_best_state_is_not_the_one_that_goes_on(tmp_path: Path) -> None:
    class Shared(Counter):
        """It keeps what it loads, and changes it in place."""

        def step(self) -> dict[str, Any]:
            self.values += [1.0]
            return {}

        def state_dict(self) -> dict[str, Any]:
            return {"values": self.values}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.values = state["values"]

    losses = iter([3.0, 1.0, 2.0, 2.0])
    for steps in (1, 3):
        training = Shared()
        mo.Trainer(
            training,
            max_steps=steps,
            validate=lambda: next(losses),
            validate_every=1,
            checkpoint=tmp_path,
            resume=True,
            progress=False,
        ).fit()
    assert len(training.values) == 1


def test_a_damaged_older_file_names_no_best(tmp_path: Path) -> None:
    checkpoints = mo.Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, {"step": step})
    checkpoints.path(2).write_bytes(b"xx")
    checkpoints.save(4, {"step": 4})
    assert checkpoints.steps() == [2, 3, 4]


def test_a_configuration_has_names(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"`config` must hold numbers, .* got <built-in "):
        mo.Checkpoints(tmp_path, config={"activation": torch.relu})
    config = {"out": tmp_path, "dtype": torch.float64, "cap": float("nan")}
    mo.Checkpoints(tmp_path, config=config).save(1, {})
    assert mo.Checkpoints(tmp_path, config=config).load() is not None


def test_checkpoints_are_those_of_a_rank(tmp_path: Path) -> None:
    checkpoints = mo.Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="made where there were 1 ranks, and is used where there"):
        checkpoints.check_ranks(mo.Ranks(1, 2))


def test_checkpoints_of_another_run_are_not_overwritten(tmp_path: Path) -> None:
    mo.Trainer(Counter(), max_steps=3, checkpoint=tmp_path, progress=False).fit()
    with pytest.raises(mo.CheckpointError, match=r"has checkpoints, up to step 3\. Go on from"):
        mo.Trainer(Counter(), max_steps=3, checkpoint=tmp_path)


def graph(width: int = 2) -> mo.LevelGraph:
    x = torch.ones(3, width)
    low = mo.Level(
        "low",
        torch.nn.Linear(width, 1),
        lambda s, b: (s.low(b) * s.top(b)).mean() ** 2,
        SGD(0.1),
        [x],
    )
    return mo.LevelGraph(
        [
            mo.Edge(
                mo.Level(
                    "top", torch.nn.Linear(width, 1), lambda s, b: (s.low(x) ** 2).mean(), Adam(0.1)
                ),
                low,
            )
        ]
    )


def meta_training(estimator: Any) -> mo.MetaTraining:
    return mo.MetaTraining(
        SGD(torch.nn.Parameter(torch.tensor(0.1))),
        mo.tasks.Quadratics(2),
        estimator=estimator,
        outer=Adam(0.1),
        horizon=4,
    )


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (graph, lambda: graph(3), "the state is that of another graph. At levels.*shape .1, 2."),
        (graph, lambda: meta_training(mo.FullUnroll(2)), "a state must have the parts"),
        (
            lambda: meta_training(mo.FullUnroll(2)),
            lambda: meta_training(mo.PES(0.1, 2, window=4)),
            "the state is that of another training. At made with.* FullUnroll, where .* PES",
        ),
    ],
)
def test_a_checkpoint_of_another_training_says_so(
    one: Any, other: Any, message: str, tmp_path: Path
) -> None:
    mo.Trainer(one(), max_steps=2, checkpoint=tmp_path, progress=False).fit()
    with pytest.raises(mo.CheckpointError, match=f"not a checkpoint of this training: .*{message}"):
        mo.Trainer(other(), max_steps=3, checkpoint=tmp_path, resume=True, progress=False).fit()


def test_killed_trainings_go_on_bit_for_bit() -> None:
    """In one process and in two; `python tests/resumable.py 50 0 40 1 2` is the long form."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests/resumable.py", "4", "1", "8", "1", "2"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("in 1 process: ") == done.stdout.count("in 2 processes: ") == 4


# the order of data


def order(source: Any) -> LevelData:
    return LevelData("x", source, torch.device("cpu"))


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(7.0)), 2, **options)


def counted() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    while True:
        yield torch.rand(2, generator=generator)


@pytest.mark.parametrize(
    "make",
    [
        lambda: [torch.tensor(float(i)) for i in range(3)],
        lambda: loader(),
        lambda: loader(shuffle=True),
        lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(1)),
        lambda: mo.Shuffled(torch.arange(7.0), 2, seed=5),
        counted,
    ],
)
def test_data_is_wound_to_where_it_was(make: Any) -> None:
    """Between two readers of it others draw from torch's generator, and a new one knows no seed."""

    def read(data: LevelData, count: int) -> list[Any]:
        found = []
        for _ in range(count):
            found += tree.leaves(data.peek(1))
            data.take(1)
            torch.rand(3)  # a loss with dropout
        return found

    data = order(make())
    read(data, 5)
    data.peek(6)  # a look ahead, into the next pass
    place, state = data.place(), torch.get_rng_state()
    expected = read(data, 9)
    torch.manual_seed(77)
    again = order(make())
    again.peek(1)
    again.check(place)
    again.seek(place)
    torch.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(read(again, 9), expected, strict=True))


class Noisy(Dataset[torch.Tensor]):
    """Each example is drawn again, from numpy's and Python's own generators."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, place: int) -> torch.Tensor:
        return torch.tensor(place + np.random.rand() + random.random())  # noqa: NPY002


def test_data_that_draws_from_every_generator_comes_back() -> None:
    def read(data: LevelData, count: int) -> list[Any]:
        found = []
        for _ in range(count):
            found += tree.leaves(data.peek(1))
            data.take(1)
        return found

    data = order(DataLoader(Noisy(), 2, shuffle=True))
    read(data, 4)
    place, common = data.place(), read_random_state()
    expected = read(data, 7)
    random.seed(8)
    again = order(DataLoader(Noisy(), 2, shuffle=True))
    again.check(place)
    again.seek(place)
    restore_random_state(common)
    assert all(torch.equal(a, b) for a, b in zip(read(again, 7), expected, strict=True))


def test_an_iterator_that_draws_from_torchs_generator_is_warned_of() -> None:
    def batches() -> Iterator[torch.Tensor]:
        while True:
            yield torch.rand(2)

    data, again = order(batches()), order(batches())
    for _ in range(4):
        data.peek(1)
        data.take(1)
    again.seek(data.place())
    with pytest.warns(UserWarning, match="draws its batches from torch's own generator"):
        again.peek(1)
    ended = order(iter([torch.ones(2)]))
    ended.seek(data.place())
    with pytest.raises(ValueError, match="`data` ended after 1 batches and cannot begin again"):
        ended.peek(1)


def test_shuffled_batches_are_passes_through_the_examples() -> None:
    batches = mo.Shuffled({"x": torch.arange(7), "y": -torch.arange(7)}, 3, seed=1)
    rows = [batches.batch_at(n) for n in range(8)]
    for first in range(0, 8, 2):
        seen = torch.cat([row["x"] for row in rows[first : first + 2]])
        assert len({*seen.tolist()}) == 6
    assert torch.equal(rows[5]["x"], -rows[5]["y"])
    other = mo.Shuffled({"x": torch.arange(7)}, 3, seed=1)
    assert torch.equal(other.batch_at(6)["x"], rows[6]["x"])
    assert torch.equal(next(iter(other))["x"], rows[0]["x"])
    assert len({str(mo.Shuffled(torch.arange(99), 9, seed).batch_at(0)) for seed in range(9)}) == 9
    with pytest.raises(ValueError, match=r"one number of rows, at least the batch_size 3, got"):
        mo.Shuffled([torch.ones(4), torch.ones(3)], 3)
    with pytest.raises(TypeError, match=r"must be a tree of tensors .* got something else at"):
        mo.Shuffled((np.ones((4, 2)), torch.ones(4)), 2)


def test_data_of_another_kind_is_refused() -> None:
    place = order(loader(shuffle=True, generator=torch.Generator())).place()
    with pytest.raises(ValueError, match="level 'x': the state is not that of its `data`"):
        order([1]).check(place)
    for wrong in (None, {}, {**place, "position": -1}, {**place, "starts": [{"random": 1}]}):
        with pytest.raises(ValueError, match="the state is not that of its `data`"):
            order(loader()).check(wrong)


def test_data_that_raises_says_whose_it_is() -> None:
    def batches() -> Iterator[torch.Tensor]:
        yield torch.ones(3, 2)
        raise OSError("no such image")

    low = mo.Level(
        "low",
        torch.nn.Linear(2, 1),
        lambda s, b: (s.low(b) * s.top(b)).mean() ** 2,
        SGD(0.1),
        batches(),
    )
    top = mo.Level("top", torch.nn.Linear(2, 1), lambda s, b: s.low(torch.ones(2)).sum(), SGD(0.1))
    trained = mo.LevelGraph([mo.Edge(top, low)])
    with pytest.raises(OSError, match="no such image") as caught:
        mo.Trainer(trained, max_steps=3, progress=False).fit()
    assert caught.value.__notes__ == [
        "It comes from `data` of level 'low': batch 1, counted from 0, could not be read."
    ]


# files that nobody wrote


@pytest.mark.parametrize("name", [*fuzzing.NAMES])
def test_only_our_own_errors_come_out_of_loaders(name: str, tmp_path: Path) -> None:
    """`python tests/fuzzing.py 600` is the long form."""
    strategy, call = fuzzing.targets(fuzzing.Fuzz(tmp_path))[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzzing.search(strategy, call, 60, seconds=4)
