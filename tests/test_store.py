"""The stores of a loop's states hold the same, wherever it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from metaopt.scan.disk import Disk
from metaopt.scan.store import CpuStates, DeviceStates

FIRST = {"w": torch.zeros(3), "count": torch.tensor(0)}
STORES = {
    "device": lambda directory: DeviceStates({}),
    "cpu": lambda directory: CpuStates({}, FIRST),
    "disk": lambda directory: Disk(directory, "", FIRST),
}


@pytest.mark.parametrize("make", STORES.values(), ids=STORES)
def test_a_store_gives_back_what_was_put(make: Any, tmp_path: Path) -> None:
    store = make(tmp_path)
    states = {t: {"w": torch.full((3,), t / 3), "count": torch.tensor(t)} for t in (2, 5, 12)}
    for time, state in states.items():
        store.put(time, state)
    assert store.times() == [2, 5, 12]
    store.drop(5)
    store.drop(7)  # is not there
    assert store.times() == [2, 12]
    for time in (12, 2):
        found = store.get(time)
        assert found.keys() == FIRST.keys()
        assert all(torch.equal(found[name], states[time][name]) for name in FIRST)
