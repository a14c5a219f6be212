"""Reading Omniglot's zip files and drawing N-way K-shot tasks."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

import metaopt as mo
from metaopt.autodiff.replay import Ambient
from metaopt.meta_training import sample_tasks
from metaopt.meta_training.running import run_tasks
from metaopt.tasks.omniglot import SIZE, CharacterTasks, conv4, read_omniglot, split_alphabets
from optimizers import SGD, Adam

OFFICIAL = Path(__file__).parents[2] / "shared/data/omniglot/images_background_small1.zip"
ALPHABETS = {"Braille": 3, "Greek": 4, "Latin": 5}
DRAWINGS = 6


def png(alphabet: int, character: int, drawing: int) -> bytes:
    """A black rectangle on white, in the format of the official files.

    Its place and size tell the three numbers apart.
    """
    image = Image.new("1", (105, 105), 1)
    ImageDraw.Draw(image).rectangle(
        (10 * alphabet, 12 * character, 10 * alphabet + 20 + 6 * drawing, 12 * character + 8),
        fill=0,
    )
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def members(root: str = "images_background") -> dict[str, bytes]:
    files = {}
    for index, (name, count) in enumerate(ALPHABETS.items()):
        for character in range(count):
            folder = f"{root}/{name}/character{character + 1:02d}"
            for drawing in range(DRAWINGS):
                file = f"{100 * index + character:04d}_{drawing + 1:02d}.png"
                files[f"{folder}/{file}"] = png(index, character, drawing)
    return files


def write(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write(tmp_path_factory.mktemp("omniglot") / "images_background.zip", members())


@pytest.fixture(scope="module")
def alphabets(archive):
    return read_omniglot(archive)


def test_reading_keeps_alphabets_characters_and_drawings_in_order(alphabets):
    assert {name: tuple(images.shape) for name, images in alphabets.items()} == {
        name: (count, DRAWINGS, 1, SIZE, SIZE) for name, count in ALPHABETS.items()
    }
    for index, images in enumerate(alphabets.values()):
        for character in range(len(images)):
            for drawing in range(DRAWINGS):
                rows, columns = (images[character, drawing, 0] > 127).nonzero().T
                # the rectangle's corner and width in the 28 x 28 picture, to within a pixel
                assert abs(rows.min() - 12 * character * SIZE / 105) <= 1
                assert abs(columns.min() - 10 * index * SIZE / 105) <= 1
                assert abs(len(columns.unique()) - (21 + 6 * drawing) * SIZE / 105) <= 1


def test_a_folder_of_archives_is_read_as_one_and_shared_drawings_once(tmp_path, alphabets):
    files = members()
    write(
        tmp_path / "images_background.zip",
        {name: content for name, content in files.items() if "Latin" not in name},
    )
    small = {
        name.replace("background", "background_small1"): content
        for name, content in files.items()
        if "Braille" not in name
    }
    write(tmp_path / "images_background_small1.zip", small)
    write(
        tmp_path / "strokes_background.zip",
        {"strokes_background/Greek/character01/0100_01.txt": b"START"},
    )
    folder = read_omniglot(tmp_path)
    assert folder.keys() == alphabets.keys()
    assert all(torch.equal(folder[name], alphabets[name]) for name in alphabets)


@pytest.mark.skipif(not OFFICIAL.exists(), reason="the official small archive is not here")
def test_the_official_archive():
    real = read_omniglot(OFFICIAL)
    assert {name: len(images) for name, images in real.items()} == {
        "Balinese": 24, "Early_Aramaic": 22, "Greek": 24, "Korean": 40, "Latin": 26,
    }  # fmt: skip
    images = torch.cat(list(real.values()))
    assert images.shape == (136, 20, 1, SIZE, SIZE)
    assert 0.02 < (images / 255).mean() < 0.2  # thin ink on empty paper
    assert len(images.flatten(0, 1).unique(dim=0)) == 136 * 20


def test_the_split_is_disjoint_complete_and_as_asked(alphabets):
    train, test = split_alphabets(alphabets)
    assert (list(train), list(test)) == (["Braille", "Greek"], ["Latin"])
    train, test = split_alphabets(alphabets, ["Greek", "Braille"])
    assert (list(train), list(test)) == (["Latin"], ["Braille", "Greek"])
    with pytest.raises(
        ValueError,
        match=r"`test` must name alphabets of the data, got \['Klingon'\]; there are \['Braille'",
    ):
        split_alphabets(alphabets, ["Klingon"])
    with pytest.raises(
        ValueError,
        match=r"Both sides of the split need an alphabet, got train \[\] and test "
        r"\['Braille', 'Greek', 'Latin'\]",
    ):
        split_alphabets(alphabets, list(alphabets))
    with pytest.raises(
        ValueError,
        match=r"Both sides of the split need an alphabet, got train \['Greek'\] and test \[\]",
    ):
        split_alphabets({"Greek": alphabets["Greek"]})


@pytest.mark.parametrize("rotations", [False, True])
def test_an_episode_has_distinct_classes_right_labels_and_no_overlap(alphabets, rotations):
    tasks = CharacterTasks(alphabets, rotations=rotations)
    ways, shots, queries = 5, 2, 3
    episode = tasks.sample(
        torch.Generator().manual_seed(0), 40, ways=ways, shots=shots, queries=queries
    )
    # row: (turn * characters + character) * drawings + drawing
    flat = tasks.classes.flatten(2).flatten(0, 1)
    turned = set()
    for task in range(40):
        owners, used = {}, set()
        for (images, labels), count in ((episode.support, shots), (episode.query, queries)):
            assert labels[task].bincount().tolist() == [count] * ways
            for image, label in zip(images[task], labels[task].tolist(), strict=True):
                # every drawing of these alphabets, in every rotation, is unique, so a picture says
                # where it is from
                (row,) = (
                    (flat == (image * 255).round().flatten()).all(-1).nonzero().flatten().tolist()
                )
                assert row not in used
                used.add(row)
                turn, character = divmod(row // DRAWINGS, tasks.characters)
                turned.add(turn)
                assert owners.setdefault(label, (turn, character)) == (turn, character)
        assert len({character for _, character in owners.values()}) == ways
    assert turned == (set(range(4)) if rotations else {0})


def test_episodes_repeat_under_a_seed_and_differ_without(alphabets):
    tasks = CharacterTasks(alphabets, rotations=True)

    def draw(seed):
        images, labels = tasks.sample(
            torch.Generator().manual_seed(seed), 3, ways=4, shots=1, queries=2
        ).query
        assert images.shape == (3, 8, 1, SIZE, SIZE)
        assert images.min() == 0
        assert images.max() == 1
        return images, labels

    state = torch.random.get_rng_state()
    assert torch.equal(draw(1)[0], draw(1)[0])
    assert not torch.equal(draw(1)[0], draw(2)[0])
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_plain_batch_has_the_classes_of_its_images(alphabets):
    tasks = CharacterTasks(alphabets, rotations=True)
    images, classes = tasks.batch(torch.Generator().manual_seed(0), 500)
    # each of the 48 classes is missing with probability 3e-5
    assert set(classes.tolist()) == set(range(4 * 12))
    for image, label in zip(images, classes, strict=True):
        assert ((image * 255).round() == tasks.classes[label]).flatten(1).all(-1).any()


def test_sampling_more_than_there_is_says_so(alphabets):
    tasks, generator = CharacterTasks(alphabets), torch.Generator()
    with pytest.raises(
        ValueError, match=r"`ways` must be at most the number of characters, 12, got 13"
    ):
        tasks.sample(generator, 1, ways=13, shots=1, queries=1)
    with pytest.raises(
        ValueError,
        match=r"`shots \+ queries` must be at most 6, the drawings of a character, got 3 \+ 4",
    ):
        tasks.sample(generator, 1, ways=5, shots=3, queries=4)
    with pytest.raises(
        ValueError,
        match=r"`tasks`, `ways` and `shots` must be positive, .* got 1, 5, 0 and 1",
    ):
        tasks.sample(generator, 1, ways=5, shots=0, queries=1)
    support, query = tasks.sample(generator, 1, ways=5, shots=6, queries=0)
    assert (support[0].shape[1], query[0].shape[1]) == (30, 0)


def test_a_missing_path_and_a_folder_without_archives(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"No Omniglot data at .*nowhere\. Give an official"
    ):
        read_omniglot(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"No zip file in the folder .*\. Put an official"):
        read_omniglot(tmp_path)


def test_a_file_that_is_no_archive_or_a_truncated_one(tmp_path, archive):
    text = tmp_path / "text.zip"
    text.write_text("404: not found")
    truncated = tmp_path / "truncated.zip"
    truncated.write_bytes(archive.read_bytes()[:-500])
    for path in (text, truncated):
        with pytest.raises(
            ValueError,
            match=rf"{path.name} is damaged or no zip file \(File is not a zip file\)\. Download "
            rf"it again",
        ):
            read_omniglot(path)


def test_an_archive_without_alphabets(tmp_path):
    path = write(tmp_path / "holiday.zip", {"photos/beach.png": png(0, 0, 0)})
    with pytest.raises(
        ValueError,
        match=r"No alphabets in .*holiday\.zip: drawings must be members like "
        r"`images_background/Greek",
    ):
        read_omniglot(path)


def test_a_damaged_member_is_named(tmp_path):
    name = "images_background/Greek/character02/0101_03.png"
    content = members()[name]
    stored = write(tmp_path / "stored.zip", members(), zipfile.ZIP_STORED)
    raw = stored.read_bytes()
    at = raw.index(content) + len(content) // 2
    stored.write_bytes(raw[:at] + bytes([raw[at] ^ 255]) + raw[at + 1 :])
    with pytest.raises(
        ValueError,
        match=rf"stored\.zip: cannot read the drawing {name} \(Bad CRC-32 .*\)\. Download the file "
        rf"again",
    ):
        read_omniglot(stored)
    for wrong, why in (
        (b"not a picture", "cannot identify image file"),
        (content[: len(content) // 2], ""),
    ):
        path = write(tmp_path / "undecodable.zip", members() | {name: wrong})
        with pytest.raises(
            ValueError, match=rf"undecodable\.zip: cannot read the drawing {name} \(.*{why}"
        ):
            read_omniglot(path)


DRAWING = "images_background/Greek/character02/0101_03.png"


def test_a_huge_member_is_refused_before_it_is_read(tmp_path):
    """300 MB of zeros, which take 300 kB in the file, were unpacked in memory first."""
    path = write(tmp_path / "bomb.zip", {DRAWING: bytes(300 * 2**20)})
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError,
            match=rf"bomb\.zip: cannot read the drawing {DRAWING} \(314572800 bytes unpacked, at "
            rf"most 1048576 are read\)",
        ):
            read_omniglot(path)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("side", "why"),
    [(2000, "2000 x 2000 pixels, at most 1048576 are read"), (14000, ".*decompression bomb")],
)
def test_a_huge_picture_is_refused_before_it_is_unpacked(tmp_path, side, why):
    """A case of PIL's own exceptions, which came out as they are.

    The header says the size; nothing of that size is made.
    """
    content = bytearray(png(0, 0, 0))
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path = write(tmp_path / "large.zip", {DRAWING: bytes(content)})
    with pytest.raises(
        ValueError,
        match=rf"large\.zip: cannot read the drawing {DRAWING} \({why}.*\)\. Download the file "
        rf"again",
    ):
        read_omniglot(path)


@pytest.mark.parametrize("whole", [False, True])
def test_what_zipfile_does_not_know_is_damage(tmp_path, whole):
    """NotImplementedError, which is no BadZipFile.

    A method of compression, or a version of the format, that does not exist.
    """
    raw = bytearray(write(tmp_path / "new.zip", {DRAWING: png(0, 0, 0)}).read_bytes())
    central = raw.index(b"PK\1\2")
    if whole:
        raw[central + 6] = 99
    else:
        raw[central + 10] = raw[8] = 77
    (tmp_path / "new.zip").write_bytes(raw)
    message = (
        r"new\.zip is damaged or no zip file \(zip file version 9\.9\)"
        if whole
        else r"cannot read the drawing .*compression"
    )
    with pytest.raises(ValueError, match=message):
        read_omniglot(tmp_path / "new.zip")


def test_an_archive_that_lacks_a_drawing(tmp_path):
    files = members()
    del files["images_background/Greek/character02/0101_03.png"]
    with pytest.raises(
        ValueError,
        match=r"same number of drawings, got 5 for Greek/character02 and 6 for Braille/character01",
    ):
        read_omniglot(write(tmp_path / "incomplete.zip", files))


def test_the_order_of_pooling_and_relu_does_not_matter():
    torch.manual_seed(0)
    model = conv4(ways=3, filters=4).double()
    images = torch.randn(6, 1, SIZE, SIZE, dtype=torch.float64)
    value = images
    for index in range(4):
        value = model.get_submodule(f"norm{index}")(model.get_submodule(f"conv{index}")(value))
        value = torch.nn.functional.max_pool2d(value.relu(), 2)
    assert value.shape == (6, 4, 1, 1)
    # rounding
    torch.testing.assert_close(
        model(images), model.get_submodule("head")(value.flatten(1)), rtol=0, atol=1e-12
    )


def drawings_of(images, alphabets):
    """Return (alphabet, character, drawing) of each image, [n, 3], for images [n, 784]."""
    found = []
    for image in images:
        places = [
            (index, *place.tolist())
            for index, drawings in enumerate(alphabets.values())
            for place in (drawings.flatten(2) / 255 == image).all(-1).nonzero()
        ]
        assert len(places) == 1
        found += places
    return torch.tensor(found)


def test_tasks_of_a_family_are_episodes_held_out_by_class(archive, alphabets):
    """The last alphabet of three is held out; support and query share characters, not drawings."""
    for part, alphabet in (("train", [0, 1]), ("test", [2])):
        data = mo.tasks.OmniglotClasses(archive, ways=3, part=part)
        family = mo.tasks.Supervised(mo.tasks.MLP((4,)), data, batch_size=6, held_out=9)
        tasks = sample_tasks(family, torch.Generator().manual_seed(0), 4, 5)
        (x, y), (other, other_y) = tasks.batches, tasks.held_out
        assert x.shape == (4, 5, 6, SIZE * SIZE)
        assert other.shape == (4, 9, SIZE * SIZE)
        assert torch.equal(x, x[:, :1].expand_as(x))
        characters = set()
        for i in range(4):
            near, far = drawings_of(x[i, 0], alphabets), drawings_of(other[i], alphabets)
            rows = torch.cat([near, far])
            assert len(rows.unique(dim=0)) == 15
            assert set(rows[:, 0].tolist()) <= set(alphabet)
            labels = torch.cat([y[i, 0], other_y[i]])
            for label in range(3):  # one label, one character
                assert len(rows[labels == label, :2].unique(dim=0)) == 1
            assert len(rows[:, :2].unique(dim=0)) == 3
            characters |= {tuple(row) for row in rows[:, :2].tolist()}
        assert len(characters) > 3


@pytest.mark.skipif(not OFFICIAL.exists(), reason="the official small archive is not here")
def test_an_optimizer_is_trained_on_the_queries_of_the_real_archive():
    """Five shots of characters that training never sees: the queries' loss goes down."""
    train, test = (
        mo.tasks.Supervised(mo.tasks.MLP((16,)), data, batch_size=25, held_out=25)
        for data in (mo.tasks.OmniglotClasses(OFFICIAL, part=part) for part in ("train", "test"))
    )
    optimizer = SGD(torch.nn.Parameter(torch.tensor(0.01)))
    estimator = mo.NRES(0.01, pairs=4, window=5, objective=mo.ValidationLoss())
    training = mo.MetaTraining(optimizer, train, estimator=estimator, outer=Adam(0.02), horizon=5)

    def judge():
        tasks = sample_tasks(test, torch.Generator().manual_seed(1), 32, 5)
        _, after = run_tasks(optimizer, test, tasks, Ambient.now([]))
        return torch.func.vmap(test.loss)(after, tasks.held_out).mean()

    before = judge()
    for _ in range(8):
        training.step()
    assert judge() < before - 0.1  # from 1.61, which is chance, to 1.43


def test_few_shot_data_says_what_is_wrong(archive, tmp_path):
    make = mo.tasks.OmniglotClasses
    with pytest.raises(FileNotFoundError, match="No Omniglot data at"):
        make(tmp_path / "nothing.zip")
    with pytest.raises(ValueError, match=r"`ways` must be at most 5, the characters of .*'test'"):
        make(archive, ways=6, part="test")
    with pytest.raises(ValueError, match="`ways` must be an integer of at least 2, got 1"):
        make(archive, ways=1)
    with pytest.raises(ValueError, match="`part` must be"):
        make(archive, part="validation")
    generator, data = torch.Generator().manual_seed(0), make(archive, ways=3)
    with pytest.raises(ValueError, match="multiples of the 3 ways, got 4"):
        data.draw(generator, 2, 4, 3)
    with pytest.raises(ValueError, match=r"`shots \+ queries` must be at most 6, .* got 4 \+ 3"):
        data.draw(generator, 2, 12, 9)
