"""Classify images in INT8 with ONNX Runtime's TensorRT provider, with a calibration cache in place of a calibration."""

import argparse
from pathlib import Path

import onnxruntime

import fastcal

DIGITS = Path(__file__).parent.parent / "digits"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=DIGITS / "digits.onnx")
parser.add_argument("--images", default=DIGITS / "images", help="images to calibrate with")
parser.add_argument("--test", default=DIGITS / "test", help="images to classify: a folder for each class, in order")
parser.add_argument("--cache", default=Path("digits.cache"), type=Path)
parser.add_argument("--tensorrt", help="the version that ONNX Runtime uses; by default the one installed, else 10.16.1")
options = parser.parse_args()

with fastcal.ImageFeed(options.images, model=options.model, device="cpu") as feed:
    fastcal.calibrate(options.model, feed, tensorrt_version=options.tensorrt, cache=options.cache)

providers = [
    (
        "TensorrtExecutionProvider",
        {
            "trt_int8_enable": True,
            "trt_fp16_enable": True,
            "trt_int8_use_native_calibration_table": True,
            "trt_int8_calibration_table_name": options.cache.name,
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(options.cache.parent),  # the folder of the cache, too
        },
    ),
    "CPUExecutionProvider",
]
available = onnxruntime.get_available_providers()
used = [each for each in providers if (each if isinstance(each, str) else each[0]) in available]
session = onnxruntime.InferenceSession(str(options.model), providers=used)

right = total = 0
classes = sorted(path.name for path in Path(options.test).iterdir())
with fastcal.ImageFeed(options.test, model=options.model, device="cpu", last_batch="keep") as feed:
    names = iter(feed.paths)
    for batch in feed:
        for scores in session.run(None, batch)[0]:
            right += classes[scores.argmax()] == Path(next(names)).parent.name
            total += 1
print(f"{right} of {total} images classified correctly by {session.get_providers()[0]}")
