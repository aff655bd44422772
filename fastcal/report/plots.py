"""Drawings by Matplotlib: a sheet of images, and the charts of a report."""

import io
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastcal.errors import FastcalError
from fastcal.observe.histogram import Histogram
from fastcal.progress import Progress

#: The formats of a sheet, by the suffix of its name.
_PICTURES = ("png", "jpg", "webp", "pdf", "svg")

#: Inches: a sheet's width, its margin, a line of text, the chart of values, and the gap between images.
_WIDTH, _MARGIN, _LINE, _CHART, _GAP = 10.0, 0.2, 0.22, 1.3, 0.06

#: The number of images in a row, and of the characters of a name that fit below an image.
_COLUMNS, _NAME = 6, 24

#: The largest height of an image as a multiple of its column's width; taller images are drawn narrower.
_TALLEST = 4

#: Pixels in an inch, and the largest height of a sheet in pixels by format: the limits of JPEG and WebP; a PNG is drawn
#: in memory.
_DPI = 150
_MOST_PIXELS = {"jpg": 65_500, "webp": 16_383, "png": 65_500}

#: The axis of the network's values: where it turns from linear to logarithmic, and where it ends.
_LINEAR, _FAR = 3.0, 300.0

#: Colours of the first, second and third channel, and of the channel of grey images.
_DRAWN = ("#d62728", "#2ca02c", "#1f77b4", "#404040")

#: The number of bars of a tensor's histogram, and the approximate number of steps of a chart over time.
_BARS, _STEPS = 48, 100

#: Placeholders for the colours of the page, its CSS variables, which are others for light and for dark.
_COLORS = {"counts": "#000001", "text": "#000002", "lines": "#000003"}


def check_picture(path: str | os.PathLike[str]) -> str:
    """Return the format that the suffix of a picture's name stands for."""
    kind = os.path.splitext(path)[1].lower().lstrip(".")
    if kind not in _PICTURES:
        raise FastcalError(f"cannot draw {path}: name a file that ends in .{', .'.join(_PICTURES)}")
    return kind


def draw_sheet(
    kind: str,
    notes: Sequence[str],
    channels: Mapping[str, npt.NDArray[np.float32]],
    names: Sequence[str],
    images: npt.NDArray[np.uint8],
) -> bytes:
    """Return a file with images, grey, RGB or RGBA, and the name of each below it.

    Above them are notes, line by line, and the values of each channel as the network gets them, by the text to write.
    """
    cell = (_WIDTH - 2 * _MARGIN) / _COLUMNS
    inches = min((cell - _GAP) / images.shape[2], _TALLEST * (cell - _GAP) / images.shape[1])  # of one pixel
    tall, wide = (max(inches * size, 1 / _DPI) for size in images.shape[1:3])  # the thinnest image stays visible
    row_height = tall + _GAP + _LINE
    head = _MARGIN + (len(notes) + 1.5) * _LINE + _CHART + 2 * _LINE
    height = _height(kind, head, row_height, len(images))
    figure = Figure((_WIDTH, height), dpi=_DPI)

    def box(left: float, top: float, width: float, tall: float) -> Axes:  # in inches, from the sheet's upper left
        return figure.add_axes((left / _WIDTH, 1 - (top + tall) / height, width / _WIDTH, tall / height))

    for number, note in enumerate(notes):
        top = 1 - (_MARGIN + number * _LINE) / height
        figure.text(_MARGIN / _WIDTH, top, note, va="top", parse_math=False, size=9)
    _draw_values(box(_MARGIN, head - _CHART - 2 * _LINE, cell * 3 - 0.1, _CHART), channels)
    interpolation = "nearest" if inches * _DPI > 1 else "auto"  # "nearest" shows the pixels of an enlarged image
    for number, (name, image) in enumerate(zip(names, images, strict=True)):
        row, column = divmod(number, _COLUMNS)
        axes = box(_MARGIN + column * cell + (cell - _GAP - wide) / 2, head + row * row_height, wide, tall)
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation=interpolation, aspect="auto")
        axes.set_axis_off()
        name = name.encode(errors="backslashreplace").decode()  # the name of a file may be any bytes
        shown = name if len(name) <= _NAME else "\u2026" + name[1 - _NAME :]
        below = (0.5, -_GAP / 2 / tall)
        axes.text(*below, shown, transform=axes.transAxes, ha="center", va="top", parse_math=False, size=7)
    return _saved(figure, kind)


def _height(kind: str, head: float, row_height: float, count: int) -> float:
    """Return the height of a sheet of `count` images in inches; FastcalError if the format does not allow it."""
    rows = -(-count // _COLUMNS)
    height = head + rows * row_height + _MARGIN
    most = _MOST_PIXELS.get(kind)
    if most is not None and height * _DPI > most:
        fitting = int((most / _DPI - height) / row_height + rows) * _COLUMNS
        raise FastcalError(
            f"{count} images make a sheet of {height * _DPI:.0f} pixels in height, and a .{kind} has {most} at most; "
            f"show {fitting} images or fewer, or draw a .pdf"
        )
    return height


def _draw_values(axes: Axes, channels: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Draw the distribution of the values of each channel, on an axis that is the same for every preprocessing."""
    far = np.geomspace(_LINEAR, _FAR, 50)
    edges = np.concatenate([-far[:0:-1], np.linspace(-_LINEAR, _LINEAR, 101), far[1:]])
    colors = _DRAWN[3:] if len(channels) == 1 else _DRAWN[: len(channels)]
    for color, (label, values) in zip(colors, channels.items(), strict=True):
        counts, _ = np.histogram(values.clip(-_FAR, _FAR), edges)
        axes.stairs(counts, edges, color=color, label=label)
    axes.axvspan(-_LINEAR, _LINEAR, color="black", alpha=0.06, linewidth=0, label="range of values with mean 0, std 1")
    axes.set_xscale("symlog", linthresh=_LINEAR, linscale=1.5)
    axes.set_xlim(-_FAR, _FAR)
    ticks = (-100, -10, -3, -1, 0, 1, 3, 10, 100)
    axes.set_xticks(ticks, map(str, ticks), size=7)
    axes.set_xticks([], minor=True)
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.set_title("values that the network gets", size=8, loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.05), frameon=False, fontsize=8)


def draw_histogram(histogram: Histogram, threshold: float) -> str:
    """Draw the histogram of one tensor's |x|, with counts on a logarithmic scale, and the threshold of clipping.

    Returns an SVG element in the colours of the page around it. It is written here, one path a colour: Matplotlib takes
    40 ms for a figure, and a page has one for each tensor.
    """
    end = max(histogram.amax, threshold) or 1.0
    threshold /= end
    kept = np.linspace(0, threshold, max(round(_BARS * threshold), 1) + 1) if threshold else np.zeros(1)
    has_clipped = threshold < 1 and histogram.amax > 0
    clipped = np.linspace(threshold, 1, max(_BARS - kept.size, 1) + 1) if has_clipped else np.zeros(1)
    bars = {name: np.log1p(np.diff(histogram.below(x * end))) for name, x in (("counts", kept), ("clipped", clipped))}
    highest = max([1.0, *bars["counts"], *bars["clipped"]])
    paths = []
    for (name, heights), edges in zip(bars.items(), (kept, clipped), strict=True):
        steps = (f"V {1 - height / highest:.4g} H {x:.5g} " for height, x in zip(heights, edges[1:], strict=True))
        if heights.size:
            paths.append(f'<path d="M {edges[0]:.5g} 1 {"".join(steps)}V 1" style="fill: var(--{name})"/>')
    line = f'<path d="M {threshold:.5g} 1 V 0" style="stroke: var(--threshold)" vector-effect="non-scaling-stroke"/>'
    return (  # it fills the width of its cell
        f'<svg preserveAspectRatio="none" viewBox="0 0 1 1" overflow="visible">{"".join(paths)}{line}</svg>'
    )


def draw_over_time(
    progress: Sequence[Progress], title: str, amount: Callable[[Progress], float], most: float | None = None
) -> str:
    """Draw the growth of an amount a second as an SVG element in the colours of the page; `most` ends the axis."""
    chosen = np.unique(np.linspace(0, len(progress) - 1, _STEPS, dtype=int))
    states = [Progress(), *(progress[number] for number in chosen)]
    seconds = np.array([state.seconds for state in states])
    rates = np.diff([amount(state) for state in states]) / np.maximum(np.diff(seconds), 1e-9)
    figure = Figure((3.6, 1.9), layout="constrained")
    axes = figure.add_subplot()
    axes.stairs(rates, seconds, fill=True, color=_COLORS["counts"], linewidth=0, clip_on=False)
    axes.set_ylim(0, most or rates.max() * 1.05)
    axes.set_xlim(0, seconds[-1])
    axes.set_title(title, size=9, loc="left", color=_COLORS["text"])
    axes.set_xlabel("seconds", size=8, color=_COLORS["text"])
    _frame(axes)
    return _inline(figure)


def draw_curve(in_float: Sequence[int], kept: Sequence[float], title: str) -> str:
    """Draw what a network keeps with so many layers in float, as `draw_histogram` draws; infinite ends the axis."""
    figure = Figure((3.6, 1.9), layout="constrained")
    axes = figure.add_subplot()
    most = max((value for value in kept if np.isfinite(value)), default=1.0)
    drawn = np.clip(kept, 0, 1.05 * most)
    axes.plot(in_float, drawn, color=_COLORS["counts"], marker="o", markersize=4, linewidth=1, clip_on=False)
    axes.set_ylim(0, 1.05 * most)
    axes.set_xlim(0, max(1, *in_float))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, size=9, loc="left", color=_COLORS["text"])
    axes.set_xlabel("layers in float", size=8, color=_COLORS["text"])
    _frame(axes)
    return _inline(figure)


def _frame(axes: Axes) -> None:
    """Draw two axes in the colours of the page."""
    axes.tick_params(labelsize=8, color=_COLORS["lines"], labelcolor=_COLORS["text"])
    axes.spines[["right", "top"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_COLORS["lines"])


def _inline(figure: Figure) -> str:
    """Return a figure as an SVG element for a page, in the page's fonts and colours."""
    with rc_context({"svg.fonttype": "none"}):
        data = _saved(figure, "svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = re.sub(r'<g id="[^"]*">', "<g>", data.decode().partition("<svg ")[2])  # an id must be unique on a page
    for name, color in _COLORS.items():
        text = text.replace(color, f"var(--{name})")
    return "<svg " + text


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the font lacks the script of a name
        figure.savefig(file, format=kind, **options)
    return file.getvalue()
