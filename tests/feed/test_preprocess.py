import pytest

from fastcal.errors import FastcalError
from fastcal.feed.preprocess import Preprocess


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resize": "squash"}, "no resize 'squash'; choose one of stretch, crop, letterbox"),
        ({"channels": "RGBA"}, "no channels 'RGBA'; choose one of RGB, BGR, GRAY"),
        ({"layout": "CHW"}, "no layout 'CHW'; choose one of NCHW, NHWC"),
        ({"size": (0, 5)}, r"size \(0, 5\)"),
        ({"size": (5,)}, r"size \(5,\)"),
        ({"crop_fraction": 0}, "crop_fraction 0"),
        ({"fill": 300}, "fill 300"),
        ({"mean": (1.0, 2.0)}, "mean .* has 2 values, RGB needs 1 or 3"),
        ({"std": (1.0, 0.0, 1.0)}, "std .* has a 0"),
        ({"scale": 0.0}, "scale"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(FastcalError, match=message):
        Preprocess(**values)


def test_an_unknown_preset_is_named():
    with pytest.raises(FastcalError, match="no preset 'imagnet'; choose one of imagenet, yolo, unit, raw"):
        Preprocess.preset("imagnet")


def test_it_fits_itself_to_an_image_input():
    unit = Preprocess.preset("unit")
    assert unit.fit((None, 3, 96, 128)).shape == (3, 96, 128)
    assert unit.fit((4, 96, 128, 3)).shape == (96, 128, 3)
    assert unit.fit((1, 1, 28, 28)).channels == "GRAY"
    assert unit.fit((None, 3, None, None)).size == unit.size


@pytest.mark.parametrize("shape", [(4, 3), (4, 10, 10), (1, 4, 8, 8), (1, 5, 8, 8, 3)])
def test_an_input_that_takes_no_images(shape):
    with pytest.raises(FastcalError, match="takes no images"):
        Preprocess.preset("unit").fit(shape)


def test_a_mean_for_other_channels_than_the_networks():
    with pytest.raises(FastcalError, match=r"mean .* has 3 values, GRAY needs 1"):
        Preprocess.preset("imagenet").fit((1, 1, 28, 28))


def test_it_prints_what_it_does():
    assert str(Preprocess.preset("imagenet")) == (
        "crop 0.875 to 224x224, RGB, (x * 0.00392157 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225], NCHW"
    )
    assert str(Preprocess(resize="letterbox", size=(8, 9))) == "letterbox 114 to 8x9, RGB, (x * 1 - 0) / 1, NCHW"
