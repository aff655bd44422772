"""Accuracy of INT8 on real networks: fastcal's and its peers', on pictures that no calibration has seen.

For every network of `accuracy_networks` and every method of `METHODS`, a process of its own makes the INT8 model from
the calibration samples; seconds, CPU seconds and peak memory are the whole process's. ONNX Runtime then runs the model
without graph optimizations on the held-out samples, and the answers are compared with FP32's.

    python benchmarks/accuracy.py --folder build/accuracy
    python benchmarks/accuracy.py --evaluate model.int8.onnx --networks yolo

A result is kept in a file of its own in FOLDER/results, and measured once. ModelOpt needs an environment of its own,
whose Python `--modelopt` names: `pip install "nvidia-modelopt[onnx]==0.47.0"`.
"""

import argparse
import json
import sys
from pathlib import Path

import accuracy_methods
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


def result(args, name, method):
    """Return the figures of a method on a network, from the file that keeps them or measured now."""
    network, kept = accuracy_networks.prepare(args.folder, name), args.folder / "results" / f"{name}.{method}.json"
    output = network / "model.onnx" if method == "fp32" else args.folder / "models" / f"{name}.{method}.onnx"
    for made in ("results", "models"):
        (args.folder / made).mkdir(exist_ok=True)
    figures = json.loads(kept.read_text()) if kept.exists() else {"network": name, "method": method}
    if not kept.exists():
        try:
            if method != "fp32":
                files = network / "model.onnx", network / "calib.npz", output
                figures |= accuracy_methods.measure(method, *files, args.modelopt, args.memory << 30)
            options = "--folder", args.folder, "--networks", name, "--evaluate", output
            figures |= json.loads(accuracy_methods.run(__file__, *options).splitlines()[-1])
        except accuracy_methods.FailedError as error:
            figures["failed"] = str(error)
    if args.engines and not {"engine_mb", "failed"} & figures.keys():
        engine = args.folder / "models" / f"{name}.{method}.engine"
        try:
            accuracy_methods.run(accuracy_methods.__file__, "engine", output, network / "calib.npz", engine)
            figures["engine_mb"] = engine.stat().st_size / 1e6
        except accuracy_methods.FailedError as error:
            figures["engine_mb"] = f"fails: {error}"
    kept.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def table(found):
    """Return the Markdown table of a network's results."""
    measured = [figures for figures in found if "failed" not in figures]
    metric = measured[0]["metric"] if measured else "agreement"
    rows = [
        f"| {found[0]['network']} | {metric} | SQNR, dB | INT8 multiply-adds | not depthwise "
        "| s | CPU s | MiB | engine, MB |",
        "| --- |" + " ---: |" * 8,
    ]
    for figures in found:
        if "failed" in figures:
            rows.append(f"| {figures['method']} | fails: {figures['failed'].replace('|', '/')} |" + " |" * 7)
            continue
        noise = " / ".join("-" if value is None else f"{value:.1f}" for value in figures["sqnr_db"].values())
        cells = [f"{100 * figures[key]:.1f}%" for key in ("int8_share", "int8_share_without_depthwise")]
        cells += [f"{figures[key]:.0f}" if key in figures else "" for key in ("seconds", "cpu_seconds", "peak_mib")]
        engine = figures.get("engine_mb", "")
        cells.append(engine.partition(":")[0] if isinstance(engine, str) else f"{engine:.1f}")
        rows.append(f"| {figures['method']} | {100 * figures['agreement']:.1f}% | {noise} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = {"type": lambda text: text.split(","), "metavar": "A,B"}
    parser.add_argument("--folder", type=Path, default=Path("build/accuracy"), help="for packages, models and results")
    parser.add_argument("--networks", **listed, default=list(accuracy_networks.NETWORKS))
    parser.add_argument("--methods", **listed, default=list(accuracy_methods.METHODS))
    parser.add_argument("--evaluate", type=Path, metavar="MODEL", help="print the figures of this model, as JSON")
    parser.add_argument("--modelopt", default=sys.executable, help="the Python that has ModelOpt")
    parser.add_argument("--engines", action="store_true", help="build engines, too, with TensorRT for RTX")
    parser.add_argument("--memory", type=int, default=16, help="GiB that a method's process may take")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    if args.evaluate:
        if len(args.networks) != 1:
            parser.error("--evaluate needs --networks with the one network that the model stands for")
        print(json.dumps(evaluate(args.folder, *args.networks, args.evaluate)))
        return
    everything = []
    for name in args.networks:
        found = [result(args, name, method) for method in args.methods]
        print(table(found), end="\n\n", flush=True)
        everything += found
    if args.json:
        args.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
