"""Tar shards and TFRecord files give what their images do as files."""

import io
import os
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from conftest import alter
from fastcal import FastcalError, ImageFeed, Preprocess

SMALL = Preprocess(size=(16, 16))


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_tars(folder, images, per_shard=4, extension="jpg"):
    """WebDataset's shards of these encoded images, with a label before and a text after each."""
    folder.mkdir(exist_ok=True)
    for shard, first in enumerate(range(0, len(images), per_shard)):
        with tarfile.open(folder / f"train-{shard:04}.tar", "w") as archive:
            for number, data in enumerate(images[first : first + per_shard], start=first):
                add(archive, f"{number:05} é.cls", b"7")
                add(archive, f"{number:05} é.{extension}", data)
                add(archive, f"{number:05} é.json", b"{}")
    return folder


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(**features):
    """A serialized tf.train.Example of bytes features, by the definition of its protocol buffer."""
    entries = (
        field(1, field(1, key.encode()) + field(2, field(1, field(1, value)))) for key, value in features.items()
    )
    return field(1, b"".join(entries))


def write_tfrecord(path, records):
    """Records between their lengths and checksums, which DALI does not check."""
    path.write_bytes(b"".join(struct.pack("<QI", len(record), 0) + record + bytes(4) for record in records))
    return path


@pytest.fixture
def encoded(photographs):
    """Ten encoded images of different sizes and formats."""
    files = sorted(photographs.iterdir())
    return [path.read_bytes() for path in (*files, *files[:4][::-1])]


@pytest.fixture
def as_files(tmp_path, encoded):
    folder = tmp_path / "files"
    folder.mkdir()
    for number, data in enumerate(encoded):
        (folder / f"{number:05}.jpg").write_bytes(data)
    return folder


def all_of(feed):
    with feed:
        return [batch["input"].copy() for batch in feed]


@pytest.fixture(params=["tar", "tfrecord"])
def shards(request, tmp_path, encoded):
    """The images in shards, and a function that makes the name of one."""
    folder = tmp_path / "shards"
    if request.param == "tar":
        write_tars(folder, encoded)
        return folder, lambda number: f"{folder}/train-{number // 4:04}.tar:{number:05} é.jpg"
    folder.mkdir()
    for shard in range(3):
        records = [example(**{"image/class/label": b"x", "image/encoded": data}) for data in encoded[shard * 4 :][:4]]
        write_tfrecord(folder / f"train-{shard:05}-of-00003", records)
    return folder, lambda number: f"{folder}/train-{number // 4:05}-of-00003:{number % 4}"


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 3}, {"batch_size": 3, "last_batch": "drop"}, {"batch_size": 16}, {"batch_size": 4, "limit": 5}],
)
def test_batches_are_those_of_the_files(as_files, shards, options):
    folder, name = shards
    expected = all_of(ImageFeed(as_files, preprocess=SMALL, **options))
    feed = ImageFeed(folder, preprocess=SMALL, **options)
    assert feed.paths == [name(number) for number in range(options.get("limit", 10))]
    for _ in range(2):
        np.testing.assert_array_equal(all_of(feed), expected)
    with feed:
        next(iter(feed))
        np.testing.assert_array_equal([batch["input"].copy() for batch in feed], expected)
        np.testing.assert_array_equal([batch["input"].copy() for batch in feed], expected)
    assert sorted(os.listdir(folder)) == sorted({path.partition(":")[0].rpartition("/")[2] for path in
                                                 [name(0), name(4), name(8)]})  # fmt: skip


def test_ways_to_name_shards(shards, monkeypatch):
    folder, name = shards
    files = sorted(str(path) for path in folder.iterdir())
    (folder / "list.txt").write_text("\n".join(os.path.basename(path) for path in files[::-1]))
    expected = [name(number) for number in range(10)]
    assert ImageFeed(files).paths == ImageFeed(f"{folder}/train*").paths == expected
    assert ImageFeed(folder / "list.txt").paths == expected[8:] + expected[4:8] + expected[:4]
    assert ImageFeed(files[1]).paths == expected[4:8]


def test_a_range_of_shards(tmp_path, encoded):
    folder = write_tars(tmp_path / "a b", encoded, per_shard=1)
    paths = ImageFeed(f"{folder}/train-{{0008..0009}}.tar").paths
    assert [path.rpartition(":")[2] for path in paths] == ["00008 é.jpg", "00009 é.jpg"]
    with pytest.raises(FastcalError, match=r"pattern .*train-\{0008..0010\}.tar, entry 3: no such file: .*0010.tar"):
        ImageFeed(f"{folder}/train-{{0008..0010}}.tar")


def test_the_sample_that_cannot_be_read_is_named_or_skipped(as_files, shards, tmp_path, encoded):
    folder, name = shards
    encoded[5] = encoded[5][: len(encoded[5]) // 2]
    encoded[9] = b""
    if name(0).endswith("jpg"):
        write_tars(folder, encoded)
    else:
        for shard in range(3):
            records = [example(**{"image/encoded": data}) for data in encoded[shard * 4 :][:4]]
            write_tfrecord(folder / f"train-{shard:05}-of-00003", records)
    with ImageFeed(folder, preprocess=SMALL, batch_size=4) as feed:
        batches = iter(feed)
        next(batches)
        with pytest.raises(FastcalError, match=r":(00005 é.jpg|1) cannot be decoded: damaged"):
            next(batches)
    (as_files / "00005.jpg").unlink()
    (as_files / "00009.jpg").unlink()
    expected = all_of(ImageFeed(as_files, preprocess=SMALL, batch_size=3))
    feed = ImageFeed(folder, preprocess=SMALL, batch_size=3, skip_unreadable=True, max_unreadable=20)
    for _ in range(2):
        np.testing.assert_array_equal(all_of(feed), expected)
    assert feed.skipped == [name(5), name(9)]


def test_what_a_feed_of_shards_is_made_from(shards):
    folder, name = shards
    plain = ImageFeed(folder, preprocess=SMALL).describe()
    assert plain == ImageFeed(folder, preprocess=SMALL).describe()
    assert plain["samples"] != ImageFeed(folder, preprocess=SMALL, limit=9).describe()["samples"]
    if name(0).endswith("jpg"):
        assert plain["samples"] != ImageFeed(folder, preprocess=SMALL, key="jpg").describe()["samples"]
    shard = next(folder.iterdir())
    shard.touch()
    assert plain == ImageFeed(folder, preprocess=SMALL).describe()
    alter(shard)
    assert plain["samples"] != ImageFeed(folder, preprocess=SMALL).describe()["samples"]


@pytest.mark.parametrize("options", [{}, {"limit": 5}, {"seed": 3, "limit": 1}])
def test_shards_are_shuffled_like_files(as_files, shards, options):
    folder, name = shards
    feed = ImageFeed(folder, preprocess=SMALL, batch_size=3, shuffle=True, **options)
    files = ImageFeed(as_files, preprocess=SMALL, batch_size=3, shuffle=True, **options)
    assert feed.paths == [name(int(os.path.basename(path)[:5])) for path in files.paths]
    np.testing.assert_array_equal(all_of(feed), all_of(files))
    assert feed.describe() == ImageFeed(folder, preprocess=SMALL, batch_size=3, shuffle=True, **options).describe()
    in_order = ImageFeed(folder, preprocess=SMALL, batch_size=3, **options).describe()
    assert feed.describe()["samples"] != in_order["samples"]
    one = [ImageFeed(sorted(folder.iterdir())[0], shuffle=shuffle).describe()["samples"] for shuffle in (True, False)]
    assert one[0] != one[1]


def test_classes_in_shards_are_balanced(tmp_path, encoded):
    for shard, classes in enumerate(("aaab", "abba")):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for number, label in enumerate(classes):
                add(archive, f"{label}/{number}.jpg", encoded[number])
    paths = ImageFeed(tmp_path, balance=True, limit=6).paths
    names = ["0.tar:a/0.jpg", "0.tar:b/3.jpg", "0.tar:a/1.jpg", "1.tar:b/1.jpg", "0.tar:a/2.jpg", "1.tar:b/2.jpg"]
    assert paths == [f"{tmp_path}/{name}" for name in names]


def test_folders_of_shards_are_balanced(tmp_path, encoded):
    for label in "ab":
        (tmp_path / label).mkdir()
        write_tfrecord(tmp_path / label / "x.tfrecord", [example(x=encoded[0]) for _ in range(2)])
    paths = ImageFeed(tmp_path, key="x", balance=True, limit=3).paths
    assert paths == [f"{tmp_path}/{name}" for name in ("a/x.tfrecord:0", "b/x.tfrecord:0", "a/x.tfrecord:1")]


@pytest.mark.parametrize("record", [b"\n", b"\n\xff", b"\x08\x00", b"\x12\x05x", b"\n" + b"\xff" * 20, b"x" * 30])
def test_a_record_that_is_no_example(tmp_path, encoded, record):
    path = write_tfrecord(tmp_path / "a.tfrecord", [example(x=encoded[0]), record, example(x=encoded[1])])
    with (
        ImageFeed(path, key="x", preprocess=SMALL, batch_size=1) as feed,
        pytest.raises(FastcalError, match=r"cannot read .*a.tfrecord:1: no tf.train.Example; replace or remove it"),
    ):
        list(feed)
    feed = ImageFeed(path, key="x", preprocess=SMALL, batch_size=2, skip_unreadable=True, max_unreadable=50)
    assert len(all_of(feed)) == 1
    assert feed.skipped == [f"{path}:1"]


def test_a_record_that_has_another_length_now(tmp_path, encoded):
    path = write_tfrecord(tmp_path / "a.tfrecord", [example(x=encoded[0])])
    feed = ImageFeed(path, key="x", preprocess=SMALL, batch_size=1)
    write_tfrecord(path, [example(x=encoded[0] + b"more")])
    with feed, pytest.raises(FastcalError, match=r"a.tfrecord:0: the shard was changed since it was listed"):
        list(feed)


def test_the_key_chooses_an_image(tmp_path, encoded):
    for kind in ("tar", "tfrecord"):
        path = tmp_path / f"pairs.{kind}"
        if kind == "tar":
            with tarfile.open(path, "w") as archive:
                for number in range(3):
                    add(archive, f"a.b/{number}.left.png", encoded[number])
                    add(archive, f"a.b/{number}.right.PNG", encoded[number + 3])
            keys = ("left.png", "right.png")
        else:
            records = [example(left=encoded[number], right=encoded[number + 3]) for number in range(3)]
            write_tfrecord(path, records)
            keys = ("left", "right")
        left, right = (all_of(ImageFeed(path, preprocess=SMALL, batch_size=3, key=key)) for key in keys)
        described = [ImageFeed(path, preprocess=SMALL, key=key).describe()["samples"] for key in keys]
        assert described[0] != described[1]
        files = [tmp_path / f"{number}.jpg" for number in range(6)]
        for number, file in enumerate(files):
            file.write_bytes(encoded[number])
        np.testing.assert_array_equal(left, all_of(ImageFeed(files[:3], preprocess=SMALL, batch_size=3)))
        np.testing.assert_array_equal(right, all_of(ImageFeed(files[3:], preprocess=SMALL, batch_size=3)))
    with pytest.raises(FastcalError, match=r"pairs.tar: sample '0' has several images; choose one .* e.g. 'right.PNG'"):
        ImageFeed(tmp_path / "pairs.tar")
    with pytest.raises(
        FastcalError, match=r"pairs.tar has no sample with an image; the images' extension is the key, here 'jpg'"
    ):
        ImageFeed(tmp_path / "pairs.tar", key="jpg")
    with ImageFeed(tmp_path / "pairs.tfrecord") as feed:
        for _ in range(2):  # in a second pass too
            with pytest.raises(
                FastcalError,
                match=r"pairs.tfrecord:0 has no image; the images' feature is the key, here 'image/encoded'",
            ):
                next(iter(feed))
    with pytest.raises(FastcalError, match=r"key 'left' is for tar shards and TFRecord, not for .*0.jpg; leave it out"):
        ImageFeed(files[:3], key="left")


def test_shards_that_are_none(tmp_path, encoded):
    whole = write_tars(tmp_path / "tars", encoded) / "train-0000.tar"
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:5000])
    (tmp_path / "text.tar").write_bytes(b"no archive" * 100)
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as archive:
        add(archive, "a.jpg", encoded[0])
    with pytest.raises(FastcalError, match=r"zipped.tar is compressed; .* decompress it to a .tar file"):
        ImageFeed(tmp_path / "zipped.tar")
    for name in ("cut", "text"):
        with pytest.raises(
            FastcalError, match=rf"cannot read .*{name}.tar: .*; shards are tar files that are not compr"
        ):
            ImageFeed(tmp_path / f"{name}.tar")
    record = write_tfrecord(tmp_path / "a.tfrecord", [example(x=b"1"), example(x=b"2")])
    record.write_bytes(record.read_bytes()[:-1])
    with pytest.raises(FastcalError, match=r"a.tfrecord breaks off in record 1, or is no TFRecord file; replace it"):
        ImageFeed(record)
    for length in (1, 9, 12, 15):
        (tmp_path / "b.tfrecord").write_bytes(bytes(length))
        with pytest.raises(FastcalError, match=r"b.tfrecord breaks off in record 0, or is no TFRecord file; replace"):
            ImageFeed(tmp_path / "b.tfrecord")
    (tmp_path / "b.tfrecord").write_bytes(b"")
    with pytest.raises(FastcalError, match=r"b.tfrecord has no sample with an image; the images' feature is the key"):
        ImageFeed(tmp_path / "b.tfrecord")


def test_a_folder_of_shards_and_images_is_not_guessed_at(tmp_path, encoded):
    folder = write_tars(tmp_path / "both", encoded)
    Image.new("RGB", (9, 9)).save(folder / "cover.png")
    with pytest.raises(FastcalError, match=r"both has images \(.*cover.png\) and tar shards \(.*0000.tar\); say which"):
        ImageFeed(folder)
    assert len(ImageFeed(f"{folder}/*.tar").paths) == 10
    with pytest.raises(
        FastcalError, match=r"the list of paths has images \(.*\) and tar shards \(.*\); all must be of"
    ):
        ImageFeed([folder / "cover.png", folder / "train-0000.tar"])


def test_a_shard_that_is_changed_while_it_is_read(tmp_path, encoded):
    folder = write_tars(tmp_path / "tars", encoded)
    feed = ImageFeed(folder, preprocess=SMALL, batch_size=2)
    (folder / "train-0001.tar").write_bytes(b"")
    with (
        feed,
        pytest.raises(
            FastcalError, match=r"cannot read .*train-0001.tar:00004 é.jpg: the shard was changed since it was listed"
        ),
    ):
        list(feed)


def test_a_shard_that_is_changed_between_two_passes(tmp_path):
    feed = None
    for level in (50, 60):
        image = io.BytesIO()
        Image.new("L", (16, 16), level).save(image, "BMP")
        folder = write_tars(tmp_path / "tars", [image.getvalue()] * 2, extension="bmp")
        feed = feed or ImageFeed(folder, preprocess=SMALL, batch_size=2)
        np.testing.assert_array_equal(all_of(feed), np.full((1, 2, 3, 16, 16), level))
