#!/bin/sh
# Piece 2, 6 minutes: the step of BERT-large, eager and as a CUDA graph, beside dropout.
piece_seconds=360
. "$(dirname "$0")/common.sh"

prepare
part step 300 "$PY" -m benchmarks.step --device cuda --workloads bert-large --rounds 15 --no-compile \
    --only "no regularisation|mixout_kernels, sampler, p=" --output "$results"
finish
