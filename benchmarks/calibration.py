"""Measure the calibration of a ResNet-50-shaped network on a GPU, from JPEG files to the finished cache.

In one process, by turns: the feed alone, the network with its histograms alone, and both together; then the counting
kernel against a copy, and the scales. With `--cold`, `fastcal calibrate` in processes of its own, from the start to the
written cache. With `--peers`, over the same images: TensorRT's own calibration with batches from the same feed,
Polygraphy's Calibrator and ONNX Runtime's calibrater.

    python benchmarks/calibration.py [--photographs FOLDER] [--backends onnxruntime tensorrt] [--cold 512 10000]
        [--peers tensorrt polygraphy onnxruntime]
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cupy
import numpy as np
import onnx
from networks import resnet50
from photographs import write_photographs

import fastcal
from fastcal.algorithm import Algorithm
from fastcal.model import Model
from fastcal.observe.device_histograms import DeviceHistograms
from fastcal.observe.with_cuda import CudaObserver

#: The tactic sources of TensorRT that need neither cuBLAS nor cuDNN.
TACTICS = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")


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
    """Return the images per second of a feed without a consumer, from the second batch on."""
    batches = iter(feed)
    next(batches)
    start, count = time.perf_counter(), sum(1 for _ in batches)
    return count * feed.batch_size / (time.perf_counter() - start)


def observer_of(backend, model, tf32, level):
    if backend == "onnxruntime":
        return CudaObserver(model, tf32=tf32)
    from fastcal.observe.with_tensorrt import TensorRTObserver

    return TensorRTObserver(model, tf32=tf32, optimization_level=level, tactic_sources=TACTICS)


def network_alone(observer, batch):
    """Return the images per second of the network with its histograms, over a batch that lies on the GPU."""
    cupy.cuda.get_current_stream().synchronize()
    start = time.perf_counter()
    for _ in range(40):
        observer.observe(batch)
    cupy.cuda.get_current_stream().synchronize()
    return 40 * len(batch["input"]) / (time.perf_counter() - start)


def together(observer, feed):
    """Return the images per second of a network that is given a feed's batches, from the second batch on."""
    batches = iter(feed)
    observer.observe(next(batches))
    start, count = time.perf_counter(), 0
    for batch in batches:
        observer.observe(batch)
        count += 1
    cupy.cuda.get_current_stream().synchronize()
    return count * feed.batch_size / (time.perf_counter() - start)


def counting(observer, batch):
    """Return the GB/s of the counting kernel over the network's tensors, and of a copy."""
    shown = {}
    for runner in observer._runners:
        shown |= runner.run(batch, cupy.cuda.get_current_stream())
    counter, read = DeviceHistograms(list(shown)), sum(array.nbytes for array in shown.values())
    counter.update_all(shown)
    source = cupy.zeros(1 << 29, np.float32)
    target = cupy.empty_like(source)
    copying = 2 * source.nbytes / milliseconds(lambda: cupy.copyto(target, source)) / 1e6
    return read / milliseconds(lambda: counter.update_all(shown)) / 1e6, copying


def sustained(path, feed, backend, tf32, level, runs):
    """Print the rates of a feed, of a network with its histograms, and of both together: medians of several runs."""
    with observer_of(backend, Model(path), tf32, level) as observer:
        batch = {name: array.copy() for name, array in next(iter(feed)).items()}
        for _ in range(3):
            observer.observe(batch)
        rates = []
        for _ in range(runs):
            rates.append((feed_alone(feed), network_alone(observer, batch), together(observer, feed)))
        feeding, network, both = map(statistics.median, zip(*rates, strict=True))
        used = cupy.cuda.runtime.memGetInfo()
        counted, copied = counting(observer, batch)
        histograms = observer.histograms()
    start = time.perf_counter()
    Algorithm.of("entropy2").pick_all(histograms)
    picking = time.perf_counter() - start
    print(f"{backend}, {'TF32' if tf32 else 'FP32'}, batch {feed.batch_size}, {len(histograms)} tensors, {runs} runs")
    print(f"  feed alone {feeding:.0f} images/s, network and histograms alone {network:.0f} images/s")
    print(f"  together {both:.0f} images/s, {both / min(feeding, network):.0%} of the slower")
    print(f"  counting reads {counted:.0f} GB/s, {counted / copied:.0%} of a copy's {copied:.0f} GB/s")
    print(f"  scales {picking:.2f} s, GPU memory in use {(used[1] - used[0]) / 2**30:.1f} GiB", flush=True)


def cold(path, paths, backend, tf32, batch_size, runs):
    """Print the seconds from the start of a process to the written cache: the median of several processes."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        listed, cache = Path(folder) / "images.txt", Path(folder) / "network.cache"
        listed.write_text("\n".join(paths))
        command = [
            sys.executable, "-m", "fastcal", "calibrate", path, listed, "-o", cache, "--batch-size", str(batch_size),
            "--backend", backend, "--quiet", *(["--tf32"] if tf32 else []),
        ]  # fmt: skip
        if backend == "tensorrt":
            command += ["--tactic-sources", ",".join(TACTICS)]
        for _ in range(runs):
            start = time.time()
            subprocess.run([*map(str, command)], check=True)
            found.append(cache.stat().st_mtime - start)
            cache.unlink()
    precision = "TF32" if tf32 else "FP32"
    rest = ", ".join(f"{seconds:.2f}" for seconds in sorted(found))
    print(f"{backend}, {precision}, {len(paths)} images, cold: {statistics.median(found):.2f} s ({rest})", flush=True)


def inside_builder(path, calibrator, batch_size):
    """Return the seconds of a build in which TensorRT asks the calibrator for batches."""
    import tensorrt as trt
    from int8 import build

    from fastcal.network import parse

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = parse(builder, Model(path), logger)
    network.get_input(0).shape = (batch_size, 3, 224, 224)
    return build(builder, network, calibrator)


def with_tensorrt(path, feed):
    return inside_builder(path, fastcal.EntropyCalibrator2(feed), feed.batch_size)


def with_polygraphy(path, feed):
    import tensorrt as trt
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
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3, help="of the rates in one process; 0 leaves them out")
    parser.add_argument("--backends", nargs="+", default=["onnxruntime"], choices=["onnxruntime", "tensorrt"])
    parser.add_argument("--optimization-level", type=int, default=0, help="of TensorRT")
    parser.add_argument("--precisions", nargs="+", default=["FP32", "TF32"], choices=["FP32", "TF32"])
    parser.add_argument("--hw-decoder-load", type=float, help="see ImageFeed")
    parser.add_argument("--cold", nargs="*", type=int, default=[], metavar="IMAGES")
    parser.add_argument("--cold-runs", type=int, default=5)
    parser.add_argument("--peers", nargs="*", default=[], choices=list(PEERS))
    parser.add_argument("--peer-images", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "resnet50.onnx")
        onnx.save(resnet50(), path)
        files = write_photographs(Path(folder) / "images", arguments.files, (500, 400), arguments.photographs)
        for file in files.iterdir():
            file.read_bytes()  # into memory: storage is not measured
        endless = itertools.cycle(sorted(map(str, files.iterdir())))
        paths = list(itertools.islice(endless, max(arguments.images, *arguments.cold, 1)))

        def feed_of(count, size):
            return fastcal.ImageFeed(
                paths[:count], model=path, batch_size=size, device="cuda", last_batch="drop",
                hw_decoder_load=arguments.hw_decoder_load,
            )  # fmt: skip

        for backend, precision in itertools.product(arguments.backends, arguments.precisions):
            tf32 = precision == "TF32"
            for count in arguments.cold:  # first, while nothing is warm
                cold(path, paths[:count], backend, tf32, arguments.batch_size, arguments.cold_runs)
            if arguments.runs:
                with feed_of(arguments.images, arguments.batch_size) as feed:
                    sustained(path, feed, backend, tf32, arguments.optimization_level, arguments.runs)
        for name in arguments.peers:
            try:
                with feed_of(arguments.peer_images, 8) as feed:
                    took = PEERS[name](path, feed)
            except ImportError as error:
                print(f"without {name}: {error}")
                continue
            print(f"{name}: {arguments.peer_images} images in {took:.1f} s", flush=True)


if __name__ == "__main__":
    main()
