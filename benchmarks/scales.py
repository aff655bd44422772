"""The scales that fastcal picks on a GPU, against those of TensorRT's own calibration of the same batches.

For each model and in one process: TensorRT's builder calibrates it (MinMax, then Entropy2) on four batches of random
numbers, fastcal observes the same, and TensorRT is handed fastcal's cache.

    python benchmarks/scales.py MODEL.onnx ...
"""

import argparse
import logging
import time
from copy import deepcopy
from pathlib import Path

import cupy
import numpy as np
import tensorrt as trt
from int8 import CLASSES, TACTICS, build, make_calibrator

from fastcal.cache import CalibrationCache
from fastcal.model import Model
from fastcal.network import Logger, parse, start_builder
from fastcal.observe.histogram import BINS
from fastcal.observe.scales import divergences, pick_scales
from fastcal.observe.with_tensorrt import TensorRTObserver


class Warnings(logging.Handler):
    """Counts what TensorRT says about missing scales."""

    missing = 0

    def emit(self, record):
        self.missing += "issing scale" in record.getMessage()


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


def compare(path):
    model, logger = Model(path), Logger()
    builder = start_builder(logger)
    batches = [
        {
            value.name: cupy.asarray(np.random.default_rng([99, number]).standard_normal(value.shape, dtype="f4"))
            for value in model.inputs
        }
        for number in range(4)
    ]
    start = time.perf_counter()
    with TensorRTObserver(model, tactic_sources=TACTICS) as observer:
        for batch in batches:
            observer.observe(batch)
        histograms = observer.histograms()
    row = [path.stem, f"{len(histograms)}"]
    ours_took = time.perf_counter() - start
    for algorithm, base in CLASSES.items():
        start = time.perf_counter()
        ours = pick_scales(histograms, algorithm)
        ours |= {name: ours[source] for name, source in observer.sources.items()}
        ours_took += time.perf_counter() - start
        start = time.perf_counter()
        reference = make_calibrator(base, batches, 1)
        build(builder, parse(builder, model, logger), reference)
        theirs_took = time.perf_counter() - start
        theirs = CalibrationCache.from_bytes(reference.cache).scales
        assert theirs.keys() == ours.keys(), theirs.keys() ^ ours.keys()
        off = {name: abs(ours[name] - scale) / (scale or 1) for name, scale in theirs.items()}
        for name in (name for name, share in off.items() if share > 1e-5):
            print(f"{path.stem}, {algorithm}: {name} TensorRT {theirs[name]:.8g}, fastcal {ours[name]:.8g}")
        if algorithm == "minmax":
            row.append(f"{max(off.values()):.1e}")
    differ = [name for name in off if off[name] > 1e-5]
    row.append(f"{len(off) - len(differ)} ({1 - len(differ) / len(off):.1%})")
    row.append(f"{max((excess(histograms[observer.sources.get(n, n)], theirs[n]) for n in differ), default=0):.3%}")
    warnings = Warnings()
    logging.getLogger("fastcal.tensorrt").addHandler(warnings)
    cache = CalibrationCache(ours, "entropy2", trt.__version__)
    handed = make_calibrator(CLASSES["entropy2"], [], 1, cache.to_bytes())
    build(builder, parse(builder, model, logger), handed)
    row += [f"{handed.asked}", f"{warnings.missing}", f"{theirs_took:.1f} s", f"{ours_took:.1f} s"]
    print("| " + " | ".join(row) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    arguments = parser.parse_args()
    print("| network | tensors | MinMax, worst | Entropy2 within 1e-5 | others' divergence, worst | batches asked for "
          "with our cache | missing scales | TensorRT, Entropy2 | fastcal, both |")  # fmt: skip
    print("| --- |" + " ---: |" * 8)
    for path in arguments.models:
        compare(path)


if __name__ == "__main__":
    main()
