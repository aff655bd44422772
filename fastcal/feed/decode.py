"""Decoding with Pillow of the images that DALI does not decode, or not safely.

Some hundred damaged JPEG 2000 or PNM images make DALI 2.4 overwrite memory and crash. Thousands of damaged JPEG, PNG,
BMP, WebP and TIFF images never crashed it, and 40,000 damaged JPEG 2000 and PNM images never crashed Pillow. DALI has
no decoder for GIF. In a WebP file with EXIF, it overlooks the byte that follows a chunk of odd length, and then finds
no image.
"""

import io
import os
import re
from importlib import import_module
from typing import Any

import numpy as np

from fastcal.memory import free_memory

_EXTENSIONS = (".gif", ".jp2", ".pbm", ".pgm", ".pnm", ".ppm", ".webp")

_GIF = (b"GIF87a", b"GIF89a")

_CODE_STREAM = b"\xff\x4f\xff\x51"

# The first bytes of a JPEG 2000 file, and of the bare code stream.
_JPEG_2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", _CODE_STREAM)

_PNM = tuple(b"P%d" % number for number in range(1, 8))

# The first bytes of other formats, by Pillow's name for them.
_PLUGINS: dict[str, bytes | tuple[bytes, ...]] = {
    "Ppm": _PNM,
    "Gif": _GIF,
    "WebP": b"RIFF",
    "Jpeg": b"\xff\xd8",
    "Png": b"\x89PNG",
    "Bmp": b"BM",
    "Tiff": (b"II", b"MM"),
}

# The header of a PNM file of 8-bit or 16-bit pixels with 1 (P5) or 3 channels (P6).
_PLAIN_PNM = re.compile(rb"P([56])\s+(\d{1,6})\s+(\d{1,6})\s+(255|65535)\s")

# The memory that decoding takes: 4 bytes for each of 4 channels.
_BYTES_PER_PIXEL = 16


def is_hazardous(path: str | os.PathLike[str]) -> bool:
    """Return whether a file of this name may be an image that DALI must not decode, or does not."""
    return os.fspath(path).lower().endswith(_EXTENSIONS)


def make_safe(content: bytes, *, has_alpha: bool = False) -> bytes:
    """Return an encoded image that DALI decodes safely: `content` itself, or a file of its pixels.

    The pixels are upright, of 8 bits RGB or of 16 bits grey, as a PNM file; if `has_alpha`, of 8 bits RGBA, as a PNG
    file. Of an animation they are the first picture. A ValueError gives the reason if the image cannot be decoded.
    """
    if not has_alpha and _is_safe(content):
        return content
    from PIL import ImageOps

    try:
        with _plugin(content)(io.BytesIO(content)) as image:
            _check(image, content)
            ImageOps.exif_transpose(image, in_place=True)
            return _png(image) if has_alpha else _pnm(image)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and many others
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from error


def has_16_bits(content: bytes) -> bool:
    """Return whether an image has 16 bits a channel; False if Pillow cannot tell."""
    try:
        with _plugin(content)(io.BytesIO(content)) as image:
            return "16" in image.mode or ";16" in str(image.tile) or "65535" in str(image.tile)
    except Exception:  # as above
        return False


def _plugin(content: bytes) -> Any:
    """Return Pillow's class of an image's format; its own choice among all formats would let in more decoders."""
    name = next((name for name, beginnings in _PLUGINS.items() if content.startswith(beginnings)), "Jpeg2K")
    return getattr(import_module(f"PIL.{name}ImagePlugin"), f"{name}ImageFile")


def _is_plain_webp(content: bytes) -> bool:
    """Return whether no chunk of a WebP file but the last is of odd length."""
    place, is_odd = 12, False
    while place + 8 <= len(content):
        if is_odd:
            return False
        size = int.from_bytes(content[place + 4 : place + 8], "little")
        is_odd = size % 2 == 1
        place += 8 + size
    return True


def _is_safe(content: bytes) -> bool:
    """Return whether DALI may decode the image: it is of another format, or a plain PNM or WebP file."""
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return _is_plain_webp(content)
    if content.startswith(_GIF):
        return False
    if not content.startswith(_PNM):
        return not content.startswith(_JPEG_2000)
    header = _PLAIN_PNM.match(content)
    if header is None:
        return False
    pixel = (1 if header[1] == b"5" else 3) * (1 if header[4] == b"255" else 2)
    return len(content) - header.end() >= int(header[2]) * int(header[3]) * pixel > 0


def _check(image: Any, content: bytes) -> None:
    """Raise ValueError for images that Pillow decodes wrongly, or that do not fit the memory."""
    if image.format == "JPEG2000" and image.mode != "I;16":
        # Of several channels of more than 8 bits, Pillow 11 to 13 turn white to black.
        start = content.index(_CODE_STREAM)
        channels = int.from_bytes(content[start + 40 : start + 42], "big")
        bits = max(1 + (byte & 0x7F) for byte in content[start + 42 : start + 42 + 3 * channels : 3])
        if bits > 8:
            raise ValueError(f"several channels of {bits} bits are not supported, convert it to 8 bits")
    (width, height), free = image.size, free_memory()
    if free is not None and _BYTES_PER_PIXEL * width * height > free:
        raise ValueError(f"{width}x{height} pixels do not fit the free memory")


def _pnm(image: Any) -> bytes:
    is_deep = image.mode in ("I", "I;16")  # 16 bits, which Pillow would clip to 8
    pixels = np.asarray(image).astype(">u2") if is_deep else np.asarray(image.convert("RGB"))
    height, width, *_ = pixels.shape
    header = (b"P5 %d %d 65535\n" if is_deep else b"P6 %d %d 255\n") % (width, height)
    return header + pixels.tobytes()


def _png(image: Any) -> bytes:
    from PIL import Image

    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("32 bits are not supported, convert it to 8 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    file = io.BytesIO()
    image.convert("RGBA").save(file, "PNG", compress_level=1)
    return file.getvalue()
