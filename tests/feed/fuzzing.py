"""Mutated image files through a feed that skips what it cannot read, all formats in one process.

The test suite does this with few; all of it is run by hand:

    python tests/feed/fuzzing.py [--images 2000]
"""

import argparse
import io
import logging
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from fastcal import ImageFeed, Preprocess

#: So many of the images are as PIL wrote them.
INTACT = 20


def originals(extension):
    """Encoded images of 90x60 in the ways that the format has of storing them."""
    coarse = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    rgb = Image.fromarray(coarse).resize((90, 60), Image.Resampling.BICUBIC)
    grey = rgb.convert("L")
    alpha = rgb.copy()
    alpha.putalpha(grey)
    palette = rgb.quantize(32)
    cmyk = rgb.convert("CMYK")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6
    ways = {
        "jpg": [
            (rgb, {}),
            (rgb, {"progressive": True}),
            (grey, {}),
            (cmyk, {}),
            (rgb, {"exif": turned}),
        ],
        "png": [(rgb, {}), (palette, {}), (deep, {}), (alpha, {}), (rgb, {"exif": turned})],
        "bmp": [(rgb, {}), (palette, {}), (grey, {})],
        "webp": [(rgb, {}), (rgb, {"lossless": True}), (alpha, {"lossless": True}), (rgb, {"exif": turned})],
        "tiff": [(rgb, {}), (grey, {}), (deep, {}), (rgb, {"exif": turned})]
        + [(rgb, {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")],
        "jp2": [(rgb, {}), (rgb, {"irreversible": True}), (grey, {}), (alpha, {})],
        "ppm": [(rgb, {}), (grey, {})],
    }
    for image, options in ways[extension]:
        encoded = io.BytesIO()
        image.save(encoded, Image.registered_extensions()[f".{extension}"], **options)
        yield encoded.getvalue()


#: The formats, by their extensions.
FORMATS = ("jpg", "png", "bmp", "webp", "tiff", "jp2", "ppm")


def mutate(data, random):
    """The data cut off, with bits or bytes changed anywhere or in the header, or with a part left out or twice."""
    changed = bytearray(data)
    way = random.integers(5)
    if way == 0:
        return data[: random.integers(len(data))]
    if way < 4:
        reach = min(len(data), 64) if way == 3 else len(data)
        for place in random.integers(0, reach, random.integers(1, 12)):
            changed[place] = changed[place] ^ 1 << random.integers(8) if way == 1 else random.integers(256)
        return bytes(changed)
    first, last = np.sort(random.integers(0, len(data), 2))
    changed[first:last] = [] if random.integers(2) else changed[first:last] * 2
    return bytes(changed)


def write(folder, extension, count, seed):
    """So many images, of which every `INTACT`-th is intact; returns the intact ones' paths."""
    intact = []
    encoded = list(originals(extension))
    for number in range(count):
        path = folder / f"{number:05}.{extension}"
        data = encoded[number // INTACT % len(encoded)]
        if number % INTACT:
            data = mutate(encoded[number % len(encoded)], np.random.default_rng([seed, number]))
        else:
            intact.append(str(path))
        path.write_bytes(data)
    return intact


def go_through(folder, intact):
    """Go through a folder twice and see that all is as it should be; returns how many images were skipped."""
    with ImageFeed(
        folder, preprocess=Preprocess(size=(32, 32), resize="crop"), batch_size=16, skip_unreadable=True,
        max_unreadable=100, device="cpu",
    ) as feed:  # fmt: skip
        sums = [[float(batch["input"].sum(dtype=np.float64)) for batch in feed] for _ in range(2)]
        assert len(sums[0]) == len(feed) == -((len(feed.skipped) - len(feed.paths)) // 16)
        assert np.isfinite(sums[0]).all()
        assert not set(intact) & set(feed.skipped)
        return len(feed.skipped)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="mutated images of each format")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.getLogger("fastcal").setLevel(logging.ERROR)
    for extension in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            count = arguments.images * INTACT // (INTACT - 1)
            intact = write(Path(folder), extension, count, arguments.seed)
            start = time.perf_counter()
            skipped = go_through(folder, intact)
            seconds = time.perf_counter() - start
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(f"{extension}: {count} images, {skipped} skipped, {seconds:.0f} s, {memory} MB at most", flush=True)


if __name__ == "__main__":
    main()
