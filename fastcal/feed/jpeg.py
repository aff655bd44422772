"""The markers of a JPEG file (ITU-T T.81, annex B)."""

from collections.abc import Iterator

_END_OF_IMAGE = b"\xff\xd9"
_START_OF_SCAN = 0xDA
_JFIF, _ADOBE = 0xE0, 0xEE

#: Frames. The markers 0xC4, 0xC8 and 0xCC among them have other meanings.
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


def has_end_of_image(jpeg: bytes) -> bool:
    """Return whether an end-of-image marker follows the first scan; an EXIF thumbnail before has one too."""
    scan = max((end for _, _, end in _segments(jpeg)), default=2)
    return jpeg.find(_END_OF_IMAGE, scan) >= 0


def has_rgb_components(jpeg: bytes) -> bool:
    """Return whether an image's three components are red, green and blue, by libjpeg's rules.

    Without a JFIF marker, Adobe's marker decides: a transform of 0 means RGB. Without both, the components' names do.
    """
    jfif, transform, names = False, None, b""
    for marker, data, _ in _segments(jpeg):
        if marker == _JFIF and data.startswith(b"JFIF\0"):
            jfif = True
        elif marker == _ADOBE and data.startswith(b"Adobe") and len(data) >= 12:
            transform = data[11]
        elif marker in _FRAMES and len(data) >= 15 and data[5] == 3:
            names = data[6:15:3]
    if jfif or not names:
        return False
    return names == b"RGB" if transform is None else transform == 0


def _segments(jpeg: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yield marker, data and end of each segment before the first scan, as far as the file goes."""
    place = 2
    while jpeg[place : place + 1] == b"\xff" and len(jpeg) >= place + 4 and jpeg[place + 1] != _START_OF_SCAN:
        marker, end = jpeg[place + 1], place + 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
        yield marker, jpeg[place + 4 : end], end
        place = end
