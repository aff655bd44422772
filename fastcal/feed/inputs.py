"""The samples and the preprocessing of each input of an `ImageFeed`, checked against the model."""

import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

from fastcal.batch import UNNAMED, Input, format_shape, is_repeated, shape_fits
from fastcal.errors import DataError, quoted
from fastcal.feed import dataset
from fastcal.feed.dataset import Data, Listing
from fastcal.feed.own_preprocess import choose_preprocess, preset_for
from fastcal.feed.preprocess import Preprocess
from fastcal.feed.shards import open_shards
from fastcal.feed.sources import Arrays, ImageFiles, ImageSource, Source
from fastcal.model import Model

_log = logging.getLogger("fastcal")

# The tar file in a sample's name. Without it, the name is that of the file, unpacked in the tar file's folder.
_TAR = re.compile(r"[^/]*\.tar:", re.IGNORECASE)


def name_inputs(
    data: Data | Mapping[str, Data], name: str | None, model: Model | None, constants: Collection[str] = ()
) -> dict[str, Data]:
    """Return the data by input; `name` is for data of one input, and `constants` are inputs that take no data."""
    if not isinstance(data, Mapping):
        if model is not None and name is not None:
            _input_of(model, name)
        elif model is not None:
            names = [value.name for value in model.inputs if value.name not in constants]
            if len(names) != 1:
                raise DataError(
                    f"{model.path} takes the inputs {_names_of(model)}; name the data of each (NAME=DATA,NAME=DATA, in "
                    "Python a dict), or the one that takes the images (input name)"
                )
            (name,) = names
        return {name or UNNAMED: data}
    if name is not None:
        raise DataError(f"input_name {name!r} is for data of one input; a dict of data names its inputs")
    if not data:
        raise DataError("there is no data; name at least one input and where its samples are")
    return dict(data)


def open_sources(
    data: Mapping[str, Data],
    key: str | Mapping[str, str] | None,
    *,
    shuffle: bool,
    seed: int,
    balance: bool,
    limit: int | None,
    spread: bool = False,
) -> dict[str, Source]:
    """Return the samples of each input, in order: those of one number belong together; see `fastcal.ImageFeed`."""
    keys = _by_input("key", key, data)
    in_order = None if shuffle or balance or spread else limit
    sources, found = {}, []
    for name, where in data.items():
        try:
            listing = dataset.list_files(where)
            sources[name] = _open_source(listing, limit=in_order, key=keys[name])
        except DataError as error:
            raise DataError(f"input {name!r}: {error}" if len(data) > 1 else str(error)) from error
        if listing.sorted:
            found.append(name)
    if not any(isinstance(source, ImageSource) for source in sources.values()):
        raise DataError(
            "the data are arrays alone; give one .npz file with the inputs' names (in Python a NumpyFeed takes these "
            "too), or name data with images too"
        )
    names = {name: source.names for name, source in sources.items()}
    dataset.check_parallel(names, found)
    first = next(iter(names.values()))
    files = [_TAR.sub("", name) for name in first] if balance else first
    numbers = dataset.order(files, shuffle=shuffle, seed=seed, balance=balance, limit=limit, spread=spread)
    if numbers != range(len(first)):
        sources = {name: source.take(numbers) for name, source in sources.items()}
    return sources


def _open_source(listing: Listing, *, limit: int | None, key: str | None) -> Source:
    if listing.kind in ("tar shard", "TFRecord"):
        return open_shards(listing.paths, limit, key, are_tar=listing.kind == "tar shard")
    if key is not None:
        raise DataError(f"key {key!r} is for tar shards and TFRecord, not for {listing.paths[0]}; leave it out")
    return ImageFiles(listing.paths) if listing.kind == "image" else Arrays.of(listing.paths)


def fit_preprocesses(
    sources: Mapping[str, Source],
    preprocess: str | Preprocess | Mapping[str, str | Preprocess] | None,
    model: Model | None,
) -> dict[str, Preprocess]:
    """Return the preprocessing for each input that takes images, with size and layout of the model's input."""
    images = {name: source for name, source in sources.items() if isinstance(source, ImageSource)}
    preprocesses = {}
    chosen, line = choose_preprocess(model) if preprocess is None else (preprocess, "")
    for name, wanted in _by_input("preprocess", chosen, images).items():
        fitted = preset_for(wanted, model) if isinstance(wanted, str) else wanted
        if model is not None:
            fitted = _fit(fitted, model, _input_of(model, name))
        if remark := fitted.remark:
            _log.warning("%s", remark)
        if fitted.bits == 8 and (deep := images[name].first_of_16_bits()):
            _log.warning(
                "%s has 16 bits a channel, and 8 of them are kept; to keep all, set bits to 16 in the preprocessing",
                deep,
            )
        preprocesses[name] = fitted
    if line:
        _log.info("%s", line)
    return preprocesses


def _fit(preprocess: Preprocess, model: Model, value: Input) -> Preprocess:
    """Return the preprocessing with the form of an input that takes images."""
    if value.dtype.kind != "f" and value.dtype != "uint8":
        raise DataError(
            f"{model.path} takes {value.dtype} for input {value}, images are prepared as float32 or uint8; feed it "
            "arrays instead, .npy files for instance"
        )
    try:
        fitted = preprocess.fit(value.shape, value.dtype)
    except DataError as error:
        raise DataError(f"{model.path}, input {value}: {error}") from error
    if fitted.dtype != preprocess.dtype:
        _log.info("input %r takes uint8: it gets the pixels as they are, for the network to normalize", value.name)
    return fitted


def fixed_batch_size(model: Model | None, preprocesses: Mapping[str, Preprocess]) -> int | None:
    """Return the batch size of the model's first input that takes images; None if it is dynamic or not known."""
    return None if model is None else _input_of(model, next(iter(preprocesses))).shape[0]


def has_dynamic_batch(model: Model | None, sources: Mapping[str, Source]) -> bool:
    """Return whether all inputs that take samples have a dynamic first dimension in the model."""
    return model is not None and all(_input_of(model, name).shape[:1] == (None,) for name in sources)


def repeated_constants(model: Model | None, constants: Mapping[str, Any]) -> frozenset[str]:
    """Return the constants that have the values of one sample, to be repeated for every sample of a batch."""
    inputs = () if model is None else model.inputs
    return frozenset(value.name for value in inputs if is_repeated(value, constants))


def check_inputs(
    model: Model | None, sources: Mapping[str, Source], constants: Mapping[str, Any], batch_size: int
) -> None:
    """Check names, shapes and types of arrays and constants against the model.

    A feed of one input alone is not checked: the others may come from elsewhere.
    """
    for name in constants.keys() & sources.keys():
        raise DataError(f"input {name!r} takes samples; it cannot be a constant too")
    if model is None or len(sources) + len(constants) == 1:
        return
    given = sources.keys() | constants.keys()
    missing = [value.name for value in model.inputs if value.name not in given]
    if missing:
        raise DataError(
            f"{model.path} takes the inputs {_names_of(model)}, the feed has none for {quoted(missing)}; name data or "
            "constants for it"
        )
    arrays = {name: ((batch_size, *source.shape), source.dtype) for name, source in sources.items()
              if isinstance(source, Arrays)}  # fmt: skip
    arrays |= {name: (values.shape, values.dtype) for name, values in constants.items()}
    for name, (shape, dtype) in arrays.items():
        value = _input_of(model, name)
        if not shape_fits(value.shape, shape) or dtype != value.dtype:
            raise DataError(
                f"{model.path} takes {value.dtype} for input {value}, the arrays are {dtype} {format_shape(shape)}; "
                "give arrays of that type and shape"
            )


def _input_of(model: Model, name: str) -> Input:
    for value in model.inputs:
        if value.name == name:
            return value
    raise DataError(f"{model.path} takes the inputs {_names_of(model)}, and none of the name {name!r}")


def _names_of(model: Model) -> str:
    return quoted(value.name for value in model.inputs)


def _by_input(what: str, value: Any, names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value for each input; a value that is not given by input is for all."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    if value.keys() != names.keys():
        raise DataError(f"{what} is given for {quoted(value)}, images for {quoted(names)}; name the same inputs")
    return {name: value[name] for name in names}
