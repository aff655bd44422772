"""Write a calibration cache for a network with two image inputs."""

import argparse
from pathlib import Path

import onnx

import fastcal

DIGITS = Path(__file__).parent.parent / "digits"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pairs.onnx", help="where to write the network that compares two digits")
parser.add_argument("--output", default="pairs.cache")
options = parser.parse_args()


def siamese(path):
    """Return a network of a classifier twice, whose output is the difference of its scores for two images."""
    left = onnx.compose.add_prefix(onnx.load(path), "left_")
    right = onnx.compose.add_prefix(onnx.load(path), "right_")
    pair = onnx.compose.merge_models(left, right, io_map=[])
    scores = [output.name for output in pair.graph.output]
    pair.graph.node.append(onnx.helper.make_node("Sub", scores, ["difference"]))
    shape = onnx.helper.make_tensor_value_info("difference", onnx.TensorProto.FLOAT, None)
    pair.graph.output.append(shape)
    return pair


onnx.save(siamese(DIGITS / "digits.onnx"), options.model)
left = sorted((DIGITS / "images").rglob("*.jpg"))
right = left[1:] + left[:1]
with fastcal.ImageFeed({"left_image": left, "right_image": right}, model=options.model) as feed:
    cache = fastcal.calibrate(options.model, feed)
cache.save(options.output)
apart = cache.scales["difference"] * 127
print(f"{options.output}: {len(cache.scales)} scales from {len(feed.paths)} pairs; scores are up to {apart:.1f} apart")
