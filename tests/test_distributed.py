"""Two processes against one: all in one pair of processes, since each has to import torch."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import rank_checks
import torch
from waves import Waves, make_training

import metaopt as mo
from metaopt.distributed import sum_over_ranks
from optimizers import Adam

ROOT = Path(__file__).parents[1]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])


def environments(size: int) -> Iterator[dict[str, str]]:
    """Yield the environment of each rank, as torchrun makes them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(size):
        yield os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": PATHS,
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the checks work."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, str]:
    command = [sys.executable, str(Path(__file__).with_name("rank_checks.py")), str(folder)]
    running = [
        subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        for env in environments(2)
    ]
    errors = [one.communicate(timeout=240)[1] for one in running]
    files = sorted(folder.glob("*.json"))
    assert len(files) == 2, "\n".join(errors)
    each = [json.loads(file.read_text()) for file in files]
    return {name: "".join(found[name] for found in each) for name in each[0]}


@pytest.mark.parametrize("name", rank_checks.CHECKS)
def test_two_processes_equal_one(name: str, results: dict[str, str]) -> None:
    assert not results[name], results[name]


def test_an_error_in_one_backward_pass_ends_all(results: dict[str, str]) -> None:
    """One rank's own error, and on the other what it was waiting for: no time runs out."""
    found = results[rank_checks.LAST]
    assert "KeyError: 'of rank 1'" in found
    assert re.search(r"RuntimeError: A sum over 2 ranks .* failed on rank 0.*look first at", found)


def test_one_process_goes_on_with_what_two_have_spread(
    results: dict[str, str], folder: Path
) -> None:
    graph = rank_checks.weight_net(mo.SAMA(), Adam(lr=0.05))
    found = mo.Checkpoints(folder / "sharded-adam").load({"training": graph.state_dict()})
    assert found is not None
    graph.load_state_dict(found.state["training"])
    graph.step()
    straight = rank_checks.weight_net(mo.SAMA(), Adam(lr=0.05))
    for _ in range(5):
        straight.step()
    for name in ("learner", "weights"):
        torch.testing.assert_close(graph.params(name), straight.params(name), rtol=0, atol=1e-12)


def start_job(folder: Path, restarts: int) -> subprocess.CompletedProcess[str]:
    """Run `rank_job` by torchrun on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job = str(Path(__file__).with_name("rank_job.py"))
    env = os.environ | {"PYTHONPATH": PATHS}
    return subprocess.run(
        [*command, f"--max-restarts={restarts}", job, str(folder)],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_a_killed_rank_ends_the_job_and_a_restart_goes_on(tmp_path: Path) -> None:
    """The result has the bits of one process that nobody killed."""
    done = start_job(tmp_path, restarts=1)
    assert done.returncode == 0, done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr or "exitcode: -9" in done.stderr, done.stderr
    found = [(tmp_path / f"rank{rank}.txt").read_text().split() for rank in range(2)]
    assert found[0] == found[1]  # the same step, and the same bits
    assert found[0][0] == "1"  # the newest that both have
    assert float(found[0][2]) == 3 * 5  # of three numbers, one for each step
    alone = make_training(Waves())
    for _ in range(5):
        alone.step()
    assert float(found[0][1]) == alone.optimizer.lr.tolist()


def test_the_model_of_messages_has_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    scaling = import_module("scaling")
    slow = scaling.Network("slow", latency=1.0, bandwidth=8.0)
    assert slow.all_reduce(16, 2) == 2 + 2  # to the other and back
    assert slow.all_reduce(0, 1024) == 2 * 10  # up and down a tree
    assert slow.all_reduce(8e6, 4) == 2 * 3 + 1.5 * 1e6  # around a ring
    near = scaling.Network("near", 0.0, 8.0, 4, slow)
    assert near.all_reduce(8e6, 16) == 1.5e6 + slow.all_reduce(2e6, 4)
    way = scaling.Way("", shared=64.0, own=0.0, messages=(0.0,))
    assert way.efficiency(8, slow) == 8 / (8 + 6)
    assert way.limit(slow) == 8  # of 16 ranks, 4 seconds of 12 are work
    assert scaling.Way("", 64.0, 0.0, (0.0,), hidden=6.0).efficiency(8, slow) == 1
    late = scaling.Way("", 64.0, 0.0, (0.0, 0.0), hidden=12.0, late=(0.0,))
    assert late.efficiency(8, slow) == 8 / (8 + 6)
    assert scaling.fill_buckets(2**20) == (2**20,)
    assert scaling.fill_buckets(60 * 2**20) == (2**20, 25 * 2**20, 25 * 2**20, 9 * 2**20)


def test_a_sum_that_fails_says_where_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(message: torch.Tensor) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(torch.distributed, "all_reduce", fail)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=r"of 3 numbers failed on rank 0.*the rank that ended"):
        sum_over_ranks(torch.ones(3), mo.Ranks(0, 2))


def test_alone_nothing_changes() -> None:
    with mo.join_ranks() as ranks:
        assert ranks == mo.Ranks(0, 1)
        x = torch.ones(2)
        assert sum_over_ranks(x, ranks) is x
    with pytest.raises(ValueError, match="join_ranks: `timeout` must be a positive number, got 0"):
        mo.join_ranks(timeout=0).__enter__()
