"""What PIL and NumPy make of an image: what the networks' trainers do."""

import numpy as np
from PIL import Image, ImageOps

from fastcal import Preprocess


def open_upright(path):
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


class Exact:
    """An image that PIL resizes as DALI does: exactly, and as if its last pixels went on for ever.

    PIL itself rounds and clips to 8 bits between rows and columns, and leaves out what lies beyond the edges.
    """

    beyond = 16

    def __init__(self, image):
        self.size = image.size
        self._image = image

    def resize(self, size, filter):
        pixels = np.asarray(self._image, np.float32)
        pixels = np.pad(pixels, ((self.beyond, self.beyond), (self.beyond, self.beyond), (0, 0)), "edge")
        box = [self.beyond, self.beyond, self.beyond + self.size[0], self.beyond + self.size[1]]
        planes = [Image.fromarray(pixels[..., channel]).resize(size, filter, box=box) for channel in range(3)]
        return Image.fromarray(np.clip(np.rint(np.dstack(planes)), 0, 255).astype(np.uint8))


def crop(image, size=(224, 224), fraction=0.875, filter=Image.Resampling.BILINEAR):
    """Resize(size / 0.875) and CenterCrop(size) as torchvision's source has them; for other than squares, as timm's."""
    short = [int(side / fraction) for side in size]
    width, height = image.size
    if short[0] / height >= short[1] / width:
        new = (int(short[0] * width / height), short[0])
    else:
        new = (short[1], int(short[1] * height / width))
    image = image.resize(new, filter)
    left, top = round((new[0] - size[1]) / 2), round((new[1] - size[0]) / 2)
    return np.asarray(image.crop((left, top, left + size[1], top + size[0])), np.float32)


def bilinear(pixels, height, width):
    """Bilinear resizing at half-pixel centres without antialiasing, as OpenCV's INTER_LINEAR."""
    for axis, size in ((0, height), (1, width)):
        place = np.clip((np.arange(size) + 0.5) * pixels.shape[axis] / size - 0.5, 0, pixels.shape[axis] - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, pixels.shape[axis] - 1)
        weight = (place - low).reshape(-1, 1, 1) if axis == 0 else (place - low).reshape(1, -1, 1)
        pixels = pixels.take(low, axis) * (1 - weight) + pixels.take(high, axis) * weight
    return pixels


def letterbox(image, size=(640, 640)):
    """Ultralytics' LetterBox, as its source has it."""
    width, height = image.size
    ratio = min(size[0] / height, size[1] / width)
    new_width, new_height = round(width * ratio), round(height * ratio)
    left, top = round((size[1] - new_width) / 2 - 0.1), round((size[0] - new_height) / 2 - 0.1)
    out = np.full((*size, 3), 114, np.float32)
    pixels = bilinear(np.asarray(image, np.float32), new_height, new_width)
    out[top : top + new_height, left : left + new_width] = np.rint(pixels)
    return out


def stretch(image, size=(224, 224), filter=Image.Resampling.BILINEAR):
    return np.asarray(image.resize(size[::-1], filter), np.float32)


def clip(image):
    return crop(image, fraction=1, filter=Image.Resampling.BICUBIC)


def stretch_to_bgr(image):
    return stretch(image)[..., ::-1]


#: By preset: what is done to the image, and how its values are brought back to 0..255: (value * std + mean) / scale.
PRESETS = {
    "imagenet": (crop, 1 / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "clip": (clip, 1 / 255, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "tf": (stretch, 1 / 127.5, 1, 1),
    "caffe": (stretch_to_bgr, 1, [103.939, 116.779, 123.68], 1),
    "yolo": (letterbox, 1 / 255, 0, 1),
    "unit": (stretch, 1 / 255, 0, 1),
    "raw": (stretch, 1, 0, 1),
}


def difference_from_preset(preset, values, image):
    """By how many levels of 255 what a preset made of an image differs from the reference, for each value."""
    reference, scale, mean, std = PRESETS[preset]
    assert values.shape == Preprocess.preset(preset).shape
    return np.abs((values.transpose(1, 2, 0) * std + mean) / scale - reference(image))
