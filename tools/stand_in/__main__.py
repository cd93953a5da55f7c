"""Run a command beside the stand-in: ``python -m tools.stand_in [--launch-us 2] [--memory-gib 80] COMMAND ...``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tools import stand_in

BUILD = Path(__file__).resolve().parents[2] / "build" / "stand-in"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.stand_in", description="A command beside a GPU that is none")
    parser.add_argument("--launch-us", type=float, default=2, help="microseconds of a launch (%(default)g)")
    parser.add_argument("--memory-gib", type=int, default=80, help="memory of the device (%(default)s)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    options = parser.parse_args(arguments)
    if not options.command:
        parser.error("expected a command")
    try:
        library = stand_in.build(BUILD)
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    variables = stand_in.environment(library, options.launch_us, options.memory_gib)
    sys.stdout.flush()
    os.execvpe(options.command[0], options.command, {**os.environ, **variables})


if __name__ == "__main__":
    main()
