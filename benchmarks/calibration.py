"""Measure the calibration of a ResNet-50-shaped network on a GPU, from JPEG files to the finished cache.

In one process: the feed alone, the network with its histograms alone, both together (`fastcal.calibrate`), the counting
kernel against a copy, and the scales. Then the peers over the same images, if they are installed: TensorRT's own
calibration with batches from the same feed, Polygraphy's Calibrator and ONNX Runtime's calibrater.

    python benchmarks/calibration.py [--photographs FOLDER] [--images 10000] [--peers tensorrt polygraphy onnxruntime]
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import cupy
import numpy as np
import onnx
import tensorrt as trt
from int8 import TACTICS, build
from networks import resnet50
from photographs import write_photographs

import fastcal
from fastcal.algorithm import Algorithm
from fastcal.model import Model
from fastcal.network import parse
from fastcal.observe.device_histograms import DeviceHistograms
from fastcal.observe.with_tensorrt import TensorRTObserver


def milliseconds(work, runs=20):
    """Return the median time of work that is enqueued on CuPy's current stream."""
    stream = cupy.cuda.get_current_stream()
    first, last, found = cupy.cuda.Event(), cupy.cuda.Event(), []
    for run in range(runs + 3):
        first.record(stream)
        work()
        last.record(stream)
        last.synchronize()
        if run >= 3:
            found.append(cupy.cuda.get_elapsed_time(first, last))
    return statistics.median(found)


def feed_alone(feed):
    count = 0
    for _ in feed:
        if count == 0:
            start = time.perf_counter()
        count += 1
    return (count - 1) * feed.batch_size / (time.perf_counter() - start)


def network_alone(model, batch, tf32, level):
    """Measure the network with its histograms over a batch that lies on the GPU.

    Returns:
        Images per second; the number of tensors; GB/s of the counting kernel over these tensors, and of a copy; and the
        seconds of picking the scales.
    """
    size = len(batch["input"])
    with TensorRTObserver(model, tf32=tf32, optimization_level=level, tactic_sources=TACTICS) as observer:
        observer.observe(batch)
        start = time.perf_counter()
        for _ in range(40):
            observer.observe(batch)
        cupy.cuda.get_current_stream().synchronize()
        rate = 40 * size / (time.perf_counter() - start)
        histograms = observer.histograms()
        (engine,) = observer._engines
        shown = engine.run(batch, cupy.cuda.get_current_stream())
        counter, read = DeviceHistograms(list(shown)), sum(array.nbytes for array in shown.values())
        counter.update_all(shown)
        counting = read / milliseconds(lambda: counter.update_all(shown)) / 1e6
        source = cupy.zeros(1 << 29, np.float32)
        target = cupy.empty_like(source)
        copying = 2 * source.nbytes / milliseconds(lambda: cupy.copyto(target, source)) / 1e6
    start = time.perf_counter()
    Algorithm.of("entropy2").pick_all(histograms)
    picking = time.perf_counter() - start
    return rate, len(histograms), counting, copying, picking


def whole(path, feed, tf32, level):
    """Return the seconds from the start to the cache, and the images per second from the second batch on."""
    times = []
    start = time.perf_counter()
    cache = fastcal.calibrate(
        path, feed, backend="tensorrt", tf32=tf32, optimization_level=level, tactic_sources=TACTICS,
        progress=lambda _: times.append(time.perf_counter()),
    )  # fmt: skip
    assert len(cache.scales) > 100
    took = time.perf_counter() - start
    return took, (len(times) - 1) * feed.batch_size / (times[-1] - times[0])


def inside_builder(path, calibrator, batch_size):
    """Return the seconds of a build in which TensorRT asks the calibrator for batches."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = parse(builder, Model(path), logger)
    network.get_input(0).shape = (batch_size, 3, 224, 224)
    return build(builder, network, calibrator)


def with_tensorrt(path, feed):
    return inside_builder(path, fastcal.EntropyCalibrator2(feed), feed.batch_size)


def with_polygraphy(path, feed):
    from polygraphy.backend.trt import Calibrator

    batches = [{"input": batch["input"].get()} for batch in feed]
    return inside_builder(path, Calibrator(batches, BaseClass=trt.IInt8EntropyCalibrator2), feed.batch_size)


def with_onnxruntime(path, feed):
    from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(feed)

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"input": batch["input"].get()}

    start = time.perf_counter()
    calibrator = create_calibrator(Path(path), None, f"{path}.augmented.onnx", CalibrationMethod.Entropy)
    calibrator.collect_data(Reader())
    calibrator.compute_data()
    return time.perf_counter() - start


PEERS = {"tensorrt": with_tensorrt, "polygraphy": with_polygraphy, "onnxruntime": with_onnxruntime}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", help="a folder of JPEG files to make the images from")
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--files", type=int, default=2000, help="the number of different files")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--optimization-levels", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--precisions", nargs="+", default=["FP32", "TF32"], choices=["FP32", "TF32"])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--peer-images", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "resnet50.onnx")
        onnx.save(resnet50(), path)
        files = write_photographs(Path(folder) / "images", arguments.files, (500, 400), arguments.photographs)
        for file in files.iterdir():
            file.read_bytes()  # into memory: storage is not measured
        paths = list(itertools.islice(itertools.cycle(sorted(map(str, files.iterdir()))), arguments.images))

        def feed_of(paths, size):
            return fastcal.ImageFeed(paths, model=path, batch_size=size, device="cuda", last_batch="drop")

        for precision, level in itertools.product(arguments.precisions, arguments.optimization_levels):
            tf32 = precision == "TF32"
            feed = feed_of(paths, arguments.batch_size)
            took, together = whole(path, feed, tf32, level)  # first, while nothing is warm
            alone = feed_alone(feed)
            batch = {name: array.copy() for name, array in next(iter(feed)).items()}
            feed.close()
            network, tensors, counting, copying, picking = network_alone(Model(path), batch, tf32, level)
            print(f"{precision}, level {level}, {tensors} tensors, batch {arguments.batch_size}")
            print(f"  feed alone {alone:.0f} images/s, network and histograms alone {network:.0f} images/s")
            print(f"  together {together:.0f} images/s, {together / min(alone, network):.0%} of the slower")
            print(f"  {len(paths)} images from the start to the cache: {took:.1f} s")
            print(f"  counting reads {counting:.0f} GB/s, {counting / copying:.0%} of a copy's {copying:.0f} GB/s")
            print(f"  scales {picking:.2f} s", flush=True)
        for name in arguments.peers:
            try:
                with feed_of(paths[: arguments.peer_images], 8) as feed:
                    took = PEERS[name](path, feed)
            except ImportError as error:
                print(f"without {name}: {error}")
                continue
            print(f"{name}: {arguments.peer_images} images in {took:.1f} s", flush=True)


if __name__ == "__main__":
    main()
