"""Train the classifier in digits.onnx on scikit-learn's handwritten digits, and draw the images beside it.

The 8x8 grey digits (UCI Optical Recognition of Handwritten Digits, CC BY 4.0) are drawn as 40x40 JPEG files, in a warm
ink on a cool paper. Like photographs, they have three channels that must not be swapped, and a file format to decode.
The network takes ImageNet's preprocessing at 32x32.

    pip install torch onnx numpy pillow scikit-learn
    python train.py
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from prepare import prepare
from sklearn.datasets import load_digits
from torch import nn

HERE = Path(__file__).parent
CALIBRATION_IMAGES = 256


def draw(digit, random):
    """Return a 40x40 image of a digit, an 8x8 array of values from 0 to 16."""
    ink = random.integers([170, 60, 20], [256, 130, 90])
    paper = random.integers([20, 70, 140], [100, 150, 230])
    strength = Image.fromarray(np.uint8(digit / 16 * 255)).resize((32, 32), Image.Resampling.BICUBIC)
    canvas = Image.new("L", (40, 40))
    canvas.paste(strength, tuple(random.integers(2, 7, 2)))
    alpha = np.asarray(canvas, np.float32)[..., None] / 255
    return Image.fromarray(np.uint8(np.rint(alpha * ink + (1 - alpha) * paper)))


class Block(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Block(16, 32),
        nn.MaxPool2d(2),
        Block(32, 48),
        nn.AvgPool2d(8),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


def write_images(folder, digits, labels, random):
    for index, (digit, label) in enumerate(zip(digits, labels, strict=True)):
        path = HERE / folder / str(label) / f"{index:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(digit, random).save(path, quality=90)


def read_images(folder):
    paths = sorted((HERE / folder).rglob("*.jpg"))
    images = torch.from_numpy(np.stack([prepare(path) for path in paths]))
    return images, torch.tensor([int(path.parent.name) for path in paths])


def train(images, labels, epochs=60):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    batches = len(images) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * batches)
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for batch in order[: batches * 64].reshape(batches, 64):
            shift = tuple(int(value) for value in torch.randint(-2, 3, (2,)))
            loss = nn.functional.cross_entropy(model(torch.roll(images[batch], shift, (2, 3))), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main():
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    data = load_digits()
    order = random.permutation(len(data.images))
    tested, trained = order[:450], order[450:]
    write_images("test", data.images[tested], data.target[tested], random)
    write_images("training", data.images[trained], data.target[trained], random)
    model = train(*read_images("training"))
    images, labels = read_images("test")
    with torch.no_grad():
        print(f"top-1 of {len(labels)} test images: {(model(images).argmax(1) == labels).float().mean():.4f}")
    for index, path in enumerate(sorted((HERE / "training").rglob("*.jpg"), key=lambda path: path.name)):
        if index < CALIBRATION_IMAGES:  # a random choice of all digits, since `order` is random
            target = HERE / "images" / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        else:
            path.unlink()
    for folder in [*(HERE / "training").iterdir(), HERE / "training"]:
        folder.rmdir()
    torch.onnx.export(
        model,
        (images[:2],),
        HERE / "digits.onnx",
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=17,  # the newest that TensorRT 8.6 reads
        dynamo=False,
    )


if __name__ == "__main__":
    main()
