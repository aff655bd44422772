"""Write networks of other families, with random weights, to ONNX files for other benchmarks.

For benchmarks/scales.py: ShuffleNet V2 has Concat and channel shuffles, MobileNet V3 hard-swish and
squeeze-and-excitation. For benchmarks/engines.py, with a dynamic batch: MobileNet V2 and ResNet-50. Needs torchvision.

    python benchmarks/export.py FOLDER
"""

import sys
from pathlib import Path

import onnx
import torch
from networks import resnet50
from torchvision.models import mobilenet_v2, mobilenet_v3_small, shufflenet_v2_x0_5


def export(make, shape, path, **options):
    torch.manual_seed(0)
    network = make().train()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # over all batches: otherwise the last layers have hardly any signal
    with torch.no_grad():
        for _ in range(30):
            network(torch.randn(16, *shape[1:]))
    torch.onnx.export(
        network.eval(), torch.randn(shape), path, opset_version=13, dynamo=False,
        input_names=["input"], output_names=["output"], **options,
    )  # fmt: skip


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for make in (shufflenet_v2_x0_5, mobilenet_v3_small):
        export(make, (4, 3, 128, 128), str(folder / f"{make.__name__}.onnx"))
    batch = {"input": {0: "batch"}, "output": {0: "batch"}}
    export(mobilenet_v2, (1, 3, 224, 224), str(folder / "mobilenet_v2.onnx"), dynamic_axes=batch)
    onnx.save(resnet50(), folder / "resnet50.onnx")


if __name__ == "__main__":
    main()
