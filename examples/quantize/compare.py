"""Print the top-1 accuracy of the digits sample in FP32 and in INT8, with the scales of several algorithms."""

import argparse
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

import fastcal

DIGITS = Path(__file__).parent.parent / "digits"
BATCH = 45  # divides the 450 test images, so that no image is counted twice

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=DIGITS / "digits.onnx", type=Path)
parser.add_argument("--images", default=DIGITS / "images", help="to calibrate with")
parser.add_argument("--test", default=DIGITS / "test", help="to classify, in a folder per class")
parser.add_argument("--algorithms", default=["minmax", "entropy2", "percentile"], nargs="+")
options = parser.parse_args()


def top1(path):
    """Return the share of test images that the model in a file classifies correctly."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with fastcal.ImageFeed(options.test, model=options.model, batch_size=BATCH, device="cpu") as feed:
        scores = np.concatenate([session.run(None, batch)[0] for batch in feed])
        labels = [int(Path(image).parent.name) for image in feed.paths]
    return np.mean(scores.argmax(1) == labels)


print(f"{'FP32':<11}{top1(options.model):.1%}")
for algorithm in options.algorithms:
    with fastcal.ImageFeed(options.images, model=options.model) as feed:
        cache = fastcal.calibrate(options.model, feed, algorithm=algorithm)
    model = fastcal.quantize(options.model, cache)
    output = f"{options.model.stem}.{algorithm}.onnx"
    onnx.save(model, output)
    print(f"{algorithm:<11}{top1(output):.1%}")
