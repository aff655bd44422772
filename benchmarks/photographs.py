"""JPEG files for the benchmarks, made from the photographs in a folder or from noise."""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image


def _write(task):
    source, target, number, size = task
    if source is None:
        coarse = np.random.default_rng(number).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse)
    else:
        picture = Image.open(source).convert("RGB").rotate(number % 360, expand=False)
    picture.resize(size, Image.Resampling.BICUBIC).save(target, quality=90)


def write_photographs(folder, count, size, sources=None):
    """Write `count` JPEG files of `size` (width, height) to `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(path for path in Path(sources).iterdir() if path.suffix == ".jpg") if sources else [None]
    tasks = [(found[number % len(found)], folder / f"{number:05}.jpg", number, size) for number in range(count)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_write, tasks, chunksize=16))
    return folder
