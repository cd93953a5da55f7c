#!/bin/sh
# What a step costs the host beside a CUDA build of torch, without a GPU: sh tools/host_time.sh VERSION [arguments of
# tools/host_time.py]. The CUDA kernels are compiled, for one architecture, since their launches are part of that cost.
set -eu
cd "$(dirname "$0")/.."
version=$1
shift
work=build/host-time-$version
. tools/torch_environment.sh

cd "$work"
"$python" -c "import torch; torch.version.cuda or exit('make host-time: torch $version is a build without CUDA here')"
MIXOUT_KERNELS_CPU=1 MIXOUT_KERNELS_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 \
    "$python" setup.py build_ext --inplace >> build.log 2>&1 || { cat build.log; exit 1; }
# Memory that all variants fit into together, so that they can take turns.
"$python" -m tools.stand_in --memory-gib 1024 "$python" -m tools.host_time "$@"
