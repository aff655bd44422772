"""`fastcal preview`: a sheet of images as the network gets them."""

from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar

import typer

import fastcal
from fastcal.cli.options import FeedOptions, check_outputs
from fastcal.cli.terminal import finish, say, terminal
from fastcal.files import check_writable


@dataclass(kw_only=True)
class PreviewOptions(FeedOptions):
    """Options of `preview`: the images, and perhaps their model."""

    model: Annotated[
        str,
        typer.Option(metavar="MODEL", help="The ONNX model; decides size, layout and channels.", show_default="none"),
    ] = ""
    batch_size: Annotated[int | None, typer.Option(hidden=True)] = 1  # never completes a last batch
    limit: Annotated[int, typer.Option(help="Show this many images at most, spread over all.")] = 24

    spread: ClassVar[bool] = True
    for_images: ClassVar[frozenset[str]] = FeedOptions.for_images - {"preprocess"}  # arrays have been preprocessed, too


def preview(
    *,
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="SHEET", help="The sheet to draw: a .png, .jpg, .webp, .pdf or .svg file."
        ),
    ],
    options: PreviewOptions,
) -> None:
    """Draw images as the network gets them, to check their preprocessing."""
    with terminal():
        make_preview = fastcal.preview  # raises an error if a package is missing
        from fastcal.model import Model
        from fastcal.report.plots import check_picture

        check_picture(output)
        network = Model(options.model) if options.model else None
        check_outputs(network, {"sheet": output}, options)
        check_writable(output, 1)
        with options.feed(network) as feed:
            preprocess = None if feed.preprocess else options.preprocessing(network)
            sheet = make_preview(feed, preprocess=preprocess, count=options.limit)
        sheet.save(output)
        for line in (*sheet.notes(), *map(str, sheet.channels)):
            say(line)
        finish(
            sheet=output, images=len(sheet.names), preprocess=str(sheet.preprocess), outside=sheet.outside,
            channels=[asdict(channel) for channel in sheet.channels],
        )  # fmt: skip
