"""A network observed: a backend runs it over batches and keeps a histogram of every tensor."""

#: The backends that `fastcal.calibrate` takes. "auto" is TensorRT if it, CuPy and a GPU are present, else ONNX Runtime.
BACKENDS = ("auto", "tensorrt", "onnxruntime")
