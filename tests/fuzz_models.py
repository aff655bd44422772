"""Mutated models, caches and records through everything that reads them: each ends well or in an error of fastcal's.

The test suite does this with few; all of it is run by hand:

    python tests/fuzz_models.py [--models 20000] [--caches 20000]
"""

import argparse
import faulthandler
import logging
import math
import random
import resource
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

import fastcal
from fastcal.cache.record import Record
from fastcal.model import Model

DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "digits.onnx"

#: Functions, subgraphs, constant expressions and a plugin in one model.
VARIED = """<ir_version: 9, opset_import: ["" : 17, "local" : 1, "TRT" : 1]>
f (float[2, 4] x) => (float[2, 4] y) {
  a = local.Dense<slope = 0.5>(x, w)
  s = ReduceSum<keepdims = 0>(a)
  c = Cast<to = 9>(s)
  b = If(c) <then_branch = t () => (float[2, 4] t) { t = MatMul(a, w) },
             else_branch = e () => (float[2, 4] e) { e = Relu(a) }>
  h = Cast<to = 10>(w)
  g = Cast<to = 1>(h)
  d = MatMul(b, g)
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


def go_through(folder, originals, ways, use, count, seed):
    """Use so many mutated files; return the number of each ending, and print the faults."""
    endings = Counter()
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        original = originals[number % len(originals)]
        data = chance.choice(ways)(original, chance)
        kind, fault = try_one(use, folder / "mutated.onnx", data)
        endings[kind] += 1
        if fault:
            endings["fault"] += 1
            print(f"seed {seed}, number {number}: {fault}", flush=True)
    return endings


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=20000)
    parser.add_argument("--caches", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    faulthandler.enable()
    logging.getLogger("fastcal").setLevel(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = [DIGITS.read_bytes(), varied().SerializeToString(), with_external_data(folder)]
        ways = [change_bytes, structure_first, structure_first, change_fields]
        for label, *rest in (
            ("models", models, ways, read_model, arguments.models),
            ("caches", list(cache_files(folder)), [change_bytes], read_cache, arguments.caches),
        ):
            start = time.perf_counter()
            endings = go_through(folder, *rest, arguments.seed)
            print(f"{label}: {dict(endings)}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
