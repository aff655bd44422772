"""The kinds of files by their contents: names may say something else."""

import os
import re
import struct
import zipfile

from fastcal.errors import DataError

#: The kinds of texts, and of caches among them. Texts are of an encoding that has ASCII's characters, or UTF-16.
TEXT = "a text file"
CACHE = "a calibration cache"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")

_ZIP = "a ZIP archive"

#: The kind of a file whose bytes at a place are these: one of `fastcal.feed.dataset.EXTENSIONS`, or a description.
_BINARIES = (
    (0, b"\xff\xd8\xff", "image"),  # JPEG
    (0, b"\x89PNG\r\n\x1a\n", "image"),
    (0, b"GIF87a", "image"),
    (0, b"GIF89a", "image"),
    (0, b"BM", "image"),
    (0, b"II*\0", "image"),  # TIFF
    (0, b"MM\0*", "image"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "image"),  # JPEG 2000
    (0, b"\xff\x4f\xff\x51", "image"),
    (8, b"WEBP", "image"),
    (257, b"ustar", "tar shard"),
    (0, b"\x93NUMPY", "array"),
    (0, b"ftrt", "a TensorRT engine"),
    (0, b"PK\3\4", _ZIP),
    (0, b"PK\5\6", _ZIP),
    (0, b"\x1f\x8b", "compressed"),
    (0, b"BZh", "compressed"),
    (0, b"\xfd7zXZ\0", "compressed"),
    (0, b"\x28\xb5\x2f\xfd", "compressed"),
    (0, b"7z\xbc\xaf\x27\x1c", "compressed"),
    (0, b"Rar!", "compressed"),
    (0, b"PAR1", "a Parquet file"),
    (0, b"ARROW1", "an Arrow file"),
    (0, b"\x89HDF\r\n", "an HDF5 file"),
    (0, b"SQLite format 3", "an SQLite database"),
    (0, b"\x0a\x23\xd7\xce", "an MXNet RecordIO file"),
    (16, b"\xde\xc0\xef\xbe", "an LMDB database"),
    (0, b"%PDF-", "a PDF document"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"\x76\x2f\x31\x01", "an OpenEXR image"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (0, b"II+\0", "a BigTIFF image"),
    (0, b"MM\0+", "a BigTIFF image"),
    (128, b"DICM", "a DICOM image"),
    *((4, b"ftyp" + brand, "a HEIF image") for brand in (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis")),
    (4, b"ftyp", "a video"),
    (0, b"\x1a\x45\xdf\xa3", "a video"),  # Matroska
    (8, b"AVI ", "a video"),
    (0, b"\0\0\x01\xba", "a video"),  # MPEG
    (0, b"\0\0\x01\xb3", "a video"),
    (0, b"FLV\x01", "a video"),
    (0, b"OggS", "a sound or video"),
    (8, b"WAVE", "a sound"),
    (0, b"ID3", "a sound"),
    (0, b"fLaC", "a sound"),
    *((0, b"\x80%c" % version, "a pickle of Python") for version in range(2, 6)),
    (0, b"\x7fELF", "a program"),
)  # fmt: skip

#: The beginnings of texts, in lower case and without a byte order mark, that are no lists.
_TEXTS = {
    b"trt-": CACHE,
    b"version https://git-lfs": "a pointer of Git LFS (git lfs pull fetches the file)",
    b"<!doctype html": "an HTML page",
    b"<html": "an HTML page",
    b"<svg": "an SVG image",
    b"<?xml": "an XML file",
    b"%pdf-": "a PDF document",
}

#: The beginning of a PNM image, which may be text.
_PNM = re.compile(rb"P[1-7]\s+[#\dW]")

#: The bytes that do not occur in text.
_CONTROLS = bytes({*range(32), 127} - {*b"\t\n\v\f\r\x1b"})

_HEAD = 4096


def identify(path: str | os.PathLike[str]) -> str:
    """Return the kind of a file by its content: of `fastcal.feed.dataset.EXTENSIONS`, or a description of others.

    The result is empty for an empty file and for unknown contents; `TEXT` is the description of texts.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            kind = kind_of_content(file.read(_HEAD))
        return _kind_of_zip(path) if kind == _ZIP else kind
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error


def kind_of_content(head: bytes) -> str:
    """Return the kind of a file that begins with these bytes, as `identify` does; of ZIP archives that alone."""
    if _PNM.match(head):
        return "image"
    if head.startswith(UTF_16) or (head and head == head.translate(None, _CONTROLS)):
        begin = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        return next((kind for text, kind in _TEXTS.items() if begin.startswith(text)), TEXT)
    known = (kind for place, signature, kind in _BINARIES if head.startswith(signature, place))
    return next(known, "TFRecord" if _is_tfrecord(head) else "")


def _kind_of_zip(path: str | os.PathLike[str]) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # of many kinds, if the archive is damaged
        return ""
    if names and all(name.endswith(".npy") for name in names):
        return "array archive"
    return "a PyTorch file" if any(name.endswith("data.pkl") for name in names) else "compressed"


def _is_tfrecord(head: bytes) -> bool:
    """Return whether a file begins with the length of a record and the masked CRC-32C of the length."""
    if len(head) < 12:
        return False
    crc = 0xFFFFFFFF
    for byte in head[:8]:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 & -(crc & 1))
    crc ^= 0xFFFFFFFF
    return bool(struct.unpack_from("<I", head, 8)[0] == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
