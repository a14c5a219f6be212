"""The checkpoints of a training run: a directory in which one can be read at any moment."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from metaopt.checks import check_count
from metaopt.distributed import Ranks, current_ranks, gather_rows
from metaopt.distributed.shards import Files, prune_shards, read_shards, write_shards
from metaopt.scan.tensor_file import read_facts
from metaopt.train.state_file import (
    CheckpointError,
    Named,
    OtherTrainingError,
    read_state,
    write_state,
)

FORMAT = "metaopt checkpoint 2"
DAMAGED = "An older checkpoint is used if there is one; this file may be deleted."


class Restored(NamedTuple):
    """What a checkpoint gives back.

    Attributes:
        step: after which it was written.
        state: of the run.
        best: the state at the step that it names as the best, if it names one that can be read.
    """

    step: int
    state: Any
    best: Any | None


class Checkpoints:
    """Files `step-00001000.safetensors` in a directory, each the whole state after a step.

    A file takes its name when its content is on the disk: a process that is killed, even as it
    writes, leaves those before. The last `keep` are kept, and those that they name as the best.

    In several processes (see `join_ranks`) each rank has files of its own, rank 1 in the folder
    `rank1` in there, and a run goes on after the newest step that all ranks have. Tensors that are
    spread over ranks (`DTensor`s, also those of `fully_shard`) are saved once, in a folder
    `step-00001000-CHECKSUM.shards` that all ranks see, each rank its part, by
    torch.distributed.checkpoint. A run of them may go on with fewer ranks.

    Args:
        directory: where; it is made if need be.
        keep: how many to keep.
        config: of the run, a dataclass or a mapping: what a run that goes on must have in common
            with the one that began.

    Raises:
        CheckpointError: nothing can be written there.

    Cost:
        Of `save`: two copies of the state, or of a rank's part, in main memory, a SHA-256 of it,
        and the writing.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2, config: Any = None):
        self._ranks = current_ranks()
        own = f"rank{self._ranks.rank}" if self._ranks.rank else ""
        self._root = Path(directory)  # of all ranks
        self.directory, self.keep = self._root / own, check_count(None, "keep", keep)
        self.config = describe_config(config)
        self._prepare()

    def _prepare(self) -> None:
        probe = self.directory / "probe.partial"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            for partial in self.directory.glob("*.partial"):  # of a process killed as it wrote
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"The directory for checkpoints, {self.directory}, must be one that can be written "
                f"to, got: {error.strerror}. Pass another one, or change its permissions."
            ) from error

    def steps(self) -> list[int]:
        """Return the steps after which there are checkpoints, in order."""
        names = [re.fullmatch(r"step-(\d{8,})", path.stem) for path in self._files()]
        return sorted(int(name[1]) for name in names if name)

    def path(self, step: int) -> Path:
        """Return the file of a step."""
        return self.directory / f"step-{step:08}.safetensors"

    def save(self, step: int, state: Any, best_step: int | None = None) -> None:
        """Write a checkpoint, and delete those that nobody needs any more.

        Args:
            step: after which it is.
            state: of the run.
            best_step: the step that was best, whose checkpoint is kept with this one.

        Raises:
            OSError: it could not be written; those before are as they were.
            TypeError: the state has something that cannot be stored.
            ValueError: it is spread over ranks that do not all save, or do not see the directory.
        """
        facts = {
            "format": FORMAT,
            "best": json.dumps(best_step),
            "config": json.dumps(self.config),
            "versions": json.dumps(find_versions()),
            "ranks": json.dumps(self._ranks.size),
        }
        write = partial(write_shards, self._root, step, ranks=self._ranks)
        write_state(self.path(step), state, facts, write)
        directory = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(directory)  # its new entry
        finally:
            os.close(directory)
        self._prune()

    def _prune(self) -> None:
        steps = self.steps()
        # a job may be killed when others have not yet written what this rank has
        last = steps[-max(self.keep, 1 + self._ranks.are_many) :]
        kept = {*last, *map(self._find_best, last)}
        for step in steps:
            if step not in kept:
                self.path(step).unlink(missing_ok=True)
        if self._ranks.rank == 0:
            prune_shards(self._root, kept)

    def _find_best(self, step: int) -> int | None:
        """Return the step that a checkpoint names as the best; one that is damaged names none."""
        try:
            best: int | None = self._read_facts(self.path(step))["best"]
        except CheckpointError:
            return None
        return best

    def check_ranks(self, ranks: Ranks) -> None:
        """Raise ValueError unless these are the processes that it was made in."""
        if ranks != self._ranks:
            raise ValueError(
                f"`checkpoint` was made where there were {self._ranks.size} ranks, and is used "
                f"where there are {ranks.size}: all would write the same files. Make it inside of "
                "`join_ranks`."
            )

    def load(self, like: Any = None) -> Restored | None:
        """Return the newest checkpoint that can be read, None if the directory has none.

        One that cannot is renamed to "*.damaged", with a warning.

        Args:
            like: a state of the same structure, or a part of one. Tensors that are spread over
                ranks come back as they were; if they are spread over another number of ranks there,
                as there, and whole where it has them whole.

        Raises:
            CheckpointError: none of several can be read; it is that of another configuration, or of
                fewer ranks; or `like` has no room for its tensors.
        """
        self._check_size()
        last: CheckpointError | None = None
        while steps := self._find_common_steps():
            step, found = steps[-1], None
            try:
                found = self._read(step, like)
            except OtherTrainingError:
                raise
            except CheckpointError as error:
                last = error
                self.path(step).rename(self.path(step).with_suffix(".damaged"))
                warnings.warn(f"{error} The training goes back before step {step}.", stacklevel=2)
            own = torch.tensor([[found is not None, found is not None and found.best is not None]])
            each = gather_rows(own, self._ranks.size, self._ranks)
            is_there, has_best = each.all(0).tolist()
            if is_there and found is not None:
                # one that a rank has lost none goes back to: ranks would come to differ
                return found if has_best else found._replace(best=None)
        if last is not None:
            raise last
        return None

    def _check_size(self) -> None:
        """Raise if the newest checkpoint has none for some ranks, since there were fewer."""
        steps = self.steps()
        try:
            written: int = self._read_facts(self.path(steps[-1]))["ranks"] if steps else 0
        except CheckpointError:  # to be put aside
            written = 0
        of_first = gather_rows(torch.tensor([written]), self._ranks.size, self._ranks).tolist()[0]
        if 0 < of_first < self._ranks.size:
            raise OtherTrainingError(
                f"The checkpoints in {self._root} were written by {of_first} ranks, and there are "
                f"{self._ranks.size}: some would have none. Go on with {of_first} processes, or "
                "begin in another directory."
            )

    def _find_common_steps(self) -> list[int]:
        """Return the newest steps after which all ranks have checkpoints, in order."""
        steps = self.steps()[-self.keep - 1 :]  # a killed job may have left one more on some ranks
        padded = torch.tensor([steps + [-1] * (self.keep + 1 - len(steps))])
        each = gather_rows(padded, self._ranks.size, self._ranks).tolist()
        return sorted(set.intersection(*map(set, each)) - {-1})

    def _read(self, step: int, like: Any) -> Restored:
        facts = self._read_facts(self.path(step))
        self._compare(self.path(step), facts)
        state, best = self._read_state(step, like), facts["best"]
        return Restored(step, state, state if best == step else self._load_best(best, like))

    def _read_state(self, step: int, like: Any) -> Any:
        def read(files: Files, targets: Named) -> None:
            read_shards(self._root, step, files, targets, self._ranks, DAMAGED)

        return read_state(self.path(step), DAMAGED, like, read)

    def _load_best(self, best: int | None, like: Any) -> Any | None:
        if best is None:
            return None
        try:
            return self._read_state(best, like)
        except CheckpointError as error:
            warnings.warn(f"The best state, of step {best}, is lost: {error}", stacklevel=2)
            return None

    def _read_facts(self, path: Path) -> dict[str, Any]:
        """Return what the header of a file says, without its tensors."""
        try:
            facts = read_facts(path, DAMAGED)
            if facts.get("format") != FORMAT:
                raise ValueError(f"{path} must be of the format {FORMAT!r}. {DAMAGED}")
            names = ("best", "config", "versions", "ranks")
            found = {name: json.loads(facts[name]) for name in names}
            are_counts = type(found["ranks"]) is int and type(found["best"]) in (int, type(None))
            are_dicts = all(type(found[name]) is dict for name in ("config", "versions"))
            if not are_counts or not are_dicts or not 0 < found["ranks"] < 2**31:
                raise ValueError(f"{path} has a header with other facts, {str(found)[:200]}")
        except (ValueError, LookupError, RecursionError, OSError) as error:
            raise CheckpointError(f"{error} ({path})") from error
        return found

    def _compare(self, path: Path, facts: dict[str, Any]) -> None:
        """Raise if a checkpoint has another configuration; warn if it has other versions."""
        differs = _list_differences(facts["config"], self.config)
        if differs:
            raise OtherTrainingError(
                f"{path} is a checkpoint of another configuration: {'; '.join(differs)}. Go on "
                "with the one it was written with, or begin in another directory."
            )
        versions = _list_differences(facts["versions"], find_versions())
        if versions:
            warnings.warn(
                f"{path} was written by other versions: {'; '.join(versions)}. The run goes on, "
                "but perhaps not bit for bit.",
                stacklevel=3,
            )

    def _files(self) -> list[Path]:
        return [*self.directory.glob("step-*.safetensors")]


def describe_config(config: Any) -> dict[str, Any]:
    """Return a configuration as JSON would give it back.

    Raises:
        TypeError: it is neither a dataclass, nor a mapping, nor None.
    """
    if is_dataclass(config) and not isinstance(config, type):
        config = asdict(config)
    if not isinstance(config, Mapping | None):
        raise TypeError(
            f"`config` must be a dataclass or a dict, got {type(config).__name__}. Write "
            "config={'lr': 0.1}."
        )
    described: dict[str, Any] = json.loads(json.dumps(dict(config or {}), default=_name))
    return described


def _name(value: Any) -> str:
    """Return the text of a value that JSON does not have, the same in every process."""
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    raise TypeError(
        f"`config` must hold numbers, texts, truth values, paths, lists and dicts, got {value!r}. "
        "Write its name."
    )


def _list_differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    return [
        f"{name} was {there.get(name, 'absent')!r}, is {here.get(name, 'absent')!r}"
        for name in dict.fromkeys([*there, *here])
        # as texts: nan is not equal to nan
        if name not in there
        or name not in here
        or json.dumps(there[name]) != json.dumps(here[name])
    ]


@cache
def find_versions() -> dict[str, str]:
    """Return the versions on which the numbers of a run may depend."""
    try:
        own = version("torch-metaopt")
    except PackageNotFoundError:  # on the path, but not installed
        own = "not installed"
    return {"metaopt": own, "torch": str(torch.__version__)}
