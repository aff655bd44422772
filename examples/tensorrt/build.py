"""Build an INT8 engine with TensorRT's own API, calibrated with a folder of images."""

import argparse
from pathlib import Path

import tensorrt as trt

import fastcal

DIGITS = Path(__file__).parent.parent / "digits"
BATCH = 32

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=DIGITS / "digits.onnx")
parser.add_argument("--images", default=DIGITS / "images")
parser.add_argument("--output", default="digits.engine", type=Path)
parser.add_argument("--tactic-sources", nargs="+", metavar="NAME", help="the sources of TensorRT's kernels")
options = parser.parse_args()

logger = trt.Logger(trt.Logger.WARNING)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
onnx_parser = trt.OnnxParser(network, logger)
if not onnx_parser.parse_from_file(str(options.model)):
    raise SystemExit(f"TensorRT cannot parse {options.model}: {onnx_parser.get_error(0).desc()}")
config = builder.create_builder_config()
config.set_flag(trt.BuilderFlag.INT8)
if options.tactic_sources:
    config.set_tactic_sources(sum(1 << int(getattr(trt.TacticSource, name)) for name in options.tactic_sources))

# The model's batch is dynamic: one profile has the batches of the engine, the other the batches of the calibration.
image = network.get_input(0)
size = tuple(image.shape)[1:]
run, calibrate = builder.create_optimization_profile(), builder.create_optimization_profile()
run.set_shape(image.name, min=(1, *size), opt=(BATCH, *size), max=(64, *size))
calibrate.set_shape(image.name, min=(BATCH, *size), opt=(BATCH, *size), max=(BATCH, *size))
config.add_optimization_profile(run)
config.set_calibration_profile(calibrate)

feed = fastcal.ImageFeed(options.images, preprocess="imagenet", model=options.model, batch_size=BATCH)
calibrator = fastcal.EntropyCalibrator2(feed, cache=options.output.with_suffix(".cache"), model=options.model)
config.int8_calibrator = calibrator
calibrator.check_network(network, config)
with feed, calibrator:  # at its end the calibrator raises an error that TensorRT swallowed
    engine = builder.build_serialized_network(network, config)
if engine is None or trt.Runtime(logger).deserialize_cuda_engine(engine) is None:
    raise SystemExit("TensorRT built no engine that it can load; its messages say why")
options.output.write_bytes(engine)
stats = calibrator.stats
print(f"{options.output}: {engine.nbytes} bytes, calibrated with {stats.batches} batches of {BATCH},", end=" ")
print(f"{stats.waited * 1e3:.1f} ms waited for them")
