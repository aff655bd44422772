"""Mutated files of nine kinds through everything that reads them: each ends well, or in one line that says why.

The exit status is 1 if one does not. No file that was there before may be gone or changed, except an output that was
written whole. The test suite does this with few; all of it is run by hand:

    python tests/fuzz.py [--kind models] [--count 50000] [--seed 1]
"""

import argparse
import faulthandler
import io
import json
import logging
import math
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from PIL import Image
from typer.testing import CliRunner

import fastcal
from conftest import as_in_a_new_process
from fastcal import ImageFeed, NumpyFeed, Preprocess
from fastcal.algorithm import Algorithm
from fastcal.cache.record import Record, read_record, record_path
from fastcal.calibration import Calibration
from fastcal.cli import app
from fastcal.feed.own_preprocess import choose_preprocess
from fastcal.model import Model
from fastcal.observe.backends import OnnxRuntimeBackend

#: The name of an array for the digits sample.
ARRAY = "digits.npy"

DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "digits.onnx"

#: What takes the place of words of a text.
TOKENS = [
    *(b"-1", b"0", b"1e999", b"nan", b"null", b"true", b'"x"', b'""', b"[]", b"{}", b"[[1]]", b"9" * 20, b"\xff"),
    *(b":", b",", b"]", b"}", b"\n", b"=", b"[", b"{", b"- ", b"&a ", b"*a", b"!!binary ", b"/", b".."),
]

#: Functions, subgraphs, constant expressions and a plugin in one model.
VARIED = """<ir_version: 9, opset_import: ["" : 17, "local" : 1, "TRT" : 1]>
f (float[2, 4] x) => (float[2, 4] y) {
  a = local.Dense<slope = 0.5>(x, w)
  s = ReduceSum<keepdims = 0>(a)
  c = Cast<to = 9>(s)
  b = If(c) <then_branch = t () => (float[2, 4] t) { t = MatMul(a, w) },
             else_branch = e () => (float[2, 4] e) { e = Relu(a) }>
  yes = Constant<value = bool {1}>()
  r = If(yes) <then_branch = t2 () => (float[2, 4] u) { v = Relu(b) u = MatMul(v, w) },
               else_branch = e2 () => (float[2, 4] u) { u = Neg(b) }>
  h = Cast<to = 10>(w)
  g = Cast<to = 1>(h)
  d = MatMul(r, g)
  q = DequantizeLinear<axis = 1>(stored, scales)
  y = Gemm(d, q)
  p = TRT.Plugin(y)
}
<domain: "local", opset_import: ["" : 17]>
Dense<slope>(i, w) => (o) { m = MatMul(i, w) o = LeakyRelu<alpha: float = @slope>(m) }"""


def varied():
    """The model VARIED with its weights."""
    model = onnx.parser.parse_model(VARIED)
    values = np.random.default_rng(0).normal(size=(4, 4)).astype("f4")
    arrays = {"w": values, "stored": (40 * values).astype("i1"), "scales": np.full(4, 0.025, "f4")}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return model


def with_external_data(folder):
    """A model in two files; the bytes of the first."""
    path = folder / "external.onnx"
    onnx.save(varied(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path.read_bytes()


def messages(message):
    """The message and all messages within."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in value if hasattr(value, "append") or hasattr(value, "add") else [value]:
                yield from messages(each)


def change_fields(data, chance):
    """The model with some fields cleared, repeated, or set to other values of their types."""
    model = onnx.ModelProto.FromString(data)
    everything = list(messages(model))
    for _ in range(chance.randint(1, 4)):
        message = chance.choice(everything)
        fields = [field for field, _ in message.ListFields() if field.message_type is None] or [None]
        field = chance.choice(fields)
        if field is None or chance.random() < 0.2:
            names = [each.name for each, _ in message.ListFields()]
            if names:
                message.ClearField(chance.choice(names))
            continue
        other = {
            field.CPPTYPE_STRING: chance.choice(["", "x", "w", "Conv", "a\nb", "\u00e9"]),
            field.CPPTYPE_FLOAT: chance.choice([0.0, float("nan"), 1e38]),
        }.get(field.cpp_type, chance.choice([0, 1, 2, 7, 99, 2**31 - 1]))
        other = other.encode() if field.type == field.TYPE_BYTES else other
        try:
            value = getattr(message, field.name)
            if hasattr(value, "append"):
                value[chance.randrange(len(value))] = other
            else:
                setattr(message, field.name, other)
        except (ValueError, TypeError):  # not a value of an enumeration
            message.ClearField(field.name)
    return model.SerializeToString()


def change_bytes(data, chance):
    """The data cut off, with bytes or bits changed, or with a part left out or repeated."""
    changed = bytearray(data)
    way = chance.randrange(5)
    if way == 0:
        return data[: chance.randrange(len(data))]
    if way == 1:
        first, last = sorted(chance.randrange(len(data)) for _ in range(2))
        last = min(last, first + chance.choice([1, 4, 100]))
        changed[first:last] = [] if chance.random() < 0.5 else changed[first:last] * 2
        return bytes(changed)
    for _ in range(chance.randint(1, 8)):
        place = chance.randrange(len(data))
        changed[place] = changed[place] ^ 1 << chance.randrange(8) if way == 2 else chance.randrange(256)
    return bytes(changed)


def structure_first(data, chance):
    """`change_bytes` of a model where its text is, not its weights: within runs of printable characters."""
    places = [at for at in range(len(data) - 4) if data[at : at + 4].isalpha()] or [0]
    at = chance.choice(places)
    changed = bytearray(data)
    for offset in range(-3, chance.randint(-2, 6)):
        if 0 <= at + offset < len(data):
            changed[at + offset] = chance.randrange(256)
    return bytes(changed)


def read_model(path):
    """Use a model in every way; raise what comes of it."""
    shapes = {value.name: tuple(size or 2 for size in value.shape) for value in Model(path).inputs}
    if sum(map(math.prod, shapes.values())) > 10**6:
        return
    batches = [{name: np.ones(shape, "f4") for name, shape in shapes.items()}]
    cache = fastcal.CalibrationCache(dict.fromkeys(["x", "a", "b", "d", "y", "image"], 0.1))
    errors = []
    for use in (
        lambda: fastcal.check_cache(cache, path),
        lambda: fastcal.quantize(path, fastcal.calibrate(path, batches, backend="onnxruntime", threads=1)),
        lambda: fastcal.compare(path, batches, threads=1),
    ):
        try:
            use()
        except fastcal.FastcalError as error:
            errors.append(error)
    for error in errors:
        raise error


def read_cache(path):
    """Use a cache, or a record, in every way."""
    cache = fastcal.CalibrationCache.load(path)
    fastcal.check_cache(cache, DIGITS)
    fastcal.diff_caches(cache, fastcal.CalibrationCache({"image": 0.1}))
    for form in ("json", "tensorrt"):
        cache.save(path.with_name(f"written.{form}"), form=form)
        written = fastcal.CalibrationCache.load(path.with_name(f"written.{form}"))
        assert written.scales == cache.scales
        assert written.header == cache.header


def cache_files(folder):
    """The bytes of caches in each form."""
    record = Record({"model": "0", "images": 3})
    for algorithm, version in (("entropy2", "8.6.1"), ("percentile", None)):
        cache = fastcal.CalibrationCache({"image": 0.1, "a: b": 1e-3, "zero": 0.0}, algorithm, version, record=record)
        for form in ("tensorrt", "json"):
            cache.save(folder / "cache", form=form)
            yield (folder / "cache").read_bytes()


#: So many of the images are as PIL wrote them.
INTACT = 20


def encoded_images(extension):
    """Encoded images of 90x60 in the ways that the format has of storing them."""
    coarse = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    rgb = Image.fromarray(coarse).resize((90, 60), Image.Resampling.BICUBIC)
    grey = rgb.convert("L")
    alpha = rgb.copy()
    alpha.putalpha(grey)
    palette = rgb.quantize(32)
    cmyk = rgb.convert("CMYK")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6
    ways = {
        "jpg": [
            (rgb, {}),
            (rgb, {"progressive": True}),
            (grey, {}),
            (cmyk, {}),
            (rgb, {"exif": turned}),
        ],
        "png": [(rgb, {}), (palette, {}), (deep, {}), (alpha, {}), (rgb, {"exif": turned})],
        "bmp": [(rgb, {}), (palette, {}), (grey, {})],
        "webp": [(rgb, {}), (rgb, {"lossless": True}), (alpha, {"lossless": True}), (rgb, {"exif": turned})],
        "tiff": [(rgb, {}), (grey, {}), (deep, {}), (rgb, {"exif": turned})]
        + [(rgb, {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")],
        "jp2": [(rgb, {}), (rgb, {"irreversible": True}), (grey, {}), (alpha, {})],
        "ppm": [(rgb, {}), (grey, {})],
    }
    for image, options in ways[extension]:
        encoded = io.BytesIO()
        image.save(encoded, Image.registered_extensions()[f".{extension}"], **options)
        yield encoded.getvalue()


#: The formats, by their extensions.
FORMATS = ("jpg", "png", "bmp", "webp", "tiff", "jp2", "ppm")


def mutate_image(data, random):
    """The data cut off, with bits or bytes changed anywhere or in the header, or with a part left out or twice."""
    changed = bytearray(data)
    way = random.integers(5)
    if way == 0:
        return data[: random.integers(len(data))]
    if way < 4:
        reach = min(len(data), 64) if way == 3 else len(data)
        for place in random.integers(0, reach, random.integers(1, 12)):
            changed[place] = changed[place] ^ 1 << random.integers(8) if way == 1 else random.integers(256)
        return bytes(changed)
    first, last = np.sort(random.integers(0, len(data), 2))
    changed[first:last] = [] if random.integers(2) else changed[first:last] * 2
    return bytes(changed)


def write_images(folder, extension, count, seed):
    """So many images, of which every `INTACT`-th is intact; returns the intact ones' paths."""
    intact = []
    encoded = list(encoded_images(extension))
    for number in range(count):
        path = folder / f"{number:05}.{extension}"
        data = encoded[number // INTACT % len(encoded)]
        if number % INTACT:
            data = mutate_image(encoded[number % len(encoded)], np.random.default_rng([seed, number]))
        else:
            intact.append(str(path))
        path.write_bytes(data)
    return intact


def read_images(folder, intact):
    """Go through a folder twice and see that all is as it should be; returns how many images were skipped."""
    with ImageFeed(
        folder, preprocess=Preprocess(size=(32, 32), resize="crop"), batch_size=16, skip_unreadable=True,
        max_unreadable=100, device="cpu",
    ) as feed:  # fmt: skip
        sums = [[float(batch["input"].sum(dtype=np.float64)) for batch in feed] for _ in range(2)]
        assert len(sums[0]) == len(feed) == -((len(feed.skipped) - len(feed.paths)) // 16)
        assert np.isfinite(sums[0]).all()
        assert not set(intact) & set(feed.skipped)
        return len(feed.skipped)


def change_text(data, chance):
    """The text with some of its words, numbers and marks replaced, left out or repeated."""
    tokens = re.findall(rb'"[^"\n]*"|[\w.+-]+|\s+|.', data)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(tokens))
        tokens[at] = chance.choice([*TOKENS, b"", tokens[at] * 2, chance.choice(tokens)])
    return b"".join(tokens)


def change_head(data, chance):
    """`change_text` of the first 128 bytes, a header, or `change_bytes` of the first or last 200."""
    if chance.random() < 0.5:
        return change_text(data[:128], chance) + data[128:]
    if chance.random() < 0.5:
        return change_bytes(data[:200], chance) + data[200:]
    return data[:-200] + change_bytes(data[-200:], chance)


def run_command(folder, *words):
    """Run the command line with an output; if the command fails, an earlier output must stay."""
    output = folder / "written.onnx"
    output.write_bytes(b"before")
    with as_in_a_new_process(None, None):
        run = CliRunner().invoke(app, [*map(str, words), "-o", str(output)])
    if run.exception is not None and not isinstance(run.exception, SystemExit):
        raise run.exception
    if run.exit_code == 0:
        assert output.stat().st_size > 6
    else:
        assert output.read_bytes() == b"before", "the output is lost"
    assert run.exit_code in (0, 1, 2), run.output


def read_record_file(path):
    """Use a record, of the cache "model.cache" beside it, in every way."""
    cache_path = path.with_name("model.cache")
    data = cache_path.read_bytes()
    cache = fastcal.CalibrationCache.load(cache_path)
    found = read_record(cache_path, data)
    fastcal.check_cache(cache, DIGITS)
    if found is not None:
        Record.of({"images": 3}, "0", x=1).differences(found)
        fastcal.diff_caches(cache, cache)
    with fastcal.ArrayFeed([np.ones((1, 3, 32, 32), "f4")], model=DIGITS) as feed:
        kept, reason = Calibration(feed, Algorithm(), Model(DIGITS), OnnxRuntimeBackend(), "8.6.1").reuse(cache_path)
    assert (kept is None) == bool(reason)
    assert "\n" not in reason
    fastcal.quantize(DIGITS, cache_path)


def read_list_file(path):
    """Go through the files that a list names."""
    with ImageFeed(path, preprocess=Preprocess(size=(8, 8)), batch_size=2, device="cpu") as feed:
        feed.describe()
        assert len(feed) > 0


def read_array_file(path):
    """Go through the samples of a `.npy` or `.npz` file."""
    with NumpyFeed(path, model=DIGITS, batch_size=2, device="cpu") as feed:
        feed.describe()
        assert sum(len(batch["image"]) for batch in feed) == feed.samples


def read_preprocess_file(path):
    """Use a file that describes a preprocessing, by itself and beside a model."""
    errors = []
    for use in (lambda: Preprocess.load(path), lambda: choose_preprocess(Model(path.with_name("digits.onnx")))[0]):
        try:
            str(use())
        except fastcal.FastcalError as error:
            errors.append(error)
    for error in errors:
        raise error


def with_digits(folder):
    """Put a model, a cache of it with a record, and some images into a folder."""
    shutil.copy(DIGITS, folder)
    cache = fastcal.calibrate(DIGITS, [np.ones((1, 3, 32, 32), "f4")], backend="onnxruntime", tensorrt_version="8.6.1")
    cache.save(folder / "model.cache")
    np.save(folder / ARRAY, np.random.default_rng(0).standard_normal((4, 3, 32, 32), dtype="f4"))
    for place in ("images/val", "images/train"):
        (folder / place).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / place / f"{number}.png")


def record_files(folder):
    """A record, and the name it must have."""
    yield "model.cache.json", record_path(folder / "model.cache").read_bytes()


def list_files(folder):
    """Lists of each form, with names."""
    names = [f"images/val/{number}.png" for number in range(3)]
    yield "plain.txt", "\n".join(names).encode()
    yield "labels.txt", "\n".join(f"{name} {number}" for number, name in enumerate(names)).encode()
    yield "table.csv", "\n".join(["path,label", *(f"{name},cat" for name in names)]).encode()
    yield "utf16.txt", "\n".join(names).encode("utf-16")
    coco = {"images": [{"file_name": name, "id": 1, "width": 8} for name in names], "annotations": []}
    yield "instances_val.json", json.dumps(coco).encode()
    yield "data.yaml", b"path: .\ntrain: images/train\nval: [images/val, images/train]\nnames: {0: cat, 1: dog}\n"


def array_files(folder):
    """Arrays of the model's input in each form, with names."""
    images = np.zeros((3, 3, 32, 32), "f4")
    for name, save in (("a.npy", np.save), ("a.npz", np.savez), ("c.npz", np.savez_compressed)):
        arrays = {} if name == "a.npy" else {"image": images, "label": np.arange(3)}
        save(folder / name, *([] if arrays else [images]), **arrays)
        yield name, (folder / name).read_bytes()


def histogram_files(folder):
    """Histograms of the digits sample over the array that `with_digits` makes, with a name."""
    with NumpyFeed(folder / ARRAY, model=DIGITS) as feed:
        fastcal.calibrate(DIGITS, feed, backend="onnxruntime", histograms=folder / "h.npz")
    yield "mutated.npz", (folder / "h.npz").read_bytes()


def read_histograms_file(path):
    """Pick scales from histograms, or from new ones."""
    with NumpyFeed(path.with_name(ARRAY), model=DIGITS) as feed:
        fastcal.calibrate(DIGITS, feed, algorithm="minmax", backend="onnxruntime", histograms=path, threads=1)


def tuning_files(folder):
    """A tuning of the digits sample, with a name."""
    with NumpyFeed(folder / ARRAY, model=DIGITS) as feed:
        fastcal.tune(DIGITS, feed, float_share=0.5).save(folder / "t.json")
    yield "mutated.json", (folder / "t.json").read_bytes()


def read_tuning_file(path):
    """Quantize with a tuning."""
    fastcal.quantize(DIGITS, path)


def preprocess_files(folder):
    """Files that describe a preprocessing, with the names they must have."""
    own = {"size": [32, 32], "resize": "crop", "crop_fraction": 0.875, "scale": 0.0039, "mean": [0.4, 0.5, 0.6]}
    hugging_face = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "do_resize": True,
        "resample": 2, "do_rescale": True, "rescale_factor": 0.00392, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    timm = {
        "architecture": "resnet18", "pretrained_cfg": {
            "input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 0.95, "mean": [0.5] * 3,
            "std": [0.2] * 3, "crop_mode": "center",
        },
    }  # fmt: skip
    yield "own.json", json.dumps(own).encode()
    yield "own.toml", b'preset = "imagenet"\nsize = [32, 32]\nmean = [1, 2.5, 3]\nresize = "letterbox"\nfill = 114\n'
    yield "preprocessor_config.json", json.dumps(hugging_face).encode()
    yield "config.json", json.dumps(timm).encode()


@dataclass(frozen=True)
class Kind:
    """A kind of files: its originals with their names, the ways to mutate them, their reader, and a command.

    `command` is given the folder and the file; it runs for every `rarely`-th file.
    """

    originals: Callable[[Path], Sequence[tuple[str, bytes]]]
    ways: Sequence[Callable[[bytes, random.Random], bytes]]
    use: Callable[[Path], None]
    command: Callable[[Path, Path], Sequence[object]]
    rarely: int = 50


def model_files(folder):
    """Models, with a name."""
    for data in (DIGITS.read_bytes(), varied().SerializeToString(), with_external_data(folder)):
        yield "mutated.onnx", data


KINDS = {
    "models": Kind(
        model_files, [change_bytes, structure_first, structure_first, change_fields], read_model,
        lambda folder, path: ("quantize", path, folder / "images", "--threads", 1, "--quiet"), 100,
    ),
    "caches": Kind(
        lambda folder: [("mutated.cache", data) for data in cache_files(folder)], [change_bytes, change_text],
        read_cache, lambda folder, path: ("cache", "convert", path),
    ),
    "records": Kind(
        record_files, [change_bytes, change_text, change_text], read_record_file,
        lambda folder, path: ("quantize", folder / "digits.onnx", folder / "model.cache"),
    ),
    "lists": Kind(
        list_files, [change_bytes, change_text, change_text], read_list_file,
        lambda folder, path: ("calibrate", folder / "digits.onnx", path, "--threads", 1, "--quiet"), 200,
    ),
    "arrays": Kind(
        array_files, [change_bytes, change_head, change_head], read_array_file,
        lambda folder, path: ("calibrate", folder / "digits.onnx", path, "--threads", 1, "--quiet"), 200,
    ),
    "histograms": Kind(
        histogram_files, [change_bytes] * 9 + [lambda data, chance: data], read_histograms_file,
        lambda folder, path: ("calibrate", DIGITS, folder / ARRAY, "--histograms", path, "--quiet"), 100,
    ),
    "tunings": Kind(
        tuning_files, [change_bytes, change_text, change_text], read_tuning_file,
        lambda folder, path: ("quantize", folder / "digits.onnx", path, "--quiet"),
    ),
    "preprocessing": Kind(
        preprocess_files, [change_bytes, change_text, change_text], read_preprocess_file,
        lambda folder, path: (
            "calibrate", folder / "digits.onnx", folder / "images", "--threads", 1, "--quiet", "--preprocess", path
        ), 200,
    ),
}  # fmt: skip

#: The share of each kind among all, in percent; images are the rest.
SHARES = {
    "models": 12, "caches": 20, "records": 16, "lists": 16, "arrays": 8, "histograms": 4, "tunings": 4,
    "preprocessing": 12, "images": 8,
}  # fmt: skip


def try_one(use, path, data):
    """Return the kind of ending, with the traceback if it is one that nobody expects."""
    path.write_bytes(data)
    try:
        use(path)
    except fastcal.FastcalError as error:
        text = str(error)
        return type(error).__name__, "" if text and "\n" not in text else f"not one line: {text!r}"
    except Exception:
        return "traceback", traceback.format_exc()
    return "fine", ""


def contents(folder):
    """The size and the time of change of every file in a folder, by path; written files are left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("written."))
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def go_through(folder, kind, count, seed):
    """Use so many mutated files of a kind; return the number of each ending, and print the faults."""
    endings = Counter()
    with_digits(folder)
    originals = list(kind.originals(folder))
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        name, original = originals[number % len(originals)]
        data, path = chance.choice(kind.ways)(original, chance), folder / name

        def use(path, number=number):
            kind.use(path)
            if number % kind.rarely == 0:
                run_command(folder, *kind.command(folder, path))

        before = contents(folder)
        before.pop(path, None)
        ending, fault = try_one(use, path, data)
        after = contents(folder)
        if path.read_bytes() != data or after.pop(path) is None or after != before:
            fault += f"lost or changed: {before.items() ^ after.items()}"
        if name != record_path("model.cache").name:
            path.unlink()
        endings[ending] += 1
        if fault:
            endings["fault"] += 1
            print(f"seed {seed}, number {number}: {fault}", flush=True)
    return endings


def go_through_images(folder, count, seed):
    """Use about so many mutated images of each format in a feed, 1000 at a time; return the number of each ending."""
    endings = Counter()
    for extension in FORMATS:
        for first in range(0, count // len(FORMATS) + 1, 1000):
            place = folder / f"{extension} {first}"
            place.mkdir()
            each = min(1000, count // len(FORMATS) + 1 - first)
            intact = write_images(place, extension, -(-each * INTACT // (INTACT - 1)), seed * 10**6 + first)
            before = contents(place)
            try:
                skipped = read_images(place, intact)
            except Exception:
                endings["fault"] += 1
                print(f"seed {seed}, {place.name}: {traceback.format_exc()}", flush=True)
                continue
            if contents(place) != before:
                endings["fault"] += 1
                print(f"seed {seed}, {place.name}: lost or changed", flush=True)
            endings["skipped"] += skipped
            endings["fine"] += len(before) - len(intact) - skipped
            shutil.rmtree(place)
    return endings


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=list(SHARES), action="append", help="by default all; may be repeated")
    parser.add_argument("--count", type=int, default=50000, help="mutated files of all kinds together")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")  # ONNX's evaluator of constants warns of damaged ones
    logging.getLogger("fastcal").setLevel(logging.CRITICAL)
    kinds = {kind: SHARES[kind] for kind in arguments.kind or SHARES}
    faults = 0
    for kind, share in kinds.items():
        start = time.perf_counter()
        count = arguments.count * share // sum(kinds.values())
        # DALI keeps the addresses that a damaged header asks for, 18 GiB and more, and threads need some too.
        most = resource.RLIM_INFINITY if kind == "images" else 16 * 2**30
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        with tempfile.TemporaryDirectory() as folder:
            if kind == "images":
                endings = go_through_images(Path(folder), count, arguments.seed)
            else:
                endings = go_through(Path(folder), KINDS[kind], count, arguments.seed)
        print(f"{kind}: {dict(endings)}, {time.perf_counter() - start:.0f} s", flush=True)
        faults += endings["fault"]
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
