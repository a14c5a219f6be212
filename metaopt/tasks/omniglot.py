"""Handwritten characters of many alphabets, 20 drawings each, as N-way K-shot tasks."""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from metaopt.extras import extra
from metaopt.tasks.episode import Episode

SIZE = 28
_MEMBER = re.compile(
    r"(?:.*/)?(?P<alphabet>[^/]+)/(?P<character>character\d+)/(?P<drawing>\d+_\d+\.png)"
)
# What opening a damaged zip file raises.
_DAMAGED = (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error)
MOST_BYTES = 2**20  # of a drawing's file; those of the archives have some 200
MOST_PIXELS = 2**20  # of a drawing; those of the archives have 105 x 105

Alphabets = dict[str, Tensor]


def read_omniglot(path: str | Path) -> Alphabets:
    """Read the official zip files `images_*.zip` without unpacking them.

    A drawing that is in several files (the small archives are parts of the big one) is read once.

    Args:
        path: a zip file, or a folder of zip files.

    Returns:
        Name of the alphabet -> drawings [characters, drawings, 1, 28, 28], uint8, ink is 255;
        sorted by name.

    Raises:
        FileNotFoundError: there is no such path, or no zip file in the folder.
        ValueError: a file is damaged, there are no drawings in it, one is too large to be a drawing
            (which is seen before it is unpacked), or characters differ in their number of drawings.

    Reference:
        Lake, Salakhutdinov, Tenenbaum, Science 350, 2015; 28 x 28 as in Vinyals et al. 2016,
        arXiv:1606.04080.
    """
    files = _zip_files(Path(path))
    drawings: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for file in files:
        with _open(file) as archive:
            for member in archive.infolist():
                if match := _MEMBER.fullmatch(member.filename):
                    known = drawings[match["alphabet"]][match["character"]]
                    if match["drawing"] not in known:
                        known[match["drawing"]] = _decode(archive, file, member)
    if not drawings:
        raise ValueError(
            f"No alphabets in {', '.join(map(str, files))}: drawings must be members like "
            "`images_background/Greek/character01/0394_01.png`. Give an official `images_*.zip`."
        )
    counts = {
        f"{a}/{c}": len(found)
        for a, characters in drawings.items()
        for c, found in characters.items()
    }
    fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[fewest] != counts[most]:
        raise ValueError(
            f"Every character must have the same number of drawings, got {counts[fewest]} for "
            f"{fewest} and {counts[most]} for {most}. The archive is incomplete. Download it again."
        )
    return {
        alphabet: torch.stack(
            [
                torch.stack([found[name] for name in sorted(found)])
                for _, found in sorted(characters.items())
            ]
        )
        for alphabet, characters in sorted(drawings.items())
    }


def split_alphabets(alphabets: Alphabets, test: Sequence[str] = ()) -> tuple[Alphabets, Alphabets]:
    """Return (train, test), disjoint in alphabets.

    Args:
        alphabets: from `read_omniglot`.
        test: names to hold out; by default the last two in five by name, the share of the official
            evaluation set.

    Raises:
        ValueError: a name is unknown, or one side would be empty.
    """
    names = sorted(alphabets)
    held_out = set(test or names[len(names) - 2 * len(names) // 5 :])
    if not held_out <= alphabets.keys():
        raise ValueError(
            f"`test` must name alphabets of the data, got {sorted(held_out - alphabets.keys())}; "
            f"there are {names}."
        )
    train = {name: alphabets[name] for name in names if name not in held_out}
    if not train or not held_out:
        raise ValueError(
            f"Both sides of the split need an alphabet, got train {sorted(train)} and test "
            f"{sorted(held_out)}. Add data."
        )
    return train, {name: alphabets[name] for name in names if name in held_out}


class CharacterTasks:
    """N-way K-shot tasks whose classes are characters of any of the given alphabets.

    Args:
        alphabets: from `read_omniglot` or `split_alphabets`.
        rotations: turn each class of a task by a random multiple of 90 degrees: four times as many
            classes. (A character and its own rotation are never in one task; symmetric ones could
            not be told apart.)

    Reference:
        Vinyals et al. 2016, arXiv:1606.04080, section 4.1.1; rotations: Santoro et al. 2016,
        arXiv:1605.06065.
    """

    def __init__(self, alphabets: Alphabets, *, rotations: bool = False):
        drawings = torch.cat([alphabets[name] for name in sorted(alphabets)])
        self.characters, self.drawings = drawings.shape[:2]
        self.turns = 4 if rotations else 1
        # classes [turns * characters, drawings, 1, 28, 28]: class `turn * characters + i` is
        # character i, turned
        self.classes = torch.cat(
            [torch.rot90(drawings, turn, dims=(-2, -1)) for turn in range(self.turns)]
        )

    def sample(
        self, generator: torch.Generator, tasks: int, *, ways: int, shots: int, queries: int
    ) -> Episode:
        """Draw tasks of `ways` characters each.

        For each character there are `shots + queries` different drawings.

        Args:
            generator: source of all randomness, on the CPU.
            tasks: number of tasks.
            ways: classes of a task.
            shots: drawings of each class to adapt on.
            queries: further drawings of each class.

        Returns:
            support = (images [tasks, ways * shots, 1, 28, 28] in [0, 1] where ink is 1, labels
            [tasks, ways * shots] in 0 ... ways - 1); query likewise with `queries`.

        Raises:
            ValueError: a count is not positive (`queries`: is negative), or there are too few
                characters or drawings.
        """
        if min(tasks, ways, shots) < 1 or queries < 0:
            raise ValueError(
                f"`tasks`, `ways` and `shots` must be positive, and `queries` not negative, got "
                f"{tasks}, {ways}, {shots} and {queries}."
            )
        if ways > self.characters:
            raise ValueError(
                f"`ways` must be at most the number of characters, {self.characters}, got {ways}. "
                "Add alphabets."
            )
        if shots + queries > self.drawings:
            raise ValueError(
                f"`shots + queries` must be at most {self.drawings}, the drawings of a character, "
                f"got {shots} + {queries}. Ask for fewer queries."
            )
        # The order of uniform numbers is a random permutation, for all tasks at once.
        characters = torch.rand(tasks, self.characters, generator=generator).argsort(-1)
        turns = torch.randint(self.turns, (tasks, ways, 1), generator=generator)
        drawings = torch.rand(tasks, ways, self.drawings, generator=generator).argsort(-1)
        classes = turns * self.characters + characters[:, :ways, None]
        images = self.classes[classes, drawings[..., : shots + queries]] / 255
        labels = torch.arange(ways)[:, None].expand(tasks, ways, shots + queries)

        def part(rows: slice) -> tuple[Tensor, Tensor]:
            return images[:, :, rows].flatten(1, 2), labels[:, :, rows].flatten(1, 2)

        return Episode(support=part(slice(shots)), query=part(slice(shots, None)))

    def batch(self, generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        """Draw (images [size, 1, 28, 28], classes [size]) of all classes.

        They are for plain classification.
        """
        classes = torch.randint(len(self.classes), (size,), generator=generator)
        drawings = torch.randint(self.drawings, (size,), generator=generator)
        return self.classes[classes, drawings] / 255, classes


def conv4(ways: int, filters: int = 64) -> nn.Module:
    """Return four blocks and a linear head, for 28 x 28 images.

    A block is a 3 x 3 convolution, batch norm, 2 x 2 max pooling and a ReLU. Batch norm always uses
    the statistics of its batch, so a query is classified together with the other queries
    (transductively), as in the paper. Max pooling and ReLU commute; pooling first leaves a quarter
    of the work.

    Reference:
        Vinyals et al. 2016, arXiv:1606.04080; Finn, Abbeel, Levine 2017, arXiv:1703.03400, section
        5.2.
    """
    layers: list[tuple[str, nn.Module]] = []
    for index in range(4):
        layers += [
            (f"conv{index}", nn.Conv2d(filters if index else 1, filters, 3, padding=1)),
            (f"norm{index}", nn.BatchNorm2d(filters, track_running_stats=False)),
            (f"pool{index}", nn.MaxPool2d(2)),
            (f"relu{index}", nn.ReLU()),
        ]
    return nn.Sequential(
        OrderedDict([*layers, ("flatten", nn.Flatten()), ("head", nn.Linear(filters, ways))])
    )


def _zip_files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(
            f"No Omniglot data at {path}. Give an official `images_*.zip`, or a folder that holds "
            "some."
        )
    files = sorted(path.glob("*.zip")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(
            f"No zip file in the folder {path}. Put an official `images_*.zip` there."
        )
    return files


def _open(file: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except _DAMAGED as error:
        raise ValueError(
            f"{file} is damaged or no zip file ({error}). Download it again."
        ) from error


def _decode(archive: zipfile.ZipFile, file: Path, member: zipfile.ZipInfo) -> Tensor:
    """Return one drawing as uint8 [1, 28, 28], ink 255."""
    with extra("`read_omniglot`"):
        from PIL import Image
    if member.file_size > MOST_BYTES:
        raise _unreadable(
            file, member, f"{member.file_size} bytes unpacked, at most {MOST_BYTES} are read"
        )
    try:
        with Image.open(io.BytesIO(archive.read(member))) as image:  # reads the header only
            if math.prod(image.size) <= MOST_PIXELS:
                small = image.convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
                return torch.from_numpy(255 - np.asarray(small))[None]
            size = image.size
    # There is no closed list of what zipfile, its decompressors and PIL raise on damaged bytes.
    except Exception as error:
        raise _unreadable(file, member, error) from error
    raise _unreadable(file, member, f"{size[0]} x {size[1]} pixels, at most {MOST_PIXELS} are read")


def _unreadable(file: Path, member: zipfile.ZipInfo, why: object) -> ValueError:
    return ValueError(
        f"{file}: cannot read the drawing {member.filename} ({why}). Download the file again."
    )
