#!/bin/sh
# The core suite beside another torch: sh tools/test_torch.sh VERSION [pytest arguments].
set -eu
cd "$(dirname "$0")/.."
version=$1
shift
work=build/torch-$version
. tools/torch_environment.sh

cd "$work"
MIXOUT_KERNELS_CPU=1 MIXOUT_KERNELS_CUDA=0 "$python" -m pip install --quiet --disable-pip-version-check \
    --no-build-isolation --no-deps --editable .
"$python" -m pytest tests --ignore=tests/triton --ignore=tests/cuda "$@"
