#!/bin/sh
# Piece 3, 8 minutes: single layers in bfloat16, from few rows to many: on which side of the rule is which schedule faster?
piece_seconds=480
. "$(dirname "$0")/common.sh"

prepare
part layers 400 "$PY" -m benchmarks.layers --device cuda --seconds 3 --output "$results"
finish
