#!/bin/sh
# The core suite beside another torch: sh tools/test_torch.sh VERSION [pytest arguments].
# In an environment and a source tree of its own, the unpacked source distribution: the extension that is built there
# fits one torch only, and must not replace the one of this tree.
set -eu
cd "$(dirname "$0")/.."
version=$1
shift
venv=.venv-torch-$version
work=build/torch-$version

if [ ! -e "$venv/.installed" ]; then
    ${PYTHON:-python3} -m venv "$venv"
    # torch alone and first. Its triton comes with it, in the one version that fits.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$version"
    grep -vE '^(torch|triton)==' requirements-dev.txt > "$venv/requirements.txt"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$venv/requirements.txt"
    touch "$venv/.installed"
fi

python=$PWD/$venv/bin/python
PATH=$PWD/$venv/bin:$PATH
export PATH
rm -rf "$work"
mkdir -p "$work"
"$python" -m build --no-isolation --sdist --outdir "$work" . > "$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
tar -xzf "$work"/*.tar.gz -C "$work" --strip-components=1

cd "$work"
MIXOUT_KERNELS_CPU=1 MIXOUT_KERNELS_CUDA=0 "$python" -m pip install --quiet --disable-pip-version-check \
    --no-build-isolation --no-deps --editable .
"$python" -m pytest tests --ignore=tests/triton --ignore=tests/cuda "$@"
