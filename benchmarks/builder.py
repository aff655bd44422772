"""Measure how long TensorRT's builder waits for a calibrator, for a ResNet-50-shaped network and JPEG files.

In turn: batches that lie on the GPU already (the lower limit of every feed), fastcal's feed, Polygraphy's Calibrator
over a loader in PIL and NumPy, and the usual sample calibrator (PIL, NumPy, one copy to the GPU). TensorRT's own time
for a batch varies from run to run, so the time inside `get_batch` is measured. Each run is a process of its own, like a
build, and ends with the last batch; the rest of the build is not measured.

    python benchmarks/builder.py [--photographs FOLDER] [--batches 16] [--runs 5] [--size 500x400] [--ways ...]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import cupy
import numpy as np
import onnx
import tensorrt as trt
from int8 import CLASSES, build, make_calibrator
from networks import resnet50
from photographs import write_photographs
from PIL import Image

import fastcal
from fastcal.model import Model
from fastcal.network import parse

BATCH_SIZE = 8
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def load(path, side):
    """Return an image as torchvision prepares it."""
    image = Image.open(path).convert("RGB")
    scale = int(side / 0.875) / min(image.size)
    image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)


def pil_batches(paths, side):
    for start in range(0, len(paths), BATCH_SIZE):
        yield np.stack([load(path, side) for path in paths[start : start + BATCH_SIZE]])


def resident(paths, side, base):
    """Return a calibrator over batches that lie on the GPU already."""
    return make_calibrator(base, [{"input": cupy.asarray(batch)} for batch in pil_batches(paths, side)], BATCH_SIZE)


def sample(paths, side, base):
    """Return a calibrator as in samples and tutorials: every batch is copied to the same array."""
    array = cupy.empty((BATCH_SIZE, 3, side, side), cupy.float32)

    def batches():
        for batch in pil_batches(paths, side):
            array.set(batch)
            yield {"input": array}

    return make_calibrator(base, batches(), BATCH_SIZE)


def polygraphy(paths, side, base):
    from polygraphy.backend.trt import Calibrator

    class Loader:
        def __iter__(self):
            return ({"input": batch} for batch in pil_batches(paths, side))

    return Calibrator(Loader(), BaseClass=base)


def with_fastcal(paths, side, base):
    ours = {
        trt.IInt8EntropyCalibrator2: fastcal.EntropyCalibrator2,
        trt.IInt8MinMaxCalibrator: fastcal.MinMaxCalibrator,
    }
    preprocess = replace(fastcal.Preprocess.preset("imagenet"), size=(side, side))
    return ours[base](fastcal.ImageFeed(paths, preprocess=preprocess, batch_size=BATCH_SIZE, device="cuda"))


WAYS = {"resident": resident, "fastcal": with_fastcal, "polygraphy": polygraphy, "sample": sample}


def work(way, path, images, side, algorithm):
    """Build in this process, and print the seconds inside the calls of `get_batch` and those between the calls."""
    calibrator = WAYS[way](sorted(map(str, images.iterdir())), side, CLASSES[algorithm])
    original, inside, between, left = calibrator.get_batch, [], [], None

    def get_batch(names):
        nonlocal left
        entered = time.perf_counter()
        result = original(names)
        if left is not None:
            between.append(entered - left)
        if result is None:
            print(json.dumps({"inside": inside, "between": between}), flush=True)
            os._exit(0)
        left = time.perf_counter()
        inside.append(left - entered)
        return result

    calibrator.get_batch = get_batch
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    build(builder, parse(builder, Model(path), logger), calibrator, (BATCH_SIZE, 3, side, side))


def measure(*arguments):
    """Measure one run, in a process of its own.

    Returns:
        The seconds of the first `get_batch`; the median and the worst of the later ones; their share of the builder's
        time, which is the time between the calls; and the median of the times between the calls.
    """
    command = [sys.executable, __file__, "--work", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    times = json.loads(done.stdout.splitlines()[-1])
    first, *later = times["inside"]
    share = sum(later) / sum(times["between"])
    return first, statistics.median(later), max(later), share, statistics.median(times["between"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", help="a folder of JPEG files to make the images from")
    parser.add_argument("--size", default="500x400", help="width x height of the images")
    parser.add_argument("--side", type=int, default=224, help="the network's input; a smaller one is a faster network")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--algorithm", default="entropy2", choices=list(CLASSES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        way, path, images = arguments.work
        work(way, path, Path(images), arguments.side, arguments.algorithm)
        return
    size = tuple(int(side) for side in arguments.size.split("x"))
    measured = {way: [] for way in arguments.ways}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet50.onnx"
        onnx.save(resnet50(arguments.side), path)
        images = write_photographs(Path(folder) / "images", arguments.batches * BATCH_SIZE, size, arguments.photographs)
        for _ in range(arguments.runs):
            for way in arguments.ways:
                options = ("--side", arguments.side, "--algorithm", arguments.algorithm)
                measured[way].append(measure(way, path, images, *options))
                print(way, [f"{value:.4f}" for value in measured[way][-1]], flush=True)
    print("| | first get_batch | later, median | later, worst | of the time in the builder | builder, per batch |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for way, runs in measured.items():
        first, middle, worst, share, batch = (statistics.median(values) for values in zip(*runs, strict=True))
        milliseconds = f"{first * 1e3:.1f} ms | {middle * 1e3:.2f} ms | {worst * 1e3:.2f} ms"
        print(f"| {way} | {milliseconds} | {share:.2%} | {batch * 1e3:.0f} ms |")


if __name__ == "__main__":
    main()
