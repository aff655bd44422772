"""Compare the scales that fastcal picks on a GPU with those of TensorRT's own calibration of the same batches.

For each model, TensorRT calibrates twice with MinMax and twice with Entropy2, each time in a process of its own, on
batches of random numbers. fastcal observes the same batches, and TensorRT then reads fastcal's cache. TensorRT picks
the kernels of its calibration by timing them, so the difference of its own two runs is the limit of any comparison.

    python benchmarks/scales.py MODEL.onnx ... [--batches 8] [--with-tensorrt]
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
from copy import deepcopy
from pathlib import Path

import cupy
import numpy as np
import tensorrt as trt
from int8 import CLASSES, TACTICS, build, make_calibrator

import fastcal
from fastcal.algorithm import Algorithm
from fastcal.cache.cache import CalibrationCache
from fastcal.definition import Definition
from fastcal.model import Model
from fastcal.network import Logger, parse, start_builder
from fastcal.observe.backends import OnnxRuntimeBackend
from fastcal.observe.histogram import BINS
from fastcal.observe.parsed import Parsed, ParsedBackend
from fastcal.observe.with_tensorrt import TensorRTObserver
from fastcal.thresholds import divergences


class Warnings(logging.Handler):
    """A counter of TensorRT's messages about missing scales."""

    missing = 0

    def emit(self, record):
        self.missing += "issing scale" in record.getMessage()


def random_batches(model, count):
    for number in range(count):
        random = np.random.default_rng([99, number])
        yield {value.name: cupy.asarray(random.standard_normal(value.shape, dtype="f4")) for value in model.inputs}


def work(path, algorithm, count, target):
    """Calibrate with TensorRT; the process ends when the cache is written, before an engine is built."""

    def finish(cache):
        Path(target).write_bytes(bytes(cache))
        os._exit(0)

    model, logger = Model(path), Logger()
    calibrator = make_calibrator(CLASSES[algorithm], list(random_batches(model, count)), 1)
    calibrator.write_calibration_cache = finish
    builder = start_builder(logger)
    build(builder, parse(builder, model, logger), calibrator)


def calibrate_with_tensorrt(path, count, folder):
    """Return the scales of two runs of each algorithm, by the algorithm's name."""
    targets = {algorithm: [Path(folder) / f"{algorithm}.{run}" for run in range(2)] for algorithm in CLASSES}
    processes = [
        subprocess.Popen([sys.executable, __file__, "--work", path, algorithm, str(count), target])
        for algorithm, files in targets.items()
        for target in files
    ]
    for process in processes:
        assert process.wait() == 0
    return {algorithm: [CalibrationCache.load(file).scales for file in files] for algorithm, files in targets.items()}


def distances(scales, reference):
    """Return the relative difference to each scale of `reference`, by tensor name."""
    assert scales.keys() == reference.keys(), scales.keys() ^ reference.keys()
    return {name: abs(scales[name] - scale) / (scale or 1) for name, scale in reference.items()}


def excess(histogram, scale):
    """Return the divergence of a scale less the smallest divergence, as a share of the smallest."""
    bins = round(scale * 127 / histogram.width - 0.5)
    if bins > BINS:  # in TensorRT's run, a later batch exceeded the first and the range doubled
        histogram = deepcopy(histogram)
        histogram.widen(histogram.range * (1 + 1e-6))
        bins = round(scale * 127 / histogram.width - 0.5)
    found = divergences(histogram.counts[None])[0]
    if not 128 <= bins <= BINS or not found.min() > 0:
        return float("inf")
    return found[bins - 128] / found.min() - 1


def observe_with_tensorrt(model, count):
    with TensorRTObserver(model, tactic_sources=TACTICS) as observer:
        for batch in random_batches(model, count):
            observer.observe(batch)
        return observer.histograms(), observer.shared_scales


def observe_with_onnxruntime(model, count):
    """Observe what TensorRT's parser makes of a model, on the GPU if ONNX Runtime has the CUDA provider."""
    logger = Logger()
    builder = start_builder(logger)
    definition = Definition(parse(builder, model, logger))
    backend = ParsedBackend(Parsed(definition, model), OnnxRuntimeBackend())
    with fastcal.ArrayFeed(list(random_batches(model, count)), model.input_names) as feed:
        observed = backend.observe(definition, feed, lambda state: None)
    return observed.histograms, observed.shared_scales


def compare(path, count, with_tensorrt):
    with tempfile.TemporaryDirectory() as folder:
        theirs = calibrate_with_tensorrt(path, count, folder)
    model, logger = Model(path), Logger()
    histograms, shared = (observe_with_tensorrt if with_tensorrt else observe_with_onnxruntime)(model, count)

    def pick(algorithm):
        scales = Algorithm.of(algorithm).pick_all(histograms)
        return scales | {name: scales[source] for name, source in shared.items()}

    first, second = theirs["minmax"]
    row = [path.stem, len(first), f"{max(distances(pick('minmax'), first).values()):.1e}",
           f"{max(distances(second, first).values()):.1e}"]  # fmt: skip
    first, second = theirs["entropy2"]
    ours = pick("entropy2")
    differ, differ_too = (
        [name for name, share in distances(scales, first).items() if share > 1e-5] for scales in (ours, second)
    )
    for name in differ:
        print(f"{path.stem}: {name} TensorRT {first[name]:.8g} and {second[name]:.8g}, fastcal {ours[name]:.8g}")
    row += [f"{len(ours) - len(some)} ({1 - len(some) / len(ours):.1%})" for some in (differ, differ_too)]
    row.append(f"{max((excess(histograms[shared.get(n, n)], first[n]) for n in differ), default=0):.3%}")
    warnings = Warnings()
    logging.getLogger("fastcal.tensorrt").addHandler(warnings)
    builder = start_builder(logger)
    cache = CalibrationCache(ours, "entropy2", trt.__version__)
    handed = make_calibrator(CLASSES["entropy2"], [], 1, cache.to_bytes())
    build(builder, parse(builder, model, logger), handed)
    row += [handed.asked, warnings.missing]
    print("| " + " | ".join(map(str, row)) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--with-tensorrt", action="store_true", help="observe with TensorRT instead of ONNX Runtime")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        path, algorithm, count, target = arguments.work
        work(path, algorithm, int(count), target)
        return
    print("| network | tensors | MinMax, worst | TensorRT again | Entropy2 within 1e-5 | TensorRT again | others' "
          "divergence, worst | batches asked for with our cache | missing scales |")  # fmt: skip
    print("| --- |" + " ---: |" * 8)
    for path in arguments.models:
        compare(path, arguments.batches, arguments.with_tensorrt)


if __name__ == "__main__":
    main()
