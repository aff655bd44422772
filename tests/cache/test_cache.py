import os
import struct

import pytest

from conftest import DATA
from fastcal import CalibrationCache, FastcalError
from fastcal.algorithm import Algorithm
from fastcal.versions import check_tensorrt_version


@pytest.mark.parametrize(
    ("name", "algorithm"), [("squeezenet1_1.entropy2.cache", "entropy2"), ("squeezenet1_1.minmax.cache", "minmax")]
)
def test_what_tensorrt_wrote_is_read_and_written_back(name, algorithm, tmp_path):
    cache = CalibrationCache.load(DATA / name)
    assert (cache.algorithm.name, cache.tensorrt_version) == (algorithm, "8.6.0")
    assert len(cache.scales) == 91
    assert cache.scales["features.12.squeeze.bias"] == 0
    cache.save(tmp_path / "again.cache")
    assert (tmp_path / "again.cache").read_text().split() == (DATA / name).read_text().split()


def test_a_scale_is_the_hex_of_a_float32():
    line = (DATA / "squeezenet1_1.entropy2.cache").read_text().splitlines()[1]
    assert line == "input: 3d180ff6"
    scale = CalibrationCache.load(DATA / "squeezenet1_1.entropy2.cache").scales["input"]
    assert scale == struct.unpack(">f", bytes.fromhex("3d180ff6"))[0]


def test_small_scales_lose_their_leading_zeros():
    text = CalibrationCache({"zero": 0.0, "tiny": struct.unpack(">f", b"\0\0\x01\x02")[0]}).to_bytes().decode()
    assert text.splitlines()[1:] == ["zero: 0", "tiny: 102"]


@pytest.mark.parametrize(
    ("version", "number"),
    [
        ("5.1.5", "5105"),
        ("6.0.1", "6001"),
        ("7.2.3", "7203"),
        ("8.6.0", "8600"),
        ("8.6.1", "8601"),
        ("10.3.0", "100300"),
        ("10.16.1", "101601"),
        ("10.3", "100300"),
    ],
)
def test_version_numbers(version, number):
    cache = CalibrationCache({"x": 1.0}, "entropy", version)
    assert cache.header == f"TRT-{number}-EntropyCalibration"
    assert CalibrationCache.from_bytes(cache.to_bytes()).tensorrt_version == check_tensorrt_version(version)


def test_a_post_release_of_tensorrt_is_its_release():
    assert check_tensorrt_version("10.14.1.48.post1") == "10.14.1"


@pytest.mark.parametrize("version", ["11.0.0", "4.0.1", "8.61", "ten", "10", "", "10.x.1"])
def test_versions_without_calibration(version):
    with pytest.raises(FastcalError, match="TensorRT"):
        check_tensorrt_version(version)


def test_legacy_header():
    cache = CalibrationCache({"x": 1.0}, Algorithm("percentile", 0.9999, 1.0), None)
    assert cache.header == "0 3ff0000000000000 3fefff2e48e8a71e"
    assert CalibrationCache.from_bytes(cache.to_bytes()) == cache


def test_names_with_colons_spaces_and_brackets():
    scales = {"(Unnamed Layer* 3) [Constant]_output": 0.0, "a: b": 0.5, "é": 0.25}
    assert CalibrationCache.from_bytes(CalibrationCache(scales).to_bytes()).scales == scales


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "its first line is ''"),
        (b"hello\nx: 0\n", "its first line is 'hello'"),
        (b"TRT-8600-NoSuchCalibration\n", "its first line is"),
        (b"TRT-10300-EntropyCalibration2\n", "its first line is"),
        (b"0 7ff8000000000000 3fefff2e48e8a71e\n", "its first line is"),
        (b"0 3ff0000000000000 fff0000000000000\n", "its first line is"),
        (b"TRT-4001-EntropyCalibration2\nx: 0\n", "TensorRT 4.0.1 takes no calibration cache; only 5.x to 10.x do"),
        (b"TRT-110000-EntropyCalibration2\n", "TensorRT 11.0.0 takes no calibration cache"),
        (b"\x80\x00\xff", "is not a TensorRT calibration cache: its first line is"),
        (b"TRT-8600-EntropyCalibration2\nx: 3c010a14\ny 3c010a14\n", "line 3: 'y 3c010a14'"),
        (b"TRT-8600-EntropyCalibration2\nx: 3c010a14f\n", "line 2"),
        (b"TRT-8600-EntropyCalibration2\nx: zz\n", "line 2"),
    ],
)
def test_what_is_no_cache_is_named(tmp_path, data, message):
    path = tmp_path / "broken.cache"
    path.write_bytes(data)
    with pytest.raises(FastcalError, match=message) as raised:
        CalibrationCache.load(path)
    assert str(path) in str(raised.value)


def test_a_missing_cache_is_named(tmp_path):
    with pytest.raises(FastcalError, match=r"cannot read calibration cache .*none.cache: No such file"):
        CalibrationCache.load(tmp_path / "none.cache")


def test_saving_replaces_a_file_and_keeps_a_link(tmp_path):
    (tmp_path / "real.cache").write_text("old")
    (tmp_path / "link.cache").symlink_to("real.cache")
    CalibrationCache({"x": 1.0}).save(tmp_path / "link.cache")
    assert (tmp_path / "link.cache").is_symlink()
    assert CalibrationCache.load(tmp_path / "real.cache").scales == {"x": 1.0}
    assert sorted(os.listdir(tmp_path)) == ["link.cache", "real.cache"]


def test_a_name_that_the_form_cannot_hold(tmp_path):
    cache = CalibrationCache({"two\nlines: 1": 1.0})
    with pytest.raises(FastcalError, match=r"tensor 'two\\nlines: 1' has a line end in its name: rename it, or save"):
        cache.save(tmp_path / "x.cache")
    assert not list(tmp_path.iterdir())
    cache.save(tmp_path / "x.json", form="json")
    assert CalibrationCache.load(tmp_path / "x.json").scales == cache.scales


@pytest.mark.parametrize("encode", [
    lambda text: text.encode("utf-8-sig"),
    lambda text: text.replace("\n", "\r\n").encode(),
    lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
    lambda text: text.encode("utf-16"),
    lambda text: b"\xfe\xff" + text.replace("\n", "\r\n").encode("utf-16-be"),
    lambda text: (text + "\n\n").encode(),
])  # fmt: skip
@pytest.mark.parametrize("form", ["tensorrt", "json"])
@pytest.mark.parametrize("algorithm", ["minmax", "percentile"])
def test_files_that_an_editor_or_a_shell_has_written_anew(tmp_path, encode, form, algorithm):
    version = "7.1.3" if algorithm == "minmax" else None
    cache = CalibrationCache({"data": 0.0078125, "a: \u00e9": 0.5}, algorithm, version)
    cache.save(tmp_path / "c", form=form)
    (tmp_path / "c").write_bytes(encode((tmp_path / "c").read_text()))
    read = CalibrationCache.load(tmp_path / "c")
    assert read == cache
    read.save(tmp_path / "again", form="tensorrt")
    assert (tmp_path / "again").read_bytes() == cache.to_bytes()
