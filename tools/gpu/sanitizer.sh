#!/bin/sh
# Piece 4, 9 minutes: compute-sanitizer, each of its tools within its own limit. initcheck may also report inputs that
# torch wrote, so it is the last.
piece_seconds=540
. "$(dirname "$0")/common.sh"

prepare
part memcheck 240 sh tests/cuda/sanitize.sh "$PY" memcheck
part racecheck 240 sh tests/cuda/sanitize.sh "$PY" racecheck
part synccheck 120 sh tests/cuda/sanitize.sh "$PY" synccheck
part initcheck 120 sh tests/cuda/sanitize.sh "$PY" initcheck
finish
