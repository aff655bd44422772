"""`fastcal preview`: images as the network gets them, on a sheet."""

from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar

import typer

import fastcal
from fastcal.cli.options import FeedOptions, check_outputs
from fastcal.cli.terminal import finish, say, terminal
from fastcal.files import check_writable


@dataclass(kw_only=True)
class PreviewOptions(FeedOptions):
    """What `preview` asks for: images, and what they are for where it is there already."""

    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="The ONNX model that takes the images: gives size, layout, channels.",
            show_default="none",
        ),
    ] = ""
    batch_size: Annotated[int | None, typer.Option(hidden=True)] = 1  # so that no batch has to be completed
    limit: Annotated[int, typer.Option(help="Show this many images at most.")] = 24

    for_images: ClassVar[frozenset[str]] = FeedOptions.for_images - {"preprocess"}  # arrays were made with one too


def preview(
    *,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="SHEET", help="Where to draw: .png, .jpg, .webp, .pdf or .svg.")
    ],
    options: PreviewOptions,
) -> None:
    """Draw images on a sheet as the network gets them, to see whether their preprocessing is right."""
    with terminal():
        make_preview = fastcal.preview  # fails now where what it needs is not installed
        from fastcal.model import Model
        from fastcal.report.plots import check_picture

        check_picture(output)
        network = Model(options.model) if options.model else None
        check_outputs(network, {"sheet": output}, options)
        check_writable(output, 1)
        feed = options.feed(network)
        with feed:
            sheet = make_preview(feed, preprocess=options.preprocessing(), count=options.limit)
        sheet.save(output)
        for line in (*sheet.notes(), *map(str, sheet.channels)):
            say(line)
        finish(
            sheet=output,
            images=len(sheet.names),
            preprocess=str(sheet.preprocess),
            outside=sheet.outside,
            channels=[asdict(channel) for channel in sheet.channels],
        )
