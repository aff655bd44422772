"""`Observations`: the histograms of a network's tensors over the batches of a calibration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastcal.observe.histogram import Histogram
from fastcal.progress import Progress


@dataclass(frozen=True)
class Observations:
    """A network's tensors, observed over the batches of a calibration; every algorithm can pick scales from them.

    Attributes:
        network: The path of the ONNX file, or the network's name.
        backend: The backend that ran the network: "onnxruntime" or "tensorrt".
        precision: The precision in which it ran: "FP32" or "TF32".
        histograms: The histogram of every tensor's |x|, by tensor name.
        shared_scales: Tensors that take the scale of another one: name to the other tensor's name.
        progress: The state of the calibration after each batch.
    """

    network: str
    backend: str
    precision: str
    histograms: Mapping[str, Histogram]
    shared_scales: Mapping[str, str]
    progress: Sequence[Progress]
