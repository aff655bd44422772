"""`ImageFeed`: images as batches, decoded and prepared by DALI ahead of the consumer."""

import os
from collections.abc import Mapping
from typing import Any

from fastcal.device import as_array, resolve
from fastcal.errors import FastcalError
from fastcal.feed.chunks import LAST_BATCHES, log_last_batch
from fastcal.feed.dataset import Data
from fastcal.feed.image_pass import ImagePasses
from fastcal.feed.image_plan import Decoding, ImagePlan
from fastcal.feed.inputs import (
    check_inputs,
    fit_preprocesses,
    fixed_batch_size,
    has_dynamic_batch,
    name_inputs,
    open_sources,
    repeated_constants,
)
from fastcal.feed.plan import PlannedFeed, check_settings, default_batch_size
from fastcal.feed.preprocess import Preprocess
from fastcal.feed.sources import ImageSource
from fastcal.model import Model


class ImageFeed(PlannedFeed):
    """Batches of images: {input name: array of shape (batch_size, *preprocess.shape)}, and the constants.

    The arrays are float32, or uint8 for an input of that type.

    A background thread decodes and prepares the next batch while the consumer works on the last one; the arrays are
    allocated once and reused.

    Args:
        data: A folder (searched with its folders, sorted by path), a list file (one path a line, relative to the
            file, perhaps with labels), a `data.yaml` of Ultralytics, a `.json` of COCO, one image, a pattern
            ("train/**/*.jpg", "train-{0000..0146}.tar"), or a sequence of paths. The files are images, tar shards as
            WebDataset writes them, or TFRecord files. For several inputs, a dict of these by input name, with the same
            samples in the same order: {"left": "left/", "right": "right/"}. An input may take arrays too, `.npy` files
            with one sample each: {"image": "scenes/", "pose": "scenes/*.npy"}.
        preprocess: The name of a preset, see `Preprocess.preset`, or a `Preprocess`; for several inputs, one for all or
            a dict by input name. By default the one that the model names itself: in the metadata of Ultralytics, or in
            a `preprocessor_config.json` of Hugging Face or a `config.json` of timm beside it; else "imagenet". The log
            says which.
        model: An ONNX file whose image inputs give size, layout, number of channels, batch size and input name. If a
            size is dynamic, the preprocessing's own is used.
        batch_size: The number of samples in a batch; by default the model's if that is fixed, else 128 on a GPU and 32
            on the CPU.
        input_name: The network's input, if the data are for one; by default the model's, else whatever single input a
            network has.
        key: The name of the images in shards: for tar shards their extension (by default any extension of an image),
            for TFRecord their feature (by default "image/encoded"); for several inputs, one for all or a dict by input
            name: {"left": "left.jpg", "right": "right.jpg"}.
        shuffle: Whether to shuffle the samples, before `limit`.
        seed: Decides the shuffled order.
        balance: Whether to take images from each class in turn, before `limit`. A class is a folder in the data's
            folder (for several inputs, the first input's); a tar shard counts as unpacked where it lies.
        limit: The number of samples to use at most.
        spread: Whether `limit` takes samples at equal distances, from the first to the last, instead of the first ones.
        last_batch: A last batch of fewer samples is smaller ("keep"), completed with the first samples ("wrap"), or
            left out ("drop"). By default "keep" if the model's batch is dynamic, else "wrap".
        skip_unreadable: Whether to go on without samples that cannot be read or decoded; the next samples take their
            places. By default the first such sample ends the pass with an error that names it.
        max_unreadable: With `skip_unreadable`, the percentage of samples that may be unreadable; more end the pass.
        constants: Further inputs that are the same in every batch: arrays by input name. If the model's first dimension
            is dynamic and the array's is 1, it is repeated for every sample.
        device: "auto" (a GPU if there is one and CuPy is installed, else the CPU), "cpu", "cuda" or "cuda:N". On a GPU,
            images are decoded and prepared there, and the batches are CuPy arrays, filled on the feed's own stream and
            ready for any stream. A read that is enqueued on a stream other than CuPy's current one must have ended
            before the next batch is asked for. Pixels equal those of the CPU except for rounding: JPEG files are
            decoded to within 3 levels, 0.03 on average at most, on an H100. A GPU's decoder takes JPEG files of RGB
            components, which are rare, for YCbCr: if such files are among the first of a kind, all images are decoded
            on the CPU.
        depth: The number of buffers, at least 2.
        threads: The number of threads that read and decode; by default one per core that this process may use, on a
            GPU 8 at most.
        prefetch_queue_depth: On a GPU, the number of batches that DALI works on at once.
        hw_decoder_load: On a GPU, the share of JPEG images for its own JPEG decoder, if it has one. By default 0.9;
            but if the files have less than 60 MB per core, the CPU decodes all of them, in less time than a GPU's
            decoder takes to start.

    Attributes:
        paths: The samples, in order: the paths of images, "shard:name" in shards; for several inputs, those of the
            first.
        preprocess: The preprocessing; for several inputs that take images, a dict by input name.
        batch_size: The number of samples in a batch.
        gpu: The number of the GPU that the batches lie on; None for host memory.

    Raises:
        DataError: There are no images at `data`, they do not belong together, or do not fit the model or each other.
        FastcalError: A setting is out of its range.
        ModelError: The model is invalid.
        UnavailableError: There is no such device.
    """

    def __init__(
        self,
        data: Data | Mapping[str, Data],
        *,
        preprocess: str | Preprocess | Mapping[str, str | Preprocess] | None = None,
        model: str | os.PathLike[str] | Model | None = None,
        batch_size: int | None = None,
        input_name: str | None = None,
        key: str | Mapping[str, str] | None = None,
        shuffle: bool = False,
        seed: int = 0,
        balance: bool = False,
        limit: int | None = None,
        spread: bool = False,
        last_batch: str | None = None,
        skip_unreadable: bool = False,
        max_unreadable: float = 5.0,
        constants: Mapping[str, Any] | None = None,
        device: str = "auto",
        depth: int = 2,
        threads: int | None = None,
        prefetch_queue_depth: int = 4,
        hw_decoder_load: float | None = None,
    ) -> None:
        check_settings(
            last_batch, LAST_BATCHES, batch_size=batch_size, limit=limit, depth=depth, threads=threads,
            prefetch_queue_depth=prefetch_queue_depth,
        )  # fmt: skip
        if not 0 <= max_unreadable <= 100:
            raise FastcalError(f"max_unreadable is {max_unreadable}; it is a percentage from 0 to 100")
        if hw_decoder_load is not None and not 0 <= hw_decoder_load <= 1:
            raise FastcalError(f"hw_decoder_load is {hw_decoder_load}; it is a share from 0 to 1")
        network = None if model is None else Model.of(model)
        fixed = {name: as_array(values) for name, values in (constants or {}).items()}
        named = name_inputs(data, input_name, network, fixed)
        sources = open_sources(named, key, shuffle=shuffle, seed=seed, balance=balance, limit=limit, spread=spread)
        preprocesses = fit_preprocesses(sources, preprocess, network)
        sources |= {
            name: source.with_alpha()
            for name, source in sources.items()
            if isinstance(source, ImageSource) and preprocesses[name].channels == "RGBA"
        }
        gpu = resolve(device)
        batch_size = batch_size or fixed_batch_size(network, preprocesses) or default_batch_size(gpu)
        count = len(next(iter(sources.values())).names)
        last_batch = last_batch or ("keep" if has_dynamic_batch(network, sources) else "wrap")
        if last_batch == "keep":
            batch_size = min(batch_size, count)
        repeated = repeated_constants(network, fixed)
        fixed = {name: values.repeat(batch_size, 0) if name in repeated else values for name, values in fixed.items()}
        check_inputs(network, sources, fixed, batch_size)
        cores = len(os.sched_getaffinity(0))
        decoding = Decoding(gpu, device == "cpu", threads, cores, prefetch_queue_depth, hw_decoder_load)
        log_last_batch(count, batch_size, last_batch, "image")
        plan = ImagePlan(
            sources=sources,
            preprocesses=preprocesses,
            constants=fixed,
            repeated=repeated,
            batch_size=batch_size,
            last_batch=last_batch,
            seed=seed if shuffle else None,
            max_unreadable=max_unreadable if skip_unreadable else None,
            depth=depth,
            decoding=decoding,
        )
        super().__init__(plan, ImagePasses)

    @property
    def samples(self) -> int:  # type: ignore[override]
        """The number of samples in a pass, without unreadable ones."""
        return super().samples or 0

    @property
    def paths(self) -> list[str]:
        """The samples, in order, with unreadable ones."""
        return list(self._plan.sample_names or ())
