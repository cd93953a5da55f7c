#!/bin/sh
# The test suite beside another torch, and what its triton compiles the kernels to: sh tools/test_torch.sh VERSION.
# ARGS goes to pytest, as in the Makefile.
set -eu
cd "$(dirname "$0")/.."
version=$1
work=build/torch-$version
. tools/torch_environment.sh

rm -f "$work"/build/.built-* # the unpacked tree has no extension yet
# The CUDA kernels are compiled by nvcc and know no torch type: another torch changes nothing in them.
export MIXOUT_KERNELS_CUDA=0
failed=0
make --keep-going --directory "$work" test PY="$python" || failed=1
make --directory "$work" codegen-triton PY="$python" ARGS= || failed=1
exit $failed
