"""Export a YOLO of Ultralytics' to ONNX, and write its calibration cache: the model names its preprocessing itself."""

import argparse
from pathlib import Path

from ultralytics import YOLO

import fastcal

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--weights", default="yolo11n.pt")
parser.add_argument("--images", default=Path(__file__).parent.parent / "digits" / "images")
parser.add_argument("--size", default=640, type=int)
parser.add_argument("--limit", default=512, type=int, help="the number of images")
parser.add_argument(
    "--tensorrt", help="the version that will read the cache; by default the one installed, else 10.16.1"
)
parser.add_argument("--dla", action="store_true", help="make the cache fit NVIDIA's DLA")
options = parser.parse_args()

# A fixed batch of 1, as the DLA and most cameras want it.
model = Path(YOLO(options.weights).export(format="onnx", imgsz=options.size))
with fastcal.ImageFeed(options.images, model=model, limit=options.limit) as feed:
    print(f"images are prepared as {feed.preprocess}")
    target = "dla" if options.dla else None
    cache = fastcal.calibrate(model, feed, tensorrt_version=options.tensorrt, target=target)
cache.save(model.with_suffix(".cache"))
print(f"{model.with_suffix('.cache')}: {len(cache.scales)} tensors, {cache.header}")
