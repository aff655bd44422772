#!/bin/sh
# Put the model and its calibration cache where repository/digits/config.pbtxt names them.
#
# Variable: TENSORRT, the version in Triton's container.
set -eu
cd "$(dirname "$0")/repository/digits"
mkdir -p 1
cp ../../../digits/digits.onnx 1/model.onnx
fastcal calibrate 1/model.onnx ../../../digits/images -o digits.cache ${TENSORRT:+--tensorrt "$TENSORRT"}
