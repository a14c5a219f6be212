"""Tensors that are spread over the ranks, in files: each rank writes its own part of them.

torch.distributed.checkpoint writes the parts as safetensors, each with its place in the whole, and
a rank reads what it needs from the files of all. So those that read may be another number of ranks,
or one process that has the tensors whole. Its own format would be read by pickle.

The files of a step are in one folder, which takes its name when all are on the disk. Their checksum
is part of the name: what is written again for a step does not replace what was referred to before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metaopt.distributed.all_reduce import gather_rows
from metaopt.distributed.ranks import Ranks
from metaopt.transforms import is_sharded

Files = dict[str, str]  # name -> SHA-256
UNFINISHED = "unfinished.shards"


def write_shards(root: Path, step: int, tensors: Mapping[str, Tensor], ranks: Ranks) -> Files:
    """Write `DTensor`s, all ranks together, and return which files have them.

    Args:
        root: a directory that all ranks see.
        step: after which these are the tensors.
        tensors: name -> tensor. What several ranks have alike, one of them writes.
        ranks: all that there are.

    Raises:
        OSError: a rank could not write its part.
        TypeError: there is a dtype that safetensors cannot store.
        ValueError: there are other ranks, or they do not see each other's files.

    Cost:
        Two copies of this rank's part in main memory, a SHA-256 of it, and two small messages.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    if dist.get_world_size() != ranks.size:
        raise ValueError(
            f"Tensors that are spread over {dist.get_world_size()} ranks cannot be saved by "
            f"{ranks.size}. Save where all ranks do the same, inside of `join_ranks`."
        )
    folder = root / UNFINISHED
    if ranks.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of a job that was killed
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    settled = {name: _sum_up(tensor) for name, tensor in tensors.items()}
    try:
        save(settled, storage_writer=writer)
    except CheckpointException as error:
        raise _explain(error, folder) from error
    own = folder / _name_of(ranks.rank)
    digest = bytes.fromhex(_digest(own)) if own.exists() else bytes(32)
    digests = gather_rows(torch.tensor([[*digest]], dtype=torch.uint8), ranks.size, ranks)
    files = {
        _name_of(rank): bytes(row).hex() for rank, row in enumerate(digests.tolist()) if any(row)
    }
    sees_all = all((folder / name).exists() for name in files)
    if not gather_rows(torch.tensor([sees_all]), ranks.size, ranks).all():
        raise ValueError(
            f"{root} must be a directory that all ranks see: one of them does not find what another"
            " one wrote. Take a folder on a file system that the machines share."
        )
    if ranks.rank == 0:
        _finish(folder, root / _folder_of(step, files), files)
    return files


def read_shards(
    root: Path,
    step: int,
    files: Mapping[str, str],
    targets: Mapping[str, Tensor],
    ranks: Ranks,
    remedy: str,
) -> None:
    """Fill tensors with what `write_shards` wrote, whatever ranks it was written by.

    Without a message: a rank that fails raises, and the others do not. Each checks the checksums
    of its part of the files, so it must hear from the others whether theirs are right.

    Args:
        root: the directory.
        step: after which they were written.
        files: what `write_shards` returned.
        targets: name -> tensor of the same shape and dtype, spread over ranks or whole.
        ranks: that read.
        remedy: the end of an error's message.

    Raises:
        ValueError: a file is lost or damaged.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    folder = root / _folder_of(step, files)
    wrong = _find_damage(folder, files, ranks)
    if wrong:
        raise ValueError(f"{folder} must be as it was written: {wrong}. {remedy}")
    reader = HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():
            # it takes one that asks nobody for one that is alone
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(dict(targets), storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        how = [f"{type(one).__name__}: {one}" for one, _ in error.failures.values()]
        raise ValueError(
            f"{folder} must have the tensors that belong to it, got {'; '.join(how)}. {remedy}"
        ) from error


def describe_layout(tensor: Any) -> list[list[int | None]]:
    """Return [the shape of the ranks, along each of its axes which axis of the tensor is spread].

    It is -1 where none is, and None where it is in a way that has no number.
    """
    from torch.distributed.tensor import Shard

    axes = [
        one.dim if type(one) is Shard else None if one.is_shard() else -1
        for one in tensor.placements
    ]
    return [[*tensor.device_mesh.shape], axes]


def make_room(like: Any, layout: Sequence[Sequence[Any]]) -> Tensor:
    """Return a tensor like another one, to be filled.

    If as many ranks hold that, it is spread as `describe_layout` says: a `DTensor` that has made
    steps may be spread in another way than at first, and its sums would then have other bits.
    """
    if not is_sharded(like):
        return torch.empty_like(like)
    from torch.distributed.tensor import Replicate, Shard, empty

    mesh, (ranks, axes) = like.device_mesh, layout
    placements = [Replicate() if one.is_partial() else one for one in like.placements]
    are_axes = all(type(axis) is int and -1 <= axis < like.ndim for axis in axes)
    if [*ranks] == [*mesh.shape] and are_axes and len(axes) == mesh.ndim:
        placements = [Replicate() if axis < 0 else Shard(axis) for axis in axes]
    return empty(like.shape, dtype=like.dtype, device_mesh=mesh, placements=placements)


def prune_shards(root: Path, kept: Collection[int | None]) -> None:
    """Delete the folders of other steps than these, and what a killed job left."""
    for folder in root.glob("*.shards"):
        found = re.fullmatch(r"step-(\d{8,})-[0-9a-f]{16}", folder.stem)
        if found is None or int(found[1]) not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _finish(folder: Path, final: Path, files: Files) -> None:
    """Give a folder its name."""
    if final.exists():
        if not _find_damage(final, files, Ranks()):
            return  # written before, with the same bits
        shutil.rmtree(final)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)  # its entries; the files are
    finally:
        os.close(directory)
    folder.rename(final)


def _find_damage(folder: Path, files: Mapping[str, str], ranks: Ranks) -> str:
    """Return what is wrong in a folder, "" if nothing is; of the files, with this rank's part."""
    try:
        found = sorted(path.name for path in folder.iterdir())
        if found != sorted(files):
            return f"it has the files {found[:9]}, not {sorted(files)[:9]}"
        for name in found[ranks.rank :: ranks.size]:
            digest = _digest(folder / name)
            if digest != files[name]:
                return f"the checksum of {name} is {digest[:12]}..., not {files[name][:12]}..."
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name_of(rank: int) -> str:
    """Return the name that torch's writer gives the file of a rank."""
    return f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"


def _folder_of(step: int, files: Mapping[str, str]) -> str:
    text = json.dumps(sorted(files.items())).encode()
    return f"step-{step:08}-{hashlib.sha256(text).hexdigest()[:16]}.shards"


def _sum_up(tensor: Any) -> Tensor:
    """Return the tensor without sums that are still to be made, which would be lost."""
    if not any(placement.is_partial() for placement in tensor.placements):
        return tensor.detach()  # type: ignore[no-any-return]
    from torch.distributed.tensor import Replicate

    settled = [Replicate() if one.is_partial() else one for one in tensor.placements]
    return tensor.detach().redistribute(placements=settled)  # type: ignore[no-any-return]


def _explain(error: Any, folder: Path) -> Exception:
    """Return an exception of ours for what torch says of all ranks together."""
    rank, (cause, _) = next(iter(error.failures.items()))
    if not isinstance(cause, OSError):
        return TypeError(
            f"A state has tensors, spread over the ranks, that safetensors cannot store: {cause!r} "
            f"on rank {rank}. Keep them as another dtype."
        )
    return OSError(
        cause.errno,
        f"{cause.strerror}: rank {rank} could not write its part of the tensors. What was written "
        "before is intact. Make room there, or lift the limit, and run the same program again: it "
        "goes on from there",
        str(folder),
    )
