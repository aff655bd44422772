"""`write_report`: one page about a calibration, for a browser."""

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fastcal.cache.cache import CalibrationCache
from fastcal.errors import CacheError, counted
from fastcal.files import write_atomically
from fastcal.observe.histogram import MANY_CLIPPED, Histogram, Observations
from fastcal.report.plots import draw_curve, draw_histogram, draw_over_time
from fastcal.tuning.tuned import Tuning
from fastcal.versions import installed

#: The limit for remarks: the factor between a scale and each of its neighbours'.
_FAR = 16

#: The number of neighbours before and after a tensor, and the most tensors that are listed as worth a look.
_NEIGHBOURS = 2
_LISTED = 8

#: The packages that a calibration may depend on, as `fastcal.versions.installed` takes them.
_PACKAGES = r"fastcal|numpy|onnx|onnxruntime(-gpu)?|nvidia-dali-cuda\d+|tensorrt(-cu\d+)?|cupy-cuda\d+x"


class _Tensor(NamedTuple):
    number: int
    name: str
    scale: float
    amax: float
    clipped: float  # the share of its values beyond 127 scales
    remarks: Sequence[str]  # the reasons why it is worth a look
    rank: tuple[float, ...]  # the sort key of these, the smallest first; empty if there are none
    source: str | None  # the tensor whose scale this one takes
    picture: Markup

    @property
    def clipped_text(self) -> str:
        """The clipped share as the table shows it."""
        if not self.clipped:
            return "none"
        return f"{100 * self.clipped:.3f} %" if self.clipped >= 0.5e-5 else "< 0.001 %"


def write_report(
    cache: CalibrationCache | Tuning, path: str | os.PathLike[str], *, about: Mapping[str, str] | None = None
) -> None:
    """Write a page about a calibration: its data and settings, its speed, and the histogram and scale of every tensor.

    The page is one HTML file that loads nothing else. It shows throughput and waiting for data over time, and a table
    of the tensors with their histograms that can be sorted and searched. Tensors worth a look are listed first: those
    that have NaN or infinite values, are always 0, have many clipped values, or have a scale far from those of the
    tensors before and after. For a tuning, it shows what INT8 keeps over the layers in float too, and the layers that
    cost most.

    Args:
        cache: The cache that `fastcal.calibrate` returned, or the tuning that `fastcal.tune` returned.
        path: The file of the page.
        about: Further facts to show about the calibration, by name: {"images": "photographs/"}.

    Raises:
        CacheError: The cache was not returned by a calibration.
        FastcalError: The file cannot be written.
    """
    tuning, cache = (cache, cache.cache) if isinstance(cache, Tuning) else (None, cache)
    if cache.observed is None:
        raise CacheError("the cache has no histograms: make the report from what fastcal.calibrate returns, not a file")
    environment = Environment(
        loader=PackageLoader("fastcal.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    tensors = list(_tensors(cache.scales, cache.observed))
    remarkable = sorted((tensor for tensor in tensors if tensor.rank), key=lambda tensor: tensor.rank)
    progress = cache.observed.progress
    page = environment.get_template("report.html").render(
        title=os.path.basename(cache.observed.network),
        about=_about(cache, cache.observed, about or {}),
        progress=progress[-1],
        samples=_samples(cache, cache.observed),
        speed=Markup(draw_over_time(progress, "samples a second", lambda at: at.images)),
        waiting=Markup(draw_over_time(progress, "% of the time waiting for data", lambda at: 100 * at.waited, 100)),
        accuracy=tuning and _accuracy(tuning),
        tensors=tensors,
        remarkable=remarkable[:_LISTED],
        others=len(remarkable[_LISTED:]),
        now=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_atomically(path, page.encode(errors="surrogateescape"))


def _accuracy(tuning: Tuning) -> dict[str, Any]:
    """Return what the page shows of a tuning."""
    points, noise = tuning.curve, sum(layer.noise for layer in tuning.ranking) or 1.0
    in_float = [point.in_float for point in points]
    charts = [draw_curve(in_float, [point.sqnr for point in points], "dB at the outputs")]
    if tuning.metric is not None and all(point.metric is not None for point in points):
        charts.append(draw_curve(in_float, [float(point.metric or 0) for point in points], tuning.metric))
    worst = sorted(tuning.ranking, key=lambda layer: -layer.noise)[:_LISTED]
    return {
        "kept": tuning.text,
        "charts": [Markup(chart) for chart in charts],
        "layers": [
            (layer.name, f"{100 * layer.noise / noise:.1f} % of the noise", layer.output in (tuning.in_float or ()))
            for layer in worst
        ],
    }


def _tensors(scales: Mapping[str, float], observed: Observations) -> Iterator[_Tensor]:
    order = list(scales)
    for index, name in enumerate(order):
        histogram, threshold = observed.histograms[name], 127 * scales[name]
        clipped = histogram.clipped(threshold)
        near = [*order[max(index - _NEIGHBOURS, 0) : index], *order[index + 1 : index + 1 + _NEIGHBOURS]]
        remarks = list(_remarks(histogram, clipped, scales[name], [scales[other] for other in near]))
        texts, rank = [text for _, text in remarks], min((rank for rank, _ in remarks), default=())
        source, picture = observed.shared_scales.get(name), Markup(draw_histogram(histogram, threshold))
        yield _Tensor(index + 1, name, scales[name], histogram.amax, clipped, texts, rank, source, picture)


def _remarks(
    histogram: Histogram, clipped: float, scale: float, neighbours: Sequence[float]
) -> Iterator[tuple[tuple[float, ...], str]]:
    """Yield the reasons why a tensor is worth a look, each with its rank: the kind, then the worst of a kind first."""
    left_out = {"NaN": histogram.nan, "infinite": histogram.inf}
    if any(left_out.values()):
        texts = [f"{count:,} {kind}" for kind, count in left_out.items() if count]
        yield (0, -sum(left_out.values())), f"{' and '.join(texts)} left out"
    if not histogram.amax:
        yield (1,), "always 0"
    if clipped >= MANY_CLIPPED:
        yield (2, -clipped), f"{100 * clipped:.2f} % clipped"
    factors = [scale / other for other in neighbours if other]
    if scale and factors:
        nearest = min(factors, key=_distance)
        if _distance(nearest) >= _FAR:
            times = f"{nearest:,.0f}" if nearest > 1 else f"{nearest:.2g}"
            yield (3, -_distance(nearest)), f"scale {times} times its neighbours'"


def _distance(factor: float) -> float:
    return max(factor, 1 / factor)


def _about(cache: CalibrationCache, observed: Observations, more: Mapping[str, str]) -> dict[str, str]:
    """Return the facts about a calibration by name; `more` has those that only the caller knows."""
    made_from = cache.record.entries if cache.record else {}
    prepared = made_from.get("preprocess")
    if isinstance(prepared, dict):  # by input
        prepared = "; ".join(f"{name}: {preprocess}" for name, preprocess in prepared.items())
    algorithm = cache.algorithm
    percentile = f", quantile {algorithm.quantile:g}" if algorithm.quantile else ""
    facts = {
        "network": observed.network,
        **more,
        "samples": f"{_samples(cache, observed)} in {counted(observed.progress[-1].batches, 'batch')}",
        "prepared": prepared,
        "scales by": f"{algorithm.name}{percentile}",
        "run by": f"{observed.backend}, {observed.precision}",
        "cache": cache.header,
        "model's SHA-256": made_from.get("model"),
        "samples' SHA-256": made_from.get("samples"),
        "versions": ", ".join([f"Python {platform.python_version()}", *installed(_PACKAGES)]),
    }
    return {name: text for name, text in facts.items() if text}


def _samples(cache: CalibrationCache, observed: Observations) -> int:
    """Return the number of samples, without those that were skipped or only complete the last batch."""
    made_from = cache.record.entries if cache.record else {}
    seen = observed.progress[-1].images
    known = made_from.get("images", made_from.get("arrays", seen))
    return min(seen, int(known) - len(made_from.get("skipped", [])))
