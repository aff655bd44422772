"""Decoding with Pillow of the images that DALI does not decode, or not safely.

Some hundred damaged JPEG 2000 or PNM images make DALI 2.4 overwrite memory and crash. Thousands of damaged JPEG, PNG,
BMP, WebP and TIFF images never crashed it, and 40,000 damaged JPEG 2000 and PNM images never crashed Pillow. DALI has
no decoder for GIF. In a WebP file with EXIF, it overlooks the byte that follows a chunk of odd length, and then finds
no image.
"""

import io
import os
import re
from typing import Any

import numpy as np

from fastcal.memory import free_memory

_EXTENSIONS = (".gif", ".jp2", ".pbm", ".pgm", ".pnm", ".ppm", ".webp")

_GIF = (b"GIF87a", b"GIF89a")

_CODE_STREAM = b"\xff\x4f\xff\x51"

# The first bytes of a JPEG 2000 file, and of the bare code stream.
_JPEG_2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", _CODE_STREAM)

_PNM = tuple(b"P%d" % number for number in range(1, 8))

# The header of a PNM file of 8-bit pixels with 1 (P5) or 3 channels (P6).
_PLAIN_PNM = re.compile(rb"P([56])\s+(\d{1,6})\s+(\d{1,6})\s+255\s")

# The memory that decoding takes: 4 bytes for each of 4 channels.
_BYTES_PER_PIXEL = 16


def is_hazardous(path: str | os.PathLike[str]) -> bool:
    """Return whether a file of this name may be an image that DALI must not decode, or does not."""
    return os.fspath(path).lower().endswith(_EXTENSIONS)


def make_safe(content: bytes) -> bytes:
    """Return an encoded image that DALI decodes safely: `content` itself, or its 8-bit RGB pixels as a PPM file.

    The pixels are upright. Of an animation they are the first picture. A ValueError gives the reason if the image
    cannot be decoded.
    """
    if _is_safe(content):
        return content
    from PIL import ImageOps

    try:
        with _plugin(content)(io.BytesIO(content)) as image:
            _check(image, content)
            ImageOps.exif_transpose(image, in_place=True)
            pixels = _rgb(image)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and many others
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from error
    height, width, _ = pixels.shape
    return b"P6 %d %d 255\n" % (width, height) + bytes(pixels.data)


def _plugin(content: bytes) -> Any:
    """Return Pillow's class of an image's format; its own choice among all formats would let in more decoders."""
    from PIL.GifImagePlugin import GifImageFile
    from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
    from PIL.PpmImagePlugin import PpmImageFile
    from PIL.WebPImagePlugin import WebPImageFile

    if content.startswith(_PNM):
        return PpmImageFile
    return GifImageFile if content.startswith(_GIF) else WebPImageFile if content[8:12] == b"WEBP" else Jpeg2KImageFile


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
    channels = 1 if header[1] == b"5" else 3
    return len(content) - header.end() >= int(header[2]) * int(header[3]) * channels > 0


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


def _rgb(image: Any) -> Any:
    if image.mode in ("I", "I;16"):  # 16 bits, which Pillow would clip to 8
        grey = np.rint(np.asarray(image) / 257).astype(np.uint8)
        return np.stack([grey] * 3, axis=-1)
    return np.asarray(image.convert("RGB"))
