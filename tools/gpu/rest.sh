#!/bin/sh
# Piece 5, 9 minutes, if time is left: the compiled step, and what the profiler says of the kernels.
piece_seconds=540
. "$(dirname "$0")/common.sh"

prepare
part compiled 300 "$PY" -m benchmarks.step --device cuda --workloads bert-large --rounds 10 \
    --only "torch.compile\(mixout_kernels" --output "$results"
part profile 180 ncu --target-processes all --kernel-name regex:mixout --launch-count 60 --set basic \
    "$PY" -m benchmarks.layers --device cuda --quick --launch eager --output "$results/profiled"
finish
