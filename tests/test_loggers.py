"""Where numbers, histograms and figures go."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import metaopt as mo


@pytest.fixture
def figure() -> Any:
    plt.switch_backend("Agg")
    drawn, axes = plt.subplots(figsize=(1, 1))
    axes.plot([0, 1])
    yield drawn
    plt.close(drawn)


def test_tensorboard_takes_scalars_histograms_and_figures(tmp_path: Path, figure: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = mo.TensorBoardLogger(tmp_path)
    logger.log(3, {"loss": 0.25})
    logger.histogram(3, "updates", torch.tensor([0.0, 1.0, 2.0], requires_grad=True))
    logger.figure(3, "curve", figure)
    logger.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (scalar,) = events.Scalars("loss")
    assert (scalar.step, scalar.value) == (3, 0.25)
    (histogram,) = events.Histograms("updates")
    assert histogram.histogram_value.num == 3
    assert [image.step for image in events.Images("curve")] == [3]


def test_json_is_a_line_a_step(tmp_path: Path, figure: Any) -> None:
    for step in (1, 2):  # a second run goes on in the same file
        logger = mo.JSONLogger(tmp_path / "new/log.jsonl")
        logger.log(step, {"loss": 0.5, "norm": float("inf")})
        logger.close()
    logger = mo.JSONLogger(tmp_path / "new/log.jsonl")
    logger.histogram(3, "w", torch.arange(101.0))
    logger.figure(3, "a/b", figure)
    rows = [json.loads(line) for line in (tmp_path / "new/log.jsonl").read_text().splitlines()]
    assert rows[1] == {"step": 2, "loss": 0.5, "norm": "inf"}
    assert (rows[2]["w/0"], rows[2]["w/0.25"], rows[2]["w/1"]) == (0, 25, 100)
    assert (tmp_path / "new/log-a-b-00000003.png").exists()
    logger.close()


def test_json_goes_on_after_it_was_closed(tmp_path: Path) -> None:
    logger = mo.JSONLogger(tmp_path / "log.jsonl")
    for step in (1, 2):
        logger.log(step, {"loss": 1.0})
        logger.histogram(step, "nothing", torch.empty(0))
        logger.close()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_the_console_gets_a_line_now_and_then(capsys: Any) -> None:
    logger = mo.ConsoleLogger(seconds=100)
    logger.log(1, {"loss": 1 / 3, "norm": 2.0})
    logger.log(2, {"loss": 0.0})
    logger.close()
    assert capsys.readouterr().err == "step 1: loss 0.3333, norm 2\n"


def recording_backend() -> tuple[Any, list[Any]]:
    """Return what has the functions of wandb and trackio that are used, and what it was given."""
    given: list[Any] = []
    backend = types.ModuleType("wandb")
    backend.log = lambda data, step=None, commit=None: given.append((data, step))  # type: ignore[attr-defined]
    backend.finish = lambda: given.append("finished")  # type: ignore[attr-defined]
    backend.Histogram = lambda sequence: np.sort(sequence)  # type: ignore[attr-defined]
    backend.Image = lambda value: value.shape  # type: ignore[attr-defined]
    return backend, given


def test_a_run_gets_what_its_functions_take(figure: Any) -> None:
    backend, given = recording_backend()
    logger = mo.RunLogger(backend)
    logger.log(2, {"loss": 0.5})
    logger.histogram(2, "w", torch.tensor([[2.0, 1.0]], requires_grad=True))
    logger.figure(2, "curve", figure)
    logger.close()
    assert given[0] == ({"loss": 0.5}, 2)
    assert given[1][0]["w"].tolist() == [1, 2]
    assert given[2] == ({"curve": (100, 100, 3)}, 2)
    assert given[3] == "finished"


def test_wandb_itself_takes_them(tmp_path: Path, figure: Any, monkeypatch: Any) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.init(project="x", mode="offline", dir=str(tmp_path))
    use(mo.RunLogger(wandb), figure)
    (written,) = tmp_path.rglob("*.wandb")
    assert b"loss" in written.read_bytes()
    assert [*tmp_path.rglob("curve_*.png")]


def test_trackio_itself_takes_them(tmp_path: Path, figure: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    trackio.init(project="x", embed=False)
    use(mo.RunLogger(trackio), figure)
    assert [*tmp_path.rglob("*.db")]


def use(logger: mo.PictureLogger, figure: Any) -> None:
    logger.log(1, {"loss": 0.25})
    logger.histogram(1, "w", torch.ones(3))
    logger.figure(1, "curve", figure)
    logger.close()


def test_several_are_all_called_and_an_error_is_not_lost(capsys: Any, tmp_path: Path) -> None:
    class Broken:
        def log(self, step: int, metrics: Any) -> None:
            raise ConnectionError("no network")

        def close(self) -> None: ...

    logger = mo.Several(Broken(), mo.ConsoleLogger(), mo.JSONLogger(tmp_path / "log.jsonl"))
    with pytest.raises(ConnectionError, match="no network"):
        logger.log(1, {"loss": 1.0})
    logger.histogram(1, "w", torch.ones(2))
    logger.close()
    assert "step 1: loss 1" in capsys.readouterr().err
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
