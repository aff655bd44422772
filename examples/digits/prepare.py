"""The preprocessing of digits.onnx's training, with PIL and NumPy."""

import numpy as np
from PIL import Image

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def prepare(path):
    """Return an image as torchvision's ImageNet preprocessing gives it at 32x32: a float32 array of (3, 32, 32)."""
    image = Image.open(path).convert("RGB").resize((36, 36), Image.Resampling.BILINEAR).crop((2, 2, 34, 34))
    return ((np.asarray(image, np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)
