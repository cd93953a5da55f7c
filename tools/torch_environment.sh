# Sourced at the root of the repository, with `version` set: an environment with that torch, and a source tree of its own
# in `work`, the unpacked source distribution. The extension that is built there fits one torch only, and must not
# replace the one of this tree. `python` is the environment's.
venv=.venv-torch-$version

if [ ! -e "$venv/.installed" ]; then
    ${PYTHON:-python3} -m venv "$venv"
    # Its triton comes with it, in the one version that fits. In one call: pip replaces a torch of before by the newest
    # where a pinned package contradicts it, as setuptools 84 does torch 2.11, which wants less than 82.
    grep -vE '^(torch|triton|setuptools)==' requirements-dev.txt > "$venv/requirements.txt"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        "torch==$version" "setuptools>=77" -r "$venv/requirements.txt"
    touch "$venv/.installed"
fi

python=$PWD/$venv/bin/python
"$python" -c "import torch; torch.__version__.split('+')[0] == '$version' or exit(f'$venv has torch {torch.__version__}')"
PATH=$PWD/$venv/bin:$PATH
export PATH
# What was compiled before stays in build/: ninja compiles what has changed.
mkdir -p "$work"
find "$work" -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
"$python" -m build --no-isolation --sdist --outdir "$work" . > "$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
tar -xzf "$work"/*.tar.gz -C "$work" --strip-components=1
