#!/bin/sh
# Piece 1, 9 minutes: are the kernels right? If this is red, no timing is worth anything.
piece_seconds=540
. "$(dirname "$0")/common.sh"

prepare
# shellcheck disable=SC2086  # $pytest is a list of options
pytest_options 8 60
part kernels 150 "$PY" -m pytest tests/cuda $pytest
part quick-layer 60 "$PY" -m benchmarks.layers --quick --output "$results/layers"
part quick-step 60 "$PY" -m benchmarks.step --quick --output "$results/step"
# The core suite, of it what runs on the GPU: cuda-cuda, triton-cuda, and what takes a device.
pytest_options 12 60
part core 300 "$PY" -m pytest tests --ignore=tests/cuda --ignore=tests/triton --backend cuda --backend triton -k cuda $pytest
finish
