"""Build an INT8 engine with Polygraphy, calibrated with a folder of images."""

import argparse
from pathlib import Path

import tensorrt as trt
from polygraphy.backend.trt import (
    Profile,
    create_config,
    engine_bytes_from_network,
    engine_from_bytes,
    network_from_onnx_path,
)

import fastcal

DIGITS = Path(__file__).parent.parent / "digits"
BATCH = 32

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=DIGITS / "digits.onnx")
parser.add_argument("--images", default=DIGITS / "images")
parser.add_argument("--output", default="digits.engine", type=Path)
parser.add_argument("--tactic-sources", nargs="+", metavar="NAME", help="the sources of TensorRT's kernels")
options = parser.parse_args()

feed = fastcal.ImageFeed(options.images, preprocess="imagenet", model=options.model, batch_size=BATCH)
calibrator = fastcal.EntropyCalibrator2(feed, cache=options.output.with_suffix(".cache"), model=options.model)

builder, network, onnx_parser = network_from_onnx_path(str(options.model))
image = network.get_input(0)
size = tuple(image.shape)[1:]
# TensorRT calibrates with the last profile's `opt` shape, so that is the shape of the feed's batches.
profile = Profile().add(image.name, min=(1, *size), opt=(BATCH, *size), max=(64, *size))
config = create_config(
    builder,
    network,
    int8=True,
    profiles=[profile],
    calibrator=calibrator,
    tactic_sources=options.tactic_sources and [getattr(trt.TacticSource, name) for name in options.tactic_sources],
)
calibrator.check_network(network, config)
with feed, calibrator:  # at its end the calibrator raises an error that TensorRT swallowed
    engine = bytes(engine_bytes_from_network((builder, network, onnx_parser), config))
engine_from_bytes(engine)  # raises if it cannot be loaded
options.output.write_bytes(engine)
stats = calibrator.stats
print(f"{options.output}: {len(engine)} bytes, calibrated with {stats.batches} batches of {BATCH},", end=" ")
print(f"{stats.waited * 1e3:.1f} ms waited for them")
