"""Calibrate a SqueezeNet with ONNX Runtime's own entropy calibrater and with fastcal, in turn.

Each run is a process of its own with the same batches of 4 random images, made one at a time. The program measures the
wall-clock time from the first import of the library to the finished scales, and the process's peak memory.

    python benchmarks/against_onnxruntime.py [--images 64 256] [--runs 3]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx

BATCH_SIZE = 4


def batches(images):
    for number in range(images // BATCH_SIZE):
        random = np.random.default_rng([99, number])
        yield {"input": random.standard_normal((BATCH_SIZE, 3, 224, 224), dtype=np.float32)}


def with_onnxruntime(model, images):
    from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = batches(images)

        def get_next(self):
            return next(self.batches, None)

    calibrator = create_calibrator(
        Path(model), None, str(Path(model).with_suffix(".augmented.onnx")), CalibrationMethod.Entropy
    )
    calibrator.collect_data(Reader())
    return len(calibrator.compute_data().data)


def with_fastcal(model, images):
    import fastcal

    return len(fastcal.calibrate(model, batches(images), algorithm="entropy2").scales)


LIBRARIES = {"onnxruntime": with_onnxruntime, "fastcal": with_fastcal}


def work(library, model, images):
    """Calibrate in this process, and print its time and memory."""
    start = time.perf_counter()
    tensors = LIBRARIES[library](model, images)
    seconds = time.perf_counter() - start
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "megabytes": megabytes, "tensors": tensors}))


def measure(library, model, images):
    command = [sys.executable, __file__, "--work", library, model, str(images)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        library, model, images = arguments.work
        work(library, model, int(images))
        return
    from networks import squeezenet

    print("| images | ONNX Runtime | fastcal | ratio | ONNX Runtime's peak | fastcal's peak |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "squeezenet.onnx")
        onnx.save(squeezenet(), model)
        for images in arguments.images:
            runs = [{name: measure(name, model, images) for name in LIBRARIES} for _ in range(arguments.runs)]
            seconds, peak = (
                {name: statistics.median(run[name][what] for run in runs) for name in LIBRARIES}
                for what in ("seconds", "megabytes")
            )
            ratio = statistics.median(run["onnxruntime"]["seconds"] / run["fastcal"]["seconds"] for run in runs)
            print(
                f"| {images} | {seconds['onnxruntime']:.1f} s | {seconds['fastcal']:.1f} s | {ratio:.1f} | "
                f"{peak['onnxruntime']:.0f} MB | {peak['fastcal']:.0f} MB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
