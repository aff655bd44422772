"""`Observations`: what a calibration saw on its way to the scales."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastcal.observe.histogram import Histogram
from fastcal.observe.scales import pick_scales
from fastcal.progress import Progress


@dataclass(frozen=True)
class Observations:
    """What `fastcal.calibrate` saw, kept in memory beside the scales it picked: any algorithm can pick again from it.

    Attributes:
        network: The ONNX file, or the network's name.
        engine: What ran the network: "onnxruntime" or "tensorrt".
        histograms: The histogram of every tensor's |x|, by tensor name.
        sources: Tensors that take another's scale: name to the other's name.
        progress: How far the calibration was after each batch.
    """

    network: str
    engine: str
    histograms: Mapping[str, Histogram]
    sources: Mapping[str, str]
    progress: Sequence[Progress]

    def scales(self, algorithm: str, quantile: float = 0.9999) -> dict[str, float]:
        """The scale of every tensor by an algorithm, as `fastcal.calibrate` names it.

        Raises:
            FastcalError: The algorithm is unknown or the quantile not in (0, 1].
        """
        scales = pick_scales(self.histograms, algorithm, quantile)
        shared = {name: source for name, source in self.sources.items() if {name, source} <= scales.keys()}
        return scales | {name: scales[source] for name, source in shared.items()}
