"""Measure the peak memory and the time of a calibration on the CPU, whole and in segments of several sizes.

The network has convolutions and residuals with 6.3 GiB of tensors per batch of 8. Each size runs in a process of its
own, on batches of random numbers.

    python benchmarks/memory.py [--sizes 1T 4G 2G 500M] [--batches 4]
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx

import fastcal
from fastcal.cli.options import read_memory

#: The images in a batch, the channels and the size of the tensors, and the number of blocks.
IMAGES, CHANNELS, SIDE, BLOCKS = 8, 32, 512, 8


def write_network(path):
    """A convolution, then blocks of a convolution, a ReLU and a residual."""
    random = np.random.default_rng(0)
    lines, shapes = ["t0 = Conv<pads = [1, 1, 1, 1]>(x, w)"], {"w": (CHANNELS, 3, 3, 3)}
    for block in range(BLOCKS):
        shapes[f"w{block}"] = (CHANNELS, CHANNELS, 3, 3)
        lines += [
            f"c{block} = Conv<pads = [1, 1, 1, 1]>(t{block}, w{block})",
            f"r{block} = Relu(c{block})",
            f"t{block + 1} = Add(r{block}, t{block})",
        ]
    lines.append(f"y = GlobalAveragePool(t{BLOCKS})")
    graph = f"f (float[N, 3, {SIDE}, {SIDE}] x) => (float[N, {CHANNELS}, 1, 1] y) {{ {' '.join(lines)} }}"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {graph}')
    for name, shape in shapes.items():
        weights = random.normal(size=shape).astype("f4") / np.sqrt(np.prod(shape[1:], dtype="f4"))
        model.graph.initializer.append(onnx.numpy_helper.from_array(weights, name))
    onnx.save(model, path)


def measure(path, size, count):
    """Calibrate in this process; print the peak memory and the time."""
    random = np.random.default_rng(1)
    batches = [random.standard_normal((IMAGES, 3, SIDE, SIDE), dtype="f4") for _ in range(count)]
    start = time.perf_counter()
    fastcal.calibrate(path, batches, backend="onnxruntime", memory=read_memory(size))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"--memory {size}: {peak:.2f} GiB at most, {seconds:.1f} s for {count} batches", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1T", "4G", "2G", "500M"])
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.path is not None:
        measure(arguments.path, arguments.sizes[0], arguments.batches)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        write_network(path)
        for size in arguments.sizes:
            command = [sys.executable, __file__, "--path", path, "--sizes", size, "--batches", str(arguments.batches)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
