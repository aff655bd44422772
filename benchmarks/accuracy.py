"""Accuracy of INT8 on real networks: fastcal's and its peers', on pictures that no calibration has seen.

For every network of `accuracy_networks` and every method of `METHODS`, a process of its own makes the INT8 model from
the calibration samples; its seconds and its peak memory are from the process's start to its end. ONNX Runtime then runs
the model without graph optimizations on the held-out samples, and the answers are compared with FP32's.

    python benchmarks/accuracy.py --folder build/accuracy
    python benchmarks/accuracy.py --evaluate model.int8.onnx --networks yolo

A result is kept in a file of its own in FOLDER/results, and measured once. ModelOpt needs an environment of its own,
whose Python `--modelopt` names: `pip install "nvidia-modelopt[onnx]==0.47.0"`.
"""

import argparse
import json
from pathlib import Path

import accuracy_metrics
import accuracy_networks
import numpy as np


def reference(folder, name, threads):
    """Return the network's held-out samples and its FP32 outputs, which are computed once."""
    with np.load(accuracy_networks.prepare(folder, name) / "heldout.npz") as arrays:
        samples = dict(arrays)
    path = folder / "fp32" / f"{name}.npy"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        runner = accuracy_metrics.session(str(folder / "nets" / name / "model.onnx"), threads)
        outputs = [runner.run(None, batch)[0] for batch in accuracy_metrics.batches(samples)]
        partial = path.with_suffix(".partial.npy")
        np.save(partial, np.concatenate(outputs))
        partial.rename(path)
    return samples, np.load(path, mmap_mode="r")


def evaluate(folder, name, model, threads=2):
    """Return the figures of an ONNX model that stands for a network, on the network's held-out samples."""
    samples, exact = reference(folder, name, threads)
    metric = accuracy_networks.NETWORKS[name].metric
    runner, counts, powers, done = accuracy_metrics.session(str(model), threads), np.zeros(2), {}, 0
    for batch in accuracy_metrics.batches(samples):
        other = runner.run(None, batch)[0].astype(np.float32)
        one = np.asarray(exact[done : done + len(other)])
        done += len(other)
        counts += accuracy_metrics.METRICS[metric](one, other)
        for part, value in accuracy_metrics.parts(metric, one).items():
            noise = (accuracy_metrics.parts(metric, other)[part] - value).astype(np.float64)
            powers[part] = powers.get(part, 0) + np.array([np.sum(value.astype(np.float64) ** 2), np.sum(noise**2)])
    sample = {input: array[:1] for input, array in samples.items()}
    share, share_dense = accuracy_metrics.int8_share(model, sample, threads)
    return {
        "metric": accuracy_metrics.LABELS[metric],
        "agreement": float(counts[0] / counts[1]),
        "sqnr_db": {
            part: float(10 * np.log10(signal / noise)) if noise else None for part, (signal, noise) in powers.items()
        },
        "int8_share": share,
        "int8_share_without_depthwise": share_dense,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("build/accuracy"))
    parser.add_argument("--networks", type=lambda text: text.split(","), default=list(accuracy_networks.NETWORKS))
    parser.add_argument("--evaluate", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    for name in args.networks:
        print(json.dumps(evaluate(args.folder, name, args.evaluate, args.threads)))


if __name__ == "__main__":
    main()
