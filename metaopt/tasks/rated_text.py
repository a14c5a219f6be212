"""Short texts of four domains, each with the mean rating of about 20 people."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

RESOURCES = "additional_resources/hutto_ICWSM_2014.tar.gz"
MOST_BYTES = 2**25  # of an archive when unpacked; the two have 4 and 5 million
# What opening a damaged archive raises.
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError)


class Corpus(NamedTuple):
    """The texts of one domain.

    Attributes:
        texts: one a snippet.
        ratings: their mean ratings, from -4 (extremely negative) to 4, [n], float32.
    """

    texts: list[str]
    ratings: Tensor


class _Member(NamedTuple):
    file: str
    texts: int


MEMBERS = {
    "movie": _Member("movieReviewSnippets_GroundTruth.txt", 10_605),
    "amazon": _Member("amazonReviewSnippets_GroundTruth.txt", 3_708),
    "editorial": _Member("nytEditorialSnippets_GroundTruth.txt", 5_190),
    "tweets": _Member("tweets_GroundTruth.txt", 4_200),
}


def read_rated_text(path: str | Path) -> dict[str, Corpus]:
    """Read the four corpora in the source archive of the package vaderSentiment, version 3.3.2.

    They are snippets of film reviews ("movie"), of product reviews ("amazon") and of newspaper
    editorials ("editorial"), and "tweets". The archive, and the one that is in it, are read in
    memory; nothing is unpacked to the disk.

    Args:
        path: `vaderSentiment-3.3.2.tar.gz`, from `pip download --no-deps --no-binary :all:
            vaderSentiment==3.3.2`.

    Returns:
        Name of the domain -> its corpus.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or another archive: no such members, a member that is no regular
            file or too large (which is seen before it is unpacked), a line that is not "number,
            rating, text", or another number of texts.

    Reference:
        Hutto and Gilbert, VADER: a parsimonious rule-based model for sentiment analysis of social
        media text, ICWSM 2014.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"No archive at {path}. Get it with `pip download --no-deps --no-binary :all: "
            "vaderSentiment==3.3.2`."
        )
    with path.open("rb") as file:
        inner = _read_member(file, RESOURCES, path)
    found = {}
    for domain, member in MEMBERS.items():
        corpus = _parse(_read_member(io.BytesIO(inner), member.file, path), member.file, path)
        if len(corpus.texts) != member.texts:
            raise _wrong(
                path, f"{member.file} must have {member.texts} texts, got {len(corpus.texts)}"
            )
        found[domain] = corpus
    return found


def _read_member(file: io.BufferedIOBase, name: str, path: Path) -> bytes:
    """Return what the one member whose path ends with `name` holds."""
    try:
        with gzip.open(file) as packed:
            # all of it, but no more than a real one has: a small file can stand for any size
            unpacked = packed.read(MOST_BYTES + 1)
        if len(unpacked) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes when unpacked")
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
            found = [m for m in archive if m.name.endswith(f"/{name}")]
            if len(found) != 1 or not found[0].isreg() or found[0].size > MOST_BYTES:
                raise ValueError(f"there must be one regular file {name} in it")
            content = archive.extractfile(found[0])
            assert content is not None  # a regular file has content
            return content.read()
    except (*_DAMAGED, OSError) as error:
        raise _wrong(path, error) from error


def _parse(content: bytes, name: str, path: Path) -> Corpus:
    try:
        lines = content.decode().rstrip("\r\n").split("\n")
    except UnicodeDecodeError as error:
        raise _wrong(path, f"{name} is not UTF-8: {error}") from error
    texts, ratings = [], []
    for number, line in enumerate(lines, 1):
        try:
            _, rating, text = line.rstrip("\r").split("\t")
            value = float(rating)
            if not -4 <= value <= 4:
                raise ValueError("the rating must lie in [-4, 4]")
        except ValueError as error:
            raise _wrong(path, f"{name}, line {number}, got {line[:80]!r}: {error}") from error
        texts.append(text)
        ratings.append(value)
    return Corpus(texts, torch.tensor(ratings))


def _wrong(path: Path, why: object) -> ValueError:
    return ValueError(
        f"{path} is damaged, or not the source archive of vaderSentiment 3.3.2 ({why}). Download "
        "it again with `pip download --no-deps --no-binary :all: vaderSentiment==3.3.2`."
    )
