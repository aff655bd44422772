"""The forms of a cache."""

import json
import struct

import numpy as np
import pytest

from conftest import DATA
from fastcal import CalibrationCache, FastcalError
from fastcal.algorithm import Algorithm
from fastcal.cache.record import Record
from fastcal.errors import CacheError

#: Tensor names that a careless reader or writer breaks, with scales whose 127-fold is no float32.
NAMES = {"a: b": 0.1, "(Unnamed Layer* 3) [Constant]_output": 0.0, "é": 1e-30, "/x/y_0": 3.0, "\udc80": 0.3}
SCALES = {name: struct.unpack("f", struct.pack("f", scale))[0] for name, scale in NAMES.items()}


@pytest.mark.parametrize("form", ["tensorrt", "json"])
def test_scales_are_the_same_in_every_form(tmp_path, form):
    for scales in (SCALES, CalibrationCache.load(DATA / "squeezenet1_1.entropy2.cache").scales):
        CalibrationCache(scales).save(tmp_path / "x", form=form)
        assert list(CalibrationCache.load(tmp_path / "x").scales.items()) == list(scales.items())


@pytest.mark.parametrize(
    "cache",
    [
        CalibrationCache({"x": 0.5}, "minmax", "8.6.1"),
        CalibrationCache({"x": 0.5}, Algorithm("percentile", 0.9999, 1.0), None),
    ],
)
def test_json_holds_all_of_a_cache(tmp_path, cache):
    cache.record = Record({"model": "0", "images": 3})
    cache.save(tmp_path / "x.json", form="json")
    read = CalibrationCache.load(tmp_path / "x.json")
    assert read == cache
    assert read.record == cache.record


def test_a_loaded_cache_has_its_record(tmp_path):
    cache = CalibrationCache({"x": 0.5}, record=Record({"model": "0"}))
    cache.save(tmp_path / "x.cache")
    assert CalibrationCache.load(tmp_path / "x.cache").record == cache.record
    CalibrationCache({"x": 0.25}).save(tmp_path / "x.cache")  # leaves the record of what was there before
    assert CalibrationCache.load(tmp_path / "x.cache").record is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "neither a calibration cache nor JSON"),
        ("{}", 'has no "scales"'),
        ('{"scales": [1]}', 'has no "scales"'),
        ('{"scales": {}, "scale": {}}', "it has 'scale'; a cache has not"),
        ('{"scales": {"x": "1"}}', "scale of 'x' is '1'; it must be a number"),
        ('{"scales": {"x": true}}', "scale of 'x' is True; it must be a number"),
        ('{"scales": {"x": -1}}', "scale of 'x' is -1; it must be a finite number from 0 on"),
        ('{"scales": {"x": NaN}}', "scale of 'x' is nan; it must be a finite"),
        ('{"scales": {"x": 1e39}}', "scale of 'x' is too large for a float32"),
        ('{"scales": {"x": 1' + 400 * "0" + "}}", "scale of 'x' is too large for a float32"),
        ('{"scales": {}, "algorithm": "kl"}', "there is no algorithm 'kl'; choose one of"),
        ('{"scales": {}, "algorithm": ["minmax"]}', r"there is no algorithm \['minmax'\]; choose one of"),
        ('{"scales": {}, "tensorrt_version": "11.0"}', "TensorRT 11.0 takes no calibration cache"),
        ('{"scales": {}, "tensorrt_version": 8}', ": 8 is not a TensorRT version"),
        ('{"scales": {}, "algorithm": "percentile", "cutoff": 1}', "needs its quantile and its cutoff"),
        (
            '{"scales": {}, "algorithm": "percentile", "cutoff": 1, "quantile": "1"}',
            "the quantile is '1'; it must be a number",
        ),
        (
            '{"scales": {}, "algorithm": "percentile", "quantile": 1, "cutoff": 1' + 400 * "0" + "}",
            "the cutoff is too large for a float64",
        ),
        (
            '{"scales": {}, "algorithm": "percentile", "quantile": 1e999, "cutoff": 1}',
            "the quantile is inf; it must be a finite number",
        ),
        ('{"scales": ' + 100_000 * "[", "neither a calibration cache nor JSON: maximum recursion depth"),
        ('{"scales": {}, "tensorrt_version": null}', "needs a TensorRT version"),
        ('{"scales": {}, "made_from": 1}', '"made_from" is no object'),
    ],
)
def test_json_that_is_no_cache_is_named(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(FastcalError, match=message) as raised:
        CalibrationCache.load(tmp_path / "x.json")
    assert str(raised.value).startswith(str(tmp_path / "x.json"))
    assert "\n" not in str(raised.value)


def test_what_a_form_cannot_hold(tmp_path):
    for scale in (float("nan"), float("inf"), -1.0):
        with pytest.raises(CacheError, match=r"the scale of 'x' is .*; it must be a finite number"):
            CalibrationCache({"x": scale}).save(tmp_path / "x", form="json")
    for form in ("tensorrt", "json"):
        for scale, message in (
            ("1", "is '1'; it must be a number"),
            (None, "is None; it must be a number"),
            (1e39, "is too large for a float32"),
            (10**400, "is too large for a float32"),
        ):
            with pytest.raises(FastcalError, match=f"^the scale of 'x' {message}$"):
                CalibrationCache({"x": scale}).save(tmp_path / "x", form=form)
    for form in ("tensorrt", "json"):
        for settings, message in (
            (("kl",), "there is no algorithm 'kl'; choose one of entropy2"),
            (("minmax", None), "algorithm minmax needs a TensorRT version"),
            (("minmax", "11.0"), "TensorRT 11.0 takes no calibration cache"),
            ((Algorithm("percentile", 10**400), None), "^the quantile is too large for a float64$"),
            ((Algorithm("percentile", 0.9999, "1"), None), "^the cutoff is '1'; it must be a number$"),
            ((Algorithm("percentile", float("nan")), None), "^the quantile is nan; it must be a finite number$"),
            ((Algorithm("percentile", 0.9999, np.float32("inf")), None), "^the cutoff is inf; it must be a finite"),
        ):
            with pytest.raises(FastcalError, match=message):
                CalibrationCache({"x": 1.0}, *settings).save(tmp_path / "x", form=form)
    with pytest.raises(FastcalError, match=r"there is no form 'yaml' of a cache; choose one of tensorrt, json$"):
        CalibrationCache({"x": 1.0}).save(tmp_path / "x", form="yaml")
    assert list(tmp_path.iterdir()) == []


def test_json_is_what_other_programs_read(tmp_path):
    CalibrationCache({"x": 0.5}, "entropy", "10.3.0").save(tmp_path / "x.json", form="json")
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "algorithm": "entropy",
        "tensorrt_version": "10.3.0",
        "scales": {"x": 0.5},
    }


@pytest.mark.parametrize("form", ["tensorrt", "json"])
def test_scales_may_be_numpys(tmp_path, form):
    for scale in (np.float32(0.1), np.array(0.1, np.float32)):
        CalibrationCache({"x": scale}).save(tmp_path / "x", form=form)
        assert CalibrationCache.load(tmp_path / "x").scales == {"x": float(scale)}


def test_json_may_leave_out_what_has_a_default(tmp_path):
    (tmp_path / "x.json").write_text('{"scales": {"x": 0.5}}')
    assert CalibrationCache.load(tmp_path / "x.json") == CalibrationCache({"x": 0.5}, "entropy2", "10.16.1")
