"""The options that several commands have, and how typer is shown them."""

import contextlib
import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

import fastcal
from fastcal.algorithm import ALGORITHMS
from fastcal.cli.terminal import Output, output
from fastcal.errors import FastcalError
from fastcal.feed.preprocess import PRESETS
from fastcal.observe import BACKENDS

if TYPE_CHECKING:
    from fastcal.model import Model

BackendOption = Annotated[
    str, typer.Option(help=f"What runs the network: {', '.join(BACKENDS)} (TensorRT where it and a GPU are).")
]
QuantileOption = Annotated[float, typer.Option(help="For percentile: the share of values that is not clipped.")]
UntilStableOption = Annotated[
    float | None, typer.Option(metavar="PERCENT", help="Stop when no scale moves by more than this any longer.")
]
ReportOption = Annotated[
    str | None, typer.Option(metavar="HTML", help="Write a page about the calibration, for a browser.")
]


@dataclass
class FeedOptions:
    """What every command that reads images asks for: the model, the images, and how they become batches."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help="The ONNX model.")]
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A folder of images, a pattern, a list file with one image path a line, tar shards, TFRecord files; "
            "for several inputs NAME=DATA,NAME=DATA; or .npy or .npz files with what the model takes.",
        ),
    ]
    preprocess: Annotated[
        str,
        typer.Option(help=f"What the network was trained with: {', '.join(PRESETS)}, or a file that describes it."),
    ] = "imagenet"
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Size to prepare images in, where the model's is dynamic.")
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images in a batch.", show_default="the model's, else 32"),
    ] = None
    input_name: Annotated[str | None, typer.Option(help="The input that takes the images.")] = None
    key: Annotated[
        str | None,
        typer.Option(
            help="In shards: the images' extension in tar files, or their TFRecord feature.",
            show_default="any image, image/encoded",
        ),
    ] = None
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Shuffle the images before --limit.")] = False
    seed: Annotated[int, typer.Option(help="Decides the shuffled order.")] = 0
    balance: Annotated[
        bool, typer.Option("--balance", help="Take images by turns from each class, a folder of DATA, before --limit.")
    ] = False
    limit: Annotated[int | None, typer.Option(help="Use this many images at most.")] = None
    last_batch: Annotated[
        str, typer.Option(help="wrap: complete the last batch with the first images; drop: leave it out.")
    ] = "wrap"
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Go on without images that cannot be read or decoded.")
    ] = False
    max_unreadable: Annotated[
        float, typer.Option(metavar="PERCENT", help="With --skip-unreadable: fail if more than this are unreadable.")
    ] = 5.0
    threads: Annotated[int | None, typer.Option(help="Threads to use.", show_default="one per core")] = None

    #: The options that arrays do not have.
    for_images: ClassVar[frozenset[str]] = frozenset(
        ["preprocess", "size", "key", "balance", "skip_unreadable", "max_unreadable"]
    )

    def feed(self, network: "Model | None") -> "fastcal.ImageFeed | fastcal.NumpyFeed":
        """The images, or arrays, as batches for the model."""
        from fastcal.feed.dataset import are_arrays

        data = _by_input(self.data, network)
        if isinstance(data, str) and are_arrays(data):
            return self._array_feed(network)
        preprocess = self.preprocessing()
        feed = fastcal.ImageFeed(
            data,
            preprocess=preprocess,
            model=network,
            batch_size=self.batch_size,
            input_name=self.input_name,
            key=self.key,
            shuffle=self.shuffle,
            seed=self.seed,
            balance=self.balance,
            limit=self.limit,
            last_batch=self.last_batch,
            skip_unreadable=self.skip_unreadable,
            max_unreadable=self.max_unreadable,
            threads=self.threads,
        )
        if self.size is not None:
            _check_size(preprocess.size, feed, self.model)
        return feed

    def preprocessing(self) -> fastcal.Preprocess:
        """How images are prepared, or arrays were."""
        return _preprocess(self.preprocess, self.size)

    def first_given(self, names: Iterable[str]) -> str | None:
        """The first of these options that is not at its default, as it is written on the command line."""
        defaults = {field.name: field.default for field in fields(self)}
        given = (name for name in names if getattr(self, name) != defaults[name])
        return next(("--" + name.replace("_", "-") for name in given), None)

    def _array_feed(self, network: "Model | None") -> "fastcal.NumpyFeed":
        if option := self.first_given(sorted(self.for_images)):
            raise FastcalError(f"{self.data} has arrays, which are taken as they are; {option} is for images")
        return fastcal.NumpyFeed(
            self.data,
            model=network,
            batch_size=self.batch_size,
            input_name=self.input_name,
            shuffle=self.shuffle,
            seed=self.seed,
            limit=self.limit,
            last_batch=self.last_batch,
        )


@dataclass
class CalibrationOptions(FeedOptions):
    """What every command that calibrates asks for: the model, its images, and how scales are picked."""

    algorithm: Annotated[str, typer.Option(help=f"How scales are picked: {', '.join(ALGORITHMS)}.")] = "entropy2"
    quantile: QuantileOption = 0.9999
    tf32: Annotated[bool, typer.Option("--tf32", help="On a GPU: run the network in TF32, which is faster.")] = False
    tactic_sources: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Where TensorRT takes kernels from, e.g. JIT_CONVOLUTIONS,CUDNN."),
    ] = None

    def for_tensorrt(self) -> dict[str, Any]:
        """What `calibrate` and `build_engine` are told for TensorRT."""
        tactic_sources = None if self.tactic_sources is None else self.tactic_sources.split(",")
        return {"tf32": self.tf32, "tactic_sources": tactic_sources}


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command as typer is shown it.

    The fields of its parameters that are dataclasses stand in their place, as parameters; after all of them come
    --quiet and --json, which decide what `fastcal.cli.terminal` prints.
    """
    groups: dict[str, Any] = {}
    shown: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if is_dataclass(parameter.annotation):
            group: Any = parameter.annotation
            groups[parameter.name] = group
            inner = inspect.signature(group, eval_str=True).parameters.values()
            shown += [field.replace(kind=inspect.Parameter.KEYWORD_ONLY) for field in inner]
        else:
            shown.append(parameter)
    last = inspect.signature(Output, eval_str=True).parameters.values()
    shown += [field.replace(kind=inspect.Parameter.KEYWORD_ONLY) for field in last]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for field in fields(output):
            setattr(output, field.name, given.pop(field.name))
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    return run


def data_rows(feed: "fastcal.ImageFeed | fastcal.NumpyFeed", progress: fastcal.Progress) -> dict[str, str]:
    """What a summary says of the data that were calibrated with."""
    used = data_used(feed, progress)
    preprocess, skipped = used.pop("preprocess", None), used.pop("skipped", [])
    ((kind, count),) = used.items()
    rows = {kind: f"{count} in {progress.batches} batches of {feed.batch_size}"}
    if skipped:
        rows[kind] += f"; {len(skipped)} skipped as unreadable"
    return rows if preprocess is None else rows | {"prepared": preprocess}


def data_used(feed: "fastcal.ImageFeed | fastcal.NumpyFeed", progress: fastcal.Progress) -> dict[str, Any]:
    """How many images or samples were calibrated with, which were not, and how images were prepared."""
    used = progress.images if feed.samples is None else min(feed.samples, progress.images)
    if feed.preprocess is None:
        return {"samples": used}
    prepared = str(feed.preprocess)
    if isinstance(feed.preprocess, Mapping):
        prepared = "; ".join(f"{name}: {preprocess}" for name, preprocess in feed.preprocess.items())
    return {"images": used, "skipped": feed.skipped, "preprocess": prepared}


def check_outputs(
    network: "Model | None", outputs: Mapping[str, str | None], read: FeedOptions, data: str = "the data"
) -> None:
    """Fail now if one file would be written over another, or over one that is read.

    Args:
        network: The model that is read.
        outputs: The files to write, by what each is. A cache to write is called "cache", and comes with its record.
        read: What else is read.
        data: What that is where it is one file.
    """
    from fastcal.cache.record import record_path

    taken: dict[str, str] = {}
    existing = [path for path in outputs.values() if path and os.path.isfile(path)]
    if existing:
        names = {os.path.basename(place) for path in existing for place in (path, os.path.realpath(path))}
        samples = (path for path in _samples(read.data, network, existing) if os.path.basename(path) in names)
        taken |= {os.path.realpath(path): "among the data" for path in samples}
    if network is not None:
        taken |= {os.path.realpath(path): "the model's external data" for path in network.external_files}
        taken[os.path.realpath(network.path)] = "the model itself"
    for source, what in ((read.preprocess, "the preprocessing"), (read.data, data)):
        if os.path.isfile(source):
            taken[os.path.realpath(source)] = what
    cache = outputs.get("cache")
    for what, place in {**outputs, "cache's record": cache and str(record_path(cache))}.items():
        if place is None:
            continue
        if not place:
            raise FastcalError(f"the name of the {what} is empty; name a file")
        other = taken.setdefault(os.path.realpath(place), f"the {what}")
        if other != f"the {what}":
            raise FastcalError(f"{place} is {other}; name another file for the {what}")


def _samples(data: str, network: "Model | None", outputs: Sequence[str]) -> Iterator[str]:
    """The files that samples come from, as far as outputs may be among them: what is wrong with them is said later."""
    from fastcal.feed.dataset import FOR_ARRAYS, kind_of, list_files

    by_input = _by_input(data, network)
    may_be_found = any(kind_of(path) is not None for path in outputs)
    for each in by_input.values() if isinstance(by_input, dict) else [by_input]:
        is_pipe = os.path.exists(each) and not os.path.isfile(each) and not os.path.isdir(each)  # to be read once
        if not is_pipe and (may_be_found or not os.path.isdir(each)):
            with contextlib.suppress(FastcalError):
                yield from list_files(each).paths
            with contextlib.suppress(FastcalError):
                yield from list_files(each, FOR_ARRAYS).paths


def _by_input(data: str, network: "Model | None") -> str | dict[str, str]:
    """The data of each input where `data` is "left=left/,right=right/" and these are inputs of the network."""
    pairs = [part.partition("=") for part in data.split(",")]
    names = set() if network is None else {value.name for value in network.inputs}
    is_named = all(equals for _, equals, _ in pairs) and any(name in names for name, _, _ in pairs)
    if not is_named or os.path.exists(data):
        return data
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise FastcalError(f"{data} names an input twice; give each input its data once")
    return {name: where for name, _, where in pairs}


def _check_size(asked: tuple[int, int], feed: "fastcal.ImageFeed", model: str) -> None:
    """Fail where no input of the model is of the size that was asked for: each has one of its own."""
    one_or_more = feed.preprocess
    fitted = one_or_more.values() if isinstance(one_or_more, Mapping) else [one_or_more]
    sizes = {preprocess.size for preprocess in fitted if preprocess is not None}
    if asked not in sizes:
        theirs = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        raise FastcalError(f"{model} takes images of {theirs} alone; leave out --size {asked[0]}x{asked[1]}")


def _preprocess(name: str, size: str | None) -> fastcal.Preprocess:
    is_file = name not in PRESETS and os.path.splitext(name)[1] in (".toml", ".json")
    preprocess = fastcal.Preprocess.load(name) if is_file else fastcal.Preprocess.preset(name)
    if size is None:
        return preprocess
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", size)
    if match is None:
        raise FastcalError(f"--size {size} is not a size; write height x width, like 224x224")
    return replace(preprocess, size=(int(match[1]), int(match[2] or match[1])))
