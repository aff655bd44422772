"""Calibrate in this process and with Ray workers, in turn: a SqueezeNet 1.1 with one thread each, on the CPU.

With `--gpus 1 2 4`, a ResNet-50-shaped network with so many workers, a GPU and the same share of the cores each.

A rate is the number of images over the time from the first request for a batch to the last count. The program also
prints the time of all of `fastcal.calibrate`, with the start of the workers' processes and their imports; Ray is
running already. The caches must have the same bytes. Rates, times and ratios are medians of several runs; a ratio is
taken within each run.

    python benchmarks/workers.py [--images 512] [--runs 5] [--gpus 1 2 4 --images 100000 --photographs FOLDER]
"""

import argparse
import itertools
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import onnx
import ray
from networks import resnet50, squeezenet
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


def on_gpus(arguments):
    """Print the rates of this process with one GPU, and of workers with one each; the caches must be equal."""
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "resnet50.onnx")
        onnx.save(resnet50(), model)
        files = write_photographs(Path(folder) / "images", 2000, (500, 400), arguments.photographs)
        paths = list(itertools.islice(itertools.cycle(sorted(map(str, files.iterdir()))), arguments.images))
        cores = len(os.sched_getaffinity(0)) // max(arguments.gpus)
        ray.init(
            address="local", num_cpus=cores * max(arguments.gpus), num_gpus=max(arguments.gpus),
            include_dashboard=False, log_to_driver=False,
        )  # fmt: skip
        runs = []
        for number in range(arguments.runs):
            runs.append({})
            for workers in (None, *arguments.gpus):
                feed = fastcal.ImageFeed(paths, model=model, batch_size=128, threads=cores, last_batch="drop")
                states = []
                start = time.perf_counter()
                with feed:
                    cache = fastcal.calibrate(
                        model, feed, tf32=arguments.tf32, workers=workers, threads=cores,
                        progress=lambda state: states.append((state.images, state.seconds)),  # noqa: B023
                    )  # fmt: skip
                seconds = time.perf_counter() - start
                (first, begun), (last, ended) = states[0], states[-1]
                runs[-1][workers] = (last - first) / (ended - begun), seconds, cache.to_bytes()
            assert len({cache for _, _, cache in runs[-1].values()}) == 1
            print(f"run {number + 1}:", *(f"{rate:.0f}" for rate, _, _ in runs[-1].values()), flush=True)
        ray.shutdown()
    alone = statistics.median(each[None][0] for each in runs)
    for workers in (None, *arguments.gpus):
        rate, seconds = (statistics.median(each[workers][what] for each in runs) for what in (0, 1))
        name = "in this process" if workers is None else f"{workers} workers"
        print(f"| {name} | {rate:.0f} | {rate / alone:.2f} | {seconds:.1f} s |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--gpus", nargs="+", type=int, metavar="WORKERS")
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--photographs", help="a folder of JPEG files to make the images from")
    arguments = parser.parse_args()
    if arguments.gpus:
        on_gpus(arguments)
        return
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
