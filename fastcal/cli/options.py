"""The options that several commands share, and the form in which typer takes them."""

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
from fastcal.cli.constants import read_constants
from fastcal.cli.terminal import Output, output
from fastcal.errors import DataError, FastcalError
from fastcal.feed import deepstream
from fastcal.feed.preprocess import PRESETS

if TYPE_CHECKING:
    from fastcal.model import Model

# The names of algorithms are written out in help texts: `fastcal.algorithm` imports NumPy, which would delay every
# command's start and keep the doctor from finding NumPy broken.
BackendOption = Annotated[
    str,
    typer.Option(
        help="What runs the network: onnxruntime, tensorrt, or auto (ONNX Runtime; but TensorRT before 11, if it and a "
        "GPU are present and ONNX Runtime cannot run the network there)."
    ),
]
QuantileOption = Annotated[float, typer.Option(help="For percentile: the share of values that is not clipped.")]
ExactOption = Annotated[
    bool, typer.Option("--exact", help="Clip outputs and tensors with a known range too, as TensorRT does.")
]
UntilStableOption = Annotated[
    float | None, typer.Option(metavar="PERCENT", help="Stop early once no scale moves by more than this any more.")
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="On the CPU: what the tensors of a segment of the network may take, 500M or 4G for instance.",
        show_default="2G, less if less is free",
    ),
]
HistogramsOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="The histograms, for other algorithms: reused if they are up to date, else written (.npz)."
    ),
]
TensorRTOption = Annotated[
    str | None,
    typer.Option(help="The TensorRT version that will read the cache.", show_default="the one installed, else 10.16.1"),
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        help="dla: make scales equal where NVIDIA's DLA needs it, and name the layers that it does not run in INT8.",
        show_default="a GPU",
    ),
]
ReportOption = Annotated[
    str | None, typer.Option(metavar="HTML", help="Write a page about the calibration, for a browser.")
]


@dataclass
class FeedOptions:
    """Options of every command that reads images: the model, the images, and how they become batches."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help="The ONNX model.")]
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Images: a folder, a pattern, a list file with one path a line, Ultralytics' data.yaml, COCO's JSON, "
            "tar shards or TFRecord files; NAME=DATA,NAME=DATA for several inputs. Or .npy or .npz files with arrays "
            "for the model.",
        ),
    ]
    preprocess: Annotated[
        str | None,
        typer.Option(
            help=f"The network's preprocessing: {', '.join(PRESETS)}, or a file that describes it.",
            show_default="the one that the model names, else imagenet",
        ),
    ] = None
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Size of the images, if the model's is dynamic.")] = (
        None
    )
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images in a batch.", show_default="the model's, else 128 on a GPU, 32 on the CPU"),
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
    seed: Annotated[int, typer.Option(help="The seed of --shuffle.")] = 0
    balance: Annotated[
        bool, typer.Option("--balance", help="Take images from each class (a folder in DATA) by turns, before --limit.")
    ] = False
    limit: Annotated[int | None, typer.Option(help="Use this many images at most.")] = None
    last_batch: Annotated[
        str | None,
        typer.Option(
            help="keep: the last batch may be smaller; wrap: complete it with the first images; drop: leave it out.",
            show_default="keep if the model's batch is dynamic, else wrap",
        ),
    ] = None
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be read or decoded.")
    ] = False
    max_unreadable: Annotated[
        float, typer.Option(metavar="PERCENT", help="With --skip-unreadable: fail if more than this are unreadable.")
    ] = 5.0
    constant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBERS",
            help="An input that is the same for every image: numbers (scale=1,1) or a .npy file; may be repeated.",
        ),
    ] = None
    threads: Annotated[int | None, typer.Option(help="Threads to use.", show_default="one per core")] = None

    #: The options that are for images and not for arrays.
    for_images: ClassVar[frozenset[str]] = frozenset(
        ["preprocess", "size", "key", "balance", "skip_unreadable", "max_unreadable"]
    )

    #: Whether --limit takes images from the whole list.
    spread: ClassVar[bool] = False

    def feed(self, network: "Model | None") -> "fastcal.Feed":
        """Return the images, or arrays, as batches for the model."""
        from fastcal.feed.dataset import are_arrays

        settings: dict[str, Any] = {
            "model": network, "batch_size": self.batch_size, "input_name": self.input_name, "shuffle": self.shuffle,
            "seed": self.seed, "limit": self.limit, "last_batch": self.last_batch,
            "spread": self.spread,
            "constants": read_constants(self.constant, network) if self.constant else None,
        }  # fmt: skip
        data = data_by_input(self.data, network)
        if isinstance(data, str) and not is_pipe(data) and are_arrays(data):
            if option := self.first_given(sorted(self.for_images)):
                raise FastcalError(f"{self.data} has arrays, which are taken as they are; {option} is for images")
            return fastcal.NumpyFeed(data, **settings)
        preprocess = self.preprocessing(network) if self.preprocess or self.size else None
        feed = fastcal.ImageFeed(
            data, preprocess=preprocess, key=self.key, balance=self.balance, skip_unreadable=self.skip_unreadable,
            max_unreadable=self.max_unreadable, threads=self.threads, **settings,
        )  # fmt: skip
        if self.size is not None and preprocess is not None:
            _check_size(preprocess.size, feed, self.model)
        return feed

    def preprocessing(self, network: "Model | None") -> fastcal.Preprocess:
        """Return the preprocessing of --preprocess and --size, by default the one that the network names itself."""
        from fastcal.feed.own_preprocess import choose_preprocess, preset_for

        if self.preprocess is None:
            preprocess, _ = choose_preprocess(network)
        elif self.preprocess not in PRESETS and self.preprocess.endswith((".toml", ".json", *deepstream.SUFFIXES)):
            preprocess = fastcal.Preprocess.load(self.preprocess)
        else:
            preprocess = preset_for(self.preprocess, network)
        if self.size is None:
            return preprocess
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", self.size)
        if match is None:
            raise FastcalError(f"--size {self.size} is not a size; write height x width, like 224x224")
        return replace(preprocess, size=(int(match[1]), int(match[2] or match[1])))

    def first_given(self, names: Iterable[str]) -> str | None:
        """Return the first of these options that is not at its default, as the command line has it."""
        defaults = {field.name: field.default for field in fields(self)}
        given = (name for name in names if getattr(self, name) != defaults[name])
        return next(("--" + name.replace("_", "-") for name in given), None)


@dataclass
class CalibrationOptions(FeedOptions):
    """Options of every command that calibrates: the model, the images, and how scales are picked."""

    algorithm: Annotated[
        str,
        typer.Option(
            help="How scales are picked: entropy2, entropy, minmax, percentile, mse, best. The first four are "
            "TensorRT's; mse has the least error; best tries all on images that are held out."
        ),
    ] = "entropy2"
    quantile: QuantileOption = 0.9999
    exact: ExactOption = False
    tf32: Annotated[bool, typer.Option("--tf32", help="On a GPU: run the network in TF32, which is faster.")] = False
    tactic_sources: Annotated[
        str | None, typer.Option(metavar="NAMES", help="TensorRT's sources of kernels, e.g. JIT_CONVOLUTIONS,CUDNN.")
    ] = None

    def for_tensorrt(self) -> dict[str, Any]:
        """Return the arguments for TensorRT of `calibrate` and `build_engine`."""
        tactic_sources = None if self.tactic_sources is None else self.tactic_sources.split(",")
        return {"tf32": self.tf32, "tactic_sources": tactic_sources}


@dataclass
class TuningOptions:
    """Options of every command that tunes."""

    float_share: Annotated[
        float,
        typer.Option(help="The share of the multiply-adds that may stay in float, where INT8 costs most; 0 for none."),
    ] = 0.15
    bias_correction: Annotated[
        bool,
        typer.Option(help="Take the mean shift of rounding out of the biases, if that keeps more."),
    ] = True
    depthwise: Annotated[
        bool,
        typer.Option(help="Run depthwise convolutions in INT8. TensorRT for RTX makes smaller engines without."),
    ] = True
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What to keep in float: a layer, a type of layers, or the layers that read a tensor; with patterns "
            "like '/model.22/*'; may be repeated.",
        ),
    ] = None

    def for_images(self) -> str | None:
        """Return the first option for images that is not at its default, as the command line has it."""
        if self.float_share != type(self).float_share:
            return "--float-share"
        return None if self.bias_correction else "--no-bias-correction"


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command as typer takes it: with fields in place of dataclasses, and those of `Output` at the end."""
    groups: dict[str, Any] = {}
    shown: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation
            shown += inspect.signature(groups[name], eval_str=True).parameters.values()
        else:
            shown.append(parameter)
    shown += inspect.signature(Output, eval_str=True).parameters.values()

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for field in fields(output):
            setattr(output, field.name, given.pop(field.name))
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in shown]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    return run


def data_by_input(data: str, network: "Model | None") -> str | dict[str, str]:
    """Return "left=left/,right=right/" as a dict if a name is an input of the network, else `data` as it is."""
    pairs = [part.partition("=") for part in data.split(",")]
    names = set() if network is None else set(network.input_names)
    is_named = all(equals for _, equals, _ in pairs) and any(name in names for name, _, _ in pairs)
    if not is_named or os.path.exists(data):
        return data
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise DataError(f"{data} names an input twice; give each input its data once")
    return {name: where for name, _, where in pairs}


def is_pipe(place: str) -> bool:
    """Return whether data are a list that can be read only once, from a shell's <(command) for instance."""
    return os.path.exists(place) and not os.path.isfile(place) and not os.path.isdir(place)


def read_memory(text: str | None) -> int | None:
    """Return --memory in bytes."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise FastcalError(f"--memory {text} is not a number of bytes; write 500M or 4G, for instance")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def _check_size(asked: tuple[int, int], feed: "fastcal.Feed", model: str) -> None:
    """Raise FastcalError if no input of the model has the size that was asked for: each has another fixed one."""
    one_or_more = feed.preprocess
    fitted = one_or_more.values() if isinstance(one_or_more, Mapping) else [one_or_more]
    sizes = {preprocess.size for preprocess in fitted if preprocess is not None}
    if asked not in sizes:
        theirs = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        raise FastcalError(f"{model} takes images of {theirs} alone; leave out --size {asked[0]}x{asked[1]}")


def check_outputs(
    network: "Model | None", outputs: Mapping[str, str | None], read: FeedOptions, data: str = "the data"
) -> None:
    """Raise FastcalError if one of the `outputs`, by role, would overwrite another, or a file that is read.

    The role "cache" stands for the cache and its record; `data` is the role of the data if they are one file.
    """
    from fastcal.cache.record import record_path

    paths = {role: path for role, path in outputs.items() if path is not None}
    if "cache" in paths:
        paths["cache's record"] = str(record_path(paths["cache"])) if paths["cache"] else ""
    roles = _roles(network, list(paths.values()), read, data)
    for role, path in paths.items():
        if not path:
            raise FastcalError(f"the name of the {role} is empty; name a file")
        other = roles.setdefault(os.path.realpath(path), f"the {role}")
        if other != f"the {role}":
            raise FastcalError(f"{path} is {other}; name another file for the {role}")


def _roles(network: "Model | None", outputs: Sequence[str], read: FeedOptions, data: str) -> dict[str, str]:
    """Return the roles of the files that are read, by real path; of the samples, only those that may be outputs."""
    roles = {os.path.realpath(path): "among the data" for path in _samples_like(outputs, read.data, network)}
    if network is not None:
        roles |= {os.path.realpath(path): "the model's external data" for path in network.external_files}
        roles[os.path.realpath(network.path)] = "the model itself"
    for path, role in ((read.preprocess or "", "the preprocessing"), (read.data, data)):
        if os.path.isfile(path):
            roles[os.path.realpath(path)] = role
    return roles


def _samples_like(outputs: Sequence[str], data: str, network: "Model | None") -> Iterator[str]:
    """Yield the samples' files that have the name of an existing output. Errors in the data are not reported here."""
    from fastcal.feed.dataset import FOR_ARRAYS, FOR_IMAGES, kind_of, list_files

    existing = [path for path in outputs if os.path.isfile(path)]
    names = {os.path.basename(place) for path in existing for place in (path, os.path.realpath(path))}
    in_folders = any(kind_of(name) is not None for name in names)
    by_input = data_by_input(data, network)
    for place in by_input.values() if isinstance(by_input, dict) else [by_input]:
        if not existing or is_pipe(place) or (os.path.isdir(place) and not in_folders):
            continue
        for kinds in (FOR_IMAGES, FOR_ARRAYS):
            with contextlib.suppress(FastcalError):
                yield from (path for path in list_files(place, kinds).paths if os.path.basename(path) in names)
