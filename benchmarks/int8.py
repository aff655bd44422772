"""INT8 builds that TensorRT calibrates, and a minimal calibrator, for the benchmarks."""

import time

import tensorrt as trt

from fastcal.network import tactic_bits

#: The tactic sources that need neither cuBLAS nor cuDNN.
TACTICS = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")

#: TensorRT's calibrator classes, by algorithm.
CLASSES = {"minmax": trt.IInt8MinMaxCalibrator, "entropy2": trt.IInt8EntropyCalibrator2}


def make_calibrator(base, batches, batch_size, ready=None):
    """Return one of TensorRT's calibrators.

    Its `asked` counts the batches that TensorRT asks for, and its `cache` is the cache that TensorRT writes.

    Args:
        base: The calibrator class.
        batches: Dicts by input name of arrays on the GPU.
        batch_size: The number of samples in a batch.
        ready: A finished cache to give to TensorRT.
    """

    class Calibrator(base):
        def __init__(self):
            base.__init__(self)
            self.left, self.held, self.asked, self.cache = iter(batches), None, 0, None

        def get_batch_size(self):
            return batch_size

        def get_batch(self, names):
            self.asked += 1
            self.held = next(self.left, None)
            return None if self.held is None else [self.held[name].data.ptr for name in names]

        def read_calibration_cache(self):
            return ready

        def write_calibration_cache(self, cache):
            self.cache = bytes(cache)

    return Calibrator()


def build(builder, network, calibrator, shape=None):
    """Build an engine, discard it, and return the seconds that TensorRT took.

    The caller keeps the builder's logger until then. If the batch is dynamic, `shape` is the shape of the network's
    input, named "input".
    """
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.INT8)
    config.builder_optimization_level = 0
    config.set_tactic_sources(tactic_bits(TACTICS))
    if shape is not None:
        profile = builder.create_optimization_profile()
        profile.set_shape("input", shape, shape, shape)
        config.add_optimization_profile(profile)
        config.set_calibration_profile(profile)
    config.int8_calibrator = calibrator
    start = time.perf_counter()
    assert builder.build_serialized_network(network, config) is not None
    return time.perf_counter() - start
