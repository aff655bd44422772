"""Write a calibration cache from images in tar shards."""

import argparse
import io
import tarfile
from pathlib import Path

import fastcal

DIGITS = Path(__file__).parent.parent / "digits"
PER_SHARD = 100

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=DIGITS / "digits.onnx", type=Path)
parser.add_argument("--shards", help="a folder or pattern; by default the sample's images are packed first")
parser.add_argument("--output", default="digits.cache")
options = parser.parse_args()


def pack(images, folder):
    """Write images and their labels, the names of their folders, to shards; return the shards' pattern."""
    folder.mkdir(exist_ok=True)
    for first in range(0, len(images), PER_SHARD):
        with tarfile.open(folder / f"digits-{first // PER_SHARD:06}.tar", "w") as shard:
            for number, path in enumerate(images[first : first + PER_SHARD], start=first):
                for extension, data in (("cls", path.parent.name.encode()), ("jpg", path.read_bytes())):
                    member = tarfile.TarInfo(f"{number:08}.{extension}")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))
    return f"{folder}/digits-{{000000..{(len(images) - 1) // PER_SHARD:06}}}.tar"


shards = options.shards or pack(sorted((DIGITS / "images").rglob("*.jpg")), Path("shards"))
with fastcal.ImageFeed(shards, model=options.model) as feed:
    cache = fastcal.calibrate(options.model, feed)
cache.save(options.output)
print(f"{options.output}: {len(cache.scales)} scales from {len(feed.paths)} images, {feed.paths[0]} and so on")
