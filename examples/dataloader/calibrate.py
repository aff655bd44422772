"""Write a calibration cache from the PyTorch DataLoader of an evaluation."""

import argparse
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

import fastcal

DIGITS = Path(__file__).parent.parent / "digits"
sys.path.append(str(DIGITS))
from prepare import prepare  # noqa: E402 - the preprocessing of the training

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--output", default="digits.cache")
parser.add_argument("--workers", default=2, type=int)
options = parser.parse_args()


class Digits(Dataset):
    """Images of digits, prepared as in training, and their labels."""

    def __init__(self, folder):
        self.paths = sorted(folder.rglob("*.jpg"))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path = self.paths[index]
        return torch.from_numpy(prepare(path)), int(path.parent.name)


loader = DataLoader(Digits(DIGITS / "images"), batch_size=32, num_workers=options.workers)
# The loader gives (images, labels). The model has one input, so the labels are left out.
cache = fastcal.calibrate(DIGITS / "digits.onnx", loader)
cache.save(options.output)
print(f"{options.output}: {len(cache.scales)} scales from {len(loader.dataset)} images")
