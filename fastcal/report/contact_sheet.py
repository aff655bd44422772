"""`preview`: the first images of a feed as the network gets them, on one sheet."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcal.device import to_host
from fastcal.errors import DataError, FastcalError, check_range, quoted
from fastcal.feed.arrays import as_feed
from fastcal.feed.dataset import common_folder
from fastcal.feed.feed import Batch, Feed, length
from fastcal.feed.preprocess import PRESETS, Preprocess
from fastcal.files import write_atomically
from fastcal.memory import check_room
from fastcal.report.plots import check_picture, draw_sheet

#: The default number of images: four rows.
_COUNT = 24

#: The memory of a preview as a multiple of its values: two copies, and the drawing (measured: 4.4).
_COPIES = 5

#: Pixel values are rounded: a pixel is outside 0..255 if it is further than this from it.
_TOLERANCE = 0.5


@dataclass(frozen=True)
class Channel:
    """The values of one channel over all previewed images, as the network gets them.

    Attributes:
        name: "R", "G", "B", "A" or "GRAY", by the preprocessing.
        min: The smallest value.
        max: The largest.
        mean: The mean.
        std: The standard deviation.
    """

    name: str
    min: float
    max: float
    mean: float
    std: float

    def __str__(self) -> str:
        return f"{self.name}: {self.min:.4g} to {self.max:.4g}, mean {self.mean:.4g}, std {self.std:.4g}"


@dataclass(frozen=True)
class Preview:
    """Images as a network gets them.

    Attributes:
        preprocess: The preprocessing that `pixels` undoes.
        names: The images' names; for files, their paths below their common folder.
        values: The network's input: float32 array of shape (images, height, width, channels).
    """

    preprocess: Preprocess
    names: Sequence[str]
    values: npt.NDArray[np.float32]

    @property
    def pixels(self) -> npt.NDArray[np.float32]:
        """The pixels before the preprocessing: (values * std + mean) / scale, of the shape of `values`.

        They are in 0..255 if the values were made with this preprocessing. The channels are in the network's order: the
        first of "BGR" is blue.
        """
        mean, std = (np.array(values, np.float32) for values in (self.preprocess.mean, self.preprocess.std))
        undone: npt.NDArray[np.float32] = (self.values * std + mean) / np.float32(self.preprocess.scale)
        return undone

    @property
    def channels(self) -> list[Channel]:
        """The values of each channel, in the network's order."""
        names = ["GRAY"] if self.preprocess.channels == "GRAY" else list(self.preprocess.channels)
        by_channel = self.values.reshape(-1, len(names)).T.astype(np.float64)
        return [
            Channel(name, float(of.min()), float(of.max()), float(of.mean()), float(of.std()))
            for name, of in zip(names, by_channel, strict=True)
        ]

    @property
    def outside(self) -> float:
        """The share of pixels outside 0..255; if it is above 0, the values were not made with this preprocessing."""
        pixels = self.pixels
        return float(np.mean((pixels < -_TOLERANCE) | (pixels > 255 + _TOLERANCE) | ~np.isfinite(pixels)))

    @property
    def normalized_as(self) -> list[str]:
        """The presets with the same channels, scale, mean and std."""
        values = attrgetter("channels", "scale", "mean", "std")
        return [name for name, preset in PRESETS.items() if values(preset) == values(self.preprocess)]

    def notes(self) -> list[str]:
        """Return notes that help to judge the sheet, one line each."""
        presets = " and ".join(self.normalized_as)
        lines = [
            f"prepared: {self.preprocess}",
            f"colours and values: those of {f'preset {presets}' if presets else 'no preset'}",
        ]
        if self.preprocess.channels == "BGR":
            lines.append(
                "blue comes first and is drawn red, as a network trained on RGB takes it; right for one trained on BGR"
            )
        if self.outside:
            lines.append(
                f"{self.outside:.1%} of the pixels are outside 0..255: another preprocessing made these values"
            )
        return lines

    def save(self, path: str | os.PathLike[str]) -> None:
        """Draw the sheet: the notes, the values of each channel, the images with their names below.

        The network's first channel is drawn red, the second green, the third blue, and a fourth is the alpha;
        pixels outside 0..255 are clipped.

        Args:
            path: The file; its suffix chooses the format: .png, .jpg, .webp, .pdf or .svg.

        Raises:
            FastcalError: There is no such format, it does not allow so many images, or the file cannot be written.
        """
        kind = check_picture(path)
        pixels = np.rint(np.nan_to_num(self.pixels).clip(0, 255)).astype(np.uint8)
        channels = {str(channel): self.values[..., index] for index, channel in enumerate(self.channels)}
        write_atomically(path, draw_sheet(kind, self.notes(), channels, self.names, pixels))


def preview(
    feed: Any, *, preprocess: str | Preprocess | None = None, input_name: str | None = None, count: int = _COUNT
) -> Preview:
    """Take the first images of a feed as the network gets them, to look at.

    The network's first channel is drawn red, so blue and red are swapped if a network trained on RGB gets BGR. A sheet
    that looks right may still have another preprocessing than the network was trained with: compare the notes too.

    Args:
        feed: An `ImageFeed`; or, with `preprocess`, another feed or anything that `ArrayFeed` takes.
        preprocess: The preprocessing to undo: the name of a preset or a `Preprocess`; by default the feed's. Size,
            layout and number of channels are taken from the batches.
        input_name: The input to show; by default the first one that takes images.
        count: The number of images.

    Returns:
        The preview; `save(path)` draws it.

    Raises:
        DataError: The batches have no such input, or it holds no images; or the preprocessing is not known.
        FastcalError: The count is below 1.
        Exception: As the feed.
    """
    check_range("count", count, 1)
    with as_feed(feed, None, "cpu") as batches:
        wanted = batches.preprocess if preprocess is None else preprocess
        if isinstance(wanted, Mapping):
            input_name = input_name or next(iter(wanted))
            if input_name not in wanted:
                raise DataError(f"there are no images for input {input_name!r}, but for {quoted(wanted)}")
            wanted = wanted[input_name]
        if wanted is None:
            raise DataError("the preprocessing of the batches is not known; name it, imagenet for instance")
        known = Preprocess.preset(wanted) if isinstance(wanted, str) else wanted
        values, fitted = _first_images(batches, input_name, known, count)
        paths = batches.sample_names
    if paths is None:
        return Preview(fitted, [f"sample {number}" for number in range(len(values))], values)
    root = common_folder(paths[:count])
    names = [os.path.relpath(path, root) for path in paths[:count]]
    return Preview(fitted, names, values[: len(names)])


def _first_images(
    feed: Feed, name: str | None, preprocess: Preprocess, count: int
) -> tuple[npt.NDArray[np.float32], Preprocess]:
    """Return the first images of a feed, channels last, and the preprocessing with their size and layout."""
    taken: list[npt.NDArray[np.float32]] = []
    batches = iter(feed)
    try:
        for batch in batches:
            images = np.array(to_host(_images(batch, name)), np.float32)  # a copy: the feed reuses its arrays
            try:
                preprocess = preprocess.fit((None, *images.shape[1:]))
            except FastcalError as error:
                raise DataError(f"the batches' array of shape {images.shape}: {error}") from error
            if not taken:
                known = length(feed)
                shown = count if known is None else min(count, known * len(images))
                what = f"{shown} images of {'x'.join(map(str, preprocess.size))} and their drawing"
                check_room(_COPIES * shown * images[0].nbytes, what, "show fewer, or make them smaller")
            taken.extend(images if preprocess.layout == "NHWC" else images.transpose(0, 2, 3, 1))
            if len(taken) >= count:
                break
    finally:
        if hasattr(batches, "close"):
            batches.close()
    if not taken:
        raise DataError("the feed gave no batches; a preview needs at least one")
    return np.stack(taken[:count]), preprocess


def _images(batch: Batch, name: str | None) -> Any:
    """Return the batch's array of that name; if `name` is None, its only array of four dimensions."""
    fitting = [key for key, array in batch.items() if key == name or (name is None and len(array.shape) == 4)]
    if not fitting and name is None:
        raise DataError(
            f"none of the batches' arrays, {quoted(batch)}, has the four dimensions of images; name the model that "
            "takes them, or give arrays of that shape"
        )
    if len(fitting) != 1:
        raise DataError(f"the batches have the inputs {quoted(batch)}; say which one has the images")
    return batch[fitting[0]]
