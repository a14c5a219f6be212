"""Tensors in a file that is there whole or not at all, and that is refused if it was changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from metaopt.transforms import outside_transforms, unwrap_grad_levels


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write tensors and a few facts, with a checksum, into a safetensors file.

    It takes its name when its content is on the disk.

    Args:
        path: the file; one of this name is replaced.
        tensors: name -> tensor of any dtype, on any device.
        facts: what else `read` is to return.

    Raises:
        OSError: what the system says, with its number, the path and what to do; a file of this name
            is as it was.

    Cost:
        Two copies of the tensors in main memory, while it writes.
    """
    with outside_transforms():
        own = {name: _to_cpu(tensor) for name, tensor in tensors.items()}
        # not every complex dtype can be written
        pairs = [name for name, tensor in own.items() if tensor.is_complex()]
        header = {**facts, "complex": json.dumps(pairs), "checksum": digest(own.items())}
        own |= {name: torch.view_as_real(own[name]) for name in pairs}
        # one tensor under two names is refused, hence the copies
        content = save({name: tensor.clone() for name, tensor in own.items()}, header)
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        fix = "Make room there, or lift the limit"
        if not path.parent.is_dir():
            fix = "The directory is gone: make it again"
        raise OSError(
            error.errno,
            f"{error.strerror}: {len(content):,} bytes could not be written. What was written "
            f"before is intact. {fix}, and run the same program again: it goes on from there",
            str(path),
        ) from error


def read(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (the tensors on the CPU, the facts) of a file.

    Raises:
        ValueError: the file is damaged; the message ends with the remedy.
        OSError: it cannot be read.
    """
    facts = read_facts(path, remedy)
    pairs, expected = facts.pop("complex"), facts.pop("checksum")
    try:
        with outside_transforms(), safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            tensors |= {name: torch.view_as_complex(tensors[name]) for name in json.loads(pairs)}
        found = digest(tensors.items())
    # what a file that nobody wrote may hold: dtypes and shapes that torch refuses, any JSON
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(path, str(error), remedy) from error
    if found != expected:
        how = f"its checksum is {found[:12]}..., not {expected[:12]}... as written in it"
        raise _damaged(path, how, remedy)
    return tensors, facts


def read_facts(path: Path, remedy: str) -> dict[str, str]:
    """Return the facts of a file without its tensors; raises as `read` does."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
    except SafetensorError as error:
        raise _damaged(path, str(error), remedy) from error
    if not {"checksum", "complex"} <= facts.keys():
        raise _damaged(path, "it has no checksum", remedy)
    return facts


def digest(leaves: Iterable[tuple[str, Any]]) -> str:
    """Return the SHA-256 of named values: of tensors with dtype, shape and bits."""
    sha = hashlib.sha256()
    for name, leaf in sorted(leaves):
        if isinstance(leaf, Tensor):
            with outside_transforms():
                tensor = _to_cpu(leaf)
                sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                sha.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        else:
            is_plain = isinstance(leaf, bool | int | float | str | None)
            value = repr(leaf) if is_plain else type(leaf).__name__
            sha.update(f"{name} {value}\n".encode())
    return sha.hexdigest()


def digest_of(leaves: Iterable[Any]) -> str:
    """Return the SHA-256 of values in their order."""
    return digest((f"{i:08}", leaf) for i, leaf in enumerate(leaves))


def _to_cpu(tensor: Tensor) -> Tensor:
    return unwrap_grad_levels(tensor).detach().resolve_conj().resolve_neg().cpu().contiguous()


def _damaged(path: Path, how: str, remedy: str) -> ValueError:
    return ValueError(f"{path} must be as it was written, got a damaged file: {how}. {remedy}")
