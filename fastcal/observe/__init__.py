"""The network observed: batches run with every activation visible, histograms, scales."""

#: What `fastcal.calibrate` can run a network with; "auto" is TensorRT where it, CuPy and a GPU are, else ONNX Runtime.
ENGINES = ("auto", "tensorrt", "onnxruntime")
