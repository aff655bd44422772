"""Measure the feed on a GPU, against DALI alone.

In one process and in turn: (a) DALI's own file reader and `run()`, whose batches stay where they are; (b) `for batch in
feed`; (c) if TensorRT is installed, `get_batch` as TensorRT calls it. JPEG files of 400x500 are decoded, resized,
cropped to 224x224 and normalized, in batches of 64.

    python benchmarks/feed.py [--photographs FOLDER] [--runs 5]
"""

import argparse
import statistics
import tempfile
import time

import numpy as np
from nvidia.dali import Pipeline, fn, types
from photographs import write_photographs

import fastcal


def bare_dali(paths, batch_size, threads, load, depth):
    pipeline = Pipeline(batch_size=batch_size, num_threads=threads, device_id=0, prefetch_queue_depth=depth)
    with pipeline:
        encoded, _ = fn.readers.file(files=paths, name="reader")
        images = fn.decoders.image(
            encoded, device="mixed", output_type=types.RGB, hw_decoder_load=load, jpeg_fancy_upsampling=True
        )
        images = fn.resize(images, resize_shorter=256, interp_type=types.INTERP_LINEAR, antialias=True)
        mean, std = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255
        pipeline.set_outputs(
            fn.crop_mirror_normalize(images, crop=(224, 224), mean=mean.tolist(), std=std.tolist(), dtype=types.FLOAT)
        )
    pipeline.build()
    return pipeline


def rate(batches, batch_size):
    """Return the images per second over all batches but the first."""
    count = 0
    for _ in batches:
        if count == 0:
            start = time.perf_counter()
        count += 1
    return (count - 1) * batch_size / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", help="a folder of JPEG files to make the images from")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--hw-decoder-load", type=float, default=0.9)
    parser.add_argument("--prefetch-queue-depth", type=int, default=4)
    parser.add_argument("--passes", type=int, default=4, help="the number of passes over the images in a run")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    size, load, depth = arguments.batch_size, arguments.hw_decoder_load, arguments.prefetch_queue_depth
    with tempfile.TemporaryDirectory() as folder:
        images = write_photographs(folder, arguments.images, (500, 400), arguments.photographs)
        paths = sorted(str(path) for path in images.iterdir())
        feed = fastcal.ImageFeed(
            paths * arguments.passes, batch_size=size, device="cuda", threads=arguments.threads,
            hw_decoder_load=load, prefetch_queue_depth=depth,
        )  # fmt: skip
        bare = bare_dali(paths, size, arguments.threads, load, depth)
        ways = {
            "DALI alone": lambda: (bare.run() for _ in range(len(feed))),
            "for batch in feed": lambda: iter(feed),
        }
        try:
            calibrator = fastcal.EntropyCalibrator2(feed)
            ways["get_batch"] = lambda: iter(lambda: calibrator.get_batch(["input"]), None)
        except fastcal.FastcalError as error:
            print(f"without get_batch: {error}")
        rates = {name: [] for name in ways}
        for run in range(arguments.runs + 1):
            for name, batches in ways.items():
                measured = rate(batches(), size)
                if run:  # the first run warms up
                    rates[name].append(measured)
    alone = rates["DALI alone"]
    print("| | images/s | of DALI alone |")
    print("| --- | ---: | ---: |")
    for name, values in rates.items():
        share = statistics.median(value / peer for value, peer in zip(values, alone, strict=True))
        print(f"| {name} | {statistics.median(values):.0f} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
