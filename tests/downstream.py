"""An application that uses all of fastcal's public names. mypy checks it, strictly; nothing runs it.

If an error that is to be ignored is not there, mypy reports that.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx

import fastcal

if TYPE_CHECKING:
    from typing_extensions import assert_type

logging.getLogger("fastcal").setLevel(logging.INFO)


class Recordings(fastcal.Feed):
    """A feed of one's own."""

    batch_size = 4

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[dict[str, npt.NDArray[np.float32]]]:
        for _ in range(len(self)):
            yield {"input": np.zeros((self.batch_size, 3, 8, 8), np.float32)}

    def describe(self) -> dict[str, Any]:
        return {"samples": "recordings of May"}


def show(state: fastcal.Progress) -> None:
    share = None if state.total is None else state.batches / state.total
    assert_type(share, float | None)
    print(share, state.images, state.seconds, state.waited)


def feeds(folder: Path) -> list[fastcal.Feed]:
    preprocess = fastcal.Preprocess(size=(8, 8), mean=(0.5,), std=(0.5,), channels="BGR")
    assert_type(preprocess.fit((None, 3, 8, 8)).shape, tuple[int, int, int])
    assert_type(fastcal.Preprocess.load(folder / "preprocess.toml"), fastcal.Preprocess)
    images = fastcal.ImageFeed(folder, preprocess=preprocess, model="model.onnx", balance=True, limit=10)
    assert_type(images.paths, list[str])
    arrays = fastcal.ArrayFeed([{"input": np.zeros((1, 3, 8, 8), np.float32)}])
    tensors = fastcal.NumpyFeed({"input": folder / "tensors"}, model="model.onnx", batch_size=4, shuffle=True)
    assert_type(tensors.samples, int)
    loader = fastcal.ArrayFeed(lambda: iter([(np.zeros((1, 3)), "label")]), names=["input"], last_batch="drop")
    assert_type(loader.batch_size, int)
    for batch in images:
        print({name: array.shape for name, array in batch.items()})
    own = Recordings()
    return [images, arrays, own, tensors, loader, fastcal.ImageFeed(["a.jpg", Path("b.jpg")], preprocess="unit")]


def scales(folder: Path) -> fastcal.CalibrationCache:
    try:
        with feeds(folder)[0] as feed:
            cache = fastcal.calibrate(folder / "model.onnx", feed, algorithm="minmax", until_stable=1, progress=show)
    except fastcal.UnavailableError as error:
        assert_type(error.package, str)
        raise SystemExit(f"install {error.package}") from error
    except (fastcal.ModelError, fastcal.DataError, fastcal.CacheError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    except fastcal.FastcalError as error:
        raise SystemExit(str(error)) from error
    assert_type(cache.scales, dict[str, float])
    assert_type(cache.header, str)
    assert_type(fastcal.CalibrationCache.from_bytes(cache.to_bytes()), fastcal.CalibrationCache)
    for form in ("tensorrt", "json"):
        cache.save(folder / form, form=form)
    return cache


def pick(observed: fastcal.Observations) -> dict[str, float]:
    assert_type(observed.progress, Sequence[fastcal.Progress])
    widest: fastcal.Histogram = max(observed.histograms.values(), key=lambda histogram: histogram.amax)
    print(widest.clipped(widest.amax / 2))
    return fastcal.Algorithm.of("percentile", 0.999).scales(observed)


def is_dynamic(value: fastcal.Input) -> bool:
    return None in value.shape


def entries(cache: fastcal.CalibrationCache) -> int:
    record: fastcal.Record | None = cache.record
    return 0 if record is None else len(record.entries)


def judge(folder: Path, cache: fastcal.CalibrationCache) -> bool:
    earlier = fastcal.CalibrationCache.load(folder / "model.cache")
    diff = fastcal.diff_caches(earlier, cache, tolerance=1)
    assert_type(diff, fastcal.CacheDiff)
    for name, (before, after) in diff.moved.items():
        print(f"{name}: {before:g} to {after:g}")
    check = fastcal.check_cache(cache, "model.onnx", feeds(folder)[1])
    assert_type(check, fastcal.CacheCheck)
    print(diff.added, diff.removed, check.missing, check.unknown, check.stale)
    return not diff and not check


def look(folder: Path, cache: fastcal.CalibrationCache) -> str:
    images, arrays, *_ = feeds(folder)
    preview = fastcal.preview(images, count=8)
    assert_type(preview, fastcal.Preview)
    channel: fastcal.Channel = preview.channels[0]
    assert_type(channel.mean, float)
    preview.save(folder / "sheet.png")
    assert_type(fastcal.preview(arrays, preprocess="unit", input_name="input").pixels, npt.NDArray[np.float32])
    comparison = fastcal.compare("model.onnx", images, caches={"mine": cache, "old": "old.cache"}, progress=show)
    assert_type(comparison, fastcal.Comparison)
    quality: fastcal.Quality = comparison.qualities[comparison.best]
    tensor: fastcal.TensorQuality
    for name, tensor in quality.tensors.items():
        assert_type(tensor.sqnr, float | None)
        print(name, tensor.sqnr, tensor.clipped, comparison.float_top1)
    if cache.observed is not None:
        print(
            {name: histogram.clipped(127 * cache.scales[name]) for name, histogram in cache.observed.histograms.items()}
        )
    fastcal.write_report(cache, folder / "report.html", about={"images": str(folder)})
    return comparison.verdict


def models(folder: Path, config: Any, network: Any, builder: Any) -> bytes:
    quantized = fastcal.quantize(fastcal.Model.of("model.onnx"), scales(folder), exclude=["Gemm"])
    assert_type(quantized, onnx.ModelProto)
    feed = feeds(folder)[2]
    tuning = fastcal.tune("model.onnx", feed, target=0.99, metric=lambda exact, other: 1.0, status=print)
    assert_type(tuning, fastcal.Tuning)
    layer: fastcal.RankedLayer = tuning.ranking[0]
    point: fastcal.TuningPoint = tuning.curve[0]
    print(layer.noise, point.sqnr, tuning.text)
    tuning.save(folder / "tuned.json")
    quantized = fastcal.quantize("model.onnx", folder / "tuned.json", depthwise=True)
    extracted = fastcal.extract_scales("model.qdq.onnx", feed, tensorrt_version="8.6.0")
    assert_type(extracted, fastcal.Extracted)
    assert_type(extracted.model, onnx.ModelProto)
    assert_type(fastcal.for_dla("model.onnx", extracted.cache), fastcal.CalibrationCache)
    assert_type(fastcal.unfit_for_dla(folder / "model.onnx"), dict[str, str])
    print(extracted.cache.header, extracted.paired, extracted.missing)
    calibrators: Sequence[fastcal.FeedCalibrator] = (
        fastcal.EntropyCalibrator2(feed, cache="model.cache", model=folder / "model.onnx", progress=show),
        fastcal.EntropyCalibrator(feed),
        fastcal.MinMaxCalibrator([{"input": np.zeros((1, 3, 8, 8), np.float32)}]),
        fastcal.LegacyCalibrator(feed, quantile=0.999),
        fastcal.Calibrator(feed),
    )
    config.int8_calibrator = calibrators[0]
    calibrators[0].check_network(network, config)
    with calibrators[0] as calibrator:
        calibrator.calibrate(network, tf32=True)
        builder.build_serialized_network(network, config)
    stats: fastcal.CalibratorStats = calibrators[0].stats
    assert_type(stats.waited, float)
    engine = fastcal.build_engine("model.onnx", feed, fp16=False, max_batch=8, timing_cache="timings")
    assert_type(engine, bytes)
    return engine


def wrong() -> None:
    fastcal.calibrate(1)  # type: ignore[call-arg]
    print(fastcal.no_such_name)  # type: ignore[attr-defined]
    print(fastcal.ImageFeed("x").paths + 1)  # type: ignore[operator]
