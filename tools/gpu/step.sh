#!/bin/sh
# Piece 2, 6 minutes: the step of BERT-large, eager and as a CUDA graph, beside dropout.
piece_seconds=360
. "$(dirname "$0")/common.sh"

prepare
# A report is written at the end of its run: two runs, so that one that fails leaves the other.
step() {
    part "$1" 150 "$PY" -m benchmarks.step --device cuda --workloads bert-large --rounds 15 --no-compile \
        --only "$2" --output "$results/$1"
}
step p0.7 "no regularisation|mixout_kernels, sampler, p=0.7"
step p0.9 "mixout_kernels, sampler, p=0.9"
finish
