"""The scales that fastcal picks on a GPU, against those of TensorRT's own calibration of the same batches.

For each model: TensorRT calibrates it twice, MinMax and Entropy2, each in a process of its own, on batches of random
numbers; fastcal observes the same; and TensorRT is handed fastcal's cache. TensorRT picks the kernels that it
calibrates with by timing them, so what differs between its own two runs says how near another can come.

    python benchmarks/scales.py MODEL.onnx ... [--batches 8]
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

from fastcal.algorithm import Algorithm, divergences
from fastcal.cache.cache import CalibrationCache
from fastcal.model import Model
from fastcal.network import Logger, parse, start_builder
from fastcal.observe.histogram import BINS
from fastcal.observe.with_tensorrt import TensorRTObserver


class Warnings(logging.Handler):
    """Counts what TensorRT says about missing scales."""

    missing = 0

    def emit(self, record):
        self.missing += "issing scale" in record.getMessage()


def random_batches(model, count):
    for number in range(count):
        random = np.random.default_rng([99, number])
        yield {value.name: cupy.asarray(random.standard_normal(value.shape, dtype="f4")) for value in model.inputs}


def work(path, algorithm, count, target):
    """What a process of TensorRT's does: it ends when the cache is written, before an engine is built."""

    def finish(cache):
        Path(target).write_bytes(bytes(cache))
        os._exit(0)

    model, logger = Model(path), Logger()
    calibrator = make_calibrator(CLASSES[algorithm], list(random_batches(model, count)), 1)
    calibrator.write_calibration_cache = finish
    builder = start_builder(logger)
    build(builder, parse(builder, model, logger), calibrator)


def calibrate_with_tensorrt(path, count, folder):
    """The scales of two runs for each algorithm, by its name."""
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
    """By how much of itself each scale of `reference` is missed."""
    assert scales.keys() == reference.keys(), scales.keys() ^ reference.keys()
    return {name: abs(scales[name] - scale) / (scale or 1) for name, scale in reference.items()}


def excess(histogram, scale):
    """By how much more than the smallest divergence that of a scale is, as a share of the smallest."""
    bins = round(scale * 127 / histogram.width - 0.5)
    if bins > BINS:  # a later batch exceeded the first in TensorRT's run, and its range doubled
        histogram = deepcopy(histogram)
        histogram.widen(histogram.range * (1 + 1e-6))
        bins = round(scale * 127 / histogram.width - 0.5)
    found = divergences(histogram.counts[None])[0]
    if not 128 <= bins <= BINS or not found.min() > 0:
        return float("inf")
    return found[bins - 128] / found.min() - 1


def compare(path, count):
    with tempfile.TemporaryDirectory() as folder:
        theirs = calibrate_with_tensorrt(path, count, folder)
    model, logger = Model(path), Logger()
    with TensorRTObserver(model, tactic_sources=TACTICS) as observer:
        for batch in random_batches(model, count):
            observer.observe(batch)
        histograms, sources = observer.histograms(), observer.sources

    def pick(algorithm):
        scales = Algorithm.of(algorithm).pick_all(histograms)
        return scales | {name: scales[source] for name, source in sources.items()}

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
    row.append(f"{max((excess(histograms[sources.get(n, n)], first[n]) for n in differ), default=0):.3%}")
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
        compare(path, arguments.batches)


if __name__ == "__main__":
    main()
