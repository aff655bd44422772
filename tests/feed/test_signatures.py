"""The kinds of files by their contents, and data that are named as something else."""

import io
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastcal import FastcalError, ImageFeed, Preprocess
from fastcal.feed.dataset import list_files
from fastcal.feed.signatures import identify

NATIVE = Preprocess(size=(21, 30))


def picture(number=0):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (21, 30, 3), dtype=np.uint8))


def encoded(kind, image=None, **options):
    file = io.BytesIO()
    (image or picture()).save(file, kind, **options)
    return file.getvalue()


def saved(save, *arguments, **options):
    file = io.BytesIO()
    save(file, *arguments, **options)
    return file.getvalue()


def zipped(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    return file.getvalue()


#: A TFRecord file with an empty record: the length, its masked checksum, the checksum of nothing.
TFRECORD = struct.pack("<Q", 0) + bytes.fromhex("29039807") + bytes.fromhex("d8ea82a2")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        *((encoded(kind), "image") for kind in ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG2000", "PPM")),
        (b"P3 1 1 255 3 4 5\n", "image"),
        (tarred(), "tar shard"),
        (TFRECORD, "TFRecord"),
        (TFRECORD[:9] + b"\0" + TFRECORD[10:], ""),
        (saved(np.save, np.zeros(3)), "array"),
        (saved(np.savez, x=np.zeros(3)), "array archive"),
        (saved(np.savez_compressed, x=np.zeros(3)), "array archive"),
        (zipped("x/data.pkl", "x/data/0"), "a PyTorch file"),
        (zipped("a.jpg"), "compressed"),
        (zipped("a.npy", "b.jpg"), "compressed"),
        (b"PK\3\4 broken", ""),
        (b"\0\0\0\x18ftypmp42\0\0", "a video"),
        (b"\0\0\0\x18ftypheic\0\0", "a HEIF image"),
        (b"RIFF\x10\0\0\0AVI LIST", "a video"),
        (b"PAR1\x15\0", "a Parquet file"),
        (pickle.dumps([1]), "a pickle of Python"),
        (b"\xef\xbb\xbfTRT-101601-EntropyCalibration2\nx: 3c010a14\n", "a calibration cache"),
        (b"TRT-8600-MinMaxCalibration\n", "a calibration cache"),
        (b"\n<!DOCTYPE html><title>404</title>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a pointer of Git LFS (git lfs pull fetches"),
        (b"a.jpg 3\nb.jpg 4\n", "a text file"),
        ("\u00fc.jpg\n".encode("latin-1"), "a text file"),
        ("a.jpg\r\n".encode("utf-16"), "a text file"),
        (b"BMW/1.jpg\nBMW/2.jpg\n", "a text file"),
        (b"ID3/1.jpg\n", "a text file"),
        (b"\7\1\2\3", ""),
        (b"", ""),
    ],
)  # fmt: skip
def test_content_decides(tmp_path, content, kind):
    (tmp_path / "file").write_bytes(content)
    found = identify(tmp_path / "file")
    assert found == kind or (kind and "Git LFS" in found and found.startswith(kind))


def test_damaged_archives_end_in_no_error(tmp_path):
    intact = bytearray(zipped("\u00fc.npy"))
    for place in range(len(intact)):
        for value in (0, 0xFF):
            damaged = intact.copy()
            damaged[place] = value
            (tmp_path / "file").write_bytes(damaged)
            identify(tmp_path / "file")
    (tmp_path / "file").write_bytes(bytes(intact).replace("\u00fc".encode(), b"\xad\xad"))
    assert identify(tmp_path / "file") == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("clip.mov", b"\0\0\0\x14ftypqt  \0\0", r"clip.mov is a video; name images, shards, arrays, a list"),
        ("clip.jpg", b"\x1a\x45\xdf\xa3\0\0", r"clip.jpg is a video; name images"),
        ("table.arrow", b"ARROW1\0\0", r"table.arrow is an Arrow file; name images"),
        ("scan.dcm", b"\0" * 128 + b"DICM", r"scan.dcm is a DICOM image; name images"),
        ("weights.pth", zipped("a/data.pkl"), r"weights.pth is a PyTorch file; name images"),
        ("images.zip", zipped("a.jpg"), r"images.zip is compressed; .* decompress it to a .tar file"),
        ("images.tar", b"\x1f\x8b\x08", r"images.tar is compressed"),
        ("noise.bin", b"\7\1\2\3", r"noise.bin is of no known format; name images"),
        ("old.cache", b"TRT-8600-EntropyCalibration2\nx: 3c010a14\n", r"old.cache is a calibration cache; name images"),
        ("page.jpg", b"<html>404</html>", r"page.jpg is an HTML page; name images"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FastcalError, match=message):
        list_files(tmp_path / name)
    (tmp_path / "images.txt").write_text(f"{name}\n")
    if not name.endswith((".jpg", ".tar", "noise.bin")):
        with pytest.raises(FastcalError, match=rf"{name} is (a|an|compressed).*, no image or tar shard or TFRecord"):
            list_files(tmp_path / "images.txt")


@pytest.mark.parametrize(
    ("name", "kind"), [("a.jfif", "JPEG"), ("b.gif", "GIF"), ("photo", "PNG"), ("c.txt", "TIFF"), ("d.npy", "WEBP")]
)
def test_one_image_of_any_name(tmp_path, name, kind):
    (tmp_path / name).write_bytes(encoded(kind))
    assert list_files(tmp_path / name).kind == "image"
    assert prepared(tmp_path / name)[0].shape == (21, 30, 3)


def test_a_folder_whose_files_names_say_nothing(tmp_path):
    for name, kind in (("f00", "JPEG"), ("f01.bin", "PNG")):
        (tmp_path / name).write_bytes(encoded(kind))
    (tmp_path / "labels.txt").write_text("f00 1\n")
    (tmp_path / ".hidden").write_bytes(encoded("PNG"))
    listing = list_files(tmp_path)
    assert (listing.kind, listing.paths) == ("image", [str(tmp_path / "f00"), str(tmp_path / "f01.bin")])


@pytest.mark.parametrize("name", ["x.tfrec", "y.record", "z", "w.dat"])
def test_tfrecord_files_of_any_name(tmp_path, name):
    (tmp_path / name).write_bytes(TFRECORD)
    assert list_files(tmp_path / name).kind == "TFRecord"


def prepared(data, **options):
    with ImageFeed(data, preprocess=NATIVE, device="cpu", **options) as feed:
        return [image.transpose(1, 2, 0).copy() for batch in feed for image in batch["input"]]


@pytest.mark.parametrize("skip_unreadable", [False, True])
def test_images_whose_names_belie_their_formats(tmp_path, skip_unreadable):
    kinds = ("JPEG", "PNG", "GIF", "JPEG2000", "PPM", "WEBP")
    for number, kind in enumerate(kinds):
        options = {"exif": Image.Exif(), "lossless": True} if kind == "WEBP" else {}
        (tmp_path / f"{number}.jpg").write_bytes(encoded(kind, picture(number), **options))
    found = prepared(tmp_path, batch_size=4, last_batch="drop", skip_unreadable=skip_unreadable)
    found += prepared(sorted(tmp_path.iterdir())[4:], batch_size=2)
    for number, pixels in enumerate(found):
        with Image.open(tmp_path / f"{number}.jpg") as image:
            np.testing.assert_allclose(pixels, np.asarray(image.convert("RGB")), atol=1)
    assert len(found) == len(kinds)


def test_of_a_moving_gif_the_first_picture_is_taken(tmp_path):
    frames = [Image.new("RGB", (30, 21), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert prepared(tmp_path, batch_size=1)[0].reshape(-1, 3).tolist() == [[255, 0, 0]] * 630


@pytest.mark.parametrize(
    ("options", "mode"),
    [({"lossless": True}, "RGB"), ({"icc_profile": b"odd"}, "RGB"), ({}, "RGBA"), ({"lossless": True}, "RGBA")],
)
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_webp_with_exif(tmp_path, options, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    width, height = NATIVE.size if orientation == 6 else NATIVE.size[::-1]
    for number in range(12):  # chunks of even and of odd length
        image = picture(number).resize((width, height))
        if mode == "RGBA":
            image.putalpha(picture(number).resize((width, height)).convert("L"))
        image.save(tmp_path / f"{number:02}.webp", exif=exif, **options)
    paths = sorted(tmp_path.iterdir())
    for path, pixels in zip(paths, prepared(tmp_path, batch_size=12), strict=True):
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), np.float32)
        np.testing.assert_allclose(pixels, expected, atol=1)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"<html>404</html>", "it is an HTML page"),
        (b"not yet", "it is a text file"),
        (b"\0\0\0\x18ftypavif\0\0\0", "it is a HEIF image"),
        (encoded("PNG")[:60], "damaged"),
    ],
)
def test_an_unreadable_image_is_named_for_what_it_is(tmp_path, content, fault):
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG"))
    (tmp_path / "b.jpg").write_bytes(content)
    with pytest.raises(FastcalError, match=rf"b.jpg cannot be decoded: {fault}.*; replace or remove it"):
        prepared(tmp_path, batch_size=2)
