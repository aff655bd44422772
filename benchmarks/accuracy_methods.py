"""Methods of the accuracy benchmark: how fastcal and its peers make an INT8 model, and TensorRT for RTX an engine.

`python benchmarks/accuracy_methods.py METHOD MODEL DATA OUTPUT` runs one; DATA is the `calib.npz` of a network.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

FASTCAL = ("entropy2", "entropy", "minmax", "percentile", "mse")
PEERS = ("ort-minmax", "ort-entropy", "ort-percentile", "modelopt-max", "modelopt-entropy")
METHODS = ("fp32", "default", "tuned", *(f"fastcal-{algorithm}" for algorithm in FASTCAL), *PEERS)


class FailedError(Exception):
    """A process ended with an error: its last line."""


def run(*command):
    """Run a Python program and return what it prints."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise FailedError(_last_line(done.stderr, done.returncode))
    return done.stdout


def _last_line(text, status):
    said = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    return said[-1][:300] if said else f"status {status}"


def measure(method, model, data, output, modelopt, memory):
    """Write the INT8 model of a method to `output`; return what its processes took: seconds, CPU seconds, peak MiB.

    `modelopt` is the Python of ModelOpt's environment, `memory` the most bytes that a process may have.
    """
    seconds, cpu, peak, log = 0, 0, 0, output.with_suffix(".log")
    with log.open("w") as messages, tempfile.TemporaryDirectory() as folder:  # for what peers leave lying about
        for command in _commands(method, *map(str, (model, data, output)), modelopt):
            started = time.monotonic()
            process = subprocess.Popen(
                command,
                stdout=messages,
                stderr=messages,
                cwd=folder,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (memory, memory)),
            )
            _, status, usage = os.wait4(process.pid, 0)
            seconds, peak = seconds + time.monotonic() - started, max(peak, usage.ru_maxrss)
            cpu += usage.ru_utime + usage.ru_stime
            if status:
                raise FailedError(_last_line(log.read_text(errors="replace"), os.waitstatus_to_exitcode(status)))
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak / 1024}


def _commands(method, model, data, output, modelopt):
    """Return the command lines of a method."""
    fastcal = [sys.executable, "-m", "fastcal"]
    if method == "default":
        return [[*fastcal, "quantize", model, data, "-o", output]]
    if method == "tuned":
        tuned = str(Path(output).with_suffix(".json"))
        return [
            [*fastcal, "tune", model, data, "--target", "99%", "-o", tuned],
            [*fastcal, "quantize", model, tuned, "-o", output],
        ]
    return [
        [
            modelopt if method.startswith("modelopt") else sys.executable,
            os.path.abspath(__file__),
            method,
            model,
            data,
            output,
        ]
    ]


def _fastcal(algorithm, model, samples, output):
    """Quantize with the scales of one algorithm for all tensors, as TensorRT does it."""
    import onnx

    import fastcal

    batches = [
        {name: array[first : first + 32] for name, array in samples.items()}
        for first in range(0, len(next(iter(samples.values()))), 32)
    ]
    cache = fastcal.calibrate(model, batches, algorithm=algorithm, exact=False)
    onnx.save(fastcal.quantize(model, cache), output)


def _onnxruntime(calibration, model, samples, output):
    """Quantize with ONNX Runtime's quantizer: symmetric, one weight scale per channel, after its pre-processing."""
    import onnx.version_converter
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    modern, prepared = "modern.onnx", "prepared.onnx"
    loaded = onnx.load(model)
    if loaded.opset_import[0].version < 13:  # the first opset with a scale per channel
        loaded = onnx.version_converter.convert_version(loaded, 13)
    onnx.save(loaded, modern)
    try:
        quant_pre_process(modern, prepared)
    except Exception as error:  # its symbolic shapes do not know every operator; its documentation says to skip them
        print("without symbolic shapes:", error)
        quant_pre_process(modern, prepared, skip_symbolic_shape=True)
    methods = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
    reader = _reader(samples)
    options = {"ActivationSymmetric": True, "WeightSymmetric": True}
    options |= {"QuantizeBias": False, "AddQDQPairToWeight": True}  # without which TensorRT builds no engine
    if calibration != "minmax":  # whose memory does not grow: the others keep all activations unless they go in strides
        options["CalibStridedMinMax"] = max(n for n in range(1, 9) if len(reader) % n == 0)
    quantize_static(
        prepared,
        output,
        reader,
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, methods[calibration]),
        extra_options=options,
    )


def _reader(samples):
    """Return the reader of samples, one by one, that ONNX Runtime's quantizer takes."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.set_range(0, len(self))

        def __len__(self):
            return len(next(iter(samples.values())))

        def set_range(self, start_index, end_index):
            self.numbers = iter(range(start_index, end_index))

        def get_next(self):
            number = next(self.numbers, None)
            return None if number is None else {name: array[number : number + 1] for name, array in samples.items()}

    return Reader()


def _modelopt(calibration, model, samples, output):
    """Quantize with NVIDIA's ModelOpt; what is not INT8 stays FP32."""
    import onnx
    from modelopt.onnx.quantization import quantize

    model = shutil.copy(model, "model.onnx")  # ModelOpt writes to the file that it is given
    dims = {value.name: value.type.tensor_type.shape.dim[1:] for value in onnx.load(model).graph.input}
    fixed = all(dim.dim_value for name in samples for dim in dims[name])
    shapes = ",".join(f"{name}:{'x'.join(map(str, (1, *array.shape[1:])))}" for name, array in samples.items())
    quantize(
        model,
        quantize_mode="int8",
        calibration_data=samples,
        calibration_method=calibration,
        calibration_shapes=None if fixed else shapes,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=output,
    )


def _engine(model, samples, output):
    """Build an engine for GPUs of compute capability 8.9 (RTX 40, L4), which needs no GPU."""
    import onnx
    import tensorrt_rtx as trt

    proto = onnx.load(model)
    for value in proto.graph.input:  # names of dimensions may stand for two sizes, as "?" does
        for dim, size in zip(value.type.tensor_type.shape.dim, (1, *samples[value.name].shape[1:]), strict=True):
            dim.dim_value = size
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(proto.SerializeToString()):
        raise SystemExit(str(parser.get_error(0)))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise SystemExit("TensorRT for RTX builds no engine")
    Path(output).write_bytes(engine)


def main(method, model, data, output):
    with np.load(data) as arrays:
        samples = dict(arrays)
    maker, _, setting = method.partition("-")
    makers = {"fastcal": _fastcal, "ort": _onnxruntime, "modelopt": _modelopt}
    if method == "engine":
        _engine(model, samples, output)
    else:
        makers[maker](setting, model, samples, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
