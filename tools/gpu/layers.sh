#!/bin/sh
# Piece 3, 8 minutes: single layers in bfloat16, from few rows to many: on which side of the rule is which schedule faster?
piece_seconds=480
. "$(dirname "$0")/common.sh"

prepare
# A report is written at the end of its run: one for each kind of shape.
layers() {
    part "$1" 150 "$PY" -m benchmarks.layers --device cuda --seconds 3 --shapes "$2" --output "$results/$1"
}
layers small "x1024x1024-bf16"
layers large "x4096x4096-bf16"
layers oblong "x1024x4096-bf16|x4096x1024-bf16"
finish
