"""Reading the four rated corpora from an archive in an archive."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest
import torch

from metaopt.tasks import rated_text
from metaopt.tasks.rated_text import MEMBERS, RESOURCES, read_rated_text

LINES = {
    "movie": "1\t2.25\tA naïve film\r\n2\t-0.6\ttepid\x85 biopic",
    "amazon": "1_1\t-0.9\tno picture .\r\n1_2\t0.25\tgood",
    "editorial": "1_1\t0.4\tOn Dec. 19\n1_2\t0.15\tEvents\n",
    "tweets": "1\t2.7\tblessed\r\n2\t-4\tlow\r\n",
}


def pack(files: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write(path: Path, lines: dict[str, str] = LINES, **more: bytes | tarfile.TarInfo) -> Path:
    inner = {f"corpora/{MEMBERS[domain].file}": text.encode() for domain, text in lines.items()}
    path.write_bytes(pack({f"vader/{RESOURCES}": pack({**inner, **more}), "vader/setup.py": b"1"}))
    return path


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Return a path, and expect two texts of each domain."""
    for domain, member in MEMBERS.items():
        monkeypatch.setitem(rated_text.MEMBERS, domain, member._replace(texts=2))
    return tmp_path / "vader.tar.gz"


def test_the_four_domains_are_read(archive):
    found = read_rated_text(write(archive))
    assert list(found) == ["movie", "amazon", "editorial", "tweets"]
    assert found["movie"].texts == ["A naïve film", "tepid\x85 biopic"]
    assert found["movie"].ratings.dtype == torch.float32
    assert found["movie"].ratings.tolist() == [2.25, pytest.approx(-0.6)]
    assert found["tweets"].ratings.tolist() == [pytest.approx(2.7), -4]
    assert sorted(archive.parent.iterdir()) == [archive]


def test_the_counts_are_those_of_the_version():
    assert {name: member.texts for name, member in MEMBERS.items()} == {
        "movie": 10605,
        "amazon": 3708,
        "editorial": 5190,
        "tweets": 4200,
    }


@pytest.mark.parametrize(
    ("domain", "text", "why"),
    [
        ("movie", "1\t2.25\tone\n", r"movie\S+ must have 2 texts, got 1"),
        ("amazon", "1\t2.25\tone\n2\ttwo", r"amazon\S+, line 2, got '2\\ttwo'"),
        ("tweets", "1\tgood\tone\n2\t1\ttwo", r"tweets\S+, line 1, .*could not convert"),
        ("tweets", "1\t4.5\tone\n2\t1\ttwo", r"line 1, .* must lie in \[-4, 4\]"),
        ("editorial", "1\tnan\tone\n2\t1\ttwo", r"line 1, .* must lie in \[-4, 4\]"),
    ],
)
def test_another_content_is_named(archive, domain, text, why):
    message = rf"not the source archive of vaderSentiment 3\.3\.2 \(.*{why}"
    with pytest.raises(ValueError, match=message):
        read_rated_text(write(archive, {**LINES, domain: text}))


def test_bytes_that_are_no_text(archive, monkeypatch):
    monkeypatch.setitem(MEMBERS, "movie", MEMBERS["movie"]._replace(file="m.txt"))
    lines = {domain: text for domain, text in LINES.items() if domain != "movie"}
    with pytest.raises(ValueError, match=r"m\.txt is not UTF-8"):
        read_rated_text(write(archive, lines, **{"x/m.txt": b"1\t1\t\xff"}))


def link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


def test_hostile_members_are_not_followed(archive, tmp_path):
    """A link, a name that leads out, two of one name: none is read, and nothing is written."""
    (tmp_path / "secret").write_text("1\t1\tone\n2\t1\ttwo")
    name, rest = MEMBERS["movie"].file, {k: v for k, v in LINES.items() if k != "movie"}
    outside = f"../../{name}"
    for members in (
        {f"x/{name}": link(f"x/{name}", f"{tmp_path}/secret")},
        {f"x/{name}": LINES["movie"].encode(), outside: LINES["movie"].encode()},
        {f"x/other-{name}": LINES["movie"].encode()},
        {},
    ):
        with pytest.raises(ValueError, match=f"there must be one regular file {name} in it"):
            read_rated_text(write(archive, rest, **members))
    # alone it is a name like another, for nothing is written
    assert len(read_rated_text(write(archive, rest, **{outside: LINES["movie"].encode()}))) == 4
    assert sorted(tmp_path.iterdir()) == [tmp_path / "secret", archive]


def test_a_small_file_that_stands_for_a_large_one(archive, monkeypatch):
    monkeypatch.setattr(rated_text, "MOST_BYTES", 2**20)
    with pytest.raises(ValueError, match="more than 1048576 bytes when unpacked"):
        read_rated_text(write(archive, zeros=bytes(2**21)))
    archive.write_bytes(gzip.compress(bytes(2**21)))
    with pytest.raises(ValueError, match="more than 1048576 bytes when unpacked"):
        read_rated_text(archive)


def test_what_is_no_archive(archive, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No archive at .*vader\.tar\.gz\. Get it with"):
        read_rated_text(archive)
    write(archive)
    whole = archive.read_bytes()
    for content in (b"404: not found", whole[: len(whole) // 2], gzip.compress(b"text"), b""):
        archive.write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged, or not the source archive"):
            read_rated_text(archive)
    archive.write_bytes(pack({"a/setup.py": b""}))
    with pytest.raises(ValueError, match=f"one regular file {RESOURCES} in it"):
        read_rated_text(archive)
