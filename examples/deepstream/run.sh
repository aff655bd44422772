#!/bin/sh
# Write the cache that config_infer_primary.txt names, from model.onnx and images/ in this folder. If DeepStream is
# installed, let its nvinfer build the INT8 engine from both and run it on a test picture; else say what to copy.
#
# Variable: TENSORRT, the version of the TensorRT that DeepStream uses (`dpkg -l libnvinfer*`).
set -eu
cd "$(dirname "$0")"
fastcal calibrate model.onnx images/ --preprocess config_infer_primary.txt --tensorrt "${TENSORRT:-10.3.0}"
if ! command -v gst-launch-1.0 > /dev/null; then
  echo "run.sh: no GStreamer here; copy model.onnx, model.cache and config_infer_primary.txt to the machine with DeepStream"
  exit
fi
gst-launch-1.0 -q nvstreammux name=mux batch-size=1 width=1280 height=720 \
  ! nvinfer config-file-path=config_infer_primary.txt ! fakesink \
  videotestsrc num-buffers=10 ! nvvideoconvert ! 'video/x-raw(memory:NVMM),format=NV12' ! mux.sink_0
