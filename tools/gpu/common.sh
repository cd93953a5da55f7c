# Sourced by each piece, which has set `piece_seconds`: the settings, and parts that fail alone.
#
# PY=python3        the python of the GPU machine
# OUT=results/gpu   where the results go: PIECE.tar.gz, and a line for each part in summary.txt
#
# What a part writes is in the archive: its output in PART.log, its reports in the folder that it is given. The archive is
# written anew after every part, so a machine that is taken away loses the part that ran and no other.
piece=$(basename "$0" .sh)
cd "$(dirname "$0")/../.." || exit 1
PY=$(command -v "${PY:-python3}") || { echo "$piece: there is no ${PY:-python3} on PATH"; exit 1; }
OUT=${OUT:-results/gpu}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
results=$PWD/build/gpu/$piece
rm -rf "$results"
mkdir -p "$results"
# ninja, which compiles the kernels, lies beside python; the package is imported from here, installed or not.
PATH=$(dirname "$PY"):$PATH
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PATH PYTHONPATH PYTHONUNBUFFERED=1
started=$(date +%s)
failed=

say() {
    echo "$piece: $*" | tee -a "$OUT/summary.txt"
}

pack() {
    tar -czf "$OUT/.$piece.tar.gz" -C "$(dirname "$results")" "$piece" && mv "$OUT/.$piece.tar.gz" "$OUT/$piece.tar.gz"
}

# part NAME SECONDS COMMAND...: under its own limit, and in what is left of the piece's time.
part() {
    name=$1 limit=$2
    shift 2
    began=$(date +%s)
    left=$((started + piece_seconds - began))
    if [ "$left" -lt 5 ]; then
        say "$name: left out, no time is left"
        failed="$failed $name"
        return 1
    fi
    [ "$limit" -le "$left" ] || limit=$left
    timeout --kill-after=10 "$limit" "$@" > "$results/$name.log" 2>&1
    status=$?
    tail -n 15 "$results/$name.log"
    case $status in
        0) verdict=passed ;;
        124 | 137) verdict="stopped at its limit" ;;
        *) verdict="failed with status $status" ;;
    esac
    say "$name: $verdict, $(($(date +%s) - began)) of $limit s"
    [ "$status" -eq 0 ] || failed="$failed $name"
    pack
    return "$status"
}

# has MODULE CONSEQUENCE: whether python finds a module; what follows where it does not is said in one sentence.
has() {
    "$PY" -c "import importlib.util as u; raise SystemExit(u.find_spec('$1') is None)" && return 0
    say "python has no $1: $2"
    return 1
}

# pytest_options WORKERS SECONDS: in that many processes, with a limit for each test.
pytest_options() {
    pytest="-q -ra -p no:cacheprovider"
    if has xdist "the tests run in one process, and may not get to their end"; then
        pytest="$pytest -n $1"
    fi
    if has pytest_timeout "a test that hangs ends its part"; then
        pytest="$pytest --timeout $2"
    else
        # pyproject.toml sets a limit too, and --strict-config would take it for a mistake.
        pytest="$pytest -o addopts=--strict-markers"
    fi
}

# The machine, and the kernels: those that were built before, or now, for this GPU alone.
prepare() {
    part machine 60 sh -c 'nvidia-smi; "$0" -c "import torch; print(torch.__version__, torch.cuda.get_device_name())"' "$PY"
    part build 240 sh tools/gpu/build.sh "$PY"
}

finish() {
    if [ -n "$failed" ]; then
        say "RED:$failed; $(($(date +%s) - started)) s; the logs are in $piece.tar.gz"
        exit 1
    fi
    say "GREEN, $(($(date +%s) - started)) s"
}
