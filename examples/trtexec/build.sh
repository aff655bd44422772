#!/bin/sh
# Build an INT8 engine with trtexec, from a calibration cache that fastcal writes without TensorRT and without a GPU.
#
#   build.sh [OPTION OF TRTEXEC...]      e.g. build.sh --tacticSources=-CUBLAS,-CUBLAS_LT,-CUDNN
#
# Writes digits.cache and digits.engine to this folder. Variables: MODEL, IMAGES, SHAPE (input:CxHxW without the batch),
# TENSORRT (the version that will read the cache; by default trtexec's).
set -eu
digits=$(cd "$(dirname "$0")/../digits" && pwd)
model=${MODEL:-$digits/digits.onnx}
images=${IMAGES:-$digits/images}
shape=${SHAPE:-image:3x32x32}
name=$(basename "$model" .onnx)
input=${shape%%:*} size=${shape#*:}

# TensorRT reads a cache of its own version only. trtexec introduces itself as [TensorRT v8601] or [TensorRT v101601].
version=${TENSORRT:-}
trtexec=$(command -v trtexec || true)
if [ -z "$version" ] && [ -n "$trtexec" ]; then
  version=$("$trtexec" --help 2>&1 | sed -n \
    -e 's/.*\[TensorRT v\([0-9]\)\([0-9]\)\([0-9][0-9]\)\].*/\1.\2.\3/p' \
    -e 's/.*\[TensorRT v\([0-9][0-9]\)\([0-9][0-9]\)\([0-9][0-9]\)\].*/\1.\2.\3/p' | head -n 1)
fi

fastcal calibrate "$model" "$images" -o "$name.cache" ${version:+--tensorrt "$version"}

if [ -z "$trtexec" ]; then
  echo "build.sh: no trtexec in PATH (TensorRT's archives and containers have it); $name.cache is written for it" >&2
  exit 1
fi
"$trtexec" --onnx="$model" --int8 --fp16 --calib="$name.cache" --saveEngine="$name.engine" --skipInference \
  --minShapes="$input:1x$size" --optShapes="$input:32x$size" --maxShapes="$input:64x$size" "$@" > "$name.log" 2>&1 || {
  echo "build.sh: trtexec failed; $name.log says why" >&2
  exit 1
}
[ -s "$name.engine" ] || { echo "build.sh: trtexec wrote no engine; $name.log says why" >&2; exit 1; }
echo "$name.engine: $(wc -c < "$name.engine") bytes, with the scales of $name.cache"
