#!/bin/sh
# Every CUDA kernel under compute-sanitizer, on a GPU: bad accesses, races in shared memory, barriers in divergent code,
# reads of what was never written. Odd shapes, both layouts, both masks; some minutes. Usage: sanitize.sh [python]
set -e
python=${1:-python}
cd "$(dirname "$0")/../.."
# Without torch's caching allocator an access outside a tensor is outside an allocation.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck synccheck initcheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-regex kns=mixout "$python" -m pytest -q \
        -p no:cacheprovider tests/cuda/test_mix.py tests/cuda/test_columns.py tests/cuda/test_products.py \
        -k "test_shapes or test_scatter or test_mixout_list or test_operand or test_keep_mask"
done
