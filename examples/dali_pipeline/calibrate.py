"""Write a calibration cache from a DALI pipeline."""

import argparse
from pathlib import Path

from nvidia.dali import fn, pipeline_def, types

import fastcal

DIGITS = Path(__file__).parent.parent / "digits"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--output", default="digits.cache")
parser.add_argument("--gpu", type=int, help="the number of the GPU to decode on; by default the CPU decodes")
options = parser.parse_args()


@pipeline_def(batch_size=32, num_threads=4, device_id=options.gpu)
def digits():
    """Return images of digits, prepared as in training, and their labels."""
    encoded, labels = fn.readers.file(file_root=str(DIGITS / "images"))
    images = fn.decoders.image(encoded, device="cpu" if options.gpu is None else "mixed")
    images = fn.resize(images, size=(36, 36), antialias=True)
    images = fn.crop_mirror_normalize(
        images,
        crop=(32, 32),
        dtype=types.FLOAT,
        mean=[255 * mean for mean in (0.485, 0.456, 0.406)],
        std=[255 * std for std in (0.229, 0.224, 0.225)],
    )
    return images, labels


# The model has one input, so the labels are left out. From the function, the feed makes a new pipeline for every pass.
with fastcal.ArrayFeed(digits, names=["image"]) as feed:
    cache = fastcal.calibrate(DIGITS / "digits.onnx", feed)
cache.save(options.output)
print(f"{options.output}: {len(cache.scales)} scales from {len(feed)} batches of {feed.batch_size}")
