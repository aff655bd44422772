"""A network gets the same values from fastcal as from the code that it was trained with."""

import importlib.util

import numpy as np
import onnxruntime
import pytest

from conftest import DIGITS
from fastcal import ImageFeed


@pytest.fixture(scope="module")
def prepare():
    """The function with which the sample's training code prepares an image."""
    specification = importlib.util.spec_from_file_location("prepare", DIGITS / "prepare.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.prepare


def test_the_sample_classifies_images_alike(prepare):
    session = onnxruntime.InferenceSession(DIGITS / "digits.onnx", providers=["CPUExecutionProvider"])
    paths = [path for folder in ("images", "test") for path in sorted((DIGITS / folder).rglob("*.jpg"))]
    with ImageFeed(paths, model=DIGITS / "digits.onnx", batch_size=32, device="cpu") as feed:
        fed = np.concatenate([session.run(None, batch)[0] for batch in feed])[: len(paths)]
    (trained,) = session.run(None, {"image": np.stack([prepare(path) for path in paths])})
    alike = np.mean(fed.argmax(1) == trained.argmax(1))
    difference = np.abs(fed - trained).max()
    print(f"{alike:.2%} of {len(paths)} images are classified alike; logits differ by {difference:.3f} at most")
    assert len(paths) == 256 + 450
    assert alike >= 0.995
