#!/bin/sh
# Every CUDA kernel under compute-sanitizer, on a GPU: bad accesses, races in shared memory, barriers in divergent code,
# reads of what was never written. Odd shapes, both layouts, every path of the mask; some minutes.
# Usage: sanitize.sh [python [tool...]]
#
# Every tool runs, whatever the others found. initcheck is the last: it may also report inputs that torch wrote, since
# only this package's kernels are watched.
python=${1:-python}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- memcheck racecheck synccheck initcheck
cd "$(dirname "$0")/../.." || exit 1
# Without torch's caching allocator an access outside a tensor is outside an allocation.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
failed=
for tool in "$@"; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-regex kns=mixout "$python" -m pytest -q \
        -p no:cacheprovider tests/cuda/test_mix.py tests/cuda/test_columns.py tests/cuda/test_products.py \
        -k "(test_shapes or test_scatter or test_mixout_list or test_operand or test_keep_mask) \
            and not (shard or every or output or layer)" ||
        failed="$failed $tool"
done
if [ -n "$failed" ]; then
    echo "sanitize: failed:$failed"
    exit 1
fi
echo "sanitize: every tool passed"
