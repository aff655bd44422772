"""Write networks of other families, with random weights, to ONNX files for benchmarks/scales.py.

ShuffleNet V2 has Concat and channel shuffles, MobileNet V3 hard-swish and squeeze-and-excitation. Needs torchvision.

    python benchmarks/export.py FOLDER
"""

import sys
from pathlib import Path

import torch
from torchvision.models import mobilenet_v3_small, shufflenet_v2_x0_5

SHAPE = (4, 3, 128, 128)


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for make in (shufflenet_v2_x0_5, mobilenet_v3_small):
        torch.manual_seed(0)
        network = make().train()
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = None  # over all batches: otherwise the last layers have hardly any signal
        with torch.no_grad():
            for _ in range(30):
                network(torch.randn(16, *SHAPE[1:]))
        torch.onnx.export(
            network.eval(), torch.randn(SHAPE), str(folder / f"{make.__name__}.onnx"), opset_version=13, dynamo=False,
            input_names=["input"], output_names=["output"],
        )  # fmt: skip


if __name__ == "__main__":
    main()
