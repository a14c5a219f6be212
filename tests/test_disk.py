"""Snapshots on disk.

A loop that is killed goes on where it was, and gives the same gradient bit for bit.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peak_memory import printed
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

import metaopt as mo
from metaopt.scan import scan, tensor_file
from optimizers import SGD, Adam

STEPS = 9


class Killed(BaseException):
    """Ends a run as a signal would: nothing in the library may catch it to write something down."""


class Run:
    """One program, whose loss can end it at any call.

    It is a loop with dropout, Adam and a gradient for everything.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        draw = lambda *shape: torch.randn(*shape, generator=generator)
        # a transposed layout
        self.params = {"w": draw(3, 2).T.requires_grad_(), "b": draw(2, 1).requires_grad_()}
        self.meta, self.lr = torch.tensor(-0.5, requires_grad=True), nn.Parameter(torch.tensor(0.1))
        self.x = draw(STEPS, 3, 5).requires_grad_()
        self.calls = 0

    def __call__(
        self,
        directory: Path,
        *,
        snapshots: int = 3,
        at_call: Callable[[int], Any] = lambda call: None,
        factor: float = 1.0,
        **changes: Any,
    ) -> list[Tensor]:
        """Return (value, what the global generator gives afterwards, gradients)."""
        self.calls = 0

        def loss(params: dict[str, Tensor], x: Tensor, meta: Tensor) -> Tensor:
            self.calls += 1
            at_call(self.calls)
            return (
                (F.dropout(params["w"] @ x, 0.3) + params["b"]).square().mean()
                * meta.exp()
                * factor
            )

        torch.manual_seed(changes.get("seed", 3))
        rule = mo.Backprop(memory=mo.Revolve(snapshots, store="disk", directory=directory))
        batches = (
            iter(self.x)
            if changes.get("streamed")
            else self.x[: changes.get("steps", STEPS)] * changes.get("scale", 1.0)
        )
        out = mo.minimize(
            loss, Adam(self.lr), self.params, batches, meta=self.meta, differentiate=rule
        )
        value = out.losses.sum() + sum(p.sin().sum() for p in out.params.values())
        inputs = [*self.params.values(), self.meta, self.lr, self.x][: changes.get("inputs", 5)]
        return [
            value,
            torch.rand(2),
            *torch.autograd.grad(value * changes.get("weight", 1.0), inputs),
        ]


def at(call: int) -> Callable[[int], None]:
    def end(now: int) -> None:
        if now == call:
            raise Killed

    return end


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


@pytest.fixture
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    return Run()(tmp_path_factory.mktemp("unkilled"))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("snapshots", [1, 3, 50])
def test_equals_snapshots_in_memory(tmp_path: Path, snapshots: int, streamed: bool) -> None:
    run = Run()
    found = run(tmp_path, snapshots=snapshots, streamed=streamed)
    assert list(tmp_path.iterdir()) == []

    def gradients(memory: Any) -> list[Tensor]:
        torch.manual_seed(3)

        def loss(params: dict[str, Tensor], x: Tensor, meta: Tensor) -> Tensor:
            return (F.dropout(params["w"] @ x, 0.3) + params["b"]).square().mean() * meta.exp()

        out = mo.minimize(
            loss,
            Adam(run.lr),
            run.params,
            run.x,
            meta=run.meta,
            differentiate=mo.Backprop(memory=memory),
        )
        value = out.losses.sum() + sum(p.sin().sum() for p in out.params.values())
        return [
            value,
            torch.rand(2),
            *torch.autograd.grad(value, [*run.params.values(), run.meta, run.lr, run.x]),
        ]

    torch.testing.assert_close(found, gradients("full"), rtol=1e-12, atol=1e-14)


def test_a_run_that_ends_at_any_call_goes_on_there(tmp_path: Path, unkilled: list[Tensor]) -> None:
    """All calls of the loss, forward and backward.

    Each time a fresh program goes on, and ends once more three calls later.
    """
    run = Run()
    run(tmp_path)
    total = run.calls
    assert total > 2 * STEPS + 3
    for call in range(2, total + 1):
        directory = tmp_path / str(call)
        directory.mkdir()
        with pytest.raises(Killed):
            Run()(directory, at_call=at(call))
        run = Run()
        try:
            # the search for closures, the first step again, one more
            found = run(directory, at_call=at(4))
        except Killed:
            run = Run()
            found = run(directory)
        assert same(found, unkilled), call
        assert list(directory.iterdir()) == []
        # What lies before the last snapshot is not run again; backward at most one gap of the
        # schedule is.
        assert run.calls <= 2 + total - call + STEPS
    assert run.calls < 8


@pytest.mark.slow
def test_a_run_that_ends_within_any_write_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, replace = os.fsync, Path.replace
    writes, end = 0, 0

    def counted(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal writes
            writes += 1
            if writes == end:
                raise Killed
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", counted(fsync))
        patch.setattr(Path, "replace", counted(replace))
        unkilled = Run()(tmp_path, steps=4)
        total = writes
        # a state at each of 4 times, its steps, and rows and cotangents on the way back
        assert total > 3 * 12
        for end in range(1, total + 1):
            directory = tmp_path / str(end)
            directory.mkdir()
            writes = 0
            with pytest.raises(Killed):
                Run()(directory, steps=4)
            writes = total + 1
            assert same(Run()(directory, steps=4), unkilled), end
            assert list(directory.iterdir()) == []


PROGRAM = """
import os, signal, sys, tempfile
import torch
sys.path.insert(0, sys.argv[1])
from test_disk import Run, same
torch.set_num_threads(1)
directory, call = sys.argv[2], int(sys.argv[3])
def die(now):
    if now == call:
        os.kill(os.getpid(), signal.SIGKILL)
result = Run()(directory, at_call=die)
with tempfile.TemporaryDirectory() as other:
    assert same(result, Run()(other))
print("the same bits")
"""


def test_sigkill(tmp_path: Path) -> None:
    """Processes that kill themselves, one on the way forward and one half-way back.

    A third one ends what they began.
    """

    def process(call: int) -> subprocess.CompletedProcess:
        here = Path(__file__).parent
        command = [sys.executable, "-c", PROGRAM, str(here), str(tmp_path), str(call)]
        return subprocess.run(command, capture_output=True, text=True, cwd=here.parent)

    assert process(7).returncode == -signal.SIGKILL
    assert list(tmp_path.glob("state-*"))
    assert process(2 + STEPS + 5).returncode == -signal.SIGKILL
    assert (tmp_path / "pulled.safetensors").exists()
    last = process(-1)
    assert last.stdout == "the same bits\n", last.stderr
    assert list(tmp_path.iterdir()) == []


def interrupted(directory: Path) -> None:
    """Leave what a program that is killed on the way back leaves."""
    with pytest.raises(Killed):
        Run()(directory, at_call=at(1 + STEPS + 6))
    assert {path.stem.split("-")[0] for path in directory.iterdir()} == {
        "state",
        "steps",
        "pulled",
        "row",
    }


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 4]) + content[-2:]


@pytest.mark.parametrize(
    "damage", [cut, flip, lambda content: b""], ids=["truncated", "one bit", "empty"]
)
def test_a_damaged_file_is_named_and_can_be_deleted(
    tmp_path: Path, unkilled: list[Tensor], damage: Any
) -> None:
    (tmp_path / "whole").mkdir()
    interrupted(tmp_path / "whole")
    for name in sorted(path.name for path in (tmp_path / "whole").iterdir()):
        directory = tmp_path / name
        shutil.copytree(tmp_path / "whole", directory)
        path = directory / name
        content = damage(path.read_bytes())
        path.write_bytes(content)
        with pytest.raises(
            ValueError,
            match=rf"{path} must be as it was written, got a damaged file: .* Delete it and run",
        ):
            Run()(directory)
        assert path.read_bytes() == content
        path.unlink()
        assert same(Run()(directory), unkilled), name
        assert list(directory.iterdir()) == []


@pytest.mark.parametrize("name", ["state", "steps", "pulled", "row", ""])
def test_any_file_may_be_missing(tmp_path: Path, unkilled: list[Tensor], name: str) -> None:
    interrupted(tmp_path)
    for path in tmp_path.glob(f"{name}*"):
        path.unlink()
    assert same(Run()(tmp_path), unkilled)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("call", [3, STEPS + 6], ids=["forward", "backward"])
def test_a_full_disk_loses_nothing(tmp_path: Path, unkilled: list[Tensor], call: int) -> None:
    """ENOSPC of the system.

    The file that would be written next is a link to /dev/full, where every write fails.
    """

    def fill(now: int) -> None:
        if now == call:
            for name in [*(f"state-{t:08}" for t in range(STEPS + 1)), "pulled"]:
                (tmp_path / f"{name}.partial").symlink_to("/dev/full")

    message = (
        r"No space left on device: [\d,]+ bytes could not be written. What was written before is "
        "intact. Make room there"
    )
    with pytest.raises(OSError, match=message) as error:
        Run()(tmp_path, at_call=fill)
    assert error.value.filename.startswith(str(tmp_path))
    assert list(tmp_path.glob("*.safetensors"))
    assert same(Run()(tmp_path), unkilled)


def test_a_directory_that_is_missing_or_vanishes(tmp_path: Path, unkilled: list[Tensor]) -> None:
    directory = tmp_path / "snapshots"
    with pytest.raises(
        FileNotFoundError, match=rf"`directory` must exist, got '{directory}'.*mkdir -p {directory}"
    ):
        Run()(directory)
    directory.mkdir()
    with pytest.raises(FileNotFoundError, match=r"The directory is gone: make it again"):
        Run()(directory, at_call=lambda now: shutil.rmtree(directory) if now == 7 else None)
    directory.mkdir()
    assert same(Run()(str(directory)), unkilled)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 8}, "length 9 instead of 8; inputs"),
        ({"snapshots": 4}, "snapshots 3 instead of 4"),
        ({"scale": 2.0}, "inputs .* instead of"),
        ({"factor": 2.0}, "first step .* instead of"),
        ({"seed": 4}, "first step .* instead of"),
        (
            {"weight": 2.0},
            "The backward pass must be the one that was interrupted, got other cotangents",
        ),
        (
            {"inputs": 3},
            "The backward pass must be the one that was interrupted, got .* other tensors that "
            "require grad",
        ),
    ],
    ids=str,
)
def test_what_another_program_left_is_refused(
    tmp_path: Path, unkilled: list[Tensor], changes: dict[str, Any], message: str
) -> None:
    interrupted(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run = Run()
    if "inputs" in changes:
        run.x.requires_grad_(False)
        run.lr.requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert same(Run()(tmp_path), unkilled)


def parabola(directory: Path, memory: Any = None) -> Callable[[Tensor], Tensor]:
    """The sum of the losses of a loop on |w - meta|^4, as a function of meta."""
    memory = memory or mo.Revolve(2, store="disk", directory=directory)

    def value(meta: Tensor) -> Tensor:
        out = mo.minimize(
            lambda w, _, meta: ((w - meta) ** 4).sum(),
            SGD(0.01),
            torch.ones(2),
            None,
            steps=6,
            meta=meta,
            differentiate=mo.Backprop(memory),
        )
        return out.losses.sum()

    return value


@pytest.mark.usefixtures("float64")
def test_first_derivatives_by_transforms(tmp_path: Path) -> None:
    meta = torch.tensor(0.3)
    full, disk = parabola(tmp_path, "full"), parabola(tmp_path)
    torch.testing.assert_close(grad(disk)(meta), grad(full)(meta), rtol=1e-13, atol=0)
    tasks = torch.arange(3.0)
    found, losses = (
        mo.meta_grad(lambda p, t, f=f: f(p * t), chunk_size=1)(meta, tasks)[0] for f in (disk, full)
    )
    torch.testing.assert_close(found, losses, rtol=1e-13, atol=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("float64")
def test_an_interrupted_transform_goes_on(tmp_path: Path) -> None:
    calls, end = 0, 11

    def value(meta: Tensor, memory: Any) -> Tensor:
        def loss(w: Tensor, _: None, meta: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == end:
                raise Killed
            return ((w - meta) ** 4).sum()

        rule = mo.Backprop(memory=memory)
        return mo.minimize(
            loss, SGD(0.01), torch.ones(2), None, steps=6, meta=meta, differentiate=rule
        ).losses.sum()

    memory = mo.Revolve(2, store="disk", directory=tmp_path)
    with pytest.raises(Killed):
        grad(value)(torch.tensor(0.3), memory)
    assert (tmp_path / "pulled.safetensors").exists()
    end = -1
    again = grad(value)(torch.tensor(0.3), memory)
    assert torch.equal(again, grad(value)(torch.tensor(0.3), memory))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("derivative", "message"),
    [
        (lambda f: grad(grad(f))(torch.tensor(0.3)), "has first derivatives only"),
        (
            lambda f: torch.autograd.grad(
                f(m := torch.tensor(0.3, requires_grad=True)), m, create_graph=True
            ),
            "has first derivatives only",
        ),
        (
            lambda f: torch.autograd.grad(grad(f)(m := torch.tensor(0.3, requires_grad=True)), m),
            "has first derivatives only",
        ),
        (lambda f: vmap(grad(f))(torch.ones(2)), "cannot run under `vmap`"),
        (lambda f: jacrev(lambda m: f(m).expand(2))(torch.tensor(0.3)), "cannot run under `vmap`"),
    ],
)
def test_derivatives_that_disk_has_not(tmp_path: Path, derivative: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        derivative(parabola(tmp_path))


def test_a_directory_serves_one_loop_at_a_time(tmp_path: Path) -> None:
    meta = torch.tensor(0.3, requires_grad=True)
    first = parabola(tmp_path)(meta)
    with pytest.raises(
        ValueError,
        match=r"must serve one loop at a time, got .* a loop that waits for its backward pass",
    ):
        parabola(tmp_path)(meta)
    (expected,) = torch.autograd.grad(first, meta, retain_graph=True)
    with pytest.raises(ValueError, match="can be reversed once, got a second backward pass"):
        torch.autograd.grad(first, meta)
    second = parabola(tmp_path)(meta)
    del second  # its files stay, for a program that goes on; the directory is free
    assert list(tmp_path.iterdir())
    assert torch.equal(torch.autograd.grad(parabola(tmp_path)(meta), meta)[0], expected)


def test_files_that_are_not_ours_stay(tmp_path: Path) -> None:
    for name in (
        "notes.txt",
        "notes.partial",
        "weights.safetensors",
        "state-of-affairs.safetensors",
    ):
        (tmp_path / name).write_text("mine")
    grad(parabola(tmp_path))(torch.tensor(0.3))
    assert len(list(tmp_path.iterdir())) == 4


MEMORY_PROGRAM = """
import sys, tempfile, torch, metaopt as mo
from optimizers import SGD
torch.set_num_threads(1)
def run(steps):
    start = torch.ones(500_000, requires_grad=True)
    with tempfile.TemporaryDirectory() as directory:
        rule = mo.Backprop(memory=mo.Revolve(100, store="disk", directory=directory))
        loss = lambda w, _: w.sin().sum()
        out = mo.minimize(loss, SGD(0.01), start, None, steps=steps, differentiate=rule)
        out.params.sum().backward()
run(3)
before = peak()
run(int(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_states_on_disk_need_no_memory() -> None:
    """50 states of 2 MB, none of which has to be computed again.

    "steps" needs 100,000 KiB for them.
    """
    assert printed(MEMORY_PROGRAM, 50) < 20_000


def test_without_gradients_nothing_is_written(tmp_path: Path) -> None:
    with torch.no_grad():
        parabola(tmp_path / "missing")(torch.tensor(0.3))
    parabola(tmp_path / "missing")(torch.tensor(0.3))


@pytest.mark.usefixtures("float64")
def test_any_kind_of_tensor(tmp_path: Path) -> None:
    """One tensor twice, a view, an expanded one, integers, and more in the carry.

    There are also bfloat16, booleans, complex and empty ones.
    """
    a = torch.tensor(0.7, requires_grad=True)
    w, scale = torch.randn(4, 3), torch.randn(5, dtype=torch.complex128)
    carry = (
        w,
        w,
        w.T[1:],
        torch.tensor(1.0).expand(2),
        torch.tensor(3),
        torch.ones(3, dtype=torch.bfloat16),
        torch.tensor(True),
        scale,
        w[:0],
    )

    def step(a: Tensor, carry: tuple[Tensor, ...], _: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        one, two, view, wide, count, half, flag, z, empty = carry
        if len(ended) > 0 and int(count) == 7:
            ended.pop()
            raise Killed
        after = torch.sin(a * one) + z.real.sum() * 0.1
        return (
            after,
            after,
            view * a,
            (wide[0] * a).expand(2),
            count + 1,
            half * 0.5 + a.bfloat16(),
            ~flag,
            z * a * 1j,
            empty,
        ), (two.sum() + view.sum() + wide.sum() + half.sum() * count)

    def gradient(memory: Any) -> Tensor:
        last, outs = scan(step, a, carry, (), 7, memory)
        value = outs.sum() + sum(
            x.abs().sum() for x in last if x.is_floating_point() or x.is_complex()
        )
        return torch.autograd.grad(value, a)[0]

    ended: list[int] = []
    disk = mo.Revolve(2, store="disk", directory=tmp_path)
    expected = gradient(disk)
    torch.testing.assert_close(expected, gradient(mo.Revolve(2)), rtol=1e-12, atol=0)
    ended = [1]
    with pytest.raises(Killed):
        gradient(disk)
    assert list(tmp_path.iterdir())
    assert torch.equal(gradient(disk), expected)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int8,
        torch.bool,
        torch.complex64,
        torch.complex128,
    ],
)
def test_files_give_back_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "a": torch.tensor([0.0, -0.0, 1.0, 3.0]).to(dtype),
        "b": torch.zeros((), dtype=dtype),
        "c": torch.zeros(0, 2, dtype=dtype),
    }
    tensor_file.write(tmp_path / "x.safetensors", tensors, {"name": "value"})
    found, facts = tensor_file.read(tmp_path / "x.safetensors", "")
    assert facts == {"name": "value"}
    assert tensor_file.digest(found.items()) == tensor_file.digest(tensors.items())
    assert all(
        torch.equal(found[name], tensors[name]) and found[name].dtype == dtype for name in tensors
    )


def test_a_file_without_a_checksum(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"0": torch.zeros(2)}, tmp_path / "state-00000003.safetensors")
    with pytest.raises(
        ValueError,
        match=r"state-00000003.safetensors must be as it was written, got a damaged file: it has "
        r"no checksum",
    ):
        parabola(tmp_path)(torch.tensor(0.3, requires_grad=True))


def batches() -> Iterator[Tensor]:
    buffer = torch.zeros(2)
    for t in range(3):
        yield buffer.fill_(t)


def test_a_stream_that_writes_over_its_batches(tmp_path: Path) -> None:
    rule = mo.Backprop(memory=mo.Revolve(2, store="disk", directory=tmp_path))
    with pytest.raises(ValueError, match="must not change a batch after yielding it"):
        mo.minimize(
            lambda w, b: (w - b).square().sum(),
            SGD(0.1),
            torch.ones(2, requires_grad=True),
            batches(),
            differentiate=rule,
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: mo.Revolve(3, store="disk"),
            '`directory` must be a path for store="disk".* got None',
        ),
        (
            lambda: mo.Revolve(3, directory="x"),
            "`directory` must be a path .* got 'x' for store='device'",
        ),
        (lambda: mo.Revolve(3, store="disk", directory=3), "`directory` must be a path .* got 3"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
