"""Calibrate a SqueezeNet 1.1 in this process, with one Ray worker and with two, in turn, with one thread each.

A rate is the number of images over the time from the first request for a batch to the last count. The program also
prints the time of all of `fastcal.calibrate`, with the start of the workers' processes and their imports; Ray is
running already. The caches must have the same bytes. Rates, times and ratios are medians of several runs; a ratio is
taken within each run.

    python benchmarks/workers.py [--images 512] [--runs 5]
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import onnx
import ray
from networks import squeezenet
from photographs import write_photographs

import fastcal

BATCH_SIZE = 4


def run(model, paths, workers):
    """Calibrate once; return the rate, the seconds in all, and the cache's bytes."""
    feed = fastcal.ImageFeed(paths, model=model, batch_size=BATCH_SIZE, threads=1)
    last = []
    start = time.perf_counter()
    with feed:
        cache = fastcal.calibrate(
            model, feed, backend="onnxruntime", threads=1, workers=workers, progress=lambda state: last.append(state)
        )
    seconds = time.perf_counter() - start
    return last[-1].images / last[-1].seconds, seconds, cache.to_bytes()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    ways = {"in this process": None, "one worker": 1, "two workers": 2}
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "squeezenet.onnx")
        onnx.save(squeezenet(), model)
        # Small files: the feed decodes beside the one thread that runs the network.
        paths = sorted(write_photographs(Path(folder) / "images", arguments.images, (256, 256)).iterdir())
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        run(model, paths[:BATCH_SIZE], None)  # the imports of the first run are not measured
        runs = []
        for number in range(arguments.runs):
            runs.append({way: run(model, paths, workers) for way, workers in ways.items()})
            assert len({cache for _, _, cache in runs[-1].values()}) == 1
            print(f"run {number + 1}, load {os.getloadavg()[0]:.1f}:", *(f"{runs[-1][way][0]:.1f}" for way in ways))
        ray.shutdown()
    rates = [[each[way][0] for way in ways] for each in runs]
    over = statistics.median(alone / one - 1 for alone, one, _ in rates)
    times = statistics.median(two / one for _, one, two in rates)
    print("| | images/s | in all |\n| --- | ---: | ---: |")
    for way in ways:
        rate, seconds = (statistics.median(each[way][what] for each in runs) for what in (0, 1))
        print(f"| {way} | {rate:.1f} | {seconds:.1f} s |")
    print(f"one worker: {over:+.0%} over in-process; two workers: {times:.2f} times one worker's rate")
    print(f"peak memory of the driver: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
